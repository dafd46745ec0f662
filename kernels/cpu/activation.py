"""Activations and their gradients in Numba.

The elementwise ones are one pass at copy speed; sigmoid and tanh owe that to the exp of epilogue.py. Softmax reads its
input twice (the largest value; exponentials and their sum) and scales what it wrote, while a row is in the cache.
"""

import math

import numpy as np
from numba import prange

from tilewise.kernels.cpu import epilogue
from tilewise.kernels.cpu.epilogue import exp, maximum, prefer_widest_vectors
from tilewise.kernels.cpu.jit import EXACT_ORDER, device, kernel
from tilewise.kernels.cpu.scratch import empty

# Elements in one unit of parallel work: 64 kB of float32, a few microseconds, so that a launch is worth it and a
# chunk's input is still in the second-level cache when softmax comes back to it.
CHUNK = 16384
BLOCK = 64  # a loop over a multiple of it, in vectors of 16 unrolled 4 times, leaves no rest
SHORT = 64  # rows up to this length are transposed, BLOCK rows at a time, into 2 * 16 kB of float32
COLUMNS = 256  # columns whose maxima and sums stay in the first-level cache, where the axis is not the last

RELU, LEAKY_RELU, SIGMOID, TANH, STEP, SIGN = range(1, 7)
# Serial nanoseconds for one element, measured roughly; they only decide between serial and parallel.
_NANOSECONDS = {RELU: 0.25, LEAKY_RELU: 0.25, SIGMOID: 1.0, TANH: 1.0, STEP: 0.25, SIGN: 0.25}
_SOFTMAX_NANOSECONDS = 2.0


@device()
def _threshold(x):
    return type(x)(1) if x > 0 else (type(x)(0) if x <= 0 else x)


@device()
def _signum(x):
    return type(x)(1) if x > 0 else (type(x)(-1) if x < 0 else x)


@device()
def _forward_run(x, y, code, slope):
    prefer_widest_vectors()
    if code == RELU:
        for i in range(x.size):
            y[i] = epilogue.relu(x[i])
    elif code == LEAKY_RELU:
        for i in range(x.size):
            y[i] = epilogue.leaky_relu(x[i], slope)
    elif code == SIGMOID:
        for i in range(x.size):
            y[i] = epilogue.sigmoid(x[i])
    elif code == TANH:
        for i in range(x.size):
            y[i] = epilogue.tanh(x[i])
    elif code == STEP:
        for i in range(x.size):
            y[i] = _threshold(x[i])
    else:
        for i in range(x.size):
            y[i] = _signum(x[i])


@device()
def _backward_run(grad, y, result, code, slope):
    zero, one = y.dtype.type(0), y.dtype.type(1)
    factor = y.dtype.type(slope)
    if code == RELU:
        for i in range(y.size):
            result[i] = zero if y[i] <= zero else grad[i]
    elif code == LEAKY_RELU:
        for i in range(y.size):
            result[i] = grad[i] if y[i] > zero else grad[i] * factor
    elif code == SIGMOID:
        for i in range(y.size):
            result[i] = grad[i] * y[i] * (one - y[i])
    else:
        for i in range(y.size):
            result[i] = grad[i] * (one - y[i] * y[i])


@kernel()
def _forward_kernel(x, y, code, slope):
    for chunk in prange((x.size + CHUNK - 1) // CHUNK):
        start = chunk * CHUNK
        stop = min(start + CHUNK, x.size)
        _forward_run(x[start:stop], y[start:stop], code, slope)


@kernel()
def _backward_kernel(grad, y, result, code, slope):
    for chunk in prange((y.size + CHUNK - 1) // CHUNK):
        start = chunk * CHUNK
        stop = min(start + CHUNK, y.size)
        _backward_run(grad[start:stop], y[start:stop], result[start:stop], code, slope)


def _prepare_forward(code: int):
    """`prepare_` for an activation: what follows from the shape is worked out once, and a call does little else."""

    def prepare(shapes, dtype, *, negative_slope=0.0):
        (shape,) = shapes
        kernel = _forward_kernel.sized(math.prod(shape) * _NANOSECONDS[code])

        def run(x):
            y = empty(shape, dtype)
            kernel(x.ravel(), y.ravel(), code, negative_slope)
            return y

        return run

    return prepare


def _prepare_backward(code: int):
    def prepare(shapes, dtype, *, negative_slope=0.0):
        shape = shapes[1]
        kernel = _backward_kernel.sized(math.prod(shape) * 0.3)

        def run(grad, y):
            result = empty(shape, dtype)
            kernel(grad.ravel(), y.ravel(), result.ravel(), code, negative_slope)
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


@device()
def _largest(x):
    """The largest of x, whose size is a multiple of BLOCK; NaN where it holds one."""
    prefer_widest_vectors()
    result = x.dtype.type(-np.inf)
    for i in range(x.size // BLOCK * BLOCK):
        result = maximum(result, x[i])
    return result


@device()
def _exponentials(x, y, largest):
    """y = exp(x - largest), and their sum; x's size is a multiple of BLOCK. y must not be x: LLVM tests for that."""
    prefer_widest_vectors()
    total = x.dtype.type(0)
    for i in range(x.size // BLOCK * BLOCK):
        e = exp(x[i] - largest)
        y[i] = e
        total += e
    return total


@device(fastmath=EXACT_ORDER)
def _logarithm(x, largest, shift):
    """x - largest - shift. Reassociated, largest + shift would lose the digits that count where x is large."""
    return (x - largest) - shift


@device()
def _softmax_row(x, y, last, last_y, log):
    """last, last_y: BLOCK elements, for the end of the row filled up with -inf, so that no loop has a scalar rest."""
    n = x.size
    whole = n // BLOCK * BLOCK
    for i in range(BLOCK):
        last[i] = -np.inf
    for i in range(n - whole):
        last[i] = x[whole + i]
    largest = maximum(_largest(x[:whole]), _largest(last))
    total = _exponentials(x[:whole], y[:whole], largest) + _exponentials(last, last_y, largest)
    if log:
        shift = x.dtype.type(math.log(total))
        for i in range(n):
            y[i] = _logarithm(x[i], largest, shift)
    else:
        scale = x.dtype.type(1) / total
        for i in range(whole):
            y[i] *= scale
        for i in range(n - whole):
            y[whole + i] = last_y[i] * scale


@device(allocates=True)
def _softmax_columns_run(x, y, start, stop, log):
    """Softmax along the first axis of x (n, inner) for the columns from start to stop."""
    prefer_widest_vectors()
    n, width = x.shape[0], stop - start
    largest, total = np.empty(width, x.dtype), np.zeros(width, x.dtype)
    largest[:] = -np.inf
    for k in range(n):
        source = x[k, start:stop]
        for j in range(width):
            largest[j] = source[j] if source[j] > largest[j] else largest[j]
    for k in range(n):
        source, target = x[k, start:stop], y[k, start:stop]
        for j in range(width):
            target[j] = exp(source[j] - largest[j])
            total[j] += target[j]
    if log:
        for j in range(width):
            total[j] = math.log(total[j])
        for k in range(n):
            source, target = x[k, start:stop], y[k, start:stop]
            for j in range(width):
                target[j] = _logarithm(source[j], largest[j], total[j])
    else:
        for j in range(width):
            total[j] = x.dtype.type(1) / total[j]
        for k in range(n):
            target = y[k, start:stop]
            for j in range(width):
                target[j] *= total[j]


@device()
def _softmax_short_rows(x, y, row, count, columns, columns_y, log):
    """Softmax of `count` rows from `row` on, as the columns of a transposed copy: a vector holds one element of each
    row, so that neither the sums nor the ends of the rows cost anything extra."""
    n = x.shape[1]
    for i in range(count):
        for k in range(n):
            columns[k, i] = x[row + i, k]
    _softmax_columns_run(columns, columns_y, 0, BLOCK, log)
    for i in range(count):
        for k in range(n):
            y[row + i, k] = columns_y[k, i]


@kernel()
def _softmax_rows(x, y, log):
    rows, n = x.shape
    block = (CHUNK // n // BLOCK + 1) * BLOCK
    for chunk in prange((rows + block - 1) // block):
        stop = min(chunk * block + block, rows)
        if n <= SHORT:
            columns, columns_y = np.zeros((n, BLOCK), x.dtype), np.empty((n, BLOCK), x.dtype)
            for row in range(chunk * block, stop, BLOCK):
                _softmax_short_rows(x, y, row, min(BLOCK, stop - row), columns, columns_y, log)
        else:
            last, last_y = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
            for row in range(chunk * block, stop):
                _softmax_row(x[row], y[row], last, last_y, log)


@kernel()
def _softmax_columns(x, y, log):
    outer, _, inner = x.shape
    blocks = (inner + COLUMNS - 1) // COLUMNS
    for chunk in prange(outer * blocks):
        start = chunk % blocks * COLUMNS
        _softmax_columns_run(x[chunk // blocks], y[chunk // blocks], start, min(start + COLUMNS, inner), log)


@device()
def _softmax_backward_row(grad, y, result, log):
    prefer_widest_vectors()
    total = y.dtype.type(0)
    if log:
        for i in range(y.size):
            total += grad[i]
        for i in range(y.size):
            result[i] = grad[i] - exp(y[i]) * total
    else:
        for i in range(y.size):
            total += grad[i] * y[i]
        for i in range(y.size):
            result[i] = y[i] * (grad[i] - total)


@kernel()
def _softmax_backward_rows(grad, y, result, log):
    rows, n = y.shape
    block = CHUNK // n + 1
    for chunk in prange((rows + block - 1) // block):
        for row in range(chunk * block, min(chunk * block + block, rows)):
            _softmax_backward_row(grad[row], y[row], result[row], log)


@device(allocates=True)
def _softmax_backward_columns_run(grad, y, result, start, stop, log):
    prefer_widest_vectors()
    n, width = y.shape[0], stop - start
    total = np.zeros(width, y.dtype)
    for k in range(n):
        slope, value = grad[k, start:stop], y[k, start:stop]
        for j in range(width):
            total[j] += slope[j] if log else slope[j] * value[j]
    for k in range(n):
        slope, value, target = grad[k, start:stop], y[k, start:stop], result[k, start:stop]
        if log:
            for j in range(width):
                target[j] = slope[j] - exp(value[j]) * total[j]
        else:
            for j in range(width):
                target[j] = value[j] * (slope[j] - total[j])


@kernel()
def _softmax_backward_columns(grad, y, result, log):
    outer, _, inner = y.shape
    blocks = (inner + COLUMNS - 1) // COLUMNS
    for chunk in prange(outer * blocks):
        image, start = chunk // blocks, chunk % blocks * COLUMNS
        stop = min(start + COLUMNS, inner)
        _softmax_backward_columns_run(grad[image], y[image], result[image], start, stop, log)


def _prepare_softmax(rows, columns, log: bool):
    """`prepare_` for softmax (log: log_softmax) or its gradient: rows where the axis is the last, columns elsewhere."""

    def prepare(shapes, dtype, *, axis):
        shape = shapes[0]
        if math.prod(shape) == 0:
            return lambda *operands: empty(shape, dtype)
        last = axis == len(shape) - 1
        lines = (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))[: 2 if last else 3]
        kernel = (rows if last else columns).sized(math.prod(shape) * _SOFTMAX_NANOSECONDS)

        def run(*operands):
            result = empty(lines, dtype)
            kernel(*[operand.reshape(lines) for operand in operands], result, log)
            return result.reshape(shape)

        def run_matrix(*operands):
            result = empty(shape, dtype)
            kernel(*operands, result, log)
            return result

        return run_matrix if lines == shape else run

    return prepare


prepare_softmax = _prepare_softmax(_softmax_rows, _softmax_columns, False)
prepare_log_softmax = _prepare_softmax(_softmax_rows, _softmax_columns, True)
prepare_softmax_backward = _prepare_softmax(_softmax_backward_rows, _softmax_backward_columns, False)
prepare_log_softmax_backward = _prepare_softmax(_softmax_backward_rows, _softmax_backward_columns, True)


def softmax(x, *, axis):
    return prepare_softmax((x.shape,), x.dtype, axis=axis)(x)


def softmax_backward(grad, y, *, axis):
    return prepare_softmax_backward((grad.shape, y.shape), y.dtype, axis=axis)(grad, y)


def log_softmax(x, *, axis):
    return prepare_log_softmax((x.shape,), x.dtype, axis=axis)(x)


def log_softmax_backward(grad, y, *, axis):
    return prepare_log_softmax_backward((grad.shape, y.shape), y.dtype, axis=axis)(grad, y)
