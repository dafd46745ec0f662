"""Convolution on the GPU; conv_plan.py chooses the algorithm."""

from tilewise.kernels import conv_winograd_plan
from tilewise.kernels.activation_plan import ACTIVATION_CODES
from tilewise.kernels.conv_plan import Convolution, fits_a_grid, is_depthwise_weight, is_little
from tilewise.kernels.cuda import (
    conv_depthwise,
    conv_depthwise_weight,
    conv_direct,
    conv_product,
    conv_product_weight,
    conv_sums,
    conv_tensor,
    conv_tensor_weight,
    conv_winograd,
)
from tilewise.kernels.device_arrays import engine_at


def _by_product(it, x, weight, y, bias, extra, code, kept):
    if not conv_tensor.applies(it, x.dtype, x.place.engine):
        conv_product.correlate(it, x, weight, y, bias, extra, code)
        return
    if "vectors" not in kept:
        kept["vectors"] = conv_tensor.in_vectors(x, it.layout, it.groups)
    conv_tensor.correlate(it, kept["vectors"], weight, y, bias, extra, code)


def _alone(module):
    """A module's `correlate`, which keeps nothing of x."""
    return lambda *arguments: module.correlate(*arguments[:-1])


def _weight_gradient(it, grad, x, shape, kept):
    if is_depthwise_weight(it):
        return conv_depthwise_weight.weight_gradient(it, grad, x, shape)
    if is_little(it) or not fits_a_grid(it):
        return conv_sums.weight_gradient(it, grad, x, shape)
    if conv_tensor.applies(it, x.dtype, x.place.engine):
        return conv_tensor_weight.weight_gradient(it, grad, x, shape, kept)
    return conv_product_weight.weight_gradient(it, grad, x, shape)


_CONVOLUTION = Convolution(
    "cuda",
    {
        "depthwise": _alone(conv_depthwise), "direct": _alone(conv_direct), "gemm": _by_product,
        "winograd": _alone(conv_winograd),
    },
    _weight_gradient, conv_sums.bias_gradient, ACTIVATION_CODES, conv_winograd.why_not, conv_winograd_plan.pays,
    by_tensor_cores=lambda it, dtype, ordinal: conv_tensor.applies(it, dtype, engine_at("cuda", ordinal)),
    tf32_is_faster=conv_winograd.tf32_is_faster,
)  # fmt: skip

choose_conv2d, bind_conv2d, conv2d = _CONVOLUTION.choose_conv2d, _CONVOLUTION.bind_conv2d, _CONVOLUTION.conv2d
conv2d_backward = _CONVOLUTION.conv2d_backward
conv_transpose2d = _CONVOLUTION.conv_transpose2d
conv_transpose2d_backward = _CONVOLUTION.conv_transpose2d_backward
