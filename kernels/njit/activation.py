"""Activations, softmax and their gradients inside @njit: all of them native."""

import math

import numpy as np
from numba.core.errors import TypingError

from tilewise.kernels.cpu import activation as cpu
from tilewise.kernels.cpu.jit import device
from tilewise.kernels.njit.arguments import WrongShape, check_arrays, check_integer, check_number
from tilewise.kernels.njit.linking import call_kernel, contiguous, shaped


def _forward(name: str, code: int):
    def typed(x):
        check_arrays(name, x=x)

        def implementation(x):
            source, y = contiguous(x), np.empty(x.shape, x.dtype)
            operands = shaped(source, (x.size,)), shaped(y, (x.size,))
            call_kernel("cpu.activation._forward_kernel", (*operands, code, 0.0, 0))
            return y

        return implementation

    return typed


def _backward(name: str, code: int):
    message = f"{name}: grad and y must have the same shape, got {{}} and {{}}"

    def typed(grad, y):
        _check_same_rank(name, grad, y)

        def implementation(grad, y):
            if grad.shape != y.shape:
                raise WrongShape(message, grad.shape, y.shape)
            slopes, values, result = contiguous(grad), contiguous(y), np.empty(y.shape, y.dtype)
            operands = shaped(slopes, (y.size,)), shaped(values, (y.size,)), shaped(result, (y.size,))
            call_kernel("cpu.activation._backward_kernel", (*operands, code, 0.0, 0))
            return result

        return implementation

    return typed


def _check_same_rank(name: str, grad, y):
    check_arrays(name, grad=grad, y=y)
    if grad.ndim != y.ndim:
        raise TypingError(f"{name}: grad and y must have the same shape, got {grad.ndim} and {y.ndim} dimensions")


relu, relu_backward = _forward("relu", cpu.RELU), _backward("relu_backward", cpu.RELU)
sigmoid, sigmoid_backward = _forward("sigmoid", cpu.SIGMOID), _backward("sigmoid_backward", cpu.SIGMOID)
tanh, tanh_backward = _forward("tanh", cpu.TANH), _backward("tanh_backward", cpu.TANH)
step, sign = _forward("step", cpu.STEP), _forward("sign", cpu.SIGN)
_LEAKY_RELU = cpu.LEAKY_RELU


def leaky_relu(x, negative_slope=0.01):
    check_arrays("leaky_relu", x=x)
    check_number("leaky_relu", negative_slope=negative_slope)

    def implementation(x, negative_slope=0.01):
        slope = float(negative_slope)
        if not math.isfinite(slope):
            raise WrongShape("leaky_relu: negative_slope must be finite, got {}", slope)
        source, y = contiguous(x), np.empty(x.shape, x.dtype)
        operands = shaped(source, (x.size,)), shaped(y, (x.size,))
        call_kernel("cpu.activation._forward_kernel", (*operands, _LEAKY_RELU, slope, 0))
        return y

    return implementation


def leaky_relu_backward(grad, y, negative_slope=0.01):
    _check_same_rank("leaky_relu_backward", grad, y)
    check_number("leaky_relu_backward", negative_slope=negative_slope)

    def implementation(grad, y, negative_slope=0.01):
        slope = float(negative_slope)
        if grad.shape != y.shape:
            raise WrongShape(
                "leaky_relu_backward: grad and y must have the same shape, got {} and {}", grad.shape, y.shape
            )
        if not math.isfinite(slope) or slope < 0:
            raise WrongShape("leaky_relu_backward: negative_slope must be finite and not negative, got {}", slope)
        slopes, values, result = contiguous(grad), contiguous(y), np.empty(y.shape, y.dtype)
        operands = shaped(slopes, (y.size,)), shaped(values, (y.size,)), shaped(result, (y.size,))
        call_kernel("cpu.activation._backward_kernel", (*operands, _LEAKY_RELU, slope, 0))
        return result

    return implementation


@device()
def _lines(shape, axis):
    """(elements along the axis, counted from the front, and their distance)."""
    inner = 1
    for i in range(axis + 1, len(shape)):
        inner *= shape[i]
    return shape[axis], inner


def _softmax(name: str, log: bool):
    message = f"{name}: axis {{}} is out of range for an array of {{}} dimensions"

    def typed(x, axis=-1):
        check_arrays(name, x=x)
        check_integer(name, axis=axis)

        def implementation(x, axis=-1):
            along = np.int64(axis)
            if along < -x.ndim or along >= x.ndim:
                raise WrongShape(message, along, x.ndim)
            along = along % x.ndim
            source, y = contiguous(x), np.empty(x.shape, x.dtype)
            n, inner = _lines(x.shape, along)
            operands = shaped(source, (x.size,)), shaped(y, (x.size,))
            if x.size == 0:
                return y
            if along == x.ndim - 1:
                call_kernel("cpu.activation_softmax.softmax_rows", (*operands, n, log))
            else:
                call_kernel("cpu.activation_softmax.softmax_columns", (*operands, n, inner, log))
            return y

        return implementation

    return typed


def _softmax_backward(name: str, log: bool):
    message = f"{name}: axis {{}} is out of range for an array of {{}} dimensions"
    unequal = f"{name}: grad and y must have the same shape, got {{}} and {{}}"

    def typed(grad, y, axis=-1):
        _check_same_rank(name, grad, y)
        check_integer(name, axis=axis)

        def implementation(grad, y, axis=-1):
            along = np.int64(axis)
            if grad.shape != y.shape:
                raise WrongShape(unequal, grad.shape, y.shape)
            if along < -y.ndim or along >= y.ndim:
                raise WrongShape(message, along, y.ndim)
            along = along % y.ndim
            slopes, values, result = contiguous(grad), contiguous(y), np.empty(y.shape, y.dtype)
            n, inner = _lines(y.shape, along)
            operands = shaped(slopes, (y.size,)), shaped(values, (y.size,)), shaped(result, (y.size,))
            if y.size == 0:
                return result
            if along == y.ndim - 1:
                call_kernel("cpu.activation_softmax.softmax_backward_rows", (*operands, n, log))
            else:
                call_kernel("cpu.activation_softmax.softmax_backward_columns", (*operands, n, inner, log))
            return result

        return implementation

    return typed


softmax, log_softmax = _softmax("softmax", False), _softmax("log_softmax", True)
softmax_backward = _softmax_backward("softmax_backward", False)
log_softmax_backward = _softmax_backward("log_softmax_backward", True)
