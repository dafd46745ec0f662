"""Pooling on the GPU: what runs for which call.

Indices that come from outside (the backwards of max pooling, unpooling) are not checked as on the CPU, since that would
make the caller wait for the device: those that lie outside of the plane are left out, and read as 0.
"""

from math import prod

import numpy as np

from tilewise.kernels.cupy.pool_average import run_average, run_global_average
from tilewise.kernels.cupy.pool_columns import average_columns, maximum_columns
from tilewise.kernels.cupy.pool_gradient import run_average_gradient, run_maximum_gradient
from tilewise.kernels.cupy.pool_maximum import run_maximum
from tilewise.kernels.cupy.pool_unpool import max_unpool2d, max_unpool2d_backward  # noqa: F401
from tilewise.kernels.pool_plan import out_shape, pool_of
from tilewise.kernels.shapes import output_size as window_count

HAS_BFLOAT16 = True  # operation.py asks
_INDEX = np.dtype(np.int64)


def _counts(shape, kernel_size, stride, padding, dilation, ceil_mode, layout):
    size = shape[2:] if layout == "NCHW" else shape[1:3]
    axes = zip(size, kernel_size, stride, padding, dilation, strict=True)
    rows, columns = (window_count(*axis, ceil_mode) for axis in axes)
    return rows, columns


def _maximum(x, out, layout, return_indices, **windows):
    y = x.place.empty(out_shape(x.shape, out, layout), x.dtype)
    indices = x.place.empty(y.shape, _INDEX) if return_indices else None
    pool = pool_of(x.shape, out, layout, x.dtype, **windows)
    if y.size and not maximum_columns(pool, layout, x, y, indices):
        run_maximum(pool, x, y, indices)
    return (y, indices) if return_indices else y


def max_pool2d(x, *, kernel_size, stride, padding, dilation, ceil_mode, return_indices, layout):
    out = _counts(x.shape, kernel_size, stride, padding, dilation, ceil_mode, layout)
    windows = {"kernel": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    return _maximum(x, out, layout, return_indices, **windows)


def adaptive_max_pool2d(x, *, output_size, return_indices, layout):
    return _maximum(x, output_size, layout, return_indices)


def avg_pool2d(x, *, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout):
    out = _counts(x.shape, kernel_size, stride, padding, (1, 1), ceil_mode, layout)
    y = x.place.empty(out_shape(x.shape, out, layout), x.dtype)
    pool = pool_of(x.shape, out, layout, x.dtype, kernel=kernel_size, stride=stride, padding=padding)
    divisor = divisor_override or pool.divisor(count_include_pad)
    if y.size and not average_columns(pool, layout, x, y, divisor, count_include_pad):
        run_average(pool, x, y, divisor, count_include_pad)
    return y


def adaptive_avg_pool2d(x, *, output_size, layout):
    y = x.place.empty(out_shape(x.shape, output_size, layout), x.dtype)
    if y.size and output_size == (1, 1):
        run_global_average(x, y, layout)
    elif y.size:
        pool = pool_of(x.shape, output_size, layout, x.dtype)
        run_average(pool, x, y, pool.divisor(False), False)
    return y


def _pooled_size(grad, layout):
    return grad.shape[2:] if layout == "NCHW" else grad.shape[1:3]


def max_pool2d_backward(grad, indices, *, input_shape, kernel_size, stride, padding, dilation, ceil_mode, layout):
    windows = {"kernel": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    return _maximum_backward(grad, indices, input_shape, layout, **windows)


def adaptive_max_pool2d_backward(grad, indices, *, input_shape, layout):
    return _maximum_backward(grad, indices, input_shape, layout)


def _maximum_backward(grad, indices, input_shape, layout, **windows):
    result = grad.place.empty(input_shape, grad.dtype)
    if prod(input_shape):
        pool = pool_of(input_shape, _pooled_size(grad, layout), layout, grad.dtype, **windows)
        run_maximum_gradient(pool, layout, grad, indices, result)
    return result


def avg_pool2d_backward(
    grad, *, input_shape, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout
):
    windows = {"kernel": kernel_size, "stride": stride, "padding": padding}
    return _average_backward(grad, input_shape, layout, divisor_override or 0, count_include_pad, **windows)


def adaptive_avg_pool2d_backward(grad, *, input_shape, layout):
    return _average_backward(grad, input_shape, layout, 0, False)


def _average_backward(grad, input_shape, layout, divisor, include_pad, **windows):
    result = grad.place.empty(input_shape, grad.dtype)
    if prod(input_shape):
        pool = pool_of(input_shape, _pooled_size(grad, layout), layout, grad.dtype, **windows)
        run_average_gradient(pool, layout, grad, result, divisor or pool.divisor(include_pad), include_pad)
    return result
