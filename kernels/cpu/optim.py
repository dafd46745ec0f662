"""Optimisers' updates in Numba: every array is read and written once, where NumPy passes over them a dozen times.

Without contraction to fused multiply-adds, so that the bits are those of the formulas in NumPy.
"""

from math import sqrt

import numpy as np
from numba import prange

from tilewise.kernels.cpu.epilogue import prefer_widest_vectors
from tilewise.kernels.cpu.jit import AS_WRITTEN, device, kernel

CHUNK = 16384  # elements in one unit of parallel work
_NANOSECONDS = 0.3  # an element, of each array


@device(fastmath=AS_WRITTEN)
def _sgd_run(param, grad, velocity, has_velocity, nesterov, lr, momentum, weight_decay):
    prefer_widest_vectors()
    rate, kept, decay = param.dtype.type(lr), param.dtype.type(momentum), param.dtype.type(weight_decay)
    for i in range(param.size):
        g = grad[i] + decay * param[i] if weight_decay != 0 else grad[i]
        if has_velocity:
            v = velocity[i] * kept + g
            velocity[i] = v
            g = g + kept * v if nesterov else v
        param[i] -= rate * g


@kernel(fastmath=AS_WRITTEN)
def _sgd(param, grad, velocity, has_velocity, nesterov, lr, momentum, weight_decay):
    for chunk in prange((param.size + CHUNK - 1) // CHUNK):
        a = chunk * CHUNK
        b = min(a + CHUNK, param.size)
        _sgd_run(param[a:b], grad[a:b], velocity[a:b], has_velocity, nesterov, lr, momentum, weight_decay)


@device(fastmath=AS_WRITTEN)
def _adagrad_run(param, grad, square, lr, eps, weight_decay):
    prefer_widest_vectors()
    rate, least, decay = param.dtype.type(lr), param.dtype.type(eps), param.dtype.type(weight_decay)
    for i in range(param.size):
        g = grad[i] + decay * param[i] if weight_decay != 0 else grad[i]
        s = square[i] + g * g
        square[i] = s
        param[i] -= rate * g / (sqrt(s) + least)


@kernel(fastmath=AS_WRITTEN)
def _adagrad(param, grad, square, lr, eps, weight_decay):
    for chunk in prange((param.size + CHUNK - 1) // CHUNK):
        a = chunk * CHUNK
        b = min(a + CHUNK, param.size)
        _adagrad_run(param[a:b], grad[a:b], square[a:b], lr, eps, weight_decay)


@device(fastmath=AS_WRITTEN)
def _rmsprop_run(param, grad, square, velocity, has_velocity, lr, alpha, eps, momentum, weight_decay):
    prefer_widest_vectors()
    rate, least, decay = param.dtype.type(lr), param.dtype.type(eps), param.dtype.type(weight_decay)
    old, new, kept = param.dtype.type(alpha), param.dtype.type(1 - alpha), param.dtype.type(momentum)
    for i in range(param.size):
        g = grad[i] + decay * param[i] if weight_decay != 0 else grad[i]
        s = square[i] * old + new * g * g
        square[i] = s
        g = g / (sqrt(s) + least)
        if has_velocity:
            g = velocity[i] * kept + g
            velocity[i] = g
        param[i] -= rate * g


@kernel(fastmath=AS_WRITTEN)
def _rmsprop(param, grad, square, velocity, has_velocity, lr, alpha, eps, momentum, weight_decay):
    for chunk in prange((param.size + CHUNK - 1) // CHUNK):
        a = chunk * CHUNK
        b = min(a + CHUNK, param.size)
        _rmsprop_run(
            param[a:b], grad[a:b], square[a:b], velocity[a:b], has_velocity, lr, alpha, eps, momentum, weight_decay
        )


@device(fastmath=AS_WRITTEN)
def _adam_run(param, grad, mean, square, first, second, eps, weight_decay, rate, scale, kept):
    prefer_widest_vectors()
    least, decay, stays = param.dtype.type(eps), param.dtype.type(weight_decay), param.dtype.type(kept)
    old_mean, new_mean = param.dtype.type(first), param.dtype.type(1 - first)
    old_square, new_square = param.dtype.type(second), param.dtype.type(1 - second)
    speed, correction = param.dtype.type(rate), param.dtype.type(scale)
    for i in range(param.size):
        g = grad[i] + decay * param[i] if weight_decay != 0 else grad[i]
        m = mean[i] * old_mean + new_mean * g
        s = square[i] * old_square + new_square * g * g
        mean[i], square[i] = m, s
        p = param[i] * stays if kept != 1 else param[i]
        param[i] = p - m / (sqrt(s) * correction + least) * speed


@kernel(fastmath=AS_WRITTEN)
def _adam(param, grad, mean, square, first, second, eps, weight_decay, rate, scale, kept):
    for chunk in prange((param.size + CHUNK - 1) // CHUNK):
        a = chunk * CHUNK
        b = min(a + CHUNK, param.size)
        _adam_run(param[a:b], grad[a:b], mean[a:b], square[a:b], first, second, eps, weight_decay, rate, scale, kept)


def _run(update, arrays: tuple, *numbers):
    """An absent array is an empty one, and a number tells so."""
    param = arrays[0]
    flat = [np.empty(0, param.dtype) if a is None else a.ravel() for a in arrays]
    update(param.size * _NANOSECONDS * len(arrays), *flat, *numbers)


def sgd_step(param, grad, velocity, *, nesterov, lr, momentum, weight_decay):
    _run(_sgd, (param, grad, velocity), velocity is not None, nesterov, lr, momentum, weight_decay)


def adagrad_step(param, grad, square, *, lr, eps, weight_decay):
    _run(_adagrad, (param, grad, square), lr, eps, weight_decay)


def rmsprop_step(param, grad, square, velocity, *, lr, alpha, eps, momentum, weight_decay):
    _run(_rmsprop, (param, grad, square, velocity), velocity is not None, lr, alpha, eps, momentum, weight_decay)


def adam_step(param, grad, mean, square, *, first, second, eps, weight_decay, rate, scale, kept):
    _run(_adam, (param, grad, mean, square), first, second, eps, weight_decay, rate, scale, kept)
