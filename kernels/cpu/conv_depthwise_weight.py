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

from tilewise.kernels.cpu.conv_depthwise import CHUNKS, FEWEST, Regions, Strips, fill_strip, row_bands
from tilewise.kernels.cpu.depthwise_vector import accumulate_taps, step, sum_of_lanes
from tilewise.kernels.cpu.jit import EXACT_ORDER, device, kernel
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import address, lanes

# Row bands of the batch that are summed on their own in NHWC: work for this many threads.
PARTS = 16
COST = 0.02  # estimated serial nanoseconds per FLOP


@device(fastmath=EXACT_ORDER)
def _accumulate(sums, x, table, taps, x_row, x_step, grad, grad_row, grad_step, rows, steps, used):
    """The table's taps: nine, then three, then one at a time. used: lanes, 0 for all."""
    t = 0
    if used > 0:
        while t + 9 <= taps:
            entries = step(table, 2 * t)
            accumulate_taps(9, 1, sums, x, entries, x_row, x_step, grad, grad_row, grad_step, rows, steps, used)
            t += 9
        while t < taps:
            entries = step(table, 2 * t)
            accumulate_taps(1, 1, sums, x, entries, x_row, x_step, grad, grad_row, grad_step, rows, steps, used)
            t += 1
        return
    while t + 9 <= taps:
        accumulate_taps(9, 0, sums, x, step(table, 2 * t), x_row, x_step, grad, grad_row, grad_step, rows, steps, 0)
        t += 9
    while t + 3 <= taps:
        accumulate_taps(3, 0, sums, x, step(table, 2 * t), x_row, x_step, grad, grad_row, grad_step, rows, steps, 0)
        t += 3
    while t < taps:
        accumulate_taps(1, 0, sums, x, step(table, 2 * t), x_row, x_step, grad, grad_row, grad_step, rows, steps, 0)
        t += 1


@device(fastmath=EXACT_ORDER)
def _sum_plane(totals, strip, row_step, table, taps, grad, rows, ow, width):
    """Add one band's products to the sums."""
    whole = ow // width * width
    if whole > 0:
        _accumulate(totals, strip, table, taps, row_step, width, grad, ow, width, rows, ow // width, 0)
    if whole < ow:
        strip, grad = step(strip, whole), step(grad, whole)
        _accumulate(totals, strip, table, taps, row_step, 0, grad, ow, 0, rows, 1, ow - whole)


@kernel(fastmath=EXACT_ORDER)
def weight_gradient_nchw(x, grad, result, n, groups, outputs, h, w, oh, ow, strips, table, group_chunks, parts):
    """result: (groups * outputs, taps), flat; strips, table: see Strips."""
    _, bands, first_row, first_column, strip_rows, part_width, stride_h, stride_w = strips
    taps, width, pitch = table.size // 2, lanes(x), part_width * stride_w
    sums = np.empty(parts * result.size, x.dtype) if parts > 1 else result
    for chunk in prange(group_chunks * parts):
        part = chunk % parts
        block = chunk // parts
        memory = scratch(strip_rows * pitch, x)
        totals = scratch(outputs * taps * width, x)
        for g in range(groups * block // group_chunks, groups * (block + 1) // group_chunks):
            for i in range(outputs * taps * width):
                totals[i] = 0
            for image in range(n * part // parts, n * (part + 1) // parts):
                plane = image * groups + g
                for band in range(bands):
                    i0, i1 = oh * band // bands, oh * (band + 1) // bands
                    rows = strip_rows - (oh + bands - 1) // bands * stride_h + (i1 - i0) * stride_h
                    first = i0 * stride_h + first_row
                    where, strip = address(x, plane * h * w), address(memory, 0)
                    fill_strip(where, h, w, first, first_column, rows, part_width, stride_w, width, strip)
                    for k in range(outputs):
                        where = address(grad, ((plane * outputs + k) * oh + i0) * ow)
                        into = address(totals, k * taps * width)
                        down = stride_h * pitch
                        _sum_plane(into, strip, down, address(table, 0), taps, where, i1 - i0, ow, width)
            place = part * groups * outputs * taps + g * outputs * taps
            for t in range(outputs * taps):
                sums[place + t] = sum_of_lanes(address(totals, t * width))
    if parts > 1:
        _add_parts(sums, parts, result.size)
        for i in range(result.size):
            result[i] = sums[i]


@device(fastmath=EXACT_ORDER)
def _add_parts(sums, parts, size):
    """The parts' sums, in order, into the first."""
    for part in range(1, parts):
        for i in range(size):
            sums[i] += sums[part * size + i]


@device(fastmath=EXACT_ORDER)
def _sum_band(
    totals, x, image_x, grad, image_grad, channels, all_taps, w, ow, stride_h, stride_w, regions, table, i0, i1
):
    """Add the products of rows i0 to i1 of one image, region after region, one vector of channels at a time."""
    width = lanes(x)
    for r in range(0, regions.size, 9):
        first, last = max(i0, regions[r + 1]), min(i1, regions[r + 2])
        j0, steps = regions[r + 4], regions[r + 5] - regions[r + 4]
        start, taps = regions[r + 6], regions[r + 7]
        if last <= first or taps == 0:
            continue
        source = image_x + (first * stride_h * w + j0 * stride_w) * channels
        where = image_grad + (first * ow + j0) * channels
        for c in range(0, channels, width):
            used = 0 if c + width <= channels else channels - c
            _accumulate(
                address(totals, c * all_taps), address(x, source + c), address(table, 2 * start), taps,
                stride_h * w * channels, stride_w * channels, address(grad, where + c), ow * channels, channels,
                last - first, steps, used,
            )  # fmt: skip


@kernel(fastmath=EXACT_ORDER)
def weight_gradient_nhwc(
    x, grad, result, n, channels, h, w, oh, ow, all_taps, bands, stride_h, stride_w, regions, table
):
    """result: (channels, taps), flat; regions, table: see Regions."""
    width = lanes(x)
    size = (channels + width - 1) // width * width * all_taps
    units = n * bands
    parts = min(units, PARTS)
    sums = scratch(parts * size, x)
    for part in prange(parts):
        totals = sums[part * size : (part + 1) * size]
        for i in range(size):
            totals[i] = 0
        for unit in range(units * part // parts, units * (part + 1) // parts):
            image = unit // bands
            band = unit - image * bands
            _sum_band(
                totals, x, image * h * w * channels, grad, image * oh * ow * channels, channels, all_taps, w, ow,
                stride_h, stride_w, regions, table, oh * band // bands, oh * (band + 1) // bands,
            )  # fmt: skip
    _add_parts(sums, parts, size)
    for c in range(channels):
        for t in range(all_taps):
            result[c * all_taps + t] = sums[(c // width * all_taps + t) * width + c % width]


class WeightGradient:
    """The gradient with respect to the weights, with everything but the arrays worked out; call it with grad and x.

    grad, x, weight: shapes. taps: the offsets of the taps' rows and columns in x.
    """

    def __init__(self, grad, x, weight, taps, stride, layout, dtype):
        self.shape = weight
        n, all_taps = x[0], prod(weight[2:])
        work = 2 * prod(grad) * all_taps * COST
        axes = [[(np.arange(offsets.size), offsets)] for offsets in taps]
        if layout == "NHWC":
            _, h, w, channels = x
            oh, ow = grad[1:3]
            plan = Regions((h, w), channels, (oh, ow), weight[3], axes, stride)
            bands = row_bands(n, oh, w * stride[0] * channels * dtype.itemsize)
            self.kernel = weight_gradient_nhwc.sized(work)
            self.constants = (n, channels, h, w, oh, ow, all_taps, bands, *stride, plan.regions, plan.table)
        else:
            _, groups, h, w = x
            oh, ow = grad[2:4]
            strips = Strips(n * groups, (oh, ow), weight[3], axes, stride, dtype)
            blocks = min(groups, CHUNKS)
            parts = 1 if blocks >= FEWEST else min(n, -(-FEWEST // blocks))
            self.kernel = weight_gradient_nchw.sized(work)
            head = (n, groups, weight[0] // groups, h, w, oh, ow, strips.constants, strips.table)
            self.constants = (*head, blocks, parts)

    def __call__(self, grad, x):
        result = np.empty(self.shape, x.dtype)
        self.kernel(x.ravel(), grad.ravel(), result.ravel(), *self.constants)
        return result
