"""Batch normalisation in Numba: which kernel, and how the work is divided.

The kernels are in batchnorm_planes.py (NCHW) and batchnorm_rows.py (NHWC). All are bound by memory; the division
depends on the shape alone, so the bits do not depend on the number of threads.
"""

from math import gcd

import numpy as np

from tilewise.kernels.cpu.batchnorm_planes import (
    backward_by_block,
    backward_by_channel,
    forward_by_block,
    forward_by_channel,
)
from tilewise.kernels.cpu.batchnorm_rows import backward_by_row, forward_by_row
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES

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


def batch_norm(
    x, running_mean, running_var, weight, bias, *, training, momentum, eps, layout, activation, return_stats
):
    y = np.empty_like(x)
    size = x.size
    shape = x.shape
    absent = _ABSENT[x.itemsize]
    channels = shape[1] if layout == "NCHW" else shape[3]
    mean, invstd = np.empty(channels, x.dtype), np.empty(channels, x.dtype)
    if running_mean is None:
        running_mean = running_var = absent
    if weight is None:
        weight = absent
    if bias is None:
        bias = absent
    code = ACTIVATION_CODES[activation]
    work = size * (0.6 if code < 3 else 1.6)
    if size == 0:
        _empty_statistics(mean, invstd, running_mean, running_var, training, eps)
    elif layout == "NHWC":
        width, block = _rows(channels, size // channels)
        forward_by_row(
            work, x.ravel(), y.ravel(), channels, width, block,
            running_mean, running_var, weight, bias, mean, invstd, training, momentum, eps, code,
        )  # fmt: skip
    else:
        planes = (shape[0], channels, shape[2] * shape[3])
        x, result = x.reshape(planes), y.reshape(planes)
        if training and (channels >= ENOUGH_CHANNELS or size < SMALL):
            group = GROUP // planes[2] or 1
            forward_by_channel(
                work, x, result, group, running_mean, running_var, weight, bias, mean, invstd, momentum, eps, code
            )
        else:
            forward_by_block(
                work, x, result, running_mean, running_var, weight, bias, mean, invstd, training, momentum, eps, code
            )
    return (y, mean, invstd) if return_stats else y


def _empty_statistics(mean, invstd, running_mean, running_var, training, eps):
    mean[...] = 0 if training else running_mean
    invstd[...] = 1 / np.sqrt((0 if training else running_var) + eps)


def batch_norm_backward(grad, x, mean, invstd, weight, *, training, layout):
    result = np.empty_like(x)
    size = x.size
    shape = x.shape
    channels = shape[1] if layout == "NCHW" else shape[3]
    grad_weight, grad_bias = np.empty(channels, x.dtype), np.empty(channels, x.dtype)
    if weight is None:
        weight = _ABSENT[x.itemsize]
    if size == 0:
        grad_weight[...] = grad_bias[...] = 0
    elif layout == "NHWC":
        width, block = _rows(channels, size // channels)
        backward_by_row(
            size, grad.ravel(), x.ravel(), result.ravel(), channels, width, block,
            mean, invstd, weight, grad_weight, grad_bias, training,
        )  # fmt: skip
    else:
        planes = (shape[0], channels, shape[2] * shape[3])
        operands = grad.reshape(planes), x.reshape(planes), result.reshape(planes)
        if channels >= ENOUGH_CHANNELS or size < SMALL:
            group = GROUP // planes[2] or 1
            backward_by_channel(size, *operands, group, mean, invstd, weight, grad_weight, grad_bias, training)
        else:
            backward_by_block(size, *operands, mean, invstd, weight, grad_weight, grad_bias, training)
    return result, grad_weight, grad_bias
