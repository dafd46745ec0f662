"""Unpooling on the GPU, and its gradient.

Of several elements for one pixel the last one stays, as in the reference: first every element writes its position to
its pixel's `owner` (the largest wins, whoever comes first), then every pixel fetches its owner's element. Elements are
moved as words of their size, whatever they mean.
"""

import numpy as np
from numba import cuda

from tilewise.kernels.cuda.launch import ELEMENTS, INDICES, INT64, WORDS, kernel
from tilewise.kernels.cuda.memory import atomic_max, narrow, zero
from tilewise.kernels.cuda.pool_windows import THREADS, blocks_of, split

_BITS = {size: np.dtype(f"uint{8 * size}") for size in (1, 2, 4, 8)}
_INDEX = np.dtype(np.int64)
_MOST_OWNERS = (1 << 31) - 1  # owners are int32


@kernel(threads=THREADS, dtypes=("int64",))
def unpool_forget(owners: WORDS, count: INT64):
    """owners[...] = -1, nobody."""
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < count:
        owners[i] = -1


@kernel(threads=THREADS, dtypes=("int64",))
def unpool_claim(indices: INDICES, owners: WORDS, count: INT64, pooled: INT64, pixels: INT64, channels: INT64):
    """owners[image, index, channel] = the last position whose index it is; indices: (images, pooled, channels)."""
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < count:
        rest, channel = split(i, channels)
        image, position = split(rest, pooled)
        index = indices[i]
        if index >= 0 and index < pixels:
            atomic_max(owners, (image * pixels + index) * channels + channel, position)


@kernel(threads=THREADS, dtypes=_BITS.values())
def unpool_fetch(
    x: ELEMENTS, owners: WORDS, y: ELEMENTS, count: INT64, pooled: INT64, pixels: INT64, channels: INT64
):  # fmt: skip
    """y[image, pixel, channel] = x[image, owner, channel], 0 where there is none."""
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < count:
        rest, channel = split(i, channels)
        image, _ = split(rest, pixels)
        owner = owners[i]
        value = narrow(zero(x), x)
        if owner >= 0:
            value = x[(image * pooled + owner) * channels + channel]
        y[i] = value


@kernel(threads=THREADS, dtypes=[_BITS[size] for size in (2, 4, 8)])
def unpool_backward(
    grad: ELEMENTS, indices: INDICES, result: ELEMENTS, count: INT64, pooled: INT64, pixels: INT64, channels: INT64
):
    """result[image, position, channel] = grad[image, index, channel]."""
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < count:
        rest, channel = split(i, channels)
        image, _ = split(rest, pooled)
        index = indices[i]
        value = narrow(zero(grad), grad)
        if index >= 0 and index < pixels:
            value = grad[(image * pixels + index) * channels + channel]
        result[i] = value


def _sizes(shape, layout) -> tuple[int, int]:
    """(pixels of a plane, channels that lie side by side)."""
    return (shape[2] * shape[3], 1) if layout == "NCHW" else (shape[1] * shape[2], shape[3])


def max_unpool2d(x, indices, *, output_size, layout):
    n, c = x.shape[0], x.shape[1 if layout == "NCHW" else 3]
    shape = (n, c, *output_size) if layout == "NCHW" else (n, *output_size, c)
    pooled, channels = _sizes(x.shape, layout)
    pixels, _ = _sizes(shape, layout)
    if pooled > _MOST_OWNERS:
        raise NotImplementedError(f"max_unpool2d: planes of more than {_MOST_OWNERS} pooled elements on the GPU")
    place, y = x.place, x.place.empty(shape, x.dtype)
    if y.size:
        owners = place.empty(shape, np.int32)
        unpool_forget(place, blocks_of(y.size), owners, y.size, dtype=_INDEX)
        unpool_claim(place, blocks_of(x.size), indices, owners, x.size, pooled, pixels, channels)
        bits = _BITS[x.dtype.itemsize]
        unpool_fetch(place, blocks_of(y.size), x, owners, y, y.size, pooled, pixels, channels, dtype=bits)
    return y


def max_unpool2d_backward(grad, indices, *, layout):
    result = grad.place.empty(indices.shape, grad.dtype)
    pooled, channels = _sizes(indices.shape, layout)
    pixels, _ = _sizes(grad.shape, layout)
    if result.size:
        numbers = (result.size, pooled, pixels, channels)
        bits = _BITS[grad.dtype.itemsize]
        unpool_backward(grad.place, blocks_of(result.size), grad, indices, result, *numbers, dtype=bits)
    return result
