"""What a GPU kernel is here: a Python function for numba.cuda, its parameters' kinds, its threads, and its start.

    @kernel(threads=256)
    def scale(x: ELEMENTS, y: ELEMENTS, factor: REAL, count: INT64):
        i = first_index()
        ...

    scale(place, blocks, x, y, 2.0, x.size)

The dtype of the arrays decides what it is compiled for. Parameters are pointers and numbers, never array objects: one
word each, so that a launch packs a few words into a buffer and calls the driver (an array object has seven or more).
What compiles and runs it is the `engine` of the place that the arrays lie in: driver.py, or in the tests an emulator.
"""

import re
from dataclasses import dataclass
from struct import Struct
from threading import local
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from tilewise.kernels.cuda.inlining import quick_inlining

_NUMBA = {np.dtype(name): getattr(types, name) for name in (
    "float16", "float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
)}  # fmt: skip


def sum_dtype(dtype: np.dtype) -> np.dtype:
    """What is computed and summed in: float32 for float16; 32 bits for narrow integers, which wrap alike."""
    if dtype.kind == "f":
        return np.dtype(np.float32) if dtype.itemsize == 2 else dtype
    return np.dtype(np.int64) if dtype.itemsize == 8 else np.dtype(np.int32)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter's kind: its Numba type and the format of its eight-byte slot, by the kernel's dtype."""

    kind: str

    def numba_type(self, dtype: np.dtype):
        match self.kind:
            case "elements":
                return types.CPointer(_NUMBA[dtype])
            case "sums":
                return types.CPointer(_NUMBA[sum_dtype(dtype)])
            case "real":
                return _NUMBA[sum_dtype(dtype)]
            case "indices":
                return types.CPointer(types.int64)
            case "doubles":
                return types.CPointer(types.float64)
            case "words":
                return types.CPointer(types.int32)
        return types.int32 if self.kind == "int32" else types.int64

    @property
    def is_address(self) -> bool:
        return self.kind in ("elements", "sums", "indices", "doubles", "words")

    def slot(self, dtype: np.dtype) -> str:
        if self.kind == "real" and sum_dtype(dtype).kind == "f":
            return "d" if sum_dtype(dtype).itemsize == 8 else "f4x"
        narrow = self.kind == "int32" or (self.kind == "real" and sum_dtype(dtype).itemsize == 4)
        return "i4x" if narrow else "q"


ELEMENTS = Parameter("elements")  # a pointer to numbers of the kernel's dtype
SUMS = Parameter("sums")  # a pointer to numbers of the dtype that it sums in
INDICES = Parameter("indices")  # a pointer to int64
DOUBLES = Parameter("doubles")  # a pointer to float64, whatever the kernel's dtype: sums of very many numbers
WORDS = Parameter("words")  # a pointer to int32
REAL = Parameter("real")  # a number of the dtype that it sums in
INT32, INT64 = Parameter("int32"), Parameter("int64")

KERNELS: list["Kernel"] = []  # every kernel that was made: the tests compile and launch them all


FLOATS = ("float16", "float32", "float64")
INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
OLDEST = (7, 5)  # the first compute capability that kernels are compiled for


class Kernel:
    """A function for the GPU; see `kernel`. Called with a place, the grid and the arguments, it starts."""

    def __init__(self, function, threads: int, blocks: int, blocks_on: dict, name: str, dtypes, least, promises):
        self.function, self.threads, self.blocks, self.blocks_on = function, threads, blocks, blocks_on
        self.name = name or function.__name__
        self.dtypes, self.least = tuple(np.dtype(d) for d in dtypes), least
        self._promises = promises
        annotations = {k: v for k, v in function.__annotations__.items() if k != "return"}
        self.parameters: tuple[Parameter, ...] = tuple(annotations.values())
        function.__annotations__ = {}  # ours, not Python types
        self._forms: dict[np.dtype, Form] = {}
        KERNELS.append(self)

    def __repr__(self):
        return f"<kernel {self.name}>"

    def runs_on(self, capability: tuple[int, ...]) -> bool:
        return capability >= self.least

    def bounds(self, capability: tuple[int, ...], dtype: np.dtype | None = None) -> tuple[int, int]:
        """(threads, the blocks that shall fit a multiprocessor), which limit a thread's registers; in any dtype."""
        return self.threads, self.blocks_on.get(capability, self.blocks)

    def promises(self, dtype: np.dtype) -> tuple[str, ...]:
        """The machine instructions that its code for this dtype must have."""
        promised = self._promises
        return tuple(promised.get(dtype.name, ())) if isinstance(promised, dict) else tuple(promised)

    def form(self, dtype: np.dtype) -> "Form":
        found = self._forms.get(dtype)
        if found is None:
            if dtype not in self.dtypes:
                raise TypeError(f"kernel {self.name} is declared for {[d.name for d in self.dtypes]}, not for {dtype}")
            found = self._forms[dtype] = Form(self, dtype)
        return found

    def __call__(self, place, grid, *arguments, shared: int = 0, dtype: np.dtype | None = None):
        """grid: blocks, or (x, y, z) of them. shared: bytes of dynamic shared memory. dtype: the first array's."""
        form = self.form(arguments[0].dtype if dtype is None else dtype)
        grid = (grid, 1, 1) if isinstance(grid, int) else grid
        if 0 not in grid:
            engine = place.engine
            engine.start(form, grid, shared, place.stream(), form.pack(arguments))
            place.started(engine, form, grid, shared, arguments)


class Form:
    """A kernel for one dtype. addresses: which of its parameters are pointers."""

    def __init__(self, kernel: Kernel, dtype: np.dtype):
        self.kernel, self.dtype = kernel, dtype
        self.addresses = tuple(p.is_address for p in kernel.parameters)
        self.signature = types.void(*(p.numba_type(dtype) for p in kernel.parameters))
        # "@": a number beyond float32 becomes infinity, as where C++ or NumPy round it; with "=" it would be refused
        self._slots = Struct("@" + "".join(p.slot(dtype) for p in kernel.parameters))
        self._buffers = local()

    def pack(self, arguments: tuple) -> bytearray:
        """The arguments, eight bytes each, in this thread's buffer: the driver reads them before a launch returns."""
        return self.pack_numbers([getattr(a, "pointer", a) if a is not None else 0 for a in arguments])

    def pack_numbers(self, numbers: list) -> bytearray:
        """`pack`, with the addresses of the arrays."""
        try:
            buffer = self._buffers.slots
        except AttributeError:
            buffer = self._buffers.slots = bytearray(self._slots.size)
        self._slots.pack_into(buffer, 0, *numbers)
        return buffer

    def ptx(self, capability: tuple[int, ...]) -> str:
        """The PTX for a compute capability such as (9, 0)."""
        bounds = self.kernel.bounds(capability)
        with quick_inlining():
            text, _ = cuda.compile_ptx(self.kernel.function, self.signature, cc=capability, launch_bounds=bounds)
        return text

    @staticmethod
    def entry(ptx: str) -> str:
        """The kernel's name in its PTX."""
        match = re.search(r"\.visible \.entry (\S+?)\(", ptx)
        assert match, "numba-cuda made PTX without an entry"
        return match[1]


def kernel(
    *, threads: int, blocks: int = 1, blocks_on: dict | None = None, name: str = "", dtypes=FLOATS, least=OLDEST,
    promises=(),
):  # fmt: skip
    """Makes a function a `Kernel` of that many threads a block, of which `blocks` blocks shall fit a multiprocessor.

    blocks_on: {compute capability of driver.TARGETS: how many there}, such as {(7, 5): 1}: shared memory of 64 KB.
    name: what tells this kernel from others that the same factory makes, such as its tile.
    dtypes: what it is for. least: the lowest compute capability, such as (8, 0) where it uses cp.async.
    promises: machine instructions that its code must have, for all dtypes or {dtype's name: instructions}: "FFMA",
        "LDS.128" (also LDS.U.128), "HMMA". tests/gpu_compile.py compiles every kernel for every dtype and architecture
        and looks; tests that launch none of a kernel's forms are named at the end of a test run.
    """
    return lambda function: Kernel(function, threads, blocks, blocks_on or {}, name, dtypes, least, promises)


def device(function) -> Any:
    """A function that kernels call; it becomes part of them, so that it is compiled for what they are compiled for.

    (Numba would compile a function of its own for the device at hand, and there may be none.)
    """
    return cuda.jit(device=True, inline="always")(function)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def engine_of(place):
    """What compiles and starts kernels there."""
    return place.engine
