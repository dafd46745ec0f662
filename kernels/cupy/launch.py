"""What a GPU kernel is here: a template of src/, its parameters' kinds, its threads, and its start.

    scale = Kernel("scale.cu", "scale<{T}, {N}>", "P P r q")
    scale(place, blocks, x, y, 2.0, x.size)

    template <class T, int N> __global__ void scale(const T *x, T *y, Sum<T> factor, long long count)

The dtype of the arrays decides which instantiation runs: {T} is its type in C++, {N} how many make 16 bytes. Parameters
are pointers, numbers, and structures of numbers, passed by value. They lie in a buffer, each from a multiple of eight
bytes on, whose addresses the driver takes. What compiles and runs it is the engine of driver.py, or in the tests an
emulator.
"""

import ctypes
import re
from collections.abc import Iterable
from struct import Struct, calcsize
from threading import local

import numpy as np

from tilewise.kernels.arrays import bfloat16
from tilewise.kernels.channel_plan import THREADS, ceil_div
from tilewise.kernels.cupy import driver, module

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_TYPES = {
    "float16": "tilewise::Half", "bfloat16": "tilewise::Bfloat", "float32": "float", "float64": "double",
    "int8": "signed char", "uint8": "unsigned char", "int16": "short", "uint16": "unsigned short",
    "int32": "int", "uint32": "unsigned", "int64": "long long", "uint64": "unsigned long long",
}  # fmt: skip
NAMES = f"{module.NAMESPACE}::"  # goes before names of the sources in a template's arguments
_WORD = 8  # bytes: every parameter begins at a multiple

KERNELS: list["Kernel"] = []  # every kernel that was made: the tests compile and launch them all


def sum_dtype(dtype: np.dtype) -> np.dtype:
    """What is computed and summed in: element.cuh's Sum, and of integers matrix_result.cuh's WholeSum."""
    if dtype.kind in "iu":
        return np.dtype(np.uint64) if dtype.itemsize == 8 else np.dtype(np.uint32)
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def _dtype(name: str) -> np.dtype | None:
    return bfloat16() if name == "bfloat16" else np.dtype(name)


class Kernel:
    """A kernel for the GPU. Called with a place, the grid and the arguments, it starts.

    source: the file in src/ that has it.
    template: its name with the template's arguments; {T} and {N} stand for the dtype's type and for its lanes;
        other names of the sources follow NAMES.
    parameters: a group for each, of the letters of Python's struct: P a pointer, q and i numbers of 64 and 32 bits, r a
        number of the dtype that is summed in. "P 2q3i" is a pointer and a structure of five numbers.
    threads: of a block. blocks: how many of them shall fit a multiprocessor; blocks_on: on devices where it is another;
        blocks_of_double: in float64, where it is another.
    dtypes: what it is for. least: the lowest compute capability.
    shared: bytes of dynamic shared memory. target: the only architecture that it is compiled for, "sm_90a": its code
        runs on devices of `least` and on no later ones.
    promises: machine instructions that its code must have: tests/gpu_compile.py looks.
    """

    def __init__(
        self, source: str, template: str, parameters: str, *, threads: int = THREADS, blocks: int = 1,
        dtypes: Iterable[str | np.dtype] = FLOATS, least: tuple[int, int] = module.OLDEST,
        promises: tuple[str, ...] = (), blocks_on: dict[tuple[int, int], int] | None = None,
        shared: int = 0, target: str | None = None, blocks_of_double: int | None = None,
    ):  # fmt: skip
        self.source, self.template, self.parameters = source, template, parameters.split()
        self.threads, self.blocks, self.least = threads, blocks, least
        self.shared, self.target = shared, target
        self._names = tuple(d if isinstance(d, str) else d.name for d in dtypes)
        self.name = f"cupy {template.replace('{', '').replace('}', '').replace(NAMES, '')}"
        self._promises, self._blocks_on, self._blocks_of_double = promises, blocks_on or {}, blocks_of_double
        self._forms: dict[np.dtype, Form] = {}
        KERNELS.append(self)

    def __repr__(self):
        return f"<kernel {self.name}>"

    def runs_on(self, capability: tuple[int, int]) -> bool:
        return capability == self.least if self.target else capability >= self.least

    def bounds(self, capability: tuple[int, int], dtype: np.dtype | None = None) -> tuple[int, int]:
        """(threads, the blocks that shall fit a multiprocessor)."""
        if self._blocks_of_double is not None and dtype == np.float64:
            return self.threads, self._blocks_of_double
        return self.threads, self._blocks_on.get(capability, self.blocks)

    def promises(self, dtype: np.dtype) -> tuple[str, ...]:
        return self._promises

    @property
    def dtypes(self) -> tuple[np.dtype, ...]:
        """What it is for, without bfloat16 where NumPy has none."""
        return tuple(dtype for dtype in map(_dtype, self._names) if dtype is not None)

    def form(self, dtype: np.dtype) -> "Form":
        found = self._forms.get(dtype)
        if found is None:
            if dtype.name not in self._names:
                raise TypeError(f"kernel {self.name} is declared for {list(self._names)}, not for {dtype}")
            found = self._forms[dtype] = Form(self, dtype)
        return found

    def __call__(self, place, grid, *arguments, dtype: np.dtype | None = None):
        """grid: blocks, or (x, y, z) of them. dtype: the first array's."""
        form = self.form(arguments[0].dtype if dtype is None else dtype)
        grid = (grid, 1, 1) if isinstance(grid, int) else grid
        if 0 not in grid:
            engine = driver.engine(place.ordinal)
            engine.start(form, grid, self.shared, place.stream(), form.pack(arguments))
            place.started(engine, form, grid, self.shared, arguments)


class Slots(bytearray):
    """A launch's parameters. table: where in memory the addresses of each lie, one after the other."""

    __slots__ = ("addresses", "table")

    def __init__(self, size: int, offsets: list[int]):
        super().__init__(size)
        first = ctypes.addressof((ctypes.c_char * size).from_buffer(self))
        self.addresses = (ctypes.c_uint64 * len(offsets))(*[first + offset for offset in offsets])
        self.table = ctypes.addressof(self.addresses)


class Form:
    """A kernel for one dtype. sizes: bytes of each parameter. addresses: which of its numbers are pointers."""

    def __init__(self, kernel: Kernel, dtype: np.dtype):
        self.kernel, self.dtype = kernel, dtype
        self.expression = kernel.template.format(T=_TYPES[dtype.name], N=16 // dtype.itemsize)
        real = "d" if sum_dtype(dtype) == np.float64 else "f"
        groups = [group.replace("r", real) for group in kernel.parameters]
        self.sizes = [calcsize(group + ("0q" if "q" in group else "")) for group in groups]
        self._format = Struct("@" + "".join(group + "0q" for group in groups))
        letters = re.sub(r"(\d+)(\w)", lambda found: int(found[1]) * found[2], "".join(groups))
        self.addresses = tuple(letter == "P" for letter in letters)
        lengths = [-(-size // _WORD) * _WORD for size in self.sizes]
        self._offsets = [sum(lengths[:i]) for i in range(len(lengths))]
        self._buffers = local()

    def pack(self, arguments: tuple) -> Slots:
        """The arguments in this thread's buffer: the driver reads them before a launch returns."""
        return self.pack_numbers([getattr(a, "pointer", a) if a is not None else 0 for a in arguments])

    def pack_numbers(self, numbers: list) -> Slots:
        """`pack`, with the addresses of the arrays."""
        try:
            slots = self._buffers.slots
        except AttributeError:
            slots = self._buffers.slots = Slots(self._format.size, self._offsets)
        self._format.pack_into(slots, 0, *numbers)
        return slots


def blocks_of(count: int) -> int:
    """Blocks for a thread each."""
    return ceil_div(count, THREADS)


def engine_of(place):
    """What compiles and starts kernels there."""
    return driver.engine(place.ordinal)
