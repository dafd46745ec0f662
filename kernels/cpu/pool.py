"""Pooling on the CPU: sizes, results, and how the work is cut into chunks; the kernels are in pool_forward and
pool_backward."""

import numpy as np

from tilewise.kernels.cpu import pool_backward, pool_forward
from tilewise.kernels.shapes import output_size as window_count

# What a tap in the padding counts as in a maximum.
_LOWEST = {np.dtype(t): t(-np.inf) for t in (np.float32, np.float64)} | {
    np.dtype(t): t(np.iinfo(t).min)
    for t in (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64)
}
# Elements that a chunk reads or writes: some tens of microseconds, well above what handing out a chunk costs.
_CHUNK = 32768
# Channels that a chunk of a scattered NHWC image owns: whole cache lines.
_CHANNELS = 32
# Estimated nanoseconds, for the choice between serial and parallel: a byte at 20 GB/s; an element whose place is read
# from memory.
_BYTE, _INDEXED = 0.05, 1.5


def _sizes(shape, layout):
    """(planes, height, width, channels side by side)"""
    if layout == "NCHW":
        n, c, h, w = shape
        return n * c, h, w, 1
    return shape


def _result_shape(shape, layout, height, width):
    return (shape[0], shape[1], height, width) if layout == "NCHW" else (shape[0], height, width, shape[3])


def _rows_per_chunk(width):
    return max(_CHUNK // max(width, 1), 1)


def max_pool2d(x, *, kernel_size, stride, padding, dilation, ceil_mode, return_indices, layout):
    planes, h, w, c = _sizes(x.shape, layout)
    (kh, kw), (sh, sw), (vertical, horizontal), (dh, dw) = kernel_size, stride, padding, dilation
    oh = window_count(h, kh, sh, vertical, dh, ceil_mode)
    ow = window_count(w, kw, sw, horizontal, dw, ceil_mode)
    y = np.empty(_result_shape(x.shape, layout, oh, ow), x.dtype)
    top, left = vertical[0], horizontal[0]
    rows, per_chunk = planes * oh, _rows_per_chunk(w * sh * c)
    if not return_indices:
        work = x.nbytes * _BYTE
        empty = _LOWEST[x.dtype]
        pool_forward.max_values(work, x, y, empty, h, w, oh, ow, c, kh, kw, sh, sw, top, left, dh, dw, rows, per_chunk)
        return y
    indices = np.empty(y.shape, np.int64)
    first = last = 0
    if c == 1 and sw <= 2:
        # Windows inside the image; with stride 2 a pixel must follow the last, as pixels are read in pairs.
        first = min(-(-left // sw), ow)
        last = max(min((w - (sw - 1) - dw * (kw - 1) - 1 + left) // sw + 1, ow), first)
    work = x.nbytes * _BYTE + y.size * kh * kw * 0.2
    pool_forward.max_with_indices(
        work, x, y, indices, h, w, oh, ow, c, kh, kw, sh, sw, top, left, dh, dw, first, last, rows, per_chunk
    )
    return y, indices


def max_pool2d_backward(grad, indices, *, input_shape, kernel_size, stride, padding, dilation, ceil_mode, layout):
    return _scattered("max_pool2d_backward", grad, indices, input_shape, layout, True)


def avg_pool2d(x, *, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout):
    planes, h, w, c = _sizes(x.shape, layout)
    (kh, kw), (sh, sw), ((top, bottom), (left, right)) = kernel_size, stride, padding
    oh = window_count(h, kh, sh, (top, bottom), 1, ceil_mode)
    ow = window_count(w, kw, sw, (left, right), 1, ceil_mode)
    y = np.empty(_result_shape(x.shape, layout, oh, ow), x.dtype)
    rows, per_chunk = planes * oh, _rows_per_chunk(w * sh * c)
    pad, override, zero = int(count_include_pad), divisor_override or 0, x.dtype.type(0)
    pool_forward.averages(
        x.nbytes * _BYTE,
        *(x, y, zero, h, w, oh, ow, c, kh, kw, sh, sw, top, bottom, left, right, pad, override, rows, per_chunk),
    )
    return y


def avg_pool2d_backward(
    grad, *, input_shape, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout
):
    planes, h, w, c = _sizes(input_shape, layout)
    _, oh, ow, _ = _sizes(grad.shape, layout)
    (kh, kw), (sh, sw), ((top, bottom), (left, right)) = kernel_size, stride, padding
    result = np.empty(input_shape, grad.dtype)
    rows, per_chunk = planes * h, _rows_per_chunk(w * c)
    pad, override = int(count_include_pad), divisor_override or 0
    pool_backward.averages_backward(
        result.nbytes * _BYTE,
        *(grad, result, h, w, oh, ow, c, kh, kw, sh, sw, top, bottom, left, right, pad, override, rows, per_chunk),
    )
    return result


def adaptive_avg_pool2d(x, *, output_size, layout):
    planes, h, w, c = _sizes(x.shape, layout)
    oh, ow = output_size
    y = np.empty(_result_shape(x.shape, layout, oh, ow), x.dtype)
    per_chunk = _rows_per_chunk(w * c * h // oh)
    pool_forward.adaptive_averages(x.nbytes * _BYTE, x, y, h, w, oh, ow, c, planes * oh, per_chunk)
    return y


def adaptive_avg_pool2d_backward(grad, *, input_shape, layout):
    planes, h, w, c = _sizes(input_shape, layout)
    _, oh, ow, _ = _sizes(grad.shape, layout)
    result = np.empty(input_shape, grad.dtype)
    work, per_chunk = result.nbytes * _BYTE, _rows_per_chunk(w * c)
    pool_backward.adaptive_averages_backward(work, grad, result, h, w, oh, ow, c, planes * h, per_chunk)
    return result


def adaptive_max_pool2d(x, *, output_size, return_indices, layout):
    planes, h, w, c = _sizes(x.shape, layout)
    oh, ow = output_size
    y = np.empty(_result_shape(x.shape, layout, oh, ow), x.dtype)
    rows, per_chunk = planes * oh, _rows_per_chunk(w * c * h // oh)
    if not return_indices:
        pool_forward.adaptive_max_values(x.nbytes * _BYTE, x, y, h, w, oh, ow, c, rows, per_chunk)
        return y
    indices = np.empty(y.shape, np.int64)
    work = x.size * _INDEXED
    pool_forward.adaptive_max_with_indices(work, x, y, indices, h, w, oh, ow, c, rows, per_chunk)
    return y, indices


def adaptive_max_pool2d_backward(grad, indices, *, input_shape, layout):
    return _scattered("adaptive_max_pool2d_backward", grad, indices, input_shape, layout, True)


def max_unpool2d(x, indices, *, output_size, layout):
    shape = _result_shape(x.shape, layout, *output_size)
    return _scattered("max_unpool2d", x, indices, shape, layout, False)


def max_unpool2d_backward(grad, indices, *, layout):
    _, h, w, _ = _sizes(grad.shape, layout)
    planes, oh, ow, c = _sizes(indices.shape, layout)
    result = np.empty(indices.shape, grad.dtype)
    outside = np.zeros(1, np.int64)
    work, per_chunk = indices.size * _INDEXED, _rows_per_chunk(c)
    pool_backward.gather(work, grad, indices, result, outside, planes, oh * ow, h * w, c, per_chunk)
    if outside[0]:
        _raise_outside("max_unpool2d_backward", indices, h, w)
    return result


def _scattered(function, values, indices, shape, layout, add):
    """values at their indices in planes of zeros; the result is thrown away if an index lies outside its plane."""
    planes, h, w, c = _sizes(shape, layout)
    _, oh, ow, _ = _sizes(values.shape, layout)
    result = np.empty(shape, values.dtype)
    outside = np.zeros(1, np.int64)
    channels = _rows_per_chunk(h * w) if c == 1 else _CHANNELS
    blocks = -(-c // _CHANNELS)
    work = result.nbytes * _BYTE + indices.size * _INDEXED
    pool_backward.scatter(work, values, indices, result, outside, planes, oh * ow, h * w, c, channels, blocks, int(add))
    if outside[0]:
        _raise_outside(function, indices, h, w)
    return result


def _raise_outside(function, indices, h, w):
    raise ValueError(
        f"{function}: indices must lie in 0 to {h * w - 1} (a plane of {h} x {w}), "
        f"got {indices.min()} to {indices.max()}"
    )
