"""The gradient of batch normalisation on the GPU; src/batchnorm_gradient.cu says how."""

import numpy as np

from tilewise.kernels.channel_plan import Planes, Rows, ceil_div, planes_or_rows
from tilewise.kernels.cupy.batchnorm_statistics import WARPS, run_sums, sums_of_channels
from tilewise.kernels.cupy.launch import Kernel, sum_dtype

_SOURCE = "batchnorm_gradient.cu"
_MOVES = ("LDG.128", "STG.128")

_sums = sums_of_channels(_SOURCE, "gradient_sums", "P P P P")
_finish = Kernel(_SOURCE, "batch_norm_backward_finish<{T}>", "P P P P P P q q i")
_planes = {
    training: Kernel(
        _SOURCE, f"batch_norm_backward_planes<{{T}}, {str(training).lower()}>", "P P P P P q q q q i i", promises=_MOVES
    )
    for training in (False, True)
}
_rows = {
    (vector, training): Kernel(
        _SOURCE, f"batch_norm_backward_rows<{{T}}, {'{N}' if vector else 1}, {str(training).lower()}>",
        "P P P P P q q i i", promises=_MOVES if vector else (),
    )
    for vector in (False, True) for training in (False, True)
}  # fmt: skip


def batch_norm_backward(grad, x, mean, invstd, weight, *, training, layout):
    place = x.place
    result = place.empty(x.shape, x.dtype)
    plan = planes_or_rows(x.shape, layout, x.dtype)
    channels = plan.channels
    grad_weight, grad_bias = place.empty((channels,), x.dtype), place.empty((channels,), x.dtype)
    table = place.empty((3, channels), sum_dtype(x.dtype))
    parts = plan.parts() if x.size else 0
    sums = place.empty((2, channels, max(parts, 1)), np.float64)
    if parts:
        run_sums(_sums, plan, parts, grad, x, mean, sums)
    operands = (invstd, sums, weight, grad_weight, grad_bias, table)
    _finish(place, ceil_div(channels, WARPS), *operands, channels, x.size // max(channels, 1), parts)
    operands = (grad, x, result, mean, table)
    if x.size and isinstance(plan, Planes):
        blocks, group, chunks = plan.groups()
        numbers = (plan.images * channels, channels, plan.plane, plan.units if plan.width > 1 else 0, group, chunks)
        _planes[training](place, blocks, *operands, *numbers)
    elif x.size and isinstance(plan, Rows):
        numbers = (plan.pixels, channels, plan.span, plan.rows)
        _rows[plan.width > 1, training](place, (plan.parts(), plan.tiles, 1), *operands, *numbers)
    return result, grad_weight, grad_bias
