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
from numba import prange

from tilewise.kernels.cpu import conv_direct, conv_nchw, conv_nhwc, conv_weight, conv_winograd, conv_winograd_nhwc
from tilewise.kernels.cpu.conv_winograd import TILES
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES
from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.scratch import empty
from tilewise.kernels.cpu.simd import MR, address, lane_count, lanes
from tilewise.kernels.cpu.vector_move import transpose_square_to

_NO_BIAS = {np.dtype(t): np.empty(0, t) for t in (np.float32, np.float64)}
_KERNELS = {
    ("NCHW", "winograd"): conv_winograd.convolve,
    ("NCHW", "direct"): conv_direct.rows_nchw,
    ("NCHW", "depthwise"): conv_direct.rows_nchw,
    ("NHWC", "direct"): conv_direct.definition_nhwc,
    ("NHWC", "depthwise"): conv_direct.depthwise_nhwc,
}
# Estimated serial nanoseconds per FLOP, for the decision to split over threads.
_COST = {"gemm": 0.015, "winograd": 0.008, "depthwise": 0.1, "direct": 0.5}
# Below this many FLOPs, walking the rows is faster than setting up panels.
DIRECT_BELOW = 4_000
# Pixels of an image up to which turning it around may pay (see `_ThroughNHWC`).
_SMALL_IMAGE = 16 * 16


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
    estimates = _estimates(x[0], options["groups"], weight, oh, ow, options["layout"])
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


def _few_tiles(n, groups, weight, oh, ow):
    """Whether Winograd shares out outputs instead of tiles; in NCHW by way of NHWC then."""
    few = n * conv_winograd_nhwc.count_tiles(oh, ow) <= conv_winograd_nhwc.FEW_TILES
    return few and min(weight[0] // groups, weight[1]) >= 32


def _estimates(n, groups, weight, oh, ow, layout):
    """Nanoseconds on one thread, fitted to ResNet-50's and VGG-16's 3x3 layers on two AVX-512 machines, and scaled to
    115 GFLOP/s for the implicit product: only the proportions matter.

    Winograd: 36 products of a block of tiles, the transforms of its inputs and outputs, and the transform of the
    weights, whose 36 numbers each are written and read once and cost more where they do not fit a cache.
    """
    outputs, channels = weight[0] // groups, weight[1]
    gemm = 2 * 9 * channels * outputs * oh * ow * n / 115
    tiles = n * conv_winograd_nhwc.count_tiles(oh, ow)
    weights = 36 * channels * outputs
    few = _few_tiles(n, groups, weight, oh, ow)
    if few or layout == "NHWC":
        tiles, cost = -(-tiles // MR) * MR, 0.15 if few else 1.2 if weights < 1 << 22 else 3
    else:
        tiles, cost = -(-tiles // TILES) * TILES, 1.2 if weights < 1 << 22 else 3
    products = 36 * channels * outputs * tiles * 2 / 125
    transforms = (12 if few else 24) * tiles * (channels + outputs)
    return {"gemm": groups * gemm, "winograd": groups * (products + transforms + weights * cost)}


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
    """One convolution by `conv_nchw.convolve` or `conv_nhwc.convolve`; arguments as `_Pass`."""

    __slots__ = ("kernel", "plan")

    def __init__(self, x, weight, y, dtype, taps, stride, grid, groups, layout, activation):
        outputs, channels = weight[0] // groups, weight[1]
        first_row, first_column, row_step, column_step, oh, ow = grid
        n, size, (height, width) = x[0], _image_size(x, layout), _image_size(y, layout)
        if layout == "NCHW":
            steps = (first_row * width + first_column, height * width, row_step * width, column_step)
            shape = (n, channels, *size)
            itemsize = dtype.itemsize
            self.plan = conv_nchw.plan(shape, outputs, taps, stride, (oh, ow), steps, groups, itemsize, activation)
        else:
            pixel = weight[0]
            start = (first_row * width + first_column) * pixel
            steps = (start, height * width * pixel, row_step * width * pixel, column_step * pixel)
            self.plan = conv_nhwc.plan((n, *size, channels), outputs, taps, stride, (oh, ow), steps, groups, activation)
        function = conv_nchw.convolve if layout == "NCHW" else conv_nhwc.convolve
        self.kernel = function.sized(2 * n * prod(weight) * oh * ow * _COST["gemm"])

    def __call__(self, x, weight, y, bias):
        self.kernel(x.ravel(), weight.ravel(), y.ravel(), bias, _NO_BIAS[x.dtype], *self.plan)


class _WinogradNHWC:
    """One NHWC convolution by `conv_winograd_nhwc`; arguments as `_Pass`."""

    __slots__ = ("kernel", "middle", "sizes", "tail")

    def __init__(self, x, weight, y, taps, groups, activation):
        outputs, (oh, ow) = weight[0] // groups, y[1:3]
        self.sizes = (groups, weight[1], x[1], x[2])
        total = x[0] * conv_winograd_nhwc.count_tiles(oh, ow)
        self.middle = (outputs, int(taps[0][0]), int(taps[1][0]), oh, ow, total, -(-oh // 4), -(-ow // 4))
        self.tail = activation
        function = conv_winograd_nhwc.convolve(x[0], oh, ow)
        self.kernel = function.sized(2 * x[0] * prod(weight) * oh * ow * _COST["winograd"])

    def __call__(self, x, weight, y, bias):
        self.kernel(x.ravel(), *self.sizes, weight.ravel(), *self.middle, y.ravel(), bias, self.tail)


class _ThroughNHWC:
    """An NCHW convolution of small images with many channels, by way of NHWC.

    In NCHW the vectors run along pixels, and rows of 7 leave a quarter of their lanes empty; in NHWC they run along
    outputs. Turning x and y around costs an element each, which hundreds of products an element outweigh.
    """

    __slots__ = ("move", "turn_x", "turn_y", "x", "y")

    def __init__(self, x, weight, y, prepare):
        self.x, self.y = (x[0], x[1], x[2] * x[3]), (y[0], y[2] * y[3], y[1])
        last = [(s[0], s[2], s[3], s[1]) for s in (x, y)]
        self.move = prepare(last[0], weight, last[1])
        self.turn_x, self.turn_y = (turn_planes.sized(1.0 * prod(s)) for s in (x, y))

    def __call__(self, x, weight, y, bias):
        x_last, y_last = np.empty(x.size, x.dtype), np.empty(y.size, y.dtype)
        self.turn_x(x.ravel(), *self.x, x_last)
        self.move(x_last, weight, y_last, bias)
        self.turn_y(y_last, *self.y, y.ravel())


def _better_in_nhwc(x, weight, dtype, product, grid, groups):
    """Whether so many lanes would be wasted in NCHW that turning around pays."""
    lane = lane_count(dtype.itemsize)
    steps, outputs = weight[1] * weight[2] * weight[3], weight[0] // groups
    if grid[:4] != (0, 0, 1, 1) or outputs < 64 or steps < 128 or x[2] * x[3] > _SMALL_IMAGE:
        return False
    there = conv_nhwc.efficiency(x[0], *grid[4:], outputs, lane, groups)
    # measured: with full tiles in both, NHWC is a tenth faster, for its weights stay in L1
    return conv_nchw.efficiency(product.plan[0], lane) < 1.1 * there


def _prepare_pass(x, weight, y, dtype, taps, stride, grid, groups, layout, algorithm, activation=0):
    def product(x, weight, y, layout="NHWC"):
        return _ImplicitProduct(x, weight, y, dtype, taps, stride, grid, groups, layout, activation)

    def winograd(x, weight, y):
        return _WinogradNHWC(x, weight, y, taps, groups, activation)

    if algorithm == "gemm":
        there = product(x, weight, y, layout)
        if layout == "NCHW" and _better_in_nhwc(x, weight, dtype, there, grid, groups):
            return _ThroughNHWC(x, weight, y, product)
        return there
    if algorithm == "winograd" and layout == "NHWC":
        return winograd(x, weight, y)
    if algorithm == "winograd" and _few_tiles(x[0], groups, weight, *grid[4:]):
        return _ThroughNHWC(x, weight, y, winograd)
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
    forward = _prepare_pass(
        x, weight, shape, dtype, taps, stride, (0, 0, 1, 1, oh, ow), groups, layout, algorithm, code
    )

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


@kernel()
def turn_planes(source, n, rows, columns, target):
    """target[i, c, r] = source[i, r, c] for n planes: NCHW to NHWC with (channels, pixels), and back."""
    lane = lanes(source)
    places = np.arange(0, lane * rows, rows)
    blocks = (columns + lane - 1) // lane
    for chunk in prange(n * blocks):
        i = chunk // blocks
        c = min((chunk - i * blocks) * lane, max(0, columns - lane))
        start = i * rows * columns
        if rows < lane or columns < lane:
            for r in range(rows):
                for k in range(c, min(columns, c + lane)):
                    target[start + k * rows + r] = source[start + r * columns + k]
            continue
        for r in range(0, rows, lane):
            at = min(r, rows - lane)
            where = address(source, start + at * columns + c)
            transpose_square_to(address(target, start + c * rows + at), address(places, 0), where, columns)


# A square of channels and outputs whose taps fit L1 together: transposed at once, or each row would be a page apart.
_EXCHANGE = 16


@kernel()
def exchange_channels(weight, groups, outputs, channels, taps, wanted, result):
    """result[g, c, o, i] = weight[g, o, c, wanted[i]]: the taps of one phase, outputs and channels swapped."""
    blocks = (channels + _EXCHANGE - 1) // _EXCHANGE
    for chunk in prange(groups * blocks):
        g = chunk // blocks
        c0 = (chunk - g * blocks) * _EXCHANGE
        for o0 in range(0, outputs, _EXCHANGE):
            for c in range(c0, min(channels, c0 + _EXCHANGE)):
                for o in range(o0, min(outputs, o0 + _EXCHANGE)):
                    source = ((g * outputs + o) * channels + c) * taps
                    target = ((g * channels + c) * outputs + o) * wanted.size
                    for i in range(wanted.size):
                        result[target + i] = weight[source + wanted[i]]


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
        size = _image_size(result, layout)
        self.sizes = (groups, outputs, channels, kh * kw)
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
                    wanted = (rows[:, None] * kw + columns).ravel()
                    exchange = exchange_channels.sized(2.0 * prod(shape))
                    self.phases.append((shape, wanted, exchange, move))
        # pixels that no tap meets keep the bias alone
        self.fill_first = len(self.phases) < min(stride[0], size[0]) * min(stride[1], size[1])

    def __call__(self, grad, weight, result, bias):
        if self.fill_first:
            result[...] = 0
            if bias.size:
                result += bias if self.channels_last else bias[:, None, None]
        for shape, wanted, exchange, move in self.phases:
            phase = np.empty(shape, weight.dtype)
            exchange(weight.ravel(), *self.sizes, wanted, phase.ravel())
            move(grad, phase, result, bias)


def prepare_conv2d_backward(shapes, dtype, *, stride, padding, dilation, groups, layout, needs):
    grad, x, weight = shapes
    no_bias = _NO_BIAS[dtype]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout}
    to_x = _TransposedConvolution(grad, weight, x, dtype, **options) if "x" in needs else None
    to_weight = _prepare_weight_gradient(grad, x, weight, dtype, **options) if "weight" in needs else None
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


def _prepare_weight_gradient(grad, x, weight, dtype, *, stride, padding, dilation, groups, layout):
    all_outputs, channels, kh, kw = weight
    if prod(grad) == 0 or prod(x) == 0:
        return lambda grad, x: np.zeros(weight, x.dtype)
    taps = _tap_offsets((kh, kw), dilation, padding)
    size, grid, outputs = _image_size(x, layout), _image_size(grad, layout), all_outputs // groups
    flops = 2 * prod(grad) * channels * kh * kw
    if groups > 1 and channels == 1 and layout == "NCHW":
        head = (x[0], groups, channels, *size, outputs, *taps, *stride, *grid)

        def run_depthwise(grad, x):
            result = np.empty(weight, x.dtype)
            function = conv_direct.depthwise_weight_gradient_nchw
            function(flops * _COST["depthwise"], x.ravel(), grad.ravel(), *head, result.ravel())
            return result

        return run_depthwise
    if layout == "NHWC":
        plan = conv_weight.plan_nhwc((x[0], *size, channels), outputs, taps, stride, grid, groups)
        function = conv_weight.weight_gradient_nhwc
    else:
        plan = conv_weight.plan_nchw((x[0], channels, *size), outputs, taps, stride, grid, groups, dtype.itemsize)
        function = conv_weight.weight_gradient_nchw
    function = function.sized(flops * _COST["gemm"])

    def run(grad, x):
        result = np.empty(weight, dtype)
        function(x.ravel(), grad.ravel(), result.ravel(), *plan)
        return result

    return run


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
    grid = (0, 0, 1, 1, *_image_size(x, layout))
    taps = _tap_offsets(weight[2:], dilation, padding)
    move, no_bias = (
        _prepare_pass(grad, weight, x, dtype, taps, stride, grid, groups, layout, algorithm),
        _NO_BIAS[dtype],
    )

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
