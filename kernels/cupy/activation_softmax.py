"""softmax, log_softmax and their gradients on the GPU; src/activation_softmax*.cu say how."""

from math import prod

from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.cupy.launch import THREADS, Kernel
from tilewise.kernels.softmax_plan import SHORT, plan_columns, plan_rows

GRADIENT_SHORT = 4  # the gradient's SHORT: a lane has units of both operands
_MOVES = ("LDG.128", "STG.128")


class _Kernels:
    """Of one source, for short rows, long rows and columns, each by whether it is the logarithm's.

    operands: the kinds of the pointers. short: units of a row that a lane has in its registers.
    """

    def __init__(self, source: str, name: str, operands: str, short: int):
        self.short = short
        logs = {True: "true", False: "false"}
        self._short_rows = {
            (vector, log): Kernel(
                source, f"{name}_short_rows<{{T}}, {'{N}' if vector else 1}, {text}>", f"{operands} q i i",
                promises=_MOVES if vector else (),
            )
            for vector in (False, True) for log, text in logs.items()
        }  # fmt: skip
        self._long_rows = {
            log: Kernel(source, f"{name}_long_rows<{{T}}, {text}>", f"{operands} q q", promises=_MOVES)
            for log, text in logs.items()
        }
        self._columns = {
            log: Kernel(source, f"{name}_columns<{{T}}, {text}>", f"{operands} q q i i") for log, text in logs.items()
        }

    def run(self, operands: tuple, axis: int, log: bool):
        """The operands' shapes are one."""
        x, place = operands[0], operands[0].place
        n, inner = x.shape[axis], prod(x.shape[axis + 1 :])
        rows = x.size // (n * inner)
        if inner > 1:
            tiles, columns = plan_columns(n, inner)
            self._columns[log](place, rows * tiles, *operands, n, inner, tiles, columns)
            return
        vector, group = plan_rows(n, self.short, x.dtype)
        if group:
            self._short_rows[vector, log](place, ceil_div(rows * group, THREADS), *operands, rows, n, group)
        else:
            self._long_rows[log](place, rows, *operands, n, n * x.dtype.itemsize // 16 if vector else 0)


_softmax = _Kernels("activation_softmax.cu", "softmax", "P P", SHORT)
_gradient = _Kernels("activation_softmax_gradient.cu", "softmax_backward", "P P P", GRADIENT_SHORT)


def _forward(x, axis, log):
    y = x.place.empty(x.shape, x.dtype)
    if x.size:
        _softmax.run((x, y), axis, log)
    return y


def _backward(grad, y, axis, log):
    result = y.place.empty(y.shape, y.dtype)
    if y.size:
        _gradient.run((grad, y, result), axis, log)
    return result


def softmax(x, *, axis):
    return _forward(x, axis, False)


def log_softmax(x, *, axis):
    return _forward(x, axis, True)


def softmax_backward(grad, y, *, axis):
    return _backward(grad, y, axis, False)


def log_softmax_backward(grad, y, *, axis):
    return _backward(grad, y, axis, True)
