"""Convolution in NumPy: the windows of x as columns of a matrix, then one matrix product per image and group.

Shapes inside: G groups, D = C/G input and M = O/G output channels of a group, T = KH*KW taps, P = OH*OW output pixels.
A product's operands are in the order in which the layout has them in memory, so that nothing is transposed:

    NCHW   columns (N, G, D*T, P)    weight (G, M, D*T)    y (N, G, M, P) = weight @ columns
    NHWC   columns (N, G, P, T*D)    weight (G, T*D, M)    y (N, G, P, M) = columns @ weight
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

# Columns are T times the size of x: so many images are taken at once that they stay within this many bytes.
_COLUMN_BYTES = 1 << 23

_ACTIVATIONS = {
    "relu": lambda y: np.maximum(y, 0),
    "relu6": lambda y: np.clip(y, 0, 6),
    "leaky_relu": lambda y: np.where(y > 0, y, 0.01 * y),
    "sigmoid": lambda y: np.exp(-np.logaddexp(0, -y)),  # 1 / (1 + exp(-y)) without its overflow
    "tanh": np.tanh,
}


def conv2d_naive(x, weight, bias=None, *, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), groups=1):
    """The definition, in loops, for NCHW."""
    n_images, _, height, width = x.shape
    outputs, depth, *kernel = weight.shape
    (top, bottom), (left, right) = padding
    out_h = (height + top + bottom - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    out_w = (width + left + right - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    y = np.zeros((n_images, outputs, out_h, out_w), x.dtype)
    for n, o, i, j in np.ndindex(y.shape):
        first = o // (outputs // groups) * depth  # the first input channel of o's group
        for c, p, q in np.ndindex(depth, *kernel):
            row = i * stride[0] - top + p * dilation[0]
            column = j * stride[1] - left + q * dilation[1]
            if 0 <= row < height and 0 <= column < width:
                y[n, o, i, j] += x[n, first + c, row, column] * weight[o, c, p, q]
        if bias is not None:
            y[n, o, i, j] += bias[o]
    return y


def conv2d(x, weight, bias, add, *, stride, padding, dilation, groups, layout, activation, algorithm, out=None):
    del algorithm  # there is one way here
    kernel, size = weight.shape[2:], _pixels(x, layout)
    size = [
        (n + sum(pads) - d * (k - 1) - 1) // s + 1
        for n, pads, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    y = _correlate(x, weight, size, stride, padding, dilation, groups, layout)
    y = _biased(y, bias, layout)
    if add is not None:
        y += add
    if activation is not None:
        y = _ACTIVATIONS[activation](y)
    if out is None:
        return y
    out[...] = y
    return out


def conv2d_backward(grad, x, weight, *, stride, padding, dilation, groups, layout, needs):
    grad_x = grad_weight = None
    if "x" in needs:
        grad_x = _scatter(grad, weight, _pixels(x, layout), stride, padding, dilation, groups, layout)
    if "weight" in needs:
        grad_weight = _weight_gradient(grad, x, weight.shape, stride, padding, dilation, groups, layout)
    return grad_x, grad_weight, _bias_gradient(grad, layout) if "bias" in needs else None


def conv_transpose2d(x, weight, bias, *, stride, padding, output_padding, groups, dilation, layout):
    size = [
        (n - 1) * s - sum(pads) + d * (k - 1) + extra + 1
        for n, s, pads, d, k, extra in zip(
            _pixels(x, layout), stride, padding, dilation, weight.shape[2:], output_padding, strict=True
        )
    ]
    return _biased(_scatter(x, weight, size, stride, padding, dilation, groups, layout), bias, layout)


def conv_transpose2d_backward(grad, x, weight, *, stride, padding, output_padding, groups, dilation, layout, needs):
    del output_padding  # in grad's shape already; the pixels it added are beyond the last window
    grad_x = grad_weight = None
    if "x" in needs:
        grad_x = _correlate(grad, weight, _pixels(x, layout), stride, padding, dilation, groups, layout)
    if "weight" in needs:
        grad_weight = _weight_gradient(x, grad, weight.shape, stride, padding, dilation, groups, layout)
    return grad_x, grad_weight, _bias_gradient(grad, layout) if "bias" in needs else None


def _pixels(x, layout):
    return x.shape[2:] if layout == "NCHW" else x.shape[1:3]


def _biased(y, bias, layout):
    if bias is not None:
        y += bias[:, None, None] if layout == "NCHW" else bias
    return y


def _bias_gradient(grad, layout):
    return grad.sum(axis=(0, 2, 3) if layout == "NCHW" else (0, 1, 2))


def _windows(x, kernel, size, stride, padding, dilation, layout):
    """Every window of the padded x: a view (N, C, OH, OW, KH, KW), whatever the layout."""
    (top, bottom), (left, right) = padding
    if layout == "NHWC":
        x = x.transpose(0, 3, 1, 2)
    if top or bottom or left or right:
        n, c, h, w = x.shape
        shape = (n, c, h + top + bottom, w + left + right)
        # Zeros in the order of x's own layout, for the copies below read them in that order.
        padded = np.zeros(shape, x.dtype) if layout == "NCHW" else _channels_last(shape, x.dtype)
        padded[:, :, top : top + h, left : left + w] = x
        x = padded
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    windows = sliding_window_view(x, spans, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    return windows[:, :, : size[0], : size[1]]


def _channels_last(shape, dtype):
    n, c, h, w = shape
    return np.zeros((n, h, w, c), dtype).transpose(0, 3, 1, 2)


def _column_chunks(windows, groups, layout):
    """(images, columns) for as many images at a time as _COLUMN_BYTES allows; the columns' memory is used again."""
    n, c, out_h, out_w, kernel_h, kernel_w = windows.shape
    depth, taps, pixels = c // groups, kernel_h * kernel_w, out_h * out_w
    grouped = windows.reshape(n, groups, depth, out_h, out_w, kernel_h, kernel_w)  # splits an axis: still a view
    if layout == "NCHW":
        grouped, matrix = grouped.transpose(0, 1, 2, 5, 6, 3, 4), (depth * taps, pixels)
    else:
        grouped, matrix = grouped.transpose(0, 1, 3, 4, 5, 6, 2), (pixels, taps * depth)
    at_once = max(1, min(n, _COLUMN_BYTES // (c * taps * pixels * windows.itemsize)))
    scratch = np.empty((at_once, *grouped.shape[1:]), windows.dtype)
    for first in range(0, n, at_once):
        images = slice(first, min(first + at_once, n))
        columns = scratch[: images.stop - first]
        columns[...] = grouped[images]
        yield images, columns.reshape(len(columns), groups, *matrix)


def _weight_matrices(weight, groups, layout):
    outputs, depth, *kernel = weight.shape
    if layout == "NCHW":
        return weight.reshape(groups, outputs // groups, -1)
    grouped = weight.reshape(groups, outputs // groups, depth, *kernel)
    return grouped.transpose(0, 3, 4, 2, 1).reshape(groups, -1, outputs // groups)


def _pixel_matrices(image, groups, layout):
    """An image tensor as (N, G, M, P) or (N, G, P, M); a view where x is contiguous in its layout."""
    if layout == "NCHW":
        n, c, h, w = image.shape
        return image.reshape(n, groups, c // groups, h * w)
    n, h, w, c = image.shape
    return image.reshape(n, h * w, groups, c // groups).swapaxes(1, 2)


def _correlate(x, weight, size, stride, padding, dilation, groups, layout):
    """conv2d without bias, of the given output size."""
    outputs, pixels = weight.shape[0], size[0] * size[1]
    matrices = _weight_matrices(weight, groups, layout)
    windows = _windows(x, weight.shape[2:], size, stride, padding, dilation, layout)
    matrix = (outputs // groups, pixels) if layout == "NCHW" else (pixels, outputs // groups)
    y = np.empty((len(x), groups, *matrix), x.dtype)
    for images, columns in _column_chunks(windows, groups, layout):
        operands = (matrices, columns) if layout == "NCHW" else (columns, matrices)
        np.matmul(*operands, out=y[images])
    if layout == "NCHW":
        return y.reshape(len(x), outputs, *size)
    return np.ascontiguousarray(y.swapaxes(1, 2)).reshape(len(x), *size, outputs)


def _scatter(grad, weight, size, stride, padding, dilation, groups, layout):
    """conv2d's gradient with respect to an x of `size` pixels: the columns' gradients, added up where they overlap."""
    n, depth, kernel, out_size = len(grad), weight.shape[1], weight.shape[2:], _pixels(grad, layout)
    matrices = _weight_matrices(weight, groups, layout).swapaxes(1, 2)
    grads = _pixel_matrices(grad, groups, layout)
    (top, bottom), (left, right) = padding
    shape = (n, groups * depth, size[0] + top + bottom, size[1] + left + right)
    padded = np.zeros(shape, grad.dtype) if layout == "NCHW" else _channels_last(shape, grad.dtype)
    grouped = padded.reshape(n, groups, depth, *shape[2:])
    at_once = max(1, _COLUMN_BYTES // (grads.itemsize * weight[0].size * groups * out_size[0] * out_size[1]))
    for first in range(0, n, at_once):
        images = slice(first, first + at_once)
        if layout == "NCHW":
            columns = np.matmul(matrices, grads[images]).reshape(-1, groups, depth, *kernel, *out_size)
        else:
            columns = np.matmul(grads[images], matrices).reshape(-1, groups, *out_size, *kernel, depth)
            columns = columns.transpose(0, 1, 6, 4, 5, 2, 3)
        for p, q in np.ndindex(*kernel):
            rows = _tap_slice(p, dilation[0], stride[0], out_size[0])
            across = _tap_slice(q, dilation[1], stride[1], out_size[1])
            grouped[images, :, :, rows, across] += columns[:, :, :, p, q]
    result = padded[:, :, top : top + size[0], left : left + size[1]]
    return np.ascontiguousarray(result if layout == "NCHW" else result.transpose(0, 2, 3, 1))


def _tap_slice(tap, dilation, stride, count):
    """The rows (columns) of the padded image that meet this tap."""
    first = tap * dilation
    return slice(first, first + stride * (count - 1) + 1, stride)


def _weight_gradient(grad, x, shape, stride, padding, dilation, groups, layout):
    outputs, depth, *kernel = shape
    windows = _windows(x, kernel, _pixels(grad, layout), stride, padding, dilation, layout)
    grads = _pixel_matrices(grad, groups, layout)
    rows, across = outputs // groups, depth * kernel[0] * kernel[1]
    total = np.zeros((groups, rows, across) if layout == "NCHW" else (groups, across, rows), x.dtype)
    for images, columns in _column_chunks(windows, groups, layout):
        if layout == "NCHW":
            total += np.matmul(grads[images], columns.swapaxes(2, 3)).sum(axis=0)
        else:
            total += np.matmul(columns.swapaxes(2, 3), grads[images]).sum(axis=0)
    if layout == "NCHW":
        return total.reshape(shape)
    total = total.reshape(groups, *kernel, depth, rows).transpose(0, 4, 3, 1, 2)
    return np.ascontiguousarray(total).reshape(shape)
