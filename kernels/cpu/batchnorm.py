"""Batch normalisation in Numba: which kernel, and how the work is divided.

The kernels are in batchnorm_planes.py (NCHW) and batchnorm_rows.py (NHWC). All are bound by memory; the division
depends on the shape alone, so the bits do not depend on the number of threads.
"""

from functools import partial
from math import gcd, prod
from typing import Any

import numba
import numpy as np

from tilewise.kernels import settings
from tilewise.kernels.cpu import recycling
from tilewise.kernels.cpu.batchnorm_channel import activates_halves
from tilewise.kernels.cpu.batchnorm_planes import (
    backward_by_block,
    backward_by_channel,
    forward_by_block,
    forward_by_channel,
)
from tilewise.kernels.cpu.batchnorm_rows import backward_by_row, forward_by_row
from tilewise.kernels.cpu.batchnorm_vector import FROZEN, FROZEN_NEAR, KEPT, NEAR, STREAMED
from tilewise.kernels.cpu.caches import memory_from
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES
from tilewise.kernels.cpu.half import BITS, HALF, SINGLE, narrowed, widened
from tilewise.kernels.cpu.scratch import ALIGNMENT, empty, large
from tilewise.kernels.cpu.simd import VECTOR_BYTES
from tilewise.kernels.cpu.threads import SERIAL_BELOW, may_split

LAST_CHEAP = ACTIVATION_CODES["leaky_relu"]  # the activations after it take an exponential for each element
ENOUGH_CHANNELS = 16  # to keep as many threads busy; fewer channels are cut into blocks, unless the work is small
SMALL = 65536  # elements: too few to be split at all
# Of a chunk of channels, in elements: what should lie in a row in one image, and in all. The gradient, which holds
# three arrays instead of two in the second-level cache, likes it smaller: 8x256x14x14 takes 172 us with 4 channels, 190
# with 20; in training 134 with 8, 123 with 32.
FORWARD_CHUNK, BACKWARD_CHUNK = (4096, 49152), (1024, 8192)
# The same for planes of a page or more. The prefetcher stops at the end of a page and begins again after some misses,
# so what lies in a row counts for more: on Zen 4 8x256x56x56 takes 3.0 ms with 5 channels and 4.5 with one in training,
# 4.3 and 5.2 backward.
LONG, FORWARD_LONG, BACKWARD_LONG = 1024, (16384, 49152), (8192, 16384)
CACHE = 1 << 20  # bytes of all arrays that a chunk of channels may hold: half of a second-level cache
VECTORS = 32  # elements: rows of a multiple of it fill two vectors of any width
# Rows shorter than this spend more on the loop than on the elements; and in a result below so many bytes, which may lie
# anywhere in memory, more on a row's ends under a mask.
NARROW, NARROW_UNALIGNED, UNALIGNED_BELOW = 64, 256, recycling.FROM
ROWS = 32  # in a block at least, so that the block's sums are small beside it
# Elements in a block of rows, 128 kB of float32, and rows at most. One thread merges all blocks' sums, so they are few.
ROW_BLOCK, MOST_ROWS = 32768, 256
# Bytes of a result that no cache holds until it is read. It is written past the caches, so that its memory is not read
# first: evaluation into 103 MB of used memory takes 7 ms instead of 10.5. The system has just cleared a page of fresh
# memory into the cache: there it is slower (28 ms instead of 17), unless the lines come in no order, plane by plane of
# a chunk of channels, long after the system was there (a quarter less time in training).
# How many bytes that are depends on the third-level cache, see memory_from.
LARGE = memory_from()
# Several rows are taken at a time (NEAR) where the caches hold all arrays, of fewer bytes than this, forward and
# backward: with AVX2 fewer, and not backward, where they gain nothing. Of wide rows, whose factors and sums do not stay
# in L1, also where the caches hold the result alone.
NEAR_BELOW = (LARGE, LARGE) if VECTOR_BYTES == 64 else (min(LARGE, 8 << 20), 0)
NEAR_WIDE_BELOW, WIDE = LARGE, 4096
KEPT_ALWAYS, PAST_IN_USED, PAST_ALWAYS = range(3)  # how a result is written
# Itemsize of an image -> what stands for None in a kernel. The kernels know float16 by its bits; what goes with a
# channel is float32 then.
_ABSENT = {2: np.empty(0, SINGLE), 4: np.empty(0, SINGLE), 8: np.empty(0, np.float64)}


def _rows(channels: int, pixels: int, itemsize: int) -> tuple[int, int]:
    """(width of a row in elements, rows in a block) for channels-last data."""
    narrow = NARROW if pixels * channels * itemsize >= UNALIGNED_BELOW else NARROW_UNALIGNED
    together = VECTORS // gcd(channels, VECTORS) if channels < narrow else 1
    while together * channels < narrow:
        together *= 2
    if pixels < 8 * together:  # too few rows to be worth it
        together = 1
    width = channels * together
    return width, max(ROWS, min(MOST_ROWS, ROW_BLOCK // width))


def _group(images: int, plane: int, chunk: tuple[int, int], channel_bytes: int) -> int:
    """How many channels a chunk owns in channels-first data."""
    return max(1, min(max(chunk[0] // plane, chunk[1] // (images * plane)), CACHE // channel_bytes))


def _way_to_memory(kernel, shape: tuple[int, ...], layout: str, itemsize: int) -> int:
    """How a result is written. Past the caches takes, in rows, whole cache lines."""
    if prod(shape) * itemsize < LARGE or (layout == "NHWC" and shape[3] * itemsize % ALIGNMENT != 0):
        return KEPT_ALWAYS
    return PAST_ALWAYS if kernel in (forward_by_channel, backward_by_channel) else PAST_IN_USED


def _kept(size: int, channels: int, itemsize: int, arrays: int, frozen: bool) -> int:
    """The mode of a call whose result is not written past the caches; NEAR matters in NHWC alone."""
    size *= itemsize
    near = size * arrays < NEAR_BELOW[arrays - 2] or (size < NEAR_WIDE_BELOW and channels * itemsize >= WIDE)
    if frozen:
        return FROZEN_NEAR if near else FROZEN
    return NEAR if near else KEPT


def prepare_batch_norm(shapes, dtype, *, training, momentum, eps, layout, activation, return_stats):
    """What follows from the shapes is worked out once; a call allocates its results and runs one kernel."""
    shape, size, itemsize = shapes[0], prod(shapes[0]), dtype.itemsize
    absent = _ABSENT[itemsize]
    channels = shape[1] if layout == "NCHW" else shape[3]
    if size == 0:
        return partial(_batch_norm_of_nothing, channels=channels, training=training, eps=eps, return_stats=return_stats)
    code = ACTIVATION_CODES[activation]
    kernel, dimensions = _forward_way(shape, layout, training, itemsize)
    way = KEPT_ALWAYS if code else _way_to_memory(kernel, shape, layout, itemsize)
    kept = _kept(size, channels, itemsize, 2, False)
    create = empty if size * itemsize >= recycling.FROM else np.empty
    after = (momentum, eps, code) if kernel is forward_by_channel else (training, momentum, eps, code)
    work = size * (0.6 if code <= LAST_CHEAP else 1.6)
    launch, by_row = kernel.sized(work), kernel is forward_by_row

    def run(x, running_mean, running_var, weight, bias):
        if way == KEPT_ALWAYS:
            y, past = create(shape, dtype), False
        else:
            y, used = large(shape, dtype)
            past = used or way == PAST_ALWAYS
        mean = invstd = absent
        if return_stats:
            mean, invstd = np.empty(channels, absent.dtype), np.empty(channels, absent.dtype)
        if running_mean is None:
            running_mean = running_var = absent
        if weight is None:
            weight = absent
        if bias is None:
            bias = absent
        operands = (x.reshape(size), y.reshape(size), *dimensions, running_mean, running_var, weight, bias)
        if by_row:
            launch(*operands, mean, invstd, *after, STREAMED if past else kept, _threads(work))
        else:
            launch(*operands, mean, invstd, *after, past)
        return (y, mean, invstd) if return_stats else y

    return run


def _forward_way(shape: tuple[int, ...], layout: str, training: bool, itemsize: int):
    """(kernel, the dimensions that it takes)."""
    if layout == "NHWC":
        width, block = _rows(shape[3], prod(shape[:3]), itemsize)
        return forward_by_row, (shape[3], width, block)
    images, channels, plane = shape[0], shape[1], shape[2] * shape[3]
    if not training or (channels < ENOUGH_CHANNELS and prod(shape) >= SMALL):
        return forward_by_block, (images, channels, plane)
    group = _group(images, plane, FORWARD_LONG if plane >= LONG else FORWARD_CHUNK, images * plane * itemsize * 2)
    return forward_by_channel, (images, channels, plane, group)


def _threads(work: float) -> int:
    """How many threads will share the work."""
    if work < SERIAL_BELOW or not may_split():
        return 1
    return settings.active().threads or numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]


def _batch_norm_of_nothing(x, running_mean, running_var, weight, bias, *, channels, training, eps, return_stats):
    """The result of an empty batch, whose statistics are said to be 0."""
    if not return_stats:
        return np.empty_like(x)
    if not training:
        return np.empty_like(x), running_mean.copy(), 1 / np.sqrt(running_var + x.dtype.type(eps))
    return np.empty_like(x), np.zeros(channels, x.dtype), np.full(channels, eps**-0.5, x.dtype)


def prepare_batch_norm_half(shapes, *, training, activation, **options):
    """The same in float16, converted in the kernels' registers; None where that is not possible.

    The sums are in float32, in the order of a float32 call, but where the width of rows differs (see `_rows`): in NHWC,
    with fewer than 256 channels, from 2^20 elements on and below 2^21.
    """
    if not prod(shapes[0]) or not activates_halves(ACTIVATION_CODES[activation]):
        return None
    single: Any = prepare_batch_norm(shapes, BITS, training=training, activation=activation, **options)

    def run(x, *vectors):
        floats = _floats(vectors)
        result = single(x.view(BITS), *floats)
        if training and vectors[0] is not None:
            narrowed(floats[0], vectors[0])
            narrowed(floats[1], vectors[1])
        if type(result) is not tuple:
            return result.view(HALF)
        return result[0].view(HALF), narrowed(result[1]), narrowed(result[2])

    return run


def _floats(vectors: tuple) -> list[Any]:
    return [None if vector is None else widened(vector) for vector in vectors]


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
    if size == 0:
        return partial(_gradients_of_nothing, channels=channels)
    kernel, dimensions = _backward_way(shape, layout, itemsize)
    way = _way_to_memory(kernel, shape, layout, itemsize) if training else KEPT_ALWAYS
    kept = _kept(size, channels, itemsize, 3, not training)
    create = empty if size * itemsize >= recycling.FROM else np.empty
    launch, by_row = kernel.sized(size), kernel is backward_by_row

    def run(grad, x, mean, invstd, weight):
        mode = kept
        if way == KEPT_ALWAYS:
            result = create(shape, dtype)
        else:
            result, used = large(shape, dtype)
            mode = STREAMED if used or way == PAST_ALWAYS else KEPT
        grad_weight, grad_bias = np.empty(channels, absent.dtype), np.empty(channels, absent.dtype)
        if weight is None:
            weight = absent
        operands = (grad.reshape(size), x.reshape(size), result.reshape(size), *dimensions, mean, invstd, weight)
        if by_row:
            launch(*operands, grad_weight, grad_bias, mode, _threads(size))
        else:
            launch(*operands, grad_weight, grad_bias, mode)
        return result, grad_weight, grad_bias

    return run


def _backward_way(shape: tuple[int, ...], layout: str, itemsize: int):
    """As `_forward_way`."""
    if layout == "NHWC":
        width, block = _rows(shape[3], prod(shape[:3]), itemsize)
        return backward_by_row, (shape[3], width, block)
    images, channels, plane = shape[0], shape[1], shape[2] * shape[3]
    if channels < ENOUGH_CHANNELS and prod(shape) >= SMALL:
        return backward_by_block, (images, channels, plane)
    group = _group(images, plane, BACKWARD_LONG if plane >= LONG else BACKWARD_CHUNK, images * plane * itemsize * 3)
    return backward_by_channel, (images, channels, plane, group)


def _gradients_of_nothing(grad, x, mean, invstd, weight, *, channels):
    return np.empty_like(x), np.zeros(channels, x.dtype), np.zeros(channels, x.dtype)


def prepare_batch_norm_backward_half(shapes, **options):
    """As `prepare_batch_norm_half`."""
    if not prod(shapes[1]):
        return None
    single: Any = prepare_batch_norm_backward(shapes, BITS, **options)

    def run(grad, x, *vectors):
        floats = _floats(vectors)
        result, grad_weight, grad_bias = single(grad.view(BITS), x.view(BITS), *floats)
        return result.view(HALF), narrowed(grad_weight), narrowed(grad_bias)

    return run


def batch_norm_backward(grad, x, mean, invstd, weight, *, training, layout):
    run = prepare_batch_norm_backward((grad.shape, x.shape), x.dtype, training=training, layout=layout)
    return run(grad, x, mean, invstd, weight)
