"""3x3 convolution of stride 1 in NHWC by Winograd's F(4x4, 3x3); the formulas and the error as in conv_winograd.py.

Here the vectors run along channels, so that nothing is gathered: a pixel's channels are neighbours in x, V, M and y.

    V[xi, tile, c] = transformed input      U[xi, c, o] = transformed weights      M[xi, tile, o] = sum over c of V U

With many tiles a chunk owns a block of TILES of them, numbered through the batch: it transforms its input once, then
goes through the outputs in panels of NR: multiply, transform back, write. With few tiles (small images, small
batches), U, four times as large as the weights, would cost more than the products: then all of V is made first, and a
chunk owns a panel of outputs, whose U it makes in pieces that never leave L2, or finds packed. Tiles at the image's
edge are staged with zeros around.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.conv_winograd import apart, transform_weights
from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.epilogue import BOUNDED, activate_row, bounds_of
from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.row_kernel import row_product
from tilewise.kernels.cpu.row_moves import clear_row
from tilewise.kernels.cpu.scratch import integer_table, integers, progression, scratch
from tilewise.kernels.cpu.simd import MR, NV, address, lane_count
from tilewise.kernels.cpu.winograd_vector import input_transform, output_transform_to

LANES = lane_count(4)  # float32 only, as in conv_winograd.py
NR = NV * LANES
# Tiles a block: each weight, 36 numbers of U, is read once for so many tiles.
TILES = 4 * MR
# Up to so many tiles, chunks own outputs instead of tiles; the sums of a panel are then 64 * 36 * 32 * 4 = 295 KB.
FEW_TILES = 64
# Beyond them, up to MORE_TILES, where U has so many numbers (20 MB) that it would be written to memory and read again.
LARGE_U, MORE_TILES = 5 << 20, 256
# Channels whose U for one panel is made at a time: 36 * 128 * 32 * 4 = 590 KB.
CHANNELS = 128


@emitted
def _stage_tile(x, image, row, column, h, w, all_channels, first_channel, channels, c, stage):
    """stage[(i * 6 + j) * LANES + lane]: one vector of channels of a tile's 6x6 pixels, zero outside the image."""
    clear_row(address(stage, 0), 36 * LANES)
    some = min(LANES, channels - c)
    for i in range(max(0, -row), min(6, h - row)):
        for j in range(max(0, -column), min(6, w - column)):
            source = ((image * h + row + i) * w + column + j) * all_channels + first_channel + c
            for lane in range(some):
                stage[(i * 6 + j) * LANES + lane] = x[source + lane]


@emitted
def _transform_input(
    x, h, w, all_channels, first_channel, channels, top, left, where, first, last, stage, values, step, padded
):  # fmt: skip
    """values[xi * step + tile * padded + c]."""
    for tile in range(first, last):
        image, row, column = where[tile, 0], 4 * where[tile, 1] + top, 4 * where[tile, 2] + left
        inside = row >= 0 and column >= 0 and row + 6 <= h and column + 6 <= w
        source = ((image * h + row) * w + column) * all_channels + first_channel
        for c in range(0, channels, LANES):
            target = address(values, tile * padded + c)
            if inside and c + LANES <= channels:
                input_transform(target, step, address(x, source + c), w * all_channels, all_channels)
            else:
                _stage_tile(x, image, row, column, h, w, all_channels, first_channel, channels, c, stage)
                input_transform(target, step, address(stage, 0), 6 * LANES, LANES)


@emitted
def _multiply(values, first, step, used, panels, panel, channels, products, product_step, bases, zero, more):
    """products[xi * product_step + tile * NR + o] (+)= V U for one panel of outputs; whole register tiles."""
    for xi in range(36):
        left, right = address(values, first + xi * step), address(panels, panel + xi * apart(channels * NR))
        c, tiles = address(products, xi * product_step), address(bases, 0)
        row_product(MR, NV, left, tiles, 1, address(zero, 0), 1, channels, right, NR, c, NR, more, used)


@emitted
def _define_tile(
    x, image, row, column, h, w, all_channels, first_channel, channels, weight, start, y, target, row_step,
    column_step, rows, columns, bias, extra, code,
):  # fmt: skip
    """The outputs of one tile for one filter by the definition."""
    for i in range(rows):
        for j in range(columns):
            total = bias
            for c in range(channels):
                for r in range(3):
                    for s in range(3):
                        v, u = row + i + r, column + j + s
                        if 0 <= v < h and 0 <= u < w:
                            pixel = x[((image * h + v) * w + u) * all_channels + first_channel + c]
                            total += pixel * weight[start + c * 9 + r * 3 + s]
            place = target + i * row_step + j * column_step
            if extra.size > 0:
                total += extra[place]
            y[place] = total
            activate_row(y, place, 1, code)


@emitted
def _write_tiles(
    x, h, w, all_channels, first_channel, channels, top, left, weight, start, where, used, products, step, outputs, o0,
    y, first_output, oh, ow, all_outputs, bias, bias_start, extra, code,
):  # fmt: skip
    has_bias, has_extra = 1 if bias.size > 0 else 0, 1 if extra.size > 0 else 0
    for tile in range(used):
        image, row, column = where[tile, 0], 4 * where[tile, 1], 4 * where[tile, 2]
        rows, columns = min(4, oh - row), min(4, ow - column)
        target = ((image * oh + row) * ow + column) * all_outputs + first_output
        for o in range(o0, min(outputs, o0 + NR), LANES):
            some = min(LANES, outputs - o)
            source = address(products, tile * NR + o - o0)
            shift = address(bias, bias_start + o if has_bias else 0)
            finite = output_transform_to(
                address(y, target + o), ow * all_outputs, all_outputs, rows, columns, some, source, 6 * step, step,
                shift, has_bias, address(extra, (target + o) * has_extra), has_extra, bounds_of(code),
            )  # fmt: skip
            if finite and code > BOUNDED:
                for i in range(rows):
                    for j in range(columns):
                        activate_row(y, target + o + (i * ow + j) * all_outputs, some, code)
            if finite == 0:
                for lane in range(some):
                    value = bias[bias_start + o + lane] if has_bias else x.dtype.type(0)
                    _define_tile(
                        x, image, row + top, column + left, h, w, all_channels, first_channel, channels, weight,
                        start + (o + lane) * channels * 9, y, target + o + lane, ow * all_outputs, all_outputs,
                        rows, columns, value, extra, code,
                    )  # fmt: skip


@emitted
def _locate_tiles(first, used, tile_rows, tile_columns, padded, where, bases):
    """where[i] = (image, tile row, tile column); bases[i]: the tile's place in V, or any to fill a register tile."""
    for i in range(used):
        tile = first + i
        where[i, 0] = tile // (tile_rows * tile_columns)
        rest = tile - where[i, 0] * tile_rows * tile_columns
        where[i, 1] = rest // tile_columns
        where[i, 2] = rest - where[i, 1] * tile_columns
    for i in range(bases.size):
        bases[i] = min(i, used - 1) * padded


@emitted
def _transform_panel(weight, start, outputs, row, channels, transformed, target):
    """U of one panel of outputs, NR of them or fewer."""
    for half in range(NV):
        block = half * LANES
        if block < outputs:
            transform_weights(
                weight, start + block * row, outputs - block, row, channels, NR, transformed, target + block
            )
        else:
            for xi in range(36):
                for c in range(channels):
                    clear_row(address(transformed, target + block + xi * apart(channels * NR) + c * NR), LANES)


@emitted
def _tile_block(
    x, h, w, groups, g, channels, top, left, weight, transformed, outputs, first, used, tile_rows, tile_columns,
    y, oh, ow, bias, extra, code,
):  # fmt: skip
    padded = ((channels + LANES - 1) // LANES) * LANES
    where, bases, zero = integer_table(TILES, 3), integers(TILES), progression(0, 1)
    _locate_tiles(first, used, tile_rows, tile_columns, padded, where, bases)
    stage = scratch(36 * LANES, x)
    step, product_step = apart(TILES * padded), apart(TILES * NR)
    values, products = scratch(36 * step, x), scratch(36 * product_step, x)
    all_channels, first_channel = groups * channels, g * channels
    _transform_input(
        x, h, w, all_channels, first_channel, channels, top, left, where, 0, used, stage, values, step, padded
    )  # fmt: skip
    start = g * outputs * channels * 9
    for o in range(0, outputs, NR):
        panel = (g * ((outputs + NR - 1) // NR) + o // NR) * 36 * apart(channels * NR)
        _multiply(values, 0, step, used, transformed, panel, channels, products, product_step, bases, zero, 0)
        _write_tiles(
            x, h, w, all_channels, first_channel, channels, top, left, weight, start, where, used, products,
            product_step, outputs, o, y, g * outputs, oh, ow, groups * outputs, bias, g * outputs, extra, code,
        )  # fmt: skip


@emitted
def _output_panel(
    x, h, w, groups, g, channels, top, left, weight, packed, values, step, outputs, o, where, bases, y, oh, ow, bias,
    extra, code,
):  # fmt: skip
    used = where.shape[0]
    zero = progression(0, 1)
    product_step = apart(bases.size * NR)
    products = scratch(36 * product_step, x)
    here = 1 if packed.size == 0 else 0
    piece = scratch(here * 36 * apart(min(channels, CHANNELS) * NR), x)
    start = g * outputs * channels * 9
    for c in range(0, here * channels, CHANNELS):
        some = min(channels - c, CHANNELS)
        _transform_panel(weight, start + (o * channels + c) * 9, outputs - o, channels * 9, some, piece, 0)
        _multiply(values, c, step, used, piece, 0, some, products, product_step, bases, zero, 1 if c > 0 else 0)
    if not here:
        panel = (g * ((outputs + NR - 1) // NR) + o // NR) * 36 * apart(channels * NR)
        _multiply(values, 0, step, used, packed, panel, channels, products, product_step, bases, zero, 0)
    _write_tiles(
        x, h, w, groups * channels, g * channels, channels, top, left, weight, start, where, used, products,
        product_step, outputs, o, y, g * outputs, oh, ow, groups * outputs, bias, g * outputs, extra, code,
    )  # fmt: skip


def _convolve_few(
    x, groups, channels, h, w, weight, packed, outputs, top, left, oh, ow, total, tile_rows, tile_columns, y, bias,
    extra, activation,
):  # fmt: skip
    padded = ((channels + LANES - 1) // LANES) * LANES
    where, bases = integer_table(total, 3), integers(((total + MR - 1) // MR) * MR)
    _locate_tiles(0, total, tile_rows, tile_columns, padded, where, bases)
    step = apart(total * padded)
    values = scratch(groups * 36 * step, x)
    for chunk in prange(groups * total):
        g, tile = chunk // total, chunk % total
        stage = scratch(36 * LANES, x)
        _transform_input(
            x, h, w, groups * channels, g * channels, channels, top, left, where, tile, tile + 1, stage,
            values[g * 36 * step :], step, padded,
        )  # fmt: skip
    panels = (outputs + NR - 1) // NR
    for chunk in prange(groups * panels):
        g = chunk // panels
        _output_panel(
            x, h, w, groups, g, channels, top, left, weight, packed, values[g * 36 * step :], step, outputs,
            (chunk - g * panels) * NR, where, bases, y, oh, ow, bias, extra, activation,
        )  # fmt: skip


def packed_size(groups, outputs, channels):
    """Elements of the packed weights."""
    return groups * -(-outputs // NR) * 36 * (channels * NR + LANES)


@emitted
def _pack_panel(weight, i, outputs, channels, transformed):
    """Panel i of the packed weights: U of up to NR outputs of one group."""
    panels = (outputs + NR - 1) // NR
    g = i // panels
    o = (i - g * panels) * NR
    target = i * 36 * apart(channels * NR)
    start = (g * outputs + o) * channels * 9
    _transform_panel(weight, start, outputs - o, channels * 9, channels, transformed, target)


@kernel(parallel=False)
def pack(weight, groups, outputs, channels, transformed):
    """U of all weights, as both kernels want it."""
    for i in range(groups * ((outputs + NR - 1) // NR)):
        _pack_panel(weight, i, outputs, channels, transformed)


def _convolve_many(
    x, groups, channels, h, w, weight, packed, outputs, top, left, oh, ow, total, tile_rows, tile_columns, y, bias,
    extra, activation,
):  # fmt: skip
    panels = (outputs + NR - 1) // NR
    here = 1 if packed.size == 0 else 0
    own = scratch(here * groups * panels * 36 * apart(channels * NR), weight)
    for i in prange(here * groups * panels):
        _pack_panel(weight, np.int64(i), outputs, channels, own)
    transformed = own if here else packed
    blocks = (total + TILES - 1) // TILES
    for chunk in prange(blocks * groups):
        g = chunk % groups
        first = chunk // groups * TILES
        _tile_block(
            x, h, w, groups, g, channels, top, left, weight, transformed, outputs, first, min(TILES, total - first),
            tile_rows, tile_columns, y, oh, ow, bias, extra, activation,
        )  # fmt: skip


# Arguments: as `conv_winograd.convolve`'s where they have its names; total: the tiles of all images.
convolve_few = kernel()(_convolve_few)
convolve_many = kernel()(_convolve_many)


def convolve(n, channels, outputs, oh, ow):
    """The kernel for n images of oh x ow, so many channels and outputs a group."""
    return convolve_few if shares_outputs(n, channels, outputs, oh, ow) else convolve_many


def shares_outputs(n, channels, outputs, oh, ow):
    """Whether chunks own outputs instead of tiles."""
    tiles = n * count_tiles(oh, ow)
    return tiles <= FEW_TILES or (36 * channels * outputs >= LARGE_U and tiles <= MORE_TILES)


def count_tiles(oh, ow):
    return -(-oh // 4) * -(-ow // 4)
