"""Unpooling on the GPU, and its gradient; src/pool_unpool.cu says how."""

import numpy as np

from tilewise.kernels.cupy.launch import Kernel, blocks_of
from tilewise.kernels.cupy.words import WORDS

_forget = Kernel("pool_unpool.cu", "unpool_forget<{T}>", "P q", dtypes=("int32",))
_claim = Kernel("pool_unpool.cu", "unpool_claim<{T}>", "P P q q q q", dtypes=("int64",))
_fetch = Kernel("pool_unpool.cu", "unpool_fetch<{T}>", "P P P q q q q", dtypes=WORDS.values())
_backward = Kernel(
    "pool_unpool.cu", "unpool_backward<{T}>", "P P P q q q q", dtypes=[WORDS[size] for size in (2, 4, 8)]
)

_MOST_OWNERS = (1 << 31) - 1  # owners are int32


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
        _forget(place, blocks_of(y.size), owners, y.size)
        _claim(place, blocks_of(x.size), indices, owners, x.size, pooled, pixels, channels)
        word = WORDS[x.dtype.itemsize]
        _fetch(place, blocks_of(y.size), x, owners, y, y.size, pooled, pixels, channels, dtype=word)
    return y


def max_unpool2d_backward(grad, indices, *, layout):
    result = grad.place.empty(indices.shape, grad.dtype)
    pooled, channels = _sizes(indices.shape, layout)
    pixels, _ = _sizes(grad.shape, layout)
    if result.size:
        operands = (grad, indices, result, result.size, pooled, pixels, channels)
        _backward(grad.place, blocks_of(result.size), *operands, dtype=WORDS[grad.dtype.itemsize])
    return result
