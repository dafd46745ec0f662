"""The weight gradient as an implicit matrix product: outputs x (channel, tap), summed over the pixels of all images.

    grad_weight[o, (c, t, u)] = sum over pixels of  grad[o, pixel] * x[c, the tap's place of the pixel]

in two stages (conv_sums.py): blocks sum parts of the pixels, which are then added in order. What lies side by side in
memory is shared out along the lanes of a warp:

    NCHW   pixels: a thread has every eighth pixel, of several outputs and columns (c, t, u); 8 lanes read 32 bytes
    NHWC   channels: a thread has one output and one column (t, u, c), and neighbouring pixels
"""

from numba import cuda
from numba.cuda import types

from tilewise.kernels.conv_geometry import Correlation, image_steps
from tilewise.kernels.conv_plan import TILED_PIXELS, split
from tilewise.kernels.cuda.conv_sums import add_parts, new_parts
from tilewise.kernels.cuda.launch import ELEMENTS, INT64, SUMS, ceil_div, kernel
from tilewise.kernels.cuda.memory import at, register_sums, shared_sums, widen, zero
from tilewise.kernels.cuda.product import PAD, Tile, make_first_element, make_multiply

_DEPTH = 8
TILE = Tile((2, 1), (8, 8), _DEPTH, blocks=3)
DOUBLE_TILE = Tile((2, 1), (4, 4), _DEPTH, blocks=3)  # 64 sums in float64 would not fit the registers


def _make(tile: Tile, channels_last: bool):
    threads, depth = tile.threads, tile.depth
    last_thread = threads - 1
    size = tile.rows
    assert size == tile.columns
    count = depth * size // threads  # numbers of each operand that a thread loads a step
    together = threads // depth  # NCHW: rows that are loaded at a time
    pitch = size + PAD
    stage = depth * pitch
    room = 2 * stage
    each_rows, each_columns = tile.each
    sums = each_rows * each_columns
    row_stride, column_stride = 4 * tile.lanes[0], 4 * tile.lanes[1]
    multiply, first_element = make_multiply(tile), make_first_element(tile)
    own = 1 if channels_last else count  # outputs and columns that a thread loads
    name = f"implicit_weight_{tile.name}_{'nhwc' if channels_last else 'nchw'}"

    dtypes = ("float64",) if tile is DOUBLE_TILE else ("float16", "float32")
    promises = {"float16": ("FFMA", "LDS.128"), "float32": ("FFMA", "LDS.128"), "float64": ("DFMA", "LDS.128")}

    @kernel(threads=threads, blocks=tile.blocks, name=name, dtypes=dtypes, promises=promises)
    def implicit_weight(
        grad: ELEMENTS, x: ELEMENTS, parts: SUMS, oh: INT64, ow: INT64, h: INT64, w: INT64,
        top: INT64, left: INT64, stride_h: INT64, stride_w: INT64, dilation_h: INT64, dilation_w: INT64,
        gn: INT64, gc: INT64, gh: INT64, gw: INT64, xn: INT64, xc: INT64, xh: INT64, xw: INT64,
        groups: INT64, outputs: INT64, channels: INT64, taps: INT64, kw: INT64, column_tiles: INT64, pixels: INT64,
        per_part: INT64,
    ):  # fmt: skip
        """parts[part, o, column]; block (tile of outputs and of columns, group, part)."""
        thread, group, part = cuda.threadIdx.x & last_thread, cuda.blockIdx.y, cuda.blockIdx.z
        first_output = cuda.blockIdx.x // column_tiles * size
        first_column = cuda.blockIdx.x % column_tiles * size
        columns = channels * taps
        lefts, rights = shared_sums(grad, room), shared_sums(grad, room)
        left_loaded, right_loaded = register_sums(grad, count), register_sums(grad, count)
        totals = register_sums(grad, sums)
        for k in range(sums):
            totals[k] = zero(grad)
        my_row, my_column = first_element(thread)

        # what this thread loads: `own` outputs and columns from `mine` on, and the pixel k of the step
        if channels_last:
            mine, own_k = thread % size, thread // size * count
        else:
            mine, own_k = thread // depth, thread % depth
        sources = cuda.local.array(own, types.int64)
        rows, places = cuda.local.array(own, types.int32), cuda.local.array(own, types.int32)
        for e in range(own):
            # what a thread finds beyond the last column meets only sums that belong to none
            column = min(first_column + mine + e * together, columns - 1)
            if channels_last:
                c, tap = column % channels, column // channels
            else:
                c, tap = column // taps, column % taps
            rows[e], places[e] = top + tap // kw * dilation_h, left + tap % kw * dilation_w
            sources[e] = (group * channels + c) * xc
        begin, end = part * per_part, min((part + 1) * per_part, pixels)
        k = begin + own_k
        j, i = k % ow, k // ow
        i, n = i % oh, i // oh
        steps = (end - begin + depth - 1) // depth
        for step in range(steps + 1):
            if step < steps:
                for e in range(count):
                    r, s = (
                        i * stride_h + rows[0 if channels_last else e],
                        j * stride_w + places[0 if channels_last else e],
                    )
                    inside = k < end and r >= 0 and r < h and s >= 0 and s < w
                    place = sources[0 if channels_last else e] + n * xn + r * xh + s * xw
                    right_loaded[e] = widen(x[place]) if inside else zero(grad)
                    o = first_output + mine + (0 if channels_last else e * together)
                    place = n * gn + (group * outputs + o) * gc + i * gh + j * gw
                    left_loaded[e] = widen(grad[place]) if k < end and o < outputs else zero(grad)
                    if channels_last:
                        k, j = k + 1, j + 1
                        if j == ow:
                            j, i = 0, i + 1
                            if i == oh:
                                i, n = 0, n + 1
                skip = depth - count if channels_last else depth
                k, j = k + skip, j + skip
                while j >= ow:
                    j, i = j - ow, i + 1
                    if i == oh:
                        i, n = 0, n + 1
            if step > 0:
                before = (step - 1 & 1) * stage
                multiply(totals, at(lefts, before + my_row), at(rights, before + my_column))
            if step < steps:
                now = (step & 1) * stage
                for e in range(count):
                    target = now + own_k * pitch + mine + (e * pitch if channels_last else e * together)
                    lefts[target], rights[target] = left_loaded[e], right_loaded[e]
            cuda.syncthreads()

        for i in range(each_rows):
            o = first_output + my_row + i // 4 * row_stride + i % 4
            for j in range(each_columns):
                column = first_column + my_column + j // 4 * column_stride + j % 4
                if o < outputs and column < columns:
                    line = (part * groups + group) * outputs + o
                    parts[line * columns + column] = totals[i * each_columns + j]

    return implicit_weight


weight_kernels = {(tile, last): _make(tile, last) for tile in (TILE, DOUBLE_TILE) for last in (False, True)}


def weight_gradient(it: Correlation, grad, x, shape: tuple[int, ...]):
    """conv2d's gradient with respect to a weight of that shape; `it`: its forward correlation."""
    all_outputs, channels, *kernel = shape
    taps = kernel[0] * kernel[1]
    columns = channels * taps
    tile = DOUBLE_TILE if grad.dtype.itemsize == 8 else TILE
    column_tiles = ceil_div(columns, tile.columns)
    tiles = ceil_div(it.outputs, tile.rows) * column_tiles
    many, per_part = split(it.pixels, tiles * it.groups, TILED_PIXELS)
    parts = new_parts(grad.place, many, all_outputs * columns, grad.dtype)
    rows, across = it.rows, it.columns
    weight_kernels[tile, it.channels_last](
        grad.place, (tiles, it.groups, many), grad, x, parts, rows.count, across.count, rows.size, across.size,
        rows.origin, across.origin, rows.stride, across.stride, rows.spacing, across.spacing,
        *image_steps(it.shape_y, it.layout), *image_steps(it.shape_x, it.layout),
        it.groups, it.outputs, channels, taps, kernel[1], column_tiles, it.pixels, per_part,
    )  # fmt: skip
    result = grad.place.empty(shape, grad.dtype)
    return add_parts(parts, result, taps, channels) if it.channels_last else add_parts(parts, result)
