"""Convolution by 1x1 kernels in NCHW: a matrix product for each image that reads x where it lies.

    y[image, o, p] = activation(bias[o] + extra + sum over c of weight[o, c] * x[image, c, p]),   p over all pixels

A panel of NV vectors of pixels passes by all outputs in one call (`panel_product_to`). The first register tile reads
the pixels from x, whose channels are a plane apart, and leaves them in a packed panel behind it; the others read that,
and ask for the next panel's pixels meanwhile. A copy beforehand, even within L2, would cost a fifth of the time at 64
outputs: nothing else runs while it waits for memory.
"""

from math import ceil

import numpy as np
from numba import prange

from tilewise.kernels.cpu.epilogue import activate_row
from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.panel_kernel import panel_product_to
from tilewise.kernels.cpu.scratch import keep, scratch
from tilewise.kernels.cpu.simd import CHANNEL_MR as MR
from tilewise.kernels.cpu.simd import CHANNEL_NV as NV
from tilewise.kernels.cpu.simd import address, lane_count, lanes

# Panels a chunk, and how many chunks there should be to share out.
PANELS = 16
CHUNKS = 8


def plan(n, groups, channels, pixels, outputs, itemsize, activation):
    """The geometry for `convolve`: channels and outputs of one group."""
    panels = ceil(pixels / (NV * lane_count(itemsize)))
    some = PANELS
    while some > 1 and n * groups * ceil(panels / some) < CHUNKS:
        some = ceil(some / 2)
    chunks, splits = groups * n * ceil(panels / some), 1
    while chunks * splits < CHUNKS and outputs // MR >= 4 * splits:
        splits *= 2
    return np.array([n, groups, channels, pixels, outputs, some, splits, activation], np.int64)


@device()
def _multiply(vectors, a, b, b_step, panel, depth, outputs, columns, y, y_step, shifts, extra, has_extra, relu):
    if vectors >= NV:
        panel_product_to(
            MR, NV, a, b, b_step, panel, depth, outputs, columns, y, y_step, shifts, extra, has_extra, relu
        )
    elif vectors == 2:
        panel_product_to(MR, 2, a, b, b_step, panel, depth, outputs, columns, y, y_step, shifts, extra, has_extra, relu)
    else:
        panel_product_to(MR, 1, a, b, b_step, panel, depth, outputs, columns, y, y_step, shifts, extra, has_extra, relu)


@device(allocates=True)
def _chunk(x, source, weight, left, first, last, pixels, depth, outputs, y, target, bias, bias_start, extra, code):
    """The pixels first .. last of one image and `outputs` outputs."""
    width = NV * lanes(x)
    panel = scratch(depth * width, x)
    shifts = scratch(outputs + MR, x)
    for o in range(outputs + MR):
        shifts[o] = bias[bias_start + o] if o < outputs and bias.size > 0 else x.dtype.type(0)
    has_extra = 1 if extra.size > 0 else 0
    for p in range(first, last, width):
        columns = min(width, last - p)
        _multiply(
            (columns + lanes(x) - 1) // lanes(x), address(weight, left), address(x, source + p), pixels,
            address(panel, 0), depth, outputs, columns, address(y, target + p), pixels, address(shifts, 0),
            address(extra, target + p if has_extra else 0), has_extra, 1 if code == 1 else 0,
        )  # fmt: skip
        if code > 1:
            for o in range(outputs):
                activate_row(y, target + o * pixels + p, columns, code)
    keep(panel)
    keep(shifts)


@kernel()
def convolve(x, weight, y, bias, extra, geometry):
    """y = activation(weight x + bias + extra) for each image, all arrays flat, for a `plan`.

    weight: (groups * outputs, channels). extra: empty, or laid out as y.
    """
    n, groups, channels, pixels, outputs = geometry[0], geometry[1], geometry[2], geometry[3], geometry[4]
    splits, code = geometry[6], geometry[7]
    span = geometry[5] * NV * lanes(x)
    blocks = (pixels + span - 1) // span
    tiles = (outputs + MR - 1) // MR
    share = (tiles + splits - 1) // splits * MR
    for chunk in prange(n * groups * blocks * splits):
        o = chunk % splits * share
        first = chunk // splits % blocks * span
        plane = chunk // (splits * blocks)
        g = plane % groups
        some = min(share, outputs - o)
        if some > 0:
            _chunk(
                x, plane * channels * pixels, weight, (g * outputs + o) * channels, first, min(pixels, first + span),
                pixels, channels, some, y, (plane * outputs + o) * pixels, bias, g * outputs + o, extra, code,
            )  # fmt: skip
