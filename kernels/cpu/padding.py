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
def _pad_row(row, result, left, mode, value):
    w = row.size
    for j in range(left):
        source = _source(j, w, left, mode)
        result[j] = value if source < 0 else row[source]
    middle = result[left : left + w]
    for j in range(w):
        middle[j] = row[j]
    for j in range(left + w, result.size):
        source = _source(j, w, left, mode)
        result[j] = value if source < 0 else row[source]


@kernel()
def _pad(x, y, top, left, mode, value):
    """Each chunk owns some rows of the result."""
    h = x.shape[1]
    planes, height, width = y.shape
    rows = planes * height
    step = CHUNK // width + 1
    for chunk in prange((rows + step - 1) // step):
        for r in range(chunk * step, min(chunk * step + step, rows)):
            plane, i = r // height, r % height
            source = _source(i, h, top, mode)
            result = y[plane, i]
            if source < 0:
                for j in range(width):
                    result[j] = value
            else:
                _pad_row(x[plane, source], result, left, mode, value)


@device()
def _add_row(row, result, left, mode):
    """Add a padded row's gradients to those of the columns that they copy."""
    w = result.size
    middle = row[left : left + w]
    for j in range(w):
        result[j] += middle[j]
    for j in range(left):
        result[_source(j, w, left, mode)] += row[j]
    for j in range(left + w, row.size):
        result[_source(j, w, left, mode)] += row[j]


@kernel()
def _gather(grad, result, top, left, mode):
    """Each chunk owns some rows of the result."""
    planes, h, w = result.shape
    height = grad.shape[1]
    rows = planes * h
    step = CHUNK // (w + 1) + 1
    for chunk in prange((rows + step - 1) // step):
        for r in range(chunk * step, min(chunk * step + step, rows)):
            plane, i = r // h, r % h
            own = result[plane, i]
            if mode == CONSTANT:
                middle = grad[plane, top + i, left : left + w]
                for j in range(w):
                    own[j] = middle[j]
            else:
                for j in range(w):
                    own[j] = 0
                _add_row(grad[plane, top + i], own, left, mode)
                for above in range(top):
                    if _source(above, h, top, mode) == i:
                        _add_row(grad[plane, above], own, left, mode)
                for below in range(top + h, height):
                    if _source(below, h, top, mode) == i:
                        _add_row(grad[plane, below], own, left, mode)


def pad(x, *, padding, mode, value):
    (top, bottom), (left, right) = padding
    *leading, h, w = x.shape
    y = np.empty((*leading, top + h + bottom, left + w + right), x.dtype)
    if y.size:
        planes = prod(leading)
        result = y.reshape(planes, *y.shape[-2:])
        _pad(y.size * 0.3, x.reshape(planes, h, w), result, top, left, _MODES[mode], x.dtype.type(value))
    return y


def pad_backward(grad, *, input_shape, padding, mode):
    top, left = padding[0][0], padding[1][0]
    result = np.empty(input_shape, grad.dtype)
    if result.size:
        planes = prod(input_shape[:-2])
        target = result.reshape(planes, *input_shape[-2:])
        _gather(grad.size * 0.4, grad.reshape(planes, *grad.shape[-2:]), target, top, left, _MODES[mode])
    return result
