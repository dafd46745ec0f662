"""Convolution on the GPU: the choice of algorithm, and every gradient as one of three kinds of pass.

- Forward, and the gradient with respect to x: correlations (conv_geometry.py), computed directly (conv_direct.py).
- Gradients with respect to the weights and the bias: sums over pixels in fixed parts (conv_sums.py).
"""

from tilewise.kernels.cuda import (
    conv_depthwise,
    conv_depthwise_weight,
    conv_direct,
    conv_geometry,
    conv_product,
    conv_sums,
)
from tilewise.kernels.cuda.epilogue import ACTIVATION_CODES, NONE


def _window(stride, padding, dilation, groups, layout) -> dict:
    return {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}


def _correlate(it, x, weight, y, bias, extra, code, algorithm):
    if algorithm in ("auto", "depthwise") and conv_depthwise.applies(it, x, y):
        conv_depthwise.correlate(it, x, weight, y, bias, extra, code)
    elif algorithm == "gemm":
        conv_product.correlate(it, x, weight, y, bias, extra, code)
    else:
        conv_direct.correlate(it, x, weight, y, bias, extra, code)


def _forward(x, weight, size, bias, extra, code, algorithm, **window):
    """activation(the convolution of x + bias + extra), of that many rows and columns."""
    it = conv_geometry.forward(x.shape, weight.shape, size, **window)
    y = x.place.empty(it.shape_y, x.dtype)
    if y.size:
        _correlate(it, x, weight, y, bias, extra, code, algorithm)
    return y


def _transposed(grad, weight, shape, bias, **window):
    """conv2d's gradient with respect to an x of that shape, plus bias."""
    result = grad.place.empty(shape, grad.dtype)
    if result.size:
        for it in conv_geometry.transposed(grad.shape, weight.shape, shape, **window):
            _correlate(it, grad, weight, result, bias, None, NONE, "auto")
    return result


def _weight_gradient(grad, x, weight, **window):
    it = conv_geometry.forward(x.shape, weight.shape, conv_geometry.pixels(grad.shape, window["layout"]), **window)
    if conv_depthwise_weight.applies(it):
        return conv_depthwise_weight.weight_gradient(it, grad, x, weight.shape)
    return conv_sums.weight_gradient(it, grad, x, weight.shape)


def conv2d(x, weight, bias, add, *, stride, padding, dilation, groups, layout, activation, algorithm):
    window = _window(stride, padding, dilation, groups, layout)
    size = conv_geometry.output_size(x.shape, weight.shape, **window)
    return _forward(x, weight, size, bias, add, ACTIVATION_CODES[activation], algorithm, **window)


def conv2d_backward(grad, x, weight, *, stride, padding, dilation, groups, layout, needs):
    window = _window(stride, padding, dilation, groups, layout)
    return (
        _transposed(grad, weight, x.shape, None, **window) if "x" in needs else None,
        _weight_gradient(grad, x, weight, **window) if "weight" in needs else None,
        conv_sums.bias_gradient(grad, layout) if "bias" in needs else None,
    )


def conv_transpose2d(x, weight, bias, *, stride, padding, output_padding, groups, dilation, layout):
    size = [
        (n - 1) * s - sum(pads) + d * (k - 1) + extra + 1
        for n, s, pads, d, k, extra in zip(
            conv_geometry.pixels(x.shape, layout), stride, padding, dilation, weight.shape[2:], output_padding,
            strict=True,
        )
    ]  # fmt: skip
    shape = conv_geometry.image_shape(x.shape[0], weight.shape[1] * groups, size, layout)
    return _transposed(x, weight, shape, bias, **_window(stride, padding, dilation, groups, layout))


def conv_transpose2d_backward(grad, x, weight, *, stride, padding, output_padding, groups, dilation, layout, needs):
    del output_padding  # in grad's shape already; the pixels it added are beyond the last window
    window, size = _window(stride, padding, dilation, groups, layout), conv_geometry.pixels(x.shape, layout)
    return (
        _forward(grad, weight, size, None, None, NONE, "auto", **window) if "x" in needs else None,
        _weight_gradient(x, grad, weight, **window) if "weight" in needs else None,
        conv_sums.bias_gradient(grad, layout) if "bias" in needs else None,
    )
