"""Copies between arrays of any strides on a GPU, and how they are given to a backend's kernel (`run`)."""

import numpy as np

from tilewise.kernels.channel_plan import THREADS, ceil_div
from tilewise.kernels.device_arrays import DeviceArray

MAX_AXES = 6
# Elements that are moved and not looked at: what they mean does not matter, so each size has one kernel.
WORDS = {size: np.dtype(f"uint{8 * size}") for size in (1, 2, 4, 8)}


def copy_strided(run, source: DeviceArray, target: DeviceArray):
    """target[...] = source, of one shape and dtype.

    run(place, blocks, source, target, count, sizes, strides of source, strides of target, dtype=): the last axis first,
        strides in elements.
    """
    if source.ndim > MAX_AXES:
        raise NotImplementedError(f"arrays on the GPU may have at most {MAX_AXES} axes, got {source.ndim}")
    item, fill = source.dtype.itemsize, MAX_AXES - source.ndim
    sizes = (*source.shape[::-1], *[1] * fill)
    from_, to = ([s // item for s in a.strides[::-1]] + [0] * fill for a in (source, target))
    blocks = ceil_div(source.size, THREADS)
    run(source.place, blocks, source, target, source.size, sizes, from_, to, dtype=WORDS[item])


def contiguous(run, array: DeviceArray, alignment: int = 1) -> DeviceArray:
    """The array itself where it is contiguous, from a multiple of `alignment` bytes on, else a copy."""
    if array.contiguous and array.pointer % alignment == 0:
        return array
    result = array.place.empty(array.shape, array.dtype)
    copy_strided(run, array, result)
    return result
