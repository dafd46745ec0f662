"""The GPU: loads kernels and starts them, by CUDA's driver API.

A launch through Numba's dispatcher types and unpacks its arguments anew each time, tens of microseconds; here it is one
call of cuLaunchKernel on a buffer of eight-byte slots. The context is the device's primary one, which CuPy, PyTorch and
Numba use as well, so their memory and streams are ours.
"""

import ctypes
from functools import lru_cache
from threading import Lock, local

import numpy as np
from cuda.bindings import driver as cu


class DriverError(RuntimeError):
    """A call of the driver failed; the message has CUDA's name and text of the error."""


class OutOfMemory(DriverError, MemoryError):
    """The device has not enough memory."""


def _checked(result):
    status, *values = result
    if status != cu.CUresult.CUDA_SUCCESS:
        _, name = cu.cuGetErrorName(status)
        _, text = cu.cuGetErrorString(status)
        kind = OutOfMemory if status == cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY else DriverError
        raise kind(f"{name.decode()}: {text.decode()}")
    return values[0] if len(values) == 1 else values


class Memory:
    """Bytes on the device, given back when the last reference goes."""

    def __init__(self, driver: "Driver", nbytes: int):
        self._driver, self.nbytes = driver, nbytes
        driver.make_current()
        self.pointer = int(_checked(cu.cuMemAllocAsync(max(nbytes, 1), 0)))

    def __del__(self):
        if hasattr(self, "pointer"):
            self._driver.make_current()
            cu.cuMemFreeAsync(self.pointer, 0)


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
        _checked(cu.cuInit(0))
        self.ordinal = ordinal
        self._device = _checked(cu.cuDeviceGet(ordinal))
        self._context = _checked(cu.cuDevicePrimaryCtxRetain(self._device))
        attribute = cu.CUdevice_attribute
        self.capability = (
            self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        )
        self.multiprocessors = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        self.name = _checked(cu.cuDeviceGetName(256, self._device)).rstrip(b"\0").decode()
        self._functions: dict = {}
        self._lock = Lock()
        self._slots = local()

    def _attribute(self, which) -> int:
        return _checked(cu.cuDeviceGetAttribute(which, self._device))

    def make_current(self):
        """This thread's calls go to this device."""
        if int(_checked(cu.cuCtxGetCurrent())) != int(self._context):
            _checked(cu.cuCtxSetCurrent(self._context))

    def allocate(self, nbytes: int) -> Memory:
        return Memory(self, nbytes)

    def write(self, memory: Memory, array: np.ndarray):
        array = np.ascontiguousarray(array)
        self.make_current()
        _checked(cu.cuMemcpyHtoD(memory.pointer, array.ctypes.data, array.nbytes))

    def read(self, memory: Memory, array: np.ndarray):
        self.make_current()
        _checked(cu.cuMemcpyDtoH(array.ctypes.data, memory.pointer, array.nbytes))

    def synchronize(self):
        self.make_current()
        _checked(cu.cuCtxSynchronize())

    def _load(self, form) -> _Function:
        with self._lock:
            if form not in self._functions:
                text = form.ptx(self.capability)
                module = _checked(cu.cuModuleLoadData(text.encode() + b"\0"))
                handle = _checked(cu.cuModuleGetFunction(module, form.entry(text).encode()))
                self._functions[form] = _Function(module, handle)
            return self._functions[form]

    def start(self, form, grid: tuple[int, int, int], shared: int, stream: int, slots: bytearray):
        """Puts a kernel into a stream; see launch.Form for the slots."""
        self.make_current()
        function = self._functions.get(form) or self._load(form)
        if shared > function.shared:
            limit = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(cu.cuFuncSetAttribute(function.handle, limit, shared))
            function.shared = shared
        status = cu.cuLaunchKernel(
            function.handle, *grid, form.kernel.threads, 1, 1, shared, stream, self._pointers(slots), 0
        )
        if status[0] != cu.CUresult.CUDA_SUCCESS:
            _checked(status)

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
