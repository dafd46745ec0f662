"""The gradients of a convolution with respect to its weights and its bias: which kernel takes them.

All of them are `run(grad, x, wants_weight, wants_bias)`, which returns (grad_weight or None, grad_bias or None). The
bias's gradient, the sum of grad over its pixels, comes from the pass over grad that the weights' needs anyway.

- Depthwise: conv_depthwise_weight.py. 1x1: conv_pointwise_weight.py. All others: conv_weight.py, a product that sums
  over pixels, or for 3x3 Winograd's transposed, conv_winograd_weight.py.
"""

from math import prod

import numpy as np

from tilewise.kernels.cpu import conv_weight, conv_winograd_weight
from tilewise.kernels.cpu.conv_choice import tap_offsets, why_not_winograd
from tilewise.kernels.cpu.conv_depthwise_weight import WeightGradient
from tilewise.kernels.cpu.conv_pass import COST, image_size
from tilewise.kernels.cpu.conv_pointwise_weight import PointwiseGradient

# The implicit product on the machine of conv_winograd_weight's estimate: FLOPs a nanosecond, and nanoseconds a weight
# for its sums' way through the caches, which few pixels do not hide.
WEIGHT_RATE, WEIGHT_COST = 190, 0.35


def prepare_weight_gradient(grad, x, weight, dtype, *, stride, padding, dilation, groups, layout):
    all_outputs, channels, kh, kw = weight
    if prod(grad) == 0 or prod(x) == 0:
        return _Empty(weight, dtype, layout)
    taps = tap_offsets((kh, kw), dilation, padding)
    if groups > 1 and channels == 1 and (layout == "NCHW" or all_outputs == groups):
        return WeightGradient(grad, x, weight, taps, stride, layout, dtype)
    size, grid, outputs = image_size(x, layout), image_size(grad, layout), all_outputs // groups
    if groups == 1 and (kh, kw) == (1, 1) and _inside(size, grid, stride, padding):
        return PointwiseGradient(grad, x, weight, stride, layout, dtype)
    implicit = _ImplicitProduct(grad, x, weight, dtype, taps, stride, groups, layout)
    if groups > 1 or why_not_winograd(weight, dtype, stride, dilation, layout):
        return implicit
    nanoseconds = conv_winograd_weight.estimate(x[0], channels, outputs, grid)
    if nanoseconds > 2 * prod(grad) * channels * 9 / WEIGHT_RATE + prod(weight) * WEIGHT_COST:
        return implicit
    return _Winograd(grad, x, weight, dtype, taps, layout, nanoseconds, implicit)


def _inside(size, grid, stride, padding):
    """Whether the only tap of every pixel lies in x."""
    return all(p[0] == 0 and (g - 1) * s < n for n, g, s, p in zip(size, grid, stride, padding, strict=True))


class _Empty:
    """No products at all."""

    def __init__(self, weight, dtype, layout):
        self.weight, self.dtype, self.layout = weight, dtype, layout

    def __call__(self, grad, x, wants_weight, wants_bias):
        grad_weight = np.zeros(self.weight, self.dtype) if wants_weight else None
        return grad_weight, bias_gradient(grad, self.layout) if wants_bias else None


class _ImplicitProduct:
    """By conv_weight.py."""

    def __init__(self, grad, x, weight, dtype, taps, stride, groups, layout):
        self.weight, self.dtype = weight, dtype
        size, grid, outputs = image_size(x, layout), image_size(grad, layout), weight[0] // groups
        self.plan: tuple[np.ndarray, ...]
        if layout == "NHWC":
            self.plan = conv_weight.plan_nhwc((x[0], *size, weight[1]), outputs, taps, stride, grid, groups)
            function = conv_weight.weight_gradient_nhwc
        else:
            shape = (x[0], weight[1], *size)
            self.plan = conv_weight.plan_nchw(shape, outputs, taps, stride, grid, groups, dtype.itemsize)
            function = conv_weight.weight_gradient_nchw
        self.kernel = function.sized(2 * prod(grad) * prod(weight[1:]) * COST["gemm"])

    def __call__(self, grad, x, wants_weight, wants_bias):
        result, bias = _results(self.weight, self.dtype, wants_weight, wants_bias)
        self.kernel(x.ravel(), grad.ravel(), result.ravel(), bias, *self.plan)
        return result if wants_weight else None, bias if wants_bias else None


class _Winograd:
    """By conv_winograd_weight.py; where that leaves a number that is not finite, by the implicit product."""

    def __init__(self, grad, x, weight, dtype, taps, layout, nanoseconds, implicit):
        self.weight, self.dtype, self.implicit = weight, dtype, implicit
        self.kernel = conv_winograd_weight.weight_gradient.sized(nanoseconds)
        self.plan = conv_winograd_weight.plan(
            x[0], weight[1], image_size(x, layout), weight[0], image_size(grad, layout), [int(t[0]) for t in taps],
            layout == "NHWC",
        )  # fmt: skip

    def __call__(self, grad, x, wants_weight, wants_bias):
        result, bias = _results(self.weight, self.dtype, wants_weight, wants_bias)
        if self.kernel(x.ravel(), grad.ravel(), result.ravel(), bias, *self.plan):
            return result if wants_weight else None, bias if wants_bias else None
        return self.implicit(grad, x, wants_weight, wants_bias)


def _results(weight, dtype, wants_weight, wants_bias):
    """Memory for both; empty where not wanted."""
    return np.empty(weight if wants_weight else 0, dtype), np.empty(weight[0] if wants_bias else 0, dtype)


def bias_gradient(grad, layout):
    """The sum of grad over images and pixels alone."""
    if layout == "NHWC":
        sums = np.empty(grad.shape[3], grad.dtype)
        conv_weight.pixel_sums(0.3 * grad.size, grad.ravel(), prod(grad.shape[:3]), sums)
        return sums
    n, outputs, h, w = grad.shape
    sums = np.empty(outputs, grad.dtype)
    conv_weight.channel_sums(0.3 * grad.size, grad.ravel(), n, outputs, h * w, sums)
    return sums
