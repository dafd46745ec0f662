"""Dropout (Srivastava et al. 2014), in the inverted form: nothing is rescaled at inference."""

import numpy as np

from .init import Rng, generator
from .module import Module


class Dropout(Module):
    """In training each element is zero with probability p, and the others are divided by 1 - p; else the identity.

    Args:
        p: the probability of dropping an element, from 0 to 1.
        rng: a numpy.random.Generator or a seed, for the choice.
    """

    def __init__(self, p: float = 0.5, *, rng: Rng = None):
        if not 0 <= p <= 1:
            raise ValueError(f"Dropout: p must be from 0 to 1, got {p}")
        self.p = p
        self.rng = generator(rng)

    def forward(self, x: np.ndarray) -> np.ndarray:
        if not self.training:
            return x
        scale = x.dtype.type(0 if self.p == 1 else 1 / (1 - self.p))
        factors = (self.rng.random(x.shape, np.float32) >= np.float32(self.p)) * scale
        self.keep(factors)
        return x * factors

    def backward(self, grad: np.ndarray) -> np.ndarray:
        (factors,) = self.kept()
        return grad * factors

    def describe(self) -> str:
        return f"p={self.p}"
