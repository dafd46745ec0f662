"""The GPU, through CuPy: loads kernels, starts them on the stream at hand, and keeps memory for host arrays.

A launch is one call of cuLaunchKernel on a table of addresses, past CuPy's own packing of arguments, which looks at the
type of each. Contexts, streams and the pool of memory are CuPy's.
"""

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np

from tilewise.kernels import machine
from tilewise.kernels.cupy import module

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_FOR_ALL = 48 << 10  # bytes that a kernel may have without being allowed more


class DriverError(RuntimeError):
    """There is no CuPy, or it finds no usable GPU; the message tells."""


def _cupy() -> Any:
    try:
        import cupy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DriverError(f"CuPy cannot be imported (extra: cuda13 or cuda12): {error}") from error
    return cupy


@contextmanager
def _while_capturing() -> Iterator[None]:
    """Inside, this thread may load code also while a stream is being captured into a graph; CuPy has no word for it."""
    exchange = machine.driver_library().cuThreadExchangeStreamCaptureMode
    mode = ctypes.c_int(_RELAXED)
    exchange(ctypes.byref(mode))  # and gets what it was
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


class Memory:
    """Bytes on the device; CuPy's pool gets them back when the last reference goes."""

    def __init__(self, owner, nbytes: int):
        self.owner, self.nbytes, self.pointer = owner, nbytes, owner.ptr


class MemoryOfEveryStream(Memory):
    """For kernels in any stream; CuPy's pool knows of one: the device is waited for before the pool gets it back."""

    def __init__(self, owner, nbytes: int, device):
        super().__init__(owner, nbytes)
        self._device = device

    def __del__(self):
        with suppress(Exception):  # at the interpreter's end the driver may be gone, and the memory with it
            self._device.synchronize()


class Driver:
    """An engine on one device. capability: (major, minor). multiprocessors: how many it has."""

    def __init__(self, ordinal: int):
        cupy = self._cupy = _cupy()
        self.ordinal = ordinal
        try:
            device = self._device = cupy.cuda.Device(ordinal)
            digits = device.compute_capability  # "90", "120"
            about = cupy.cuda.runtime.getDeviceProperties(ordinal)
        except Exception as error:  # CuPy's own, by kind of fault
            raise DriverError(f"GPU {ordinal}: {error}") from error
        self.capability = int(digits[:-1]), int(digits[-1])
        self.name, self.multiprocessors = about["name"].decode(), about["multiProcessorCount"]
        self.target = module.architecture_for(self.capability)
        self._launch, self._current = cupy.cuda.driver.launchKernel, cupy.cuda.runtime.getDevice
        self._functions: dict = {}
        self._lock = Lock()

    def current(self) -> AbstractContextManager:
        """Inside, this thread's calls go to this device; afterwards to whichever they went to before."""
        return nullcontext() if self._current() == self.ordinal else self._device

    def allocate(self, nbytes: int, every_stream: bool = False) -> Memory:
        """every_stream: for kernels in any stream; giving it back waits for them. Else it is for the default stream,
        whichever is CuPy's current one: a pool hands out what kernels of the same stream may still use."""
        with self.current(), self._cupy.cuda.Stream.null:
            owner = self._cupy.cuda.alloc(max(nbytes, 1))
        return MemoryOfEveryStream(owner, nbytes, self._device) if every_stream else Memory(owner, nbytes)

    def write(self, memory: Memory, array: np.ndarray):
        array = np.ascontiguousarray(array)
        with self.current():
            memory.owner.copy_from_host(array.ctypes.data, array.nbytes)

    def read(self, memory: Memory, array: np.ndarray):
        """Waits for the kernels of the default stream, so that their errors show here."""
        with self.current():
            memory.owner.copy_to_host(array.ctypes.data, array.nbytes)

    def synchronize(self):
        self._device.synchronize()

    def _load(self, form):
        """Compiles a form, or takes its machine code from the cache, and loads it."""
        kernel = form.kernel
        if not kernel.runs_on(self.capability):
            wanted = kernel.target or f"compute capability {kernel.least}"
            raise DriverError(f"kernel {kernel.name} needs {wanted}, {self.name} has {self.capability}")
        with self._lock:
            if form not in self._functions:
                code = module.code(kernel.source, form.expression, kernel.target or self.target)
                loaded = self._cupy.cuda.function.Module()
                with self.current(), _while_capturing():
                    loaded.load(code.binary)
                    function = loaded.get_function(code.entry)
                    if kernel.shared > _SHARED_FOR_ALL:
                        self._cupy.cuda.driver.funcSetAttribute(function.ptr, _DYNAMIC_SHARED, kernel.shared)
                    self._functions[form] = function
            return self._functions[form]

    def start(self, form, grid: tuple[int, int, int], shared: int, stream: int, slots):
        """Puts a kernel into a stream; see launch.Form for the slots. shared: bytes of dynamic shared memory."""
        function = self._functions.get(form) or self._load(form)
        with self.current():
            self._launch(function.ptr, *grid, form.kernel.threads, 1, 1, shared, stream, slots.table, 0)


@lru_cache(maxsize=16)
def engine(ordinal: int = 0) -> Driver:
    return Driver(ordinal)
