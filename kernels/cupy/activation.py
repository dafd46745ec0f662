"""Activations and their gradients on the GPU; src/activation.cu says how."""

from tilewise.kernels.cupy import driver
from tilewise.kernels.cupy.activation_codes import LEAKY_RELU, RELU, SIGMOID, SIGN, STEP, TANH
from tilewise.kernels.cupy.activation_softmax import (  # noqa: F401
    log_softmax,
    log_softmax_backward,
    softmax,
    softmax_backward,
)
from tilewise.kernels.cupy.launch import THREADS, Kernel

HAS_BFLOAT16 = True  # operation.py asks
# Vectors a thread takes at most: enough bytes under way to hide the memory's latency, few enough blocks to start.
_EACH = 4
_MOVES = ("LDG.128", "STG.128")

_activate = Kernel("activation.cu", "activate_all<{T}>", "P P r q q i", promises=_MOVES)
_gradient = Kernel("activation.cu", "gradient_all<{T}>", "P P P r q q i", promises=_MOVES)


def _vectors_and_blocks(*arrays) -> tuple[int, int]:
    """(the vectors of 16 bytes that the arrays have together, and blocks).

    No vectors where an array does not begin at a multiple of 16. A thread takes about _EACH; at most what the device
    runs at once in eight rounds.
    """
    size, place = arrays[0].size, arrays[0].place
    vectors = 0 if any(a.pointer % 16 for a in arrays) else arrays[0].nbytes // 16
    blocks = -(-(vectors or size) // (THREADS * _EACH))
    return vectors, max(1, min(blocks, 64 * driver.engine(place.ordinal).multiprocessors))


def _forward(x, code, slope=0.0):
    y = x.place.empty(x.shape, x.dtype)
    if x.size:
        vectors, blocks = _vectors_and_blocks(x, y)
        _activate(x.place, blocks, x, y, slope, x.size, vectors, code)
    return y


def _backward(grad, y, code, slope=0.0):
    result = y.place.empty(y.shape, y.dtype)
    if y.size:
        vectors, blocks = _vectors_and_blocks(grad, y, result)
        _gradient(y.place, blocks, grad, y, result, slope, y.size, vectors, code)
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
