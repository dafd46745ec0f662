"""Convolution as an implicit matrix product: outputs x pixels, summed over taps and channels; nothing is unfolded.

    y[o, pixel] = sum over k = (tap, c) of  packed[k, o] * x[c, the tap's place of the pixel]

The weights are packed first: rows k padded to whole steps and outputs to whole tiles with zeros, so that they are read
without a question. Of x, each thread loads numbers of one pixel, or of few, and zeros outside of the image:

    any channels    row by row of the sum; a thread counts channel, column, row of the tap on. Lanes run along pixels.
    whole           STEP divides the channels: a step lies within one tap, whose place is found once.
                    NCHW: lanes run along pixels. NHWC: a thread loads four channels of a pixel, 16 bytes in float32.
"""

from numba import cuda
from numba.cuda.types import int64

from tilewise.kernels.cuda.conv_direct import epilogue_arguments, finished
from tilewise.kernels.cuda.conv_geometry import Correlation
from tilewise.kernels.cuda.conv_tile import AREA, SIDE, STEP, clear, load_four, multiply, store_four
from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64, REAL, SUMS, ceil_div, kernel, sum_dtype
from tilewise.kernels.cuda.ptx import (
    VECTOR_BYTES,
    at,
    lanes,
    load_vector,
    narrow,
    register_sums,
    registers,
    shared_sums,
    widen,
    zero,
)

_PACK_THREADS = 256
_NOWHERE = -(1 << 40)  # a row so far outside that no tap reaches the image
# (outputs, pixels) of a block's tile: the large one reads each operand least often, the small one makes more blocks
TILES = ((128, 128), (64, 64))
_ENOUGH_BLOCKS = 128


@kernel(threads=_PACK_THREADS)
def pack_weights(
    weight: ELEMENTS, packed: SUMS, size: INT64, depth: INT64, padded_depth: INT64, outputs: INT64,
    padded_outputs: INT64, channels: INT64, group_step: INT64, output_step: INT64, channel_step: INT64, width: INT64,
    p0: INT64, p_step: INT64, q0: INT64, q_step: INT64, kw: INT64,
):  # fmt: skip
    """packed[g, k, o] for k = (t kw + u) channels + c; zeros from `depth` and `outputs` on."""
    number = cuda.blockIdx.x * _PACK_THREADS + cuda.threadIdx.x
    if number < size:
        o, rest = number % padded_outputs, number // padded_outputs
        k, group = rest % padded_depth, rest // padded_depth
        value = zero(weight)
        if o < outputs and k < depth:
            c, tap = k % channels, k // channels
            p, q = p0 + tap // kw * p_step, q0 + tap % kw * q_step
            source = group * group_step + o * output_step + c * channel_step + p * width + q
            value = widen(weight[source])
        packed[number] = value


def _make(block_outputs: int, block_pixels: int, channels_last: bool, whole: bool):
    threads = block_outputs * block_pixels // AREA
    by_vectors = channels_last and whole
    rows = STEP * block_pixels // threads  # numbers of x that a thread loads a step, of one pixel
    sharers = STEP // rows  # threads that load of the same pixel
    # sharers that are neighbours write rows of the sum `rows` apart at once: 4 more keep them in different banks
    pixel_row = block_pixels + (4 if by_vectors else 0)
    left_size, right_size = 2 * STEP * block_outputs, 2 * STEP * pixel_row
    half_outputs, half_pixels = block_outputs // 2, block_pixels // 2
    output_fours, fours = block_outputs // 4, STEP * block_outputs // 4 // threads  # groups of four weights
    staged_size = 4 * fours
    output_inner, chunk = channels_last, SIDE * threads  # neighbouring threads have neighbouring outputs, or pixels
    output_threads, pixel_threads = block_outputs // SIDE, block_pixels // SIDE
    name = f"implicit_{block_outputs}x{block_pixels}_{'nhwc' if channels_last else 'nchw'}{'_whole' if whole else ''}"

    @kernel(threads=threads, name=name)
    def implicit(
        x: ELEMENTS, packed: SUMS, y: ELEMENTS, bias: ELEMENTS, has_bias: INT32, extra: ELEMENTS, has_extra: INT32,
        code: INT32, slope: REAL,
        h: INT64, row0: INT64, row_step: INT64, oh: INT64, top: INT64, stride_h: INT64, spacing_h: INT64,
        w: INT64, col0: INT64, col_step: INT64, ow: INT64, left: INT64, stride_w: INT64, spacing_w: INT64,
        xn: INT64, xc: INT64, xh: INT64, xw: INT64, yn: INT64, yc: INT64, yh: INT64, yw: INT64,
        kw: INT64, taps: INT64, pixels: INT64, outputs: INT64, padded_outputs: INT64, channels: INT64, steps: INT64,
    ):  # fmt: skip
        """y of a Correlation; block (tile of pixels, tile of outputs, group)."""
        thread, group = cuda.threadIdx.x, cuda.blockIdx.z
        first_pixel, first_output = cuda.blockIdx.x * block_pixels, cuda.blockIdx.y * block_outputs
        weights, values = shared_sums(x, left_size), shared_sums(x, right_size)
        places = cuda.shared.array(block_pixels, int64)
        staged, loaded, numbers = register_sums(x, staged_size), register_sums(x, rows), registers(x, STEP)
        totals, a, b = register_sums(x, AREA), register_sums(x, SIDE), register_sums(x, SIDE)
        clear(totals, x)

        # the pixel whose numbers this thread loads: where its image begins, and its place under tap (0, 0)
        if by_vectors:
            own, own_row = thread // sharers, thread % sharers * rows
        else:
            own, own_row = thread % block_pixels, thread // block_pixels * rows
        pixel = first_pixel + own
        j, number = pixel % ow, pixel // ow
        i, n = number % oh, number // oh
        if own_row == 0:
            places[own] = n * yn + (row0 + i * row_step) * yh + (col0 + j * col_step) * yw
        base = n * xn + group * channels * xc
        first_row = top + i * stride_h if pixel < pixels else _NOWHERE
        first_column = left + j * stride_w

        if output_inner:
            mine_o, mine_p = thread % output_threads * 4, thread // output_threads * 4
        else:
            mine_o, mine_p = thread // pixel_threads * 4, thread % pixel_threads * 4
        # the tap (t, u) and the channel c of this thread's first row of the sum
        t, u, c = 0, 0, own_row
        packed_place = group * steps * STEP * padded_outputs + first_output
        for step in range(steps + 1):
            if step < steps:
                for f in range(fours):
                    piece = thread + f * threads
                    source = packed_place + piece // output_fours * padded_outputs + piece % output_fours * 4
                    load_four(at(staged, 4 * f), packed, source)
                packed_place += STEP * padded_outputs
                if whole:
                    row, column = first_row + t * spacing_h, first_column + u * spacing_w
                    source = base + row * xh + column * xw + c * xc
                    if row >= 0 and row < h and column >= 0 and column < w:
                        if by_vectors and lanes(x) <= 4:
                            for k in range(0, rows, lanes(x)):
                                load_vector(at(numbers, k), x, source + k)
                        else:
                            for k in range(rows):
                                numbers[k] = x[source + k * xc]
                        for k in range(rows):
                            loaded[k] = widen(numbers[k])
                    else:
                        for k in range(rows):
                            loaded[k] = zero(x)
                    c += STEP
                    if c >= channels:
                        c, u = own_row, u + 1
                        if u == kw:
                            u, t = 0, t + 1
                else:
                    for k in range(rows):
                        while c >= channels:
                            c, u = c - channels, u + 1
                            if u == kw:
                                u, t = 0, t + 1
                        row, column = first_row + t * spacing_h, first_column + u * spacing_w
                        inside = row >= 0 and row < h and column >= 0 and column < w and t * kw + u < taps
                        loaded[k] = widen(x[base + row * xh + column * xw + c * xc]) if inside else zero(x)
                        c += 1
                    c += STEP - rows
            if step > 0:
                before = (step - 1) % 2 * STEP
                multiply(
                    totals, weights, before * block_outputs + mine_o, block_outputs, half_outputs,
                    values, before * pixel_row + mine_p, pixel_row, half_pixels, a, b,
                )  # fmt: skip
            if step < steps:
                now = step % 2 * STEP
                for f in range(fours):
                    piece = thread + f * threads
                    store_four(weights, now * block_outputs + piece * 4, at(staged, 4 * f))
                for k in range(rows):
                    values[(now + own_row + k) * pixel_row + own] = loaded[k]
            cuda.syncthreads()

        for part in range(SIDE):
            # one row (or column) of every thread's results goes by way of shared memory, to be written in order
            half, inner = part // 4, part % 4
            cuda.syncthreads()
            if output_inner:
                for k in range(SIDE):
                    o = k // 4 * half_outputs + mine_o + k % 4
                    values[mine_p // 4 * block_outputs + o] = totals[k * SIDE + part]
            else:
                for k in range(SIDE):
                    p = k // 4 * half_pixels + mine_p + k % 4
                    values[mine_o // 4 * block_pixels + p] = totals[part * SIDE + k]
            cuda.syncthreads()
            for k in range(thread, chunk, threads):
                if output_inner:
                    o, p = k % block_outputs, k // block_outputs * 4 + inner + half * half_pixels
                else:
                    o, p = k // block_pixels * 4 + inner + half * half_outputs, k % block_pixels
                if first_output + o < outputs and first_pixel + p < pixels:
                    channel = group * outputs + first_output + o
                    place = places[p] + channel * yc
                    total = finished(values[k], channel, place, bias, has_bias, extra, has_extra, code, slope)
                    y[place] = narrow(total, y)

    return implicit


implicit_kernels = {
    (tile, last, whole): _make(*tile, last, whole) for tile in TILES for last in (False, True) for whole in (False, True)
}


def choose_tile(it: Correlation) -> tuple[int, int]:
    """The large tile where it is filled, and makes enough blocks."""
    large = TILES[0]
    blocks = ceil_div(it.outputs, large[0]) * ceil_div(it.pixels, large[1]) * it.groups
    return large if it.outputs > large[0] // 2 and blocks >= _ENOUGH_BLOCKS else TILES[1]


def packed_weights(it: Correlation, weight, block_outputs: int):
    """(the weights as `implicit` wants them, steps of the sum, padded outputs)."""
    depth = it.taps * it.channels
    steps, padded_outputs = ceil_div(depth, STEP), ceil_div(it.outputs, block_outputs) * block_outputs
    size = it.groups * steps * STEP * padded_outputs
    packed = weight.place.empty((size,), sum_dtype(weight.dtype))
    pack_weights(
        weight.place, ceil_div(size, _PACK_THREADS), weight, packed, size, depth, steps * STEP, it.outputs,
        padded_outputs, it.channels, it.group_step, it.output_step, it.channel_step, it.width, it.rows.first_tap,
        it.rows.tap_step, it.columns.first_tap, it.columns.tap_step, max(it.columns.taps, 1),
    )  # fmt: skip
    return packed, steps, padded_outputs


def correlate(it: Correlation, x, weight, y, bias, extra, code: int, tile: tuple[int, int] | None = None):
    """y = activation(the correlation + bias + extra); bias and extra may be None. tile: one of TILES."""
    tile = tile or choose_tile(it)
    packed, steps, padded_outputs = packed_weights(it, weight, tile[0])
    whole = it.channels % STEP == 0 and (not it.channels_last or x.pointer % VECTOR_BYTES == 0)
    grid = ceil_div(it.pixels, tile[1]), padded_outputs // tile[0], it.groups
    rows, columns = it.rows, it.columns
    implicit_kernels[tile, it.channels_last, whole](
        x.place, grid, x, packed, y, *epilogue_arguments(bias, extra, code), *rows.numbers[:7], *columns.numbers[:7],
        *it.steps, columns.taps, it.taps, it.pixels, it.outputs, padded_outputs, it.channels, steps,
    )  # fmt: skip
