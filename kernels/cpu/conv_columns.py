"""Convolution in NCHW as an implicit matrix product: no im2col matrix in memory, no padded copy of the image.

For one image and group, with k running over (channel, tap row, tap column):

    y[o, pixel] = sum over k of weight[o, k] * columns[k, pixel],   columns[k, pixel] = x[channel, row, column] or 0

The weights are packed once into panels of MR outputs. A block of pixels takes its columns from x straight into panels
of NR pixels: along an output row neighbouring pixels are neighbours in x (or `stride` apart), so a panel row is one
or more masked vector copies, and the lanes that fall into the padding are masked off. Each chunk owns a block of
pixels of one image and a range of outputs; nobody else writes there.

A tap is given by its offset in x, not by kernel size and dilation: the gradient with respect to x is the same sum with
other offsets, one for each phase of the stride (see conv.py), written to every stride-th pixel.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.conv_direct import ceil_div
from tilewise.kernels.cpu.epilogue import activate_row
from tilewise.kernels.cpu.gemm_blocks import make_pack_left
from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import CHANNEL_MR as MR
from tilewise.kernels.cpu.simd import CHANNEL_NV as NV
from tilewise.kernels.cpu.simd import address, lanes, micro_kernel
from tilewise.kernels.cpu.vector_move import copy_lanes, prefetch

pack_weight = make_pack_left(MR)

# Steps k per block: whole channels up to this many. A panel of pixels is 288 * 48 * 4 = 55 KB, one of weights 9 KB.
DEPTH = 288
# Pixel panels per block: 8 * 55 KB of columns in L2, used by every panel of weights before the next are gathered. Of
# 1, 2, 4, 8 and 12, 8 was the fastest or within 3 % of it; with few panels a visit to a channel's page moves too
# little.
PANELS = 8


@device()
def find_runs(p0, used, width, count, ow, runs):
    """Split `count` vectors of `width` pixels from p0 on into runs of lanes that lie in one output row.

    runs[r] = (first lane of the vector, low, high, output row, output column of lane 0); returns the number of runs.
    The columns of lane 0 may be negative: what counts is that lane l of the run is column + l. A vector without
    pixels gets one empty run, so that it is set to zero.
    """
    n = 0
    for j in range(count):
        lane = 0
        while True:
            pixel = p0 + j * width + lane
            row = pixel // ow
            column = pixel - row * ow
            end = min(lane + ow - column, min(width, used - j * width))
            runs[n, 0] = j * width
            runs[n, 1] = lane
            runs[n, 2] = max(end, lane)
            runs[n, 3] = row
            runs[n, 4] = column - lane
            n += 1
            if end <= lane or end >= min(width, used - j * width):
                break
            lane = end
    return n


@device()
def _copy_run(x, source, channel_step, columns, target, target_step, channels, low, high, stride, merge, ahead):
    """The run's lanes for one tap of every channel."""
    if stride == 1:
        if merge:
            for c in range(channels):
                copy_lanes(
                    1,
                    1,
                    address(columns, target + c * target_step),
                    address(x, source + c * channel_step),
                    low,
                    high,
                    1,
                )
        else:
            for c in range(channels):
                copy_lanes(
                    1,
                    0,
                    address(columns, target + c * target_step),
                    address(x, source + c * channel_step),
                    low,
                    high,
                    1,
                )
                prefetch(address(x, source + c * channel_step + ahead))
    elif stride == 2:
        if merge:
            for c in range(channels):
                copy_lanes(
                    2,
                    1,
                    address(columns, target + c * target_step),
                    address(x, source + c * channel_step),
                    low,
                    high,
                    2,
                )
        else:
            for c in range(channels):
                copy_lanes(
                    2,
                    0,
                    address(columns, target + c * target_step),
                    address(x, source + c * channel_step),
                    low,
                    high,
                    2,
                )
    else:
        if not merge:
            for c in range(channels):
                copy_lanes(1, 0, address(columns, target + c * target_step), address(x, 0), 0, 0, 1)
        for c in range(channels):
            for lane in range(low, high):
                columns[target + c * target_step + lane] = x[source + c * channel_step + lane * stride]


@device()
def gather_columns(
    x, base, h, w, channels, tap_rows, tap_columns, stride_h, stride_w, runs, n_runs, columns, target, panel_width
):
    """columns[target + k * panel_width + lane] for one panel of pixels and `channels` channels from x[base] on."""
    taps = tap_rows.size * tap_columns.size
    for i in range(tap_rows.size):
        for j in range(tap_columns.size):
            tap = target + (i * tap_columns.size + j) * panel_width
            for r in range(n_runs):
                row = runs[r, 3] * stride_h + tap_rows[i]
                column = runs[r, 4] * stride_w + tap_columns[j]
                low, high = runs[r, 1], runs[r, 2]
                merge = low > 0
                if row < 0 or row >= h:
                    high = low
                else:
                    low = max(low, ceil_div(-column, stride_w))
                    high = min(high, ceil_div(w - column, stride_w))
                if high > low:
                    source = base + row * w + column
                else:
                    low = high = 0
                    source = 0
                if high > low or not merge:
                    _copy_run(
                        x,
                        source,
                        h * w,
                        columns,
                        tap + runs[r, 0],
                        taps * panel_width,
                        channels,
                        low,
                        high,
                        stride_w,
                        merge,
                        panel_width * stride_w,
                    )


@device()
def gather_flat(x, base, plane, channels, pixels, columns, panel_width):
    """The same for a 1x1 kernel of stride 1 without padding: pixels are neighbours through the whole plane.

    Channel by channel, so that each visit to a channel's memory page moves a whole block of pixels; the next block is
    fetched meanwhile.
    """
    width = lanes(x)
    for c in range(channels):
        source = base + c * plane
        for p in range(0, pixels, width):
            panel = p // panel_width
            target = (panel * channels + c) * panel_width + (p - panel * panel_width)
            copy_lanes(1, 0, address(columns, target), address(x, source + p), 0, pixels - p, 1)
            prefetch(address(x, source + p + pixels))


@device()
def _multiply_block(panels, start, outputs, columns, pixels, depth, c, c_start, c_step, accumulate):
    """A packed block of weights times the gathered columns of a block of pixels."""
    width = NV * lanes(c)
    for i in range(0, outputs, MR):
        for p in range(0, pixels, width):
            where = address(c, c_start + i * c_step + p)
            left = address(panels, start + i * depth)
            right = address(columns, p * depth)
            if pixels - p > lanes(c):
                micro_kernel(MR, NV, left, MR, right, width, depth, where, c_step, outputs - i, pixels - p, accumulate)
            else:
                micro_kernel(MR, 1, left, MR, right, width, depth, where, c_step, outputs - i, pixels - p, accumulate)


@device()
def _finish(c, c_start, c_step, outputs, pixels, bias, bias_start, activation):
    for o in range(outputs):
        row = c_start + o * c_step
        if bias.size > 0:
            value = bias[bias_start + o]
            for p in range(pixels):
                c[row + p] += value
        if activation != 0:
            activate_row(c, row, pixels, activation)


@device()
def _scatter(block, pixels, outputs, y, y_start, plane, row_step, column_step, p0, ow):
    """Copy a finished block to its pixels, which are `column_step` apart."""
    for o in range(outputs):
        for p in range(pixels):
            row = (p0 + p) // ow
            column = (p0 + p) - row * ow
            y[y_start + o * plane + row * row_step + column * column_step] = block[o * pixels + p]


@device(allocates=True)
def _pixel_block(
    x, base, h, w, channels, panels, padded_outputs, first_output, outputs, tap_rows, tap_columns, stride_h, stride_w,
    p0, pixels, oh, ow, y, y_start, plane, row_step, column_step, bias, bias_start, activation,
):  # fmt: skip
    width = lanes(x)
    panel_width = NV * width
    taps = tap_rows.size * tap_columns.size
    channel_block = min(channels, max(1, DEPTH // max(taps, 1)))
    n_panels = (pixels + panel_width - 1) // panel_width
    columns = scratch(n_panels * panel_width * channel_block * taps, x)
    runs = np.empty((panel_width + NV, 5), np.int64)
    flat = taps == 1 and tap_rows[0] == 0 and tap_columns[0] == 0 and stride_h * stride_w == 1 and oh == h and ow == w
    in_order = column_step == 1 and row_step == ow
    block = y if in_order else scratch(outputs * pixels, y)
    c_start = y_start + p0 if in_order else 0
    c_step = plane if in_order else pixels
    for c0 in range(0, channels, channel_block):
        some = min(channel_block, channels - c0)
        depth = some * taps
        if flat:
            gather_flat(x, base + c0 * h * w + p0, h * w, some, pixels, columns, panel_width)
        for t in range(0 if flat else n_panels):
            used = pixels - t * panel_width
            vectors = NV if used > width else 1
            n_runs = find_runs(p0 + t * panel_width, used, width, vectors, ow, runs)
            gather_columns(
                x, base + c0 * h * w, h, w, some, tap_rows, tap_columns, stride_h, stride_w, runs, n_runs, columns,
                t * panel_width * depth, panel_width,
            )  # fmt: skip
        start = c0 * taps * padded_outputs + first_output * depth
        _multiply_block(panels, start, outputs, columns, pixels, depth, block, c_start, c_step, 1 if c0 > 0 else 0)
    _finish(block, c_start, c_step, outputs, pixels, bias, bias_start, activation)
    if not in_order:
        _scatter(block, pixels, outputs, y, y_start, plane, row_step, column_step, p0, ow)


@kernel()
def convolve(
    x, n, groups, channels, h, w, weight, outputs, tap_rows, tap_columns, stride_h, stride_w, oh, ow,
    y, y_start, plane, row_step, column_step, bias, activation,
):  # fmt: skip
    """y = activation(convolution(x, weight) + bias) for n images.

    channels, outputs: per group. weight: (groups * outputs, channels, taps), flat. oh, ow: the grid of output pixels;
    pixel (i, j) of output o of image b is y[(b * groups * outputs + o) * plane + y_start + i * row_step + j *
    column_step]. tap_rows, tap_columns: tap (r, s) of pixel (i, j) is x[i * stride_h + tap_rows[r], j * stride_w +
    tap_columns[s]].
    """
    taps = tap_rows.size * tap_columns.size
    whole = channels * taps
    padded = ((outputs + MR - 1) // MR) * MR
    channel_block = min(channels, max(1, DEPTH // max(taps, 1)))
    blocks = (channels + channel_block - 1) // channel_block
    panels = scratch(groups * padded * whole, x)
    for i in prange(groups * blocks):
        g = i // blocks
        c0 = (i % blocks) * channel_block
        depth = min(channel_block, channels - c0) * taps
        pack_weight(
            weight,
            g * outputs * whole + c0 * taps,
            whole,
            1,
            outputs,
            depth,
            panels,
            g * padded * whole + c0 * taps * padded,
        )
    pixels = oh * ow
    block_pixels = PANELS * NV * lanes(x)
    pixel_blocks = (pixels + block_pixels - 1) // block_pixels
    # Few images with few pixels: split the outputs too, in whole panels, so that there is work for several threads.
    splits = 1
    while n * groups * pixel_blocks * splits < 8 and padded // MR >= 4 * splits:
        splits *= 2
    split_outputs = (((padded // MR) + splits - 1) // splits) * MR
    for chunk in prange(n * groups * pixel_blocks * splits):
        part = chunk % splits
        p0 = (chunk // splits) % pixel_blocks * block_pixels
        g = chunk // (splits * pixel_blocks) % groups
        image = chunk // (splits * pixel_blocks * groups)
        first = part * split_outputs
        some = min(split_outputs, outputs - first)
        if some > 0:
            _pixel_block(
                x, (image * groups + g) * channels * h * w, h, w, channels,
                panels[g * padded * whole :], padded, first, some, tap_rows, tap_columns, stride_h, stride_w,
                p0, min(block_pixels, pixels - p0), oh, ow,
                y, y_start + ((image * groups + g) * outputs + first) * plane, plane, row_step, column_step,
                bias, g * outputs + first, activation,
            )  # fmt: skip
