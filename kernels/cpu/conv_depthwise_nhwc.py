"""Depthwise convolution in NHWC, region by region where x lies: see conv_depthwise.py."""

from itertools import pairwise, product

import numpy as np
from numba import prange

from tilewise.kernels.cpu.conv_depthwise_nchw import CHUNKS, FEWEST, ceil_ratio, is_square
from tilewise.kernels.cpu.depthwise_strip import step
from tilewise.kernels.cpu.depthwise_vector import TILE, correlate
from tilewise.kernels.cpu.epilogue import activate_row
from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.row_moves import finish_row
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import address, lanes
from tilewise.kernels.cpu.vector_move import copy_lanes

# A band of NHWC rows: every phase of the transpose reads it. Of 16, 32, 64 and 128 KB, 32 was the best or near it.
BAND_BYTES = 32 << 10


def _segments(size, count, offsets, stride):
    """Runs of outputs with the same taps inside an axis of `size`: (first output, end, first tap, end of taps)."""
    firsts = np.arange(count)[:, None] * stride + offsets
    low, high = (firsts < 0).sum(1), (firsts < size).sum(1)
    edges = np.flatnonzero((np.diff(low) != 0) | (np.diff(high) != 0)) + 1
    bounds = [0, *edges.tolist(), count]
    return [(i, end, low[i], max(low[i], high[i])) for i, end in pairwise(bounds) if i < end]


class Regions:
    """The regions of an NHWC image whose outputs have the same taps inside x, with each region's taps.

    taps: as for Strips. regions: one row of int64 each, (row phase, first row, end, column phase, first column, end,
    start of its taps in the table, taps, square); table: pairs (offset in x from the output's first input, number).
    """

    def __init__(self, x_size, channels, size, kernel_width, taps, stride):
        w = x_size[1]
        axes = []
        for n, length, axis, apart in zip(x_size, size, taps, stride, strict=True):
            counts = [ceil_ratio(length - p, len(axis)) for p in range(len(axis))]
            axes.append([
                (p, *segment)
                for p, (_, offsets) in enumerate(axis)
                for segment in _segments(n, counts[p], offsets, apart)
            ])  # fmt: skip
        regions, table, start = [], [], 0
        for (p, i0, i1, r0, r1), (q, j0, j1, s0, s1) in product(*axes):
            r_numbers, r_offsets = (a[r0:r1] for a in taps[0][p])
            s_numbers, s_offsets = (a[s0:s1] for a in taps[1][q])
            offsets = (r_offsets[:, None] * w + s_offsets) * channels
            numbers = r_numbers[:, None] * kernel_width + s_numbers
            square = is_square(s_offsets, r_offsets, stride[1])
            regions.append((p, i0, i1, q, j0, j1, start, offsets.size, square))
            table.append(np.stack([offsets.T.ravel(), numbers.T.ravel()], 1))  # along the row first, as tiles lie
            start += offsets.size
        self.regions = np.array(regions, np.int64).ravel()
        self.table = np.concatenate(table).astype(np.int64).ravel()


def row_bands(images, height, row_bytes, room):
    """Into how many bands to cut the rows of an image in NHWC, each of about `room` bytes."""
    bands = max(ceil_ratio(height * row_bytes, room), ceil_ratio(FEWEST, images))
    return min(bands, height)


@device()
def pack_by_lane(weight, channels, all_taps, packed):
    """packed[(v * all_taps + t) * lanes + i] = weight[(v * lanes + i) * all_taps + t], zero beyond the channels."""
    width = lanes(weight)
    for c in range(0, channels, width):
        for t in range(all_taps):
            source = address(weight, c * all_taps + t)
            copy_lanes(0, 0, address(packed, c * all_taps + t * width), source, 0, channels - c, all_taps)


@device()
def _region_row(x, channels, stride_w, table, taps, square, weight, all_taps, bias, y, y_step, outputs):
    """`outputs` pixels of one row of a region."""
    across, ahead = stride_w * channels, step(y, 2 * TILE * y_step)
    if outputs < TILE:
        correlate(
            0, 1, 1, 0, x, across, table, taps, weight, all_taps, bias, y, y_step, outputs, channels, ahead,
            y_step,
        )  # fmt: skip
    elif square == 0:
        correlate(
            0, 1, TILE, 0, x, across, table, taps, weight, all_taps, bias, y, y_step, outputs, channels, ahead,
            y_step,
        )  # fmt: skip
    elif stride_w == 1:
        correlate(
            3, 1, TILE, 0, x, channels, table, taps, weight, all_taps, bias, y, y_step, outputs, channels, ahead,
            y_step,
        )  # fmt: skip
    else:
        correlate(
            3, 2, TILE, 0, x, channels, table, taps, weight, all_taps, bias, y, y_step, outputs, channels, ahead,
            y_step,
        )  # fmt: skip


@kernel()
def convolve_nhwc(
    x, weight, y, bias, extra, n, channels, h, w, oh, ow, row_phases, column_phases, bands, stride_h, stride_w, regions,
    table, all_taps, activation,
):  # fmt: skip
    """One output a channel; regions and table: see Regions; extra: see convolve_nchw."""
    width = lanes(x)
    shift = bias if bias.size > 0 else np.zeros(channels, x.dtype)
    packed = scratch((channels + width - 1) // width * width * all_taps, x)
    pack_by_lane(weight, channels, all_taps, packed)
    height = (oh + row_phases - 1) // row_phases
    units = n * bands
    chunks = min(units, CHUNKS)
    aside = (height + bands - 1) // bands * ow * channels if extra.size > 0 else 0
    for chunk in prange(chunks):
        band_memory = scratch(aside, x)
        for unit in range(units * chunk // chunks, units * (chunk + 1) // chunks):
            image = unit // bands
            band = unit - image * bands
            i0, i1 = height * band // bands, height * (band + 1) // bands
            first, count = (image * oh + i0) * ow * channels, (i1 - i0) * ow * channels
            for r in range(0, regions.size, 9):
                p, q, j0, j1 = regions[r], regions[r + 3], regions[r + 4], regions[r + 5]
                for i in range(max(i0, regions[r + 1]), min(i1, regions[r + 2])):
                    source = ((image * h + i * stride_h) * w + j0 * stride_w) * channels
                    target = ((image * oh + i * row_phases + p) * ow + j0 * column_phases + q) * channels
                    to = address(band_memory, target - first) if aside else address(y, target)
                    _region_row(
                        address(x, source), channels, stride_w, address(table, 2 * regions[r + 6]), regions[r + 7],
                        regions[r + 8], address(packed, 0), all_taps, address(shift, 0), to,
                        column_phases * channels, j1 - j0,
                    )  # fmt: skip
            if aside:
                to, whole = address(y, first), address(band_memory, 0)
                finish_row(1, to, whole, count, x.dtype.type(0), 0, address(extra, first), 1)
            if activation != 0:
                activate_row(y, first, count, activation)
