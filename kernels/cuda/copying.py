"""Copies between arrays of any strides, on the device."""

import numpy as np
from numba import cuda

from tilewise.kernels.cuda.launch import ELEMENTS, INT64, ceil_div, kernel
from tilewise.kernels.device_arrays import DeviceArray

_THREADS = 256
MAX_AXES = 6
# A copy has nothing to do with what the bits mean: one form for each size of an element.
_WORDS = {size: np.dtype(f"uint{8 * size}") for size in (1, 2, 4, 8)}


@kernel(threads=_THREADS, dtypes=_WORDS.values())
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


def copy_strided(source: DeviceArray, target: DeviceArray):
    """target[...] = source, of one shape and dtype."""
    if source.ndim > MAX_AXES:
        raise NotImplementedError(f"arrays on the GPU may have at most {MAX_AXES} axes, got {source.ndim}")
    item = source.dtype.itemsize
    fill = MAX_AXES - source.ndim
    sizes = (*source.shape[::-1], *[1] * fill)
    from_, to = ([s // item for s in a.strides[::-1]] + [0] * fill for a in (source, target))
    blocks = ceil_div(source.size, _THREADS)
    numbers = (source.size, *sizes[:5], *from_, *to)
    copy_elements(source.place, blocks, source, target, *numbers, dtype=_WORDS[item])


def contiguous(array: DeviceArray, alignment: int = 1) -> DeviceArray:
    """The array itself where it is contiguous, from a multiple of `alignment` bytes on, else a copy."""
    if array.contiguous and array.pointer % alignment == 0:
        return array
    result = array.place.empty(array.shape, array.dtype)
    copy_strided(array, result)
    return result
