"""Activation layers. Each keeps its own output, from which the gradient is computed."""

import numpy as np

from ..kernels import (
    leaky_relu,
    leaky_relu_backward,
    relu,
    relu_backward,
    sigmoid,
    sigmoid_backward,
    softmax,
    softmax_backward,
    tanh,
    tanh_backward,
)
from .module import Module


class ReLU(Module):
    """max(x, 0)"""

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = relu(x)
        self.keep(y)
        return y

    def backward(self, grad: np.ndarray) -> np.ndarray:
        (y,) = self.kept()
        return relu_backward(grad, y)


class LeakyReLU(Module):
    """x where positive, else negative_slope * x."""

    def __init__(self, negative_slope: float = 0.01):
        self.negative_slope = negative_slope

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = leaky_relu(x, self.negative_slope)
        self.keep(y)
        return y

    def backward(self, grad: np.ndarray) -> np.ndarray:
        (y,) = self.kept()
        return leaky_relu_backward(grad, y, self.negative_slope)

    def describe(self) -> str:
        return f"negative_slope={self.negative_slope}"


class Sigmoid(Module):
    """1 / (1 + exp(-x))"""

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = sigmoid(x)
        self.keep(y)
        return y

    def backward(self, grad: np.ndarray) -> np.ndarray:
        (y,) = self.kept()
        return sigmoid_backward(grad, y)


class Tanh(Module):
    """(exp(x) - exp(-x)) / (exp(x) + exp(-x))"""

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = tanh(x)
        self.keep(y)
        return y

    def backward(self, grad: np.ndarray) -> np.ndarray:
        (y,) = self.kept()
        return tanh_backward(grad, y)


class Softmax(Module):
    """exp(x) / sum(exp(x)) along an axis. Before CrossEntropyLoss it is not needed: that takes the logits."""

    def __init__(self, axis: int = -1):
        self.axis = axis

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = softmax(x, self.axis)
        self.keep(y)
        return y

    def backward(self, grad: np.ndarray) -> np.ndarray:
        (y,) = self.kept()
        return softmax_backward(grad, y, self.axis)

    def describe(self) -> str:
        return f"axis={self.axis}"
