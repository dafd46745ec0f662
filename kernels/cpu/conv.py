"""Convolution on the CPU: the choice of algorithm, and every gradient as one of three kinds of pass.

- Forward: a matrix product that reads x in place (conv_nchw.py, conv_nhwc.py), Winograd's F(4x4, 3x3)
  (conv_winograd.py, conv_winograd_nhwc.py), depthwise in registers (conv_depthwise.py), or row by row (conv_direct.py);
  conv_pass.py puts them behind one call.
- Gradient with respect to x, and the transposed convolution, which is the same map: with stride 1 a convolution of grad
  with flipped weights. With a stride, the pixels of x fall into stride_h * stride_w phases; in each, only every
  stride-th tap meets a pixel of grad, and those form a convolution of stride 1 by a smaller kernel. No zeros are
  multiplied, and every pixel is written once.
- Gradient with respect to the weights: a product that sums over pixels (conv_weight.py), or Winograd's transposed
  (conv_winograd_weight.py).

What follows from shapes and options alone is worked out once, by the `prepare_` functions, which the dispatcher calls
for a new signature and whose result it keeps: a call on a tiny input would otherwise spend most of its time in
Python.
"""

from math import prod
from typing import Any

import numpy as np

from tilewise.kernels.cpu import (
    conv_columns,
    conv_pointwise_input,
    conv_weight,
    conv_winograd_nhwc,
    conv_winograd_weight,
)
from tilewise.kernels.cpu.conv_depthwise import Depthwise
from tilewise.kernels.cpu.conv_depthwise_weight import WeightGradient
from tilewise.kernels.cpu.conv_pass import (
    COST,
    NO_BIAS,
    exchange_channels,
    few_tiles,
    image_size,
    layout_shape,
    prepare_pass,
    turn_planes,
)  # fmt: skip
from tilewise.kernels.cpu.conv_pointwise_input import PointwiseInput
from tilewise.kernels.cpu.conv_pointwise_weight import PointwiseGradient
from tilewise.kernels.cpu.conv_winograd import TILES
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES
from tilewise.kernels.cpu.scratch import empty
from tilewise.kernels.cpu.simd import MR

# Below this many FLOPs, walking the rows is faster than setting up panels.
DIRECT_BELOW = 4_000
# FLOPs a nanosecond of the weight gradient as an implicit product, on the machine of conv_winograd_weight's estimate.
WEIGHT_RATE = 190


def choose_conv2d(shapes, dtype, options, packed=False):
    """(algorithm, why not the others) for this problem; raises ValueError where the one asked for does not apply.

    packed: the weights are packed once, not in each call.
    """
    x, weight, *_ = shapes
    nhwc = options["layout"] == "NHWC"
    multiplier = weight[0] // options["groups"]
    oh, ow = _output_size(x, weight, options)
    why_not = {}
    reason = _why_not_winograd(weight, dtype, options["stride"], options["dilation"], options["layout"])
    if reason:
        why_not["winograd"] = reason
    if weight[1] != 1 or options["groups"] == 1:
        why_not["depthwise"] = "needs several groups of one input channel each"
    elif nhwc and multiplier != 1:
        why_not["depthwise"] = "in NHWC, needs one output channel a group"
    wanted = options["algorithm"]
    if wanted != "auto":
        if wanted in why_not:
            raise ValueError(f"conv2d: algorithm {wanted!r} does not apply: {why_not[wanted]}")
        return wanted, why_not
    if "depthwise" not in why_not:
        return "depthwise", why_not | {"gemm": "a group is too thin for a register tile", "direct": "slower"}
    if 2 * x[0] * prod(weight) * oh * ow < DIRECT_BELOW:
        return "direct", why_not | {"gemm": f"fewer than {DIRECT_BELOW} FLOPs"}
    why_not["direct"] = f"{DIRECT_BELOW} FLOPs or more"
    if "winograd" in why_not:
        return "gemm", why_not
    estimates = _estimates(x[0], options["groups"], weight, oh, ow, options["layout"], packed)
    best = min(estimates, key=estimates.__getitem__)
    for name, nanoseconds in estimates.items():
        if name != best:
            why_not[name] = f"estimated {nanoseconds / 1e3:.0f} us, {best} {estimates[best] / 1e3:.0f} us"
    return best, why_not


def _why_not_winograd(weight, dtype, stride, dilation, layout):
    """Why F(4x4, 3x3) does not apply; None where it does."""
    if weight[2:] != (3, 3) or stride != (1, 1) or dilation != (1, 1):
        return "needs a 3x3 kernel with stride and dilation 1"
    if dtype != np.float32:
        return "float32 only: its error is not small beside the rounding of float64"
    return None


def _estimates(n, groups, weight, oh, ow, layout, packed=False):
    """Nanoseconds on one thread, fitted to ResNet-50's and VGG-16's 3x3 layers on two AVX-512 machines, and scaled to
    115 GFLOP/s for the implicit product: only the proportions matter.

    Winograd: 36 products of a block of tiles, the transforms of its inputs and outputs, and the transform of the
    weights, whose 36 numbers each are written and read once and cost more where they do not fit a cache. Packed weights
    are only read, but those of Winograd are four times as many.
    """
    outputs, channels = weight[0] // groups, weight[1]
    gemm = 2 * 9 * channels * outputs * oh * ow * n / 115
    tiles = n * conv_winograd_nhwc.count_tiles(oh, ow)
    weights = 36 * channels * outputs
    few = few_tiles(n, groups, weight, oh, ow)
    if few or layout == "NHWC":
        tiles, cost = -(-tiles // MR) * MR, 0.15 if few else 1.2 if weights < 1 << 22 else 3
    else:
        tiles, cost = -(-tiles // TILES) * TILES, 1.2 if weights < 1 << 22 else 3
    cost = 0.1 if packed else cost
    products = 36 * channels * outputs * tiles * 2 / 125
    transforms = (12 if few else 24) * tiles * (channels + outputs)
    return {"gemm": groups * gemm, "winograd": groups * (products + transforms + weights * cost)}


def _output_size(x, weight, options):
    sizes = zip(
        image_size(x, options["layout"]), options["padding"], options["dilation"], weight[2:], options["stride"],
        strict=True,
    )  # fmt: skip
    return [(n + p[0] + p[1] - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes]


def _tap_offsets(kernel_size, dilation, padding):
    """Where the taps of pixel (0, 0) lie in x: rows, and columns."""
    return [np.arange(k) * d - p[0] for k, d, p in zip(kernel_size, dilation, padding, strict=True)]


def _forward(
    x, weight, dtype, *, stride, padding, dilation, groups, layout, activation, algorithm
) -> tuple[tuple[int, ...], Any]:
    """(the result's shape, the pass that fills it); no pass where it has no elements."""
    options = {"stride": stride, "padding": padding, "dilation": dilation, "layout": layout}
    oh, ow = _output_size(x, weight, options)
    shape = layout_shape(x[0], weight[0], oh, ow, layout)
    if prod(shape) == 0:
        return shape, None
    taps = _tap_offsets(weight[2:], dilation, padding)
    code = ACTIVATION_CODES[activation]
    if algorithm == "depthwise":
        axes = [[(np.arange(offsets.size), offsets)] for offsets in taps]
        return shape, Depthwise(x, weight, shape, axes, stride, layout, dtype, code)
    grid = (0, 0, 1, 1, oh, ow)
    return shape, prepare_pass(x, weight, shape, dtype, taps, stride, grid, groups, layout, algorithm, code)


def prepare_conv2d(shapes, dtype, **options):
    x, weight, *_ = shapes
    shape, forward = _forward(x, weight, dtype, **options)
    nothing = NO_BIAS[dtype]
    if forward is None:
        return lambda x, weight, bias, add, *, out=None: np.empty(shape, dtype) if out is None else out

    def run(x, weight, bias, add, *, out=None):
        if out is None:
            out = empty(shape, dtype)
        bias, add = nothing if bias is None else bias, nothing if add is None else add.ravel()
        forward(x, weight, out, bias, add, nothing)
        return out

    return run


def bind_conv2d(shapes, dtype, arrays, packs, **options):
    """conv2d with weight and bias, in `arrays`, given once: run(x, add=None, *, out=None).

    packs: packing -> packed weights, for all calls with these weights; what is missing is added.
    """
    weight, bias = arrays["weight"], arrays["bias"]
    shape, forward = _forward(shapes[0], weight.shape, dtype, **options)
    nothing = NO_BIAS[dtype]
    if forward is None:
        return lambda x, add=None, *, out=None: np.empty(shape, dtype) if out is None else out
    packed = nothing
    if forward.packing is not None:
        if forward.packing not in packs:
            packs[forward.packing] = forward.pack(weight)
        packed = packs[forward.packing]
    bias = nothing if bias is None else bias

    def run(x, add=None, *, out=None):
        if out is None:
            out = empty(shape, dtype)
        forward(x, weight, out, bias, nothing if add is None else add.ravel(), packed)
        return out

    return run


def conv2d(x, weight, bias, add, *, stride, padding, dilation, groups, layout, activation, algorithm, out=None):
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    run = prepare_conv2d((x.shape, weight.shape), x.dtype, activation=activation, algorithm=algorithm, **options)
    return run(x, weight, bias, add, out=out)


def _phase(first, stride, padding, dilation, kernel_size):
    """The taps that meet pixels `first`, `first + stride`, ... of x, and their offsets in grad, ascending."""
    taps = [k for k in reversed(range(kernel_size)) if (first + padding - dilation * k) % stride == 0]
    offsets = [(first + padding - dilation * k) // stride for k in taps]
    return np.array(taps, np.int64), np.array(offsets, np.int64)


def _choose_transposed(grad, weight, size, dtype, stride, dilation, groups, layout):
    """The algorithm of the convolutions that make up a transposed one."""
    outputs, channels = weight[0] // groups, weight[1]
    if groups > 1 and outputs == channels == 1:
        return "depthwise"
    if 2 * prod(grad) * prod(weight[1:]) < DIRECT_BELOW:
        return "direct"
    if _why_not_winograd(weight, dtype, stride, dilation, layout):
        return "gemm"
    estimates = _estimates(grad[0], groups, (channels * groups, outputs, 3, 3), *size, layout)
    return min(estimates, key=estimates.__getitem__)


class _TransposedConvolution:
    """result (+ bias) = the transpose of the convolution by `weight`, applied to grad; fills every pixel of result."""

    def __init__(self, grad, weight, result, dtype, *, stride, padding, dilation, groups, layout):
        outputs, channels, kh, kw = weight[0] // groups, weight[1], *weight[2:]
        size = image_size(result, layout)
        self.sizes = (groups, outputs, channels, kh * kw)
        self.channels_last = layout == "NHWC"
        algorithm = _choose_transposed(grad, weight, size, dtype, stride, dilation, groups, layout)
        self.phases = []
        self.whole = None  # one call instead
        if prod(grad) and prod(result):
            axes = [
                [_phase(i, s, p[0], d, k) for i in range(min(s, n))]
                for s, p, d, k, n in zip(stride, padding, dilation, (kh, kw), size, strict=True)
            ]
            if algorithm == "depthwise":
                self.whole = Depthwise(grad, weight, result, axes, (1, 1), layout, dtype)
                return
            if algorithm != "direct" and conv_columns.applies(weight, stride, groups, layout):
                self.whole = conv_columns.Columns(grad, weight, result, dtype, stride, padding, dilation, layout)
                return
            unpadded = [tuple(int(offset[0]) for _, offset in axis if offset.size) for axis in axes] == [(0,), (0,)]
            if unpadded and conv_pointwise_input.applies(weight, size, image_size(grad, layout), groups, layout):
                self.whole = PointwiseInput(grad, weight, layout, dtype)
                return
            for i, (rows, row_offsets) in enumerate(axes[0]):
                for j, (columns, column_offsets) in enumerate(axes[1]):
                    if rows.size == 0 or columns.size == 0:
                        continue
                    shape = (groups * channels, outputs, rows.size, columns.size)
                    grid = (i, j, *stride, -(-(size[0] - i) // stride[0]), -(-(size[1] - j) // stride[1]))
                    taps = (row_offsets, column_offsets)
                    move = prepare_pass(grad, shape, result, dtype, taps, (1, 1), grid, groups, layout, algorithm)
                    wanted = (rows[:, None] * kw + columns).ravel()
                    self.phases.append((shape, self._prepare_exchange(shape, wanted, kh * kw), move))
        # pixels that no tap meets keep the bias alone
        self.fill_first = len(self.phases) < min(stride[0], size[0]) * min(stride[1], size[1])

    def _prepare_exchange(self, shape, wanted, taps):
        """The weights of a phase: outputs and channels change places, and the taps `wanted` their order."""
        groups, outputs, channels = self.sizes[:3]
        if taps == 1:
            return turn_planes.sized(1.0 * prod(shape)), (groups, outputs, channels)
        return exchange_channels.sized(2.0 * prod(shape)), (*self.sizes, wanted)

    def __call__(self, grad, weight, result, bias):
        if self.whole:
            self.whole(grad, weight, result, bias)
            return
        if self.fill_first:
            result[...] = 0
            if bias.size:
                result += bias if self.channels_last else bias[:, None, None]
        for shape, (exchange, sizes), move in self.phases:
            phase = np.empty(shape, weight.dtype)
            exchange(weight.ravel(), *sizes, phase.ravel())
            move(grad, phase, result, bias)


def prepare_conv2d_backward(shapes, dtype, *, stride, padding, dilation, groups, layout, needs):
    grad, x, weight = shapes
    no_bias = NO_BIAS[dtype]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    to_x = _TransposedConvolution(grad, weight, x, dtype, **options) if "x" in needs else None
    wants = "weight" in needs, "bias" in needs
    to_weight = _prepare_weight_gradient(grad, x, weight, dtype, **options) if any(wants) else None
    together = to_weight if isinstance(to_weight, (WeightGradient, PointwiseGradient)) and wants[1] else None
    to_weight, to_bias = to_weight if together or wants[0] else None, _bias_gradient if wants[1] else None

    def run(grad, x, weight):
        grad_x = None
        if to_x:
            grad_x = empty(x.shape, dtype)
            to_x(grad, weight, grad_x, no_bias)
        if together:
            return grad_x, *together.gradients(grad, x, wants[0])
        return grad_x, to_weight(grad, x) if to_weight else None, to_bias(grad, layout) if to_bias else None

    return run


def conv2d_backward(grad, x, weight, *, stride, padding, dilation, groups, layout, needs):
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    shapes = (grad.shape, x.shape, weight.shape)
    return prepare_conv2d_backward(shapes, x.dtype, needs=needs, **options)(grad, x, weight)


def _prepare_weight_gradient(grad, x, weight, dtype, *, stride, padding, dilation, groups, layout):
    all_outputs, channels, kh, kw = weight
    if prod(grad) == 0 or prod(x) == 0:
        return lambda grad, x: np.zeros(weight, x.dtype)
    taps = _tap_offsets((kh, kw), dilation, padding)
    if groups > 1 and channels == 1 and (layout == "NCHW" or all_outputs == groups):
        return WeightGradient(grad, x, weight, taps, stride, layout, dtype)
    size, grid, outputs = image_size(x, layout), image_size(grad, layout), all_outputs // groups
    if groups == 1 and (kh, kw) == (1, 1) and _inside(size, grid, stride, padding):
        return PointwiseGradient(grad, x, weight, stride, layout, dtype)
    flops = 2 * prod(grad) * channels * kh * kw
    if layout == "NHWC":
        plan = conv_weight.plan_nhwc((x[0], *size, channels), outputs, taps, stride, grid, groups)
        function = conv_weight.weight_gradient_nhwc
    else:
        plan = conv_weight.plan_nchw((x[0], channels, *size), outputs, taps, stride, grid, groups, dtype.itemsize)
        function = conv_weight.weight_gradient_nchw
    function = function.sized(flops * COST["gemm"])

    def run(grad, x):
        result = np.empty(weight, dtype)
        function(x.ravel(), grad.ravel(), result.ravel(), *plan)
        return result

    if groups > 1 or _why_not_winograd(weight, dtype, stride, dilation, layout):
        return run
    nanoseconds = conv_winograd_weight.estimate(x[0], channels, outputs, grid)
    if nanoseconds > flops / WEIGHT_RATE:
        return run
    winograd = conv_winograd_weight.weight_gradient.sized(nanoseconds)
    lows = [int(t[0]) for t in taps]
    winograd_plan = conv_winograd_weight.plan(x[0], channels, size, outputs, grid, lows, layout == "NHWC")

    def run_winograd(grad, x):
        result = np.empty(weight, dtype)
        finite = winograd(x.ravel(), grad.ravel(), result.ravel(), *winograd_plan)
        return result if finite else run(grad, x)

    return run_winograd


def _inside(size, grid, stride, padding):
    """Whether the only tap of every pixel lies in x."""
    return all(p[0] == 0 and (g - 1) * s < n for n, g, s, p in zip(size, grid, stride, padding, strict=True))


def _bias_gradient(grad, layout):
    if layout == "NHWC":
        sums = np.empty(grad.shape[3], grad.dtype)
        conv_weight.pixel_sums(0.3 * grad.size, grad.ravel(), prod(grad.shape[:3]), sums)
        return sums
    n, outputs, h, w = grad.shape
    sums = np.empty(outputs, grad.dtype)
    conv_weight.channel_sums(0.3 * grad.size, grad.ravel(), n, outputs, h * w, sums)
    return sums


def prepare_conv_transpose2d(shapes, dtype, *, stride, padding, output_padding, groups, dilation, layout):
    x, weight, _ = shapes
    sizes = zip(image_size(x, layout), stride, padding, dilation, weight[2:], output_padding, strict=True)
    size = [(n - 1) * s - p[0] - p[1] + d * (k - 1) + extra + 1 for n, s, p, d, k, extra in sizes]
    shape = layout_shape(x[0], weight[1] * groups, *size, layout)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    transposed = _TransposedConvolution(x, weight, shape, dtype, **options)
    no_bias = NO_BIAS[dtype]

    def run(x, weight, bias):
        result = empty(shape, dtype)
        transposed(x, weight, result, no_bias if bias is None else bias)
        return result

    return run


def conv_transpose2d(x, weight, bias, *, stride, padding, output_padding, groups, dilation, layout):
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    shapes = (x.shape, weight.shape, None)
    return prepare_conv_transpose2d(shapes, x.dtype, output_padding=output_padding, **options)(x, weight, bias)


def prepare_conv_transpose2d_backward(
    shapes, dtype, *, stride, padding, output_padding, groups, dilation, layout, needs
):
    grad, x, weight = shapes
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    to_x = _prepare_input_gradient(grad, x, weight, dtype, **options) if "x" in needs else None
    to_weight = _prepare_weight_gradient(x, grad, weight, dtype, **options) if "weight" in needs else None
    to_bias = _bias_gradient if "bias" in needs else None

    def run(grad, x, weight):
        return (
            to_x(grad, weight) if to_x else None,
            to_weight(x, grad) if to_weight else None,
            to_bias(grad, layout) if to_bias else None,
        )

    return run


def _prepare_input_gradient(grad, x, weight, dtype, *, stride, padding, dilation, groups, layout):
    """grad_x of a transposed convolution: the convolution of grad, as large as x."""
    if prod(x) == 0:
        return lambda grad, weight: np.empty(x, dtype)
    algorithm = "direct" if 2 * prod(x) * prod(weight[1:]) < DIRECT_BELOW else "gemm"
    grid = (0, 0, 1, 1, *image_size(x, layout))
    taps, no_bias = _tap_offsets(weight[2:], dilation, padding), NO_BIAS[dtype]
    if groups > 1 and weight[0] == groups and weight[1] == 1:
        move = Depthwise(grad, weight, x, [[(np.arange(t.size), t)] for t in taps], stride, layout, dtype)
    else:
        move = prepare_pass(grad, weight, x, dtype, taps, stride, grid, groups, layout, algorithm)

    def run(grad, weight):
        result = empty(x, dtype)
        move(grad, weight, result, no_bias)
        return result

    return run


def conv_transpose2d_backward(grad, x, weight, *, stride, padding, output_padding, groups, dilation, layout, needs):
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    shapes = (grad.shape, x.shape, weight.shape)
    run = prepare_conv_transpose2d_backward(shapes, x.dtype, output_padding=output_padding, needs=needs, **options)
    return run(grad, x, weight)
