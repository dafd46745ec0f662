"""Convolution on tensor cores as an implicit matrix product: pixels x outputs, summed over taps and channels.

    y[pixel, o] = sum over k = (tap, c) of  x[the tap's place of the pixel, c] * packed[k, o]

float16, and float32 rounded to TF32; see tensor_product.py for the product. x has its channels last, in whole vectors
of 16 bytes: each belongs to one tap, and comes to shared memory by one cp.async, or zeros where the tap is outside.
Where the layout is another, or the channels are not whole vectors, a copy in that form is made first (`in_vectors`),
which reads and writes x once; results are written in the layout of y from shared memory. The weights are packed: rows k
padded to whole steps, outputs to whole tiles, with zeros.
"""

from numba import cuda
from numba.cuda.types import int32, uint32

from tilewise.kernels import settings
from tilewise.kernels.conv_geometry import Correlation, pixels
from tilewise.kernels.conv_plan import choose_tensor_tile, made_of
from tilewise.kernels.cuda.conv_direct import epilogue_arguments, finished
from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64, REAL, ceil_div, device, kernel
from tilewise.kernels.cuda.memory import (
    VECTOR_BYTES,
    at,
    dynamic_shared,
    load_vector,
    narrow,
    register_sums,
    registers,
    shared,
    shared_indices,
    store_vector,
    zero,
)
from tilewise.kernels.cuda.ptx import copy_async
from tilewise.kernels.cuda.tensor_product import (
    GAP,
    LARGE,
    NARROW,
    SMALL,
    TensorLoader,
    TensorTile,
    make_deposit,
    make_tensor_product,
)

_THREADS = 256
_SIDE = 32  # of a tile that is transposed
NOWHERE = -(1 << 30)  # a row so far outside that no tap reaches the image
_FLOATS = ("float16", "float32")
MOST_CHANNELS = 65_535 * _SIDE  # that turn_channels_last has in its grid's y
# One channel would be padded to eight; the product without tensor cores is as fast then.
_LEAST_CHANNELS = 2


@kernel(threads=_THREADS, dtypes=_FLOATS)
def pack_tensor_weights(
    weight: ELEMENTS, packed: ELEMENTS, size: INT64, padded_depth: INT64, outputs: INT64, padded_outputs: INT64,
    channels: INT64, padded_channels: INT64, taps: INT64, group_step: INT64, output_step: INT64, channel_step: INT64,
    width: INT64, p0: INT64, p_step: INT64, q0: INT64, q_step: INT64, kw: INT64,
):  # fmt: skip
    """packed[g, k, o] for k = (t kw + u) padded_channels + c; zeros where there is no weight."""
    number = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
    if number < size:
        o, rest = number % padded_outputs, number // padded_outputs
        k, group = rest % padded_depth, rest // padded_depth
        c, tap = k % padded_channels, k // padded_channels
        value = narrow(zero(weight), weight)
        if o < outputs and c < channels and tap < taps:
            p, q = p0 + tap // kw * p_step, q0 + tap % kw * q_step
            value = weight[group * group_step + o * output_step + c * channel_step + p * width + q]
        packed[number] = value


@kernel(threads=_THREADS, dtypes=_FLOATS)
def turn_channels_last(
    x: ELEMENTS, result: ELEMENTS, area: INT64, tiles: INT64, channels: INT64, padded: INT64, all_padded: INT64,
    image_step: INT64, channel_step: INT64, pixel_step: INT64,
):  # fmt: skip
    """result[n, p, g padded + c] = x[n, g channels + c, p], zeros from c = channels on; block (image and tile of
    pixels, tile of channels), in which threads read along the pixels and write along the channels."""
    lane, warp = cuda.threadIdx.x % _SIDE, cuda.threadIdx.x // _SIDE
    image, tile = cuda.blockIdx.x // tiles, cuda.blockIdx.x % tiles
    first_pixel, first_channel = tile * _SIDE, cuda.blockIdx.y * _SIDE
    room = shared(x, 1056)  # 32 x 33
    for row in range(warp, _SIDE, _THREADS // _SIDE):
        number, pixel = first_channel + row, first_pixel + lane
        group, c = number // padded, number % padded
        value = narrow(zero(x), x)
        if pixel < area and number < all_padded and c < channels:
            value = x[image * image_step + (group * channels + c) * channel_step + pixel * pixel_step]
        room[row * (_SIDE + 1) + lane] = value
    cuda.syncthreads()
    for row in range(warp, _SIDE, _THREADS // _SIDE):
        number, pixel = first_channel + lane, first_pixel + row
        if pixel < area and number < all_padded:
            result[(image * area + pixel) * all_padded + number] = room[lane * (_SIDE + 1) + row]


@device
def locate(pixel, oh, ow):
    """(image, row, column) of a pixel of the result."""
    n = pixel // (oh * ow)
    rest = uint32(pixel - n * (oh * ow))
    return n, int32(rest // uint32(ow)), int32(rest % uint32(ow))


def pixel_loader(tile: TensorTile) -> TensorLoader:
    """Pixels of x under the taps: operands (x from the group's channels on, pixels, taps' rows and columns, channels,
    pixels of a row and rows of the result, steps of x, then size, origin, stride and spacing of rows and columns)."""
    width, depth, pitch = tile.width, tile.depth, tile.along
    line = depth // width  # vectors of a pixel in a step
    apart = tile.threads // line
    each = tile.rows // apart  # pixels of a thread
    assert each in (2, 4)

    @device
    def find(operands, pixel):
        _, count, _, _, _, ow, oh, (xn, xh, xw), (_, top, stride_h, _), (_, left, stride_w, _) = operands
        n, i, j = locate(pixel, oh, ow)
        row, column = top + i * stride_h, left + j * stride_w
        return n * xn + row * xh + column * xw, int32(row if pixel < count else NOWHERE), int32(column)

    @device
    def copy_one(target, operands, found, down, across, step):
        offset, row, column = found
        source, _, _, _, _, _, _, _, (h, _, _, _), (w, _, _, _) = operands
        row, column = row + down, column + across
        inside = row >= 0 and row < h and column >= 0 and column < w
        copy_async(16, target, at(source, offset + step if inside else 0), 16 if inside else 0)

    # Tuples, and one statement for each pixel: NVVM may leave a loop as it is, and then its array in memory.
    @device
    def find_all(operands, pixel):
        if each == 2:
            return find(operands, pixel), find(operands, pixel + apart)
        return (
            find(operands, pixel), find(operands, pixel + apart),
            find(operands, pixel + 2 * apart), find(operands, pixel + 3 * apart),
        )  # fmt: skip

    @device
    def copy_all(target, operands, found, down, across, step):
        copy_one(target, operands, found[0], down, across, step)
        copy_one(at(target, apart * pitch), operands, found[1], down, across, step)
        if each == 4:
            copy_one(at(target, 2 * apart * pitch), operands, found[2], down, across, step)
            copy_one(at(target, 3 * apart * pitch), operands, found[3], down, across, step)

    @device
    def start(operands, first, begin, thread):
        row, inner = thread // line, thread % line * width
        return find_all(operands, first + row), int32(inner), int32(0), int32(0), int32(row * pitch + inner)

    @device
    def copy(target, operands, place, k, end):
        found, c, t, u, mine = place
        _, _, kh, kw, channels, _, _, (_, xh, xw), (_, _, _, spacing_h), (_, _, _, spacing_w) = operands
        while c >= channels:  # the tap and the channel of this thread's vector
            c, u = int32(c - channels), int32(u + 1)
            if u == kw:
                u, t = int32(0), int32(t + 1)
        down = t * spacing_h if t < kh else NOWHERE
        across = u * spacing_w
        copy_all(at(target, mine), operands, found, down, across, down * xh + across * xw + c)
        return found, int32(c + depth), t, u, mine

    return TensorLoader(start, copy, True)


def packed_loader(tile: TensorTile) -> TensorLoader:
    """Packed weights: operands (pointer, padded outputs)."""
    width, depth, pitch = tile.width, tile.depth, tile.columns + GAP
    line = tile.columns // width
    apart = tile.threads // line
    each = depth // apart
    assert apart * each == depth

    @device
    def start(operands, first, begin, thread):
        row, column = thread // line, thread % line * width
        return at(operands[0], (begin + row) * operands[1] + first + column), int32(row * pitch + column)

    @device
    def copy(target, operands, place, k, end):
        source, mine = place
        for e in range(each):
            copy_async(16, at(target, mine + e * apart * pitch), at(source, e * apart * operands[1]), 16)
        return at(source, depth * operands[1]), mine

    return TensorLoader(start, copy, False)


def _make(tile: TensorTile):
    product = make_tensor_product(tile, pixel_loader(tile), packed_loader(tile))
    deposit, pitch = make_deposit(tile)
    deposit_columns, column_pitch = make_deposit(tile, by_columns=True)
    tile_rows, tile_columns, threads, width = tile.rows, tile.columns, tile.threads, tile.width
    last_thread, line = threads - 1, tile.columns // tile.width

    @kernel(
        threads=threads, blocks=tile.blocks, name=f"convolution tensor {tile.name}", dtypes=(tile.dtype,),
        least=(8, 0), promises=("HMMA", "LDGSTS", "STG.128"),
    )  # fmt: skip
    def convolution(
        x: ELEMENTS, packed: ELEMENTS, y: ELEMENTS, bias: ELEMENTS, has_bias: INT32, extra: ELEMENTS, has_extra: INT32,
        code: INT32, slope: REAL,
        h: INT32, row0: INT64, row_step: INT64, oh: INT64, top: INT32, stride_h: INT32, spacing_h: INT32,
        w: INT32, col0: INT64, col_step: INT64, ow: INT64, left: INT32, stride_w: INT32, spacing_w: INT32,
        xn: INT64, xh: INT64, xw: INT64, yn: INT64, yc: INT64, yh: INT64, yw: INT64,
        kh: INT32, kw: INT32, pixels: INT64, outputs: INT64, padded_outputs: INT64, channels: INT32, depth: INT64,
        vectors: INT32,
    ):  # fmt: skip
        """y of a Correlation; block (tile of pixels, tile of outputs, group). vectors: y has its channels last, and
        they are whole vectors."""
        thread, group = cuda.threadIdx.x & last_thread, cuda.blockIdx.z
        first_pixel, first_output = cuda.blockIdx.x * tile_rows, cuda.blockIdx.y * tile_columns
        places = shared_indices(tile_rows)
        for p in range(thread, tile_rows, threads):
            n, i, j = locate(first_pixel + p, oh, ow)
            places[p] = n * yn + (row0 + i * row_step) * yh + (col0 + j * col_step) * yw
        image = (
            at(x, group * channels), pixels, kh, kw, channels, ow, oh, (xn, xh, xw), (h, top, stride_h, spacing_h),
            (w, left, stride_w, spacing_w),
        )  # fmt: skip
        weights = at(packed, group * depth * padded_outputs), padded_outputs
        sums = product(image, weights, first_pixel, first_output, 0, depth)
        first_channel = group * outputs + first_output
        cuda.syncthreads()
        room = dynamic_shared(sums)
        if vectors:
            deposit(room, sums)
        else:
            deposit_columns(room, sums)
        cuda.syncthreads()
        if vectors:
            values, results = register_sums(x, 8), registers(y, 8)
            for number in range(thread, tile_rows * line, threads):
                p, o = number // line, number % line * width
                if first_pixel + p < pixels and first_output + o < outputs:
                    channel = first_channel + o
                    place = places[p] + channel
                    for i in range(0, width, 4):
                        load_vector(at(values, i), room, p * pitch + o + i)
                    for i in range(width):
                        total = finished(
                            values[i], channel + i, place + i, bias, has_bias, extra, has_extra, code, slope
                        )
                        results[i] = narrow(total, y)
                    store_vector(y, place, results)
        else:
            for number in range(thread, tile_rows * tile_columns, threads):
                p, o = number % tile_rows, number // tile_rows
                if first_pixel + p < pixels and first_output + o < outputs:
                    channel = first_channel + o
                    place, value = places[p] + channel * yc, room[o * column_pitch + p]
                    y[place] = narrow(finished(value, channel, place, bias, has_bias, extra, has_extra, code, slope), y)

    return convolution


convolutions = {tile: _make(tile) for width in (8, 4) for tile in (LARGE[width], NARROW[width], SMALL[width])}


def applies(it: Correlation, dtype, engine) -> bool:
    """Whether tensor cores may and can compute it; pixels of one image are counted in 32 bits."""
    axes = it.rows, it.columns
    if it.rows.count * it.columns.count >> 32 or any(max(a.size, a.count * a.stride) > -NOWHERE // 2 for a in axes):
        return False
    width = VECTOR_BYTES // dtype.itemsize
    if it.groups * ceil_div(max(it.channels, it.outputs), width) * width > MOST_CHANNELS:
        return False
    rounded = dtype.name == "float32" and settings.active().tf32
    allowed = dtype.name == "float16" or rounded
    return allowed and engine.capability >= (8, 0) and it.channels >= _LEAST_CHANNELS


def choose_tile(it: Correlation, width: int, multiprocessors: int) -> TensorTile:
    return choose_tensor_tile(it, multiprocessors, LARGE[width], NARROW[width]) or SMALL[width]


def in_vectors(x, layout: str, groups: int):
    """(x with its channels last and each group's padded to whole vectors, channels of a group then)."""
    height, columns = pixels(x.shape, layout)
    all_channels = x.shape[1] if layout == "NCHW" else x.shape[3]
    channels, width = all_channels // groups, VECTOR_BYTES // x.dtype.itemsize
    padded = ceil_div(channels, width) * width
    if layout == "NHWC" and padded == channels:
        return x, channels
    images, area, all_padded = x.shape[0], height * columns, groups * padded
    result = x.place.empty((images, height, columns, all_padded), x.dtype)
    steps = (area * all_channels, area, 1) if layout == "NCHW" else (area * all_channels, 1, all_channels)
    tiles = ceil_div(area, _SIDE)
    turn_channels_last(
        x.place, (images * tiles, ceil_div(all_padded, _SIDE), 1), x, result, area, tiles, channels, padded, all_padded,
        *steps,
    )  # fmt: skip
    return result, padded


def correlate(it: Correlation, x_and_channels, weight, y, bias, extra, code: int, tile: TensorTile | None = None):
    """y = activation(the correlation + bias + extra) of what in_vectors returned; bias and extra may be None."""
    x, channels = x_and_channels
    width = VECTOR_BYTES // x.dtype.itemsize
    tile = tile or choose_tile(it, width, x.place.engine.multiprocessors)
    rows, columns, kw = it.rows, it.columns, max(it.columns.taps, 1)
    depth = ceil_div(it.taps * channels, tile.depth) * tile.depth
    padded_outputs = ceil_div(it.outputs, tile.columns) * tile.columns

    def write(packed):
        pack_tensor_weights(
            x.place, ceil_div(packed.size, _THREADS), weight, packed, packed.size, depth, it.outputs, padded_outputs,
            it.channels, channels, it.taps, it.group_step, it.output_step, it.channel_step, it.width, rows.first_tap,
            rows.tap_step, columns.first_tap, columns.tap_step, kw,
        )  # fmt: skip

    packed = made_of(weight, "tensor", (it.groups, depth, padded_outputs), x.dtype, write)
    all_channels = it.groups * channels
    steps = rows.size * columns.size * all_channels, columns.size * all_channels, all_channels
    vectors = it.channels_last and it.outputs % width == 0
    grid = ceil_div(it.pixels, tile.rows), padded_outputs // tile.columns, it.groups
    convolutions[tile](
        x.place, grid, x, packed, y, *epilogue_arguments(bias, extra, code), *rows.numbers[:7],
        *columns.numbers[:7], *steps, *it.steps[4:], rows.taps, kw, it.pixels, it.outputs, padded_outputs, channels,
        depth, vectors, shared=tile.shared_bytes(True, False),
    )  # fmt: skip
