"""Batch normalisation on the GPU; src/batchnorm.cu says how."""

from tilewise.kernels.channel_plan import Planes, ceil_div, planes_or_rows
from tilewise.kernels.cupy.activation_codes import ACTIVATION_CODES, LEAKY_SLOPE
from tilewise.kernels.cupy.batchnorm_gradient import batch_norm_backward  # noqa: F401
from tilewise.kernels.cupy.batchnorm_statistics import statistics
from tilewise.kernels.cupy.launch import THREADS, Kernel

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


def _normalise(plan, x, y, table, mean, var, weight, bias, eps, activation):
    operands = (x, y, table, mean, var, weight, bias, eps, LEAKY_SLOPE, ACTIVATION_CODES[activation])
    if isinstance(plan, Planes):
        blocks, group, chunks = plan.groups()
        vectors = plan.units if plan.width > 1 else 0
        numbers = (plan.images * plan.channels, plan.channels, plan.plane, vectors, group, chunks)
        _planes(x.place, blocks, *operands, *numbers)
    else:
        numbers = (plan.pixels, plan.channels, plan.span, plan.rows)
        _rows[plan.width > 1](x.place, (plan.parts(), plan.tiles, 1), *operands, *numbers)


def batch_norm(
    x, running_mean, running_var, weight, bias, *, training, momentum, eps, layout, activation, return_stats
):
    place, y = x.place, x.place.empty(x.shape, x.dtype)
    plan = planes_or_rows(x.shape, layout, x.dtype)
    channels = plan.channels
    table, mean, invstd = None, None, None
    if training and channels:
        mean, invstd, table = statistics(x, plan, weight, bias, running_mean, running_var, momentum, eps)
    elif return_stats:
        mean, invstd = place.empty((channels,), x.dtype), place.empty((channels,), x.dtype)
        if not training:
            _evaluated(place, ceil_div(channels, THREADS), running_mean, running_var, mean, invstd, eps, channels)
    if x.size:
        _normalise(plan, x, y, table, running_mean, running_var, weight, bias, eps, activation)
    return (y, mean, invstd) if return_stats else y
