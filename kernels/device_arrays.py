"""Arrays on a GPU: whose they are, where they lie, and how results become arrays of the same kind.

A backend for GPUs works on `DeviceArray`s alone, a pointer with a shape and a dtype. Each belongs to a `Place`: a
library that owns memory on one device (CuPy, PyTorch, Numba), or the host, whose arrays are copied there and back. It
allocates results, knows the current stream, and wraps results into its library's arrays, without a copy.
"""

from functools import lru_cache
from importlib import import_module
from math import prod
from typing import Any

import numpy as np

from tilewise.kernels.arrays import bfloat16


class DeviceArray:
    """shape, dtype and strides (bytes) of memory on a device; `owner` keeps it alive."""

    __slots__ = ("_strides", "dtype", "owner", "place", "pointer", "shape")

    def __init__(self, place, pointer: int, shape: tuple[int, ...], dtype: np.dtype, owner, strides=None):
        """strides: None for row-major order, which then is not worked out: a call makes many of these."""
        self.place, self.pointer, self.shape, self.dtype, self.owner = place, pointer, shape, dtype, owner
        self._strides = strides

    @property
    def strides(self) -> tuple[int, ...]:
        return row_major(self.shape, self.dtype.itemsize) if self._strides is None else self._strides

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether it lies in row-major order; axes of one element may have any stride."""
        if self._strides is None:
            return True
        expected = row_major(self.shape, self.dtype.itemsize)
        return self.size == 0 or all(
            n == 1 or s == e for n, s, e in zip(self.shape, self._strides, expected, strict=True)
        )

    def reshape(self, *shape: int) -> "DeviceArray":
        """The same memory; only for contiguous arrays."""
        return DeviceArray(self.place, self.pointer, shape, self.dtype, self.owner)

    def extent(self) -> tuple[int, int]:
        """First byte and the one after the last that the elements take."""
        if self.size == 0:
            return self.pointer, self.pointer
        reach = [s * (n - 1) for n, s in zip(self.shape, self.strides, strict=True)]
        low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
        return self.pointer + low, self.pointer + high + self.dtype.itemsize


def row_major(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides, step = [], itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def overlap(a: DeviceArray, b: DeviceArray) -> bool:
    """Whether the spans of memory meet, which is necessary for the arrays to overlap."""
    (first, last), (begin, end) = a.extent(), b.extent()
    return first < end and begin < last


class Place:
    """Memory of one library on the device `ordinal`."""

    ordinal = 0

    @property
    def engine(self) -> Any:
        """What compiles and starts numba.cuda's kernels there; kernels/cupy asks for its own by the ordinal."""
        return engine_at("cuda", self.ordinal)

    def stream(self) -> int:
        """The stream that the library's next work goes to, as the driver's handle."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype) -> DeviceArray:
        raise NotImplementedError

    def wrap(self, array: DeviceArray):
        """The library's own array over this memory."""
        raise NotImplementedError

    # What device_replay.py wants to know; a place where nothing is recorded does nothing about it.

    def started(self, engine, form, grid: tuple[int, int, int], shared: int, arguments: tuple):
        """A kernel was started with these arguments."""

    def lasting(self, array: DeviceArray) -> DeviceArray:
        """An array over memory that is the same in all calls."""
        return array

    def made_lasting(self):
        """Such memory was filled, which later calls do not do again."""


def engine_at(backend: str, ordinal: int) -> Any:
    """A backend's engine on a device."""
    return _driver_module(backend).engine(ordinal)


@lru_cache(maxsize=4)  # several times a launch
def _driver_module(backend: str) -> Any:
    return import_module(f"tilewise.kernels.{backend}.driver")


class HostPlace(Place):
    """A device that host arrays are copied to, for one call. engine: a backend's, which keeps the memory."""

    engine: Any = None

    def __init__(self, engine):
        self.engine = engine

    def stream(self) -> int:
        return 0

    def empty(self, shape, dtype):
        dtype = np.dtype(dtype)
        memory = self.engine.allocate(prod(shape) * dtype.itemsize)
        return DeviceArray(self, memory.pointer, tuple(shape), dtype, memory)

    def copy_in(self, array: np.ndarray) -> DeviceArray:
        result = self.empty(array.shape, array.dtype)
        if array.size:
            self.engine.write(result.owner, array)
        return result

    def copy_out(self, array: DeviceArray, out: np.ndarray | None = None) -> np.ndarray:
        result = np.empty(array.shape, array.dtype) if out is None or not out.flags.c_contiguous else out
        if array.size:
            self.engine.read(array.owner, result)
        if out is not None and result is not out:
            out[...] = result
        return result if out is None else out

    wrap = copy_out


class CupyPlace(Place):
    def __init__(self, ordinal: int):
        import cupy  # pyright: ignore[reportMissingImports]

        self.ordinal, self._cupy = ordinal, cupy

    def stream(self):
        return self._cupy.cuda.get_current_stream(self.ordinal).ptr

    def empty(self, shape, dtype):
        with self._cupy.cuda.Device(self.ordinal):
            array = self._cupy.empty(shape, dtype)
        return DeviceArray(self, array.data.ptr, tuple(shape), np.dtype(dtype), array)

    def wrap(self, array):
        return array.owner if array.owner.shape == array.shape else array.owner.reshape(array.shape)


class TorchPlace(Place):
    def __init__(self, ordinal: int):
        import torch

        self.ordinal, self._torch, self.device = ordinal, torch, torch.device("cuda", ordinal)

    def stream(self):
        return self._torch.cuda.current_stream(self.device).cuda_stream

    def empty(self, shape, dtype):
        dtype = np.dtype(dtype)
        tensor = self._torch.empty(tuple(shape), dtype=getattr(self._torch, dtype.name), device=self.device)
        return DeviceArray(self, tensor.data_ptr(), tuple(shape), dtype, tensor)

    def wrap(self, array):
        return array.owner.reshape(array.shape)


class NumbaPlace(Place):
    def __init__(self, ordinal: int):
        from numba import cuda

        self.ordinal, self._cuda = ordinal, cuda

    def stream(self):
        return 0  # Numba has no current stream: its arrays are used on the default one

    def empty(self, shape, dtype):
        with self._cuda.gpus[self.ordinal]:
            array = self._cuda.device_array(tuple(shape), dtype)
        return DeviceArray(self, array.device_ctypes_pointer.value or 0, tuple(shape), np.dtype(dtype), array)

    def wrap(self, array):
        return array.owner if array.owner.shape == array.shape else array.owner.reshape(array.shape)


@lru_cache(maxsize=64)
def place_of(library: str, ordinal: int) -> Place:
    return {"cupy": CupyPlace, "torch": TorchPlace, "numba": NumbaPlace}[library](ordinal)


def host_place(backend: str = "cuda") -> HostPlace:
    """The device that host arrays are sent to for a backend."""
    return HostPlace(engine_at(backend, 0))


def is_on_device(value) -> bool:
    """Whether `value` is an array of a library that tilewise knows, on a CUDA device."""
    if type(value).__module__.partition(".")[0] == "torch":
        return value.device.type == "cuda"
    return hasattr(value, "__cuda_array_interface__") or isinstance(value, DeviceArray)


def on_host(value):
    """A copy of a GPU's array in the host's memory; what lies there already as it is."""
    if not is_on_device(value):
        return value
    for method in ("get", "cpu", "copy_to_host"):  # CuPy's, PyTorch's, Numba's
        if hasattr(value, method):
            return getattr(value, method)()
    return value  # of no library that tilewise knows


def device_view(function: str, name: str, value) -> DeviceArray:
    """A view of a CUDA array's memory; nothing is copied.

    Raises:
        TypeError: a tensor that requires grad or is sparse; an array of a library that tilewise does not know.
    """
    if isinstance(value, DeviceArray):
        return value
    library = type(value).__module__.partition(".")[0]
    if library == "torch":
        return _torch_view(function, name, value)
    described = value.__cuda_array_interface__
    if described.get("mask") is not None:
        raise TypeError(f"{function}: {name} is masked, which the kernels do not know")
    if library == "cupy":
        place = place_of("cupy", value.device.id)
    elif library in ("numba", "numba_cuda"):
        place = place_of("numba", 0 if value.gpu_data is None else value.gpu_data.context.device.id)
    else:
        raise TypeError(f"{function}: {name} is a {type(value).__name__}; use CuPy, Numba or PyTorch arrays on the GPU")
    dtype = np.dtype(described["typestr"])
    if dtype.kind == "V":  # of bfloat16 the interface tells the size alone
        dtype = np.dtype(value.dtype)
    return DeviceArray(
        place, described["data"][0] or 0, tuple(described["shape"]), dtype, value, described.get("strides")
    )


def _torch_view(function, name, tensor):
    import torch

    if tensor.requires_grad:
        raise TypeError(f"{function}: {name} requires grad, which these kernels do not record; pass {name}.detach()")
    if tensor.layout != torch.strided:
        raise TypeError(f"{function}: {name} must be dense, got a tensor of layout {tensor.layout}")
    dtype = bfloat16() if tensor.dtype == torch.bfloat16 else np.dtype(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise NotImplementedError(f"{function}: {name} is bfloat16, which needs the package ml_dtypes")
    strides = tuple(s * dtype.itemsize for s in tensor.stride())
    place = place_of("torch", tensor.device.index)
    return DeviceArray(place, tensor.data_ptr(), tuple(tensor.shape), dtype, tensor, strides)
