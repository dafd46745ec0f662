"""The gradient of a convolution with respect to its weights: a matrix product that sums over pixels.

    grad_weight[o, k] = sum over images and pixels of grad[o, pixel] * x[channel, the pixel shifted by the tap],
    k = (channel, tap) in NCHW, (tap, channel) in NHWC

As in the forward pass, x is read where it lies, from phase planes (conv_nchw.py) or padded rows (conv_nhwc.py): the
rows of a register tile are MR of the k, each with its own start, and the sum runs along rows of pixels. The vectors are
outputs; grad is packed into panels of NR outputs, pixel by pixel (NCHW: transposed in registers).

A chunk owns a block of k for all outputs of a group and adds up in scratch until its last pixel, so no two chunks add
to the same weight; where that gives too few chunks for several threads, the blocks of pixels are split as well, each
part adds up on its own, and the parts are added in order. The split follows from the problem's shape, so the bits do
not depend on the number of threads.
"""

from math import ceil

import numpy as np
from numba import prange

from tilewise.kernels.cpu import conv_nchw_plan, conv_nhwc
from tilewise.kernels.cpu.conv_nhwc import copy_padded
from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.jit import EXACT_ORDER, kernel
from tilewise.kernels.cpu.phase_planes import copy_planes
from tilewise.kernels.cpu.row_kernel import row_product
from tilewise.kernels.cpu.row_moves import clear_row, copy_row
from tilewise.kernels.cpu.scratch import integers, progression, scratch, zeros
from tilewise.kernels.cpu.simd import MR, NV, address, lanes
from tilewise.kernels.cpu.vector_move import add_rows, add_scaled, transpose_square_to

# Pixels a block: a panel of grad is 224 * 32 * 4 = 29 KB, in L1 while all k pass by.
PIXELS = 16 * MR
# The sums of a chunk, 512 KB in L2: k for all outputs of a group. Every chunk packs grad again.
SUMS = 1 << 17
# Parts of the pixels that add up on their own: at most this many copies of the weights.
MAX_PARTS = 8
CHUNKS = 8


def plan_nchw(x, outputs, taps, stride, grid, groups, itemsize):
    """(geometry, bases, phases, sizes) for `weight_gradient_nchw`; arguments as `conv_nchw_plan.plan`.

    sizes: (channels a block, rows a block, parts).
    """
    n, channels = x[:2]
    n_taps = taps[0].size * taps[1].size
    block = max(1, min(channels, SUMS // (ceil(outputs / MR) * MR * n_taps)))
    block = ceil(channels / ceil(channels / block))
    rows = max(1, min(grid[0], PIXELS // grid[1]))
    parts = _count_parts(n * ceil(grid[0] / rows), groups * ceil(channels / block))
    geometry, bases, phases = conv_nchw_plan.plan(
        x, outputs, taps, stride, grid, (0, 0, 0, 0), groups, itemsize, 0, blocks=(block, rows)
    )
    return geometry, bases[: block * n_taps], phases, np.array([block, rows, parts], np.int64)


def plan_nhwc(x, outputs, taps, stride, grid, groups):
    """(geometry, bases, sizes) for `weight_gradient_nhwc`; arguments as `conv_nhwc.plan`.

    sizes: (steps k a block, rows a block, parts).
    """
    n, channels = x[0], x[3]
    whole = channels * taps[0].size * taps[1].size
    block = max(MR, min(whole, SUMS // (ceil(outputs / MR) * MR)))
    block = ceil(ceil(whole / ceil(whole / block)) / MR) * MR
    rows = max(1, min(grid[0], PIXELS // grid[1]))
    parts = _count_parts(n * ceil(grid[0] / rows), groups * ceil(whole / block))
    geometry, starts, pieces, _ = conv_nhwc.plan(x, outputs, taps, stride, grid, (0, 0, 0, 0), groups, 0)
    lengths = np.concatenate([np.full(count, length) for _, count, length, _ in pieces])
    bases = np.concatenate([start + np.arange(length) for start, length in zip(starts, lengths, strict=True)])
    return geometry, bases.astype(np.int64), np.array([block, rows, parts], np.int64)


def _count_parts(units, chunks):
    """Into how many parts to split the blocks of pixels so that there are about CHUNKS chunks."""
    return max(1, min(units, MAX_PARTS, ceil(CHUNKS / chunks)))


@emitted
def _tile_bases(bases, first, count):
    """The starts of k first .. first + count, and for the rows that fill the last tile up, any."""
    result = integers(((count + MR - 1) // MR) * MR)
    for i in range(result.size):
        result[i] = bases[first + min(i, count - 1)]
    return result


@emitted
def _add_products(a, bases, count, starts, rows, length, a_step, panels, outputs, sums, more):
    """sums[o // NR * NR * padded + k * NR + o % NR] (+)= the products of one block of pixels."""
    width = NV * lanes(a)
    padded = ((count + MR - 1) // MR) * MR
    left, segments = address(a, 0), address(starts, 0)
    for o in range(0, outputs, width):
        right = address(panels, o * rows * length)
        c, rows_of_k = address(sums, o * padded), address(bases, 0)
        if outputs - o > lanes(a):
            row_product(MR, NV, left, rows_of_k, a_step, segments, rows, length, right, width, c, width, more, count)
        else:
            row_product(MR, 1, left, rows_of_k, a_step, segments, rows, length, right, width, c, width, more, count)


@emitted
def _write_sums(sums, count, outputs, places, result, target):
    """result[target + places[o] + k] = the sum of (k, o): squares of vectors, turned in registers."""
    width, lane = NV * lanes(sums), lanes(sums)
    padded = ((count + MR - 1) // MR) * MR
    for o in range(0, outputs, lane):
        panel = o // width * width * padded + o % width
        if o + lane <= outputs and count >= lane:
            for k in range(0, count, lane):
                at = min(k, count - lane)
                transpose_square_to(
                    address(result, target + at), address(places, o), address(sums, panel + at * width), width
                )
            continue
        for j in range(min(lane, outputs - o)):
            for k in range(count):
                result[target + places[o + j] + k] = sums[panel + k * width + j]


@emitted
def _pack_planes(grad, start, plane, outputs, pixels, columns, panels):
    """panels[o // NR * NR * pixels + p * NR + o % NR] = grad[start + o * plane + p]; what is missing is 0."""
    width, lane = NV * lanes(grad), lanes(grad)
    for o in range(0, ((outputs + lane - 1) // lane) * lane, lane):
        panel = o // width * width * pixels + o % width
        if o + lane <= outputs and pixels >= lane:
            for p in range(0, pixels, lane):
                at = min(p, pixels - lane)
                source = address(grad, start + o * plane + at)
                transpose_square_to(address(panels, panel + at * width), address(columns, 0), source, plane)
            continue
        for p in range(pixels):
            clear_row(address(panels, panel + p * width), lane)
        for j in range(min(lane, outputs - o)):
            for p in range(pixels):
                panels[panel + p * width + j] = grad[start + (o + j) * plane + p]


@emitted
def _pack_rows(grad, start, step, outputs, pixels, panels):
    """panels[o // NR * NR * pixels + p * NR + o % NR] = grad[start + p * step + o]; what is missing is 0."""
    width = NV * lanes(grad)
    for o in range(0, outputs, width):
        some = min(width, outputs - o)
        for p in range(pixels):
            target = o * pixels + p * width
            source = start + p * step + o
            if some < width:
                clear_row(address(panels, target), width)
                for j in range(some):
                    panels[target + j] = grad[source + j]
            else:
                copy_row(1, address(panels, target), address(grad, source), width)


@emitted
def _add_pixels(panels, outputs, pixels, sums, at):
    """sums[at + o] += the packed pixels of grad's output o."""
    width = NV * lanes(panels)
    for o in range(0, outputs, lanes(panels)):
        pixel = address(panels, o // width * width * pixels + o % width)
        add_rows(address(sums, at + o), pixel, width, pixels)


@emitted
def _add_totals(totals, parts, groups, outputs, padded, bias):
    """bias = the parts' sums, added in order; each group's `padded` apart."""
    for i in range(bias.size):
        g = i // outputs
        total = totals[g * padded + i - g * outputs]
        for part in range(1, parts):
            total += totals[(part * groups + g) * padded + i - g * outputs]
        bias[i] = total


@emitted
def _nchw_chunk(x, grad, first, last, g, c0, some, geometry, all_bases, phases, sizes, result, target, bias, at):
    """The k of channels c0 .. c0 + some from the blocks of rows first .. last; where bias is not empty, its sums from
    `at` on.
    """
    groups, channels, h, w, outputs = geometry[1], geometry[2], geometry[3], geometry[4], geometry[5]
    oh, ow, pitch, plane = geometry[6], geometry[7], geometry[13], geometry[18]
    block_rows = sizes[1]
    width = NV * lanes(x)
    row_blocks = (oh + block_rows - 1) // block_rows
    count = some * geometry[10]
    bases = _tile_bases(all_bases, 0, count)
    planes = scratch(some * geometry[11] * plane + 2 * width + geometry[27], x)
    panels = scratch(((outputs + width - 1) // width) * width * block_rows * ow, x)
    sums = scratch(((outputs + width - 1) // width) * width * bases.size, x)
    starts, columns = progression(pitch, block_rows), progression(width, width)
    for unit in range(first, last):
        image, row0 = unit // row_blocks, unit % row_blocks * block_rows
        rows = min(block_rows, oh - row0)
        base = ((image * groups + g) * channels + c0) * h * w
        start = (image * groups + g) * outputs * oh * ow + row0 * ow
        _pack_planes(grad, start, oh * ow, outputs, rows * ow, columns, panels)
        if bias.size > 0 and c0 == 0:
            _add_pixels(panels, outputs, rows * ow, bias, at)
        if result.size == 0:
            continue
        copy_planes(x, base, np.int64(0), np.int64(1), some, row0, rows + geometry[12], geometry, phases, planes)
        more = 1 if unit > first else 0
        lines, line = (1, rows * ow) if pitch == ow else (rows, ow)
        _add_products(planes, bases, count, starts, lines, line, 1, panels, outputs, sums, more)
    if result.size == 0:
        return
    places = progression(channels * geometry[10], outputs + width)
    _write_sums(sums, count, outputs, places, result, target)


@kernel(one_by_one=True)
def weight_gradient_nchw(x, grad, result, bias, geometry, bases, phases, sizes):
    """result: (groups * outputs, channels, taps), flat, and bias: (groups * outputs,), both empty where not wanted; for
    x and grad in NCHW and a `plan_nchw`.
    """
    n, groups, channels, outputs, oh, taps = (
        geometry[0], geometry[1], geometry[2], geometry[5], geometry[6], geometry[10],
    )  # fmt: skip
    block, parts = sizes[0], sizes[2]
    blocks = (channels + block - 1) // block
    units = n * ((oh + sizes[1] - 1) // sizes[1])
    size = groups * outputs * channels * taps
    if result.size == 0:
        blocks = size = 1
    sums = result if parts == 1 or result.size == 0 else scratch(parts * size, x)
    # each group's outputs from a whole number of vectors on, for each part of the pixels
    padded = (outputs + lanes(x) - 1) // lanes(x) * lanes(x)
    totals = zeros(parts * groups * padded if bias.size > 0 else 0, x)
    for chunk in prange(groups * blocks * parts):
        part = chunk % parts
        c0 = chunk // parts % blocks * block
        g = chunk // (parts * blocks)
        _nchw_chunk(
            x, grad, units * part // parts, units * (part + 1) // parts, g, c0, min(block, channels - c0),
            geometry, bases, phases, sizes, sums, part * size + (g * outputs * channels + c0) * taps,
            totals, (part * groups + g) * padded,
        )  # fmt: skip
    if parts > 1 and result.size > 0:
        _add_parts(sums, parts, size, result)
    _add_totals(totals, parts, groups, outputs, padded, bias)


@emitted
def _nhwc_chunk(x, grad, first, last, g, k0, count, geometry, all_bases, sizes, result, target, bias, at):
    """The k from k0 on from the blocks of rows first .. last; where bias is not empty, its sums from `at` on."""
    groups, channels, h, outputs, oh, ow = (
        geometry[1], geometry[2], geometry[3], geometry[5], geometry[6], geometry[7],
    )  # fmt: skip
    stride_h, pixel, pitch, in_place = geometry[8], geometry[16], geometry[17], geometry[18]
    a_step = geometry[9] * pixel
    block_rows = sizes[1]
    width = NV * lanes(x)
    row_blocks = (oh + block_rows - 1) // block_rows
    bases = _tile_bases(all_bases, k0, count)
    rows_in = (block_rows - 1) * stride_h + geometry[13] + 1
    padded = scratch(1 if in_place else rows_in * pitch, x)
    panels = scratch(((outputs + width - 1) // width) * width * block_rows * ow, x)
    sums = scratch(((outputs + width - 1) // width) * width * bases.size, x)
    starts = integers(block_rows)
    for unit in range(first, last):
        image, row0 = unit // row_blocks, unit % row_blocks * block_rows
        rows = min(block_rows, oh - row0)
        origin = (image * h + row0 * stride_h) * pitch + g * channels if in_place else 0
        for i in range(rows):
            starts[i] = origin + i * stride_h * pitch
        step = groups * outputs
        _pack_rows(grad, (image * oh + row0) * ow * step + g * outputs, step, outputs, rows * ow, panels)
        if bias.size > 0 and k0 == 0:
            _add_pixels(panels, outputs, rows * ow, bias, at)
        if result.size == 0:
            continue
        if not in_place:
            copy_padded(x, image, g, np.int64(1), row0, (rows - 1) * stride_h + geometry[13] + 1, geometry, padded)
        more = 1 if unit > first else 0
        if in_place:
            _add_products(x, bases, count, starts, rows, ow, a_step, panels, outputs, sums, more)
        else:
            _add_products(padded, bases, count, starts, rows, ow, a_step, panels, outputs, sums, more)
    if result.size == 0:
        return
    places = progression(channels * geometry[10], outputs + width)
    _write_sums(sums, count, outputs, places, result, target)


@kernel(one_by_one=True)
def weight_gradient_nhwc(x, grad, result, bias, geometry, bases, sizes):
    """As `weight_gradient_nchw`, for x and grad in NHWC and a `plan_nhwc`."""
    n, groups, channels, outputs, oh, taps = (
        geometry[0], geometry[1], geometry[2], geometry[5], geometry[6], geometry[10],
    )  # fmt: skip
    block, parts = sizes[0], sizes[2]
    whole = channels * taps
    blocks = (whole + block - 1) // block
    units = n * ((oh + sizes[1] - 1) // sizes[1])
    size = groups * outputs * whole
    if result.size == 0:
        blocks = 1
    sums = scratch(parts * size, x) if result.size > 0 else result
    padded = (outputs + lanes(x) - 1) // lanes(x) * lanes(x)
    totals = zeros(parts * groups * padded if bias.size > 0 else 0, x)
    for chunk in prange(groups * blocks * parts):
        part = chunk % parts
        k0 = chunk // parts % blocks * block
        g = chunk // (parts * blocks)
        _nhwc_chunk(
            x, grad, units * part // parts, units * (part + 1) // parts, g, k0, min(block, whole - k0),
            geometry, bases, sizes, sums, part * size + g * outputs * whole + k0, totals, (part * groups + g) * padded,
        )  # fmt: skip
    for o in prange(groups * outputs if result.size > 0 else 0):
        _add_row_by_tap(sums, parts, size, o * whole, channels, taps, result)
    _add_totals(totals, parts, groups, outputs, padded, bias)


@emitted
def _add_row_by_tap(sums, parts, size, start, channels, taps, result):
    """Add one output's parts, and put (tap, channel) into the weights' order (channel, tap)."""
    for part in range(1, parts):
        one = sums.dtype.type(1)
        add_scaled(address(sums, start), address(sums, part * size + start), one, channels * taps)
    for t in range(taps):
        for c in range(channels):
            result[start + c * taps + t] = sums[start + t * channels + c]


@emitted
def _add_parts(sums, parts, size, result):
    for i in range(size):
        result[i] = sums[i]
    for part in range(1, parts):
        for i in range(size):
            result[i] += sums[part * size + i]


# Partial sums of a channel, added to in explicit vectors: a plain loop is vectorised as the compiler likes, differently
# in the serial and the parallel form, and the bits differ. 128 floats are 8 of the widest vectors.
SUM_LANES = 128


@kernel(fastmath=EXACT_ORDER)
def channel_sums(grad, n, outputs, pixels, sums):
    """sums[o] = sum of grad[:, o, :] for a flat (n, outputs, pixels) array: the gradient of the bias in NCHW."""
    one = grad.dtype.type(1)
    for o in prange(outputs):
        partial = zeros(SUM_LANES, grad)
        for image in range(n):
            start = (image * outputs + o) * pixels
            for p in range(0, pixels, SUM_LANES):
                add_scaled(address(partial, 0), address(grad, start + p), one, min(SUM_LANES, pixels - p))
        width = SUM_LANES // 2
        while width > 0:
            for i in range(width):
                partial[i] += partial[i + width]
            width //= 2
        sums[o] = partial[0]


# Parts of the pixels, added up on their own and then in order.
PIXEL_PARTS = 8


@kernel(fastmath=EXACT_ORDER)
def pixel_sums(grad, pixels, sums):
    """sums[o] = sum of grad[:, o] for a flat (pixels, outputs) array: the gradient of the bias in NHWC.

    Several pixels are added at once where they have few outputs, so that the vectors are long.
    """
    outputs = sums.size
    together = max(1, SUM_LANES // outputs)
    length = together * outputs
    one = grad.dtype.type(1)
    partial = np.zeros((PIXEL_PARTS, length), grad.dtype)
    groups = (pixels + together - 1) // together
    for part in prange(PIXEL_PARTS):
        for group in range(groups * part // PIXEL_PARTS, groups * (part + 1) // PIXEL_PARTS):
            some = min(length, (pixels - group * together) * outputs)
            add_scaled(address(partial, part * length), address(grad, group * length), one, some)
    for o in range(outputs):
        total = grad.dtype.type(0)
        for part in range(PIXEL_PARTS):
            for i in range(together):
                total += partial[part, i * outputs + o]
        sums[o] = total
