"""Convolution on the CPU: the choice of algorithm, and every gradient as one of three kinds of pass.

- Forward: a matrix product over implicitly gathered columns (conv_nchw.py, conv_nhwc.py), Winograd's F(4x4, 3x3)
  (conv_winograd.py), or row by row (conv_direct.py).
- Gradient with respect to x, and the transposed convolution, which is the same map: with stride 1 a convolution of grad
  with flipped weights. With a stride, the pixels of x fall into stride_h * stride_w phases; in each, only every
  stride-th tap meets a pixel of grad, and those form a convolution of stride 1 by a smaller kernel. No zeros are
  multiplied, and every pixel is written once.
- Gradient with respect to the weights: a product that sums over pixels (conv_weight.py).

What follows from shapes and options alone is worked out once, by the `prepare_` functions, which the dispatcher calls
for a new signature and whose result it keeps: a call on a tiny input would otherwise spend most of its time in
Python.
"""

from math import prod

import numpy as np

from tilewise.kernels.cpu import conv_direct, conv_nchw, conv_nhwc, conv_weight, conv_winograd
from tilewise.kernels.cpu.conv_winograd import TILES
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES
from tilewise.kernels.cpu.gemm import column_sums
from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.scratch import empty

_NO_BIAS = {np.dtype(t): np.empty(0, t) for t in (np.float32, np.float64)}
_KERNELS = {
    ("NCHW", "winograd"): conv_winograd.convolve,
    ("NCHW", "direct"): conv_direct.rows_nchw,
    ("NCHW", "depthwise"): conv_direct.rows_nchw,
    ("NHWC", "gemm"): conv_nhwc.convolve,
    ("NHWC", "direct"): conv_direct.definition_nhwc,
    ("NHWC", "depthwise"): conv_direct.depthwise_nhwc,
}
# Estimated serial nanoseconds per FLOP, for the decision to split over threads.
_COST = {"gemm": 0.015, "winograd": 0.008, "depthwise": 0.1, "direct": 0.5}
# Below this many FLOPs, walking the rows is faster than setting up panels.
DIRECT_BELOW = 4_000


def choose_conv2d(shapes, dtype, options):
    """(algorithm, why not the others) for this problem; raises ValueError where the one asked for does not apply."""
    x, weight, _ = shapes
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
    estimates = _estimates(x[0], options["groups"], weight, oh, ow)
    best = min(estimates, key=estimates.__getitem__)
    for name, nanoseconds in estimates.items():
        if name != best:
            why_not[name] = f"estimated {nanoseconds / 1e3:.0f} us, {best} {estimates[best] / 1e3:.0f} us"
    return best, why_not


def _why_not_winograd(weight, dtype, stride, dilation, layout):
    """Why F(4x4, 3x3) does not apply; None where it does."""
    if layout != "NCHW":
        return "NCHW only"
    if weight[2:] != (3, 3) or stride != (1, 1) or dilation != (1, 1):
        return "needs a 3x3 kernel with stride and dilation 1"
    if dtype != np.float32:
        return "float32 only: its error is not small beside the rounding of float64"
    return None


def _estimates(n, groups, weight, oh, ow):
    """Nanoseconds on one thread, fitted to ResNet-50's and VGG-16's 3x3 layers on one AVX-512 machine.

    Winograd: 36 products of a block of tiles, the transforms of its inputs and outputs,
    and the transform of the weights,
    whose 36 numbers each are written and read once and cost more where they do not fit a cache.
    """
    outputs, channels = weight[0] // groups, weight[1]
    gemm = 2 * 9 * channels * outputs * oh * ow * n / 115
    blocks = -(-n * -(-oh // 4) * -(-ow // 4) // TILES)
    products = 36 * channels * outputs * TILES * 2 / 148
    transforms = 24 * TILES * (channels + outputs)
    weights = 36 * channels * outputs
    return {
        "gemm": groups * gemm,
        "winograd": groups * (blocks * (products + transforms) + weights * (1.2 if weights < 1 << 22 else 3)),
    }


def _image_size(shape, layout):
    return shape[1:3] if layout == "NHWC" else shape[2:4]


def _layout_shape(n, channels, h, w, layout):
    return (n, h, w, channels) if layout == "NHWC" else (n, channels, h, w)


def _output_size(x, weight, options):
    sizes = zip(
        _image_size(x, options["layout"]), options["padding"], options["dilation"], weight[2:], options["stride"],
        strict=True,
    )  # fmt: skip
    return [(n + p[0] + p[1] - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes]


def _tap_offsets(kernel_size, dilation, padding):
    """Where the taps of pixel (0, 0) lie in x: rows, and columns."""
    return [np.arange(k) * d - p[0] for k, d, p in zip(kernel_size, dilation, padding, strict=True)]


class _Pass:
    """One convolution with everything but the arrays worked out; see `conv_nchw.convolve` for the kernels' arguments.

    taps: the taps' offsets in x, rows and columns. grid: (first row, first column, row step, column step, rows,
    columns) of the pixels of y to compute.
    """

    __slots__ = ("activation", "by_tap", "head", "kernel", "middle", "tail")

    def __init__(self, x, weight, y, taps, stride, grid, groups, layout, algorithm, activation=0):
        n, channels = x[0], weight[1]
        outputs = weight[0] // groups
        h, w = _image_size(x, layout)
        height, width = _image_size(y, layout)
        first_row, first_column, row_step, column_step, oh, ow = grid
        outer, pixel = (height * width * weight[0], weight[0]) if layout == "NHWC" else (height * width, 1)
        self.kernel = _KERNELS[layout, algorithm].sized(2 * n * prod(weight) * oh * ow * _COST[algorithm])
        self.head = (n, groups, channels, h, w)
        self.middle = (outputs, *taps, *stride, oh, ow)
        start = (first_row * width + first_column) * pixel
        self.tail = (start, outer, row_step * width * pixel, column_step * pixel)
        self.activation = activation
        self.by_tap = layout == "NHWC" and algorithm == "depthwise"

    def __call__(self, x, weight, y, bias):
        if self.by_tap:  # a tap's factors side by side
            weight = np.ascontiguousarray(weight.reshape(weight.shape[0], -1).T)
        self.kernel(
            x.ravel(), *self.head, weight.ravel(), *self.middle, y.ravel(), *self.tail, bias,
            self.activation,
        )  # fmt: skip


class _ImplicitProduct:
    """One NCHW convolution by `conv_nchw.convolve`; arguments as `_Pass`."""

    __slots__ = ("kernel", "plan")

    def __init__(self, x, weight, y, dtype, taps, stride, grid, groups, activation):
        outputs, channels = weight[0] // groups, weight[1]
        height, width = y[2:]
        first_row, first_column, row_step, column_step, oh, ow = grid
        y_steps = (first_row * width + first_column, height * width, row_step * width, column_step)
        shape = (x[0], channels, *x[2:])
        itemsize = dtype.itemsize
        self.plan = conv_nchw.plan(shape, outputs, taps, stride, (oh, ow), y_steps, groups, itemsize, activation)
        self.kernel = conv_nchw.convolve.sized(2 * x[0] * prod(weight) * oh * ow * _COST["gemm"])

    def __call__(self, x, weight, y, bias):
        self.kernel(x.ravel(), weight.ravel(), y.ravel(), bias, _NO_BIAS[x.dtype], *self.plan)


def _prepare_pass(x, weight, y, dtype, taps, stride, grid, groups, layout, algorithm, activation=0):
    if (layout, algorithm) == ("NCHW", "gemm"):
        return _ImplicitProduct(x, weight, y, dtype, taps, stride, grid, groups, activation)
    return _Pass(x, weight, y, taps, stride, grid, groups, layout, algorithm, activation)


def prepare_conv2d(shapes, dtype, *, stride, padding, dilation, groups, layout, activation, algorithm):
    x, weight, _ = shapes
    options = {"stride": stride, "padding": padding, "dilation": dilation, "layout": layout}
    oh, ow = _output_size(x, weight, options)
    shape = _layout_shape(x[0], weight[0], oh, ow, layout)
    no_bias = _NO_BIAS[dtype]
    if prod(shape) == 0:
        return lambda x, weight, bias, *, out=None: np.empty(shape, dtype) if out is None else out
    taps = _tap_offsets(weight[2:], dilation, padding)
    code = ACTIVATION_CODES[activation]
    forward = _prepare_pass(x, weight, shape, dtype, taps, stride, (0, 0, 1, 1, oh, ow), groups, layout, algorithm, code)

    def run(x, weight, bias, *, out=None):
        if out is None:
            out = empty(shape, dtype)
        forward(x, weight, out, no_bias if bias is None else bias)
        return out

    return run


def conv2d(x, weight, bias, *, stride, padding, dilation, groups, layout, activation, algorithm, out=None):
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    shapes = (x.shape, weight.shape, None)
    return prepare_conv2d(shapes, x.dtype, activation=activation, algorithm=algorithm, **options)(
        x, weight, bias, out=out
    )


@kernel(parallel=False)
def exchange_channels(weight, groups, outputs, channels, kh, kw, rows, columns, result):
    """result[g, c, o, r, s] = weight[g, o, c, rows[r], columns[s]]: the taps of one phase, outputs and channels
    swapped.
    """
    at = 0
    for g in range(groups):
        for c in range(channels):
            for o in range(outputs):
                start = ((g * outputs + o) * channels + c) * kh
                for r in range(rows.size):
                    for s in range(columns.size):
                        result[at] = weight[(start + rows[r]) * kw + columns[s]]
                        at += 1


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
    estimates = _estimates(grad[0], groups, (channels * groups, outputs, 3, 3), *size)
    return min(estimates, key=estimates.__getitem__)


class _TransposedConvolution:
    """result (+ bias) = the transpose of the convolution by `weight`, applied to grad; fills every pixel of result."""

    def __init__(self, grad, weight, result, dtype, *, stride, padding, dilation, groups, layout):
        outputs, channels, kh, kw = weight[0] // groups, weight[1], *weight[2:]
        size = _image_size(result, layout)
        self.sizes = (groups, outputs, channels, kh, kw)
        self.channels_last = layout == "NHWC"
        algorithm = _choose_transposed(grad, weight, size, dtype, stride, dilation, groups, layout)
        self.phases = []
        if prod(grad) and prod(result):
            axes = [
                [_phase(i, s, p[0], d, k) for i in range(min(s, n))]
                for s, p, d, k, n in zip(stride, padding, dilation, (kh, kw), size, strict=True)
            ]
            for i, (rows, row_offsets) in enumerate(axes[0]):
                for j, (columns, column_offsets) in enumerate(axes[1]):
                    if rows.size == 0 or columns.size == 0:
                        continue
                    shape = (groups * channels, outputs, rows.size, columns.size)
                    grid = (i, j, *stride, -(-(size[0] - i) // stride[0]), -(-(size[1] - j) // stride[1]))
                    taps = (row_offsets, column_offsets)
                    move = _prepare_pass(grad, shape, result, dtype, taps, (1, 1), grid, groups, layout, algorithm)
                    self.phases.append((shape, rows, columns, move))
        # pixels that no tap meets keep the bias alone
        self.fill_first = len(self.phases) < min(stride[0], size[0]) * min(stride[1], size[1])

    def __call__(self, grad, weight, result, bias):
        if self.fill_first:
            result[...] = 0
            if bias.size:
                result += bias if self.channels_last else bias[:, None, None]
        for shape, rows, columns, move in self.phases:
            phase = np.empty(shape, weight.dtype)
            exchange_channels.serial(weight.ravel(), *self.sizes, rows, columns, phase.ravel())
            move(grad, phase, result, bias)


def prepare_conv2d_backward(shapes, dtype, *, stride, padding, dilation, groups, layout, needs):
    grad, x, weight = shapes
    no_bias = _NO_BIAS[dtype]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    to_x = _TransposedConvolution(grad, weight, x, dtype, **options) if "x" in needs else None
    to_weight = _prepare_weight_gradient(grad, x, weight, **options) if "weight" in needs else None
    to_bias = _bias_gradient if "bias" in needs else None

    def run(grad, x, weight):
        grad_x = None
        if to_x:
            grad_x = empty(x.shape, dtype)
            to_x(grad, weight, grad_x, no_bias)
        return grad_x, to_weight(grad, x) if to_weight else None, to_bias(grad, layout) if to_bias else None

    return run


def conv2d_backward(grad, x, weight, *, stride, padding, dilation, groups, layout, needs):
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    shapes = (grad.shape, x.shape, weight.shape)
    return prepare_conv2d_backward(shapes, x.dtype, needs=needs, **options)(grad, x, weight)


def _prepare_weight_gradient(grad, x, weight, *, stride, padding, dilation, groups, layout):
    all_outputs, channels, kh, kw = weight
    if prod(grad) == 0 or prod(x) == 0:
        return lambda grad, x: np.zeros(weight, x.dtype)
    h, w = _image_size(x, layout)
    taps = _tap_offsets((kh, kw), dilation, padding)
    head = (x[0], groups, channels, h, w, all_outputs // groups, *taps, *stride, *_image_size(grad, layout))
    flops = 2 * prod(grad) * channels * kh * kw
    if layout == "NHWC":

        def run_nhwc(grad, x):
            by_tap = np.empty((all_outputs, kh * kw, channels), x.dtype)
            arrays = (x.ravel(), grad.ravel())
            conv_weight.weight_gradient_nhwc(flops * _COST["gemm"], *arrays, *head, by_tap.ravel())
            return np.ascontiguousarray(by_tap.swapaxes(1, 2)).reshape(weight)

        return run_nhwc
    depthwise = groups > 1 and channels == 1
    function = conv_direct.depthwise_weight_gradient_nchw if depthwise else conv_weight.weight_gradient_nchw
    work = flops * _COST["depthwise" if depthwise else "gemm"]

    def run(grad, x):
        result = np.empty(weight, x.dtype)
        function(work, x.ravel(), grad.ravel(), *head, result.ravel())
        return result

    return run


def _bias_gradient(grad, layout):
    if layout == "NHWC":
        sums = np.empty(grad.shape[3], grad.dtype)
        column_sums(0.3 * grad.size, grad.reshape(prod(grad.shape[:3]), grad.shape[3]), sums)
        return sums
    n, outputs, h, w = grad.shape
    sums = np.empty(outputs, grad.dtype)
    conv_weight.channel_sums(0.3 * grad.size, grad.ravel(), n, outputs, h * w, sums)
    return sums


def prepare_conv_transpose2d(shapes, dtype, *, stride, padding, output_padding, groups, dilation, layout):
    x, weight, _ = shapes
    sizes = zip(_image_size(x, layout), stride, padding, dilation, weight[2:], output_padding, strict=True)
    size = [(n - 1) * s - p[0] - p[1] + d * (k - 1) + extra + 1 for n, s, p, d, k, extra in sizes]
    shape = _layout_shape(x[0], weight[1] * groups, *size, layout)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    transposed = _TransposedConvolution(x, weight, shape, dtype, **options)
    no_bias = _NO_BIAS[dtype]

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
    to_weight = _prepare_weight_gradient(x, grad, weight, **options) if "weight" in needs else None
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
    grid = (0, 0, 1, 1, *_image_size(x, layout))
    taps = _tap_offsets(weight[2:], dilation, padding)
    move, no_bias = _prepare_pass(grad, weight, x, dtype, taps, stride, grid, groups, layout, algorithm), _NO_BIAS[dtype]

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
