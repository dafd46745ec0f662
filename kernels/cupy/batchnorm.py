"""Batch normalisation on the GPU; src/batchnorm.cu says how, batchnorm_plan.py in which order the kernels run."""

from functools import partial

from tilewise.kernels import batchnorm_plan
from tilewise.kernels.activation_plan import ACTIVATION_CODES, LEAKY_SLOPE
from tilewise.kernels.channel_plan import Planes
from tilewise.kernels.cupy.batchnorm_gradient import finish as gradient_finish
from tilewise.kernels.cupy.batchnorm_gradient import run_gradient, run_gradient_sums
from tilewise.kernels.cupy.batchnorm_statistics import finish, run_sums
from tilewise.kernels.cupy.launch import Kernel

HAS_BFLOAT16 = True  # operation.py asks

_MOVES = ("LDG.128", "STG.128")
_PARAMETERS = "P P P P P P P r r i"  # x, y, table, mean, var, weight, bias, eps, slope, the activation's code

_planes = Kernel("batchnorm.cu", "batch_norm_planes<{T}>", f"{_PARAMETERS} q q q q i i", promises=_MOVES)
_rows = {
    vector: Kernel(
        "batchnorm.cu", f"batch_norm_rows<{{T}}, {'{N}' if vector else 1}>", f"{_PARAMETERS} q q i i",
        promises=_MOVES if vector else (),
    )
    for vector in (False, True)
}  # fmt: skip
_evaluated = Kernel("batchnorm.cu", "batch_norm_evaluated<{T}>", "P P P P r q")


def _normalise(plan, grid, x, y, table, mean, var, weight, bias, eps, activation, numbers):
    operands = (x, y, table, mean, var, weight, bias, eps, LEAKY_SLOPE, ACTIVATION_CODES[activation])
    run = _planes if isinstance(plan, Planes) else _rows[plan.width > 1]
    run(x.place, grid, *operands, *numbers)


_KERNELS = batchnorm_plan.BatchNormKernels(
    run_sums, finish, _normalise, _evaluated, run_gradient_sums, gradient_finish, run_gradient
)
batch_norm = partial(batchnorm_plan.batch_norm, _KERNELS)
batch_norm_backward = partial(batchnorm_plan.batch_norm_backward, _KERNELS)
