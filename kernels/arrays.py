"""What counts as an array, the way in (a NumPy view of the caller's memory) and the way back (the caller's kind)."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np


def identity(array):
    return array


def host_view(function: str, name: str, value) -> tuple[np.ndarray, Callable]:
    """A NumPy array over `value`'s memory, and what turns a result into `value`'s kind.

    Accepts NumPy arrays (subclasses lose their class, masked arrays are refused) and CPU torch tensors.

    Raises:
        TypeError: not an array; a masked array; a tensor that requires grad; a sparse or GPU array.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{function}: {name} is a masked array; pass .filled(value) or .data")
    if isinstance(value, np.ndarray):
        return np.asarray(value), identity
    if hasattr(value, "__cuda_array_interface__"):
        raise TypeError(f"{function}: {name} lies on the GPU and others on the host; copy it to the host")
    if type(value).__module__.partition(".")[0] == "torch":
        return _torch_view(function, name, value)
    raise TypeError(f"{function}: {name} must be a NumPy array or a CPU torch tensor, got {type(value).__name__}")


def _torch_view(function: str, name: str, tensor) -> tuple[np.ndarray, Callable]:
    if tensor.device.type != "cpu":
        raise TypeError(f"{function}: {name} is on {tensor.device}, not where the call is computed; use .cpu()")
    if tensor.requires_grad:
        raise TypeError(f"{function}: {name} requires grad, which these kernels do not record; pass {name}.detach()")
    import torch

    if tensor.layout != torch.strided:
        raise TypeError(f"{function}: {name} must be dense, got a tensor of layout {tensor.layout}")
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy(), _to_torch
    dtype = bfloat16()
    if dtype is None:
        raise NotImplementedError(f"{function}: {name} is bfloat16, which needs the package ml_dtypes; use float32")
    return tensor.view(torch.int16).numpy().view(dtype), _to_torch


def _to_torch(array: np.ndarray):
    import torch

    if array.dtype.kind != "V":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def canonical(array: np.ndarray) -> np.ndarray:
    """The array as C-contiguous, aligned and writeable: the one type per dtype that a Numba kernel is compiled for.

    A read-only array is viewed, not copied: kernels write to nothing but their outputs.
    """
    if not (array.flags.c_contiguous and array.flags.aligned):
        return np.array(array, order="C", copy=True)
    if array.flags.writeable:
        return array
    return np.asarray(_WriteableView(array))


class _WriteableView:
    """Hands out the memory of a read-only array under NumPy's array interface, without the read-only flag.

    Numba types a read-only array differently, so passing it on would compile every kernel twice.
    """

    def __init__(self, array: np.ndarray):
        self.array = array  # keeps the memory alive
        interface = array.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def required(function: str, **operands):
    """Refuse None for an operand that is not optional."""
    for name, operand in operands.items():
        if operand is None:
            raise TypeError(f"{function}: {name} must be an array, got None")


FLOATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


@lru_cache(maxsize=1)
def bfloat16() -> np.dtype | None:
    """ml_dtypes' bfloat16, which CuPy has too; None where ml_dtypes is not installed. NumPy alone has none."""
    try:
        import ml_dtypes  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return np.dtype(ml_dtypes.bfloat16)


def is_bfloat16(dtype: np.dtype) -> bool:
    return dtype.name == "bfloat16"


def common_dtype(function: str, operands: dict[str, np.ndarray | None], allowed: tuple = FLOATS) -> np.dtype:
    """The one dtype of the operands that are there.

    It may be bfloat16 everywhere: operation.py refuses that where the backend turns out to lack it.

    Raises:
        TypeError: dtypes differ, or are not among `allowed`.
    """
    present = {name: array.dtype for name, array in operands.items() if array is not None}
    first, dtype = next(iter(present.items()))
    for name, other in present.items():
        if other != dtype:
            raise TypeError(f"{function}: {name} is {other} but {first} is {dtype}; the dtypes must match")
    if dtype in allowed or is_bfloat16(dtype):
        return dtype
    names = ", ".join(str(d) for d in allowed)
    raise TypeError(f"{function}: {first} is {dtype}, which is not supported; use one of {names}")
