"""Layers that only change the shape."""

from math import prod

import numpy as np

from ..kernels.shapes import integer
from .module import Module


class Flatten(Module):
    """Joins the axes from start_dim to end_dim into one: (N, C, H, W) becomes (N, C * H * W)."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1):
        self.start_dim = start_dim
        self.end_dim = end_dim

    def forward(self, x: np.ndarray) -> np.ndarray:
        first, last = (d + x.ndim if d < 0 else d for d in (self.start_dim, self.end_dim))
        if not 0 <= first <= last < x.ndim:
            raise ValueError(f"Flatten: axes {self.start_dim} to {self.end_dim} are not in an array of shape {x.shape}")
        self.keep(x.shape)
        return x.reshape(*x.shape[:first], prod(x.shape[first : last + 1]), *x.shape[last + 1 :])

    def backward(self, grad: np.ndarray) -> np.ndarray:
        (shape,) = self.kept()
        return grad.reshape(shape)

    def describe(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


class Repeat(Module):
    """A vector, (N, F), once for each of `steps` steps: (N, steps, F), or (steps, N, F) without batch_first.

    What a recurrent layer needs to make a sequence of a vector.
    """

    def __init__(self, steps: int, batch_first: bool = False):
        self.steps = integer("Repeat", "steps", steps)
        self.batch_first = batch_first

    def forward(self, x: np.ndarray) -> np.ndarray:
        if x.ndim != 2:
            raise ValueError(f"Repeat: x must have shape (N, features), got {x.shape}")
        self.keep()
        return np.repeat(np.expand_dims(x, int(self.batch_first)), self.steps, int(self.batch_first))

    def backward(self, grad: np.ndarray) -> np.ndarray:
        self.kept()
        return grad.sum(int(self.batch_first))

    def describe(self) -> str:
        return f"steps={self.steps}, batch_first={self.batch_first}"
