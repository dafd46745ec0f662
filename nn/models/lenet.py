"""LeNet-5 (LeCun et al. 1998, "Gradient-based learning applied to document recognition", figure 2)."""

import numpy as np
from numpy.typing import DTypeLike

from ..activation import ReLU, Tanh
from ..containers import Sequential
from ..conv import Conv2d
from ..dropout import Dropout
from ..init import Rng, generator
from ..linear import Linear
from ..pool import AvgPool2d, MaxPool2d
from ..shape import Flatten

_ACTIVATIONS = {"relu": ReLU, "tanh": Tanh}
_POOLS = {"max": MaxPool2d, "avg": AvgPool2d}


def lenet5(
    classes: int = 10,
    channels: int = 1,
    *,
    activation: str = "relu",
    pool: str = "max",
    dropout: float = 0.0,
    init="default",
    rng: Rng = None,
    dtype: DTypeLike = np.float32,
) -> Sequential:
    """LeNet-5 for images (N, channels, 32, 32); the result is (N, classes) logits.

    Conv 6@5x5 - pool 2x2 - conv 16@5x5 - pool 2x2 - dense 120 - dense 84 - dense classes: 61,706 parameters for one
    channel and ten classes. Where it differs from 1998: the second convolution sees all six maps, the pooling has no
    weights, the third convolution, whose maps are single pixels, is written as the dense layer that it is, and the
    output is linear, for CrossEntropyLoss.

    Args:
        activation: "relu", or "tanh" as in 1998.
        pool: "max", or "avg" as in 1998.
        dropout: the probability of a Dropout before the first dense layer; 0 for none.
        init: of every layer; see `Linear`.
        rng: a numpy.random.Generator or a seed, for the initial values and the dropout.

    Raises:
        ValueError: an unknown activation or pool.
    """
    for name, value, known in (("activation", activation, _ACTIVATIONS), ("pool", pool, _POOLS)):
        if value not in known:
            raise ValueError(f"lenet5: {name} must be one of {', '.join(known)}, got {value!r}")
    act, window = _ACTIVATIONS[activation], _POOLS[pool]
    rng = generator(rng)
    return Sequential(
        Conv2d(channels, 6, 5, init=init, rng=rng, dtype=dtype),
        act(),
        window(2),
        Conv2d(6, 16, 5, init=init, rng=rng, dtype=dtype),
        act(),
        window(2),
        Flatten(),
        *((Dropout(dropout, rng=rng),) if dropout else ()),
        Linear(16 * 5 * 5, 120, init=init, rng=rng, dtype=dtype),
        act(),
        Linear(120, 84, init=init, rng=rng, dtype=dtype),
        act(),
        Linear(84, classes, init=init, rng=rng, dtype=dtype),
    )
