"""Pooling: maximum, average, their adaptive forms, unpooling, and the gradients.

Images are (N, C, H, W), or (C, H, W) without a batch; with `layout="NHWC"` (N, H, W, C), or (H, W, C). A result is an
image in the same layout, of x's kind (NumPy, PyTorch) and dtype. Averages and all gradients take float16, float32 and
float64, on a GPU bfloat16, too; maxima and unpooling also integers of 8 to 64 bits.
"""

from tilewise.kernels import pool_checks as checks
from tilewise.kernels.operation import Operation


def max_pool2d(
    x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False, *, layout="NCHW"
):
    """The maximum of every window of each channel.

        y[n, c, i, j] = max over (s, t) of x[n, c, SH i - top + DH s, SW j - left + DW t],  0 <= s < KH, 0 <= t < KW

    over the taps inside the image: padding never wins. NaN wins. Output height: floor((H + top + bottom - DH (KH - 1)
    - 1) / SH) + 1, width likewise.

    Args:
        x: (N, C, H, W) or (C, H, W), float16, float32, float64 or an integer dtype, any strides.
        kernel_size: KH, KW: an int or a pair of ints.
        stride: SH, SW: an int or a pair; the kernel size where None.
        padding: an int, a pair (height, width), two pairs ((top, bottom), (left, right)), or "valid", "same" (the
            output is ceil(H / SH) high, the odd row after), "same_lower" (the odd row before). It may exceed half the
            kernel, which PyTorch refuses.
        dilation: DH, DW: an int or a pair, the distance of a window's taps.
        ceil_mode: round the output size up, as long as the last window starts inside the image or the padding before
            it. It may reach beyond the padding.
        return_indices: also return where each maximum was found.
        layout: "NCHW" or "NHWC".

    Returns:
        y, (N, C, OH, OW); or (y, indices), both of that shape: the int64 position in x's (H, W) plane, row * W +
        column, of the first of equal maxima, and of the last NaN (as PyTorch has it).

    Raises:
        TypeError: x is not an array of these dtypes; an option of a wrong kind.
        ValueError: a wrong shape; a value out of range; a window that does not fit or finds no input, only padding.
    """
    return _MAX_POOL.call((x,), (kernel_size, stride, padding, dilation, ceil_mode, return_indices, layout))


def max_pool2d_backward(
    grad, indices, input_shape, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, *, layout="NCHW"
):
    """The gradient of `max_pool2d`: each element of grad is added to the pixel that was the maximum.

        grad_x[n, c].flat[indices[n, c, i, j]] += grad[n, c, i, j]

    Args:
        grad: (N, C, OH, OW) or (C, OH, OW), float16, float32 or float64: the gradient of max_pool2d's y.
        indices: int64, grad's shape, as max_pool2d returned them.
        input_shape: x's shape.
        kernel_size, stride, padding, dilation, ceil_mode, layout: as in `max_pool2d`.

    Returns:
        grad_x, of shape input_shape. The sum's order is that of the windows: the same bits every time.

    Raises:
        TypeError, ValueError: as `max_pool2d`; a grad or indices of another shape; an index outside the plane,
            which on a GPU's own arrays is ignored instead: to raise, the call would have to wait for the GPU.
    """
    options = (input_shape, kernel_size, stride, padding, dilation, ceil_mode, layout)
    return _MAX_POOL_BACKWARD.call((grad, indices), options)


def avg_pool2d(
    x,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
    *,
    layout="NCHW",
):
    """The average of every window of each channel.

        y[n, c, i, j] = (sum over (s, t) of x[n, c, SH i - top + s, SW j - left + t]) / divisor[i, j]

    over the taps inside the image.

    Args:
        x: (N, C, H, W) or (C, H, W), float16, float32 or float64, any strides.
        kernel_size, stride, padding, ceil_mode, layout: as in `max_pool2d`.
        count_include_pad: whether the divisor counts the window's taps in the padding (but not those beyond it, which
            ceil_mode can bring about). Otherwise it counts those inside the image.
        divisor_override: the divisor of every window, an int of at least 1, where not None.

    Returns:
        y, (N, C, OH, OW).

    Raises:
        TypeError, ValueError: as `max_pool2d`.
    """
    options = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout)
    return _AVG_POOL.call((x,), options)


def avg_pool2d_backward(
    grad,
    input_shape,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
    *,
    layout="NCHW",
):
    """The gradient of `avg_pool2d`: every pixel gets grad / divisor from each window that it lies in.

    Args:
        grad: (N, C, OH, OW) or (C, OH, OW), float16, float32 or float64: the gradient of avg_pool2d's y.
        input_shape: x's shape.
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout: as in `avg_pool2d`.

    Returns:
        grad_x, of shape input_shape.

    Raises:
        TypeError, ValueError: as `avg_pool2d`; a grad whose shape is not that of y.
    """
    options = (input_shape, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, layout)
    return _AVG_POOL_BACKWARD.call((grad,), options)


def adaptive_avg_pool2d(x, output_size, *, layout="NCHW"):
    """The average over OH x OW bins that cover each channel evenly, whatever its size.

    Bin i of an axis holds the pixels from floor(i H / OH) to ceil((i + 1) H / OH) - 1: neighbours share a pixel where
    OH does not divide H.

    Args:
        x: (N, C, H, W) or (C, H, W), float16, float32 or float64, any strides.
        output_size: OH, OW: an int or a pair; None, alone or in the pair, is the size of x. 1 is global pooling.
        layout: "NCHW" or "NHWC".

    Returns:
        y, (N, C, OH, OW).

    Raises:
        TypeError: x is not an array of these dtypes; an output_size not of ints.
        ValueError: a wrong shape; an output size below 1; an image without pixels.
    """
    return _ADAPTIVE_AVG.call((x,), (output_size, layout))


def adaptive_avg_pool2d_backward(grad, input_shape, *, layout="NCHW"):
    """The gradient of `adaptive_avg_pool2d`: every pixel gets grad / size from each bin that it lies in.

    Args:
        grad: (N, C, OH, OW) or (C, OH, OW), float16, float32 or float64: the gradient of adaptive_avg_pool2d's y.
        input_shape: x's shape.
        layout: "NCHW" or "NHWC".

    Returns:
        grad_x, of shape input_shape.

    Raises:
        TypeError, ValueError: as `adaptive_avg_pool2d`; a grad with another batch or channels than input_shape.
    """
    return _ADAPTIVE_AVG_BACKWARD.call((grad,), (input_shape, layout))


def adaptive_max_pool2d(x, output_size, return_indices=False, *, layout="NCHW"):
    """The maximum over OH x OW bins that cover each channel evenly, whatever its size; see `adaptive_avg_pool2d`.

    Args:
        x: (N, C, H, W) or (C, H, W), float16, float32, float64 or an integer dtype, any strides.
        output_size: OH, OW: an int or a pair; None, alone or in the pair, is the size of x.
        return_indices: also return where each maximum was found.
        layout: "NCHW" or "NHWC".

    Returns:
        y, (N, C, OH, OW); or (y, indices), with NaN, ties and indices as in `max_pool2d`.

    Raises:
        TypeError, ValueError: as `adaptive_avg_pool2d`.
    """
    return _ADAPTIVE_MAX.call((x,), (output_size, return_indices, layout))


def adaptive_max_pool2d_backward(grad, indices, input_shape, *, layout="NCHW"):
    """The gradient of `adaptive_max_pool2d`: each element of grad is added to the pixel that was the maximum.

    Args:
        grad: (N, C, OH, OW) or (C, OH, OW), float16, float32 or float64: the gradient of adaptive_max_pool2d's y.
        indices: int64, grad's shape, as adaptive_max_pool2d returned them.
        input_shape: x's shape.
        layout: "NCHW" or "NHWC".

    Returns:
        grad_x, of shape input_shape.

    Raises:
        TypeError, ValueError: as `adaptive_avg_pool2d_backward`; an index outside the plane (as `max_pool2d_backward`).
    """
    return _ADAPTIVE_MAX_BACKWARD.call((grad, indices), (input_shape, layout))


def max_unpool2d(x, indices, kernel_size, stride=None, padding=0, output_size=None, *, layout="NCHW"):
    """Put each element back where `max_pool2d` found it, in planes of zeros.

        y[n, c].flat[indices[n, c, i, j]] = x[n, c, i, j]

    Where windows shared their maximum, the last one's element stays.

    Args:
        x: (N, C, H, W) or (C, H, W), float16, float32, float64 or an integer dtype, any strides.
        indices: int64, x's shape: positions in the result's plane, row * width + column.
        kernel_size, stride, padding: those of max_pool2d. They only tell the size of the result. "same" and
            "same_lower" need output_size.
        output_size: height and width of the result, an int or a pair, or its whole shape; it must be less than a stride
            from the default, (H - 1) SH + KH - top - bottom, width likewise.
        layout: "NCHW" or "NHWC".

    Returns:
        y, (N, C, height, width).

    Raises:
        TypeError: x or indices are not arrays of these dtypes; an option of a wrong kind.
        ValueError: a wrong shape; an output size that max_pool2d cannot have come from; an index outside the plane (on
            a GPU's own arrays it is ignored, as in `max_pool2d_backward`).
    """
    return _MAX_UNPOOL.call((x, indices), (kernel_size, stride, padding, output_size, layout))


def max_unpool2d_backward(grad, indices, *, layout="NCHW"):
    """The gradient of `max_unpool2d`: grad_x[n, c, i, j] = grad[n, c].flat[indices[n, c, i, j]].

    Where several elements went to one pixel, each gets its gradient, as in PyTorch.

    Args:
        grad: (N, C, height, width) or (C, height, width), float16, float32 or float64: the gradient of
            max_unpool2d's y.
        indices: (N, C, H, W) or (C, H, W), int64, as given to max_unpool2d.
        layout: "NCHW" or "NHWC".

    Returns:
        grad_x, of indices' shape.

    Raises:
        TypeError, ValueError: as `max_unpool2d`; indices with another batch or channels than grad.
    """
    return _MAX_UNPOOL_BACKWARD.call((grad, indices), (layout,))


_BOTH = ("grad", "indices")
_MAX_POOL = Operation("pool", "max_pool2d", ("x",), checks.max_pool)
_MAX_POOL_BACKWARD = Operation("pool", "max_pool2d_backward", _BOTH, checks.max_pool_backward)
_AVG_POOL = Operation("pool", "avg_pool2d", ("x",), checks.avg_pool)
_AVG_POOL_BACKWARD = Operation("pool", "avg_pool2d_backward", ("grad",), checks.avg_pool_backward)
_ADAPTIVE_AVG = Operation("pool", "adaptive_avg_pool2d", ("x",), checks.adaptive_avg_pool)
_ADAPTIVE_AVG_BACKWARD = Operation("pool", "adaptive_avg_pool2d_backward", ("grad",), checks.adaptive_avg_pool_backward)
_ADAPTIVE_MAX = Operation("pool", "adaptive_max_pool2d", ("x",), checks.adaptive_max_pool)
_ADAPTIVE_MAX_BACKWARD = Operation("pool", "adaptive_max_pool2d_backward", _BOTH, checks.adaptive_max_pool_backward)
_MAX_UNPOOL = Operation("pool", "max_unpool2d", ("x", "indices"), checks.max_unpool)
_MAX_UNPOOL_BACKWARD = Operation("pool", "max_unpool2d_backward", _BOTH, checks.max_unpool_backward)
