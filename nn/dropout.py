"""Dropout (Srivastava et al. 2014), in the inverted form: nothing is rescaled at inference.

The choice comes from a counter-based generator, Philox4x64-10 (Salmon et al. 2011): each number is a function of a
key and a counter alone, so that any device, and any thread of it, can compute the numbers of its elements by itself.
"""

import numpy as np

from ..kernels.shapes import integer
from .init import Rng, generator
from .module import Module


def philox(seed: int, call: int, count: int) -> np.ndarray:
    """uint32 numbers, as many as `count`: the words of Philox4x64-10 for one key and consecutive counters.

    Block i (0, 1, ...) is Philox at counter (i + 1, 0, call, 0) and key (seed mod 2**64, seed >> 64): four 64-bit
    words, and so eight numbers, each word's lower half first. The 1 is NumPy's, which counts before it computes.
    """
    words = np.random.Philox(key=seed, counter=call << 128).random_raw(-(-count // 2))
    return words.astype("<u8", copy=False).view("<u4")[:count]


class Dropout(Module):
    """In training each element is zero with probability p, and the others are divided by 1 - p; else the identity.

    Element i in C order is dropped where number i of `philox(seed, calls, ...)` is below p * 2**32: the choice depends
    on the seed, on how often forward was called in training mode before, and on i. `seed` and `calls` may be set; a
    checkpoint of `fit` holds them. They are not in state_dict, whose names are PyTorch's.

    Args:
        p: the probability of dropping an element, from 0 to 1.
        rng: the seed, from 0 to 2**128 - 1, or a numpy.random.Generator to draw one from; None: unpredictable. Layers
            with one seed make one choice: give several layers a generator.
    """

    counters = ("seed", "calls")

    def __init__(self, p: float = 0.5, *, rng: Rng = None):
        if not 0 <= p <= 1:
            raise ValueError(f"Dropout: p must be from 0 to 1, got {p}")
        self.p = p
        if isinstance(rng, (int, np.integer)):
            self.seed = integer("Dropout", "rng", rng, minimum=0)
            if self.seed >> 128:
                raise ValueError(f"Dropout: rng must be below 2**128, got {rng}")
        else:
            self.seed = int(generator(rng).integers(2**63))
        self.calls = 0

    def forward(self, x: np.ndarray) -> np.ndarray:
        if not self.training:
            return x
        scale = x.dtype.type(0 if self.p == 1 else 1 / (1 - self.p))
        numbers = philox(self.seed, self.calls, x.size).reshape(x.shape)
        self.calls += 1
        factors = (numbers >= round(self.p * 2**32)) * scale
        self.keep(factors)
        return x * factors

    def backward(self, grad: np.ndarray) -> np.ndarray:
        (factors,) = self.kept()
        return grad * factors

    def describe(self) -> str:
        return f"p={self.p}"
