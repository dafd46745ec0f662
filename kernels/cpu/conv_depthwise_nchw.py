"""Depthwise convolution of NCHW planes, band by band from strips: see conv_depthwise.py."""

from itertools import product

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
# Elements of y from where it is written to where it will be: a line that is there already does not hold up the next.
WRITE_AHEAD = 512
# Chunks of work; fewer than this many pieces are cut smaller, so that several threads find some.
CHUNKS = 64
FEWEST = 8


def ceil_ratio(a, b):
    return -(-a // b)


class Strips:
    """How bands of an NCHW plane are copied to strips, and where the taps lie in them.

    taps: for rows and for columns, a list over phases of (numbers, offsets): tap k of pixel i is x[i * stride +
    offsets[k]], its weight the one with that number.
    """

    def __init__(self, planes, size, kernel_width, taps, stride, dtype):
        lanes = lane_count(dtype.itemsize)
        rows, columns = (np.concatenate([offsets for _, offsets in axis]) for axis in taps)
        height, width = (ceil_ratio(n, len(axis)) for n, axis in zip(size, taps, strict=True))
        first_row, first_column = int(rows.min()), int(columns.min())
        span = int(rows.max()) - first_row
        part = ceil_ratio(width + (int(columns.max()) - first_column) // stride[1], lanes) * lanes
        pitch = part * stride[1]
        room = STRIP_BYTES // (len(taps[0]) * len(taps[1]))
        fitting = max(1, (room // (pitch * dtype.itemsize) - span - 1) // stride[0] + 1)
        bands = max(1, min(max(ceil_ratio(height, fitting), ceil_ratio(FEWEST, max(planes, 1))), height // TILE))
        self.rows = (ceil_ratio(height, bands) - 1) * stride[0] + span + 1
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
        self.square = is_square(rows, columns, stride[0]) if alone else 0


def is_square(along, across, stride):
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
            # a plane of 14x14 takes 450 cycles, of which six divisions would be a fifth
            plane, i0, i1 = unit, 0, height
            if bands > 1:
                plane = unit // bands
                band = unit - plane * bands
                i0, i1 = height * band // bands, height * (band + 1) // bands
            fill_strip(
                address(x, plane * h * w), h, w, i0 * stride_h + first_row, first_column,
                strip_rows - (tallest - i1 + i0) * stride_h, part, stride_w, lanes(x), strip,
            )  # fmt: skip
            for k in range(outputs * row_phases):
                o = k if row_phases == 1 else k // row_phases
                p = k - o * row_phases
                rows = min(i1, ceil_div(oh - p, row_phases)) - i0
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
