"""Padding in Numba, and its gradient: copies of rows, at the speed of memory.

Every padded row and column is a copy of an input row and column, or constant; `_source` says of which. The gradient is
gathered: each chunk owns rows of the result and adds up their copies in a fixed order.
"""

from math import prod

from numba import prange

from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.scratch import empty

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


def prepare_pad(shapes, dtype, *, padding, mode, value):
    """What follows from the shape is worked out once; a call allocates its result and runs one kernel."""
    (top, bottom), (left, right) = padding
    *leading, h, w = shapes[0]
    planes, height, width = prod(leading), top + h + bottom, left + w + right
    size = planes * height * width
    constants = (min(height, CHUNK // max(width, 1) + 1), top, left, _MODES[mode], dtype.type(value))
    kernel = _pad.sized(size * 0.3)

    def run(x):
        y = empty((planes, height, width), dtype)
        if size:
            kernel(x.reshape(planes, h, w), y, *constants)
        return y.reshape(*leading, height, width)

    return run


def pad(x, *, padding, mode, value):
    return prepare_pad((x.shape,), x.dtype, padding=padding, mode=mode, value=value)(x)


def prepare_pad_backward(shapes, dtype, *, input_shape, padding, mode):
    planes, (h, w) = prod(input_shape[:-2]), input_shape[-2:]
    height, width = shapes[0][-2:]
    size = planes * h * w
    constants = (min(h, CHUNK // max(w, 1) + 1), padding[0][0], padding[1][0], _MODES[mode])
    kernel = _gather.sized(planes * height * width * 0.4)

    def run(grad):
        result = empty((planes, h, w), dtype)
        if size:
            kernel(grad.reshape(planes, height, width), result, *constants)
        return result.reshape(input_shape)

    return run


def pad_backward(grad, *, input_shape, padding, mode):
    run = prepare_pad_backward((grad.shape,), grad.dtype, input_shape=input_shape, padding=padding, mode=mode)
    return run(grad)
