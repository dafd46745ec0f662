"""The gradient of batch normalisation on the GPU.

    grad_bias = sum(grad),  grad_weight = sum(grad * (x - mean)) * invstd
    grad_x = scale * (grad - a - (x - mean) * b),  a = grad_bias / M,  b = grad_weight * invstd / M     in training
    grad_x = scale * grad                                                            with frozen statistics

Two reads of grad and x and one write; with frozen statistics grad_x needs no x. Parts of the sums are added in float64
and combined in a fixed order, as in batchnorm_statistics.py.
"""

from functools import partial

import numpy as np
from numba import cuda

from tilewise.kernels.channel_plan import THREADS, Planes
from tilewise.kernels.cuda.batchnorm_statistics import (
    HAS_WEIGHT,
    PLANE_UNITS,
    ROOM,
    add_rows,
    next_unit,
    start_sums,
    unit_place,
)  # fmt: skip
from tilewise.kernels.cuda.launch import DOUBLES, ELEMENTS, INT32, INT64, SUMS, kernel
from tilewise.kernels.cuda.launch import device as device_function
from tilewise.kernels.cuda.memory import (
    at,
    lanes,
    load_vector,
    narrow,
    register_sums,
    registers,
    shared,
    store_vector,
    widen,
    zero,
)  # fmt: skip
from tilewise.kernels.cuda.reduction import block_sum, group_sum

WARPS = THREADS // 32
ROW_UNITS = 4  # rows at once, of both operands


@device_function
def _products(grads, values, mean, count):
    """(sum of grad, sum of grad * (x - mean)) of the numbers in registers."""
    s, p = zero(grads), zero(grads)
    for i in range(count):
        g = widen(grads[i])
        s += g
        p += g * (widen(values[i]) - mean)
    return s, p


def _make_plane_sums(vector: bool):
    @kernel(
        threads=THREADS, name=f"batch_norm_backward_sums_of_planes_in_{'vectors' if vector else 'elements'}",
        promises=("LDG.128",) if vector else (),
    )  # fmt: skip
    def sums_of_planes(
        grad: ELEMENTS, x: ELEMENTS, mean: ELEMENTS, sums: DOUBLES,
        images: INT64, channels: INT64, units: INT64, parts: INT32,
    ):  # fmt: skip
        """NCHW. Block b: part b % parts of channel b // parts. sums: (2, channels, parts)."""
        width = lanes(x) if vector else 1
        thread = cuda.threadIdx.x
        channel, part = cuda.blockIdx.x // parts, cuda.blockIdx.x % parts
        share = (images * units + parts - 1) // parts
        j = part * share + thread
        end = min(images * units, part * share + share)
        image, offset = j // units, j % units
        images_on, units_on = THREADS // units, THREADS % units
        centre = widen(mean[channel])
        grads, values = registers(x, 64), registers(x, 64)
        first, second = np.float64(0), np.float64(0)
        while j + (PLANE_UNITS - 1) * THREADS < end:
            for k in range(PLANE_UNITS):
                place = unit_place(image, offset, channel, channels, units, width)
                if vector:
                    load_vector(at(grads, k * width), grad, place)
                    load_vector(at(values, k * width), x, place)
                else:
                    grads[k], values[k] = grad[place], x[place]
                image, offset = next_unit(image, offset, units, images_on, units_on)
            s, p = _products(grads, values, centre, PLANE_UNITS * width)
            first += s
            second += p
            j += PLANE_UNITS * THREADS
        while j < end:
            place = unit_place(image, offset, channel, channels, units, width)
            for i in range(width):
                grads[i], values[i] = grad[place + i], x[place + i]
            image, offset = next_unit(image, offset, units, images_on, units_on)
            s, p = _products(grads, values, centre, width)
            first += s
            second += p
            j += THREADS
        scratch = shared(sums, 32)
        first = block_sum(first, scratch, WARPS)
        second = block_sum(second, scratch, WARPS)
        if thread == 0:
            sums[channel * parts + part] = first
            sums[(channels + channel) * parts + part] = second

    return sums_of_planes


def _make_row_sums(vector: bool):
    @kernel(
        threads=THREADS, name=f"batch_norm_backward_sums_of_rows_in_{'vectors' if vector else 'elements'}",
        promises=("LDG.128",) if vector else (),
    )  # fmt: skip
    def sums_of_rows(
        grad: ELEMENTS, x: ELEMENTS, mean: ELEMENTS, sums: DOUBLES,
        pixels: INT64, channels: INT64, span: INT32, rows: INT32, parts: INT32,
    ):  # fmt: skip
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
        grads, values, means = registers(x, 64), registers(x, 64), registers(x, 16)
        first, second = registers(sums, 8), registers(sums, 8)
        for i in range(width):
            first[i], second[i] = 0.0, 0.0
            means[i] = mean[channel + i if channel < channels else 0]
        while pixel + (ROW_UNITS - 1) * rows < end:
            for k in range(ROW_UNITS):
                place = (pixel + k * rows) * channels + channel
                if vector:
                    load_vector(at(grads, k * width), grad, place)
                    load_vector(at(values, k * width), x, place)
                else:
                    grads[k], values[k] = grad[place], x[place]
            for i in range(width):
                s, p = zero(x), zero(x)
                for k in range(ROW_UNITS):
                    g = widen(grads[k * width + i])
                    s += g
                    p += g * (widen(values[k * width + i]) - widen(means[i]))
                first[i] += s
                second[i] += p
            pixel += ROW_UNITS * rows
        while pixel < end:
            for i in range(width):
                g = widen(grad[pixel * channels + channel + i])
                first[i] += g
                second[i] += g * (widen(x[pixel * channels + channel + i]) - widen(means[i]))
            pixel += rows
        scratch = shared(sums, ROOM)
        begin = tile * span * width
        add_rows(first, sums, scratch, width, span, rows, begin, channels, parts, part)
        second_sums = at(sums, channels * parts)
        add_rows(second, second_sums, scratch, width, span, rows, begin, channels, parts, part)

    return sums_of_rows


_plane_sums = {vector: _make_plane_sums(vector) for vector in (False, True)}
_row_sums = {vector: _make_row_sums(vector) for vector in (False, True)}
run_gradient_sums = partial(start_sums, _plane_sums, _row_sums)


@kernel(threads=THREADS)
def batch_norm_backward_finish(
    invstd: ELEMENTS, sums: DOUBLES, weight: ELEMENTS, grad_weight: ELEMENTS, grad_bias: ELEMENTS, table: SUMS,
    channels: INT64, parts: INT32, values: INT64, has: INT32,
):  # fmt: skip
    """From the parts' sums: grad_weight, grad_bias and `table` (3, channels): scale, a, b. A warp for each channel."""
    lane = cuda.threadIdx.x % 32
    channel = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // 32
    first, second = np.float64(0), np.float64(0)
    if channel < channels:
        for part in range(lane, parts, 32):
            first += sums[channel * parts + part]
            second += sums[(channels + channel) * parts + part]
    first, second = group_sum(first, 32), group_sum(second, 32)
    if lane == 0 and channel < channels:
        number = type(zero(invstd))
        deviation = widen(invstd[channel])
        second *= deviation
        grad_bias[channel] = narrow(number(first), invstd)
        grad_weight[channel] = narrow(number(second), invstd)
        table[channel] = deviation * widen(weight[channel]) if has & HAS_WEIGHT else deviation
        table[channels + channel] = number(first / max(values, 1))
        table[2 * channels + channel] = number(second * deviation / max(values, 1))


@device_function
def _slope(grad, x, mean, scale, a, b, training):
    return (grad - a - (x - mean) * b) * scale if training else grad * scale


@kernel(threads=THREADS, promises=("LDG.128", "STG.128"))
def batch_norm_backward_planes(
    grad: ELEMENTS, x: ELEMENTS, result: ELEMENTS, mean: ELEMENTS, table: SUMS,
    planes: INT64, channels: INT64, plane: INT64, vectors: INT64, group: INT32, chunks: INT32, training: INT32,
):  # fmt: skip
    """NCHW; planes as in batch_norm_planes."""
    width = lanes(x)
    thread = cuda.threadIdx.x
    which = cuda.blockIdx.x // chunks * (THREADS // group) + thread // group
    start, step = cuda.blockIdx.x % chunks * group + (thread & (group - 1)), chunks * group
    if which < planes:
        channel = which % channels
        scale, a, b = table[channel], table[channels + channel], table[2 * channels + channel]
        centre = widen(mean[channel])
        first = which * plane
        grads, inputs = registers(x, 16), registers(x, 16)
        for v in range(start, vectors, step):
            load_vector(grads, grad, first + v * width)
            if training:
                load_vector(inputs, x, first + v * width)
            for i in range(width):
                grads[i] = narrow(_slope(widen(grads[i]), widen(inputs[i]), centre, scale, a, b, training), x)
            store_vector(result, first + v * width, grads)
        for i in range(vectors * width + start, plane, step):
            slope = _slope(widen(grad[first + i]), widen(x[first + i]), centre, scale, a, b, training)
            result[first + i] = narrow(slope, x)


def _make_rows(vector: bool):
    @kernel(
        threads=THREADS, name=f"batch_norm_backward_rows_of_{'vectors' if vector else 'elements'}",
        promises=("LDG.128", "STG.128") if vector else (),
    )  # fmt: skip
    def batch_norm_backward_rows(
        grad: ELEMENTS, x: ELEMENTS, result: ELEMENTS, mean: ELEMENTS, table: SUMS,
        pixels: INT64, channels: INT64, span: INT32, rows: INT32, training: INT32,
    ):  # fmt: skip
        """NHWC: a thread has `width` channels' coefficients in registers and goes down the pixels."""
        width = lanes(x) if vector else 1
        thread = cuda.threadIdx.x
        row, channel = thread // span, (cuda.blockIdx.y * span + thread % span) * width
        if row < rows and channel < channels:
            means, scales, a, b = register_sums(x, 8), register_sums(x, 8), register_sums(x, 8), register_sums(x, 8)
            for i in range(width):
                means[i], scales[i] = widen(mean[channel + i]), table[channel + i]
                a[i], b[i] = table[channels + channel + i], table[2 * channels + channel + i]
            grads, inputs = registers(x, 16), registers(x, 16)
            for pixel in range(cuda.blockIdx.x * rows + row, pixels, cuda.gridDim.x * rows):
                place = pixel * channels + channel
                if vector:
                    load_vector(grads, grad, place)
                    if training:
                        load_vector(inputs, x, place)
                else:
                    grads[0] = grad[place]
                    if training:
                        inputs[0] = x[place]
                for i in range(width):
                    slope = _slope(widen(grads[i]), widen(inputs[i]), means[i], scales[i], a[i], b[i], training)
                    grads[i] = narrow(slope, x)
                if vector:
                    store_vector(result, place, grads)
                else:
                    result[place] = grads[0]

    return batch_norm_backward_rows


_rows = {vector: _make_rows(vector) for vector in (False, True)}


def run_gradient_finish(
    place, grid, invstd, sums, weight, grad_weight, grad_bias, table, channels, values, parts
):  # fmt: skip
    operands = (invstd, sums, weight, grad_weight, grad_bias, table)
    batch_norm_backward_finish(place, grid, *operands, channels, parts, values, HAS_WEIGHT * (weight is not None))


def run_gradient(plan, grid, training, grad, x, result, mean, table, numbers):
    run = batch_norm_backward_planes if isinstance(plan, Planes) else _rows[plan.width > 1]
    run(x.place, grid, grad, x, result, mean, table, *numbers, training)
