"""Batch normalisation on a GPU: what a backend's kernels (`BatchNormKernels`) are given, in which order they run."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tilewise.kernels.channel_plan import THREADS, Planes, Rows, ceil_div, planes_or_rows

WARPS = THREADS // 32


@dataclass(frozen=True, slots=True)
class BatchNormKernels:
    """How a backend starts its kernels.

    sums(plan, parts, x, sums), gradient_sums(plan, parts, grad, x, mean, sums): parts' sums of every channel.
    finish(place, grid, x, sums, weight, bias, running_mean, running_var, mean, invstd, table, momentum, eps, channels,
        values, apart, parts), gradient_finish(place, grid, invstd, sums, weight, grad_weight, grad_bias, table,
        channels, values, parts): what comes of them. apart: elements from a channel's first to the next one's.
    normalise(plan, grid, x, y, table, mean, var, weight, bias, eps, activation, numbers): the result. table: None in
        evaluation.
    gradient(plan, grid, training, grad, x, result, mean, table, numbers).
    evaluated(place, grid, running_mean, running_var, mean, invstd, eps, channels): what evaluation returns.
    """

    sums: Callable
    finish: Callable
    normalise: Callable
    evaluated: Callable
    gradient_sums: Callable
    gradient_finish: Callable
    gradient: Callable


def sums_numbers(plan: Planes | Rows, parts: int) -> tuple[int | tuple[int, int, int], tuple[int, ...]]:
    """(grid, numbers) of a kernel of sums."""
    if isinstance(plan, Planes):
        return plan.channels * parts, (plan.images, plan.channels, plan.units, parts)
    return (parts, plan.tiles, 1), (plan.pixels, plan.channels, plan.span, plan.rows, parts)


def _image_numbers(plan: Planes | Rows) -> tuple[int | tuple[int, int, int], tuple[int, ...]]:
    """(grid, numbers) of a kernel that writes an image."""
    if isinstance(plan, Planes):
        blocks, group, chunks = plan.groups()
        vectors = plan.units if plan.width > 1 else 0
        return blocks, (plan.images * plan.channels, plan.channels, plan.plane, vectors, group, chunks)
    return (plan.parts(), plan.tiles, 1), (plan.pixels, plan.channels, plan.span, plan.rows)


def _table(place, channels: int, dtype):
    """Three numbers for each channel, of the type that is summed in."""
    return place.empty((3, channels), np.float64 if dtype.itemsize == 8 else np.float32)


def _statistics(kernels: BatchNormKernels, x, plan, weight, bias, running_mean, running_var, momentum, eps):
    """(mean, invstd, table) of x; the running statistics move."""
    place, channels = x.place, plan.channels
    parts = plan.parts() if x.size else 0
    sums = place.empty((2, channels, max(parts, 1)), np.float64)
    if parts:
        kernels.sums(plan, parts, x, sums)
    values, apart = (plan.images * plan.plane, plan.plane) if isinstance(plan, Planes) else (plan.pixels, 1)
    mean, invstd = place.empty((channels,), x.dtype), place.empty((channels,), x.dtype)
    table = _table(place, channels, x.dtype)
    operands = (x, sums, weight, bias, running_mean, running_var, mean, invstd, table, momentum, eps)
    kernels.finish(place, ceil_div(channels, WARPS), *operands, channels, values, apart, parts)
    return mean, invstd, table


def batch_norm(
    kernels: BatchNormKernels, x, running_mean, running_var, weight, bias, *, training, momentum, eps, layout,
    activation, return_stats,
):  # fmt: skip
    place, y = x.place, x.place.empty(x.shape, x.dtype)
    plan = planes_or_rows(x.shape, layout, x.dtype)
    channels = plan.channels
    table, mean, invstd = None, None, None
    if training and channels:
        mean, invstd, table = _statistics(kernels, x, plan, weight, bias, running_mean, running_var, momentum, eps)
    elif return_stats:
        mean, invstd = place.empty((channels,), x.dtype), place.empty((channels,), x.dtype)
        if not training:
            blocks = ceil_div(channels, THREADS)
            kernels.evaluated(place, blocks, running_mean, running_var, mean, invstd, eps, channels)
    if x.size:
        grid, numbers = _image_numbers(plan)
        operands = (x, y, table, running_mean, running_var, weight, bias, eps, activation)
        kernels.normalise(plan, grid, *operands, numbers)
    return (y, mean, invstd) if return_stats else y


def batch_norm_backward(kernels: BatchNormKernels, grad, x, mean, invstd, weight, *, training, layout):
    place = x.place
    result = place.empty(x.shape, x.dtype)
    plan = planes_or_rows(x.shape, layout, x.dtype)
    channels = plan.channels
    grad_weight, grad_bias = place.empty((channels,), x.dtype), place.empty((channels,), x.dtype)
    table = _table(place, channels, x.dtype)
    parts = plan.parts() if x.size else 0
    sums = place.empty((2, channels, max(parts, 1)), np.float64)
    if parts:
        kernels.gradient_sums(plan, parts, grad, x, mean, sums)
    operands = (invstd, sums, weight, grad_weight, grad_bias, table)
    kernels.gradient_finish(
        place, ceil_div(channels, WARPS), *operands, channels, x.size // max(channels, 1), parts
    )  # fmt: skip
    if x.size:
        grid, numbers = _image_numbers(plan)
        kernels.gradient(plan, grid, training, grad, x, result, mean, table, numbers)
    return result, grad_weight, grad_bias
