"""Arrays of a library on a GPU, as CuPy's are seen from outside; their memory is the emulator's."""

from typing import Any

import numpy as np

from tilewise.kernels.device_arrays import DeviceArray, Place, row_major


class FakeDevice:
    def __init__(self, ordinal):
        self.id = ordinal


class FakeArray:
    """__cuda_array_interface__ over a part of a memory."""

    def __init__(self, memory, shape, dtype, strides=None, offset=0, ordinal=0):
        self.memory, self.shape, self.dtype = memory, tuple(shape), np.dtype(dtype)
        self.strides = row_major(self.shape, self.dtype.itemsize) if strides is None else tuple(strides)
        self.offset, self.device = offset, FakeDevice(ordinal)

    @property
    def __cuda_array_interface__(self):
        plain = self.strides == row_major(self.shape, self.dtype.itemsize)
        return {
            "shape": self.shape, "typestr": self.dtype.str, "data": (self.memory.pointer + self.offset, False),
            "strides": None if plain else self.strides, "version": 3, "stream": None,
        }  # fmt: skip

    def get(self) -> np.ndarray:
        """A copy on the host."""
        return np.ndarray(self.shape, self.dtype, self.memory.bytes, self.offset, self.strides).copy()

    def reshape(self, shape) -> "FakeArray":
        return FakeArray(self.memory, shape, self.dtype, offset=self.offset, ordinal=self.device.id)

    def view(self, like: np.ndarray, base: np.ndarray) -> "FakeArray":
        """The part of this array that `like` is of `base`, which has this one's shape."""
        offset = like.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        return FakeArray(self.memory, like.shape, self.dtype, like.strides, offset, self.device.id)


FakeArray.__module__ = "cupy.fake"


class FakePlace(Place):
    """As CupyPlace: allocates FakeArrays, on a stream of its own."""

    engine: Any = None

    def __init__(self, engine, ordinal):
        self.engine, self.ordinal, self.allocations = engine, ordinal, 0

    def stream(self):
        return 70 + self.ordinal

    def array(self, values: np.ndarray) -> FakeArray:
        memory = self.engine.allocate(values.nbytes)
        self.engine.write(memory, values)
        return FakeArray(memory, values.shape, values.dtype, ordinal=self.ordinal)

    def empty(self, shape, dtype):
        self.allocations += 1
        dtype = np.dtype(dtype)
        array = FakeArray(
            self.engine.allocate(int(np.prod(shape)) * dtype.itemsize), shape, dtype, ordinal=self.ordinal
        )
        return DeviceArray(self, array.memory.pointer, tuple(shape), dtype, array)

    def wrap(self, array):
        return FakeArray(array.owner.memory, array.shape, array.dtype, ordinal=self.ordinal)
