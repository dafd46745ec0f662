"""softmax, log_softmax and their gradients on the GPU; src/activation_softmax*.cu say how."""

from functools import partial

from tilewise.kernels import softmax_plan
from tilewise.kernels.cupy.launch import Kernel
from tilewise.kernels.softmax_plan import SHORT, SoftmaxKernels

GRADIENT_SHORT = 4  # the gradient's SHORT: a lane has units of both operands
_MOVES = ("LDG.128", "STG.128")


_LOGS = {True: "true", False: "false"}


def _kernels(source: str, name: str, operands: str, short: int) -> SoftmaxKernels:
    """Of one source. operands: the kinds of the pointers."""
    short_rows = {
        (vector, log): Kernel(
            source, f"{name}_short_rows<{{T}}, {'{N}' if vector else 1}, {text}>", f"{operands} q i i",
            promises=_MOVES if vector else (),
        )
        for vector in (False, True) for log, text in _LOGS.items()
    }  # fmt: skip
    long_rows = {
        log: Kernel(source, f"{name}_long_rows<{{T}}, {text}>", f"{operands} q q", promises=_MOVES)
        for log, text in _LOGS.items()
    }
    columns = {
        log: Kernel(source, f"{name}_columns<{{T}}, {text}>", f"{operands} q q i i") for log, text in _LOGS.items()
    }
    return SoftmaxKernels(short_rows, long_rows, columns, short)


_SOFTMAX = _kernels("activation_softmax.cu", "softmax", "P P", SHORT)
_GRADIENT = _kernels("activation_softmax_gradient.cu", "softmax_backward", "P P P", GRADIENT_SHORT)
softmax, log_softmax = (partial(softmax_plan.forward, _SOFTMAX, log) for log in (False, True))
softmax_backward, log_softmax_backward = (partial(softmax_plan.backward, _GRADIENT, log) for log in (False, True))
