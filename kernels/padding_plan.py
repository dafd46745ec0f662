"""How padding and its gradient are given to a GPU backend's kernels (`run`): a thread for 16 bytes of the result.

A row of the result need not be made of whole vectors: a thread goes on into the next row, and only the stores are of 16
bytes, the loads are one element each of neighbouring addresses.
"""

from math import prod

from tilewise.kernels.channel_plan import THREADS, ceil_div

CONSTANT, REFLECT, REPLICATE, CIRCULAR = range(4)
_CODES = {"constant": CONSTANT, "reflect": REFLECT, "replicate": REPLICATE, "circular": CIRCULAR}


def _blocks(result) -> int:
    return ceil_div(result.nbytes, 16 * THREADS)


def pad(run, x, *, padding, mode, value):
    (top, bottom), (left, right) = padding
    height, width = x.shape[-2:]
    size = (height + top + bottom, width + left + right)
    y = x.place.empty((*x.shape[:-2], *size), x.dtype)
    if y.size:
        numbers = (y.size, height, width, *size, top, left, _CODES[mode], y.pointer % 16 == 0)
        run(x.place, _blocks(y), x, y, value, *numbers)
    return y


def pad_backward(run, grad, *, input_shape, padding, mode):
    result = grad.place.empty(input_shape, grad.dtype)
    (top, bottom), (left, right) = padding
    if prod(input_shape):
        numbers = (*input_shape[-2:], top, bottom, left, right, _CODES[mode], result.pointer % 16 == 0)
        run(grad.place, _blocks(result), grad, result, result.size, *numbers)
    return result
