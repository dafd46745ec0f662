"""Pooling on a GPU: windows and bins, and which of a backend's kernels (`PoolKernels`) runs for which call.

Indices that come from outside (the backwards of max pooling, unpooling) are not checked as on the CPU, since that would
make the caller wait for the device: those that lie outside of the plane are left out, and read as 0.

All kernels see (images, H, W, units) with the channels in units of 16 bytes or of an element: NHWC as it lies, NCHW as
N * C images of one channel. A stride of 0 stands for an adaptive pool's bins.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from tilewise.kernels.channel_plan import THREADS, Rows, ceil_div, unit_width
from tilewise.kernels.copying_plan import WORDS
from tilewise.kernels.shapes import output_size as window_count

SQUARES = ((3, 1), (2, 0))  # (side, padding on the left) of the windows, two apart, that have kernels of their own
_INDEX = np.dtype(np.int64)
_MOST_OWNERS = (1 << 31) - 1  # owners are int32


@dataclass(frozen=True, slots=True)
class Pool:
    """Windows over the images of a tensor. width: elements of a unit; units: units of a pixel's channels."""

    images: int
    size: tuple[int, int]
    out: tuple[int, int]
    units: int
    width: int
    kernel: tuple[int, int] = (0, 0)
    stride: tuple[int, int] = (0, 0)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)

    @property
    def windows(self) -> int:
        """Units of the pooled tensor."""
        return self.images * self.out[0] * self.out[1] * self.units

    @property
    def pixels(self) -> int:
        """Units of the tensor that is pooled."""
        return self.images * self.size[0] * self.size[1] * self.units

    @property
    def shape(self) -> tuple[int, ...]:
        """H, W, OH, OW, units: how the kernels take it."""
        return (*self.size, *self.out, self.units)

    @property
    def low(self) -> tuple[int, int]:
        return self.padding[0][0], self.padding[1][0]

    @property
    def high(self) -> tuple[int, int]:
        return self.padding[0][1], self.padding[1][1]

    @property
    def reach(self) -> tuple[int, int]:
        return self.dilation[0] * (self.kernel[0] - 1), self.dilation[1] * (self.kernel[1] - 1)

    @property
    def side(self) -> int:
        """2 or 3 for windows whose taps are all loaded at once, in vectors; else 0."""
        square = self.width > 1 and self.kernel in ((2, 2), (3, 3)) and self.dilation == (1, 1)
        return self.kernel[0] if square else 0

    def divisor(self, include_pad: bool) -> int:
        """What every window's sum is divided by; 0 where windows differ."""
        result = 1
        axes = (self.size, self.out, self.kernel, self.stride, self.padding)
        for n, count, kernel, stride, (low, high) in zip(*axes, strict=True):
            beyond = (count - 1) * stride - low + kernel > n + high
            if n % count if stride == 0 else beyond or (not include_pad and (low or high)):
                return 0
            result *= kernel if stride else n // count
        return result

    def is_square(self, side: int, stride: int) -> bool:
        """Whether the windows are side x side, `stride` apart, not dilated."""
        return self.kernel == (side, side) and self.stride == (stride, stride) and self.dilation == (1, 1)


def pool_of(shape: tuple[int, ...], out: tuple[int, int], layout: str, dtype, **windows) -> Pool:
    """shape, dtype: of the tensor that is pooled."""
    if layout == "NCHW":
        n, c, h, w = shape
        return Pool(n * c, (h, w), out, 1, 1, **windows)
    n, h, w, c = shape
    width = unit_width(c, dtype)
    return Pool(n, (h, w), out, c // width, width, **windows)


def out_shape(shape: tuple[int, ...], out: tuple[int, int], layout: str) -> tuple[int, ...]:
    return (*shape[:2], *out) if layout == "NCHW" else (shape[0], *out, shape[3])


@dataclass(frozen=True, slots=True)
class PoolKernels:
    """How a backend starts its kernels.

    maximum(pool, x, y, indices), average(pool, x, y, divisor, include_pad): any windows or bins; a divisor of 0 depends
        on the window.
    maximum_columns(square, groups, pool, x, y, indices), average_columns(square, groups, pool, x, y, divisor,
        include_pad): the windows of `columns_of`.
    planes(place, grid, x, y, planes, plane, vectors, group), rows[vector](place, grid, x, y, pixels, channels, span,
        rows): averages of whole planes, NCHW and NHWC.
    maximum_gradient(pool, groups, grad, indices, result), average_gradient(pool, groups, grad, result, divisor,
        include_pad): groups from `groups_of`; None for NHWC.
    """

    maximum: Callable
    average: Callable
    maximum_columns: Callable
    average_columns: Callable
    planes: Callable
    rows: dict[bool, Callable]
    maximum_gradient: Callable
    average_gradient: Callable


@dataclass(frozen=True, slots=True)
class UnpoolKernels:
    forget: Callable
    claim: Callable
    fetch: Callable
    backward: Callable


def _blocks_of(count: int) -> int:
    return ceil_div(count, THREADS)


def columns_of(pool: Pool, layout: str, x, *results) -> tuple[tuple[int, int], tuple[int, int, bool]] | None:
    """((side, padding on the left), groups) of the kernels for NCHW by the common windows; None for other windows.

    groups: of 16 bytes of the result, all of them; those of a row; whether rows are made of whole ones.
    """
    square = pool.kernel[0], pool.low[1]
    known = square in SQUARES and pool.is_square(square[0], 2) and x.dtype.kind not in "iu"
    width = 16 // x.dtype.itemsize
    if layout != "NCHW" or not known or pool.size[1] % width:
        return None
    whole = pool.out[1] % width == 0 and not any(r is not None and r.pointer % 16 for r in results)
    across = ceil_div(pool.out[1], width)
    return square, (pool.images * pool.out[0] * across, across, whole)


def groups_of(pool: Pool, layout: str, result) -> tuple[int, int, bool] | None:
    """For NCHW: groups of 16 bytes of a gradient, those of a row, and whether rows are made of whole ones."""
    if layout != "NCHW":
        return None
    width = 16 // result.dtype.itemsize
    across = ceil_div(pool.size[1], width)
    whole = pool.size[1] % width == 0 and result.pointer % 16 == 0
    return pool.images * pool.size[0] * across, across, whole


def _counts(shape, kernel_size, stride, padding, dilation, ceil_mode, layout) -> tuple[int, int]:
    axes = zip(_plane(shape, layout), kernel_size, stride, padding, dilation, strict=True)
    rows, columns = (window_count(*axis, ceil_mode) for axis in axes)
    return rows, columns


def _plane(shape: tuple[int, ...], layout: str) -> tuple[int, int]:
    height, width = shape[2:] if layout == "NCHW" else shape[1:3]
    return height, width


# ---- maxima


def _maximum(kernels: PoolKernels, x, out, layout, return_indices, **windows):
    y = x.place.empty(out_shape(x.shape, out, layout), x.dtype)
    indices = x.place.empty(y.shape, _INDEX) if return_indices else None
    pool = pool_of(x.shape, out, layout, x.dtype, **windows)
    if y.size and (columns := columns_of(pool, layout, x, y, indices)):
        kernels.maximum_columns(*columns, pool, x, y, indices)
    elif y.size:
        kernels.maximum(pool, x, y, indices)
    return (y, indices) if return_indices else y


def max_pool2d(
    kernels: PoolKernels, x, *, kernel_size, stride, padding, dilation, ceil_mode, return_indices, layout
):  # fmt: skip
    out = _counts(x.shape, kernel_size, stride, padding, dilation, ceil_mode, layout)
    windows = {"kernel": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    return _maximum(kernels, x, out, layout, return_indices, **windows)


def adaptive_max_pool2d(kernels: PoolKernels, x, *, output_size, return_indices, layout):
    return _maximum(kernels, x, output_size, layout, return_indices)


def _maximum_gradient(kernels: PoolKernels, grad, indices, input_shape, layout, **windows):
    result = grad.place.empty(input_shape, grad.dtype)
    if prod(input_shape):
        pool = pool_of(input_shape, _plane(grad.shape, layout), layout, grad.dtype, **windows)
        kernels.maximum_gradient(pool, groups_of(pool, layout, result), grad, indices, result)
    return result


def max_pool2d_backward(
    kernels: PoolKernels, grad, indices, *, input_shape, kernel_size, stride, padding, dilation, ceil_mode, layout
):  # fmt: skip
    windows = {"kernel": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    return _maximum_gradient(kernels, grad, indices, input_shape, layout, **windows)


def adaptive_max_pool2d_backward(kernels: PoolKernels, grad, indices, *, input_shape, layout):
    return _maximum_gradient(kernels, grad, indices, input_shape, layout)


# ---- averages


def avg_pool2d(
    kernels: PoolKernels, x, *, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout
):  # fmt: skip
    out = _counts(x.shape, kernel_size, stride, padding, (1, 1), ceil_mode, layout)
    y = x.place.empty(out_shape(x.shape, out, layout), x.dtype)
    pool = pool_of(x.shape, out, layout, x.dtype, kernel=kernel_size, stride=stride, padding=padding)
    divisor = divisor_override or pool.divisor(count_include_pad)
    if y.size and (columns := columns_of(pool, layout, x, y)):
        kernels.average_columns(*columns, pool, x, y, divisor, count_include_pad)
    elif y.size:
        kernels.average(pool, x, y, divisor, count_include_pad)
    return y


def adaptive_avg_pool2d(kernels: PoolKernels, x, *, output_size, layout):
    y = x.place.empty(out_shape(x.shape, output_size, layout), x.dtype)
    if y.size and output_size == (1, 1):
        _global_average(kernels, x, y, layout)
    elif y.size:
        pool = pool_of(x.shape, output_size, layout, x.dtype)
        kernels.average(pool, x, y, pool.divisor(False), False)
    return y


def _global_average(kernels: PoolKernels, x, y, layout):
    if layout == "NCHW":
        n, c, h, w = x.shape
        width = unit_width(h * w, x.dtype)
        vectors = h * w // width if width > 1 else 0
        group = 32 if (vectors or h * w) <= 32 * 16 else THREADS
        kernels.planes(x.place, _blocks_of(n * c * group), x, y, n * c, h * w, vectors, group)
    else:
        n, h, w, c = x.shape
        plan = Rows(h * w, c, unit_width(c, x.dtype))
        kernels.rows[plan.width > 1](x.place, (n, plan.tiles, 1), x, y, h * w, c, plan.span, plan.rows)


def _average_gradient(kernels: PoolKernels, grad, input_shape, layout, divisor, include_pad, **windows):
    result = grad.place.empty(input_shape, grad.dtype)
    if prod(input_shape):
        pool = pool_of(input_shape, _plane(grad.shape, layout), layout, grad.dtype, **windows)
        by, groups = divisor or pool.divisor(include_pad), groups_of(pool, layout, result)
        kernels.average_gradient(pool, groups, grad, result, by, include_pad)
    return result


def avg_pool2d_backward(
    kernels: PoolKernels, grad, *, input_shape, kernel_size, stride, padding, ceil_mode, count_include_pad,
    divisor_override, layout,
):  # fmt: skip
    windows = {"kernel": kernel_size, "stride": stride, "padding": padding}
    return _average_gradient(kernels, grad, input_shape, layout, divisor_override or 0, count_include_pad, **windows)


def adaptive_avg_pool2d_backward(kernels: PoolKernels, grad, *, input_shape, layout):
    return _average_gradient(kernels, grad, input_shape, layout, 0, False)


# ---- unpooling


def _sizes(shape, layout) -> tuple[int, int]:
    """(pixels of a plane, channels that lie side by side)."""
    return (shape[2] * shape[3], 1) if layout == "NCHW" else (shape[1] * shape[2], shape[3])


def max_unpool2d(kernels: UnpoolKernels, x, indices, *, output_size, layout):
    n, c = x.shape[0], x.shape[1 if layout == "NCHW" else 3]
    shape = (n, c, *output_size) if layout == "NCHW" else (n, *output_size, c)
    pooled, channels = _sizes(x.shape, layout)
    pixels, _ = _sizes(shape, layout)
    if pooled > _MOST_OWNERS:
        raise NotImplementedError(f"max_unpool2d: planes of more than {_MOST_OWNERS} pooled elements on the GPU")
    place, y = x.place, x.place.empty(shape, x.dtype)
    if y.size:
        owners = place.empty(shape, np.int32)
        kernels.forget(place, _blocks_of(y.size), owners, y.size)
        kernels.claim(place, _blocks_of(x.size), indices, owners, x.size, pooled, pixels, channels)
        operands = (x, owners, y, y.size, pooled, pixels, channels)
        kernels.fetch(place, _blocks_of(y.size), *operands, dtype=WORDS[x.dtype.itemsize])
    return y


def max_unpool2d_backward(kernels: UnpoolKernels, grad, indices, *, layout):
    result = grad.place.empty(indices.shape, grad.dtype)
    pooled, channels = _sizes(indices.shape, layout)
    pixels, _ = _sizes(grad.shape, layout)
    if result.size:
        operands = (grad, indices, result, result.size, pooled, pixels, channels)
        kernels.backward(grad.place, _blocks_of(result.size), *operands, dtype=WORDS[grad.dtype.itemsize])
    return result
