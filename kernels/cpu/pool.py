"""Pooling on the CPU: the results' sizes, the estimate of the work, and what is worked out once per signature.

The kernels: pool_windows (maxima and averages of windows; pool_planes and pool_quads for the commonest of them),
pool_indices (maxima with their places), pool_bins (adaptive forms), pool_spread (gradient of averages), pool_match and
pool_scatter (gradient of maxima, unpooling); pool_fold has the vector loops under them.
"""

from math import prod

import numpy as np

from tilewise.kernels.cpu import pool_bins, pool_indices, pool_match, pool_scatter, pool_spread, pool_windows
from tilewise.kernels.cpu.pool_bins import bounds as bin_bounds
from tilewise.kernels.cpu.pool_spread import windows
from tilewise.kernels.cpu.pool_windows import as_divisors, extents_of, inverse_divisors, plan_of
from tilewise.kernels.cpu.scratch import ALIGNED_FROM, empty
from tilewise.kernels.shapes import output_size as window_count
from tilewise.kernels.shapes import outside_plane

# What a tap in the padding counts as in a maximum.
_LOWEST = {np.dtype(t): t(-np.inf) for t in (np.float32, np.float64)} | {
    np.dtype(t): t(np.iinfo(t).min)
    for t in (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64)
}
# Estimated nanoseconds, for the choice between serial and parallel: a byte at 20 GB/s; a tap of a maximum with indices;
# an element whose place is read from memory.
_BYTE, _TAP, _INDEXED = 0.05, 0.5, 1.5


def _pooled(shape, layout, kernel_size, stride, padding, dilation, ceil_mode):
    """The shape of windows' results."""
    h, w = _plane(shape, layout)
    oh = window_count(h, kernel_size[0], stride[0], padding[0], dilation[0], ceil_mode)
    ow = window_count(w, kernel_size[1], stride[1], padding[1], dilation[1], ceil_mode)
    return _resized(shape, layout, oh, ow)


def _allocator(shape, dtype):
    """What makes a result of this shape: `empty`, or NumPy's where that comes to the same and saves a detour."""
    return np.empty if prod(shape) * dtype.itemsize < ALIGNED_FROM else empty


def _plane(shape, layout):
    return shape[2:] if layout == "NCHW" else shape[1:3]


def _resized(shape, layout, height, width):
    return (shape[0], shape[1], height, width) if layout == "NCHW" else (shape[0], height, width, shape[3])


def prepare_max_pool2d(shapes, dtype, *, kernel_size, stride, padding, dilation, ceil_mode, return_indices, layout):
    """max_pool2d for one shape, with everything but the work itself done beforehand."""
    shape = _pooled(shapes[0], layout, kernel_size, stride, padding, dilation, ceil_mode)
    work = prod(shapes[0]) * dtype.itemsize * _BYTE
    if not return_indices:
        plan = plan_of(shapes[0], shape, dtype.itemsize, layout, kernel_size, stride, padding, dilation)
        lowest, kernel, new = _LOWEST[dtype], pool_windows.max_values.sized(work), _allocator(shape, dtype)

        def run(x):
            y = new(shape, dtype)
            kernel(x, y, lowest, plan)
            return y

        return run
    (top, _), (left, _) = padding
    window = (layout == "NHWC", *kernel_size, *stride, top, left, *dilation)
    work += prod(shape) * prod(kernel_size) * _TAP

    def run_with_indices(x):
        y, indices = np.empty(shape, dtype), np.empty(shape, np.int64)
        pool_indices.max_with_indices(work, x, y, indices, *window)
        return y, indices

    return run_with_indices


def max_pool2d(x, *, kernel_size, stride, padding, dilation, ceil_mode, return_indices, layout):
    window = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    options = {"ceil_mode": ceil_mode, "return_indices": return_indices, "layout": layout}
    return prepare_max_pool2d((x.shape,), x.dtype, **window, **options)(x)


def prepare_max_pool2d_backward(
    shapes, dtype, *, input_shape, kernel_size, stride, padding, dilation, ceil_mode, layout
):
    """max_pool2d_backward for one shape, with everything but the work itself done beforehand."""
    scattered = _scattering("max_pool2d_backward", shapes[0], input_shape, dtype, layout, True)
    if layout == "NCHW" or dilation != (1, 1):
        return scattered
    pixels, counts = _plane(input_shape, layout), _plane(shapes[0], layout)
    table = pool_match.table_of(pixels, _bounds(counts, pixels, kernel_size, stride, padding))
    limit, arguments = pool_match.limit_of(pixels, counts, kernel_size, dtype.itemsize), (table,)
    kernel = pool_match.match
    if limit is not None:
        kernel, arguments = pool_match.match_narrowed, (table, limit)
    kernel = kernel.sized(prod(input_shape) * dtype.itemsize * _BYTE + prod(shapes[0]) * _INDEXED)

    new = _allocator(input_shape, dtype)

    def run(grad, indices):
        result = new(input_shape, dtype)
        return scattered(grad, indices) if kernel(grad, indices, result, *arguments) else result

    return run


def max_pool2d_backward(grad, indices, *, input_shape, kernel_size, stride, padding, dilation, ceil_mode, layout):
    window = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    options = {"input_shape": input_shape, "ceil_mode": ceil_mode, "layout": layout}
    return prepare_max_pool2d_backward((grad.shape,), grad.dtype, **window, **options)(grad, indices)


def prepare_avg_pool2d(
    shapes, dtype, *, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout
):
    """avg_pool2d for one shape, with everything but the work itself done beforehand."""
    shape = _pooled(shapes[0], layout, kernel_size, stride, padding, (1, 1), ceil_mode)
    plan = plan_of(shapes[0], shape, dtype.itemsize, layout, kernel_size, stride, padding, (1, 1))
    pixels, counts = _plane(shapes[0], layout), _plane(shape, layout)
    extents = extents_of(pixels, counts, kernel_size, stride, padding, count_include_pad)
    divisors = as_divisors(extents, divisor_override, dtype)
    like = np.empty((0, 0, 0, 0), dtype)
    kernel = pool_windows.averages.bound(prod(shapes[0]) * dtype.itemsize * _BYTE, like, like, plan, divisors)

    new = _allocator(shape, dtype)

    def run(x):
        y = new(shape, dtype)
        kernel(x, y, plan, divisors)
        return y

    return run


def avg_pool2d(x, *, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout):
    window = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}
    divisor = {"count_include_pad": count_include_pad, "divisor_override": divisor_override}
    return prepare_avg_pool2d((x.shape,), x.dtype, **window, **divisor, layout=layout)(x)


def prepare_avg_pool2d_backward(
    shapes, dtype, *, input_shape, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout
):
    """avg_pool2d_backward for one shape, with everything but the work itself done beforehand."""
    pixels, counts = _plane(input_shape, layout), _plane(shapes[0], layout)
    extents = extents_of(pixels, counts, kernel_size, stride, padding, count_include_pad)
    weights = inverse_divisors(extents, divisor_override)
    bounds = _bounds(counts, pixels, kernel_size, stride, padding)
    rows, columns = ((*bound, weight) for bound, weight in zip(bounds, weights, strict=True))
    return _spreading(shapes[0], input_shape, dtype, layout, rows, columns, kernel_size[1], stride[1])


def _bounds(counts, pixels, kernel_size, stride, padding):
    """Starts and ends of the windows along both axes."""
    axes = zip(counts, pixels, kernel_size, stride, padding, strict=True)
    return [windows(count, n, k, s, low) for count, n, k, s, (low, _) in axes]


def _spreading(grad_shape, shape, dtype, layout, rows, columns, kernel_width=0, stride=0):
    """The gradient of averages, as a function of grad."""
    arguments = pool_spread.plan_of(shape, grad_shape, dtype, layout, rows, columns, kernel_width, stride)
    kernel = pool_spread.averages_backward.sized(prod(shape) * dtype.itemsize * _BYTE)

    new = _allocator(shape, dtype)

    def run(grad):
        result = new(shape, dtype)
        kernel(grad, result, *arguments)
        return result

    return run


def avg_pool2d_backward(
    grad, *, input_shape, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout
):
    window = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}
    options = {"input_shape": input_shape, "layout": layout}
    options |= {"count_include_pad": count_include_pad, "divisor_override": divisor_override}
    return prepare_avg_pool2d_backward((grad.shape,), grad.dtype, **window, **options)(grad)


def prepare_adaptive_avg_pool2d(shapes, dtype, *, output_size, layout):
    """adaptive_avg_pool2d for one shape, with everything but the work itself done beforehand."""
    shape = _resized(shapes[0], layout, *output_size)
    bounds = [bin_bounds(n, count) for n, count in zip(_plane(shapes[0], layout), output_size, strict=True)]
    divisors = as_divisors([ends - starts for starts, ends in bounds], None, dtype)
    kernel, nhwc = pool_bins.adaptive_averages.sized(prod(shapes[0]) * dtype.itemsize * _BYTE), layout == "NHWC"

    new = _allocator(shape, dtype)

    def run(x):
        y = new(shape, dtype)
        kernel(x, y, nhwc, divisors)
        return y

    return run


def adaptive_avg_pool2d(x, *, output_size, layout):
    return prepare_adaptive_avg_pool2d((x.shape,), x.dtype, output_size=output_size, layout=layout)(x)


def prepare_adaptive_avg_pool2d_backward(shapes, dtype, *, input_shape, layout):
    """adaptive_avg_pool2d_backward for one shape, with everything but the work itself done beforehand."""
    sizes = zip(_plane(input_shape, layout), _plane(shapes[0], layout), strict=True)
    bounds = [bin_bounds(n, count) for n, count in sizes]
    weights = inverse_divisors([ends - starts for starts, ends in bounds], None)
    rows, columns = ((*bound, weight) for bound, weight in zip(bounds, weights, strict=True))
    return _spreading(shapes[0], input_shape, dtype, layout, rows, columns)


def adaptive_avg_pool2d_backward(grad, *, input_shape, layout):
    return prepare_adaptive_avg_pool2d_backward((grad.shape,), grad.dtype, input_shape=input_shape, layout=layout)(grad)


def adaptive_max_pool2d(x, *, output_size, return_indices, layout):
    shape = _resized(x.shape, layout, *output_size)
    y = np.empty(shape, x.dtype)
    if not return_indices:
        pool_bins.adaptive_max_values(x.nbytes * _BYTE, x, y, layout == "NHWC")
        return y
    indices = np.empty(shape, np.int64)
    pool_indices.adaptive_max_with_indices(x.size * _TAP, x, y, indices, layout == "NHWC")
    return y, indices


def prepare_adaptive_max_pool2d_backward(shapes, dtype, *, input_shape, layout):
    return _scattering("adaptive_max_pool2d_backward", shapes[0], input_shape, dtype, layout, True)


def adaptive_max_pool2d_backward(grad, indices, *, input_shape, layout):
    options = {"input_shape": input_shape, "layout": layout}
    return prepare_adaptive_max_pool2d_backward((grad.shape,), grad.dtype, **options)(grad, indices)


def prepare_max_unpool2d(shapes, dtype, *, output_size, layout):
    return _scattering("max_unpool2d", shapes[0], _resized(shapes[0], layout, *output_size), dtype, layout, False)


def max_unpool2d(x, indices, *, output_size, layout):
    return prepare_max_unpool2d((x.shape,), x.dtype, output_size=output_size, layout=layout)(x, indices)


def prepare_max_unpool2d_backward(shapes, dtype, *, layout):
    shape, places = shapes
    kernel, nhwc = pool_scatter.gather.sized(prod(places) * _INDEXED), layout == "NHWC"

    new = _allocator(places, dtype)

    def run(grad, indices):
        result = new(places, dtype)
        if kernel(grad, indices, result, nhwc):
            raise outside_plane("max_unpool2d_backward", indices, _plane(shape, layout))
        return result

    return run


def max_unpool2d_backward(grad, indices, *, layout):
    return prepare_max_unpool2d_backward((grad.shape, indices.shape), grad.dtype, layout=layout)(grad, indices)


def _scattering(function, values_shape, shape, dtype, layout, add):
    """Values at their indices in planes of zeros, as a function of both; it raises where an index leaves its plane."""
    work = prod(shape) * dtype.itemsize * _BYTE + prod(values_shape) * _INDEXED
    kernel, nhwc = pool_scatter.scatter.sized(work), layout == "NHWC"

    new = _allocator(shape, dtype)

    def run(values, indices):
        result = new(shape, dtype)
        if kernel(values, indices, result, nhwc, add):
            raise outside_plane(function, indices, _plane(shape, layout))
        return result

    return run
