"""Pooling on the GPU: what runs for which call."""

from tilewise.kernels.cupy.pool_average import run_average
from tilewise.kernels.pool_plan import out_shape, pool_of
from tilewise.kernels.shapes import output_size as window_count


def _counts(shape, kernel_size, stride, padding, dilation, ceil_mode, layout):
    size = shape[2:] if layout == "NCHW" else shape[1:3]
    axes = zip(size, kernel_size, stride, padding, dilation, strict=True)
    return tuple(window_count(*axis, ceil_mode) for axis in axes)


def avg_pool2d(x, *, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout):
    out = _counts(x.shape, kernel_size, stride, padding, (1, 1), ceil_mode, layout)
    y = x.place.empty(out_shape(x.shape, out, layout), x.dtype)
    pool = pool_of(x.shape, out, layout, x.dtype, kernel=kernel_size, stride=stride, padding=padding)
    if y.size:
        run_average(pool, x, y, divisor_override or pool.divisor(count_include_pad), count_include_pad)
    return y
