"""Dropout (Srivastava et al. 2014), in the inverted form: nothing is rescaled at inference."""

import numpy as np

from ..kernels import dropout, dropout_backward
from ..kernels.shapes import integer, probability
from .init import Rng, generator
from .module import Module


class Dropout(Module):
    """In training each element is zero with probability p, and the others are divided by 1 - p; else the identity.

    Which ones, `tilewise.dropout` tells from the seed, from how often forward was called in training mode before, and
    from an element's place, alike on every device; nothing is kept for backward. `seed` and `calls` may be set; a
    checkpoint of `fit` holds them. They are not in state_dict, whose names are PyTorch's.

    Args:
        p: the probability of dropping an element, from 0 to 1.
        rng: the seed, from 0 to 2**64 - 1, or a numpy.random.Generator to draw one from; None: unpredictable. Layers
            with one seed make one choice: give several layers a generator.
    """

    counters = ("seed", "calls")

    def __init__(self, p: float = 0.5, *, rng: Rng = None):
        self.p = probability("Dropout", "p", p)
        if isinstance(rng, (int, np.integer)):
            self.seed = integer("Dropout", "rng", rng, minimum=0)
            if self.seed >> 64:
                raise ValueError(f"Dropout: rng must be below 2**64, got {rng}")
        else:
            self.seed = int(generator(rng).integers(2**63))
        self.calls = 0

    def forward(self, x: np.ndarray) -> np.ndarray:
        if not self.training:
            return x
        choice = {"p": self.p, "seed": self.seed, "call": self.calls}
        y = dropout(x, **choice)
        self.calls += 1
        self.keep(x.shape, choice)
        return y

    def backward(self, grad: np.ndarray) -> np.ndarray:
        shape, choice = self.kept()
        if grad.shape != shape:
            raise ValueError(f"Dropout.backward: grad must have shape {shape}, got {grad.shape}")
        return dropout_backward(grad, **choice)

    def describe(self) -> str:
        return f"p={self.p}"
