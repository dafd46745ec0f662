"""The multilayer perceptron."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import DTypeLike

from ..activation import ReLU, Sigmoid, Tanh
from ..batchnorm import BatchNorm1d
from ..containers import Sequential
from ..dropout import Dropout
from ..init import Rng, generator
from ..linear import Linear
from ..module import Module

_ACTIVATIONS = {"relu": ReLU, "tanh": Tanh, "sigmoid": Sigmoid}


def mlp(
    sizes: Sequence[int],
    *,
    activation: str = "relu",
    batch_norm: bool = False,
    dropout: float = 0.0,
    init="default",
    rng: Rng = None,
    dtype: DTypeLike = np.float32,
) -> Sequential:
    """Dense layers for x (..., sizes[0]): after each but the last batch norm (if wanted), the activation, and dropout.

    The state_dict keys are those of torchvision.ops.MLP: "0.weight", "3.weight", ... (with batch norm "0", "1", "4").

    Args:
        sizes: numbers of features, from the input to the output; mlp((784, 512, 10)) has one hidden layer.
        activation: "relu", "tanh" or "sigmoid".
        batch_norm: whether each hidden layer has a BatchNorm1d.
        dropout: the probability in the layers of Dropout.
        init: of every layer; see `Linear`.
        rng: a numpy.random.Generator or a seed, for the initial values and the dropout.

    Raises:
        ValueError: fewer than two sizes; an unknown activation.
    """
    if len(sizes) < 2:
        raise ValueError(f"mlp: sizes must hold the input's and the output's at least, got {tuple(sizes)}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"mlp: activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    rng = generator(rng)
    layers: list[Module] = []
    for features, hidden in pairwise(sizes[:-1]):
        layers.append(Linear(features, hidden, init=init, rng=rng, dtype=dtype))
        if batch_norm:
            layers.append(BatchNorm1d(hidden, dtype=dtype))
        layers += [_ACTIVATIONS[activation](), Dropout(dropout, rng=rng)]
    return Sequential(*layers, Linear(sizes[-2], sizes[-1], init=init, rng=rng, dtype=dtype))
