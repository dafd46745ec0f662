"""Numerical gradients in float64, by central differences along random directions of every single input element."""

import numpy as np


def numerical_gradient(function, x: np.ndarray, cotangent: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """d <function(x), cotangent> / dx, element by element. A random cotangent: a plain sum hides swapped indices."""
    assert x.dtype == np.float64
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        ahead, behind = x.copy(), x.copy()
        ahead[index] += step
        behind[index] -= step
        gradient[index] = ((function(ahead) - function(behind)) * cotangent).sum() / (2 * step)
    return gradient


def assert_gradient(actual: np.ndarray, expected: np.ndarray):
    """Central differences with step 1e-6 in float64 are good to about 1e-8 of the largest entry."""
    assert actual.shape == expected.shape
    scale = max(float(np.abs(expected).max()), 1e-3)
    worst = float(np.abs(actual - expected).max())
    assert worst <= 1e-6 * scale, f"gradient off by {worst:.3g} where the largest entry is {scale:.3g}"
