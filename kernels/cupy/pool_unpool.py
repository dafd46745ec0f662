"""Unpooling on the GPU, and its gradient; src/pool_unpool.cu says how."""

from functools import partial

from tilewise.kernels import pool_plan
from tilewise.kernels.copying_plan import WORDS
from tilewise.kernels.cupy.launch import Kernel

_forget = Kernel("pool_unpool.cu", "unpool_forget<{T}>", "P q", dtypes=("int32",))
_claim = Kernel("pool_unpool.cu", "unpool_claim<{T}>", "P P q q q q", dtypes=("int64",))
_fetch = Kernel("pool_unpool.cu", "unpool_fetch<{T}>", "P P P q q q q", dtypes=WORDS.values())
_backward = Kernel(
    "pool_unpool.cu", "unpool_backward<{T}>", "P P P q q q q", dtypes=[WORDS[size] for size in (2, 4, 8)]
)

_KERNELS = pool_plan.UnpoolKernels(_forget, _claim, _fetch, _backward)
max_unpool2d = partial(pool_plan.max_unpool2d, _KERNELS)
max_unpool2d_backward = partial(pool_plan.max_unpool2d_backward, _KERNELS)
