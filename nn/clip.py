"""Clipping of gradients, between backward and the optimiser's step; against exploding gradients (Pascanu et al. 2013).

`fit(..., before_step=lambda: clip_grad_norm_(model.parameters(), 1.0))`. Names and arguments are PyTorch's.
"""

import math
from collections.abc import Iterable

import numpy as np

from ..kernels.shapes import number
from .module import Parameter


def clip_grad_norm_(
    parameters: Iterable[Parameter], max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> float:
    """Scale all gradients, in place, by one factor so that their common norm is at most max_norm.

    Args:
        parameters: those without a gradient are passed over.
        max_norm: the largest norm that is left alone.
        norm_type: p of the p-norm over all elements of all gradients; inf for the largest element.
        error_if_nonfinite: raise for a norm of NaN or Inf, instead of spreading it.

    Returns:
        The norm before, in float64: the same bits for any number of threads.

    Raises:
        TypeError, ValueError: a max_norm or norm_type that is no positive number.
        RuntimeError: error_if_nonfinite, and the norm is not finite. The gradients are as they were.
    """
    max_norm = number("clip_grad_norm_", "max_norm", max_norm)
    power = math.inf if norm_type == math.inf else number("clip_grad_norm_", "norm_type", norm_type, positive=True)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = _norm(grads, power)
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(f"clip_grad_norm_: the norm of the gradients is {norm}")
    factor = max_norm / (norm + 1e-6)
    if not factor >= 1:  # also for NaN
        for grad in grads:
            grad *= grad.dtype.type(factor)
    return norm


def _norm(grads: list[np.ndarray], power: float) -> float:
    """In float64, whose squares of float32 values do not overflow."""
    if power == math.inf:
        return float(max((np.abs(grad).max(initial=0) for grad in grads), default=0.0))
    if power == 2:
        return sum(float(np.square(grad, dtype=np.float64).sum()) for grad in grads) ** 0.5
    return sum(float((np.abs(grad, dtype=np.float64) ** power).sum()) for grad in grads) ** (1 / power)


def clip_grad_value_(parameters: Iterable[Parameter], clip_value: float):
    """Bring every element of every gradient, in place, into [-clip_value, clip_value]; NaN stays.

    Raises:
        TypeError, ValueError: clip_value is no number of at least 0.
    """
    limit = number("clip_grad_value_", "clip_value", clip_value)
    for parameter in parameters:
        if parameter.grad is not None:
            np.clip(parameter.grad, -limit, limit, out=parameter.grad)
