"""Convolution as an implicit matrix product: outputs x pixels, summed over taps and channels; nothing is unfolded.

    y[o, pixel] = sum over k = (tap, c) of  packed[k, o] * x[c, the tap's place of the pixel]

The weights are packed first: rows k padded to whole steps and outputs to whole tiles with zeros, so that they are read
without a question. Of x, each thread loads numbers of one pixel, and zeros outside of the image:

    any channels    row by row of the sum; a thread counts channel, column, row of the tap on. Lanes run along pixels.
    whole           the step divides the channels, and lies within one tap, whose place is found once.
                    NCHW: lanes run along pixels. NHWC: a thread loads neighbouring channels, 16 bytes at a time.

The loop is product.py's, with this loading: two pairs of tiles in shared memory, one of them multiplied while the
next numbers come into registers.
"""

from math import prod

from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic

from tilewise.kernels import conv_plan
from tilewise.kernels.activation_plan import NONE
from tilewise.kernels.conv_geometry import Correlation
from tilewise.kernels.cuda.conv_direct import epilogue_arguments, finished
from tilewise.kernels.cuda.launch import ELEMENTS, FLOATS, INT32, INT64, REAL, SUMS, ceil_div, device, kernel, sum_dtype
from tilewise.kernels.cuda.memory import (
    at,
    lanes,
    load_vector,
    narrow,
    register_sums,
    registers,
    shared_indices,
    shared_sums,
    store_vector,
    widen,
    zero,
)
from tilewise.kernels.cuda.product import PAD, Tile, make_first_element, make_multiply

_PACK_THREADS = 256
_NOWHERE = -(1 << 40)  # a row so far outside that no tap reaches the image
_DEPTH = 8
# Tiles of outputs x pixels. The large one reads each operand least often, the middle one makes more blocks. The low one
# wastes less where there are few outputs, and is the one whose sums fit the registers in float64.
LARGE = Tile((4, 2), (8, 8), _DEPTH, blocks=2)
MIDDLE = Tile((2, 1), (8, 8), _DEPTH, blocks=4)
LOW = Tile((2, 2), (4, 8), _DEPTH, blocks=2)
_NO_DOUBLES = ("float16", "float32")
_PROMISED = ("FFMA", "LDS.128", "LDG.128")


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
            value = widen(weight[group * group_step + o * output_step + c * channel_step + p * width + q])
        packed[number] = value


@device
def load_four(target, source, index):
    """target[0 .. 3] = source[index ...], from a multiple of 16 bytes; numbers of 4 or 8 bytes."""
    for k in range(0, 4, lanes(source)):
        load_vector(at(target, k), source, index + k)


@device
def store_four(target, index, source):
    """target[index ...] = source[0 .. 3], to a multiple of 16 bytes; numbers of 4 or 8 bytes."""
    for k in range(0, 4, lanes(target)):
        store_vector(target, index + k, at(source, k))


@intrinsic
def pick(typingctx, values, step, count, which):
    """values[which * step] of `count` registers: each is looked at, since registers have no index."""
    if not isinstance(step, types.IntegerLiteral) or not isinstance(count, types.IntegerLiteral):
        return None
    distance, many = step.literal_value, count.literal_value

    def codegen(context, builder, signature, args):
        pointer, _, _, index = args
        chosen = builder.load(pointer)
        for i in range(1, many):
            other = builder.load(builder.gep(pointer, [ir.Constant(ir.IntType(64), i * distance)]))
            hit = builder.icmp_signed("==", index, ir.Constant(index.type, i))
            chosen = builder.select(hit, other, chosen)
        return chosen

    return values.dtype(values, step, count, which), codegen


def _make_spread(tile: Tile, channels_last: bool):
    """The device function that puts row `part` of every thread's results (column, where channels are last) in order,
    and the one that tells which (output, pixel) of the tile then lies at a place."""
    outputs, pixels = tile.rows, tile.columns
    each_outputs, each_pixels = tile.each
    lane_outputs, lane_pixels = tile.lanes
    pitch = (outputs if channels_last else pixels) + PAD
    warp_outputs, warp_pixels = lane_outputs * each_outputs, lane_pixels * each_pixels

    @device
    def spread(room, totals, part, o, p):
        if channels_last:
            line = p // warp_pixels * lane_pixels + p % warp_pixels // 4
            for i in range(each_outputs):
                room[line * pitch + o + i // 4 * 4 * lane_outputs + i % 4] = pick(
                    at(totals, i * each_pixels), 1, each_pixels, part
                )
        else:
            line = o // warp_outputs * lane_outputs + o % warp_outputs // 4
            for j in range(each_pixels):
                room[line * pitch + p + j // 4 * 4 * lane_pixels + j % 4] = pick(
                    at(totals, j), each_pixels, each_outputs, part
                )

    @device
    def whose(number, part):
        if channels_last:
            line, o = number // outputs, number % outputs
            first = line // lane_pixels * warp_pixels + line % lane_pixels * 4
            return o, first + part // 4 * 4 * lane_pixels + part % 4, line * pitch + o
        line, p = number // pixels, number % pixels
        first = line // lane_outputs * warp_outputs + line % lane_outputs * 4
        return first + part // 4 * 4 * lane_outputs + part % 4, p, line * pitch + p

    return spread, whose


def _make(tile: Tile, channels_last: bool, whole: bool):
    threads, block_outputs, block_pixels, depth = tile.threads, tile.rows, tile.columns, tile.depth
    last_thread = threads - 1
    by_vectors = channels_last and whole
    rows = depth * block_pixels // threads  # numbers of x that a thread loads a step, of one pixel
    sharers = depth // rows  # threads that load of the same pixel
    assert sharers * rows == depth
    output_pitch, pixel_pitch = block_outputs + PAD, block_pixels + PAD
    left_stage, right_stage = depth * output_pitch, depth * pixel_pitch
    left_size, right_size = 2 * left_stage, 2 * right_stage
    output_fours, all_fours = block_outputs // 4, depth * block_outputs // 4  # groups of four weights
    fours = ceil_div(all_fours, threads)
    staged_size = 4 * fours
    each_outputs, each_pixels = tile.each
    sums = each_outputs * each_pixels
    parts, chunk = (each_pixels, each_outputs * threads) if channels_last else (each_outputs, each_pixels * threads)
    multiply, first_element = make_multiply(tile), make_first_element(tile)
    spread, whose = _make_spread(tile, channels_last)
    name = f"implicit_{tile.name}_{'nhwc' if channels_last else 'nchw'}{'_whole' if whole else ''}"

    @kernel(
        threads=threads, blocks=tile.blocks, name=name, dtypes=FLOATS if tile is LOW else _NO_DOUBLES,
        promises={"float16": _PROMISED, "float32": _PROMISED, "float64": ("DFMA", "LDS.128")},
    )  # fmt: skip
    def implicit(
        x: ELEMENTS, packed: SUMS, y: ELEMENTS, bias: ELEMENTS, has_bias: INT32, extra: ELEMENTS, has_extra: INT32,
        code: INT32, slope: REAL,
        h: INT64, row0: INT64, row_step: INT64, oh: INT64, top: INT64, stride_h: INT64, spacing_h: INT64,
        w: INT64, col0: INT64, col_step: INT64, ow: INT64, left: INT64, stride_w: INT64, spacing_w: INT64,
        xn: INT64, xc: INT64, xh: INT64, xw: INT64, yn: INT64, yc: INT64, yh: INT64, yw: INT64,
        kw: INT64, taps: INT64, pixels: INT64, outputs: INT64, padded_outputs: INT64, channels: INT64, steps: INT64,
    ):  # fmt: skip
        """y of a Correlation; block (tile of pixels, tile of outputs, group)."""
        thread, group = cuda.threadIdx.x & last_thread, cuda.blockIdx.z
        first_pixel, first_output = cuda.blockIdx.x * block_pixels, cuda.blockIdx.y * block_outputs
        weights, values = shared_sums(x, left_size), shared_sums(x, right_size)
        places = shared_indices(block_pixels)
        staged, loaded, numbers = register_sums(x, staged_size), register_sums(x, rows), registers(x, 8)
        totals = register_sums(x, sums)
        for k in range(sums):
            totals[k] = zero(x)

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

        my_output, my_pixel = first_element(thread)
        t, u, c = 0, 0, own_row  # the tap and the channel of this thread's first row of the sum
        packed_place = group * steps * depth * padded_outputs + first_output
        for step in range(steps + 1):
            if step < steps:
                for f in range(fours):
                    piece = thread + f * threads
                    source = packed_place + piece // output_fours * padded_outputs + piece % output_fours * 4
                    if piece < all_fours:
                        load_four(at(staged, 4 * f), packed, source)
                packed_place += depth * padded_outputs
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
                    c += depth
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
                    c += depth - rows
            if step > 0:
                before = (step - 1) & 1
                multiply(
                    totals, at(weights, before * left_stage + my_output), at(values, before * right_stage + my_pixel)
                )
            if step < steps:
                now = step & 1
                for f in range(fours):
                    piece = thread + f * threads
                    target = now * left_stage + piece // output_fours * output_pitch + piece % output_fours * 4
                    if piece < all_fours:
                        store_four(weights, target, at(staged, 4 * f))
                for k in range(rows):
                    values[now * right_stage + (own_row + k) * pixel_pitch + own] = loaded[k]
            cuda.syncthreads()

        for part in range(parts):
            # the results go by way of shared memory, so that neighbouring threads write neighbouring numbers
            spread(values, totals, part, my_output, my_pixel)
            cuda.syncthreads()
            for k in range(thread, chunk, threads):
                o, p, source = whose(k, part)
                if first_output + o < outputs and first_pixel + p < pixels:
                    channel = group * outputs + first_output + o
                    place = places[p] + channel * yc
                    total = finished(values[source], channel, place, bias, has_bias, extra, has_extra, code, slope)
                    y[place] = narrow(total, y)
            cuda.syncthreads()

    return implicit


implicit_kernels = {
    (tile, last, whole): _make(tile, last, whole)
    for tile in (LARGE, MIDDLE, LOW)
    for last in (False, True)
    for whole in (False, True)
}


def tiles_for(dtype) -> tuple[Tile, ...]:
    return (LOW,) if dtype.itemsize == 8 else (LARGE, MIDDLE, LOW)


def choose_tile(it: Correlation, dtype) -> Tile:
    return LOW if dtype.itemsize == 8 else conv_plan.choose_tile(it, LARGE, MIDDLE, LOW)


def packed_weights(it: Correlation, weight, block_outputs: int):
    """(the weights as `implicit` wants them, steps of the sum, padded outputs)."""
    depth = it.taps * it.channels
    steps, padded_outputs = ceil_div(depth, _DEPTH), ceil_div(it.outputs, block_outputs) * block_outputs
    shape = it.groups, steps * _DEPTH, padded_outputs
    size = prod(shape)

    def write(packed):
        pack_weights(
            weight.place, ceil_div(size, _PACK_THREADS), weight, packed, size, depth, steps * _DEPTH, it.outputs,
            padded_outputs, it.channels, it.group_step, it.output_step, it.channel_step, it.width, it.rows.first_tap,
            it.rows.tap_step, it.columns.first_tap, it.columns.tap_step, max(it.columns.taps, 1),
        )  # fmt: skip

    return conv_plan.made_of(weight, "gemm", shape, sum_dtype(weight.dtype), write), steps, padded_outputs


def correlate(it: Correlation, x, weight, y, bias, extra, code: int, tile: Tile | None = None):
    """y = activation(the correlation + bias + extra); bias and extra may be None. tile: one of tiles_for."""
    tile = tile or choose_tile(it, x.dtype)
    packed, steps, padded_outputs = packed_weights(it, weight, tile.rows)
    multiply_packed(it, x, packed, y, tile, steps, padded_outputs, bias, extra, code)


def multiply_packed(it, x, packed, y, tile, steps, padded_outputs, bias=None, extra=None, code: int = NONE):
    """The same with weights as `implicit` wants them."""
    whole = it.channels % _DEPTH == 0
    grid = ceil_div(it.pixels, tile.columns), padded_outputs // tile.rows, it.groups
    rows, columns = it.rows, it.columns
    implicit_kernels[tile, it.channels_last, whole](
        x.place, grid, x, packed, y, *epilogue_arguments(bias, extra, code), *rows.numbers[:7], *columns.numbers[:7],
        *it.steps, columns.taps, it.taps, it.pixels, it.outputs, padded_outputs, it.channels, steps,
    )  # fmt: skip
