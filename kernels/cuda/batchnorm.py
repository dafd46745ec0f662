"""Batch normalisation on the GPU.

    y = activation((x - centre) * scale + offset),  scale = weight / sqrt(var + eps)

Evaluation is one read and one write of x, training another read for the statistics (batchnorm_statistics.py).
"""

import math
from functools import partial

from numba import cuda

from tilewise.kernels import batchnorm_plan
from tilewise.kernels.activation_plan import ACTIVATION_CODES, LEAKY_SLOPE
from tilewise.kernels.channel_plan import THREADS, Planes
from tilewise.kernels.cuda.batchnorm_gradient import run_gradient, run_gradient_finish, run_gradient_sums
from tilewise.kernels.cuda.batchnorm_statistics import HAS_BIAS, HAS_WEIGHT, run_finish, run_sums
from tilewise.kernels.cuda.epilogue import activate
from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64, REAL, SUMS, kernel
from tilewise.kernels.cuda.launch import device as device_function
from tilewise.kernels.cuda.memory import (
    at,
    lanes,
    load_vector,
    narrow,
    register_sums,
    registers,
    store_vector,
    widen,
)  # fmt: skip

TRAINED = 8  # besides batchnorm_statistics' HAS_...: take the coefficients from the table


@device_function
def _coefficients(table, mean, var, weight, bias, eps, channel, channels, has):
    """(centre, scale, offset) of a channel."""
    if has & TRAINED:
        return table[channel], table[channels + channel], table[2 * channels + channel]
    scale = type(eps)(1) / math.sqrt(widen(var[channel]) + eps)
    if has & HAS_WEIGHT:
        scale = scale * widen(weight[channel])
    return widen(mean[channel]), scale, widen(bias[channel]) if has & HAS_BIAS else type(eps)(0)


@kernel(threads=THREADS, promises=("LDG.128", "STG.128"))
def batch_norm_planes(
    x: ELEMENTS, y: ELEMENTS, table: SUMS, mean: ELEMENTS, var: ELEMENTS, weight: ELEMENTS, bias: ELEMENTS,
    eps: REAL, slope: REAL, planes: INT64, channels: INT64, plane: INT64, vectors: INT64, group: INT32, chunks: INT32,
    has: INT32, code: INT32,
):  # fmt: skip
    """NCHW: `group` threads of each of `chunks` blocks for a plane, which has `vectors` whole ones of 16 bytes."""
    width = lanes(x)
    thread = cuda.threadIdx.x
    which = cuda.blockIdx.x // chunks * (THREADS // group) + thread // group
    start, step = cuda.blockIdx.x % chunks * group + (thread & (group - 1)), chunks * group
    if which < planes:
        centre, scale, offset = _coefficients(table, mean, var, weight, bias, eps, which % channels, channels, has)
        first = which * plane
        raw = registers(x, 16)
        for v in range(start, vectors, 2 * step):  # two loads under way
            second = v + step < vectors
            load_vector(raw, x, first + v * width)
            if second:
                load_vector(at(raw, width), x, first + (v + step) * width)
            for i in range(width):
                raw[i] = narrow(activate((widen(raw[i]) - centre) * scale + offset, code, slope), y)
            store_vector(y, first + v * width, raw)
            if second:
                for i in range(width, 2 * width):
                    raw[i] = narrow(activate((widen(raw[i]) - centre) * scale + offset, code, slope), y)
                store_vector(y, first + (v + step) * width, at(raw, width))
        for i in range(vectors * width + start, plane, step):
            y[first + i] = narrow(activate((widen(x[first + i]) - centre) * scale + offset, code, slope), y)


def _make_rows(vector: bool):
    @kernel(
        threads=THREADS, name=f"batch_norm_rows_of_{'vectors' if vector else 'elements'}",
        promises=("LDG.128", "STG.128") if vector else (),
    )  # fmt: skip
    def batch_norm_rows(
        x: ELEMENTS, y: ELEMENTS, table: SUMS, mean: ELEMENTS, var: ELEMENTS, weight: ELEMENTS, bias: ELEMENTS,
        eps: REAL, slope: REAL, pixels: INT64, channels: INT64, span: INT32, rows: INT32, has: INT32, code: INT32,
    ):  # fmt: skip
        """NHWC: a thread has `width` channels' coefficients in registers and goes down the pixels."""
        width = lanes(x) if vector else 1
        thread = cuda.threadIdx.x
        row, channel = thread // span, (cuda.blockIdx.y * span + thread % span) * width
        if row < rows and channel < channels:
            centres, scales, offsets = register_sums(x, 8), register_sums(x, 8), register_sums(x, 8)
            for i in range(width):
                centre, scale, offset = _coefficients(table, mean, var, weight, bias, eps, channel + i, channels, has)
                centres[i], scales[i], offsets[i] = centre, scale, offset
            raw = registers(x, 16)
            step = cuda.gridDim.x * rows
            for pixel in range(cuda.blockIdx.x * rows + row, pixels, 2 * step):  # two loads under way
                second = pixel + step < pixels
                place = pixel * channels + channel
                other = place + step * channels
                if vector:
                    load_vector(raw, x, place)
                    if second:
                        load_vector(at(raw, width), x, other)
                else:
                    raw[0] = x[place]
                    if second:
                        raw[1] = x[other]
                for i in range(width):
                    raw[i] = narrow(activate((widen(raw[i]) - centres[i]) * scales[i] + offsets[i], code, slope), y)
                if vector:
                    store_vector(y, place, raw)
                else:
                    y[place] = raw[0]
                if second:
                    for i in range(width):
                        value = (widen(raw[width + i]) - centres[i]) * scales[i] + offsets[i]
                        raw[width + i] = narrow(activate(value, code, slope), y)
                    if vector:
                        store_vector(y, other, at(raw, width))
                    else:
                        y[other] = raw[1]

    return batch_norm_rows


_rows = {vector: _make_rows(vector) for vector in (False, True)}


@kernel(threads=THREADS)
def batch_norm_evaluated(mean: ELEMENTS, var: ELEMENTS, copied: ELEMENTS, invstd: ELEMENTS, eps: REAL, channels: INT64):
    """What evaluation returns for the backward: the running mean, and 1 / sqrt(running variance + eps)."""
    channel = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if channel < channels:
        copied[channel] = mean[channel]
        invstd[channel] = narrow(type(eps)(1) / math.sqrt(widen(var[channel]) + eps), var)


def _normalise(plan, grid, x, y, table, mean, var, weight, bias, eps, activation, numbers):
    has = HAS_WEIGHT * (weight is not None) + HAS_BIAS * (bias is not None) + TRAINED * (table is not None)
    operands = (x, y, table, mean, var, weight, bias, eps, LEAKY_SLOPE)
    run = batch_norm_planes if isinstance(plan, Planes) else _rows[plan.width > 1]
    run(x.place, grid, *operands, *numbers, has, ACTIVATION_CODES[activation])


_KERNELS = batchnorm_plan.BatchNormKernels(
    run_sums, run_finish, _normalise, batch_norm_evaluated, run_gradient_sums, run_gradient_finish, run_gradient
)
batch_norm = partial(batchnorm_plan.batch_norm, _KERNELS)
batch_norm_backward = partial(batchnorm_plan.batch_norm_backward, _KERNELS)
