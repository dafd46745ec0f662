"""Optimisers' updates on the GPU: one launch a parameter, bound by memory; 16 bytes of each array at a time.

Every array is read once and, but for the gradient, written once.
"""

import math
from functools import partial

from numba import cuda

from tilewise.kernels import optim_plan
from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64, REAL, device, kernel
from tilewise.kernels.cuda.memory import lanes, load_vector, narrow, registers, store_vector, widen

_THREADS = 256
_PROMISED = ("LDG.128", "STG.128")


@device
def _sgd(p, g, v, has_velocity, nesterov, lr, momentum, weight_decay):
    if weight_decay != 0:
        g += weight_decay * p
    if has_velocity != 0:
        v = v * momentum + g
        g = g + momentum * v if nesterov != 0 else v
    return p - lr * g, v


@kernel(threads=_THREADS, promises=_PROMISED)
def sgd_update(
    param: ELEMENTS, grad: ELEMENTS, velocity: ELEMENTS, count: INT64, vectors: INT64, has_velocity: INT32,
    nesterov: INT32, lr: REAL, momentum: REAL, weight_decay: REAL,
):  # fmt: skip
    """The first `vectors` of 16 bytes as such, the rest one by one."""
    step = cuda.gridDim.x * _THREADS
    first = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
    width = lanes(param)
    values, grads, speeds = registers(param, 8), registers(param, 8), registers(param, 8)
    for k in range(width):
        speeds[k] = narrow(lr, param)
    for i in range(first, vectors, step):
        load_vector(values, param, i * width)
        load_vector(grads, grad, i * width)
        if has_velocity != 0:
            load_vector(speeds, velocity, i * width)
        for k in range(width):
            p, v = _sgd(
                widen(values[k]), widen(grads[k]), widen(speeds[k]), has_velocity, nesterov, lr, momentum, weight_decay
            )
            values[k], speeds[k] = narrow(p, param), narrow(v, param)
        store_vector(param, i * width, values)
        if has_velocity != 0:
            store_vector(velocity, i * width, speeds)
    for i in range(vectors * width + first, count, step):
        v = widen(velocity[i]) if has_velocity != 0 else lr
        p, v = _sgd(widen(param[i]), widen(grad[i]), v, has_velocity, nesterov, lr, momentum, weight_decay)
        param[i] = narrow(p, param)
        if has_velocity != 0:
            velocity[i] = narrow(v, velocity)


@device
def _scaled(p, g, s, v, has_velocity, lr, old, new, eps, momentum, weight_decay):
    """AdaGrad and RMSProp: (param, square, velocity)."""
    if weight_decay != 0:
        g += weight_decay * p
    s = s * old + new * g * g
    g = g / (math.sqrt(s) + eps)
    if has_velocity != 0:
        v = v * momentum + g
        g = v
    return p - lr * g, s, v


@kernel(threads=_THREADS, promises=_PROMISED)
def scaled_update(
    param: ELEMENTS, grad: ELEMENTS, square: ELEMENTS, velocity: ELEMENTS, count: INT64, vectors: INT64,
    has_velocity: INT32, lr: REAL, old: REAL, new: REAL, eps: REAL, momentum: REAL, weight_decay: REAL,
):  # fmt: skip
    """square = old * square + new * g^2; AdaGrad where both are 1."""
    step = cuda.gridDim.x * _THREADS
    first = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
    width = lanes(param)
    values, grads = registers(param, 8), registers(param, 8)
    squares, speeds = registers(param, 8), registers(param, 8)
    for k in range(width):
        speeds[k] = narrow(lr, param)
    for i in range(first, vectors, step):
        load_vector(values, param, i * width)
        load_vector(grads, grad, i * width)
        load_vector(squares, square, i * width)
        if has_velocity != 0:
            load_vector(speeds, velocity, i * width)
        for k in range(width):
            p, s, v = _scaled(
                widen(values[k]), widen(grads[k]), widen(squares[k]), widen(speeds[k]), has_velocity, lr, old, new,
                eps, momentum, weight_decay,
            )  # fmt: skip
            values[k], squares[k], speeds[k] = narrow(p, param), narrow(s, param), narrow(v, param)
        store_vector(param, i * width, values)
        store_vector(square, i * width, squares)
        if has_velocity != 0:
            store_vector(velocity, i * width, speeds)
    for i in range(vectors * width + first, count, step):
        v = widen(velocity[i]) if has_velocity != 0 else lr
        p, s, v = _scaled(
            widen(param[i]), widen(grad[i]), widen(square[i]), v, has_velocity, lr, old, new, eps, momentum,
            weight_decay,
        )  # fmt: skip
        param[i], square[i] = narrow(p, param), narrow(s, square)
        if has_velocity != 0:
            velocity[i] = narrow(v, velocity)


@device
def _adam(p, g, m, s, first, new_first, second, new_second, eps, weight_decay, rate, scale, kept):
    if weight_decay != 0:
        g += weight_decay * p
    m = m * first + new_first * g
    s = s * second + new_second * g * g
    return p * kept - m / (math.sqrt(s) * scale + eps) * rate, m, s


@kernel(threads=_THREADS, promises=_PROMISED)
def adam_update(
    param: ELEMENTS, grad: ELEMENTS, mean: ELEMENTS, square: ELEMENTS, count: INT64, vectors: INT64,
    first: REAL, new_first: REAL, second: REAL, new_second: REAL, eps: REAL, weight_decay: REAL, rate: REAL,
    scale: REAL, kept: REAL,
):  # fmt: skip
    step = cuda.gridDim.x * _THREADS
    begin = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
    width = lanes(param)
    values, grads = registers(param, 8), registers(param, 8)
    means, squares = registers(param, 8), registers(param, 8)
    for i in range(begin, vectors, step):
        load_vector(values, param, i * width)
        load_vector(grads, grad, i * width)
        load_vector(means, mean, i * width)
        load_vector(squares, square, i * width)
        for k in range(width):
            p, m, s = _adam(
                widen(values[k]), widen(grads[k]), widen(means[k]), widen(squares[k]), first, new_first, second,
                new_second, eps, weight_decay, rate, scale, kept,
            )  # fmt: skip
            values[k], means[k], squares[k] = narrow(p, param), narrow(m, param), narrow(s, param)
        store_vector(param, i * width, values)
        store_vector(mean, i * width, means)
        store_vector(square, i * width, squares)
    for i in range(vectors * width + begin, count, step):
        p, m, s = _adam(
            widen(param[i]), widen(grad[i]), widen(mean[i]), widen(square[i]), first, new_first, second, new_second,
            eps, weight_decay, rate, scale, kept,
        )  # fmt: skip
        param[i], mean[i], square[i] = narrow(p, param), narrow(m, mean), narrow(s, square)


def _engine_of(place):
    return place.engine


sgd_step = partial(optim_plan.sgd_step, sgd_update, _engine_of)
adagrad_step = partial(optim_plan.adagrad_step, scaled_update, _engine_of)
rmsprop_step = partial(optim_plan.rmsprop_step, scaled_update, _engine_of)
adam_step = partial(optim_plan.adam_step, adam_update, _engine_of)
