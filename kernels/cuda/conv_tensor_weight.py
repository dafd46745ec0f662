"""The weight gradient on tensor cores as an implicit matrix product: outputs x (tap, channel), summed over the pixels.

    grad_weight[o, (t, u, c)] = sum over pixels of  grad[pixel, o] * x[the tap's place of the pixel, c]

in two stages, as in conv_product_weight.py: blocks sum parts of the pixels, which are then added in order. Both
operands have their channels last, in whole vectors (conv_tensor.in_vectors): a step's pixels are rows of both tiles. A
thread copies one vector of a tap for two pixels of each step, and moves on from pixel to pixel by counting.
"""

from numba import cuda
from numba.cuda.types import int32, int64

from tilewise.kernels.conv_geometry import Correlation
from tilewise.kernels.conv_plan import TILED_PIXELS, choose_weight_tile, split
from tilewise.kernels.cuda.conv_sums import add_parts, new_parts
from tilewise.kernels.cuda.conv_tensor import NOWHERE, in_vectors, locate
from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64, SUMS, ceil_div, device, kernel
from tilewise.kernels.cuda.memory import VECTOR_BYTES, at, dynamic_shared, load_vector, register_sums, store_vector
from tilewise.kernels.cuda.ptx import copy_async
from tilewise.kernels.cuda.tensor_product import (
    GAP,
    LARGE,
    SMALL,
    TensorLoader,
    TensorTile,
    make_deposit,
    make_tensor_product,
    matrix_loader,
)


def tap_loader(tile: TensorTile) -> TensorLoader:
    """Columns (t, u, c) of x, pixels being k: operands (x from the group's channels on, columns, columns of taps,
    channels, pixels of a row and rows of the result, steps of x, size, origin, stride, spacing of rows and columns)."""
    width, depth, pitch = tile.width, tile.depth, tile.columns + GAP
    line = tile.columns // width
    apart = tile.threads // line
    assert depth == 2 * apart

    @device
    def find(operands, pixel):
        _, _, _, _, ow, oh, (xn, _, _), _, _ = operands
        n, i, j = locate(pixel, oh, ow)
        return int64(n * xn), i, j

    @device
    def copy_one(target, operands, tap, found, is_there):
        (down, across, c), (image, i, j) = tap, found
        source, _, _, _, _, _, (_, xh, xw), (h, _, stride_h, _), (w, _, stride_w, _) = operands
        row, column = i * stride_h + down, j * stride_w + across
        inside = is_there and row >= 0 and row < h and column >= 0 and column < w
        copy_async(16, target, at(source, image + row * xh + column * xw + c if inside else 0), 16 if inside else 0)

    @device
    def advance(operands, found):
        image, i, j = found
        _, _, _, _, ow, oh, (xn, _, _), _, _ = operands
        j = int32(j + depth)
        while j >= ow:
            j, i = int32(j - ow), int32(i + 1)
            if i == oh:
                i, image = int32(0), int64(image + xn)
        return image, i, j

    @device
    def start(operands, first, begin, thread):
        _, columns, kw, channels, _, _, _, (_, top, _, spacing_h), (_, left, _, spacing_w) = operands
        column, pixel = first + thread % line * width, begin + thread // line
        number = column // channels
        down, across = top + number // kw * spacing_h, left + number % kw * spacing_w
        tap = int32(down if column < columns else NOWHERE), int32(across), int32(column - number * channels)
        mine = int32(thread // line * pitch + thread % line * width)
        return tap, find(operands, pixel), find(operands, pixel + apart), int32(thread // line), mine

    @device
    def copy(target, operands, place, k, end):
        tap, one, other, row, mine = place
        copy_one(at(target, mine), operands, tap, one, k + row < end)
        copy_one(at(target, mine + apart * pitch), operands, tap, other, k + row + apart < end)
        return tap, advance(operands, one), advance(operands, other), row, mine

    return TensorLoader(start, copy, False)


def _make(tile: TensorTile):
    product = make_tensor_product(tile, matrix_loader(tile, tile.rows, False), tap_loader(tile))
    deposit, pitch = make_deposit(tile)
    tile_rows, tile_columns, threads = tile.rows, tile.columns, tile.threads
    last_thread, fours = threads - 1, tile.columns // 4

    @kernel(
        threads=threads, blocks=tile.blocks, name=f"weight gradient tensor {tile.name}", dtypes=(tile.dtype,),
        least=(8, 0), promises=("HMMA", "LDGSTS", "STG.128"),
    )  # fmt: skip
    def weight_gradient_parts(
        grad: ELEMENTS, x: ELEMENTS, parts: SUMS, oh: INT64, ow: INT64, grad_pixel: INT64,
        h: INT32, top: INT32, stride_h: INT32, spacing_h: INT32, w: INT32, left: INT32, stride_w: INT32,
        spacing_w: INT32, xn: INT64, xh: INT64, xw: INT64,
        groups: INT64, outputs: INT64, padded_outputs: INT64, channels: INT32, columns: INT64, kw: INT32,
        column_tiles: INT64, pixels: INT64, per_part: INT64,
    ):  # fmt: skip
        """parts[part, group, o, column]; block (tile of outputs and of columns, group, part)."""
        group, part = cuda.blockIdx.y, cuda.blockIdx.z
        first_output = cuda.blockIdx.x // column_tiles * tile_rows
        first_column = cuda.blockIdx.x % column_tiles * tile_columns
        grads = at(grad, group * padded_outputs), padded_outputs, grad_pixel
        image = (
            at(x, group * channels), columns, kw, channels, ow, oh, (xn, xh, xw), (h, top, stride_h, spacing_h),
            (w, left, stride_w, spacing_w),
        )  # fmt: skip
        begin = part * per_part
        sums = product(grads, image, first_output, first_column, begin, min(begin + per_part, pixels))
        cuda.syncthreads()
        room = dynamic_shared(sums)
        deposit(room, sums)
        cuda.syncthreads()
        values = register_sums(x, 4)
        for vector in range(cuda.threadIdx.x & last_thread, tile_rows * fours, threads):
            o, column = vector // fours, vector % fours * 4
            if first_output + o < outputs and first_column + column < columns:
                line = (part * groups + group) * outputs + first_output + o
                load_vector(values, room, o * pitch + column)
                store_vector(parts, line * columns + first_column + column, values)

    return weight_gradient_parts


# TF32's large tile would take more registers than two blocks have.
_LARGEST = {8: (LARGE[8],), 4: ()}
weight_gradients = {tile: _make(tile) for tile in (LARGE[8], SMALL[8], SMALL[4])}


def weight_gradient(it: Correlation, grad, x, shape: tuple[int, ...], kept: dict):
    """conv2d's gradient with respect to a weight of that shape; `it`: its forward correlation. kept: of grad."""
    kw, taps, width = shape[3], shape[2] * shape[3], VECTOR_BYTES // x.dtype.itemsize
    if "vectors" not in kept:
        kept["vectors"] = in_vectors(grad, it.layout, it.groups)
    grads, padded_outputs = kept["vectors"]
    image, channels = in_vectors(x, it.layout, it.groups)
    columns = taps * channels
    tile = choose_weight_tile(it, *_LARGEST[width]) or SMALL[width]
    column_tiles = ceil_div(columns, tile.columns)
    tiles = ceil_div(it.outputs, tile.rows) * column_tiles
    many, per_part = split(it.pixels, tiles * it.groups, TILED_PIXELS)
    parts = new_parts(x.place, many, it.groups * it.outputs * columns, x.dtype)
    rows, across, all_channels = it.rows, it.columns, it.groups * channels
    weight_gradients[tile](
        x.place, (tiles, it.groups, many), grads, image, parts, rows.count, across.count, it.groups * padded_outputs,
        rows.size, rows.origin, rows.stride, rows.spacing, across.size, across.origin, across.stride, across.spacing,
        rows.size * across.size * all_channels, across.size * all_channels, all_channels,
        it.groups, it.outputs, padded_outputs, channels, columns, kw, column_tiles, it.pixels, per_part,
        shared=tile.shared_bytes(False, False),
    )  # fmt: skip
    return add_parts(parts, x.place.empty(shape, x.dtype), taps, channels, it.channels)
