"""Activation layers. Each keeps its own output, from which the gradient is computed."""

import numpy as np

from ..kernels import (
    leaky_relu,
    leaky_relu_backward,
    log_softmax,
    log_softmax_backward,
    relu,
    relu_backward,
    sigmoid,
    sigmoid_backward,
    sign,
    softmax,
    softmax_backward,
    step,
    tanh,
    tanh_backward,
)
from .module import Module


class Identity(Module):
    """x itself: takes the place of a layer, such as a network's head."""

    def forward(self, x: np.ndarray) -> np.ndarray:
        return x

    def backward(self, grad: np.ndarray) -> np.ndarray:
        return grad


class _Flat(Module):
    """An activation whose slope is 0 wherever it has one: nothing before it learns by gradients."""

    def backward(self, grad: np.ndarray) -> np.ndarray:
        (shape,) = self.kept()
        if grad.shape != shape:
            raise ValueError(f"{type(self).__name__}.backward: grad must have shape {shape}, got {grad.shape}")
        return np.zeros_like(grad)


class Step(_Flat):
    """1 where x > 0, else 0: the perceptron's threshold. Its gradient is 0."""

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = step(x)
        self.keep(y.shape)
        return y


class Sign(_Flat):
    """1 where x > 0, -1 where x < 0, 0 at 0. Its gradient is 0."""

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = sign(x)
        self.keep(y.shape)
        return y


class ReLU(Module):
    """max(x, 0)"""

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = relu(x)
        self.keep(y)
        return y

    def backward(self, grad: np.ndarray) -> np.ndarray:
        (y,) = self.kept()
        return relu_backward(grad, y)


class ReLU6(Module):
    """min(max(x, 0), 6); the gradient is zero at both ends. By the kernel of ReLU, and a minimum in the same memory."""

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = relu(x)
        np.minimum(y, 6, out=y)
        self.keep(y)
        return y

    def backward(self, grad: np.ndarray) -> np.ndarray:
        (y,) = self.kept()
        grad_x = relu_backward(grad, y)
        grad_x[y >= 6] = 0
        return grad_x


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


class LogSoftmax(Module):
    """log(softmax(x)) along an axis, without overflow: what NLLLoss takes. CrossEntropyLoss is both in one."""

    def __init__(self, axis: int = -1):
        self.axis = axis

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = log_softmax(x, self.axis)
        self.keep(y)
        return y

    def backward(self, grad: np.ndarray) -> np.ndarray:
        (y,) = self.kept()
        return log_softmax_backward(grad, y, self.axis)

    def describe(self) -> str:
        return f"axis={self.axis}"
