"""3x3 convolution of stride 1 in NCHW by Winograd's F(4x4, 3x3): 4x4 outputs of a tile from 36 products instead of 144.

The 36 products of all channels and outputs are 36 matrix products; vectors run along the tiles:

    V[xi, c, tile] = transformed input      U[xi, o, c] = transformed weights      M[xi, o, tile] = sum over c of U V

A chunk owns a block of TILES tiles, numbered through the batch. It gathers and transforms its input once, then goes
through the outputs in blocks small enough that M stays in L2: multiply, transform back, write. U is computed once a
call, or once and for all by `pack`.

    per channel: rows of x, split into columns of tiles -> 36 vectors -> V       per output: M -> 16 vectors -> rows
    of y

Error: the transforms add numbers of different size, so single results may be off by 1e-5 of the largest; the relative
2-norm is about 1e-6 in float32 (direct: 2e-7; a test holds it below 1e-5). A NaN or Inf spreads over its tile, so tiles
that end up with one are computed again by the definition.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.epilogue import activate_row
from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.row_moves import clear_row, finish_row
from tilewise.kernels.cpu.scratch import integer_table, progression, scratch
from tilewise.kernels.cpu.simd import CHANNEL_MR as MR
from tilewise.kernels.cpu.simd import CHANNEL_NV as NV
from tilewise.kernels.cpu.simd import address, lane_count, micro_kernel
from tilewise.kernels.cpu.vector_move import copy_lanes, transpose_square_to
from tilewise.kernels.cpu.winograd_vector import (
    input_transform,
    join_fours,
    output_transform,
    split_fours,
    weight_transform,
)

LANES = lane_count(4)  # float32 only: in float64 the transforms' error is no longer small beside the rounding
TILES = NV * LANES


@emitted
def apart(size):
    """The distance of 36 streams of `size` elements: a cache line more, or they would all compete for the same sets."""
    return size + LANES


@emitted
def find_tile_runs(first, used, rows, columns, runs):
    """Split tiles first .. first + used into runs within one row of tiles: (lane, count, image, tile row, tile
    column).
    """
    n = 0
    lane = 0
    while lane < used:
        tile = first + lane
        image = tile // (rows * columns)
        row = (tile - image * rows * columns) // columns
        column = tile - (image * rows + row) * columns
        count = min(columns - column, used - lane)
        runs[n, 0], runs[n, 1], runs[n, 2], runs[n, 3], runs[n, 4] = lane, count, image, row, column
        n += 1
        lane += count
    return n


@emitted
def _copy_row(x, source, low, high, row, target):
    """row[target + i] = x[source + i] for low <= i < high: whole vectors without a mask, and what is left with one."""
    i = low
    while i + LANES <= high:
        copy_lanes(1, 1, address(row, target + i), address(x, source + i), 0, LANES, 1)
        i += LANES
    if i < high:
        copy_lanes(1, 1, address(row, target + i), address(x, source + i), 0, high - i, 1)


@emitted
def _gather_tiles(x, channel, image_step, h, w, top, left, runs, n_runs, row, stage):
    """stage[(i * 6 + j) * TILES + lane] = pixel (i, j) of the 6x6 input of each tile, zero outside the image.

    A tile begins 4 pixels after its neighbour: a row of x, cut off at the image's edges, is the columns 0 to 3 of all
    tiles of a run in turn. Columns 4 and 5 are the next tile's 0 and 1, but for the last tile of a run.
    """
    zero = x.dtype.type(0)
    for i in range(6):
        for k in range(0, 4 * TILES + LANES, LANES):
            copy_lanes(1, 0, address(row, k), address(x, 0), 0, 0, 1)
        for r in range(n_runs):
            y = 4 * runs[r, 3] + i + top
            column = 4 * runs[r, 4] + left
            if 0 <= y < h:
                source = channel + runs[r, 2] * image_step + y * w + column
                _copy_row(x, source, max(0, -column), min(4 * runs[r, 1], w - column), row, 4 * runs[r, 0])
        for v in range(NV):
            target = i * 6 * TILES + v * LANES
            split_fours(4, address(stage, target), TILES, address(row, 4 * v * LANES))
            split_fours(2, address(stage, target + 4 * TILES), TILES, address(row, 4 * v * LANES + 4))
        for r in range(n_runs):
            y = 4 * runs[r, 3] + i + top
            last = runs[r, 0] + runs[r, 1] - 1
            column = 4 * (runs[r, 4] + runs[r, 1]) + left
            source = channel + runs[r, 2] * image_step + y * w + column
            for j in range(2):
                inside = 0 <= y < h and 0 <= column + j < w
                stage[(i * 6 + 4 + j) * TILES + last] = x[source + j] if inside else zero


@emitted
def _transform_input(x, first_channel, image_step, channels, h, w, top, left, runs, n_runs, row, stage, values):
    for c in range(channels):
        _gather_tiles(x, first_channel + c * h * w, image_step, h, w, top, left, runs, n_runs, row, stage)
        for v in range(NV):
            target = address(values, c * TILES + v * LANES)
            input_transform(target, apart(channels * TILES), address(stage, v * LANES), 6 * TILES, TILES)


@emitted
def _pack_taps(weight, start, row, outputs, depth, taps):
    """taps[k * LANES + o] = weight[start + o * row + k] for o < outputs <= LANES, k < depth; 0 for other o."""
    if outputs == LANES and depth >= LANES:
        places = progression(LANES, LANES)
        for k in range(0, depth, LANES):
            at = min(k, depth - LANES)  # the last square overlaps the one before
            source = address(weight, start + at)
            transpose_square_to(address(taps, at * LANES), address(places, 0), source, row)
        return
    for k in range(depth):
        clear_row(address(taps, k * LANES), LANES)
        for o in range(outputs):
            taps[k * LANES + o] = weight[start + o * row + k]


@emitted
def transform_weights(weight, start, outputs, row, channels, width, transformed, target):
    """U of up to LANES outputs, whose taps begin `row` apart: transformed[target + xi * apart(channels * width) + c *
    width + lane]."""
    taps = scratch(channels * 9 * LANES, weight)
    _pack_taps(weight, start, row, min(LANES, outputs), channels * 9, taps)
    for c in range(channels):
        where = address(transformed, target + c * width)
        weight_transform(where, apart(channels * width), address(taps, c * 9 * LANES), 3 * LANES, LANES)


@emitted
def _multiply(transformed, channels, first, some, values, products, step):
    """products[xi * step + o * TILES + tile] for outputs first + o, o < some; the last panel is computed whole."""
    for xi in range(36):
        for o in range(0, some, MR):
            group = (first + o) // LANES
            left = (36 * group + xi) * apart(channels * LANES) + (first + o - group * LANES)
            right = address(values, xi * apart(channels * TILES))
            where = address(products, xi * step + o * TILES)
            micro_kernel(MR, NV, address(transformed, left), LANES, right, TILES, channels, where, TILES, MR, TILES, 0)


@emitted
def _all_finite(rows):
    total = rows.dtype.type(0)
    for i in range(16 * TILES):
        total += rows[i] * rows.dtype.type(0)
    return total == 0


@emitted
def _define_tile(x, image, channels, h, w, top, left, weight, start, row, column, rows, lane):
    """The 4x4 sums of one tile by the definition."""
    for i in range(4):
        for j in range(4):
            total = x.dtype.type(0)
            for c in range(channels):
                for r in range(3):
                    y = 4 * row + i + r + top
                    for s in range(3):
                        z = 4 * column + j + s + left
                        if 0 <= y < h and 0 <= z < w:
                            total += x[image + (c * h + y) * w + z] * weight[start + c * 9 + r * 3 + s]
            rows[i * 4 * TILES + 4 * lane + j] = total


@emitted
def _repair(x, image_step, first_channel, channels, h, w, top, left, weight, start, runs, n_runs, rows):
    """Compute again every tile that holds a NaN or an Inf: it may have come from a neighbour within the tile."""
    zero = rows.dtype.type(0)
    for r in range(n_runs):
        for t in range(runs[r, 1]):
            lane = runs[r, 0] + t
            total = zero
            for i in range(4):
                for j in range(4):
                    total += rows[i * 4 * TILES + 4 * lane + j] * zero
            if total != 0:
                image = first_channel + runs[r, 2] * image_step
                _define_tile(x, image, channels, h, w, top, left, weight, start, runs[r, 3], runs[r, 4] + t, rows, lane)


@emitted
def _add_rows(rows, extra, output, image_step, oh, ow, runs, n_runs):
    """rows += extra, which is laid out as y; see `_write_rows`."""
    zero = rows.dtype.type(0)
    for r in range(n_runs):
        for i in range(min(4, oh - 4 * runs[r, 3])):
            source = output + runs[r, 2] * image_step + (4 * runs[r, 3] + i) * ow + 4 * runs[r, 4]
            count = min(4 * runs[r, 1], ow - 4 * runs[r, 4])
            row = address(rows, i * 4 * TILES + 4 * runs[r, 0])
            finish_row(1, row, row, count, zero, 0, address(extra, source), 1)


@emitted
def _write_rows(rows, y, output, image_step, oh, ow, runs, n_runs):
    for r in range(n_runs):
        for i in range(min(4, oh - 4 * runs[r, 3])):
            target = output + runs[r, 2] * image_step + (4 * runs[r, 3] + i) * ow + 4 * runs[r, 4]
            count = min(4 * runs[r, 1], ow - 4 * runs[r, 4])
            source = i * 4 * TILES + 4 * runs[r, 0]
            _copy_row(rows, source, 0, count, y, target)


@emitted
def output_block(channels):
    """Outputs multiplied at a time: enough to use V, which grows with the channels, several times from the cache; their
    products are block * 36 * TILES * 4 bytes, 110 KB for 16."""
    return 16 if channels <= 64 else (32 if channels <= 128 else 64)


@emitted
def _tile_block(
    x, first_channel, x_step, channels, h, w, top, left, weight, start, transformed, outputs, first, used,
    tile_rows, tile_columns, y, first_output, y_step, oh, ow, bias, bias_start, extra, activation,
):  # fmt: skip
    runs = integer_table(TILES, 5)
    n_runs = find_tile_runs(first, used, tile_rows, tile_columns, runs)
    row = scratch(4 * TILES + LANES, x)
    stage = scratch(36 * TILES, x)
    values = scratch(36 * apart(channels * TILES), x)
    _transform_input(x, first_channel, x_step, channels, h, w, top, left, runs, n_runs, row, stage, values)
    block = output_block(channels)
    step = apart((block + MR) * TILES)
    products = scratch(36 * step, x)
    tile = scratch(16 * TILES, x)
    rows = scratch(16 * TILES, x)
    for o0 in range(0, outputs, block):
        some = min(block, outputs - o0)
        _multiply(transformed, channels, o0, some, values, products, step)
        for o in range(some):
            for v in range(NV):
                source = address(products, o * TILES + v * LANES)
                output_transform(address(tile, v * LANES), TILES, source, 6 * step, step)
            for i in range(4):
                for v in range(NV):
                    where = address(tile, 4 * i * TILES + v * LANES)
                    join_fours(address(rows, i * 4 * TILES + 4 * v * LANES), where, TILES)
            if not _all_finite(rows):
                _repair(
                    x, x_step, first_channel, channels, h, w, top, left, weight, start + (o0 + o) * channels * 9, runs,
                    n_runs, rows,
                )  # fmt: skip
            if bias.size > 0:
                shift = bias[bias_start + o0 + o]
                for k in range(16 * TILES):
                    rows[k] += shift
            target = first_output + (o0 + o) * oh * ow
            if extra.size > 0:
                _add_rows(rows, extra, target, y_step, oh, ow, runs, n_runs)
            activate_row(rows, 0, 16 * TILES, activation)
            _write_rows(rows, y, target, y_step, oh, ow, runs, n_runs)


def packed_size(groups, outputs, channels):
    """Elements of the packed weights."""
    return groups * -(-outputs // LANES) * 36 * (channels * LANES + LANES)


@emitted
def _pack_block(weight, i, outputs, channels, transformed):
    """Block i of the packed weights: U of up to LANES outputs of one group."""
    blocks = (outputs + LANES - 1) // LANES
    g = i // blocks
    block = (i - g * blocks) * LANES
    start = (g * outputs + block) * channels * 9
    target = i * 36 * apart(channels * LANES)
    transform_weights(weight, start, outputs - block, channels * 9, channels, LANES, transformed, target)


@kernel(parallel=False)
def pack(weight, groups, outputs, channels, transformed):
    """U of all weights, as `convolve` wants it."""
    for i in range(groups * ((outputs + LANES - 1) // LANES)):
        _pack_block(weight, i, outputs, channels, transformed)


@kernel(one_by_one=True)
def convolve(
    x, n, groups, channels, h, w, weight, packed, outputs, top, left, oh, ow, y, bias, extra, activation
):  # fmt: skip
    """y = activation(convolution(x, weight) + bias + extra), all arrays flat, stride and dilation 1.

    weight: (groups * outputs, channels, 3, 3). packed: what `pack` made of it, or empty to do it here. top, left: where
    the first tap of pixel (0, 0) lies. extra: empty, or laid out as y; it may be y itself.
    """
    blocks = (outputs + LANES - 1) // LANES
    block_size = 36 * apart(channels * LANES)
    here = 1 if packed.size == 0 else 0
    own = scratch(here * groups * blocks * block_size, weight)
    for i in prange(here * groups * blocks):
        _pack_block(weight, np.int64(i), outputs, channels, own)
    transformed = own if here else packed
    tile_rows, tile_columns = (oh + 3) // 4, (ow + 3) // 4
    total = n * tile_rows * tile_columns
    tile_blocks = (total + TILES - 1) // TILES
    for chunk in prange(tile_blocks * groups):
        g = chunk % groups
        first = chunk // groups * TILES
        _tile_block(
            x, g * channels * h * w, groups * channels * h * w, channels, h, w, top, left, weight,
            g * outputs * channels * 9, transformed[g * blocks * block_size :], outputs,
            first, min(TILES, total - first), tile_rows, tile_columns,
            y, g * outputs * oh * ow, groups * outputs * oh * ow, oh, ow, bias, g * outputs, extra,
            activation,
        )  # fmt: skip
