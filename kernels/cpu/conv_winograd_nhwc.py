"""3x3 convolution of stride 1 in NHWC by Winograd's F(4x4, 3x3); the formulas and the error as in conv_winograd.py.

Here the vectors run along channels, so that nothing is gathered: a pixel's channels are neighbours in x, V, M and y.

    V[xi, tile, c] = transformed input      U[xi, c, o] = transformed weights      M[xi, tile, o] = sum over c of V U

A chunk owns a block of TILES tiles, numbered through the batch: it transforms its input once, then goes through the
outputs in panels of NR: multiply, transform back, write. Tiles at the image's edge are staged with zeros around.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.conv_winograd import apart, transform_weights
from tilewise.kernels.cpu.epilogue import activate_row, apply_activation
from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.micro_kernels import row_product
from tilewise.kernels.cpu.row_moves import clear_row
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import MR, NV, address, lane_count
from tilewise.kernels.cpu.winograd_vector import input_transform, output_transform_to

LANES = lane_count(4)  # float32 only, as in conv_winograd.py
NR = NV * LANES
# Tiles a block: each weight, 36 numbers of U, is read once for so many tiles.
TILES = 4 * MR


@device()
def _stage_tile(x, image, row, column, h, w, all_channels, first_channel, channels, c, stage):
    """stage[(i * 6 + j) * LANES + lane]: one vector of channels of a tile's 6x6 pixels, zero outside the image."""
    clear_row(address(stage, 0), 36 * LANES)
    some = min(LANES, channels - c)
    for i in range(max(0, -row), min(6, h - row)):
        for j in range(max(0, -column), min(6, w - column)):
            source = ((image * h + row + i) * w + column + j) * all_channels + first_channel + c
            for lane in range(some):
                stage[(i * 6 + j) * LANES + lane] = x[source + lane]


@device()
def _transform_input(x, h, w, all_channels, first_channel, channels, top, left, where, used, stage, values, padded):
    """values[xi * apart(TILES * padded) + tile * padded + c]."""
    step = apart(TILES * padded)
    for tile in range(used):
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


@device()
def _multiply(values, padded, used, panel, channels, products, bases, zero):
    """products[xi * apart(TILES * NR) + tile * NR + o] for one panel of outputs; whole register tiles."""
    for xi in range(36):
        left, right = address(values, xi * apart(TILES * padded)), address(panel, xi * apart(channels * NR))
        for tile in range(0, used, MR):
            c = address(products, xi * apart(TILES * NR) + tile * NR)
            row_product(
                MR, NV, left, address(bases, tile), 1, address(zero, 0), 1, channels, right, NR, c, NR, 0
            )  # fmt: skip


@device()
def _define_tile(
    x, image, row, column, h, w, all_channels, first_channel, channels, weight, start, y, target, row_step,
    column_step, rows, columns, bias, code,
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
            y[target + i * row_step + j * column_step] = apply_activation(total, code)


@device()
def _write_tiles(
    x, h, w, all_channels, first_channel, channels, top, left, weight, start, where, used, products, outputs, o0,
    y, first_output, oh, ow, all_outputs, bias, bias_start, code,
):  # fmt: skip
    has_bias = 1 if bias.size > 0 else 0
    step = apart(TILES * NR)
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
                shift, has_bias, 1 if code == 1 else 0,
            )  # fmt: skip
            if code > 1:
                for i in range(rows):
                    for j in range(columns):
                        activate_row(y, target + o + (i * ow + j) * all_outputs, some, code)
            if finite == 0:
                for lane in range(some):
                    value = bias[bias_start + o + lane] if has_bias else x.dtype.type(0)
                    _define_tile(
                        x, image, row + top, column + left, h, w, all_channels, first_channel, channels, weight,
                        start + (o + lane) * channels * 9, y, target + o + lane, ow * all_outputs, all_outputs,
                        rows, columns, value, code,
                    )  # fmt: skip


@device(allocates=True)
def _tile_block(
    x, h, w, groups, g, channels, top, left, weight, transformed, outputs, first, used, tile_rows, tile_columns,
    y, oh, ow, bias, code,
):  # fmt: skip
    where = np.empty((TILES, 3), np.int64)
    for i in range(used):
        tile = first + i
        where[i, 0] = tile // (tile_rows * tile_columns)
        rest = tile - where[i, 0] * tile_rows * tile_columns
        where[i, 1] = rest // tile_columns
        where[i, 2] = rest - where[i, 1] * tile_columns
    padded = ((channels + LANES - 1) // LANES) * LANES
    bases, zero = np.empty(TILES, np.int64), np.zeros(1, np.int64)
    for i in range(TILES):
        bases[i] = min(i, used - 1) * padded
    stage = scratch(36 * LANES, x)
    values = scratch(36 * apart(TILES * padded), x)
    products = scratch(36 * apart(TILES * NR), x)
    all_channels, first_channel = groups * channels, g * channels
    _transform_input(
        x, h, w, all_channels, first_channel, channels, top, left, where, used, stage, values, padded
    )  # fmt: skip
    start = g * outputs * channels * 9
    panel_size = 36 * apart(channels * NR)
    for o in range(0, outputs, NR):
        panel = transformed[(g * ((outputs + NR - 1) // NR) + o // NR) * panel_size :]
        _multiply(values, padded, used, panel, channels, products, bases, zero)
        _write_tiles(
            x, h, w, all_channels, first_channel, channels, top, left, weight, start, where, used, products, outputs,
            o, y, g * outputs, oh, ow, groups * outputs, bias, g * outputs, code,
        )  # fmt: skip


@kernel()
def convolve(
    x, n, groups, channels, h, w, weight, outputs, tap_rows, tap_columns, stride_h, stride_w, oh, ow,
    y, y_start, image_step, row_step, column_step, bias, activation,
):  # fmt: skip
    """Arguments as `conv_winograd.convolve`, for x and y in NHWC."""
    panels = (outputs + NR - 1) // NR
    panel_size = 36 * apart(channels * NR)
    transformed = scratch(groups * panels * panel_size, weight)
    for i in prange(groups * panels * NV):
        panel = i // NV
        half = i - panel * NV
        g = panel // panels
        block = (panel - g * panels) * NR + half * LANES
        target = panel * panel_size + half * LANES
        if block < outputs:
            start = g * outputs * channels * 9
            transform_weights(weight, start, outputs, channels, block, NR, transformed, target)
        else:
            for xi in range(36):
                for c in range(channels):
                    clear_row(address(transformed, target + xi * apart(channels * NR) + c * NR), LANES)
    tile_rows, tile_columns = (oh + 3) // 4, (ow + 3) // 4
    total = n * tile_rows * tile_columns
    blocks = (total + TILES - 1) // TILES
    for chunk in prange(blocks * groups):
        g = chunk % groups
        first = chunk // groups * TILES
        _tile_block(
            x, h, w, groups, g, channels, tap_rows[0], tap_columns[0], weight, transformed, outputs, first,
            min(TILES, total - first), tile_rows, tile_columns, y, oh, ow, bias, activation,
        )  # fmt: skip
