"""Pooling inside @njit. Native: max, average and adaptive pooling, and the gradients of the maxima."""

import numpy as np
from numba import types
from numba.core.errors import TypingError

from tilewise.kernels.cpu import pool_windows
from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.njit.arguments import (
    WrongShape,
    as_padding,
    as_pair,
    check_arrays,
    check_integer,
    check_padding,
    check_pairs,
    is_absent,
    literal,
    pair_or,
)
from tilewise.kernels.njit.images import (
    batch,
    check_channels,
    check_images,
    check_options,
    plane,
    resized,
    settled_padding,
    unbatch,
    window_count,
)
from tilewise.kernels.njit.linking import call_kernel

LAYOUTS = "NCHW", "NHWC"
extents_along, plan_fields = device(allocates=True)(pool_windows._extents), pool_windows.plan_fields


@device(raises=True)
def _windows(function, shape, nhwc, kernel, stride, name, padding, dilation, ceil_mode):
    """(the result's shape, the padding in numbers)."""
    check_channels(shape, nhwc)
    check_options(function, kernel, stride, padding, dilation)
    h, w = plane(shape, nhwc)
    sides = settled_padding(name, padding, (h, w), kernel, stride, dilation)
    oh = window_count(function, h, kernel[0], stride[0], sides[0], dilation[0], ceil_mode)
    ow = window_count(function, w, kernel[1], stride[1], sides[1], dilation[1], ceil_mode)
    return resized(shape, nhwc, oh, ow), sides


@kernel(parallel=False)
def maxima(x, nhwc, kernel, stride, name, padding, dilation, ceil_mode):
    shape, sides = _windows("max_pool2d", x.shape, nhwc, kernel, stride, name, padding, dilation, ceil_mode)
    y = np.empty(shape, x.dtype)
    starts = (sides[0][0], sides[1][0])
    plan = np.array(plan_fields(x.shape, shape, x.itemsize, nhwc, kernel, stride, starts, dilation))
    call_kernel("cpu.pool_windows.max_values", (x, y, x.dtype.type(-np.inf), plan))
    return y


@kernel(parallel=False)
def indexed_maxima(x, nhwc, kernel, stride, name, padding, dilation, ceil_mode):
    shape, sides = _windows("max_pool2d", x.shape, nhwc, kernel, stride, name, padding, dilation, ceil_mode)
    y, indices = np.empty(shape, x.dtype), np.empty(shape, np.int64)
    starts = sides[0][0], sides[1][0]
    call_kernel("cpu.pool_indices.max_with_indices", (x, y, indices, nhwc, *kernel, *stride, *starts, *dilation))
    return y, indices


@device(allocates=True)
def _divisors(heights, widths, override, like):
    """As pool_windows.as_divisors; override: 0 for none."""
    divisor = override
    if divisor == 0 and (heights == heights[0]).all() and (widths == widths[0]).all():
        divisor = heights[0] * widths[0]
    if divisor:
        single = np.zeros(2, like.dtype)
        single[0] = 1 / divisor if divisor & (divisor - 1) == 0 else 0.0
        single[1] = divisor
        return single
    both = np.empty(heights.size + widths.size, like.dtype)
    both[: heights.size] = heights
    both[heights.size :] = widths
    return both


@kernel(parallel=False)
def averages(x, nhwc, kernel, stride, name, padding, ceil_mode, count_padding, override):
    shape, sides = _windows("avg_pool2d", x.shape, nhwc, kernel, stride, name, padding, (1, 1), ceil_mode)
    y = np.empty(shape, x.dtype)
    starts = sides[0][0], sides[1][0]
    plan = np.array(plan_fields(x.shape, shape, x.itemsize, nhwc, kernel, stride, starts, (1, 1)))
    (oh, ow), (h, w) = plane(shape, nhwc), plane(x.shape, nhwc)
    heights = extents_along(oh, h, kernel[0], stride[0], sides[0], count_padding)
    widths = extents_along(ow, w, kernel[1], stride[1], sides[1], count_padding)
    call_kernel("cpu.pool_windows.averages", (x, y, plan, _divisors(heights, widths, override, x)))
    return y


@device(raises=True)
def _bins(function, shape, nhwc, size):
    """The result's shape."""
    check_channels(shape, nhwc)
    h, w = plane(shape, nhwc)
    if h == 0 or w == 0:
        raise WrongShape("{}: the image must have at least 1 pixel, got height {}, width {}", function, h, w)
    if size[0] < 1 or size[1] < 1:
        raise WrongShape("{}: output_size must be at least 1, got {}", function, size)
    return resized(shape, nhwc, size[0], size[1])


@device(allocates=True)
def _bin_sizes(n, count):
    sizes = np.empty(count, np.int64)
    for i in range(count):
        sizes[i] = ((i + 1) * n + count - 1) // count - i * n // count
    return sizes


@kernel(parallel=False)
def adaptive_averages(x, nhwc, size):
    shape = _bins("adaptive_avg_pool2d", x.shape, nhwc, size)
    y = np.empty(shape, x.dtype)
    h, w = plane(x.shape, nhwc)
    divisors = _divisors(_bin_sizes(h, size[0]), _bin_sizes(w, size[1]), 0, x)
    call_kernel("cpu.pool_bins.adaptive_averages", (x, y, nhwc, divisors))
    return y


@kernel(parallel=False)
def adaptive_maxima(x, nhwc, size):
    y = np.empty(_bins("adaptive_max_pool2d", x.shape, nhwc, size), x.dtype)
    call_kernel("cpu.pool_bins.adaptive_max_values", (x, y, nhwc))
    return y


@kernel(parallel=False)
def indexed_adaptive_maxima(x, nhwc, size):
    shape = _bins("adaptive_max_pool2d", x.shape, nhwc, size)
    y, indices = np.empty(shape, x.dtype), np.empty(shape, np.int64)
    call_kernel("cpu.pool_indices.adaptive_max_with_indices", (x, y, indices, nhwc))
    return y, indices


@kernel(parallel=False)
def scattered(grad, indices, shape, nhwc):
    """The gradient of maxima, from their indices."""
    result = np.empty(shape, grad.dtype)
    if call_kernel("cpu.pool_scatter.scatter", (grad, indices, result, nhwc, True)):
        h, w = plane(shape, nhwc)
        raise WrongShape(
            "max_pool2d_backward: indices must lie in 0 to {} (a plane of {} x {}), got {} to {}",
            h * w - 1, h, w, indices.min(), indices.max(),
        )  # fmt: skip
    return result


def max_pool2d(
    x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False, layout="NCHW"
):
    nhwc, name = _check_windows("max_pool2d", x, kernel_size, stride, padding, layout)
    check_pairs("max_pool2d", dilation=dilation)
    if literal("max_pool2d", "return_indices", return_indices, False, True):

        def with_indices(
            x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False, layout="NCHW"
        ):
            options = as_pair(kernel_size), pair_or(stride, kernel_size), name, as_padding(padding), as_pair(dilation)
            y, indices = call_kernel("njit.pool.indexed_maxima", (batch(x), nhwc, *options, bool(ceil_mode)))
            return unbatch(y, x), unbatch(indices, x)

        return with_indices

    def implementation(
        x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False, layout="NCHW"
    ):
        options = as_pair(kernel_size), pair_or(stride, kernel_size), name, as_padding(padding), as_pair(dilation)
        return unbatch(call_kernel("njit.pool.maxima", (batch(x), nhwc, *options, bool(ceil_mode))), x)

    return implementation


def _check_windows(function: str, x, kernel_size, stride, padding, layout) -> tuple[bool, int]:
    """(whether the layout is NHWC, the padding's name)."""
    layout = literal(function, "layout", layout, *LAYOUTS)
    check_arrays(function, x=x)
    check_images(function, layout, x=x)
    check_pairs(function, kernel_size=kernel_size)
    if not is_absent(stride):
        check_pairs(function, stride=stride)
    return layout == "NHWC", check_padding(function, padding, named=True)


def avg_pool2d(
    x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None,
    layout="NCHW",
):  # fmt: skip
    nhwc, name = _check_windows("avg_pool2d", x, kernel_size, stride, padding, layout)
    given = not is_absent(divisor_override)
    if given:
        check_integer("avg_pool2d", divisor_override=divisor_override)

    def implementation(
        x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None,
        layout="NCHW",
    ):  # fmt: skip
        divisor = divisor_override if given else 0
        if given and divisor < 1:
            raise WrongShape("avg_pool2d: divisor_override must be at least 1, got {}", divisor)
        options = as_pair(kernel_size), pair_or(stride, kernel_size), name, as_padding(padding), bool(ceil_mode)
        y = call_kernel("njit.pool.averages", (batch(x), nhwc, *options, bool(count_include_pad), np.int64(divisor)))
        return unbatch(y, x)

    return implementation


def _check_bins(function: str, x, output_size, layout) -> bool:
    layout = literal(function, "layout", layout, *LAYOUTS)
    check_arrays(function, x=x)
    check_images(function, layout, x=x)
    check_pairs(function, output_size=output_size)
    return layout == "NHWC"


def adaptive_avg_pool2d(x, output_size, layout="NCHW"):
    nhwc = _check_bins("adaptive_avg_pool2d", x, output_size, layout)

    def implementation(x, output_size, layout="NCHW"):
        return unbatch(call_kernel("njit.pool.adaptive_averages", (batch(x), nhwc, as_pair(output_size))), x)

    return implementation


def adaptive_max_pool2d(x, output_size, return_indices=False, layout="NCHW"):
    nhwc = _check_bins("adaptive_max_pool2d", x, output_size, layout)
    if literal("adaptive_max_pool2d", "return_indices", return_indices, False, True):

        def with_indices(x, output_size, return_indices=False, layout="NCHW"):
            y, indices = call_kernel(
                "njit.pool.indexed_adaptive_maxima", (batch(x), nhwc, as_pair(output_size))
            )  # fmt: skip
            return unbatch(y, x), unbatch(indices, x)

        return with_indices

    def implementation(x, output_size, return_indices=False, layout="NCHW"):
        return unbatch(call_kernel("njit.pool.adaptive_maxima", (batch(x), nhwc, as_pair(output_size))), x)

    return implementation


def max_pool2d_backward(
    grad, indices, input_shape, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, layout="NCHW"
):
    nhwc, _ = _check_windows("max_pool2d_backward", grad, kernel_size, stride, padding, layout)
    if not isinstance(indices, types.Array) or indices.dtype != types.int64 or indices.ndim != grad.ndim:
        raise TypingError(f"max_pool2d_backward: indices must be int64 and of grad's shape, got {indices}")
    if not isinstance(input_shape, types.UniTuple) or len(input_shape) != grad.ndim:
        raise TypingError(f"max_pool2d_backward: input_shape must be x's shape, {grad.ndim} ints, got {input_shape}")

    def implementation(
        grad, indices, input_shape, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, layout="NCHW"
    ):
        if grad.shape != indices.shape:
            raise WrongShape(
                "max_pool2d_backward: indices must have grad's shape {}, got {}", grad.shape, indices.shape
            )
        result = np.empty(input_shape, grad.dtype)
        shape, given = batch(result).shape, batch(grad).shape
        if shape[0] != given[0] or (shape[3] != given[3] if nhwc else shape[1] != given[1]):
            raise WrongShape("max_pool2d_backward: grad {} does not fit input_shape {}", grad.shape, input_shape)
        return unbatch(call_kernel("njit.pool.scattered", (batch(grad), batch(indices), shape, nhwc)), grad)

    return implementation
