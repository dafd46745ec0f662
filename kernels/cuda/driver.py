"""The GPU: loads kernels and starts them, by CUDA's driver API.

A launch through Numba's dispatcher types and unpacks its arguments anew each time, tens of microseconds; here it is one
call of cuLaunchKernel on a buffer of eight-byte slots. The context is the device's primary one, which CuPy, PyTorch and
Numba use as well, so their memory and streams are ours.
"""

import ctypes
from contextlib import contextmanager, suppress
from functools import lru_cache
from threading import Lock, local
from typing import Any

import numpy as np
from cuda.bindings import driver as cu

from tilewise.kernels.cuda import ptx_cache

# Kernels are compiled for these compute capabilities, which the tests compile too; the driver takes the code of one for
# all later devices.
TARGETS = ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0))


class DriverError(RuntimeError):
    """A call of the driver failed; the message has CUDA's name and text of the error."""


class OutOfMemory(DriverError, MemoryError):
    """The device has not enough memory."""


_HINTS = {
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "the driver is older than the installed CUDA compiler; update it, or install "
    "the extra for its version (cuda12)",
    "CUDA_ERROR_NO_DEVICE": "the driver lists no device",
    "CUDA_ERROR_INVALID_DEVICE": "there is no device of this number",
}


def _checked(result, doing: str = "") -> Any:
    """What a call of the driver returned beside its status; raises where that is an error."""
    status, *values = result
    if status != cu.CUresult.CUDA_SUCCESS:
        _, name = cu.cuGetErrorName(status)
        _, text = cu.cuGetErrorString(status)
        name = name.decode() if name else f"error {int(status)}"
        kind = OutOfMemory if status == cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY else DriverError
        parts = [doing, name, text.decode() if text else "", _HINTS.get(name, "")]
        raise kind(": ".join(part for part in parts if part))
    return values[0] if len(values) == 1 else values


class Memory:
    """Bytes on the device, given back when the last reference goes.

    pooled: in the order of the default stream, without waiting; else when the device has done what it was given.
    """

    def __init__(self, driver: "Driver", nbytes: int, pooled: bool):
        self._driver, self.nbytes, self._pooled = driver, nbytes, pooled
        with driver.current():
            result = driver.allocate_bytes(max(nbytes, 1), pooled)
        self.pointer = int(_checked(result, f"{nbytes} bytes on {driver.name}"))

    def __del__(self):
        if hasattr(self, "pointer"):
            with suppress(Exception):  # at the interpreter's end the driver may be gone, and the memory with it
                self._driver.free(self.pointer, self._pooled)


class _Function:
    """A loaded kernel: its handle, and how much dynamic shared memory it was allowed."""

    __slots__ = ("handle", "module", "shared")

    def __init__(self, module, handle):
        self.module, self.handle, self.shared = module, handle, 48 << 10


class Driver:
    """An engine on one device.

    capability: (major, minor). multiprocessors: how many it has.
    """

    def __init__(self, ordinal: int):
        try:
            status = cu.cuInit(0)
        except Exception as error:  # the binding's own, where it finds no driver
            raise DriverError(f"no NVIDIA driver: {error}") from None
        _checked(status, "the NVIDIA driver did not start")
        self.ordinal = ordinal
        self._device = _checked(cu.cuDeviceGet(ordinal), f"GPU {ordinal}")
        attribute = cu.CUdevice_attribute
        self.capability = (
            self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        )
        self.name = _checked(cu.cuDeviceGetName(256, self._device)).split(b"\0")[0].decode()
        targets = [target for target in TARGETS if target <= self.capability]
        if not targets:
            raise DriverError(f"{self.name} has compute capability {self.capability}, the kernels need {TARGETS[0]}")
        self.target = targets[-1]
        self.multiprocessors = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        self._pools = bool(self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED))
        self._context = _checked(cu.cuDevicePrimaryCtxRetain(self._device), f"GPU {ordinal}")
        self._handle = int(self._context)
        self._functions: dict = {}
        self._lock = Lock()
        self._slots = local()

    def _attribute(self, which) -> int:
        return _checked(cu.cuDeviceGetAttribute(which, self._device))

    @contextmanager
    def current(self):
        """Inside, this thread's calls go to this device; afterwards to whichever they went to before."""
        if self._is_current():
            yield
            return
        _checked(cu.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            _checked(cu.cuCtxPopCurrent())

    def _is_current(self) -> bool:
        return int(_checked(cu.cuCtxGetCurrent())) == self._handle

    def allocate(self, nbytes: int, every_stream: bool = False) -> Memory:
        """every_stream: for kernels in any stream; giving it back waits for them, as cuMemFreeAsync would not."""
        return Memory(self, nbytes, self._pools and not every_stream)

    @staticmethod
    def allocate_bytes(nbytes: int, pooled: bool):
        return cu.cuMemAllocAsync(nbytes, 0) if pooled else cu.cuMemAlloc(nbytes)

    def free(self, pointer: int, pooled: bool):
        with self.current():
            _checked(cu.cuMemFreeAsync(pointer, 0) if pooled else cu.cuMemFree(pointer))

    def write(self, memory: Memory, array: np.ndarray):
        array = np.ascontiguousarray(array)
        with self.current():
            _checked(cu.cuMemcpyHtoD(memory.pointer, array.ctypes.data, array.nbytes), "copy to the GPU")

    def read(self, memory: Memory, array: np.ndarray):
        """Waits for the kernels of the default stream, so that their errors show here."""
        with self.current():
            _checked(cu.cuMemcpyDtoH(array.ctypes.data, memory.pointer, array.nbytes), "copy from the GPU")

    def synchronize(self):
        with self.current():
            _checked(cu.cuCtxSynchronize())

    def _load(self, form) -> _Function:
        """Compiles a form, or takes its PTX from the cache, and loads it; also while a stream is being captured."""
        kernel = form.kernel
        if not kernel.runs_on(self.capability):
            raise DriverError(f"kernel {kernel.name} needs compute capability {kernel.least}, {self.name} has less")
        with self._lock:
            if form not in self._functions:
                text = ptx_cache.ptx(form, self.target)
                relaxed = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
                before = _checked(cu.cuThreadExchangeStreamCaptureMode(relaxed))
                try:
                    module = _checked(cu.cuModuleLoadData(text.encode() + b"\0"), f"kernel {kernel.name}")
                    handle = _checked(cu.cuModuleGetFunction(module, form.entry(text).encode()))
                finally:
                    _checked(cu.cuThreadExchangeStreamCaptureMode(before))
                self._functions[form] = _Function(module, handle)
            return self._functions[form]

    def start(self, form, grid: tuple[int, int, int], shared: int, stream: int, slots: bytearray):
        """Puts a kernel into a stream; see launch.Form for the slots."""
        if not self._is_current():
            with self.current():
                self._start(form, grid, shared, stream, slots)
            return
        self._start(form, grid, shared, stream, slots)

    def _start(self, form, grid, shared, stream, slots):
        function = self._functions.get(form) or self._load(form)
        if shared > function.shared:
            limit = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(cu.cuFuncSetAttribute(function.handle, limit, shared), f"{shared} bytes of shared memory")
            function.shared = shared
        (status,) = cu.cuLaunchKernel(
            function.handle, *grid, form.kernel.threads, 1, 1, shared, stream, self._pointers(slots), 0
        )
        if status != cu.CUresult.CUDA_SUCCESS:
            _checked((status,), f"kernel {form.kernel.name}, grid {grid}, {shared} bytes of shared memory")

    def _pointers(self, slots: bytearray) -> int:
        """The address of a table of addresses, one for each slot; the same buffer of a thread has the same table."""
        tables = self._slots.__dict__
        table = tables.get(id(slots))
        if table is None:
            first = ctypes.addressof((ctypes.c_char * len(slots)).from_buffer(slots))
            table = tables[id(slots)] = (ctypes.c_uint64 * (len(slots) // 8))(*range(first, first + len(slots), 8))
            tables[f"keep {id(slots)}"] = slots
        return ctypes.addressof(table)


@lru_cache(maxsize=16)
def engine(ordinal: int = 0) -> Driver:
    return Driver(ordinal)
