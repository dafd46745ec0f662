"""The statistics of batch normalisation on the GPU; src/batchnorm_statistics.cu says how."""

import numpy as np

from tilewise.kernels.channel_plan import Planes, ceil_div
from tilewise.kernels.cupy.launch import THREADS, Kernel, sum_dtype

WARPS = THREADS // 32


def sums_of_channels(source: str, name: str, operands: str) -> dict[tuple[bool, bool], Kernel]:
    """The kernels `name`_of_planes and `name`_of_rows of a source, by whether they are for planes, and for vectors.

    operands: the kinds of their pointers; what follows is the plan's.
    """
    kinds = {True: ("planes", "q q q i"), False: ("rows", "q q i i i")}
    return {
        (planes, vector): Kernel(
            source, f"{name}_of_{kinds[planes][0]}<{{T}}, {'{N}' if vector else 1}>", f"{operands} {kinds[planes][1]}",
            promises=("LDG.128",) if vector else (),
        )
        for planes in (True, False) for vector in (False, True)
    }  # fmt: skip


def run_sums(kernels: dict[tuple[bool, bool], Kernel], plan, parts: int, first, *others):
    """Starts a kernel of `sums_of_channels`; `first` tells its dtype."""
    planes = isinstance(plan, Planes)
    run = kernels[planes, plan.width > 1]
    if planes:
        run(first.place, plan.channels * parts, first, *others, plan.images, plan.channels, plan.units, parts)
    else:
        numbers = (plan.pixels, plan.channels, plan.span, plan.rows, parts)
        run(first.place, (parts, plan.tiles, 1), first, *others, *numbers)


_sums = sums_of_channels("batchnorm_statistics.cu", "sums", "P P")
_finish = Kernel("batchnorm_statistics.cu", "batch_norm_finish<{T}>", "P P P P P P P P P r r q q q i")


def statistics(x, plan, weight, bias, running_mean, running_var, momentum, eps):
    """(mean, invstd, table) of x; the running statistics move."""
    place, channels = x.place, plan.channels
    parts = plan.parts() if x.size else 0
    sums = place.empty((2, channels, max(parts, 1)), np.float64)
    if parts:
        run_sums(_sums, plan, parts, x, sums)
    values, apart = (plan.images * plan.plane, plan.plane) if isinstance(plan, Planes) else (plan.pixels, 1)
    mean, invstd = place.empty((channels,), x.dtype), place.empty((channels,), x.dtype)
    table = place.empty((3, channels), sum_dtype(x.dtype))
    operands = (x, sums, weight, bias, running_mean, running_var, mean, invstd, table, momentum, eps)
    _finish(place, ceil_div(channels, WARPS), *operands, channels, values, apart, parts)
    return mean, invstd, table
