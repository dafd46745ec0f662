"""Batch normalisation in Numba: which kernel, and how the work is divided.

The kernels are in batchnorm_planes.py (NCHW) and batchnorm_rows.py (NHWC). All are bound by memory; the division
depends on the shape alone, so the bits do not depend on the number of threads.
"""

from functools import partial
from math import gcd, prod

import numpy as np

from tilewise.kernels.cpu.batchnorm_planes import (
    backward_by_block,
    backward_by_channel,
    forward_by_block,
    forward_by_channel,
)
from tilewise.kernels.cpu.batchnorm_rows import backward_by_row, forward_by_row
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES
from tilewise.kernels.cpu.scratch import empty

ENOUGH_CHANNELS = 16  # to keep as many threads busy; fewer channels are cut into blocks, unless the work is small
SMALL = 65536  # elements: too few to be split at all
GROUP = 4096  # elements of one image that a chunk of channels should read in a row
VECTORS = 32  # elements: rows of a multiple of it fill two vectors of any width
NARROW = 64  # rows shorter than this spend more on the loop than on the elements
ROWS = 32  # in a block at least, so that the block's sums are small beside it
ROW_BLOCK = 8192  # elements in a block of rows: 32 kB of float32
_ABSENT = {4: np.empty(0, np.float32), 8: np.empty(0, np.float64)}  # itemsize -> what stands for None in a kernel


def _rows(channels: int, pixels: int) -> tuple[int, int]:
    """(width of a row in elements, rows in a block) for channels-last data."""
    together = VECTORS // gcd(channels, VECTORS) if channels < 512 else 1
    while together * channels < NARROW:
        together *= 2
    if pixels < 8 * together:  # too few rows to be worth it
        together = 1
    width = channels * together
    return width, max(ROWS, ROW_BLOCK // width)


def prepare_batch_norm(shapes, dtype, *, training, momentum, eps, layout, activation, return_stats):
    """What follows from the shapes is worked out once; a call allocates its results and runs one kernel."""
    shape, size = shapes[0], prod(shapes[0])
    absent = _ABSENT[dtype.itemsize]
    channels = shape[1] if layout == "NCHW" else shape[3]
    code = ACTIVATION_CODES[activation]
    work = size * (0.6 if code < 3 else 1.6)
    if size == 0:
        return partial(_batch_norm_of_nothing, channels=channels, training=training, eps=eps, return_stats=return_stats)
    before, after = (), (training, momentum, eps, code)
    if layout == "NHWC":
        flat, kernel = (size,), forward_by_row.sized(work)
        before = (channels, *_rows(channels, size // channels))
    else:
        flat = (shape[0], channels, shape[2] * shape[3])
        if training and (channels >= ENOUGH_CHANNELS or size < SMALL):
            kernel, before, after = forward_by_channel.sized(work), (GROUP // flat[2] or 1,), (momentum, eps, code)
        else:
            kernel = forward_by_block.sized(work)

    def run(x, running_mean, running_var, weight, bias):
        y = empty(flat, dtype)
        mean = invstd = absent
        if return_stats:
            mean, invstd = np.empty(channels, dtype), np.empty(channels, dtype)
        if running_mean is None:
            running_mean = running_var = absent
        if weight is None:
            weight = absent
        if bias is None:
            bias = absent
        kernel(x.reshape(flat), y, *before, running_mean, running_var, weight, bias, mean, invstd, *after)
        y = y.reshape(shape)
        return (y, mean, invstd) if return_stats else y

    return run


def _batch_norm_of_nothing(x, running_mean, running_var, weight, bias, *, channels, training, eps, return_stats):
    """The result of an empty batch, whose statistics are said to be 0."""
    if not return_stats:
        return np.empty_like(x)
    if not training:
        return np.empty_like(x), running_mean.copy(), 1 / np.sqrt(running_var + x.dtype.type(eps))
    return np.empty_like(x), np.zeros(channels, x.dtype), np.full(channels, eps**-0.5, x.dtype)


def batch_norm(
    x, running_mean, running_var, weight, bias, *, training, momentum, eps, layout, activation, return_stats
):
    run = prepare_batch_norm(
        (x.shape,), x.dtype, training=training, momentum=momentum, eps=eps, layout=layout, activation=activation,
        return_stats=return_stats,
    )  # fmt: skip
    return run(x, running_mean, running_var, weight, bias)


def prepare_batch_norm_backward(shapes, dtype, *, training, layout):
    shape, size = shapes[1], prod(shapes[1])
    absent = _ABSENT[dtype.itemsize]
    channels = shape[1] if layout == "NCHW" else shape[3]
    before = ()
    if layout == "NHWC":
        flat, kernel = (size,), backward_by_row.sized(size)
        before = (channels, *_rows(channels, size // max(channels, 1)))
    else:
        flat = (shape[0], channels, shape[2] * shape[3])
        if channels >= ENOUGH_CHANNELS or size < SMALL:
            kernel, before = backward_by_channel.sized(size), (GROUP // max(flat[2], 1) or 1,)
        else:
            kernel = backward_by_block.sized(size)

    def run(grad, x, mean, invstd, weight):
        result = empty(flat, dtype)
        grad_weight, grad_bias = np.empty(channels, dtype), np.empty(channels, dtype)
        if weight is None:
            weight = absent
        if size:
            operands = (grad.reshape(flat), x.reshape(flat), result, *before)
            kernel(*operands, mean, invstd, weight, grad_weight, grad_bias, training)
        else:
            grad_weight[...] = grad_bias[...] = 0
        return result.reshape(shape), grad_weight, grad_bias

    return run


def batch_norm_backward(grad, x, mean, invstd, weight, *, training, layout):
    run = prepare_batch_norm_backward((grad.shape, x.shape), x.dtype, training=training, layout=layout)
    return run(grad, x, mean, invstd, weight)
