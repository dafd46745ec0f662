"""Padding in Numba, and its gradient: copies of rows, at the speed of memory.

Every padded row and column is a copy of an input row and column, or constant; `_source` says of which. The gradient is
gathered: each chunk owns rows of the result and adds up their copies in a fixed order.

Rows of a few elements are not worth a loop each. Such small planes go through a table, made once for a shape, that
holds the source of every padded element; the constant is an element of its own behind the plane.
"""

from math import prod

import numpy as np
from numba import prange

from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.scratch import empty

CONSTANT, REFLECT, REPLICATE, CIRCULAR = range(4)
_MODES = {"constant": CONSTANT, "reflect": REFLECT, "replicate": REPLICATE, "circular": CIRCULAR}
CHUNK = 16384  # elements copied by one chunk: 64 kB of float32
SHORT = 32  # padded rows up to this length go through the table


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


@kernel()
def _pad_by_table(x, y, table, value):
    """x: (planes, elements), y: (planes, padded elements); each chunk owns some planes."""
    planes, size = x.shape
    step = CHUNK // y.shape[1] + 1
    for chunk in prange((planes + step - 1) // step):
        plane = np.empty(size + 1, x.dtype)
        plane[size] = value
        for p in range(chunk * step, min(chunk * step + step, planes)):
            for i in range(size):
                plane[i] = x[p, i]
            for k in range(table.size):
                y[p, k] = plane[table[k]]


@kernel()
def _gather_by_table(grad, result, table):
    """Each chunk owns some planes; a plane's gradients are added in the order of the padded elements."""
    planes, size = result.shape
    step = CHUNK // grad.shape[1] + 1
    for chunk in prange((planes + step - 1) // step):
        plane = np.empty(size + 1, grad.dtype)
        for p in range(chunk * step, min(chunk * step + step, planes)):
            plane[:] = 0
            for k in range(table.size):
                plane[table[k]] += grad[p, k]
            for i in range(size):
                result[p, i] = plane[i]


def _table(h: int, w: int, padding, mode: int) -> np.ndarray:
    """Which element of the flat input plane each padded element copies; h * w stands for the constant.

    Unsigned, so that Numba does not look for negative indices.
    """
    (top, bottom), (left, right) = padding
    source = _source.py_func  # pyright: ignore[reportFunctionMemberAccess]
    rows = np.array([source(i, h, top, mode) for i in range(top + h + bottom)])[:, None]
    columns = np.array([source(j, w, left, mode) for j in range(left + w + right)])
    return np.where((rows < 0) | (columns < 0), h * w, rows * w + columns).ravel().astype(np.uint64)


def prepare_pad(shapes, dtype, *, padding, mode, value):
    """What follows from the shape is worked out once; a call allocates its result and runs one kernel."""
    (top, bottom), (left, right) = padding
    *leading, h, w = shapes[0]
    planes, height, width = prod(leading), top + h + bottom, left + w + right
    size = planes * height * width
    shape, flat = (planes, height, width), (planes, h, w)
    constants = (min(height, CHUNK // max(width, 1) + 1), top, left, _MODES[mode], dtype.type(value))
    kernel = _pad.sized(size * 0.3)
    if width <= SHORT and height <= SHORT:
        shape, flat = (planes, height * width), (planes, h * w)
        constants = (_table(h, w, padding, _MODES[mode]), dtype.type(value))
        kernel = _pad_by_table.sized(size * 0.6)

    def run(x):
        y = empty(shape, dtype)
        if size:
            kernel(x.reshape(flat), y, *constants)
        return y.reshape(*leading, height, width)

    return run


def pad(x, *, padding, mode, value):
    return prepare_pad((x.shape,), x.dtype, padding=padding, mode=mode, value=value)(x)


def prepare_pad_backward(shapes, dtype, *, input_shape, padding, mode):
    planes, (h, w) = prod(input_shape[:-2]), input_shape[-2:]
    height, width = shapes[0][-2:]
    size = planes * h * w
    shape, flat = (planes, h, w), (planes, height, width)
    constants = (min(h, CHUNK // max(w, 1) + 1), padding[0][0], padding[1][0], _MODES[mode])
    kernel = _gather.sized(planes * height * width * 0.4)
    if mode != "constant" and width <= SHORT and height <= SHORT:
        shape, flat = (planes, h * w), (planes, height * width)
        constants = (_table(h, w, padding, _MODES[mode]),)
        kernel = _gather_by_table.sized(planes * height * width)

    def run(grad):
        result = empty(shape, dtype)
        if size:
            kernel(grad.reshape(flat), result, *constants)
        return result.reshape(input_shape)

    return run


def pad_backward(grad, *, input_shape, padding, mode):
    run = prepare_pad_backward((grad.shape,), grad.dtype, input_shape=input_shape, padding=padding, mode=mode)
    return run(grad)
