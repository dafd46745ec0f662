"""One convolution of fixed shapes as a pass over its arrays, by any algorithm and in either layout.

`prepare_pass` works out everything but the arrays; conv.py builds the forward convolution and every gradient from such
passes. Small images with many channels go through the other layout here, where that is faster.
"""

from math import prod

import numpy as np
from numba import prange

from tilewise.kernels.cpu import conv_direct, conv_nchw, conv_nhwc, conv_winograd, conv_winograd_nhwc
from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.simd import address, lane_count, lanes
from tilewise.kernels.cpu.vector_move import reverse_row, transpose_square_to

NO_BIAS = {np.dtype(t): np.empty(0, t) for t in (np.float32, np.float64)}
_KERNELS = {
    ("NCHW", "winograd"): conv_winograd.convolve,
    ("NCHW", "direct"): conv_direct.rows_nchw,
    ("NHWC", "direct"): conv_direct.definition_nhwc,
}
# Estimated serial nanoseconds per FLOP, for the decision to split over threads.
COST = {"gemm": 0.015, "winograd": 0.008, "direct": 0.5}
# Pixels of an image up to which turning it around may pay (see `_ThroughNHWC`).
_SMALL_IMAGE = 16 * 16


def image_size(shape, layout):
    return shape[1:3] if layout == "NHWC" else shape[2:4]


def layout_shape(n, channels, h, w, layout):
    return (n, h, w, channels) if layout == "NHWC" else (n, channels, h, w)


def few_tiles(n, groups, weight, oh, ow):
    """Whether Winograd shares out outputs instead of tiles; in NCHW by way of NHWC then."""
    few = n * conv_winograd_nhwc.count_tiles(oh, ow) <= conv_winograd_nhwc.FEW_TILES
    return few and min(weight[0] // groups, weight[1]) >= 32


class _Pass:
    """One convolution with everything but the arrays worked out; see `conv_nchw.convolve` for the kernels' arguments.

    taps: the taps' offsets in x, rows and columns. grid: (first row, first column, row step, column step, rows,
    columns) of the pixels of y to compute.
    """

    __slots__ = ("activation", "head", "kernel", "middle", "tail")

    def __init__(self, x, weight, y, taps, stride, grid, groups, layout, algorithm, activation=0):
        n, channels = x[0], weight[1]
        outputs = weight[0] // groups
        h, w = image_size(x, layout)
        height, width = image_size(y, layout)
        first_row, first_column, row_step, column_step, oh, ow = grid
        outer, pixel = (height * width * weight[0], weight[0]) if layout == "NHWC" else (height * width, 1)
        self.kernel = _KERNELS[layout, algorithm].sized(2 * n * prod(weight) * oh * ow * COST[algorithm])
        self.head = (n, groups, channels, h, w)
        self.middle = (outputs, *taps, *stride, oh, ow)
        start = (first_row * width + first_column) * pixel
        self.tail = (start, outer, row_step * width * pixel, column_step * pixel)
        self.activation = activation

    def __call__(self, x, weight, y, bias):
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
        n, size, (height, width) = x[0], image_size(x, layout), image_size(y, layout)
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
        self.kernel = function.sized(2 * n * prod(weight) * oh * ow * COST["gemm"])

    def __call__(self, x, weight, y, bias):
        self.kernel(x.ravel(), weight.ravel(), y.ravel(), bias, NO_BIAS[x.dtype], *self.plan)


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
        self.kernel = function.sized(2 * x[0] * prod(weight) * oh * ow * COST["winograd"])

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


def prepare_pass(x, weight, y, dtype, taps, stride, grid, groups, layout, algorithm, activation=0):
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
    if algorithm == "winograd" and few_tiles(x[0], groups, weight, *grid[4:]):
        return _ThroughNHWC(x, weight, y, winograd)
    return _Pass(x, weight, y, taps, stride, grid, groups, layout, algorithm, activation)


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
    """result[g, c, o, i] = weight[g, o, c, wanted[i]]: the taps of one phase, outputs and channels swapped.

    wanted descends; where it is all of the taps, they are turned around in registers.
    """
    blocks = (channels + _EXCHANGE - 1) // _EXCHANGE
    for chunk in prange(groups * blocks):
        g = chunk // blocks
        c0 = (chunk - g * blocks) * _EXCHANGE
        for o0 in range(0, outputs, _EXCHANGE):
            for c in range(c0, min(channels, c0 + _EXCHANGE)):
                for o in range(o0, min(outputs, o0 + _EXCHANGE)):
                    source = ((g * outputs + o) * channels + c) * taps
                    target = ((g * channels + c) * outputs + o) * wanted.size
                    if wanted.size == taps:
                        reverse_row(address(result, target), address(weight, source), taps)
                        continue
                    for i in range(wanted.size):
                        result[target + i] = weight[source + wanted[i]]
