"""The gradient of a depthwise convolution with respect to its weights: sums over images and pixels, a vector each.

    grad_weight[channel, t] = sum over images and pixels of grad[channel, pixel] * x[channel, pixel of tap t]

The sums of nine taps stay in registers while a vector of grad is multiplied with the nine vectors of x that its taps
see. Where x comes from is as in the forward pass (conv_depthwise.py): a strip of padded rows in NCHW, regions without
borders in NHWC, and x itself for most 3x3 kernels in NCHW (conv_depthwise_same.py, conv_depthwise_rows.py). In NHWC
with many channels some of them are copied, with a border of zeros, so that all outputs are of one region.

A chunk owns some channels (NCHW) or some rows of all images (NHWC), there with AVX-512 of those channels that are
copied together, with sums of its own, which are added in order. The chunks follow from the shapes, and within one the
lanes are explicit: the bits do not depend on the number of threads.
"""

from math import prod

import numpy as np
from numba import prange

from tilewise.kernels.cpu.conv_depthwise_nchw import FEWEST, Strips, fill_strip
from tilewise.kernels.cpu.conv_depthwise_nhwc import Regions, row_bands
from tilewise.kernels.cpu.conv_depthwise_rows import by_rows, weight_gradient_rows_nchw
from tilewise.kernels.cpu.conv_depthwise_same import (
    add_parts,
    channels_copied,
    is_same,
    tap_numbers,
    weight_gradient_same_nchw,
)
from tilewise.kernels.cpu.depthwise_strip import clear, step
from tilewise.kernels.cpu.depthwise_vector import TILE, accumulate_square, accumulate_taps, sum_of_lanes
from tilewise.kernels.cpu.jit import EXACT_ORDER, device, kernel
from tilewise.kernels.cpu.row_moves import copy_lines, gather_row
from tilewise.kernels.cpu.scratch import ALIGNMENT, keep, scratch
from tilewise.kernels.cpu.simd import VECTOR_BYTES, address, lane_count, lanes

# A band of NHWC rows stays in the second-level cache while one vector of channels after the other passes over it.
BAND_BYTES = 128 << 10
# Bytes of a pixel from which on its channels are copied together (see _channels_copied).
FAR = 1024
# Chunks in NHWC, at least, where the batch has as many row bands: channels that are copied together, or all, of some of
# the bands.
PARTS = 16
# How many times as large as x's rows and columns those with a border may be, where channels are copied: a dilation of
# 1000 would make a gigabyte of zeros.
BORDERED = 3
# Blocks of channels in NCHW: long enough for a block's planes to lie far behind one another.
BLOCKS = 16
COST = 0.02  # estimated serial nanoseconds per FLOP


@device(fastmath=EXACT_ORDER)
def _accumulate(sums, x, table, taps, all_taps, x_row, x_step, grad, grad_row, grad_step, rows, steps, used, width):
    """All of the table's taps, and grad alone: nine taps at once, then three, then one. used: lanes out of `width`."""
    t = 0
    if used >= width:
        if taps >= 9:
            accumulate_taps(
                9, 1, 0, sums, x, table, all_taps, x_row, x_step, grad, grad_row, grad_step, rows, steps, used
            )
            t = 9
        else:
            accumulate_taps(
                0, 1, 0, sums, x, table, all_taps, x_row, x_step, grad, grad_row, grad_step, rows, steps, used
            )
    else:
        accumulate_taps(0, 1, 1, sums, x, table, all_taps, x_row, x_step, grad, grad_row, grad_step, rows, steps, used)
    while t < taps:
        at = step(table, 2 * t)
        if used < width:
            accumulate_taps(1, 0, 1, sums, x, at, all_taps, x_row, x_step, grad, grad_row, grad_step, rows, steps, used)
            t += 1
        elif taps - t >= 9:
            accumulate_taps(9, 0, 0, sums, x, at, all_taps, x_row, x_step, grad, grad_row, grad_step, rows, steps, used)
            t += 9
        elif taps - t >= 3:
            accumulate_taps(3, 0, 0, sums, x, at, all_taps, x_row, x_step, grad, grad_row, grad_step, rows, steps, used)
            t += 3
        else:
            accumulate_taps(1, 0, 0, sums, x, at, all_taps, x_row, x_step, grad, grad_row, grad_step, rows, steps, used)
            t += 1


@device(fastmath=EXACT_ORDER)
def _accumulate_square(
    sums, x, table, all_taps, stride, tap_step, x_row, x_step, grad, next_grad, grad_row, grad_step, rows, steps, used,
    width,
):  # fmt: skip
    """Tiles of grads with a 3x3 kernel's taps; all_taps 0: grad alone, in the same order."""
    if all_taps == 0 and used >= width:
        accumulate_square(
            0, 0, sums, x, table, all_taps, tap_step, x_row, x_step, grad, next_grad, grad_row, grad_step, rows, steps,
            used,
        )  # fmt: skip
    elif all_taps == 0:
        accumulate_square(
            0, 1, sums, x, table, all_taps, tap_step, x_row, x_step, grad, next_grad, grad_row, grad_step, rows, steps,
            used,
        )  # fmt: skip
    elif stride == 1 and used >= width:
        accumulate_square(
            1, 0, sums, x, table, all_taps, tap_step, x_row, x_step, grad, next_grad, grad_row, grad_step, rows, steps,
            used,
        )  # fmt: skip
    elif stride == 1:
        accumulate_square(
            1, 1, sums, x, table, all_taps, tap_step, x_row, x_step, grad, next_grad, grad_row, grad_step, rows, steps,
            used,
        )  # fmt: skip
    elif used >= width:
        accumulate_square(
            2, 0, sums, x, table, all_taps, tap_step, x_row, x_step, grad, next_grad, grad_row, grad_step, rows, steps,
            used,
        )  # fmt: skip
    else:
        accumulate_square(
            2, 1, sums, x, table, all_taps, tap_step, x_row, x_step, grad, next_grad, grad_row, grad_step, rows, steps,
            used,
        )  # fmt: skip


@device(fastmath=EXACT_ORDER)
def _sum_columns(sums, strip, pitch, stride_h, square, table, taps, grad, rows, ow, steps, used, width):
    """`steps` vectors of every row of a band: NCHW, tiles of rows."""
    tiles = rows // TILE if square > 0 else 0
    down = stride_h * pitch
    if tiles > 0:
        _accumulate_square(
            sums, strip, table, taps, stride_h, pitch, TILE * down, width, grad, ow, TILE * ow, width, tiles, steps,
            used, width,
        )  # fmt: skip
    if tiles * TILE < rows:
        x, grad = step(strip, tiles * TILE * down), step(grad, tiles * TILE * ow)
        rows -= tiles * TILE
        _accumulate(sums, x, table, taps, taps, down, width, grad, ow, width, rows, steps, used, width)


@kernel(fastmath=EXACT_ORDER)
def weight_gradient_nchw(
    x, grad, result, bias, n, groups, outputs, h, w, oh, ow, strips, table, square, all_taps, blocks, parts
):
    """result: (groups * outputs, taps), bias: (groups * outputs), flat; strips, table: see Strips.

    all_taps: 0 for the bias alone.
    """
    _, bands, first_row, first_column, strip_rows, part_width, stride_h, stride_w = strips
    taps, width, pitch = all_taps, lanes(x), part_width * stride_w
    size, group_size = groups * outputs * (taps + 1), outputs * (taps + 1)
    sums = np.empty(parts * size, x.dtype)
    whole = ow // width * width
    for chunk in prange(blocks * parts):
        part = chunk % parts
        block = chunk // parts
        strip_memory = scratch(strip_rows * pitch, x)
        first_group, groups_here = groups * block // blocks, groups * (block + 1) // blocks - groups * block // blocks
        totals = scratch(groups_here * group_size * width, x)
        clear(address(totals, 0), groups_here * group_size * width)
        # Image after image, whose planes lie one behind the other: what is asked for ahead is what comes next.
        for unit in range(n * part // parts * groups_here, n * (part + 1) // parts * groups_here):
            image = unit // groups_here
            g = unit - image * groups_here
            plane = image * groups + first_group + g
            for band in range(bands):
                i0, i1 = oh * band // bands, oh * (band + 1) // bands
                rows = strip_rows - ((oh + bands - 1) // bands - i1 + i0) * stride_h
                first = i0 * stride_h + first_row
                strip, entries = address(strip_memory, 0), address(table, 0)
                if taps > 0:
                    where = address(x, plane * h * w)
                    fill_strip(where, h, w, first, first_column, rows, part_width, stride_w, width, strip)
                for k in range(outputs):
                    into = address(totals, (g * outputs + k) * (taps + 1) * width)
                    where = address(grad, ((plane * outputs + k) * oh + i0) * ow)
                    if ow >= width:
                        _sum_columns(
                            into, strip, pitch, stride_h, square, entries, taps, where, i1 - i0, ow, ow // width,
                            width, width,
                        )  # fmt: skip
                    if whole < ow:
                        _sum_columns(
                            into, step(strip, whole), pitch, stride_h, square, entries, taps, step(where, whole),
                            i1 - i0, ow, 1, ow - whole, width,
                        )  # fmt: skip
        for t in range(groups_here * group_size):
            sums[part * size + first_group * group_size + t] = sum_of_lanes(address(totals, t * width))
    add_parts(sums, parts, size)
    for o in range(groups * outputs):
        for t in range(taps):
            result[o * taps + t] = sums[o * (taps + 1) + t]
        bias[o] = sums[o * (taps + 1) + taps]


@device()
def _gather_channels(x, start, pixel, count, pixels, block, target):
    """target[p * block + c] = x[start + p * pixel + c] for c < count."""
    if count % lanes(x) == 0:
        copy_lines(1, target, block, 0, address(x, start), pixel, count, pixels)
        return
    for p in range(pixels):
        gather_row(step(target, p * block), address(x, start + p * pixel), count, 1)


@device()
def _gather_padded(x, start, channels, count, size, top, rows, seen, block, target):
    """The same for `rows` rows of an image from `top` on, zeros for those outside; columns outside stay as they are.

    size: the image's. seen: the first column that a tap sees, and how many there are.
    """
    h, w = size
    left, columns = seen
    first, end = max(left, 0), min(left + columns, w)
    for i in range(rows):
        row, y = step(target, i * columns * block), top + i
        if y < 0 or y >= h:
            clear(row, columns * block)
        elif first < end:
            where = start + (y * w + first) * channels
            _gather_channels(x, where, channels, count, end - first, block, step(row, (first - left) * block))


@device(fastmath=EXACT_ORDER)
def _sum_region(
    totals, x, grad, pixel, channels, all_taps, w, ow, stride_h, stride_w, square, table, taps, rows, steps, width
):  # fmt: skip
    """Add the products of one region's rows, a vector of channels at a time: NHWC, tiles of neighbours in a row.

    pixel: elements from one pixel to the next.
    """
    across, x_row, grad_row = stride_w * pixel, stride_h * w * pixel, ow * pixel
    tiles = steps // TILE if square > 0 else 0
    done, left = tiles * TILE, steps - tiles * TILE
    for c in range(0, channels, width):
        sums, used = step(totals, c * (all_taps + 1)), channels - c
        if tiles > 0:
            _accumulate_square(
                sums, step(x, c), table, all_taps, stride_w, pixel, x_row, TILE * across, step(grad, c), pixel,
                grad_row, TILE * pixel, rows, tiles, used, width,
            )  # fmt: skip
        if left > 0:
            _accumulate(
                sums, step(x, c + done * across), table, taps, all_taps, x_row, across, step(grad, c + done * pixel),
                grad_row, pixel, rows, left, used, width,
            )  # fmt: skip


@kernel(fastmath=EXACT_ORDER)
def weight_gradient_nhwc(
    x, grad, result, bias, n, channels, h, w, oh, ow, bands, reach, seen, own, block, room, stride_h, stride_w,
    regions, table, all_taps,
):  # fmt: skip
    """result: (channels, taps), bias: (channels), flat; regions, table: see Regions. all_taps: 0 for the bias alone.

    own: a chunk's channels, of which `block` are copied together before they are summed, to `room` elements; all of
    them where nothing is copied. reach, seen: the first row of taps, seen from an output's, and rows of taps; the first
    column that a tap sees, and columns: what is copied has zeros for those that x lacks.
    """
    width = lanes(x)
    size = (channels + width - 1) // width * width * (all_taps + 1)
    units, shares = n * bands, (channels + own - 1) // own
    parts = min(units, -(-PARTS // shares))
    sums = scratch(parts * size, x)
    rows = (oh + bands - 1) // bands
    copied = block if block < channels else 0
    pitch = seen[1] if copied > 0 else w
    for chunk in prange(shares * parts):
        part = chunk % parts
        c_first = chunk // parts * own
        c_end = min(c_first + own, channels)
        totals = address(sums, part * size)
        clear(step(totals, c_first * (all_taps + 1)), (c_end - c_first + width - 1) // width * width * (all_taps + 1))
        packed_x = scratch(room, x)
        if all_taps > 0:
            clear(address(packed_x, 0), room)
        packed_grad = scratch(rows * ow * copied, x)
        for unit in range(units * part // parts, units * (part + 1) // parts):
            image = unit // bands
            band = unit - image * bands
            i0, i1 = oh * band // bands, oh * (band + 1) // bands
            for c0 in range(c_first, c_end, block):
                some = min(block, c_end - c0)
                inputs, grads = address(x, image * h * w * channels), address(grad, image * oh * ow * channels)
                if copied > 0:
                    if all_taps > 0:
                        _gather_padded(
                            x, image * h * w * channels + c0, channels, some, (h, w), i0 * stride_h + reach[0],
                            (i1 - i0 - 1) * stride_h + reach[1], seen, block, address(packed_x, 0),
                        )  # fmt: skip
                    start = (image * oh + i0) * ow * channels + c0
                    _gather_channels(grad, start, channels, some, (i1 - i0) * ow, block, address(packed_grad, 0))
                    inputs = address(packed_x, -i0 * stride_h * pitch * block)
                    grads = address(packed_grad, -i0 * ow * block)
                for r in range(0, regions.size, 9):
                    a, b = max(i0, regions[r + 1]), min(i1, regions[r + 2])
                    j0, j1 = regions[r + 4], regions[r + 5]
                    if a < b:
                        pixel, first = (a * ow + j0) * block, (a * stride_h * pitch + j0 * stride_w) * block
                        _sum_region(
                            step(totals, c0 * (all_taps + 1)), step(inputs, first), step(grads, pixel), block, some,
                            all_taps, pitch, ow, stride_h, stride_w, regions[r + 8], address(table, 2 * regions[r + 6]),
                            min(regions[r + 7], all_taps), b - a, j1 - j0, width,
                        )  # fmt: skip
        keep(packed_x)
        keep(packed_grad)
    add_parts(sums, parts, size)
    for c in range(channels):
        vector = c // width * (all_taps + 1)
        for t in range(all_taps):
            result[c * all_taps + t] = sums[(vector + t) * width + c % width]
        bias[c] = sums[(vector + all_taps) * width + c % width]


def _channels_copied(channels, dtype):
    """A pixel's channels that are copied and summed together in NHWC: the cache line that a vector is half of.

    From a vector to the next pixel's is a power of two in the usual networks, 2 KB for 512 channels, so that the pixels
    of a few rows compete for two of L1's 64 sets, and each line comes from L2 once for each tap row and vector. Lines
    copied side by side stay. With small pixels the copies cost more than they save. AVX-512's vector is the whole line:
    there it pays from 2 KB a pixel on, and with several lines together, as in the forward pass.
    """
    if VECTOR_BYTES == ALIGNMENT:
        return channels_copied(channels, dtype)
    line = ALIGNMENT // dtype.itemsize
    return line if lane_count(dtype.itemsize) < line and channels * dtype.itemsize >= FAR else channels


def _seen(outputs, stride, offsets):
    """(the first place along an axis that the taps of so many outputs see, how many places they span)."""
    first = int(offsets.min())
    return first, (outputs - 1) * stride + int(offsets.max()) - first + 1


class WeightGradient:
    """The gradients with respect to weights and bias, with all but the arrays worked out; call it with grad and x.

    grad, x, weight: shapes. taps: the offsets of the taps' rows and columns in x.
    """

    def __init__(self, grad, x, weight, taps, stride, layout, dtype):
        self.shape, self.taps = weight, prod(weight[2:])
        n, work = x[0], 2 * prod(grad) * self.taps * COST
        axes = [[(np.arange(offsets.size), offsets)] for offsets in taps]
        if layout == "NHWC":
            _, h, w, channels = x
            oh, ow = grad[1:3]
            reach, seen = _seen(1, 1, taps[0]), _seen(ow, stride[1], taps[1])
            bordered = _seen(oh, stride[0], taps[0])[1], seen[1]
            block = _channels_copied(channels, dtype) if prod(bordered) <= BORDERED * h * w else channels
            is_copied = block < channels
            if is_copied:  # with a border, so all outputs are of one region
                axes = [[(numbers, offsets - offsets.min()) for numbers, offsets in axis] for axis in axes]
            size = bordered if is_copied else (h, w)
            plan = Regions(size, block, (oh, ow), weight[3], axes, stride)
            # A block of one line leaves to the next block the neighbours that the processor fetches with each line.
            own = block if VECTOR_BYTES == ALIGNMENT else channels
            bands = row_bands(n, oh, size[1] * stride[0] * own * dtype.itemsize, BAND_BYTES)
            self.room = ((-(-oh // bands) - 1) * stride[0] + reach[1]) * seen[1] * block if is_copied else 0
            self.kernel, self.last = weight_gradient_nhwc.sized(work), ()
            self.constants = (
                n, channels, h, w, oh, ow, bands, reach, seen, own, block, self.room, *stride, plan.regions,
                plan.table,
            )  # fmt: skip
        else:
            _, groups, h, w = x
            oh, ow = grad[2:4]
            blocks = min(groups, BLOCKS)
            parts = 1 if blocks >= FEWEST else min(n, -(-FEWEST // blocks))
            self.last = (blocks, parts)
            problem = n * groups, axes, stride, weight[0] // groups, (h, w), (oh, ow)
            if by_rows(*problem, dtype.itemsize):
                self.kernel = weight_gradient_rows_nchw.sized(work)
                padding = [-int(offsets[0]) for offsets in taps]
                self.constants = (n, groups, h, w, oh, ow, *padding, stride[0], tap_numbers(axes, weight[3]))
                return
            if h > 1 and is_same(*problem[1:]):
                self.kernel = weight_gradient_same_nchw.sized(work)
                self.constants = (n, groups, h, w, tap_numbers(axes, weight[3]))
                return
            strips = Strips(n * groups, (oh, ow), weight[3], axes, stride, dtype)
            self.kernel = weight_gradient_nchw.sized(work)
            head = (n, groups, weight[0] // groups, h, w, oh, ow, strips.constants, strips.table)
            self.constants = (*head, strips.square)

    def __call__(self, grad, x, wants_weight, wants_bias):
        """(grad_weight or None, grad_bias or None); the bias's costs nearly nothing beside the former."""
        result = np.empty(self.shape if wants_weight else 0, x.dtype)
        bias = np.empty(self.shape[0], x.dtype)
        taps = self.taps if wants_weight else 0
        self.kernel(x.ravel(), grad.ravel(), result.ravel(), bias, *self.constants, taps, *self.last)
        return result if wants_weight else None, bias if wants_bias else None
