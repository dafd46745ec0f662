"""Activations of one number: what elementwise kernels apply, and others on the way to their results."""

import math

from tilewise.kernels.activation_plan import LEAKY_RELU, NONE, RELU, RELU6, SIGMOID, STEP, TANH
from tilewise.kernels.cuda.launch import device


@device
def activate(value, code, slope):
    """The activation `code` of a number; NaN stays NaN. slope: leaky_relu's, of the number's type."""
    nought, one = type(value)(0), type(value)(1)
    if code == NONE or value != value:
        return value
    if code == RELU:
        return value if value > nought else nought
    if code == RELU6:
        six = type(value)(6)
        return six if value > six else (value if value > nought else nought)
    if code == LEAKY_RELU:
        return value if value > nought else value * slope
    if code == SIGMOID:
        e = math.exp(-abs(value))
        return (e if value < nought else one) / (one + e)
    if code == TANH:
        return math.tanh(value)
    positive, negative = one if value > nought else nought, one if value < nought else nought
    return positive if code == STEP else positive - negative


@device
def gradient(grad, y, code, slope):
    """grad times the activation's derivative, from the forward's output y."""
    nought, one = type(y)(0), type(y)(1)
    if code == RELU:
        return nought if y <= nought else grad
    if code == LEAKY_RELU:
        return grad if y > nought else grad * slope
    if code == SIGMOID:
        return grad * y * (one - y)
    return grad * (one - y * y)
