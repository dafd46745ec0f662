"""Activations in NumPy, and their gradients from the forward's output."""

import numpy as np


def relu(x):
    return np.maximum(x, 0)


def relu_backward(grad, y):
    return np.where(y <= 0, grad.dtype.type(0), grad)


def leaky_relu(x, *, negative_slope):
    return np.where(x > 0, x, x * x.dtype.type(negative_slope))


def leaky_relu_backward(grad, y, *, negative_slope):
    return np.where(y > 0, grad, grad * grad.dtype.type(negative_slope))


def sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, x.dtype.type(1)) / (1 + e)


def sigmoid_backward(grad, y):
    return grad * y * (1 - y)


def tanh(x):
    return np.tanh(x)


def tanh_backward(grad, y):
    return grad * (1 - y * y)


def softmax(x, *, axis):
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, and so is that row
        e = np.exp(x - x.max(axis=axis, keepdims=True, initial=-np.inf))
    return e / e.sum(axis=axis, keepdims=True)


def softmax_backward(grad, y, *, axis):
    return y * (grad - (grad * y).sum(axis=axis, keepdims=True))


def log_softmax(x, *, axis):
    with np.errstate(invalid="ignore", divide="ignore"):  # as above; and the log of an empty sum
        shifted = x - x.max(axis=axis, keepdims=True, initial=-np.inf)
        return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def log_softmax_backward(grad, y, *, axis):
    return grad - np.exp(y) * grad.sum(axis=axis, keepdims=True)


def step(x):
    return np.heaviside(x, x.dtype.type(0))


def sign(x):
    return np.sign(x)
