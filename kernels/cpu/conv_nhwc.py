"""Convolution in NHWC as an implicit matrix product: pixels are the rows, output channels the vectors.

For one group, with k running over (tap row, tap column, channel):

    y[pixel, o] = sum over k of x[pixel's row and column shifted by the tap, channel] * weight[k, o]

A pixel's channels are neighbours in x, and where no groups come between, so are the channels of a tap row: a piece. The
product reads x where it lies: row i of a register tile starts at its pixel, and the pieces at fixed distances from
there (`row_product`), so neither columns nor panels of x are ever packed. Only where there is padding, a block of rows
is copied first, with the padding as zeros. The weights are packed once a call, (k, o) in panels of NR outputs.

Each chunk owns a block of rows of one image (or a few small images) with all outputs of one group; a panel of
weights, cut into steps of about DEPTH, stays in L2 while all its pixels pass by.
"""

from math import ceil

import numpy as np
from numba import prange

from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.epilogue import BOUNDED, activate_row, bounds_of
from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.row_kernel import row_product, row_product_to
from tilewise.kernels.cpu.row_moves import clear_row, copy_row, gather_row
from tilewise.kernels.cpu.scratch import ALIGNMENT, integers, scratch
from tilewise.kernels.cpu.simd import MR, NV, address, lane_count, lanes, settle_stores
from tilewise.kernels.cpu.vector_move import transpose_square_to

# Steps k of a visit, whose weights for NR outputs stay in L2: 1152 * 32 * 4 = 147 KB. That is all steps of most layers,
# so that their sums stay in registers; every visit after the first reads all sums of the block again.
DEPTH = 1152
# The same for 1x1 kernels, whose x is read but once: all steps up to ONE_VISIT, else fewer.
POINTWISE_DEPTH, ONE_VISIT = 384, 512
# Pixels a block: their sums for one panel of outputs are 224 * 32 * 4 = 29 KB; with AVX2 240 * 16 * 4 = 15 KB.
BLOCK_PIXELS = 224 if MR == 14 else 240
# Numbers of x for which a 1x1 convolution has several times as many pixels in a block: a visit's fixed costs, a few
# hundred nanoseconds, are a tenth of what 32 channels and 64 outputs take otherwise.
BLOCK_INPUTS, MOST_BLOCKS = 1 << 16, 4
CHUNKS = 8


def plan(x, outputs, taps, stride, grid, y_steps, groups, activation):
    """(geometry, starts, parts, order) for `convolve`. Python for Numba, too (njit/conv.py).

    x: (n, h, w, channels a group). outputs: a group. taps: the taps' offsets in x, rows and columns. grid: rows and
    columns of output pixels. y_steps: (start, image step, row step, column step) of y.
    starts: where the pieces begin, seen from the pixel's first tap. parts: (first piece, pieces, length, first step)
    for each visit of the product. order[c * taps + t] = the step k of that weight.
    """
    n, h, w, channels = x
    oh, ow = grid
    low_row, low_column = int(taps[0].min()), int(taps[1].min())
    high_row, high_column = int(taps[0].max()), int(taps[1].max())
    span_rows, span_columns = high_row - low_row, high_column - low_column
    block = BLOCK_PIXELS
    if taps[0].size * taps[1].size == 1 and channels <= ONE_VISIT:
        block *= max(1, min(MOST_BLOCKS, BLOCK_INPUTS // (BLOCK_PIXELS * channels)))
    rows, images, splits = _blocks(n, groups, oh, ow, outputs, block)
    in_place = low_row >= 0 and (oh - 1) * stride[0] + high_row < h
    in_place = in_place and low_column >= 0 and (ow - 1) * stride[1] + high_column < w
    pixel = groups * channels if in_place else channels
    pitch = (w if in_place else (ow - 1) * stride[1] + span_columns + 1) * pixel
    joined = taps[1].size > 1 and span_columns == taps[1].size - 1 and pixel == channels
    starts, parts = _parts((taps[0] - low_row) * pitch, (taps[1] - low_column) * pixel, channels, joined)
    if in_place:  # the first tap may lie inside the image
        starts = starts + low_row * pitch + low_column * pixel
    n_taps = taps[0].size * taps[1].size
    order = np.empty((channels, n_taps), np.int64)
    for c in range(channels):
        order[c] = np.arange(n_taps) * channels + c
    geometry = np.array(
        [n, groups, channels, h, w, outputs, oh, ow, stride[0], stride[1], n_taps, low_row, low_column, span_rows,
         rows, images, pixel, pitch, int(in_place), y_steps[0], y_steps[1], y_steps[2], y_steps[3], activation, splits,
         0],
        np.int64,
    )  # fmt: skip
    return geometry, starts, parts, order.reshape(order.size)


def _blocks(n, groups, oh, ow, outputs, pixels):
    """(output rows a block, images a block, parts of the outputs) for about so many pixels; fixed by the problem."""
    images = max(1, min(n, pixels // (oh * ow)))
    while images > 2 and groups * ceil(n / images) < CHUNKS // 2:
        images = ceil(images / 2)
    rows = min(oh, max(1, pixels // ow)) if images == 1 else oh
    while rows > 1 and groups * ceil(n / images) * ceil(oh / rows) < CHUNKS // 2 and rows * ow > 4 * MR:
        rows = ceil(rows / 2)
    rows = ceil(oh / ceil(oh / rows))
    chunks, splits = groups * ceil(n / images) * ceil(oh / rows), 1
    while chunks * splits < CHUNKS and outputs // 32 >= 4 * splits:
        splits *= 2
    return rows, images, splits


def efficiency(n, oh, ow, outputs, lane, groups=1):
    """The share of the register tiles' work that is not for pixels or outputs beyond the last."""
    rows, images, _ = _blocks(n, groups, oh, ow, outputs, BLOCK_PIXELS)
    used = sum(ceil(images * min(rows, oh - first) * ow / MR) * MR for first in range(0, oh, rows))
    width = NV * lane
    rest = outputs % width  # a tile of one vector is enough for a few
    padded = outputs - rest + (0 if rest == 0 else lane if rest <= lane else width)
    return oh * ow * images / used * outputs / padded


def _parts(rows, columns, channels, joined):
    """The pieces of a pixel's window, grouped into visits of equal pieces with at most about DEPTH steps."""
    pointwise, length = rows.size * columns.size == 1, channels
    if joined:
        columns, length = columns[:1], channels * columns.size
    steps = POINTWISE_DEPTH if pointwise and channels > ONE_VISIT else DEPTH
    cuts = ceil(length / steps)
    size = ceil(length / cuts)
    most = rows.size * columns.size * cuts
    starts, parts = np.empty(most, np.int64), np.empty((most, 4), np.int64)
    pieces = visits = step = 0
    for row in rows:
        for column in columns:
            for first in range(0, length, size):
                count = min(size, length - first)
                last = visits - 1
                if visits > 0 and parts[last, 2] == count and (parts[last, 1] + 1) * count <= steps:
                    parts[last, 1] += 1
                else:
                    parts[visits, 0], parts[visits, 1], parts[visits, 2], parts[visits, 3] = pieces, 1, count, step
                    visits += 1
                starts[pieces] = row + column + first
                pieces += 1
                step += count
    return starts[:pieces], parts[:visits].copy()


@emitted
def pack_weight(weight, start, outputs, depth, order, panels, target):
    """panels[target + o // NR * NR * depth + order[k] * NR + o % NR] = weight[start + o * depth + k]; 0 beyond."""
    width = lanes(weight)
    places = integers(depth)
    for k in range(depth):
        places[k] = order[k] * NV * width
    for first in range(0, outputs, width):
        panel = target + first // (NV * width) * NV * width * depth + first % (NV * width)
        source = start + first * depth
        if first + width <= outputs and depth >= width:
            for k in range(0, depth, width):
                at = min(k, depth - width)  # the last square overlaps the one before
                transpose_square_to(address(panels, panel), address(places, at), address(weight, source + at), depth)
            continue
        for k in range(depth):
            clear_row(address(panels, panel + places[k]), width)
            for r in range(min(width, outputs - first)):
                panels[panel + places[k] + r] = weight[source + r * depth + k]
    last = ((outputs + width - 1) // width) * width
    if last % (NV * width):  # the rest of the last panel
        panel = target + last // (NV * width) * NV * width * depth
        for k in range(depth):
            clear_row(address(panels, panel + k * NV * width + last % (NV * width)), NV * width - last % (NV * width))


@emitted
def copy_padded(x, image, g, images, row0, rows, geometry, padded):
    """padded[(b * rows + i) * pitch + j * channels + c]: the rows that a block needs, the padding as zeros."""
    groups, channels, h, w = geometry[1], geometry[2], geometry[3], geometry[4]
    first_row, first_column = row0 * geometry[8] + geometry[11], geometry[12]
    pitch = geometry[17]
    count = pitch // channels
    left = min(count, max(0, -first_column))
    some = max(0, min(count, w - first_column) - left)
    for line in range(images * rows):
        b = line // rows
        row = first_row + line - b * rows
        target = line * pitch
        if row < 0 or row >= h or some == 0:
            clear_row(address(padded, target), pitch)
            continue
        source = (((image + b) * h + row) * w + first_column + left) * groups * channels + g * channels
        if left > 0:
            clear_row(address(padded, target), left * channels)
        target += left * channels
        if groups == 1:
            if source + some * channels + lanes(x) > x.size:
                gather_row(address(padded, target), address(x, source), some * channels, 1)
            else:
                copy_row(1, address(padded, target), address(x, source), some * channels)
        else:
            for j in range(some):
                for c in range(channels):
                    padded[target + j * channels + c] = x[source + j * groups * channels + c]
        if left + some < count:
            clear_row(address(padded, target + some * channels), (count - left - some) * channels)


@emitted
def _locate_pixels(image, images, row0, rows, rows_in, geometry, bases, places):
    """Where each pixel's first tap lies in the padded rows (or in x), and its outputs in y; returns how many."""
    h, ow, stride_h, stride_w = geometry[3], geometry[7], geometry[8], geometry[9]
    pixel, pitch, in_place = geometry[16], geometry[17], geometry[18]
    n = 0
    for b in range(images):
        for i in range(rows):
            start = (b * rows_in + i * stride_h) * pitch
            if in_place:
                start = ((image + b) * h + (row0 + i) * stride_h) * pitch
            where = geometry[19] + (image + b) * geometry[20] + (row0 + i) * geometry[21]
            for j in range(ow):
                bases[n] = start + j * stride_w * pixel
                places[n] = where + j * geometry[22]
                n += 1
    # the last tile computes on; any pixel will do
    for i in range(n, ((n + MR - 1) // MR) * MR):
        bases[i] = bases[0]
    return n


@emitted
def _multiply(
    a, bases, pixels, starts, parts, part, panels, panel, sums, last, y, places, columns, bias, o, extra, bounds, past
):  # fmt: skip
    """All pixels of a block with one panel of outputs, one visit's steps."""
    width = NV * lanes(a)
    begin, pieces, length = parts[part, 0], parts[part, 1], parts[part, 2]
    left, rows, offsets = address(a, 0), address(bases, 0), address(starts, begin)
    right, c = address(panels, panel + parts[part, 3] * width), address(sums, 0)
    more = 1 if part > 0 else 0
    if not last:
        row_product(MR, NV, left, rows, 1, offsets, pieces, length, right, width, c, width, more, pixels)
        return
    has_bias = 1 if bias.size > 0 else 0
    shift = address(bias, o if has_bias else 0)
    has_extra = 1 if extra.size > 0 else 0
    to, where, more_to = address(y, o), address(places, 0), address(extra, o if has_extra else 0)
    if columns > lanes(a):
        row_product_to(
            MR, NV, left, rows, 1, offsets, pieces, length, right, width, c, width, more, pixels, to, where, columns,
            shift, has_bias, more_to, has_extra, bounds, past,
        )  # fmt: skip
    else:
        row_product_to(
            MR, 1, left, rows, 1, offsets, pieces, length, right, width, c, width, more, pixels, to, where, columns,
            shift, has_bias, more_to, has_extra, bounds, past,
        )  # fmt: skip


@emitted
def _block(
    x, image, images, g, row0, rows, first_output, last_output, panels, geometry, starts, parts, y, bias, extra
):  # fmt: skip
    outputs, stride_h, span, pitch = geometry[5], geometry[8], geometry[13], geometry[17]
    in_place, code = geometry[18], geometry[23]
    depth = geometry[2] * geometry[10]
    width = NV * lanes(x)
    rows_in = (rows - 1) * stride_h + span + 1
    padded = scratch(1 if in_place else images * rows_in * pitch, x)
    if in_place:
        a, base = x, g * geometry[2]
    else:
        copy_padded(x, image, g, images, row0, rows_in, geometry, padded)
        a, base = padded, 0
    most = images * rows * geometry[7] + MR
    bases, places = integers(most), integers(most)
    pixels = _locate_pixels(image, images, row0, rows, rows_in, geometry, bases, places)
    if base > 0:
        for i in range(most):
            bases[i] += base
    n_parts = parts.shape[0]
    sums = scratch(most * width if n_parts > 1 else 1, x)
    bounds, past = bounds_of(code), geometry[25]
    for o in range(first_output, last_output, width):
        for part in range(n_parts):
            _multiply(
                a, bases, pixels, starts, parts, part, panels, (g * ((outputs + width - 1) // width) * width + o)
                * depth, sums, part == n_parts - 1, y, places, outputs - o, bias, g * outputs + o, extra, bounds,
                past,
            )  # fmt: skip
    if past:
        settle_stores()
    if code > BOUNDED:
        for p in range(pixels):
            activate_row(y, places[p] + g * outputs + first_output, last_output - first_output, code)


def past_caches(geometry, itemsize):
    """The geometry for results that no cache holds until they are read, written past them: aligned memory that has
    been used before. None where that is not possible, or where a panel's row would end within a cache line: half a line
    costs more than it saves.

    Their memory need not be read before it is written; the first to read them finds none of it in a cache, though.
    """
    panel = NV * lane_count(itemsize)
    if geometry[5] * itemsize % ALIGNMENT or panel * itemsize % ALIGNMENT or geometry[23] > BOUNDED:
        return None
    past = geometry.copy()
    past[25] = 1
    return past


def packed_size(geometry, lane):
    """Elements of the packed weights."""
    groups, channels, outputs, n_taps = (int(geometry[i]) for i in (1, 2, 5, 10))
    return groups * ceil(outputs / (NV * lane)) * NV * lane * channels * n_taps


@emitted
def _pack_panel(weight, i, geometry, order, panels):
    """Panel i of the packed weights: those of up to NR outputs of one group."""
    outputs, depth, width = geometry[5], geometry[2] * geometry[10], NV * lanes(weight)
    count = (outputs + width - 1) // width
    g = i // count
    o = (i - g * count) * width
    pack_weight(weight, (g * outputs + o) * depth, min(width, outputs - o), depth, order, panels, i * width * depth)


@kernel(parallel=False)
def pack(weight, geometry, order, panels):
    """The weights as `convolve` wants them, the same for all plans of these weights."""
    width = NV * lanes(weight)
    for i in range(geometry[1] * ((geometry[5] + width - 1) // width)):
        _pack_panel(weight, i, geometry, order, panels)


@kernel(one_by_one=True)
def convolve(x, weight, packed, y, bias, extra, geometry, starts, parts, order):
    """y = activation(convolution(x, weight) + bias + extra), all arrays flat, for a `plan`.

    weight: (groups * outputs, channels, taps), as in NCHW. packed: what `pack` made of it, or empty to do it here.
    Output o of group g at pixel (i, j) of image b is y[start + b * image step + i * row step + j * column step + g *
    outputs + o]. extra: empty, or laid out as y; it may be y itself.
    """
    n, groups, outputs, oh = geometry[0], geometry[1], geometry[5], geometry[6]
    rows, images = geometry[14], geometry[15]
    depth = geometry[2] * geometry[10]
    width = NV * lanes(x)
    padded_outputs = ((outputs + width - 1) // width) * width
    here = 1 if packed.size == 0 else 0
    own = scratch(here * groups * padded_outputs * depth, x)
    for i in prange(here * groups * (padded_outputs // width)):
        _pack_panel(weight, np.int64(i), geometry, order, own)
    panels = own if here else packed
    row_blocks, image_blocks = (oh + rows - 1) // rows, (n + images - 1) // images
    splits = geometry[24]
    split_outputs = (padded_outputs // width + splits - 1) // splits * width
    for chunk in prange(image_blocks * row_blocks * groups * splits):
        first = chunk % splits * split_outputs
        g = chunk // splits % groups
        row0 = chunk // (splits * groups) % row_blocks * rows
        image = chunk // (splits * groups * row_blocks) * images
        last = min(outputs, first + split_outputs)
        if first < last:
            _block(
                x, image, min(images, n - image), g, row0, min(rows, oh - row0), first, last, panels, geometry, starts,
                parts, y, bias, extra,
            )  # fmt: skip
