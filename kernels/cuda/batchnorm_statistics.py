"""The statistics of batch normalisation on the GPU: one read of x.

Sums of d = x - shift and of d^2 for each channel, where the shift is the channel's first element:

    mean = shift + S1 / M,  var = S2 / M - (S1 / M)^2

A thread adds up a few elements at a time around their own mean, in the type that it computes in, and moves these sums
to the common shift in float64; so neither a mean of 1e4 nor an outlier in the first element costs digits, and float64,
slow on many devices, has a fraction of the work. Parts are combined in a fixed order.
"""

import math
from functools import partial

import numpy as np
from numba import cuda

from tilewise.kernels.batchnorm_plan import WARPS, sums_numbers
from tilewise.kernels.channel_plan import THREADS, Planes
from tilewise.kernels.cuda.launch import DOUBLES, ELEMENTS, INT32, INT64, REAL, SUMS, kernel
from tilewise.kernels.cuda.launch import device as device_function
from tilewise.kernels.cuda.memory import at, lanes, load_vector, narrow, registers, shared, widen, zero  # fmt: skip
from tilewise.kernels.cuda.reduction import block_sum, group_sum

PLANE_UNITS = 4  # units of a plane that a thread loads at once
ROW_UNITS = 8  # rows at once: a channel has one element of each, and a sum in float64 for all of them
HAS_WEIGHT, HAS_BIAS, HAS_RUNNING = 1, 2, 4
ROOM = THREADS * 8  # sums of a block of rows: 8 channels a thread at most (float16)


@device_function
def moved(pivot, shift, s, q, count):
    """(sum of x - shift, sum of its squares) of `count` numbers from the sums s, q of x - pivot and its square."""
    by = np.float64(pivot) - np.float64(shift)
    first = np.float64(s) + count * by
    return first, np.float64(q) + by * (np.float64(s) + first)


@device_function
def unit_place(image, offset, channel, channels, units, width):
    """Where the unit `offset` of a channel's plane in an image begins."""
    return ((image * channels + channel) * units + offset) * width


@device_function
def next_unit(image, offset, units, images_on, units_on):
    """THREADS units further along a channel: (image, offset in its plane)."""
    offset += units_on
    image += images_on
    if offset >= units:
        offset -= units
        image += 1
    return image, offset


@device_function
def _plane_chunk(raw, shift, count):
    """The sums of the numbers in raw."""
    pivot = zero(raw)
    for i in range(count):
        pivot += widen(raw[i])
    pivot = pivot / type(pivot)(count)
    s, q = zero(raw), zero(raw)
    for i in range(count):
        d = widen(raw[i]) - pivot
        s += d
        q += d * d
    return moved(pivot, shift, s, q, count)


def _make_plane_sums(vector: bool):
    @kernel(
        threads=THREADS, name=f"batch_norm_sums_of_planes_in_{'vectors' if vector else 'elements'}",
        promises=("LDG.128",) if vector else (),
    )  # fmt: skip
    def sums_of_planes(x: ELEMENTS, sums: DOUBLES, images: INT64, channels: INT64, units: INT64, parts: INT32):
        """NCHW. Block b: part b % parts of channel b // parts. sums: (2, channels, parts)."""
        width = lanes(x) if vector else 1
        thread = cuda.threadIdx.x
        channel, part = cuda.blockIdx.x // parts, cuda.blockIdx.x % parts
        share = (images * units + parts - 1) // parts
        j = part * share + thread
        end = min(images * units, part * share + share)
        image, offset = j // units, j % units
        images_on, units_on = THREADS // units, THREADS % units
        shift = widen(x[channel * units * width])
        raw = registers(x, 64)
        first, second = np.float64(0), np.float64(0)
        while j + (PLANE_UNITS - 1) * THREADS < end:
            for k in range(PLANE_UNITS):
                place = unit_place(image, offset, channel, channels, units, width)
                if vector:
                    load_vector(at(raw, k * width), x, place)
                else:
                    raw[k] = x[place]
                image, offset = next_unit(image, offset, units, images_on, units_on)
            s, q = _plane_chunk(raw, shift, PLANE_UNITS * width)
            first += s
            second += q
            j += PLANE_UNITS * THREADS
        while j < end:
            place = unit_place(image, offset, channel, channels, units, width)
            if vector:
                load_vector(raw, x, place)
            else:
                raw[0] = x[place]
            image, offset = next_unit(image, offset, units, images_on, units_on)
            s, q = _plane_chunk(raw, shift, width)
            first += s
            second += q
            j += THREADS
        scratch = shared(sums, 32)
        first = block_sum(first, scratch, WARPS)
        second = block_sum(second, scratch, WARPS)
        if thread == 0:
            sums[channel * parts + part] = first
            sums[(channels + channel) * parts + part] = second

    return sums_of_planes


@device_function
def add_rows(values, sums, scratch, width, span, rows, first, channels, parts, part):
    """sums[channel, part] = the sum over the block's rows of `width` numbers for each thread; ends with a barrier.

    first: the block's first channel. scratch: ROOM numbers.
    """
    thread = cuda.threadIdx.x
    for i in range(width):
        scratch[thread * width + i] = values[i]
    cuda.syncthreads()
    for c in range(thread, span * width, THREADS):
        if first + c < channels:
            total = scratch[c]
            for row in range(1, rows):
                total += scratch[row * span * width + c]
            sums[(first + c) * parts + part] = total
    cuda.syncthreads()


def _make_row_sums(vector: bool):
    @kernel(
        threads=THREADS, name=f"batch_norm_sums_of_rows_in_{'vectors' if vector else 'elements'}",
        promises=("LDG.128",) if vector else (),
    )  # fmt: skip
    def sums_of_rows(
        x: ELEMENTS, sums: DOUBLES, pixels: INT64, channels: INT64, span: INT32, rows: INT32, parts: INT32
    ):
        """NHWC. Block (part, tile): `span` units of channels, `rows` pixels at a time. sums: (2, channels, parts)."""
        width = lanes(x) if vector else 1
        thread = cuda.threadIdx.x
        part, tile = cuda.blockIdx.x, cuda.blockIdx.y
        row, channel = thread // span, (tile * span + thread % span) * width
        share = (pixels + parts - 1) // parts
        pixel = part * share + row
        end = min(pixels, part * share + share)
        if row >= rows or channel >= channels:
            end = 0
        raw, shifts = registers(x, 128), registers(x, 16)
        first, second = registers(sums, 8), registers(sums, 8)
        for i in range(width):
            first[i], second[i] = 0.0, 0.0
            shifts[i] = x[channel + i if channel < channels else 0]
        while pixel + (ROW_UNITS - 1) * rows < end:
            for k in range(ROW_UNITS):
                if vector:
                    load_vector(at(raw, k * width), x, (pixel + k * rows) * channels + channel)
                else:
                    raw[k] = x[(pixel + k * rows) * channels + channel]
            for i in range(width):
                pivot = zero(x)
                for k in range(ROW_UNITS):
                    pivot += widen(raw[k * width + i])
                pivot = pivot / type(pivot)(ROW_UNITS)
                s, q = zero(x), zero(x)
                for k in range(ROW_UNITS):
                    d = widen(raw[k * width + i]) - pivot
                    s += d
                    q += d * d
                a, b = moved(pivot, widen(shifts[i]), s, q, ROW_UNITS)
                first[i] += a
                second[i] += b
            pixel += ROW_UNITS * rows
        while pixel < end:
            for i in range(width):
                value = widen(x[pixel * channels + channel + i])
                a, b = moved(value, widen(shifts[i]), zero(x), zero(x), 1)
                first[i] += a
                second[i] += b
            pixel += rows
        scratch = shared(sums, ROOM)
        begin = tile * span * width
        add_rows(first, sums, scratch, width, span, rows, begin, channels, parts, part)
        second_sums = at(sums, channels * parts)
        add_rows(second, second_sums, scratch, width, span, rows, begin, channels, parts, part)

    return sums_of_rows


def start_sums(of_planes: dict, of_rows: dict, plan, parts: int, first, *others):
    """Starts a kernel of sums; `first` tells its dtype."""
    grid, numbers = sums_numbers(plan, parts)
    run = (of_planes if isinstance(plan, Planes) else of_rows)[plan.width > 1]
    run(first.place, grid, first, *others, *numbers)


_plane_sums = {vector: _make_plane_sums(vector) for vector in (False, True)}
_row_sums = {vector: _make_row_sums(vector) for vector in (False, True)}
run_sums = partial(start_sums, _plane_sums, _row_sums)


@kernel(threads=THREADS)
def batch_norm_finish(
    x: ELEMENTS, sums: DOUBLES, weight: ELEMENTS, bias: ELEMENTS, running_mean: ELEMENTS, running_var: ELEMENTS,
    mean: ELEMENTS, invstd: ELEMENTS, table: SUMS, momentum: REAL, eps: REAL,
    channels: INT64, parts: INT32, values: INT64, apart: INT64, has: INT32,
):  # fmt: skip
    """From the parts' sums: mean, invstd, the running statistics, and `table` (3, channels): centre, scale, offset.

    A warp for each channel. values: M. apart: elements from a channel's first element to the next one's.
    """
    lane = cuda.threadIdx.x % 32
    channel = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // 32
    first, second = np.float64(0), np.float64(0)
    if channel < channels:
        for part in range(lane, parts, 32):
            first += sums[channel * parts + part]
            second += sums[(channels + channel) * parts + part]
    first, second = group_sum(first, 32), group_sum(second, 32)
    if lane == 0 and channel < channels:
        average, variance = np.float64(0), np.float64(0)
        if values > 0:
            first /= values
            average = widen(x[channel * apart]) + first
            variance = second / values - first * first
            if variance < 0:  # rounded
                variance = np.float64(0)
        number = type(zero(x))
        if has & HAS_RUNNING and values > 0:
            old_mean, old_var = np.float64(widen(running_mean[channel])), np.float64(widen(running_var[channel]))
            unbiased = variance * (np.float64(values) / np.float64(values - 1))
            running_mean[channel] = narrow(number(old_mean + momentum * (average - old_mean)), x)
            running_var[channel] = narrow(number(old_var + momentum * (unbiased - old_var)), x)
        deviation = 1 / math.sqrt(variance + eps)
        scale = deviation * widen(weight[channel]) if has & HAS_WEIGHT else deviation
        offset = np.float64(widen(bias[channel])) if has & HAS_BIAS else np.float64(0)
        centre = number(average)
        mean[channel] = narrow(centre, x)
        invstd[channel] = narrow(number(deviation), x)
        table[channel] = centre
        table[channels + channel] = number(scale)
        table[2 * channels + channel] = number((centre - average) * scale + offset)


def run_finish(
    place, grid, x, sums, weight, bias, running_mean, running_var, mean, invstd, table, momentum, eps, channels, values,
    apart, parts,
):  # fmt: skip
    has = HAS_WEIGHT * (weight is not None) + HAS_BIAS * (bias is not None) + HAS_RUNNING * (running_mean is not None)
    operands = (x, sums, weight, bias, running_mean, running_var, mean, invstd, table, momentum, eps)
    batch_norm_finish(place, grid, *operands, channels, parts, values, apart, has)
