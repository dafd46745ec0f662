"""Padding in NumPy, and its gradient."""

from typing import Any

import numpy as np

_NUMPY_MODE: dict[str, Any] = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def pad(x, *, padding, mode, value):
    widths = [(0, 0)] * (x.ndim - 2) + list(padding)
    if mode == "constant":
        return np.pad(x, widths, constant_values=value)
    return np.pad(x, widths, mode=_NUMPY_MODE[mode])


def pad_backward(grad, *, input_shape, padding, mode):
    (top, bottom), (left, right) = padding
    h, w = input_shape[-2:]
    if mode == "constant":
        return grad[..., top : top + h, left : left + w].copy()
    # Which input row (column) each padded row (column) is a copy of; the gradient adds up over the copies.
    rows = np.pad(np.arange(h), (top, bottom), mode=_NUMPY_MODE[mode])
    columns = np.pad(np.arange(w), (left, right), mode=_NUMPY_MODE[mode])
    from_rows = np.zeros((*grad.shape[:-2], h, grad.shape[-1]), grad.dtype)
    for padded, row in enumerate(rows):
        from_rows[..., row, :] += grad[..., padded, :]
    result = np.zeros(input_shape, grad.dtype)
    for padded, column in enumerate(columns):
        result[..., column] += from_rows[..., padded]
    return result
