"""Activations and their gradients in Numba.

The elementwise ones are one pass at copy speed (activation_vector.py); sigmoid and tanh owe that to the exp of
epilogue.py. For softmax see activation_softmax.py.
"""

import math

import numpy as np
from numba import prange

from tilewise.kernels.cpu import epilogue, recycling
from tilewise.kernels.cpu.activation_softmax import (
    softmax_backward_columns,
    softmax_backward_rows,
    softmax_columns,
    softmax_rows,
)
from tilewise.kernels.cpu.activation_vector import (
    LEAKY_RELU,
    RELU,
    SIGMOID,
    SIGN,
    STEP,
    TANH,
    backward_run,
    forward_run,
)
from tilewise.kernels.cpu.caches import memory_from
from tilewise.kernels.cpu.epilogue import prefer_widest_vectors
from tilewise.kernels.cpu.jit import AS_WRITTEN, device, kernel
from tilewise.kernels.cpu.scratch import large
from tilewise.kernels.cpu.simd import address, settle_stores

# Elements in one unit of parallel work: 64 kB of float32, a few microseconds, so that a launch is worth it; whole
# vectors, so that every chunk of an aligned result is aligned.
CHUNK = 16384
# Serial nanoseconds for one element, measured roughly; they only decide between serial and parallel.
_NANOSECONDS = {RELU: 0.25, LEAKY_RELU: 0.25, SIGMOID: 0.5, TANH: 0.5, STEP: 0.25, SIGN: 0.25}
_SOFTMAX_NANOSECONDS = 2.0


@device()
def _forward_exponential(x, y, code):
    prefer_widest_vectors()
    if code == SIGMOID:
        for i in range(x.size):
            y[i] = epilogue.sigmoid(x[i])
    else:
        for i in range(x.size):
            y[i] = epilogue.tanh(x[i])


@kernel(fastmath=AS_WRITTEN)
def _forward_kernel(x, y, code, slope, past):
    for chunk in prange((x.size + CHUNK - 1) // CHUNK):
        start = np.int64(chunk) * CHUNK
        count = min(CHUNK, x.size - start)
        if code in (SIGMOID, TANH):
            _forward_exponential(x[start : start + count], y[start : start + count], code)
        else:
            streamed = past if count == CHUNK else 0
            forward_run(address(x, start), address(y, start), count, code, x.dtype.type(slope), streamed)
            if streamed:
                settle_stores()


@kernel(fastmath=AS_WRITTEN)
def _backward_kernel(grad, y, result, code, slope, past):
    for chunk in prange((y.size + CHUNK - 1) // CHUNK):
        start = np.int64(chunk) * CHUNK
        count = min(CHUNK, y.size - start)
        streamed = past if count == CHUNK else 0
        backward_run(
            address(grad, start), address(y, start), address(result, start), count, code, y.dtype.type(slope), streamed
        )
        if streamed:
            settle_stores()


def _result(shape, dtype, streamed):
    """(a large result, whether to write it past the caches). Of fresh pages they hold what the system has cleared."""
    result, used = large(shape, dtype)
    return result, int(used and streamed)


def _size(shape, dtype) -> tuple[bool, bool]:
    """Is a result large, and so large that no cache holds it?"""
    size = math.prod(shape) * dtype.itemsize
    return size >= recycling.FROM, size >= memory_from()


def _prepare_forward(code: int):
    """`prepare_` for an activation: what follows from the shape is worked out once, and a call does little else."""

    def prepare(shapes, dtype, *, negative_slope=0.0):
        (shape,) = shapes
        like = np.empty(0, dtype)
        kernel = _forward_kernel.bound(math.prod(shape) * _NANOSECONDS[code], like, like, code, negative_slope, 0)
        is_large, streamed = _size(shape, dtype)

        def run(x):
            y, past = _result(shape, dtype, streamed) if is_large else (np.empty(shape, dtype), 0)
            kernel(x.ravel(), y.ravel(), code, negative_slope, past)
            return y

        return run

    return prepare


def _prepare_backward(code: int):
    def prepare(shapes, dtype, *, negative_slope=0.0):
        shape = shapes[1]
        like = np.empty(0, dtype)
        kernel = _backward_kernel.bound(math.prod(shape) * 0.3, like, like, like, code, negative_slope, 0)
        is_large, streamed = _size(shape, dtype)

        def run(grad, y):
            result, past = _result(shape, dtype, streamed) if is_large else (np.empty(shape, dtype), 0)
            kernel(grad.ravel(), y.ravel(), result.ravel(), code, negative_slope, past)
            return result

        return run

    return prepare


prepare_relu, prepare_relu_backward = _prepare_forward(RELU), _prepare_backward(RELU)
prepare_leaky_relu, prepare_leaky_relu_backward = _prepare_forward(LEAKY_RELU), _prepare_backward(LEAKY_RELU)
prepare_sigmoid, prepare_sigmoid_backward = _prepare_forward(SIGMOID), _prepare_backward(SIGMOID)
prepare_tanh, prepare_tanh_backward = _prepare_forward(TANH), _prepare_backward(TANH)
prepare_step, prepare_sign = _prepare_forward(STEP), _prepare_forward(SIGN)


def relu(x):
    return prepare_relu((x.shape,), x.dtype)(x)


def relu_backward(grad, y):
    return prepare_relu_backward((grad.shape, y.shape), y.dtype)(grad, y)


def leaky_relu(x, *, negative_slope):
    return prepare_leaky_relu((x.shape,), x.dtype, negative_slope=negative_slope)(x)


def leaky_relu_backward(grad, y, *, negative_slope):
    return prepare_leaky_relu_backward((grad.shape, y.shape), y.dtype, negative_slope=negative_slope)(grad, y)


def sigmoid(x):
    return prepare_sigmoid((x.shape,), x.dtype)(x)


def sigmoid_backward(grad, y):
    return prepare_sigmoid_backward((grad.shape, y.shape), y.dtype)(grad, y)


def tanh(x):
    return prepare_tanh((x.shape,), x.dtype)(x)


def tanh_backward(grad, y):
    return prepare_tanh_backward((grad.shape, y.shape), y.dtype)(grad, y)


def step(x):
    return prepare_step((x.shape,), x.dtype)(x)


def sign(x):
    return prepare_sign((x.shape,), x.dtype)(x)


def _prepare_softmax(rows, columns, log: bool):
    """`prepare_` for softmax (log: log_softmax) or its gradient: rows where the axis is the last, columns elsewhere."""

    def prepare(shapes, dtype, *, axis):
        shape = shapes[0]
        if math.prod(shape) == 0:
            return lambda *operands: np.empty(shape, dtype)
        inner = math.prod(shape[axis + 1 :])
        last = axis == len(shape) - 1
        lines = (shape[axis], log) if last else (shape[axis], inner, log)
        arrays = [np.empty(0, dtype)] * (len(shapes) + 1)
        kernel = (rows if last else columns).bound(math.prod(shape) * _SOFTMAX_NANOSECONDS, *arrays, *lines)

        def run(x):
            y = np.empty(shape, dtype)
            kernel(x.ravel(), y.ravel(), *lines)
            return y

        def run_backward(grad, y):
            result = np.empty(shape, dtype)
            kernel(grad.ravel(), y.ravel(), result.ravel(), *lines)
            return result

        return run if len(shapes) == 1 else run_backward

    return prepare


prepare_softmax = _prepare_softmax(softmax_rows, softmax_columns, False)
prepare_log_softmax = _prepare_softmax(softmax_rows, softmax_columns, True)
prepare_softmax_backward = _prepare_softmax(softmax_backward_rows, softmax_backward_columns, False)
prepare_log_softmax_backward = _prepare_softmax(softmax_backward_rows, softmax_backward_columns, True)


def softmax(x, *, axis):
    return prepare_softmax((x.shape,), x.dtype, axis=axis)(x)


def softmax_backward(grad, y, *, axis):
    return prepare_softmax_backward((grad.shape, y.shape), y.dtype, axis=axis)(grad, y)


def log_softmax(x, *, axis):
    return prepare_log_softmax((x.shape,), x.dtype, axis=axis)(x)


def log_softmax_backward(grad, y, *, axis):
    return prepare_log_softmax_backward((grad.shape, y.shape), y.dtype, axis=axis)(grad, y)
