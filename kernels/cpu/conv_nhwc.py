"""Convolution in NHWC as an implicit matrix product: pixels are the rows, output channels the vectors.

For one group, with k running over (tap row, tap column, channel):

    y[pixel, o] = sum over k of rows[pixel, k] * weight[k, o]

A pixel's channels are contiguous in x, and where the groups do not come between, so are the taps of one tap row: a
segment. Panels of MR pixels are packed segment by segment by transposing squares of vectors in registers; the part of a
segment that lies in the padding is masked off. Pixels are numbered through the whole batch, so small images waste
nothing. Each chunk owns a block of pixels with all outputs of one group.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.epilogue import activate_row
from tilewise.kernels.cpu.gemm_blocks import multiply_rows
from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import MR, NV, address, lanes
from tilewise.kernels.cpu.vector_move import transpose_block

# Steps k per block and panels of MR pixels per block of work: 256 * 14 * 4 = 14 KB a panel in L1, 115 KB a block in L2.
DEPTH = 256
PANELS = 8


@device()
def pack_weight(weight, start, outputs, channels, taps, k0, depth, panels, target):
    """Rows k0 .. k0 + depth of the weights of one group, k running over (tap, channel), into panels of NR outputs.

    weight[start + (o * channels + c) * taps + t]; panels[target + (o // NR) * NR * depth + (k - k0) * NR + o % NR].
    """
    width = NV * lanes(weight)
    for first in range(0, outputs, width):
        base = target + first * depth
        for k in range(depth):
            tap = (k0 + k) // channels
            c = (k0 + k) - tap * channels
            source = start + (first * channels + c) * taps + tap
            some = min(width, outputs - first)
            for o in range(some):
                panels[base + k * width + o] = weight[source + o * channels * taps]
            for o in range(some, width):
                panels[base + k * width + o] = 0


@device()
def locate_pixels(first, count, total, oh, ow, stride_h, stride_w, where):
    """where[i] = (image, first input row, first input column) of pixel first + i; image -1 beyond the last pixel."""
    for i in range(count):
        pixel = first + i
        image = pixel // (oh * ow)
        row = (pixel - image * oh * ow) // ow
        where[i, 0] = image if pixel < total else -1
        where[i, 1] = row * stride_h
        where[i, 2] = (pixel - image * oh * ow - row * ow) * stride_w


@device()
def _segment_bounds(where, row_offset, column_offset, taps, step, h, w, channels, offsets, lows, highs):
    """For each of MR pixels: where the segment begins in x, and which part of it lies inside the image."""
    for r in range(MR):
        row = where[r, 1] + row_offset
        column = where[r, 2] + column_offset
        offsets[r] = ((where[r, 0] * h + row) * w + column) * channels
        inside = where[r, 0] >= 0 and row >= 0 and row < h
        lows[r] = max(0, -column) * step if taps > 1 else (0 if column >= 0 else step)
        highs[r] = min(taps, w - column) * step if inside else 0


@device()
def gather_rows(
    x, first_channel, h, w, all_channels, channels, tap_rows, tap_columns, joined, where, k0, depth, offsets, lows,
    highs,
    panel, target,
):  # fmt: skip
    """panel[target + (k - k0) * MR + r] for MR pixels and k0 <= k < k0 + depth.

    joined: all taps of a tap row are one segment (dilation 1, one group); else each tap is its own.
    """
    width = lanes(x)
    segment_taps = tap_columns.size if joined else 1
    length = segment_taps * channels
    per_row = tap_columns.size // segment_taps
    segment = k0 // length
    while segment * length < k0 + depth:
        row = segment // per_row
        column_offset = tap_columns[(segment - row * per_row) * segment_taps]
        _segment_bounds(
            where, tap_rows[row], column_offset, segment_taps, channels, h, w, all_channels, offsets, lows, highs
        )
        begin = max(k0 - segment * length, 0)
        end = min(length, k0 + depth - segment * length)
        for k in range(begin, end, width):
            transpose_block(
                MR,
                address(panel, target + (segment * length + k - k0) * MR),
                address(x, first_channel),
                address(offsets, 0),
                address(lows, 0),
                address(highs, 0),
                k,
                end - k,
            )
        segment += 1


@device()
def _finish(c, c_start, c_step, pixels, outputs, bias, bias_start, activation):
    for p in range(pixels):
        row = c_start + p * c_step
        if bias.size > 0:
            for o in range(outputs):
                c[row + o] += bias[bias_start + o]
        if activation != 0:
            activate_row(c, row, outputs, activation)


@device()
def _scatter(block, first, pixels, oh, ow, outputs, y, y_start, image_step, row_step, column_step):
    for p in range(pixels):
        image = (first + p) // (oh * ow)
        rest = (first + p) - image * oh * ow
        row = rest // ow
        target = y_start + image * image_step + row * row_step + (rest - row * ow) * column_step
        for o in range(outputs):
            y[target + o] = block[p * outputs + o]


@device(allocates=True)
def _pixel_block(
    x, first_channel, h, w, all_channels, channels, panels_b, outputs, tap_rows, tap_columns, joined, stride_h,
    stride_w,
    first, pixels, total, oh, ow, y, y_start, image_step, row_step, column_step, bias, bias_start, activation,
):  # fmt: skip
    width = NV * lanes(x)
    padded = ((outputs + width - 1) // width) * width
    whole = channels * tap_rows.size * tap_columns.size
    count = (pixels + MR - 1) // MR
    panels_a = scratch(count * MR * min(DEPTH, whole), x)
    where = np.empty((count * MR, 3), np.int64)
    offsets, lows, highs = np.empty(MR, np.int64), np.empty(MR, np.int64), np.empty(MR, np.int64)
    locate_pixels(first, count * MR, total, oh, ow, stride_h, stride_w, where)
    in_order = row_step == ow * column_step and image_step == oh * row_step
    block = y if in_order else scratch(pixels * outputs, y)
    c_start = y_start + first * column_step if in_order else 0
    c_step = column_step if in_order else outputs
    for k0 in range(0, whole, DEPTH):
        depth = min(DEPTH, whole - k0)
        for i in range(count):
            gather_rows(
                x, first_channel, h, w, all_channels, channels, tap_rows, tap_columns, joined,
                where[i * MR : (i + 1) * MR],
                k0, depth, offsets, lows, highs, panels_a, i * MR * depth,
            )  # fmt: skip
        multiply_rows(
            panels_a, pixels, panels_b[k0 * padded :], outputs, depth, block, c_start, c_step, 1 if k0 > 0 else 0
        )
    _finish(block, c_start, c_step, pixels, outputs, bias, bias_start, activation)
    if not in_order:
        _scatter(block, first, pixels, oh, ow, outputs, y, y_start, image_step, row_step, column_step)


@kernel()
def convolve(
    x, n, groups, channels, h, w, weight, outputs, tap_rows, tap_columns, stride_h, stride_w, oh, ow,
    y, y_start, image_step, row_step, column_step, bias, activation,
):  # fmt: skip
    """y = activation(convolution(x, weight) + bias) for n images.

    channels, outputs: per group. weight: (groups * outputs, channels, taps), flat, as in NCHW. oh, ow: the grid of
    output pixels; output o of group g at pixel (i, j) of image b is y[b * image_step + y_start + i * row_step + j *
    column_step + g * outputs + o]. tap_rows, tap_columns: tap (r, s) of pixel (i, j) is x[i * stride_h + tap_rows[r],
    j * stride_w + tap_columns[s]].
    """
    width = NV * lanes(x)
    taps = tap_rows.size * tap_columns.size
    whole = channels * taps
    padded = ((outputs + width - 1) // width) * width
    joined = (
        groups == 1
        and tap_columns.size > 1
        and tap_columns[tap_columns.size - 1] - tap_columns[0] == (tap_columns.size - 1)
    )
    panels_b = scratch(groups * padded * whole, x)
    blocks = (whole + DEPTH - 1) // DEPTH
    for i in prange(groups * blocks):
        g = i // blocks
        k0 = (i - g * blocks) * DEPTH
        pack_weight(
            weight, g * outputs * whole, outputs, channels, taps, k0, min(DEPTH, whole - k0), panels_b,
            g * padded * whole + k0 * padded,
        )  # fmt: skip
    total = n * oh * ow
    # Blocks of equal size in whole panels; smaller ones where there would be too few for several threads.
    block_pixels = PANELS * MR
    while block_pixels > 2 * MR and (total + block_pixels - 1) // block_pixels * groups < 8:
        block_pixels //= 2
    block_pixels = ((block_pixels + MR - 1) // MR) * MR
    pixel_blocks = (total + block_pixels - 1) // block_pixels
    for chunk in prange(pixel_blocks * groups):
        g = chunk % groups
        first = (chunk // groups) * block_pixels
        _pixel_block(
            x, g * channels, h, w, groups * channels, channels, panels_b[g * padded * whole :], outputs,
            tap_rows, tap_columns, joined, stride_h, stride_w,
            first, min(block_pixels, total - first), total, oh, ow,
            y, y_start + g * outputs, image_step, row_step, column_step, bias, g * outputs, activation,
        )  # fmt: skip
