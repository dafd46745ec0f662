"""float16 on the CPU: computed in float32, most of it between a conversion of the operands and one of the results.

Float32 copies of large operands would cost more memory traffic than a kernel that is bound by memory. Where the parts
of a result do not depend on each other (half_parts.py), a call is therefore cut into parts that stay in the cache:

    for each part:   x16[part] -> x32 -> float32 kernel -> y32 -> y16[part]       only x16 and y16 come from memory

Batch norm's kernels convert in their registers instead (half_vector.py), but for the activations that must not be
applied to what is rounded already.

The parts follow from the shapes, so the bits do not depend on the number of threads.
"""

from collections.abc import Callable
from math import prod

import numpy as np

from tilewise.kernels.arrays import canonical
from tilewise.kernels.cpu import half_convert
from tilewise.kernels.cpu.half_parts import Cut, cut
from tilewise.kernels.cpu.scratch import empty

HALF, SINGLE, BITS = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.uint16)
TINY = 512  # up to so many elements NumPy widens faster than a kernel is called
# Elements of the largest operand's part, 256 kB of float32: with its result it stays in a second-level cache, and the
# allocator hands out the same memory again, without page faults. relu of 8x64x112x112 on one thread, in ms: 3.1 with
# parts of 2^15, 2.4 with 2^16, 2.9 with 2^17, 4.0 with 2^18, 4.8 with 2^20; float32 1.7.
PART = 1 << 16
NANOSECONDS = 0.1  # to convert an element, for the decision to split over threads


def _widen_into(target, bits, rows: int, length: int, step: int, start: int):
    half_convert.convert(rows * length * NANOSECONDS, bits, start, step, target, 0, length, rows, length)


def _narrow_into(bits, source, rows: int, length: int, step: int, start: int):
    half_convert.convert(rows * length * NANOSECONDS, source, 0, length, bits, start, step, rows, length)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(BITS)


def widened(array: np.ndarray) -> np.ndarray:
    """A float32 copy; a transposed view stays one."""
    if array.size <= TINY:
        return array.astype(SINGLE)
    if not array.flags.carray:
        if array.T.flags.c_contiguous:
            return widened(canonical(array.T)).T
        array = canonical(array)
    result = empty(array.shape, SINGLE)
    _widen_into(result.reshape(-1), _bits(array), 1, array.size, array.size, 0)
    return result


def narrowed(array: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The nearest float16 of each element; into `out` if there is one."""
    if not array.flags.carray:
        array = canonical(array)
    result = np.empty(array.shape, HALF) if out is None else out
    if array.size:
        _narrow_into(_bits(result), array.reshape(-1), 1, array.size, array.size, 0)
    return result


def prepare(name: str, prepare_single: Callable, dtypes: list, shapes: list, options: dict, changed: tuple[int, ...]):
    """The function for this signature.

    prepare_single: (shapes, options) -> the function in float32. dtypes: the operands', None for an absent one.
    changed: which operands the function updates in place.
    """
    parts = cut(name, shapes, options)
    by_parts = None
    if parts is not None and parts.largest() * parts.length > 2 * parts.larger * PART:
        by_parts = _prepare_parts(parts, prepare_single, dtypes, changed)
        if not parts.axes:
            return by_parts
    single = prepare_single(shapes, options)
    halves = tuple(dtype == HALF for dtype in dtypes)
    if not changed and all(shape is None or prod(shape) <= TINY for shape in shapes):
        return _prepare_tiny(single, halves)

    def run(*operands, out=None):
        if by_parts and all(a is None or a.flags.carray for a in operands):
            return by_parts(*operands, out=out)
        floats = [widened(a) if half else a for a, half in zip(operands, halves, strict=True)]
        result = single(*floats)
        for i in changed:
            if operands[i] is not None:
                narrowed(floats[i], operands[i])
        if type(result) is not tuple:
            return narrowed(result, out)
        return tuple(narrowed(r) if r is not None and r.dtype == SINGLE else r for r in result)

    return run


def _prepare_tiny(single: Callable, halves: tuple[bool, ...]):
    """`run` without detours, for operands whose conversions take less than the calls around them."""
    like = np.empty(0, SINGLE), np.empty(0, BITS)
    narrow = half_convert.convert.bound(0, like[0], 0, 1, like[1], 0, 1, 1, 1)

    def rounded(array):
        count = array.size
        if not 0 < count <= TINY or not array.flags.carray:
            return narrowed(array)
        result = np.empty(array.shape, HALF)
        narrow(array.ravel(), 0, count, result.view(BITS).ravel(), 0, count, 1, count)
        return result

    every = all(halves)

    def run(*operands, out=None):
        if every:  # a third of a microsecond faster than the general case
            result = single(*[a.astype(SINGLE) for a in operands])
        else:
            result = single(*[a.astype(SINGLE) if half else a for a, half in zip(operands, halves, strict=True)])
        if type(result) is not tuple:
            return rounded(result) if out is None else narrowed(result, out)
        return tuple(rounded(r) if r is not None and r.dtype == SINGLE else r for r in result)

    return run


class _Sliced:
    """A float16 array as (outer, length, inner), slices of which are converted or copied."""

    __slots__ = ("bits", "flat", "inner", "length", "outer", "shape", "wide")

    def __init__(self, array: np.ndarray, shape: tuple[int, ...], axis: int):
        self.shape = shape
        axis = min(axis, len(shape) - 1)
        self.outer, self.length, self.inner = prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])
        self.flat = array.reshape(-1)
        self.bits = self.flat.view(BITS) if array.dtype == HALF else None
        self.wide = None  # the memory of every part, one after the other

    def read(self, start: int, count: int, shape: tuple[int, ...]) -> np.ndarray:
        """Valid until the next part is read."""
        first, length = start * self.inner, count * self.inner
        if self.bits is None:
            return self.flat[first : first + length].reshape(shape)
        if self.wide is None:  # the first part is the largest
            self.wide = empty((self.outer * length,), SINGLE)
        target = self.wide[: self.outer * length]
        _widen_into(target, self.bits, self.outer, length, self.length * self.inner, first)
        return target.reshape(shape)

    def write(self, start: int, count: int, part: np.ndarray):
        first, length = start * self.inner, count * self.inner
        if self.bits is None:
            self.flat[first : first + length] = part.reshape(-1)
        else:
            _narrow_into(self.bits, part.reshape(-1), self.outer, length, self.length * self.inner, first)


def _prepare_parts(parts: Cut, prepare_single: Callable, dtypes: list, changed: tuple[int, ...]):
    length, axis = parts.length, parts.axis
    count = -(-length // -(-parts.largest() * length // (parts.larger * PART)))  # slices in a part, evenly divided
    wholes = length // count
    sizes = [count] * wholes + ([length - wholes * count] if length > wholes * count else [])
    shapes = {size: parts.part(size)[0] for size in set(sizes)}
    singles = {size: prepare_single(*parts.part(size)) for size in set(sizes)}
    vectors = [view is None or len(view) == 1 < axis + 1 for view in parts.views]
    axes = parts.axes or (axis,) * len(vectors)

    def run(*operands, out=None):
        sources = []
        for a, dtype, view, vector, along in zip(operands, dtypes, parts.views, vectors, axes, strict=True):
            if a is None or not vector:
                sources.append(None if a is None else _Sliced(a, view or (), along))
            else:
                sources.append(widened(a) if dtype == HALF else a)
        results, targets = (), ()
        start = 0
        for size in sizes:
            floats = [
                source if source is None or view is None
                else source[start : start + size] if vector
                else source.read(start, size, shape or ())
                for source, view, vector, shape in zip(sources, parts.views, vectors, shapes[size], strict=True)
            ]  # fmt: skip
            part = singles[size](*floats)
            part = part if type(part) is tuple else (part,)
            if not targets:
                results = [_whole(r, axis, length) for r in part] if out is None else [out]
                targets = [_Sliced(r, r.shape, axis) for r in results]
            for target, r in zip(targets, part, strict=True):
                target.write(start, size, r)
            start += size
        for i in changed:
            if operands[i] is not None:
                narrowed(sources[i], operands[i])
        if parts.lead is not None:
            results = [r.reshape(*parts.lead, *r.shape[r.ndim - parts.kept :]) for r in results]
        return tuple(results) if len(results) > 1 else next(iter(results))

    return run


def _whole(part: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Room for the whole of what `part` is the first part of."""
    axis = min(axis, part.ndim - 1)
    shape = (*part.shape[:axis], length, *part.shape[axis + 1 :])
    return empty(shape, HALF if part.dtype == SINGLE else part.dtype)
