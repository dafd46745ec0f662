"""How the implicit product on phase planes (conv_nchw.py) is cut into blocks, and where its taps lie: `plan`.

Python for Numba, too (njit/conv.py): no generators, no mixed lists.
"""

from math import ceil

import numpy as np

from tilewise.kernels.cpu.simd import CHANNEL_MR as MR
from tilewise.kernels.cpu.simd import CHANNEL_NV as NV
from tilewise.kernels.cpu.simd import VECTOR_BYTES, lane_count

# Steps k per block, whole channels. All of them where they are few: sums then never leave L1. Otherwise few enough that
# the lines of a panel's columns stay in L1 while all outputs pass by.
WHOLE_DEPTH = 640
DEPTH = 200
# Pixels a block: a whole plane of 28x28, for each block reads rows of the next one again and ends with a short panel;
# fewer where there would not be CHUNKS chunks to share out.
BLOCK_PIXELS = 17 * 48
CHUNKS = 8
IN_PLACE_BYTES = 32 << 10
# What L2 holds beside weights and results. Half as much is slower, where few channels' rows come from memory.
PLANE_BYTES = 128 << 10
# The same where each tap column has planes of its own: whole ones of 28x28, 22 channels, 3x3 taps with stride 2. Where
# those of all channels would take more, channels go in blocks, which costs less than blocks of fewer rows.
SPREAD_BYTES = 512 << 10
# The sums of a chunk, where its channels go in blocks.
SUM_BYTES = 2 << 20


def plan(x, outputs, taps, stride, grid, y_steps, groups, itemsize, activation, blocks=None):
    """(geometry, offsets, phases) for `convolve`.

    x: (n, channels a group, h, w). outputs: a group. taps: the taps' offsets in x, rows and columns. grid: rows and
    columns of output pixels. y_steps: (start, plane, row step, column step) of y. blocks: (channels, output rows) of a
    block, where the caller chooses.
    """
    n, channels, h, w = x
    oh, ow = grid
    low_row, low_column = int(taps[0].min()), int(taps[1].min())
    rows, row_phases = _split(taps[0], low_row, stride[0])
    columns, column_phases = _split(taps[1], low_column, stride[1])
    extra_rows, extra_columns = int(rows.max()), int(columns.max())
    shared = _shared_padding(low_column, w, ow + extra_columns, extra_columns, stride[1])
    pitch = ow + extra_columns - shared
    n_taps = rows.size * columns.size
    whole = channels * n_taps
    some = max(1, min(channels, DEPTH // n_taps))
    block = channels if whole <= WHOLE_DEPTH else some
    lane = lane_count(itemsize)
    dense = y_steps[2] == ow and y_steps[3] == 1  # rows are neighbours in y
    # Without padding and stride the planes are x itself; but the channels of large images often lie a power of two
    # apart, so that they compete for the same few cache sets, and copies do not.
    in_place = oh + extra_rows == h and pitch == w and stride[0] == 1 and stride[1] == 1
    in_place = in_place and low_row == 0 and low_column == 0 and channels * h * w * itemsize <= IN_PLACE_BYTES
    spread = dense and blocks is None and not in_place and _panels_a_line(ow, pitch, oh, lane) == 0
    spread = spread and _pays_to_spread(oh, ow, pitch, extra_rows, row_phases, column_phases, outputs, some, lane)
    if spread:
        columns, column_phases = np.zeros_like(columns), taps[1] - low_column
        shared, pitch = 0, ow
    used = _used_phases(row_phases, column_phases)
    if blocks is not None:
        block = blocks[0]
    row_bytes, pixels = block * len(used) * pitch * itemsize, BLOCK_PIXELS
    if spread:
        if min(oh, pixels // pitch) > _spread_rows(extra_rows, row_bytes):
            block, row_bytes = some, some * len(used) * pitch * itemsize
        pixels = min(pixels, _spread_rows(extra_rows, row_bytes) * pitch)
    most = max(1, pixels // pitch, PLANE_BYTES // row_bytes - extra_rows)
    in_blocks = block < channels
    block_rows, images, splits = _blocks(n, groups, oh, ow, pitch, extra_rows, outputs, lane, pixels, most, in_blocks)
    if blocks is not None:
        block_rows, images = blocks[1], 1
    plane = (block_rows + extra_rows) * pitch * images
    phase_of = _phase_table(used, row_phases, column_phases)
    offsets = _offsets(block, rows, columns, phase_of, len(used), plane, pitch)
    phases = np.empty(4 * len(used), np.int64)
    for i in range(len(used)):
        filled = _phase(used[i][0] + low_row, used[i][1] + low_column, stride[1], w, pitch)
        for k in range(4):
            phases[4 * i + k] = filled[k]
    in_place = in_place and images == 1
    if in_place:
        offsets = np.concatenate((offsets, _offsets(block, rows, columns, phase_of, len(used), h * w, w)))
    line, lines = ow, block_rows
    if pitch == ow and dense:
        line, lines = block_rows * ow, 1
    geometry = np.array(
        [n, groups, channels, h, w, outputs, oh, ow, stride[0], stride[1], n_taps, len(used), extra_rows, pitch,
         block_rows, images, splits, block, plane, y_steps[0], y_steps[1], y_steps[2], y_steps[3], activation,
         line, lines, int(in_place), shared, _panels_a_line(ow, pitch, block_rows, lane) if images == 1 else 0],
        np.int64,
    )  # fmt: skip
    return geometry, offsets, phases


def _panels_a_line(ow, pitch, rows, lane):
    """Panels of a line of pixels, where they start anew with each; 0 where they run on from line to line.

    A panel in which a line ends is stored in parts, under masks, which cost AVX2 12 cycles each; its other vectors, and
    those of all lines behind, straddle the cache lines of y; and panels within one line share a call. So they start
    anew where that takes hardly more vectors: at 112 and 224 pixels a line (`make bench-peers ARGS='--only "conv1"'`:
    the first layers of MobileNet, ResNet and VGG). A single one at the end counts as two, for its few sums wait for
    each other; with AVX-512 its 8 do not, but share their broadcasts with nobody.
    """
    if pitch == ow:
        return 0
    vectors = ceil(ow / lane)
    alone = (0.25 if VECTOR_BYTES == 64 else 1.0) if vectors % NV == 1 else 0.0
    most = _run_on(rows, pitch, ow, lane) * (33 / 32 if VECTOR_BYTES == 64 else 17 / 16)
    return ceil(vectors / NV) if rows * (vectors + alone) <= most else 0


def _run_on(rows, pitch, ow, lane):
    """Vectors that rows of pixels take one after the other, the waste between them included."""
    return ceil(((rows - 1) * pitch + ow) / lane)


def _spread_rows(extra_rows, row_bytes):
    """Output rows of a block where each tap column has planes of its own; row_bytes: of a row in all planes."""
    return max(1, SPREAD_BYTES // row_bytes - extra_rows)


def _pays_to_spread(oh, ow, pitch, extra_rows, row_phases, column_phases, outputs, block, lane):
    """Whether every tap column shall have planes of its own, as wide as y's rows: no waste, but more copies.

        taps 0, 1, 2 of 3 (width 4, padding 1)      0 a b c    a b c d    b c d 0
                                                    0 e f g    e f g h    f g h 0

    In cycles, for a channel of an image: the products of a vector with all outputs and taps, one each; a copied row, 8
    and 4 a vector. Rows that a block shares with the next are copied again, and so many planes leave room for few rows.
    It pays where lines are short and outputs many (`make bench-peers ARGS='--only "5x5|stride"'`).
    """
    taps = row_phases.size * column_phases.size
    saved = (_run_on(oh, pitch, ow, lane) - ceil(oh * ow / lane)) * outputs * taps
    rows, columns = np.unique(row_phases).size, np.unique(column_phases).size
    row_bytes = block * rows * column_phases.size * ow * (VECTOR_BYTES // lane)
    again = (ceil(oh / _spread_rows(extra_rows, row_bytes)) - 1) * extra_rows
    copies = rows * ((column_phases.size - columns) * (oh + extra_rows) + column_phases.size * again)
    return saved > copies * (8 + 4 * ceil(ow / lane))


def _shared_padding(low, w, reach, extra, stride):
    """How many of the zeros behind a plane's row are those before the next, too: half of the waste is saved."""
    return min(max(0, -low), max(0, reach + low - w), extra) if stride == 1 else 0


def _split(taps, low, stride):
    """The taps' places in their phases, and those phases."""
    return (taps - low) // stride, (taps - low) % stride


def _used_phases(row_phases, column_phases):
    """All (row, column) phases, in the order of the taps that need them."""
    used = []
    for r in row_phases:
        for s in column_phases:
            if (int(r), int(s)) not in used:
                used.append((int(r), int(s)))
    return used


def _phase_table(used, row_phases, column_phases):
    """Which of the phases each tap reads."""
    table = np.empty((row_phases.size, column_phases.size), np.int64)
    for i in range(row_phases.size):
        for j in range(column_phases.size):
            table[i, j] = used.index((int(row_phases[i]), int(column_phases[j])))
    return table


def efficiency(geometry, lane):
    """The share of the vectors' lanes that are pixels."""
    oh, ow, pitch, rows, images = (int(geometry[i]) for i in (6, 7, 13, 14, 15))
    used = sum(_run_on(min(rows, oh - first) * images, pitch, ow, lane) for first in range(0, oh, rows))
    return oh * ow * images / (used * lane)


def _offsets(channels, rows, columns, phase_of, phases, plane, pitch):
    """Where step k = (channel, tap row, tap column) finds pixel 0."""
    offsets = np.empty((channels, rows.size, columns.size), np.int64)
    for c in range(channels):
        for r in range(rows.size):
            offsets[c, r] = (c * phases + phase_of[r]) * plane + rows[r] * pitch + columns
    return offsets.reshape(channels * rows.size * columns.size)


def _phase(first_row, first_column, stride_w, w, pitch):
    """(first row, leading zeros, columns inside x, first of them): how to fill a plane's rows."""
    left = min(pitch, max(0, ceil(-first_column / stride_w)))
    end = max(left, min(pitch, ceil((w - first_column) / stride_w)))
    return first_row, left, end - left, first_column + left * stride_w


def _sum_bytes(rows, images, ow, pitch, outputs, lane):
    """Bytes of the sums of a chunk, in whole panels."""
    per_line = _panels_a_line(ow, pitch, rows, lane) if images == 1 else 0
    panels = rows * per_line if per_line else ceil(_run_on(rows * images, pitch, ow, lane) / NV)
    return panels * NV * VECTOR_BYTES * ceil(outputs / MR) * MR


def _blocks(n, groups, oh, ow, pitch, extra_rows, outputs, lane, pixels, most, in_blocks):
    """(output rows a block, images a block, parts of the outputs); fixed by the problem.

    pixels: a block's. most: the most rows, where they may be more. in_blocks: whether the channels go in blocks, so
    that a chunk keeps the sums of all its pixels and outputs.
    """
    if extra_rows == 0 and pitch == ow and oh * ow <= pixels // 2:
        # pixels are neighbours from image to image
        rows, images = oh, min(n, pixels // (oh * ow), max(1, n * groups // 2))
    else:
        if in_blocks:  # fewer rows, but hardly fewer pixels than without; then fewer outputs
            row = ceil(_sum_bytes(oh, 1, ow, pitch, outputs, lane) / oh)
            most = min(most, max(1, pixels // pitch, SUM_BYTES // row))
        while most > 1 and n * groups * ceil(oh / most) < CHUNKS // 2 and most * pitch > 4 * lane * NV:
            most = ceil(most / 2)
        rows, images, fewest = 1, 1, _vectors(oh, 1, ow, pitch, extra_rows, lane)
        for some in range(2, min(oh, most) + 1):
            vectors = _vectors(oh, some, ow, pitch, extra_rows, lane)
            if vectors < fewest:
                rows, fewest = some, vectors
    chunks, splits = groups * ceil(n / images) * ceil(oh / rows), 1
    while chunks * splits < CHUNKS and outputs // MR >= 4 * splits:
        splits *= 2
    if in_blocks:
        while outputs > MR * splits and _sum_bytes(rows, images, ow, pitch, ceil(outputs / splits), lane) > SUM_BYTES:
            splits *= 2
    return rows, images, splits


def _vectors(oh, rows, ow, pitch, extra_rows, lane):
    """Vectors of pixels that an image takes in blocks of so many rows; a block's own cost counts as two, and as one for
    each row that it shares with the next."""
    vectors = 0.0
    for first in range(0, oh, rows):
        size = min(rows, oh - first)
        vectors += _run_on(size, pitch, ow, lane) + 2 + extra_rows * pitch / lane / 4
    return vectors
