"""Padding in Numba, and its gradient: copies of rows, at the speed of memory.

Every padded row and column is a copy of an input row and column, or constant; `_source` says of which. The gradient is
gathered: each chunk owns rows of the result and adds up their copies in a fixed order.
"""

from math import prod

import numpy as np
from numba import prange

from tilewise.kernels.cpu.jit import device, kernel

CONSTANT, REFLECT, REPLICATE, CIRCULAR = range(4)
_MODES = {"constant": CONSTANT, "reflect": REFLECT, "replicate": REPLICATE, "circular": CIRCULAR}
CHUNK = 16384  # elements copied by one chunk: 64 kB of float32


@device()
def _source(position, n, before, mode):
    """The input index, of n, which the padded index `position` copies; -1 for the constant."""
    i = position - before
    if 0 <= i < n:
        return i
    if mode == REFLECT:
        return -i if i < 0 else 2 * (n - 1) - i
    if mode == REPLICATE:
        return 0 if i < 0 else n - 1
    if mode == CIRCULAR:
        return i + n if i < 0 else i - n
    return -1


@device()
def _pad_band(x, y, first, last, top, left, mode, value):
    """Rows first to last of one padded plane: the middles as whole rows, then the padded columns from them."""
    h, w = x.shape
    for i in range(first, last):
        result, source = y[i], _source(i, h, top, mode)
        if source < 0:
            for j in range(result.size):
                result[j] = value
        else:
            row, middle = x[source], result[left : left + w]
            for j in range(w):
                middle[j] = row[j]
    for j in range(y.shape[1] - w):
        column = j if j < left else j + w
        source = _source(column, w, left, mode)
        if source < 0:
            for i in range(first, last):
                y[i, column] = value
        else:
            for i in range(first, last):
                y[i, column] = y[i, left + source]


@kernel()
def _pad(x, y, band, top, left, mode, value):
    """Each chunk owns some bands, of `band` rows of one padded plane."""
    planes, height, width = y.shape
    bands = (height + band - 1) // band
    step = CHUNK // (band * width) + 1
    for chunk in prange((planes * bands + step - 1) // step):
        for unit in range(chunk * step, min(chunk * step + step, planes * bands)):
            plane, first = unit // bands, unit % bands * band
            _pad_band(x[plane], y[plane], first, min(first + band, height), top, left, mode, value)


@device()
def _add_columns(row, result, left, mode):
    """Add what lies in a padded row's own padding to the columns that it copies."""
    w = result.size
    for j in range(row.size - w):
        column = j if j < left else j + w
        result[_source(column, w, left, mode)] += row[column]


@device()
def _gather_band(grad, result, first, last, top, left, mode):
    """Rows first to last of one plane's gradient: their own, what is beside them, then the padded rows in order."""
    h, w = result.shape
    for i in range(first, last):
        own, middle = result[i], grad[top + i, left : left + w]
        for j in range(w):
            own[j] = middle[j]
    if mode == CONSTANT:
        return
    for i in range(first, last):
        _add_columns(grad[top + i], result[i], left, mode)
    for r in range(grad.shape[0] - h):
        padded = r if r < top else r + h
        i = _source(padded, h, top, mode)
        if first <= i < last:
            own, middle = result[i], grad[padded, left : left + w]
            for j in range(w):
                own[j] += middle[j]
            _add_columns(grad[padded], own, left, mode)


@kernel()
def _gather(grad, result, band, top, left, mode):
    """Each chunk owns some bands, of `band` rows of one plane of the result."""
    planes, h, w = result.shape
    bands = (h + band - 1) // band
    step = CHUNK // (band * w) + 1
    for chunk in prange((planes * bands + step - 1) // step):
        for unit in range(chunk * step, min(chunk * step + step, planes * bands)):
            plane, first = unit // bands, unit % bands * band
            _gather_band(grad[plane], result[plane], first, min(first + band, h), top, left, mode)


def _band(h: int, w: int) -> int:
    """Rows in a band: about CHUNK elements."""
    return min(h, CHUNK // w + 1)


def pad(x, *, padding, mode, value):
    (top, bottom), (left, right) = padding
    *leading, h, w = x.shape
    y = np.empty((*leading, top + h + bottom, left + w + right), x.dtype)
    if y.size:
        planes = prod(leading)
        height, width = y.shape[-2:]
        result = y.reshape(planes, height, width)
        band = _band(height, width)
        _pad(y.size * 0.3, x.reshape(planes, h, w), result, band, top, left, _MODES[mode], x.dtype.type(value))
    return y


def pad_backward(grad, *, input_shape, padding, mode):
    top, left = padding[0][0], padding[1][0]
    result = np.empty(input_shape, grad.dtype)
    if result.size:
        planes = prod(input_shape[:-2])
        h, w = input_shape[-2:]
        target = result.reshape(planes, h, w)
        _gather(grad.size * 0.4, grad.reshape(planes, *grad.shape[-2:]), target, _band(h, w), top, left, _MODES[mode])
    return result
