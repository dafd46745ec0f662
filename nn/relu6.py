"""ReLU with a ceiling. There is no kernel of its own: ReLU's, then a minimum in the same memory."""

import numpy as np

from ..kernels import relu, relu_backward
from .module import Module


class ReLU6(Module):
    """min(max(x, 0), 6); the gradient is zero at both ends."""

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
