"""Optimisers' updates in NumPy, in place."""

import numpy as np


def _decayed(param, grad, weight_decay):
    return grad + weight_decay * param if weight_decay else grad


def sgd_step(param, grad, velocity, *, nesterov, lr, momentum, weight_decay):
    grad = _decayed(param, grad, weight_decay)
    if velocity is not None:
        velocity *= momentum
        velocity += grad
        grad = grad + momentum * velocity if nesterov else velocity
    param -= lr * grad


def adagrad_step(param, grad, square, *, lr, eps, weight_decay):
    grad = _decayed(param, grad, weight_decay)
    square += grad * grad
    param -= lr * grad / (np.sqrt(square) + eps)


def rmsprop_step(param, grad, square, velocity, *, lr, alpha, eps, momentum, weight_decay):
    grad = _decayed(param, grad, weight_decay)
    square *= alpha
    square += (1 - alpha) * grad * grad
    scaled = grad / (np.sqrt(square) + eps)
    if velocity is not None:
        velocity *= momentum
        velocity += scaled
        scaled = velocity
    param -= lr * scaled


def adam_step(param, grad, mean, square, *, first, second, eps, weight_decay, rate, scale, kept):
    grad = _decayed(param, grad, weight_decay)
    mean *= first
    mean += (1 - first) * grad
    square *= second
    square += (1 - second) * grad * grad
    root = np.sqrt(square)
    root *= scale
    root += eps
    np.divide(mean, root, out=root)
    root *= rate
    if kept != 1:
        param *= kept
    param -= root
