"""Activations and their gradients on the GPU.

Each thread takes 16 bytes at a time, neighbouring threads neighbouring ones, so that a warp moves 512 bytes with an
instruction; bound by memory, one read and one write of each number.
"""

from functools import partial

from numba import cuda

from tilewise.kernels import activation_plan
from tilewise.kernels.activation_plan import LEAKY_RELU, RELU, SIGMOID, SIGN, STEP, TANH
from tilewise.kernels.channel_plan import THREADS
from tilewise.kernels.cuda.activation_softmax import (  # noqa: F401
    log_softmax,
    log_softmax_backward,
    softmax,
    softmax_backward,
)
from tilewise.kernels.cuda.epilogue import activate, gradient
from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64, REAL, engine_of, kernel
from tilewise.kernels.cuda.memory import lanes, load_vector, narrow, registers, store_vector, widen


@kernel(threads=THREADS, promises=("LDG.128", "STG.128"))
def activate_all(x: ELEMENTS, y: ELEMENTS, slope: REAL, count: INT64, vectors: INT64, code: INT32):
    """y[i] = activation(x[i]), i < count; the first `vectors` of 16 bytes as such, the rest one by one."""
    step = cuda.gridDim.x * THREADS
    first = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    width = lanes(x)
    values, results = registers(x, 16), registers(y, 16)
    for v in range(first, vectors, step):
        load_vector(values, x, v * width)
        for k in range(width):
            results[k] = narrow(activate(widen(values[k]), code, slope), y)
        store_vector(y, v * width, results)
    for i in range(vectors * width + first, count, step):
        y[i] = narrow(activate(widen(x[i]), code, slope), y)


@kernel(threads=THREADS, promises=("LDG.128", "STG.128"))
def gradient_all(
    grad: ELEMENTS, y: ELEMENTS, result: ELEMENTS, slope: REAL, count: INT64, vectors: INT64, code: INT32
):  # fmt: skip
    """result[i] = grad[i] * activation'(x[i]) from y[i] = activation(x[i]), i < count."""
    step = cuda.gridDim.x * THREADS
    first = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
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


relu = partial(activation_plan.forward, activate_all, engine_of, RELU)
relu_backward = partial(activation_plan.backward, gradient_all, engine_of, RELU)
leaky_relu = partial(activation_plan.sloped_forward, activate_all, engine_of, LEAKY_RELU)
leaky_relu_backward = partial(activation_plan.sloped_backward, gradient_all, engine_of, LEAKY_RELU)
sigmoid = partial(activation_plan.forward, activate_all, engine_of, SIGMOID)
sigmoid_backward = partial(activation_plan.backward, gradient_all, engine_of, SIGMOID)
tanh = partial(activation_plan.forward, activate_all, engine_of, TANH)
tanh_backward = partial(activation_plan.backward, gradient_all, engine_of, TANH)
step = partial(activation_plan.forward, activate_all, engine_of, STEP)
sign = partial(activation_plan.forward, activate_all, engine_of, SIGN)
