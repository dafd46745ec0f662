"""Depthwise convolution (one input channel a group), and its transpose: all taps of an output in registers.

    y[c, i, j] = bias[c] + sum over taps (r, s) of weight[c, r, s] * x[c, i * stride + r - pad, j * stride + s - pad]

Nine products an output are so little that memory decides: x is read once, y written once, and in between only the
first-level cache is touched. depthwise_vector.py has the inner loop.

NCHW: a band of rows of one plane is copied to a strip, with zeros for the padding and the columns of a stride of 2
dealt out to two half rows, so that every tap is a contiguous load and no border is left:

    row of x:  a b c d e f g   ->  strip:  0 b d f | a c e g        (stride 2, one column of padding)

NHWC: the image is cut into regions whose outputs have the same taps inside the image: with padding 1, nine of them, the
inner one with nearly all pixels. Nothing is copied and nothing tested in the inner loop.

3x3 kernels need neither where the result is as large as x, as in most networks (conv_depthwise_same.py), nor with
stride 2 or for large planes in NCHW (conv_depthwise_rows.py).

The transpose (the gradient with respect to x) has a phase for every (row, column) within a stride, each a convolution
of its own with some of the taps (see conv.py); one pass over a band computes them all and puts y's columns together.
"""

from math import prod

import numpy as np

from tilewise.kernels.cpu.conv_depthwise_nchw import Strips, ceil_ratio, convolve_nchw
from tilewise.kernels.cpu.conv_depthwise_nhwc import BAND_BYTES, Regions, convolve_nhwc, row_bands
from tilewise.kernels.cpu.conv_depthwise_rows import (
    by_rows,
    convolve_doubled_nchw,
    convolve_narrow_nchw,
    convolve_rows_nchw,
    in_memory,
    is_doubled,
)
from tilewise.kernels.cpu.conv_depthwise_same import (
    WHOLE_LINES,
    channel_cuts,
    convolve_same_nchw,
    convolve_same_nhwc,
    is_same,
    planes_together,
    tap_numbers,
    whole_tiles,
)
from tilewise.kernels.cpu.recycling import is_used
from tilewise.kernels.cpu.scratch import ALIGNMENT
from tilewise.kernels.cpu.simd import lane_count

# Estimated serial nanoseconds per FLOP.
COST = 0.015


class Depthwise:
    """One depthwise convolution with everything but the arrays worked out; call it with x, weight, y, bias and extra.

    x, y: shapes. weight: (channels * outputs, 1, KH, KW). taps: for rows and for columns, a list over the phases of y
    of (numbers, offsets); see Strips. A convolution has one phase, its transpose as many as its stride.
    """

    __slots__ = ("constants", "kernel", "no_extra", "square", "square_constants", "square_past")

    packing = None  # nothing to prepare: the weights are few and read as they lie, or packed in no time

    def __init__(self, x, weight, y, taps, stride, layout, dtype, activation=0):
        self.no_extra = np.empty(0, dtype)
        n, all_taps, phases = x[0], prod(weight[2:]), [len(axis) for axis in taps]
        work = 2 * prod(y) * all_taps / prod(phases) * COST
        self.square = None  # the kernel for 3x3 and stride 1 or 2, which knows of no extra
        self.square_past = None  # its constants for large results in used memory, which are written past the caches
        large = in_memory(prod(y) * dtype.itemsize) and activation == 0
        # A transpose's only phase may have three rows of taps, one apart, of a kernel with five.
        numbers, is_square = tap_numbers(taps, weight[3]), all_taps == 9
        if layout == "NHWC":
            _, h, w, channels = x
            oh, ow = y[1:3]
            plan = Regions((h, w), channels, (oh, ow), weight[3], taps, stride)
            bands = row_bands(n, ceil_ratio(oh, phases[0]), w * stride[0] * channels * dtype.itemsize, BAND_BYTES)
            self.kernel = convolve_nhwc.sized(work)
            head = (n, channels, h, w, oh, ow, *phases, bands, *stride)
            self.constants = (*head, plan.regions, plan.table, all_taps, activation)
            if is_square and is_same(taps, stride, weight[0] // channels, (h, w), (oh, ow)):
                self.square = convolve_same_nhwc.sized(work)
                cuts = channel_cuts(n, (h, w), channels, dtype) or (whole_tiles(n, h, bands), channels)
                self.square_constants = (n, channels, h, w, numbers, *cuts, activation, 0)
                whole_lines = WHOLE_LINES and channels * dtype.itemsize % ALIGNMENT == 0
                if large and whole_lines and cuts[1] == channels:
                    self.square_past = (*self.square_constants[:-1], 1)
        else:
            _, channels, h, w = x
            oh, ow = y[2:4]
            strips = Strips(n * channels, (oh, ow), weight[3], taps, stride, dtype)
            self.kernel = convolve_nchw.sized(work)
            head = (n * channels, channels, weight[0] // channels, h, w, oh, ow, *phases, strips.constants)
            self.constants = (*head, strips.table, strips.starts, all_taps, strips.square, activation)
            problem = n * channels, taps, stride, weight[0] // channels, (h, w), (oh, ow)
            if is_square and by_rows(*problem, dtype.itemsize):
                is_narrow = stride[0] == 2 and ow <= lane_count(dtype.itemsize)
                self.square = (convolve_narrow_nchw if is_narrow else convolve_rows_nchw).sized(work)
                padding = [-int(axis[0][1][0]) for axis in taps]
                apart = () if is_narrow else (stride[0],)
                self.square_constants = (n * channels, channels, h, w, oh, ow, *padding, *apart, numbers, activation)
            elif is_square and is_same(*problem[1:]):
                self.square = convolve_same_nchw.sized(work)
                group = planes_together((h, w), dtype)
                self.square_constants = (n * channels, channels, h, w, numbers, group, activation)
            elif is_doubled(*problem):
                self.square = convolve_doubled_nchw.sized(work)
                self.square_constants = (n * channels, channels, h, w, oh, ow, activation, 0)
                # whole vectors only: what is under a mask touches the next row's line, just written, which takes long
                if large and ow * dtype.itemsize % ALIGNMENT == 0 and w % lane_count(dtype.itemsize) == 0:
                    self.square_past = (*self.square_constants[:-1], 1)

    def __call__(self, x, weight, y, bias, extra=None, packed=None):
        if self.square is not None and (extra is None or extra.size == 0):
            constants = self.square_constants
            if self.square_past is not None and is_used(y):
                constants = self.square_past
            self.square(x.ravel(), weight.ravel(), y.ravel(), bias, *constants)
            return
        extra = self.no_extra if extra is None else extra
        self.kernel(x.ravel(), weight.ravel(), y.ravel(), bias, extra, *self.constants)
