"""Padding inside @njit, and its gradient: both native, both by rows."""

import numpy as np
from numba.core import types
from numba.core.errors import TypingError
from numba.cpython.unsafe.tuple import tuple_setitem

from tilewise.kernels.cpu.jit import device
from tilewise.kernels.cpu.padding import _MODES, CHUNK, CIRCULAR, REFLECT, REPLICATE
from tilewise.kernels.njit.arguments import (
    WrongShape,
    as_padding,
    check_arrays,
    check_number,
    check_padding,
    literal,
)
from tilewise.kernels.njit.linking import call_kernel, contiguous, shaped


@device()
def _most(mode, n, amount):
    """The largest padding beside n pixels."""
    if mode == REFLECT:
        return max(n - 1, 0)
    if mode == CIRCULAR:
        return n
    if mode == REPLICATE and n == 0:
        return 0
    return amount


@device()
def _leading(shape):
    """The product of all axes but the last two."""
    count = 1
    for i in range(len(shape) - 2):
        count *= shape[i]
    return count


def _checked(name: str, mode: str):
    """A device function (shape, padding) -> the padded shape."""
    code = _MODES[mode]
    negative = f"{name}: padding must be at least 0, got {{}}"
    message = f"{name}: {mode} padding of {{}} needs a larger image than {{}}"

    @device(raises=True)
    def padded_shape(shape, pairs):
        rank = len(shape)
        for i in range(2):
            low, high = pairs[i]
            if low < 0 or high < 0:
                raise WrongShape(negative, min(low, high))
            n = shape[rank - 2 + i]
            if max(low, high) > _most(code, n, max(low, high)):
                raise WrongShape(message, max(low, high), shape)
            shape = tuple_setitem(shape, rank - 2 + i, n + low + high)
        return shape

    return padded_shape


def _check(name: str, kind, padding, mode) -> str:
    mode = literal(name, "mode", mode, *_MODES)
    check_padding(name, padding)
    if kind.ndim < 2:
        raise TypingError(f"{name}: x must have at least 2 dimensions (..., H, W), got {kind.ndim}")
    return mode


def pad(x, padding, mode="constant", value=0):
    check_arrays("pad", x=x)
    check_number("pad", value=value)
    mode = _check("pad", x, padding, mode)
    padded_shape, code = _checked("pad", mode), _MODES[mode]

    def implementation(x, padding, mode="constant", value=0):
        pairs = as_padding(padding)
        shape = padded_shape(x.shape, pairs)
        source, y = contiguous(x), np.empty(shape, x.dtype)
        height, width = shape[x.ndim - 2], shape[x.ndim - 1]
        if y.size > 0:
            planes = _leading(shape)
            flat = shaped(source, (planes, x.shape[x.ndim - 2], x.shape[x.ndim - 1]))
            padded = shaped(y, (planes, height, width))
            band = min(height, CHUNK // width + 1)
            call_kernel(
                "cpu.padding._pad", (flat, padded, band, pairs[0][0], pairs[1][0], code, x.dtype.type(value))
            )  # fmt: skip
        return y

    return implementation


def pad_backward(grad, input_shape, padding, mode="constant"):
    check_arrays("pad_backward", grad=grad)
    mode = _check("pad_backward", grad, padding, mode)
    if not isinstance(input_shape, types.UniTuple) or len(input_shape) != grad.ndim:
        raise TypingError(f"pad_backward: input_shape must be a tuple of {grad.ndim} ints, got {input_shape}")
    padded_shape, code = _checked("pad_backward", mode), _MODES[mode]

    def implementation(grad, input_shape, padding, mode="constant"):
        pairs = as_padding(padding)
        expected = padded_shape(input_shape, pairs)
        if grad.shape != expected:
            raise WrongShape(
                "pad_backward: grad must have shape {} for input_shape {}, got {}", expected, input_shape, grad.shape
            )
        source, result = contiguous(grad), np.empty(input_shape, grad.dtype)
        h, w = input_shape[grad.ndim - 2], input_shape[grad.ndim - 1]
        if result.size > 0:
            planes = _leading(input_shape)
            flat = shaped(source, (planes, grad.shape[grad.ndim - 2], grad.shape[grad.ndim - 1]))
            gathered = shaped(result, (planes, h, w))
            call_kernel("cpu.padding._gather", (flat, gathered, min(h, CHUNK // w + 1), pairs[0][0], pairs[1][0], code))
        return result

    return implementation
