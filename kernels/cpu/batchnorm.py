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
from tilewise.kernels.cpu.batchnorm_rows import backward_by_row, backward_by_strip, forward_by_row, forward_by_strip
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES
from tilewise.kernels.cpu.scratch import ALIGNMENT, empty

ENOUGH_CHANNELS = 16  # to keep as many threads busy; fewer channels are cut into blocks, unless the work is small
SMALL = 65536  # elements: too few to be split at all
GROUP = 4096  # elements of one image that a chunk of channels should read in a row
CHUNK = 32768  # elements in a chunk of channels: a few microseconds of work
CACHE = 1 << 20  # bytes of all arrays that a chunk may hold, so that they stay in a second-level cache of 2 MB
STRIPS = 4  # at least, so that two threads have as much to do
VECTORS = 32  # elements: rows of a multiple of it fill two vectors of any width
NARROW = 64  # rows shorter than this spend more on the loop than on the elements
ROWS = 32  # in a block at least, so that the block's sums are small beside it
ROW_BLOCK = 8192  # elements in a block of rows: 32 kB of float32
# Bytes of a result that no cache holds until it is read: it is written past them, which saves reading it first.
STREAMED = 1 << 26
_ABSENT = {4: np.empty(0, np.float32), 8: np.empty(0, np.float64)}  # itemsize -> what stands for None in a kernel


def _rows(channels: int, pixels: int) -> tuple[int, int]:
    """(width of a row in elements, rows in a block) for channels-last data."""
    together = VECTORS // gcd(channels, VECTORS) if channels < NARROW else 1
    while together * channels < NARROW:
        together *= 2
    if pixels < 8 * together:  # too few rows to be worth it
        together = 1
    width = channels * together
    return width, max(ROWS, ROW_BLOCK // width)


def _strip(channels: int, pixels: int, itemsize: int, arrays: int) -> int:
    """How many channels a chunk owns in channels-last data, or 0 where the rows are cut into blocks instead."""
    line = ALIGNMENT // itemsize
    fitting = CACHE // (pixels * itemsize * arrays) // line
    if fitting == 0 or channels <= line or channels * pixels * itemsize * arrays <= CACHE:
        return 0
    return min(fitting, -(-channels // (STRIPS * line))) * line


def _group(images: int, plane: int, itemsize: int, arrays: int) -> int:
    """How many channels a chunk owns in channels-first data."""
    channel = images * plane
    return max(1, min(max(GROUP // plane, CHUNK // channel), CACHE // (channel * itemsize * arrays)))


def prepare_batch_norm(shapes, dtype, *, training, momentum, eps, layout, activation, return_stats):
    """What follows from the shapes is worked out once; a call allocates its results and runs one kernel."""
    shape, size, itemsize = shapes[0], prod(shapes[0]), dtype.itemsize
    absent = _ABSENT[itemsize]
    channels = shape[1] if layout == "NCHW" else shape[3]
    if size == 0:
        return partial(_batch_norm_of_nothing, channels=channels, training=training, eps=eps, return_stats=return_stats)
    if layout == "NHWC":
        kernel, before, line = _forward_rows(channels, size // channels, itemsize, training)
    else:
        kernel, before, line = _forward_planes(*shape[:2], shape[2] * shape[3], itemsize, training)
    code = ACTIVATION_CODES[activation]
    streamed = size * itemsize >= STREAMED and line * itemsize % ALIGNMENT == 0 and code == 0
    after = (momentum, eps, code, streamed)
    if kernel in (forward_by_row, forward_by_block):
        after = (training, *after)
    launch = kernel.sized(size * (0.6 if code < 3 else 1.6))

    def run(x, running_mean, running_var, weight, bias):
        y = empty((size,), dtype)
        mean = invstd = absent
        if return_stats:
            mean, invstd = np.empty(channels, dtype), np.empty(channels, dtype)
        if running_mean is None:
            running_mean = running_var = absent
        if weight is None:
            weight = absent
        if bias is None:
            bias = absent
        launch(x.reshape(size), y, *before, running_mean, running_var, weight, bias, mean, invstd, *after)
        y = y.reshape(shape)
        return (y, mean, invstd) if return_stats else y

    return run


def _forward_rows(channels: int, pixels: int, itemsize: int, training: bool):
    """(kernel, its arguments after the arrays, elements that are written in a row)."""
    strip = _strip(channels, pixels, itemsize, 2) if training else 0
    if strip:
        return forward_by_strip, (channels, strip, ROWS), channels
    width, block = _rows(channels, pixels)
    return forward_by_row, (channels, width, block), width


def _forward_planes(images: int, channels: int, plane: int, itemsize: int, training: bool):
    dimensions = (images, channels, plane)
    if training and (channels >= ENOUGH_CHANNELS or prod(dimensions) < SMALL):
        return forward_by_channel, (*dimensions, _group(images, plane, itemsize, 2)), plane
    return forward_by_block, dimensions, plane


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
    shape, size, itemsize = shapes[1], prod(shapes[1]), dtype.itemsize
    absent = _ABSENT[itemsize]
    channels = shape[1] if layout == "NCHW" else shape[3]
    kernel, before = backward_by_row, ()
    if size and layout == "NHWC":
        strip = _strip(channels, size // channels, itemsize, 3)
        kernel, before = backward_by_row, (channels, *_rows(channels, size // channels))
        if strip:
            kernel, before = backward_by_strip, (channels, strip, ROWS)
    elif size:
        kernel, before = backward_by_block, (*shape[:2], shape[2] * shape[3])
        if channels >= ENOUGH_CHANNELS or size < SMALL:
            kernel, before = backward_by_channel, (*before, _group(shape[0], before[2], itemsize, 3))
    launch = kernel.sized(size)

    def run(grad, x, mean, invstd, weight):
        result = empty((size,), dtype)
        grad_weight, grad_bias = np.empty(channels, dtype), np.empty(channels, dtype)
        if weight is None:
            weight = absent
        if size:
            operands = (grad.reshape(size), x.reshape(size), result, *before)
            launch(*operands, mean, invstd, weight, grad_weight, grad_bias, training)
        else:
            grad_weight[...] = grad_bias[...] = 0
        return result.reshape(shape), grad_weight, grad_bias

    return run


def batch_norm_backward(grad, x, mean, invstd, weight, *, training, layout):
    run = prepare_batch_norm_backward((grad.shape, x.shape), x.dtype, training=training, layout=layout)
    return run(grad, x, mean, invstd, weight)
