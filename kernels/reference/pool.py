"""Pooling in NumPy: windows and bins are reduced along the rows, then along the columns."""

import numpy as np

_AXES = {"NCHW": (2, 3), "NHWC": (1, 2)}  # layout -> the axes of height and width


def max_pool2d(x, *, kernel_size, stride, padding, dilation, ceil_mode, return_indices, layout):
    axes = _AXES[layout]
    counts = _counts(x.shape, axes, kernel_size, stride, padding, dilation, ceil_mode)
    if return_indices:
        taps = []
        for i, axis in enumerate(axes):
            starts = np.arange(counts[i]) * stride[i] - padding[i][0]
            positions = [starts + t * dilation[i] for t in range(kernel_size[i])]
            taps.append([(p, (p >= 0) & (p < x.shape[axis])) for p in positions])
        return _max_with_indices(x, axes, taps)
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    folded = _padded(x, axes, counts, kernel_size, stride, padding, dilation, lowest)
    for i, axis in enumerate(axes):
        folded = _fold(np.maximum, folded, axis, counts[i], kernel_size[i], stride[i], dilation[i])
    return folded


def max_pool2d_backward(grad, indices, *, input_shape, kernel_size, stride, padding, dilation, ceil_mode, layout):
    return _scatter_add("max_pool2d_backward", grad, indices, input_shape, layout)


def avg_pool2d(x, *, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout):
    axes = _AXES[layout]
    counts = _counts(x.shape, axes, kernel_size, stride, padding, (1, 1), ceil_mode)
    folded = _padded(x, axes, counts, kernel_size, stride, padding, (1, 1), 0)
    for i, axis in enumerate(axes):
        folded = _fold(np.add, folded, axis, counts[i], kernel_size[i], stride[i], 1)
    divisor = _divisor(x.shape, axes, counts, kernel_size, stride, padding, count_include_pad, divisor_override)
    return folded / divisor.astype(x.dtype)


def avg_pool2d_backward(
    grad, *, input_shape, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout
):
    axes = _AXES[layout]
    counts = tuple(grad.shape[axis] for axis in axes)
    divisor = _divisor(input_shape, axes, counts, kernel_size, stride, padding, count_include_pad, divisor_override)
    result = grad / divisor.astype(grad.dtype)
    for i, axis in enumerate(axes):
        low, n = padding[i][0], input_shape[axis]
        shape = list(result.shape)
        shape[axis] = max((counts[i] - 1) * stride[i] + kernel_size[i], low + n)
        spread = np.zeros(shape, grad.dtype)
        for t in range(kernel_size[i]):
            spread[_tap(axis, t, counts[i], stride[i])] += result
        result = spread[_along(axis, slice(low, low + n))]
    return np.ascontiguousarray(result)


def adaptive_avg_pool2d(x, *, output_size, layout):
    result, area = x, np.ones((1, 1, 1, 1), x.dtype)
    for axis, count in zip(_AXES[layout], output_size, strict=True):
        starts, ends = _bins(x.shape[axis], count)
        result = _fold_bins(np.add, result, axis, starts, ends)
        area = area * _on_axis(ends - starts, axis).astype(x.dtype)
    return result / area


def adaptive_avg_pool2d_backward(grad, *, input_shape, layout):
    result = grad
    for axis in _AXES[layout]:
        starts, ends = _bins(input_shape[axis], grad.shape[axis])
        scaled = result / _on_axis(ends - starts, axis).astype(grad.dtype)
        shape = list(result.shape)
        shape[axis] = input_shape[axis]
        result = np.zeros(shape, grad.dtype)
        for o, (start, end) in enumerate(zip(starts, ends, strict=True)):
            result[_along(axis, slice(start, end))] += scaled[_along(axis, slice(o, o + 1))]
    return result


def adaptive_max_pool2d(x, *, output_size, return_indices, layout):
    axes = _AXES[layout]
    bins = [_bins(x.shape[axis], count) for axis, count in zip(axes, output_size, strict=True)]
    if return_indices:
        taps = []
        for starts, ends in bins:
            positions = [starts + t for t in range((ends - starts).max())]
            taps.append([(p, p < ends) for p in positions])
        return _max_with_indices(x, axes, taps)
    result = x
    for axis, (starts, ends) in zip(axes, bins, strict=True):
        result = _fold_bins(np.maximum, result, axis, starts, ends)
    return result


def adaptive_max_pool2d_backward(grad, indices, *, input_shape, layout):
    return _scatter_add("adaptive_max_pool2d_backward", grad, indices, input_shape, layout)


def max_unpool2d(x, indices, *, output_size, layout):
    n, c = x.shape[0], x.shape[1 if layout == "NCHW" else 3]
    shape = (n, c, *output_size) if layout == "NCHW" else (n, *output_size, c)
    result = np.zeros(np.prod(shape), x.dtype)
    result[_flat("max_unpool2d", indices, shape, layout).ravel()] = x.ravel()  # of equal indices the last one stays
    return result.reshape(shape)


def max_unpool2d_backward(grad, indices, *, layout):
    return grad.reshape(-1)[_flat("max_unpool2d_backward", indices, grad.shape, layout)]


def _counts(shape, axes, kernel, stride, padding, dilation, ceil_mode):
    """How many windows there are along each axis; the last starts inside the input or the padding before it."""
    counts = []
    for i, axis in enumerate(axes):
        low, high = padding[i]
        span = shape[axis] + low + high - dilation[i] * (kernel[i] - 1) - 1
        count = (-(-span // stride[i]) if ceil_mode else span // stride[i]) + 1
        if ceil_mode and (count - 1) * stride[i] >= shape[axis] + low:
            count -= 1
        counts.append(count)
    return tuple(counts)


def _padded(x, axes, counts, kernel, stride, padding, dilation, value):
    """x with `value` around it, as far as the windows reach."""
    widths = [(0, 0)] * 4
    for i, axis in enumerate(axes):
        reach = (counts[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1
        widths[axis] = (padding[i][0], max(reach - padding[i][0] - x.shape[axis], 0))
    if not np.any(widths):
        return x
    return np.pad(x, widths, constant_values=value)


def _along(axis, index):
    return (slice(None),) * axis + (index,)


def _on_axis(vector, axis):
    """The vector as a 4-D array that broadcasts along `axis`."""
    return vector.reshape([-1 if a == axis else 1 for a in range(4)])


def _tap(axis, offset, count, stride):
    """Where the windows' elements at `offset` lie along an axis."""
    return _along(axis, slice(offset, offset + (count - 1) * stride + 1, stride))


def _fold(ufunc, x, axis, count, kernel, stride, dilation):
    result = np.copy(x[_tap(axis, 0, count, stride)])
    for t in range(1, kernel):
        ufunc(result, x[_tap(axis, t * dilation, count, stride)], out=result)
    return result


def _bins(n, count):
    """Start and end of each of `count` bins over n pixels: floor(i n / count) and ceil((i + 1) n / count)."""
    i = np.arange(count)
    return i * n // count, -(-(i + 1) * n // count)


def _fold_bins(ufunc, x, axis, starts, ends):
    slices = [x[_along(axis, slice(start, end))] for start, end in zip(starts, ends, strict=True)]
    return np.stack([ufunc.reduce(part, axis=axis) for part in slices], axis=axis)


def _divisor(shape, axes, counts, kernel, stride, padding, include_pad, override):
    """What each window's sum is divided by: its extent, clipped to the padded input or to the input itself."""
    if override is not None:
        return np.array(override)
    divisor = np.ones((1, 1, 1, 1), np.int64)
    for i, axis in enumerate(axes):
        low, high = padding[i]
        starts = np.arange(counts[i]) * stride[i] - low
        ends = np.minimum(starts + kernel[i], shape[axis] + high)
        if not include_pad:
            starts, ends = np.maximum(starts, 0), np.minimum(ends, shape[axis])
        divisor = divisor * _on_axis(ends - starts, axis)
    return divisor


def _max_with_indices(x, axes, taps):
    """Maximum and flat index in the plane over taps = (rows, columns), each a list of (position, is it valid) per tap.

    Taps are visited in the order of the plane: a later one wins only if it is greater, or NaN.
    """
    rows, columns = taps
    shape = list(x.shape)
    shape[axes[0]], shape[axes[1]] = len(rows[0][0]), len(columns[0][0])
    best, index = np.zeros(shape, x.dtype), np.full(shape, -1)
    for row, row_valid in rows:
        line = np.take(x, np.where(row_valid, row, 0), axis=axes[0])
        for column, column_valid in columns:
            value = np.take(line, np.where(column_valid, column, 0), axis=axes[1])
            wins = (value > best) | (value != value) | (index < 0)
            wins &= _on_axis(row_valid, axes[0]) & _on_axis(column_valid, axes[1])
            np.copyto(best, value, where=wins)
            np.copyto(index, _on_axis(row * x.shape[axes[1]], axes[0]) + _on_axis(column, axes[1]), where=wins)
    return best, index


def _flat(function, indices, shape, layout):
    """Indices in each (H, W) plane as indices in the whole array of `shape`."""
    if layout == "NCHW":
        n, c, h, w = shape
        first, step = np.arange(n * c).reshape(n, c, 1, 1) * (h * w), 1
    else:
        n, h, w, c = shape
        first, step = np.arange(n).reshape(n, 1, 1, 1) * (h * w * c) + np.arange(c), c
    if indices.size and (indices.min() < 0 or indices.max() >= h * w):
        raise ValueError(
            f"{function}: indices must lie in 0 to {h * w - 1} (a plane of {h} x {w}), "
            f"got {indices.min()} to {indices.max()}"
        )
    return first + indices * step


def _scatter_add(function, grad, indices, shape, layout):
    # bincount adds in float64, in the order of the elements: many times faster than np.add.at
    flat = _flat(function, indices, shape, layout)
    sums = np.bincount(flat.ravel(), weights=grad.ravel(), minlength=int(np.prod(shape)))
    return sums.astype(grad.dtype).reshape(shape)
