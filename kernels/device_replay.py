"""Calls on a GPU's arrays that were made before: their allocations and launches are done again, nothing is planned.

What a backend does for a call depends on its signature alone (settings, options, shapes, dtypes), as long as all arrays
are contiguous and begin at multiples of 16 bytes; only their addresses differ. So the second call of a signature is
recorded: what it allocates, which kernels it starts with which numbers, and which of these are addresses in which
array. Later calls fill in their own. A call of the host then costs little more than the driver takes to start its
kernels.

Addresses are found by following them: while a call is recorded, a pointer is an `Address`, which knows its array and
stays one when bytes are added to it. A call that starts a kernel with any other address is not done again.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from math import prod
from typing import Any
from weakref import ref

from tilewise.kernels.device_arrays import DeviceArray, Place, row_major

ALIGNMENT = 16  # bytes


class Address(int):
    """A pointer that knows where it comes from.

    index: of the call's operands, and after these of what it allocated; None for memory that is the same in every call.
    offset: bytes from its beginning.
    """

    index: int | None
    offset: int

    @classmethod
    def of(cls, pointer: int, index: int | None, offset: int = 0) -> "Address":
        made = cls(pointer)
        made.index, made.offset = index, offset
        return made

    def __add__(self, more: int) -> "Address":
        return self.of(int(self) + more, self.index, self.offset + more)

    __radd__ = __add__


class Recorder(Place):
    """Stands for the operands' place while a call is recorded."""

    def __init__(self, place: Place, operands: int):
        self.ordinal, self.place, self._operands = place.ordinal, place, operands
        self.allocations: list[tuple[tuple[int, ...], Any]] = []
        self.allocated_before: list[int] = []  # of each, how many kernels had been started
        self.dead_before: dict[int, int] = {}  # the same when it was given back, where that was during the call
        self.launches: list[tuple] = []
        self.kept: list[Any] = []  # owners of what lasts
        self._watched: list[Any] = []
        self._results: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.repeatable = True

    @property
    def engine(self):
        return self.place.engine

    def stream(self):
        return self.place.stream()

    def operand(self, view: DeviceArray, index: int) -> DeviceArray:
        return DeviceArray(self, Address.of(view.pointer, index), view.shape, view.dtype, view.owner)

    def empty(self, shape, dtype):
        made, index = self.place.empty(shape, dtype), len(self.allocations)
        self.allocations.append((made.shape, made.dtype))
        self.allocated_before.append(len(self.launches))
        with suppress(TypeError):  # of a type that cannot be watched: it lives to the call's end
            self._watched.append(ref(made.owner, partial(self._died, index)))
        return DeviceArray(self, Address.of(made.pointer, self._operands + index), made.shape, made.dtype, made.owner)

    def _died(self, index: int, _):
        self.dead_before[index] = len(self.launches)

    def lasting(self, array):
        self.kept.append(array.owner)
        return DeviceArray(self, Address.of(array.pointer, None), array.shape, array.dtype, array.owner)

    def made_lasting(self):
        self.repeatable = False  # the next call finds it made

    def started(self, engine, form, grid, shared, arguments):
        numbers, addresses = [], []
        for position, (argument, is_address) in enumerate(zip(arguments, form.addresses, strict=True)):
            value = 0 if argument is None else getattr(argument, "pointer", argument)
            if isinstance(value, Address):
                if value.index is not None:
                    addresses.append((position, value.index, value.offset))
                value = int(value)
            elif is_address and value:
                self.repeatable = False
            numbers.append(value)
        self.launches.append((engine.start, form, grid, shared, numbers, tuple(addresses)))

    def wrap(self, array):
        address: Any = array.pointer
        wrapped = self.place.wrap(array)
        index = address.index if isinstance(address, Address) and address.offset == 0 else None
        if index is None or index < self._operands:
            self.repeatable = False
        else:
            self._results[id(wrapped)] = index - self._operands, array.shape
        return wrapped

    def results(self, of_call) -> list:
        """For each result of the call: which allocation it is, and its shape; None where it is absent."""
        some = of_call if isinstance(of_call, tuple) else (of_call,)
        return [None if result is None else self._results[id(result)] for result in some]


class Recorded:
    """A call that can be done again."""

    def __init__(self, recorder: Recorder, library: "Library", result, sizes: list[int], into: bool):
        """result: what the call returned. sizes: bytes of each operand. into: whether the last one is `out`."""
        place, count = recorder.place, len(recorder.launches)
        self._stream, self._pointer = library.stream(place), library.pointer
        self._sizes, self._into, self._is_tuple = sizes, into, isinstance(result, tuple)
        self._kept = recorder.kept  # alive as long as their addresses are here
        results = [] if into else recorder.results(result)
        shapes = [shape for shape, _ in recorder.allocations]
        self._results = [None if r is None else (r[0], None if shapes[r[0]] == r[1] else r[1]) for r in results]
        allocators = [library.allocator(place, *about) for about in recorder.allocations]
        wanted = {r[0] for r in results if r is not None}
        # what is allocated before each kernel, and given back after it, as in the call that was recorded: a call that
        # held everything to its end could need far more memory
        self._steps = [
            (
                [a for a, before in zip(allocators, recorder.allocated_before, strict=True) if before == i],
                launch,
                [j for j, before in recorder.dead_before.items() if before == i + 1 and j not in wanted],
            )
            for i, launch in enumerate([*recorder.launches, None][: count + 1])
        ]  # fmt: skip

    def overlaps(self, pointers: list[int]) -> bool:
        """Whether `out` meets an operand, which is for the first way to judge."""
        *others, begin = pointers
        end = begin + self._sizes[-1]
        return any(p < end and begin < p + size for p, size in zip(others, self._sizes, strict=False) if size)

    def run(self, pointers: list[int]) -> Any:
        """pointers: of the operands; an absent one's is 0."""
        made: list[Any] = []
        stream = self._stream()
        for allocators, launch, dead in self._steps:
            for allocate in allocators:
                made.append(allocate())  # in no variable, which would keep it
                pointers.append(self._pointer(made[-1]))
            if launch is None:
                break
            start, form, grid, shared, numbers, addresses = launch
            filled = numbers.copy()  # other threads may be here, too
            for position, index, offset in addresses:
                filled[position] = pointers[index] + offset
            start(form, grid, shared, stream, form.pack_numbers(filled))
            for j in dead:
                made[j] = None
        if not self._is_tuple:
            return None if self._into else _shaped(made, self._results[0])
        return tuple(_shaped(made, result) for result in self._results)


def _shaped(made: list, result):
    if result is None:
        return None
    index, shape = result
    return made[index] if shape is None else made[index].reshape(shape)


class Library:
    """A library's arrays, read for a call that may have been made before."""

    def signature(self, arrays: Sequence, pointers: list[int]) -> list | None:
        """Shapes, dtypes and the device of these arrays (or None), whose addresses are added to `pointers`; None where
        one is not of the library's own type, not contiguous, not aligned, or on another device."""
        raise NotImplementedError

    def allocator(self, place, shape: tuple[int, ...], dtype) -> Callable[[], Any]:
        raise NotImplementedError

    def stream(self, place) -> Callable[[], int]:
        return place.stream

    def pointer(self, array) -> int:
        raise NotImplementedError


class TorchTensors(Library):
    def __init__(self, torch):
        self._torch, self._type, self._strided = torch, torch.Tensor, torch.strided
        self.pointer = torch.Tensor.data_ptr
        # What code generated by torch.compile calls: torch.empty on the current device, without parsing its options.
        guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
        self._quick = getattr(guards, "_empty_strided_cuda", None)
        self._current = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    def signature(self, arrays, pointers):
        if not arrays[0].is_cuda:
            return None
        device = arrays[0].get_device()
        found: list = [device]
        for a in arrays:
            if a is None:
                pointers.append(0)
                found.append(None)
                continue
            if type(a) is not self._type or a.get_device() != device or a.requires_grad:
                return None
            if a.layout is not self._strided or not a.is_contiguous():
                return None
            pointer = a.data_ptr()
            if pointer % ALIGNMENT:
                return None
            pointers.append(pointer)
            found += a.shape, a.dtype
        return found

    def allocator(self, place, shape, dtype):
        torch = self._torch
        kind = getattr(torch, dtype.name)
        if self._quick is not None and torch.cuda.device_count() == 1:
            return partial(self._quick, shape, row_major(shape, 1), kind)
        return partial(torch.empty, shape, dtype=kind, device=place.device)

    def stream(self, place):
        return place.stream if self._current is None else partial(self._current, place.ordinal)


class CupyArrays(Library):
    def __init__(self, cupy):
        self._cupy, self._type, self._current = cupy, cupy.ndarray, cupy.cuda.runtime.getDevice

    def signature(self, arrays, pointers):
        device = self._current()  # where allocations lie
        found: list = [device]
        for a in arrays:
            if a is None:
                pointers.append(0)
                found.append(None)
                continue
            if type(a) is not self._type or not a.flags.c_contiguous:
                return None
            data = a.data
            if data.device_id != device or data.ptr % ALIGNMENT:
                return None
            pointers.append(data.ptr)
            found += a.shape, a.dtype
        return found

    def allocator(self, place, shape, dtype):
        return partial(self._cupy.empty, shape, dtype)

    def pointer(self, array):
        return array.data.ptr


_LIBRARIES: dict[type, Library] = {}  # by the type of its arrays
_KNOWN = {"torch": ("Tensor", TorchTensors), "cupy": ("ndarray", CupyArrays)}


def library_of(kind: type) -> Library | None:
    """The library whose arrays are of this very type; None for all others, subclasses too."""
    found = _LIBRARIES.get(kind)
    if found is None and kind.__name__ in ("Tensor", "ndarray"):
        name = kind.__module__.partition(".")[0]
        type_name, library = _KNOWN.get(name, ("", None))
        if library is not None and getattr(sys.modules.get(name), type_name, None) is kind:
            found = _LIBRARIES[kind] = library(sys.modules[name])
    return found


def bytes_of(views: Sequence[DeviceArray | None]) -> list[int]:
    return [0 if view is None else prod(view.shape) * view.dtype.itemsize for view in views]
