"""Depthwise convolution (one input channel a group), and its transpose: all taps of an output in registers.

    y[c, i, j] = bias[c] + sum over taps (r, s) of weight[c, r, s] * x[c, i * stride + r - pad, j * stride + s - pad]

Nine products an output are so little that memory decides: x is read once, y written once, and in between only the
first-level cache is touched. depthwise_vector.py has the inner loop.

NCHW: a band of rows of one plane is copied to a strip, with zeros for the padding and the columns of a stride of 2
dealt out to two half rows, so that every tap is a contiguous load and no border is left:

    row of x:  a b c d e f g   ->  strip:  0 b d f | a c e g        (stride 2, one column of padding)

NHWC: the image is cut into regions whose outputs have the same taps inside the image: with padding 1, nine of them, the
inner one with nearly all pixels. Nothing is copied and nothing tested in the inner loop.

The transpose (the gradient with respect to x) has a phase for every (row, column) within a stride, each a convolution
of its own with some of the taps (see conv.py); one pass over a band computes them all and puts y's columns together.
"""

from itertools import pairwise, product
from math import prod

import numpy as np
from numba import prange

from tilewise.kernels.cpu.conv_direct import ceil_div
from tilewise.kernels.cpu.depthwise_strip import clear, deal_rows, interleave, spread, step
from tilewise.kernels.cpu.depthwise_vector import TILE, correlate
from tilewise.kernels.cpu.epilogue import activate_row
from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.row_moves import finish_row
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import address, lane_count, lanes
from tilewise.kernels.cpu.vector_move import copy_lanes

# A strip shares the first-level cache (32 to 48 KB) with the rows of y that are written meanwhile.
STRIP_BYTES = 16 << 10
# A band of NHWC rows: every phase of the transpose reads it. Of 16, 32, 64 and 128 KB, 32 was the best or near it.
BAND_BYTES = 32 << 10
# Elements of y from where it is written to where it will be: a line that is there already does not hold up the next.
WRITE_AHEAD = 512
# Chunks of work; fewer than this many pieces are cut smaller, so that several threads find some.
CHUNKS = 64
FEWEST = 8
# Estimated serial nanoseconds per FLOP.
COST = 0.015


def _ceil(a, b):
    return -(-a // b)


class Strips:
    """How bands of an NCHW plane are copied to strips, and where the taps lie in them.

    taps: for rows and for columns, a list over phases of (numbers, offsets): tap k of pixel i is x[i * stride +
    offsets[k]], its weight the one with that number.
    """

    def __init__(self, planes, size, kernel_width, taps, stride, dtype):
        lanes = lane_count(dtype.itemsize)
        rows, columns = (np.concatenate([offsets for _, offsets in axis]) for axis in taps)
        height, width = (_ceil(n, len(axis)) for n, axis in zip(size, taps, strict=True))
        first_row, first_column = int(rows.min()), int(columns.min())
        span = int(rows.max()) - first_row
        part = _ceil(width + (int(columns.max()) - first_column) // stride[1], lanes) * lanes
        pitch = part * stride[1]
        room = STRIP_BYTES // (len(taps[0]) * len(taps[1]))
        fitting = max(1, (room // (pitch * dtype.itemsize) - span - 1) // stride[0] + 1)
        bands = max(1, min(max(_ceil(height, fitting), _ceil(FEWEST, max(planes, 1))), height // TILE))
        self.rows = (_ceil(height, bands) - 1) * stride[0] + span + 1
        self.constants = (height, bands, first_row, first_column, self.rows, part, *stride)
        self.starts = [0]
        table = []
        for (r_numbers, r_offsets), (s_numbers, s_offsets) in product(*taps):
            across = s_offsets - first_column
            places = across % stride[1] * part + across // stride[1]
            offsets = (r_offsets - first_row)[:, None] * pitch + places
            numbers = r_numbers[:, None] * kernel_width + s_numbers
            table.append(np.stack([offsets.ravel(), numbers.ravel()], 1))
            self.starts.append(self.starts[-1] + offsets.size)
        self.table = np.concatenate(table).astype(np.int64).ravel()
        self.starts = np.array(self.starts, np.int64)
        alone = len(taps[0]) == len(taps[1]) == 1
        self.square = _is_square(rows, columns, stride[0]) if alone else 0


def _is_square(along, across, stride):
    """3 for a 3x3 kernel that `correlate` has code for: its taps are neighbours along the tile; else 0."""
    neighbours = along.size == 3 and (np.diff(along) == 1).all()
    return 3 if neighbours and across.size == 3 and stride in (1, 2) else 0


@device()
def fill_strip(x, h, w, first_row, first_column, rows, part, stride_w, width, strip):
    """strip[r, q, k] = x[first_row + r, first_column + k * stride_w + q], zero outside the h x w plane at pointer x."""
    low, pitch = -first_column, part * stride_w
    above = min(max(-first_row, 0), rows)
    inside = min(max(h - first_row - above, 0), rows - above)
    clear(strip, above * pitch)
    clear(step(strip, (above + inside) * pitch), (rows - above - inside) * pitch)
    source, target = step(x, (first_row + above) * w - low), step(strip, above * pitch)
    if stride_w == 1:
        deal_rows(1, target, part, source, w, inside, low, w + low)
    elif stride_w == 2:
        deal_rows(2, target, part, source, w, inside, low, w + low)
    else:
        for r in range(inside):
            for q in range(stride_w):
                first, end = ceil_div(low - q, stride_w), ceil_div(w + low - q, stride_w)
                for k in range(0, part, width):
                    to, where = step(target, r * pitch + q * part + k), step(source, r * w + k * stride_w + q)
                    copy_lanes(0, 0, to, where, first - k, end - k, stride_w)


@device()
def _strip_outputs(
    strip, pitch, stride_h, table, taps, square, weight, all_taps, bias, y, y_step, rows, ow, ahead, ahead_step
):
    """`rows` rows of ow outputs, y_step apart."""
    down = stride_h * pitch
    if rows < TILE:
        correlate(0, 1, 1, 1, strip, down, table, taps, weight, all_taps, bias, y, y_step, rows, ow, ahead, ahead_step)
    elif taps == 1:
        correlate(
            -1, 1, TILE, 1, strip, down, table, taps, weight, all_taps, bias, y, y_step, rows, ow, ahead, ahead_step
        )
    elif taps == 2:
        correlate(
            -2, 1, TILE, 1, strip, down, table, taps, weight, all_taps, bias, y, y_step, rows, ow, ahead, ahead_step
        )
    elif taps == 4:
        correlate(
            -4, 1, TILE, 1, strip, down, table, taps, weight, all_taps, bias, y, y_step, rows, ow, ahead, ahead_step
        )
    elif square == 0:
        correlate(
            0, 1, TILE, 1, strip, down, table, taps, weight, all_taps, bias, y, y_step, rows, ow, ahead, ahead_step
        )
    elif stride_h == 1:
        correlate(
            3, 1, TILE, 1, strip, pitch, table, taps, weight, all_taps, bias, y, y_step, rows, ow, ahead, ahead_step
        )
    else:
        correlate(
            3, 2, TILE, 1, strip, pitch, table, taps, weight, all_taps, bias, y, y_step, rows, ow, ahead, ahead_step
        )


@device()
def _put_together(block, width, rows, columns, y, y_step, ow):
    """Rows of y from the rows of its column phases, each `width` long: y[i, j * columns + q] = block[i, q, j]."""
    for i in range(rows):
        source, target = step(block, i * columns * width), step(y, i * y_step)
        if columns == 2:
            interleave(target, source, step(source, width), ow)
        else:
            for q in range(columns):
                spread(step(target, q), columns, step(source, q * width), (ow - q + columns - 1) // columns)


@kernel()
def convolve_nchw(
    x, weight, y, bias, extra, planes, groups, outputs, h, w, oh, ow, row_phases, column_phases, strips, table, starts,
    all_taps, square, activation,
):  # fmt: skip
    """planes: images * groups; outputs: planes of y for one of x; strips: see Strips.constants.

    extra: empty, or, where there is one phase, added to the result before the activation; it may be y itself, and so a
    band is not written to y before it is whole.
    """
    height, bands, first_row, first_column, strip_rows, part, stride_h, stride_w = strips
    shift = bias if bias.size > 0 else np.zeros(groups * outputs, x.dtype)
    pitch = part * stride_w
    # of a phase's row in whole vectors: one written under a mask could not be read back before it is in the cache
    width = ((ow + column_phases - 1) // column_phases + lanes(x) - 1) // lanes(x) * lanes(x)
    tallest = (height + bands - 1) // bands
    aside = 1 if column_phases > 1 or extra.size > 0 else 0
    units = planes * bands
    chunks = min(units, CHUNKS)
    for chunk in prange(chunks):
        # An array lives until its last use by name: a pointer kept from before the loop would outlive it.
        strip_memory = scratch(strip_rows * pitch, x)
        block_memory = scratch(aside * tallest * column_phases * width, x)
        for unit in range(units * chunk // chunks, units * (chunk + 1) // chunks):
            strip, block = address(strip_memory, 0), address(block_memory, 0)
            plane = unit // bands
            band = unit - plane * bands
            i0, i1 = height * band // bands, height * (band + 1) // bands
            fill_strip(
                address(x, plane * h * w), h, w, i0 * stride_h + first_row, first_column,
                strip_rows - (tallest - i1 + i0) * stride_h, part, stride_w, lanes(x), strip,
            )  # fmt: skip
            for k in range(outputs * row_phases):
                o = k // row_phases
                p = k - o * row_phases
                rows = min(i1, (oh - p + row_phases - 1) // row_phases) - i0
                target = ((plane * outputs + o) * oh + i0 * row_phases + p) * ow
                o += plane % groups * outputs
                factors, value = address(weight, o * all_taps), address(shift, o)
                for phase in range(p * column_phases, (p + 1 if rows > 0 else p) * column_phases):
                    entries, taps = address(table, 2 * starts[phase]), starts[phase + 1] - starts[phase]
                    if aside == 0:
                        _strip_outputs(
                            strip, pitch, stride_h, entries, taps, square, factors, all_taps, value,
                            address(y, target), row_phases * ow, rows, ow,
                            address(y, target + WRITE_AHEAD), row_phases * ow,
                        )  # fmt: skip
                    else:
                        _strip_outputs(
                            strip, pitch, stride_h, entries, taps, square, factors, all_taps, value,
                            step(block, (phase - p * column_phases) * width), column_phases * width, rows, width,
                            address(y, target + (phase - p * column_phases) * width), row_phases * ow,
                        )  # fmt: skip
                if column_phases > 1:
                    _put_together(block, width, rows, column_phases, address(y, target), row_phases * ow, ow)
                elif extra.size > 0:
                    for i in range(rows):
                        where = target + i * ow
                        row = step(block, i * width)
                        finish_row(1, address(y, where), row, ow, x.dtype.type(0), 0, address(extra, where), 1)
                if activation != 0:
                    activate_row(y, target, rows * ow, activation)


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
            counts = [_ceil(length - p, len(axis)) for p in range(len(axis))]
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
            square = _is_square(s_offsets, r_offsets, stride[1])
            regions.append((p, i0, i1, q, j0, j1, start, offsets.size, square))
            table.append(np.stack([offsets.T.ravel(), numbers.T.ravel()], 1))  # along the row first, as tiles lie
            start += offsets.size
        self.regions = np.array(regions, np.int64).ravel()
        self.table = np.concatenate(table).astype(np.int64).ravel()


def row_bands(images, height, row_bytes, room):
    """Into how many bands to cut the rows of an image in NHWC, each of about `room` bytes."""
    bands = max(_ceil(height * row_bytes, room), _ceil(FEWEST, images))
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
    across = stride_w * channels
    if outputs < TILE:
        correlate(
            0,
            1,
            1,
            0,
            x,
            across,
            table,
            taps,
            weight,
            all_taps,
            bias,
            y,
            y_step,
            outputs,
            channels,
            step(y, 2 * TILE * y_step),
            y_step,
        )
    elif square == 0:
        correlate(
            0,
            1,
            TILE,
            0,
            x,
            across,
            table,
            taps,
            weight,
            all_taps,
            bias,
            y,
            y_step,
            outputs,
            channels,
            step(y, 2 * TILE * y_step),
            y_step,
        )
    elif stride_w == 1:
        correlate(
            3,
            1,
            TILE,
            0,
            x,
            channels,
            table,
            taps,
            weight,
            all_taps,
            bias,
            y,
            y_step,
            outputs,
            channels,
            step(y, 2 * TILE * y_step),
            y_step,
        )
    else:
        correlate(
            3,
            2,
            TILE,
            0,
            x,
            channels,
            table,
            taps,
            weight,
            all_taps,
            bias,
            y,
            y_step,
            outputs,
            channels,
            step(y, 2 * TILE * y_step),
            y_step,
        )


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


class Depthwise:
    """One depthwise convolution with everything but the arrays worked out; call it with x, weight, y, bias and extra.

    x, y: shapes. weight: (channels * outputs, 1, KH, KW). taps: for rows and for columns, a list over the phases of y
    of (numbers, offsets); see Strips. A convolution has one phase, its transpose as many as its stride.
    """

    __slots__ = ("constants", "kernel", "no_extra")

    packing = None  # nothing to prepare: the weights are few and read as they lie, or packed in no time

    def __init__(self, x, weight, y, taps, stride, layout, dtype, activation=0):
        self.no_extra = np.empty(0, dtype)
        n, all_taps, phases = x[0], prod(weight[2:]), [len(axis) for axis in taps]
        work = 2 * prod(y) * all_taps / prod(phases) * COST
        if layout == "NHWC":
            _, h, w, channels = x
            oh, ow = y[1:3]
            plan = Regions((h, w), channels, (oh, ow), weight[3], taps, stride)
            bands = row_bands(n, _ceil(oh, phases[0]), w * stride[0] * channels * dtype.itemsize, BAND_BYTES)
            self.kernel = convolve_nhwc.sized(work)
            head = (n, channels, h, w, oh, ow, *phases, bands, *stride)
            self.constants = (*head, plan.regions, plan.table, all_taps, activation)
        else:
            _, channels, h, w = x
            oh, ow = y[2:4]
            strips = Strips(n * channels, (oh, ow), weight[3], taps, stride, dtype)
            self.kernel = convolve_nchw.sized(work)
            head = (n * channels, channels, weight[0] // channels, h, w, oh, ow, *phases, strips.constants)
            self.constants = (*head, strips.table, strips.starts, all_taps, strips.square, activation)

    def __call__(self, x, weight, y, bias, extra=None, packed=None):
        extra = self.no_extra if extra is None else extra
        self.kernel(x.ravel(), weight.ravel(), y.ravel(), bias, extra, *self.constants)
