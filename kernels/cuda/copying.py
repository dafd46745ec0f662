"""Copies between arrays of any strides, on the device."""

from functools import partial

from numba import cuda

from tilewise.kernels import copying_plan
from tilewise.kernels.cuda.launch import ELEMENTS, INT64, kernel

_THREADS = 256


@kernel(threads=_THREADS, dtypes=copying_plan.WORDS.values())
def copy_elements(
    source: ELEMENTS, target: ELEMENTS, count: INT64,
    n0: INT64, n1: INT64, n2: INT64, n3: INT64, n4: INT64,
    s0: INT64, s1: INT64, s2: INT64, s3: INT64, s4: INT64, s5: INT64,
    t0: INT64, t1: INT64, t2: INT64, t3: INT64, t4: INT64, t5: INT64,
):  # fmt: skip
    """target[i] = source[i] for `count` elements; sizes n0 .. n4 of the last axes, innermost first, strides s and t."""
    i = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
    if i < count:
        i0, i = i % n0, i // n0
        i1, i = i % n1, i // n1
        i2, i = i % n2, i // n2
        i3, i = i % n3, i // n3
        i4, i5 = i % n4, i // n4
        value = source[i0 * s0 + i1 * s1 + i2 * s2 + i3 * s3 + i4 * s4 + i5 * s5]
        target[i0 * t0 + i1 * t1 + i2 * t2 + i3 * t3 + i4 * t4 + i5 * t5] = value


def _start(place, blocks, source, target, count, sizes, from_, to, *, dtype):
    copy_elements(place, blocks, source, target, count, *sizes[:-1], *from_, *to, dtype=dtype)


copy_strided, contiguous = partial(copying_plan.copy_strided, _start), partial(copying_plan.contiguous, _start)
