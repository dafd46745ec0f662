"""One convolution of fixed shapes as a pass over its arrays, by any algorithm and in either layout.

`prepare_pass` works out everything but the arrays; conv.py builds the forward convolution and every gradient from such
passes. Small images with many channels, and some layers of few outputs, go through the other layout, where that is
faster (conv_detours.py).

A pass is called with x, weight, y, bias, and optionally extra, which is added before the activation (laid out as y, and
may be y itself), and packed: the weights as `pack(weight)` of a pass with the same `packing` made them, for weights
that are used again. Where `packing` is None there is nothing to prepare.
"""

from math import ceil, prod

import numpy as np

from tilewise.kernels.cpu import (
    conv_direct,
    conv_nchw,
    conv_nchw_plan,
    conv_nhwc,
    conv_pointwise,
    conv_winograd,
    conv_winograd_nhwc,
)
from tilewise.kernels.cpu.caches import memory_from
from tilewise.kernels.cpu.conv_detours import BatchInParts, PointwiseJoined, PointwiseThroughNCHW, ThroughNHWC
from tilewise.kernels.cpu.recycling import is_used
from tilewise.kernels.cpu.scratch import aligned
from tilewise.kernels.cpu.simd import lane_count

NO_BIAS = {np.dtype(t): np.empty(0, t) for t in (np.float32, np.float64)}
_DIRECT = {
    "NCHW": conv_direct.rows_nchw,
    "NHWC": conv_direct.definition_nhwc,
}
# Estimated serial nanoseconds per FLOP, for the decision to split over threads.
COST = {"gemm": 0.015, "winograd": 0.008, "direct": 0.5}
# Multiply-adds of a vector in whose time a weight is packed.
PACKING = 1.2
# The same to turn a pixel's vector of channels around, and for the calls that do so; nothing beside the products of
# so many outputs.
TURNING, CALLS, MANY_OUTPUTS = 5, 10_000, 64
# Pixels of an image up to which turning it around may pay (see `ThroughNHWC`).
_SMALL_IMAGE = 16 * 16


def image_size(shape, layout):
    return shape[1:3] if layout == "NHWC" else shape[2:4]


def layout_shape(n, channels, h, w, layout):
    return (n, h, w, channels) if layout == "NHWC" else (n, channels, h, w)


def few_tiles(n, groups, weight, oh, ow):
    """Whether Winograd shares out outputs instead of tiles; in NCHW by way of NHWC then."""
    outputs, channels = weight[0] // groups, weight[1]
    return min(outputs, channels) >= 32 and conv_winograd_nhwc.shares_outputs(n, channels, outputs, oh, ow)


class _Direct:
    """One convolution by `conv_direct`, with everything but the arrays worked out.

    taps: the taps' offsets in x, rows and columns. grid: (first row, first column, row step, column step, rows,
    columns) of the pixels of y to compute.
    """

    __slots__ = ("activation", "head", "kernel", "middle", "tail")

    packing = None

    def __init__(self, x, weight, y, taps, stride, grid, groups, layout, activation=0):
        n, channels = x[0], weight[1]
        outputs = weight[0] // groups
        h, w = image_size(x, layout)
        height, width = image_size(y, layout)
        first_row, first_column, row_step, column_step, oh, ow = grid
        outer, pixel = (height * width * weight[0], weight[0]) if layout == "NHWC" else (height * width, 1)
        self.kernel = _DIRECT[layout].sized(2 * n * prod(weight) * oh * ow * COST["direct"])
        self.head = (n, groups, channels, h, w)
        self.middle = (outputs, *taps, *stride, oh, ow)
        start = (first_row * width + first_column) * pixel
        self.tail = (start, outer, row_step * width * pixel, column_step * pixel)
        self.activation = activation

    def __call__(self, x, weight, y, bias, extra=None, packed=None):
        extra = NO_BIAS[x.dtype] if extra is None else extra
        self.kernel(
            x.ravel(), *self.head, weight.ravel(), *self.middle, y.ravel(), *self.tail, bias, extra,
            self.activation,
        )  # fmt: skip


class _ProductNCHW:
    """One convolution by `conv_nchw.convolve`; arguments as `_Direct`."""

    __slots__ = ("kernel", "plan")

    packing = None

    def __init__(self, x, weight, y, dtype, taps, stride, grid, groups, activation):
        (n, channels, *size), outputs = x, weight[0] // groups
        first_row, first_column, row_step, column_step, *pixels = grid
        height, width = y[2:4]
        steps = (first_row * width + first_column, height * width, row_step * width, column_step)
        shape = (n, channels // groups, *size)
        self.plan = conv_nchw_plan.plan(shape, outputs, taps, stride, pixels, steps, groups, dtype.itemsize, activation)
        self.kernel = conv_nchw.convolve.sized(2 * n * prod(weight) * prod(pixels) * COST["gemm"])

    def __call__(self, x, weight, y, bias, extra=None, packed=None):
        extra = NO_BIAS[x.dtype] if extra is None else extra
        self.kernel(x.ravel(), weight.ravel(), y.ravel(), bias, extra, *self.plan)


class _ProductNHWC:
    """One convolution by `conv_nhwc.convolve`; arguments as `_Direct`."""

    __slots__ = ("kernel", "past", "plan")

    packing = "gemm", "NHWC"

    def __init__(self, x, weight, y, dtype, taps, stride, grid, groups, activation):
        (n, *size, channels), outputs = x, weight[0] // groups
        first_row, first_column, row_step, column_step, *pixels = grid
        (height, width), pixel = y[1:3], weight[0]
        start = (first_row * width + first_column) * pixel
        steps = (start, height * width * pixel, row_step * width * pixel, column_step * pixel)
        shape = (n, *size, channels // groups)
        self.plan = conv_nhwc.plan(shape, outputs, taps, stride, pixels, steps, groups, activation)
        self.kernel = conv_nhwc.convolve.sized(2 * n * prod(weight) * prod(pixels) * COST["gemm"])
        self.past = None  # the geometry for large results in used memory
        if prod(y) * dtype.itemsize >= memory_from():
            self.past = conv_nhwc.past_caches(self.plan[0], dtype.itemsize)

    def __call__(self, x, weight, y, bias, extra=None, packed=None):
        nothing = NO_BIAS[x.dtype]
        extra, packed = nothing if extra is None else extra, nothing if packed is None else packed
        geometry, *rest = self.plan
        if self.past is not None and is_used(y):
            geometry = self.past
        self.kernel(x.ravel(), weight.ravel(), packed, y.ravel(), bias, extra, geometry, *rest)

    def pack(self, weight):
        geometry, *_, order = self.plan
        packed = aligned(conv_nhwc.packed_size(geometry, lane_count(weight.itemsize)), weight.dtype)
        conv_nhwc.pack(0, weight.ravel(), geometry, order, packed)
        return packed


class _WinogradNCHW:
    """One NCHW convolution by `conv_winograd`; arguments as `_Direct`."""

    __slots__ = ("activation", "head", "kernel", "middle", "weights")

    packing = "winograd", "NCHW"

    def __init__(self, x, weight, y, taps, groups, activation):
        outputs, channels, (oh, ow) = weight[0] // groups, weight[1], y[2:4]
        self.head = (x[0], groups, channels, x[2], x[3])
        self.middle = (outputs, int(taps[0][0]), int(taps[1][0]), oh, ow)
        self.weights = (groups, outputs, channels)
        self.activation = activation
        self.kernel = conv_winograd.convolve.sized(2 * x[0] * prod(weight) * oh * ow * COST["winograd"])

    def __call__(self, x, weight, y, bias, extra=None, packed=None):
        nothing = NO_BIAS[x.dtype]
        extra, packed = nothing if extra is None else extra, nothing if packed is None else packed
        self.kernel(
            x.ravel(), *self.head, weight.ravel(), packed, *self.middle, y.ravel(), bias, extra, self.activation
        )  # fmt: skip

    def pack(self, weight):
        packed = aligned(conv_winograd.packed_size(*self.weights), weight.dtype)
        conv_winograd.pack(0, weight.ravel(), *self.weights, packed)
        return packed


class _Pointwise:
    """One NCHW convolution by 1x1 kernels, by `conv_pointwise.convolve`; size: rows and columns of x."""

    __slots__ = ("kernel", "plan")

    packing = None  # it reads the weights as they lie

    def __init__(self, n, size, weight, dtype, stride, groups, activation):
        outputs, channels = weight[0] // groups, weight[1]
        self.plan = conv_pointwise.plan(n, groups, channels, size, outputs, stride, dtype.itemsize, activation)
        pixels = prod(ceil(length / s) for length, s in zip(size, stride, strict=True))
        self.kernel = conv_pointwise.convolve.sized(2 * n * pixels * prod(weight) * COST["gemm"])

    def __call__(self, x, weight, y, bias, extra=None, packed=None):
        extra = NO_BIAS[x.dtype] if extra is None else extra
        self.kernel(x.ravel(), weight.ravel(), y.ravel(), bias, extra, *self.plan)


def _one_image(pixels, weight, dtype, activation):
    """The pass by 1x1 kernels for all pixels of a batch as one long image."""
    return _Pointwise(1, (1, pixels), weight, dtype, (1, 1), 1, activation)


def _pointwise(x, weight, dtype, stride, groups, activation):
    n, pixels = x[0], x[2] * x[3]
    lane = lane_count(dtype.itemsize)
    alone = n * ceil(conv_pointwise.whole_pixels(pixels, weight[1], weight[0] // groups, lane) / lane)
    joined = ceil(n * pixels / lane)
    # copying in and out costs about as much as 32 products a number
    if stride == (1, 1) and groups == 1 and alone - joined > alone * max(32 / weight[0], 32 / weight[1]) + alone / 16:
        y = (n, weight[0], *x[2:])
        return BatchInParts.where_large(
            x, y, dtype, lambda n: PointwiseJoined(n, pixels, weight, _one_image(n * pixels, weight, dtype, activation))
        )
    return _Pointwise(n, x[2:], weight, dtype, stride, groups, activation)


def _is_pointwise(x, weight, y, taps, stride, grid):
    """Whether each pixel of y depends on one pixel of x alone, and y has no others."""
    size = tuple(ceil(length / s) for length, s in zip(x[2:], stride, strict=True))
    return (
        weight[2:] == (1, 1) and taps[0][0] == taps[1][0] == 0 and size == tuple(y[2:])
        and tuple(grid) == (0, 0, 1, 1, *size)
    )  # fmt: skip


class _WinogradNHWC:
    """One NHWC convolution by `conv_winograd_nhwc`; arguments as `_Direct`."""

    __slots__ = ("kernel", "middle", "sizes", "tail", "weights")

    packing = "winograd", "NHWC"

    def __init__(self, x, weight, y, taps, groups, activation):
        outputs, (oh, ow) = weight[0] // groups, y[1:3]
        self.sizes = (groups, weight[1], x[1], x[2])
        self.weights = (groups, outputs, weight[1])
        total = x[0] * conv_winograd_nhwc.count_tiles(oh, ow)
        self.middle = (outputs, int(taps[0][0]), int(taps[1][0]), oh, ow, total, -(-oh // 4), -(-ow // 4))
        self.tail = activation
        function = conv_winograd_nhwc.convolve(x[0], weight[1], outputs, oh, ow)
        self.kernel = function.sized(2 * x[0] * prod(weight) * oh * ow * COST["winograd"])

    def __call__(self, x, weight, y, bias, extra=None, packed=None):
        nothing = NO_BIAS[x.dtype]
        extra, packed = nothing if extra is None else extra, nothing if packed is None else packed
        self.kernel(x.ravel(), *self.sizes, weight.ravel(), packed, *self.middle, y.ravel(), bias, extra, self.tail)

    def pack(self, weight):
        packed = aligned(conv_winograd_nhwc.packed_size(*self.weights), weight.dtype)
        conv_winograd_nhwc.pack(0, weight.ravel(), *self.weights, packed)
        return packed


def _better_in_nhwc(x, weight, dtype, product, grid, groups):
    """Whether so many lanes would be wasted in NCHW that turning around pays."""
    lane = lane_count(dtype.itemsize)
    steps, outputs, pixels = weight[1] * weight[2] * weight[3], weight[0] // groups, prod(grid[4:])
    if grid[:4] != (0, 0, 1, 1) or outputs < lane or steps < 128 or x[2] * x[3] > _SMALL_IMAGE:
        return False
    there = conv_nhwc.efficiency(x[0], *grid[4:], outputs, lane, groups)
    # Its weights are packed first, which a single image of 7x7 feels. (This counts for prepared weights, too: their
    # results are a call's, bit for bit.) Measured: with full tiles in both, NHWC is a tenth faster, for its weights lie
    # one after the other.
    there = 1 / (1 / there + PACKING * lane / (x[0] * pixels))
    here = conv_nchw_plan.efficiency(product.plan[0], lane)
    if outputs >= MANY_OUTPUTS:
        return here < 1.1 * there
    saved = steps * weight[0] / lane * pixels * (1 / here - 1 / there)
    turns = TURNING * (ceil(x[1] / lane) * x[2] * x[3] + ceil(weight[0] / lane) * pixels)
    return x[0] * (saved - turns) > CALLS


def prepare_pass(x, weight, y, dtype, taps, stride, grid, groups, layout, algorithm, activation=0):
    def product(x, weight, y):
        return _ProductNHWC(x, weight, y, dtype, taps, stride, grid, groups, activation)

    def winograd(x, weight, y):
        return _WinogradNHWC(x, weight, y, taps, groups, activation)

    if algorithm == "gemm" and layout == "NHWC":
        sizes = [(n, channels, *size) for n, *size, channels in (x, y)]
        pointwise = (
            groups == 1 and tuple(stride) == (1, 1) and _is_pointwise(sizes[0], weight, sizes[1], taps, stride, grid)
        )
        pixels = prod(x[:3])
        if pointwise and PointwiseThroughNCHW.pays(pixels, weight):
            return PointwiseThroughNCHW(pixels, weight, _one_image(pixels, weight, dtype, activation))
        return product(x, weight, y)
    if algorithm == "gemm":
        if _is_pointwise(x, weight, y, taps, stride, grid):
            return _pointwise(x, weight, dtype, tuple(stride), groups, activation)
        there = _ProductNCHW(x, weight, y, dtype, taps, stride, grid, groups, activation)
        if _better_in_nhwc(x, weight, dtype, there, grid, groups):
            return BatchInParts.where_large(
                x, y, dtype, lambda n: ThroughNHWC((n, *x[1:]), weight, (n, *y[1:]), product)
            )
        return there
    if algorithm == "winograd" and layout == "NHWC":
        return winograd(x, weight, y)
    if algorithm == "winograd" and few_tiles(x[0], groups, weight, *grid[4:]):
        return ThroughNHWC(x, weight, y, winograd)
    if algorithm == "winograd":
        return _WinogradNCHW(x, weight, y, taps, groups, activation)
    return _Direct(x, weight, y, taps, stride, grid, groups, layout, activation)
