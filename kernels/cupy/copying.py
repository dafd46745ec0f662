"""Copies between arrays of any strides, on the device."""

from tilewise.kernels.cupy.launch import Kernel, blocks_of
from tilewise.kernels.cupy.words import WORDS
from tilewise.kernels.device_arrays import DeviceArray

MAX_AXES = 6

copy_elements = Kernel("copying.cu", "copy_elements<{T}>", f"P P q {3 * MAX_AXES}q", dtypes=WORDS.values())


def copy_strided(source: DeviceArray, target: DeviceArray):
    """target[...] = source, of one shape and dtype."""
    if source.ndim > MAX_AXES:
        raise NotImplementedError(f"arrays on the GPU may have at most {MAX_AXES} axes, got {source.ndim}")
    item = source.dtype.itemsize
    fill = MAX_AXES - source.ndim
    sizes = (*source.shape[::-1], *[1] * fill)
    from_, to = ([s // item for s in a.strides[::-1]] + [0] * fill for a in (source, target))
    operands = (source, target, source.size, *sizes, *from_, *to)
    copy_elements(source.place, blocks_of(source.size), *operands, dtype=WORDS[item])


def contiguous(array: DeviceArray, alignment: int = 1) -> DeviceArray:
    """The array itself where it is contiguous, from a multiple of `alignment` bytes on, else a copy."""
    if array.contiguous and array.pointer % alignment == 0:
        return array
    result = array.place.empty(array.shape, array.dtype)
    copy_strided(array, result)
    return result
