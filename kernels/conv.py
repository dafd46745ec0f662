"""Convolution and transposed convolution of images, forward and backward."""

from tilewise.kernels.conv_checks import (
    check_conv2d,
    check_conv2d_backward,
    check_conv_transpose2d,
    check_conv_transpose2d_backward,
)
from tilewise.kernels.dispatch import Operation


def conv2d(
    x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *,
    layout="NCHW", activation=None, algorithm="auto", add=None, out=None,
):  # fmt: skip
    """The convolution of images with a bank of filters (cross-correlation, as in every CNN).

    y[n, o, i, j] = activation(bias[o] + add[n, o, i, j] + sum over c, p, q of
                               x[n, g C/groups + c, i S - P_top + p D, j S - P_left + q D] * weight[o, c, p, q])

    where g is o's group and x is 0 outside the image; OH = floor((H + P_top + P_bottom - D (KH - 1) - 1) / S) + 1, OW
    alike.

    Args:
        x: (N, C, H, W), or unbatched (C, H, W); float16, float32 or float64, any strides.
        weight: (O, C/groups, KH, KW), in both layouts.
        bias: (O,), or None for none.
        stride, dilation: an int or a pair (height, width).
        padding: rows and columns of zeros around x: an int, a pair (height, width), two pairs ((top, bottom),
            (left, right)), "valid" (none), "same" (OH = ceil(H / S), an odd row or column goes after) or "same_lower"
            (before).
        groups: output channel o sees the C/groups input channels of its own group; groups = C is depthwise.
        layout: "NCHW", or "NHWC" for x and y (N, H, W, C).
        activation: None, "relu", "leaky_relu" (slope 0.01), "sigmoid" or "tanh", applied in the same pass.
        algorithm: "auto", or the one to use: "direct", "gemm", "winograd" (F(4x4, 3x3)) or "depthwise". The reference
            backend has one way and takes any of them.
        add: an array of exactly the result's shape and dtype, any strides, added before the activation in the same
            pass, such as the shortcut of a residual block; or None.
        out: an array of exactly the result's shape and dtype that overlaps no operand; it is filled and returned. It
            may be `add` itself, so that the convolution is added to what is there.

    Returns:
        (N, O, OH, OW) in x's layout, kind and dtype; without N if x has none.

    Raises:
        TypeError: not arrays; dtypes that differ or are not supported; an option of the wrong kind.
        ValueError: shapes or options that do not fit together, a kernel larger than the padded x, no channels or no
            pixels, an algorithm that is unknown or does not apply, a wrong `add` or `out`.

    Source: V. Dumoulin, F. Visin: A guide to convolution arithmetic for deep learning, arXiv:1603.07285.
    """
    return _CONV2D((x, weight, bias, add), (stride, padding, dilation, groups, layout, activation, algorithm), out)


def conv2d_backward(
    grad, x, weight, stride=1, padding=0, dilation=1, groups=1, *, layout="NCHW", needs=("x", "weight", "bias")
):
    """The gradients of `conv2d` without its activation.

    grad_x[n, c, h, w] sums grad[n, o, i, j] * weight[o, c, p, q] over all (o, i, j, p, q) in which that pixel met that
    tap; grad_weight sums grad * x over the same pairs; grad_bias sums grad over images and pixels.

    Args:
        grad: (N, O, OH, OW) in the layout, the gradient of the convolution plus bias: what the activation's backward
            gave, if there is one. Unbatched if x is.
        x, weight: the operands of the forward call, with its stride, padding, dilation, groups and layout.
        needs: which gradients to compute, out of "x", "weight" and "bias".

    Returns:
        (grad_x, grad_weight, grad_bias) of the shapes of x, weight and (O,); None for one that is not needed.

    Raises:
        TypeError, ValueError: as `conv2d`; also a grad whose shape is not the result's, or an unknown name in `needs`.
    """
    return _CONV2D_BACKWARD((grad, x, weight), (stride, padding, dilation, groups, layout, needs))


def conv_transpose2d(
    x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1, *, layout="NCHW"
):
    """The transposed convolution: `conv2d`'s gradient with respect to its input, as a forward operation.

    Every x[n, c, i, j] adds x[n, c, i, j] * weight[c, o, p, q] to y[n, o, i S - P_top + p D, j S - P_left + q D], if
    that pixel exists; then bias[o] is added. OH = (H - 1) S - P_top - P_bottom + D (KH - 1) + output_padding + 1, OW
    alike.

    Args:
        x: (N, C, H, W), or unbatched (C, H, W); float16, float32 or float64, any strides.
        weight: (C, O/groups, KH, KW), in both layouts.
        bias: (O,), or None for none.
        stride, dilation: an int or a pair (height, width).
        padding: rows and columns cut off the result: an int, a pair, or two pairs ((top, bottom), (left, right)).
        output_padding: rows and columns added at the bottom and the right, an int or a pair, less than the larger of
            stride and dilation: it tells which of the sizes that conv2d maps to H is meant.
        groups: input channel c feeds the O/groups output channels of its own group.
        layout: "NCHW", or "NHWC" for x and y.

    Returns:
        (N, O, OH, OW) in x's layout, kind and dtype; without N if x has none.

    Raises:
        TypeError, ValueError, NotImplementedError: as `conv2d`; also a result without pixels.

    Source: V. Dumoulin, F. Visin: A guide to convolution arithmetic for deep learning, arXiv:1603.07285, chapter 4.
    """
    return _CONV_TRANSPOSE2D((x, weight, bias), (stride, padding, output_padding, groups, dilation, layout))


def conv_transpose2d_backward(
    grad, x, weight, stride=1, padding=0, output_padding=0, groups=1, dilation=1, *,
    layout="NCHW", needs=("x", "weight", "bias"),
):  # fmt: skip
    """The gradients of `conv_transpose2d`: grad_x is a `conv2d` of grad with the same weight.

    Args:
        grad: (N, O, OH, OW) in the layout, the gradient of the result. Unbatched if x is.
        x, weight: the operands of the forward call, with its options.
        needs: which gradients to compute, out of "x", "weight" and "bias".

    Returns:
        (grad_x, grad_weight, grad_bias) of the shapes of x, weight and (O,); None for one that is not needed.

    Raises:
        TypeError, ValueError: as `conv_transpose2d`; also a grad whose shape is not the result's, or an unknown name in
            `needs`.
    """
    options = (stride, padding, output_padding, groups, dilation, layout, needs)
    return _CONV_TRANSPOSE2D_BACKWARD((grad, x, weight), options)


_CONV2D = Operation("conv", "conv2d", ("x", "weight", "bias", "add"), check_conv2d, in_place=(3,))
_CONV2D_BACKWARD = Operation("conv", "conv2d_backward", ("grad", "x", "weight"), check_conv2d_backward)
_CONV_TRANSPOSE2D = Operation("conv", "conv_transpose2d", ("x", "weight", "bias"), check_conv_transpose2d)
_CONV_TRANSPOSE2D_BACKWARD = Operation(
    "conv", "conv_transpose2d_backward", ("grad", "x", "weight"), check_conv_transpose2d_backward
)
