"""Unpooling on the GPU, and its gradient.

Of several elements for one pixel the last one stays, as in the reference: first every element writes its position to
its pixel's `owner` (the largest wins, whoever comes first), then every pixel fetches its owner's element. Elements are
moved as words of their size, whatever they mean.
"""

from functools import partial

import numpy as np
from numba import cuda

from tilewise.kernels import copying_plan, pool_plan
from tilewise.kernels.cuda.launch import ELEMENTS, INDICES, INT64, WORDS, kernel
from tilewise.kernels.cuda.memory import atomic_max, narrow, zero
from tilewise.kernels.cuda.pool_windows import THREADS, split
from tilewise.kernels.pool_plan import UnpoolKernels


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


@kernel(threads=THREADS, dtypes=copying_plan.WORDS.values())
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


@kernel(threads=THREADS, dtypes=[copying_plan.WORDS[size] for size in (2, 4, 8)])
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


_KERNELS = UnpoolKernels(partial(unpool_forget, dtype=np.dtype(np.int64)), unpool_claim, unpool_fetch, unpool_backward)
max_unpool2d = partial(pool_plan.max_unpool2d, _KERNELS)
max_unpool2d_backward = partial(pool_plan.max_unpool2d_backward, _KERNELS)
