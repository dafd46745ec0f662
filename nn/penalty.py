"""L1 regularisation. L2 is the optimisers' weight_decay: lambda for a penalty of lambda / 2 * sum(w**2)."""

from collections.abc import Iterable

import numpy as np

from ..kernels.shapes import number
from .module import Parameter


def l1_penalty_(parameters: Iterable[Parameter], strength: float) -> float:
    """Add strength * sign(w), the gradient of the penalty strength * sum(|w|), to every gradient in place.

    Called between backward and the optimiser's step: `fit(..., before_step=lambda: l1_penalty_(weights, 1e-4))`. It
    drives weights to 0, where weight_decay only makes them small. Biases are mostly left out.

    Args:
        parameters: those without a gradient are passed over.
        strength: at least 0.

    Returns:
        The penalty, which is part of the loss that is descended.

    Raises:
        TypeError, ValueError: strength is no number of at least 0.
    """
    strength, total = number("l1_penalty_", "strength", strength), 0.0
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad += parameter.dtype.type(strength) * np.sign(parameter.data)
            total += float(np.abs(parameter.data, dtype=np.float64).sum())
    return strength * total
