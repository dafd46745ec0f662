"""The gradient of a depthwise convolution with respect to its weights: sums over images and pixels, a vector each.

    grad_weight[channel, t] = sum over images and pixels of grad[channel, pixel] * x[channel, pixel of tap t]

The sums of nine taps stay in registers while a vector of grad is multiplied with the nine vectors of x that its taps
see. Where x comes from is as in the forward pass (conv_depthwise.py): a strip of padded rows in NCHW, regions without
borders in NHWC.

A chunk owns some channels (NCHW) or some rows of all images (NHWC), the latter with sums of its own, which are added in
order. The chunks follow from the shapes, and within one the lanes are explicit: the bits do not depend on the number of
threads.
"""

from math import prod

import numpy as np
from numba import prange

from tilewise.kernels.cpu.conv_depthwise_nchw import FEWEST, Strips, fill_strip
from tilewise.kernels.cpu.conv_depthwise_nhwc import Regions, row_bands
from tilewise.kernels.cpu.depthwise_strip import clear, step
from tilewise.kernels.cpu.depthwise_vector import TILE, accumulate_square, accumulate_taps, sum_of_lanes
from tilewise.kernels.cpu.jit import EXACT_ORDER, device, kernel
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import address, lanes

# A band of NHWC rows stays in the second-level cache while one vector of channels after the other passes over it.
BAND_BYTES = 128 << 10
# Row bands of the batch that are summed on their own in NHWC: work for this many threads.
PARTS = 16
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
            0,
            0,
            sums,
            x,
            table,
            all_taps,
            tap_step,
            x_row,
            x_step,
            grad,
            next_grad,
            grad_row,
            grad_step,
            rows,
            steps,
            used,
        )
    elif all_taps == 0:
        accumulate_square(
            0,
            1,
            sums,
            x,
            table,
            all_taps,
            tap_step,
            x_row,
            x_step,
            grad,
            next_grad,
            grad_row,
            grad_step,
            rows,
            steps,
            used,
        )
    elif stride == 1 and used >= width:
        accumulate_square(
            1,
            0,
            sums,
            x,
            table,
            all_taps,
            tap_step,
            x_row,
            x_step,
            grad,
            next_grad,
            grad_row,
            grad_step,
            rows,
            steps,
            used,
        )
    elif stride == 1:
        accumulate_square(
            1,
            1,
            sums,
            x,
            table,
            all_taps,
            tap_step,
            x_row,
            x_step,
            grad,
            next_grad,
            grad_row,
            grad_step,
            rows,
            steps,
            used,
        )
    elif used >= width:
        accumulate_square(
            2,
            0,
            sums,
            x,
            table,
            all_taps,
            tap_step,
            x_row,
            x_step,
            grad,
            next_grad,
            grad_row,
            grad_step,
            rows,
            steps,
            used,
        )
    else:
        accumulate_square(
            2,
            1,
            sums,
            x,
            table,
            all_taps,
            tap_step,
            x_row,
            x_step,
            grad,
            next_grad,
            grad_row,
            grad_step,
            rows,
            steps,
            used,
        )


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
    _add_parts(sums, parts, size)
    for o in range(groups * outputs):
        for t in range(taps):
            result[o * taps + t] = sums[o * (taps + 1) + t]
        bias[o] = sums[o * (taps + 1) + taps]


@device(fastmath=EXACT_ORDER)
def _add_parts(sums, parts, size):
    """The parts' sums, in order, into the first."""
    for part in range(1, parts):
        for i in range(size):
            sums[i] += sums[part * size + i]


@device(fastmath=EXACT_ORDER)
def _sum_region(
    totals, x, grad, channels, all_taps, w, ow, stride_h, stride_w, square, table, taps, rows, steps, width
):
    """Add the products of one region's rows, a vector of channels at a time: NHWC, tiles of neighbours in a row."""
    across, x_row, grad_row = stride_w * channels, stride_h * w * channels, ow * channels
    tiles = steps // TILE if square > 0 else 0
    done, left = tiles * TILE, steps - tiles * TILE
    for c in range(0, channels, width):
        sums, used = step(totals, c * (all_taps + 1)), channels - c
        if tiles > 0:
            _accumulate_square(
                sums, step(x, c), table, all_taps, stride_w, channels, x_row, TILE * across, step(grad, c), channels,
                grad_row, TILE * channels, rows, tiles, used, width,
            )  # fmt: skip
        if left > 0:
            _accumulate(
                sums, step(x, c + done * across), table, taps, all_taps, x_row, across, step(grad, c + done * channels),
                grad_row, channels, rows, left, used, width,
            )  # fmt: skip


@kernel(fastmath=EXACT_ORDER)
def weight_gradient_nhwc(
    x, grad, result, bias, n, channels, h, w, oh, ow, bands, stride_h, stride_w, regions, table, all_taps
):
    """result: (channels, taps), bias: (channels), flat; regions, table: see Regions. all_taps: 0 for the bias alone."""
    width = lanes(x)
    size = (channels + width - 1) // width * width * (all_taps + 1)
    units = n * bands
    parts = min(units, PARTS)
    sums = scratch(parts * size, x)
    for part in prange(parts):
        clear(address(sums, part * size), size)
        for unit in range(units * part // parts, units * (part + 1) // parts):
            image = unit // bands
            band = unit - image * bands
            for r in range(0, regions.size, 9):
                i0 = max(oh * band // bands, regions[r + 1])
                i1 = min(oh * (band + 1) // bands, regions[r + 2])
                j0, j1 = regions[r + 4], regions[r + 5]
                if i0 < i1:
                    _sum_region(
                        address(sums, part * size),
                        address(x, ((image * h + i0 * stride_h) * w + j0 * stride_w) * channels),
                        address(grad, ((image * oh + i0) * ow + j0) * channels),
                        channels, all_taps, w, ow, stride_h, stride_w, regions[r + 8],
                        address(table, 2 * regions[r + 6]), min(regions[r + 7], all_taps), i1 - i0, j1 - j0, width,
                    )  # fmt: skip
    _add_parts(sums, parts, size)
    for c in range(channels):
        vector = c // width * (all_taps + 1)
        for t in range(all_taps):
            result[c * all_taps + t] = sums[(vector + t) * width + c % width]
        bias[c] = sums[(vector + all_taps) * width + c % width]


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
            plan = Regions((h, w), channels, (oh, ow), weight[3], axes, stride)
            bands = row_bands(n, oh, w * stride[0] * channels * dtype.itemsize, BAND_BYTES)
            self.kernel, self.last = weight_gradient_nhwc.sized(work), ()
            self.constants = (n, channels, h, w, oh, ow, bands, *stride, plan.regions, plan.table)
        else:
            _, groups, h, w = x
            oh, ow = grad[2:4]
            strips = Strips(n * groups, (oh, ow), weight[3], axes, stride, dtype)
            blocks = min(groups, BLOCKS)
            parts = 1 if blocks >= FEWEST else min(n, -(-FEWEST // blocks))
            self.kernel, self.last = weight_gradient_nchw.sized(work), (blocks, parts)
            head = (n, groups, weight[0] // groups, h, w, oh, ow, strips.constants, strips.table)
            self.constants = (*head, strips.square)

    def __call__(self, grad, x, wants_weight, wants_bias):
        """(grad_weight or None, grad_bias or None); the bias's costs nearly nothing beside the former."""
        result = np.empty(self.shape if wants_weight else 0, x.dtype)
        bias = np.empty(self.shape[0], x.dtype)
        taps = self.taps if wants_weight else 0
        self.kernel(x.ravel(), grad.ravel(), result.ravel(), bias, *self.constants, taps, *self.last)
        return result if wants_weight else None, bias if wants_bias else None
