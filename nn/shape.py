"""Layers that only change the shape."""

from math import prod

import numpy as np

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
