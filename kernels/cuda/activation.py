"""Activations and their gradients on the GPU.

Each thread takes 16 bytes at a time, neighbouring threads neighbouring ones, so that a warp moves 512 bytes with an
instruction; bound by memory, one read and one write of each number.
"""

from numba import cuda

from tilewise.kernels.cuda.activation_softmax import (  # noqa: F401
    log_softmax,
    log_softmax_backward,
    softmax,
    softmax_backward,
)
from tilewise.kernels.cuda.epilogue import LEAKY_RELU, RELU, SIGMOID, SIGN, STEP, TANH, activate, gradient
from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64, REAL, kernel
from tilewise.kernels.cuda.memory import lanes, load_vector, narrow, registers, store_vector, widen

_THREADS = 256
# Vectors a thread takes at most: enough bytes under way to hide the memory's latency, few enough blocks to start.
_EACH = 4


@kernel(threads=_THREADS, promises=("LDG.128", "STG.128"))
def activate_all(x: ELEMENTS, y: ELEMENTS, slope: REAL, count: INT64, vectors: INT64, code: INT32):
    """y[i] = activation(x[i]), i < count; the first `vectors` of 16 bytes as such, the rest one by one."""
    step = cuda.gridDim.x * _THREADS
    first = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
    width = lanes(x)
    values, results = registers(x, 16), registers(y, 16)
    for v in range(first, vectors, step):
        load_vector(values, x, v * width)
        for k in range(width):
            results[k] = narrow(activate(widen(values[k]), code, slope), y)
        store_vector(y, v * width, results)
    for i in range(vectors * width + first, count, step):
        y[i] = narrow(activate(widen(x[i]), code, slope), y)


@kernel(threads=_THREADS, promises=("LDG.128", "STG.128"))
def gradient_all(
    grad: ELEMENTS, y: ELEMENTS, result: ELEMENTS, slope: REAL, count: INT64, vectors: INT64, code: INT32
):  # fmt: skip
    """result[i] = grad[i] * activation'(x[i]) from y[i] = activation(x[i]), i < count."""
    step = cuda.gridDim.x * _THREADS
    first = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
    width = lanes(y)
    grads, outputs, results = registers(y, 16), registers(y, 16), registers(y, 16)
    for v in range(first, vectors, step):
        load_vector(grads, grad, v * width)
        load_vector(outputs, y, v * width)
        for k in range(width):
            results[k] = narrow(gradient(widen(grads[k]), widen(outputs[k]), code, slope), y)
        store_vector(result, v * width, results)
    for i in range(vectors * width + first, count, step):
        result[i] = narrow(gradient(widen(grad[i]), widen(y[i]), code, slope), y)


def whole_vectors(count: int, *arrays) -> int:
    """How many vectors of 16 bytes the arrays have together; none where one does not begin at a multiple of 16."""
    if any(a.pointer % 16 for a in arrays):
        return 0
    return count * arrays[0].dtype.itemsize // 16


def blocks_for(count: int, engine, each: int = _EACH) -> int:
    """Blocks so that a thread takes about `each`, at most what the device runs at once in eight rounds."""
    return max(1, min(-(-count // (_THREADS * each)), 64 * engine.multiprocessors))


def _forward(x, code, slope=0.0):
    y = x.place.empty(x.shape, x.dtype)
    vectors = whole_vectors(x.size, x, y)
    if x.size:
        work = vectors or x.size
        activate_all(x.place, blocks_for(work, x.place.engine), x, y, slope, x.size, vectors, code)
    return y


def _backward(grad, y, code, slope=0.0):
    result = y.place.empty(y.shape, y.dtype)
    vectors = whole_vectors(y.size, grad, y, result)
    if y.size:
        work = vectors or y.size
        gradient_all(y.place, blocks_for(work, y.place.engine), grad, y, result, slope, y.size, vectors, code)
    return result


def relu(x):
    return _forward(x, RELU)


def relu_backward(grad, y):
    return _backward(grad, y, RELU)


def leaky_relu(x, *, negative_slope):
    return _forward(x, LEAKY_RELU, negative_slope)


def leaky_relu_backward(grad, y, *, negative_slope):
    return _backward(grad, y, LEAKY_RELU, negative_slope)


def sigmoid(x):
    return _forward(x, SIGMOID)


def sigmoid_backward(grad, y):
    return _backward(grad, y, SIGMOID)


def tanh(x):
    return _forward(x, TANH)


def tanh_backward(grad, y):
    return _backward(grad, y, TANH)


def step(x):
    return _forward(x, STEP)


def sign(x):
    return _forward(x, SIGN)
