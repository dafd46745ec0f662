"""The gradient with respect to an x of few channels (an image's three), by columns: a product, then shifted sums.

    columns[k, pixel of grad] = sum over o of weight[o, k] * grad[o, pixel]         k = (channel, tap row, tap column)
    grad_x[channel, the pixel shifted by the tap] += columns[k, pixel]

As a convolution of grad this would have three outputs, and fill three rows of a register tile of eight; here the tile's
rows are all k. The columns, larger than x by the number of taps, never leave L2: a chunk owns a block of rows of x,
takes some rows of grad at a time, and adds their columns up, one row and tap after the other:

    rows of grad -> stage[o, pixel] -> columns[k, pixel] -> sums[channel, row, phase, column] -> x

With a stride, neighbouring pixels of grad meet every stride_w-th column of x: each phase of the columns is a row of its
own in the sums, and they are shuffled together at the end. A block also takes the rows of grad that it shares with the
next one.
"""

from math import prod

import numpy as np
from numba import prange

from tilewise.kernels.cpu.conv_pass import COST, NO_BIAS, image_size
from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.gemm_plan import product_by_blocks
from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.plane_moves import exchange_images
from tilewise.kernels.cpu.row_moves import add_row, clear_row, finish_row
from tilewise.kernels.cpu.scratch import progression, scratch
from tilewise.kernels.cpu.simd import CHANNEL_MR as MR
from tilewise.kernels.cpu.simd import CHANNEL_NV as NV
from tilewise.kernels.cpu.simd import address, lane_count, lanes, micro_kernel
from tilewise.kernels.cpu.vector_move import copy_rows, transpose_square_to

# Channels up to which it pays, without and with a stride. Without: where a convolution of grad leaves too much of its
# tile empty, of 8 rows or of the lanes of one vector (`make bench-peers ARGS='--only "backward.*5x5"'`: 16 channels in
# NHWC). With: that is a convolution for each phase, in NCHW with planes of its own, and always slower.
FEW_CHANNELS = {("NCHW", False): 6, ("NHWC", False): 8, ("NCHW", True): 1 << 30, ("NHWC", True): 8}
# Of more channels than those, the columns of few outputs cost more additions than products.
OUTPUTS = 16
# Outputs whose stage for a panel of pixels, 512 * 48 * 4 = 98 KB, stays in L2 with all else.
MOST_OUTPUTS = 512
# Pixels of grad at a time: their columns for 7x7 taps of 3 channels are 147 * 336 * 4 = 198 KB, their stage for 64
# outputs 86 KB.
PIXELS = 7 * 48
CHUNKS = 8
# The sums of a block of rows and channels; and its k: 448 * 336 * 4 = 602 KB.
SUM_BYTES, MOST_K = 1 << 20, 448
# Pixels of an image of grad up to which images are joined, channels from which on; bytes of their columns at a time.
JOINED_PIXELS, JOINED_CHANNELS, JOINED_BYTES = 16, 16, 2 << 20


def applies(weight, stride, groups, layout):
    """Whether it is faster than a convolution of grad."""
    outputs, channels = weight[:2]
    few = channels <= FEW_CHANNELS[layout, prod(stride) > 1] and (channels <= 8 or outputs >= OUTPUTS)
    return groups == 1 and few and outputs <= MOST_OUTPUTS and prod(weight[2:]) > 1


def plan(n, outputs, grid, weight, size, stride, padding, dilation, channels_last, itemsize):
    """(geometry, taps) for `columns_to_x`. grid: of grad; size: of x.

    taps: (channel, row shift, phase, column shift) of every k.
    """
    channels, kh, kw = weight[1:]
    places = [divmod(s * dilation[1] - padding[1][0], stride[1]) for s in range(kw)]
    low = min(0, *(m for m, _ in places))
    high = max((size[1] - 1) // stride[1], *(m + grid[1] - 1 for m, _ in places))
    taps = [
        (c, r * dilation[0] - padding[0][0], q, m - low) for c in range(channels) for r in range(kh) for m, q in places
    ]
    lane = lane_count(itemsize)
    pitch = -(-(high - low + 1) // lane) * lane + lane
    block = channels
    if channels * kh * kw > MOST_K:
        block = max(MR, MOST_K // (kh * kw) // MR * MR)
    blocks = max(1, min(size[0] // 16, -(-CHUNKS // (n * -(-channels // block)))))
    blocks = max(blocks, -(-block * size[0] * stride[1] * pitch * itemsize // SUM_BYTES))
    rows = -(-size[0] // blocks)
    some = max(1, min(grid[0], PIXELS // grid[1]))
    reach = (kh - 1) * dilation[0]
    geometry = [
        n,
        outputs,
        *grid,
        channels,
        *size,
        *stride,
        padding[0][0],
        reach,
        rows,
        some,
        pitch,
        -low,
        channels_last,
    ]
    return np.array([*geometry, block], np.int64), np.array(taps, np.int64)


@emitted
def _pack_weight(weight, outputs, depth, panels):
    """panels[k // MR * MR * outputs + o * MR + k % MR] = weight[o, k]; 0 beyond."""
    for first in range(0, depth, MR):
        for o in range(outputs):
            for i in range(MR):
                value = weight[o * depth + first + i] if first + i < depth else weight.dtype.type(0)
                panels[first * outputs + o * MR + i] = value


@emitted
def _stage(grad, image, first, pixels, outputs, plane, channels_last, pitch, stage):
    """stage[o * pitch + p] = pixel first + p of output o."""
    width = lanes(grad)
    if not channels_last:
        copy_rows(grad, image * outputs * plane + first, plane, outputs, pixels, stage, 0, pitch)
        return
    start = (image * plane + first) * outputs
    places = progression(pitch, width)
    if pixels < width or outputs < width:
        for p in range(pixels):
            for o in range(outputs):
                stage[o * pitch + p] = grad[start + p * outputs + o]
        return
    for p in range(0, pixels, width):
        p = min(p, pixels - width)
        for o in range(0, outputs, width):
            at = min(o, outputs - width)
            source = address(grad, start + p * outputs + at)
            transpose_square_to(address(stage, at * pitch + p), address(places, 0), source, outputs)


@emitted
def _multiply(panels, start, stage, outputs, depth, pixels, pitch, columns):
    width = NV * lanes(stage)
    for p in range(0, pixels, width):
        vectors = (pixels - p + lanes(stage) - 1) // lanes(stage)
        right = address(stage, p)
        for k in range(0, depth, MR):
            left, c = address(panels, start + k * outputs), address(columns, k * pitch + p)
            if vectors >= NV:
                micro_kernel(MR, NV, left, MR, right, pitch, outputs, c, pitch, MR, width, 0)
            elif vectors == 2:
                micro_kernel(MR, 2, left, MR, right, pitch, outputs, c, pitch, MR, width, 0)
            else:
                micro_kernel(MR, 1, left, MR, right, pitch, outputs, c, pitch, MR, width, 0)


@emitted
def _write(sums, c0, channels, rows, y0, image, geometry, x):
    """Shuffle the phases together: x from the sums of rows y0 .. y0 + rows."""
    h, w, phases, pitch, origin = geometry[5], geometry[6], geometry[8], geometry[13], geometry[14]
    zero = sums.dtype.type(0)
    for c in range(channels):
        for i in range(rows):
            source = ((c * rows + i) * phases) * pitch + origin
            if geometry[15]:
                target = ((image * h + y0 + i) * w) * geometry[4] + c0 + c
                for q in range(phases):
                    for m in range((w - q + phases - 1) // phases):
                        x[target + (m * phases + q) * geometry[4]] = sums[source + q * pitch + m]
                continue
            target = ((image * geometry[4] + c0 + c) * h + y0 + i) * w
            for q in range(phases):
                count = (w - q + phases - 1) // phases
                to, origin_q = address(x, target + q), address(sums, source + q * pitch)
                if phases == 1:
                    finish_row(1, to, origin_q, count, zero, 0, to, 0)
                elif phases == 2:
                    finish_row(2, to, origin_q, count, zero, 0, to, 0)
                else:
                    for m in range(count):
                        x[target + m * phases + q] = sums[source + q * pitch + m]


@emitted
def _block(grad, image, c0, channels, y0, rows, panels, bias, geometry, taps, x):
    """Rows y0 .. y0 + rows of channels c0 .. c0 + channels of an image."""
    outputs, oh, ow, stride_h, phases = geometry[1], geometry[2], geometry[3], geometry[7], geometry[8]
    top, reach, some, pitch = geometry[9], geometry[10], geometry[12], geometry[13]
    width = NV * lanes(grad)
    taps_each = taps.shape[0] // geometry[4]
    depth = taps_each * channels
    length = (some * ow + width - 1) // width * width + lanes(grad)
    stage = scratch(outputs * length, grad)
    columns = scratch((depth + MR - 1) // MR * MR * length, grad)
    sums = scratch(channels * rows * phases * pitch, grad)
    clear_row(address(sums, 0), channels * rows * phases * pitch)
    for c in range(channels if bias.size > 0 else 0):
        for i in range(rows * phases * pitch):
            sums[c * rows * phases * pitch + i] = bias[c0 + c]
    # the rows of grad whose taps meet rows y0 .. y0 + rows of x
    first = max(0, (y0 + top - reach + stride_h - 1) // stride_h)
    last = min(oh, (y0 + rows - 1 + top) // stride_h + 1)
    for i0 in range(first, last, some):
        lines = min(some, last - i0)
        _stage(grad, image, i0 * ow, lines * ow, outputs, oh * ow, geometry[15], length, stage)
        _multiply(
            panels, taps.shape[0] // geometry[4] * c0 * outputs, stage, outputs, depth, lines * ow, length, columns
        )
        for k in range(depth):
            for i in range(lines):
                row = (i0 + i) * stride_h + taps[k, 1] - y0
                if 0 <= row < rows:
                    target = ((taps[k, 0] * rows + row) * phases + taps[k, 2]) * pitch + taps[k, 3]
                    add_row(address(sums, target), address(columns, k * length + i * ow), ow)
    _write(sums, c0, channels, rows, y0, image, geometry, x)


@kernel()
def columns_to_x(grad, weight, x, bias, geometry, taps):
    """x, flat, from grad and the weights (outputs, k), for a `plan`. bias: one number a channel, or empty."""
    n, outputs, channels, h, rows, block = (
        geometry[0], geometry[1], geometry[4], geometry[5], geometry[11], geometry[16],
    )  # fmt: skip
    depth = taps.shape[0]
    panels = scratch((depth + MR - 1) // MR * MR * outputs, grad)
    _pack_weight(weight, outputs, depth, panels)
    row_blocks, blocks = (h + rows - 1) // rows, (channels + block - 1) // block
    for chunk in prange(n * row_blocks * blocks):
        image, c0, y0 = chunk // (row_blocks * blocks), chunk // row_blocks % blocks * block, chunk % row_blocks * rows
        _block(grad, image, c0, min(block, channels - c0), y0, min(rows, h - y0), panels, bias, geometry, taps, x)


class Columns:
    """result = the transposed convolution of grad by weight, plus bias, where `applies` says so."""

    def __init__(self, grad, weight, result, dtype, stride, padding, dilation, layout):
        grid, size = image_size(grad, layout), image_size(result, layout)
        last = layout == "NHWC"
        self.plan = plan(grad[0], weight[0], grid, weight, size, stride, padding, dilation, last, dtype.itemsize)
        self.kernel = columns_to_x.sized(2 * grad[0] * prod(grid) * prod(weight) * COST["gemm"])

    def __call__(self, grad, weight, result, bias):
        self.kernel(grad.ravel(), weight.ravel(), result.reshape(-1), bias, *self.plan)


@kernel()
def add_columns_up(columns, n, channels, kh, kw, grid, size, stride, padding, dilation, bias, x):
    """x[image, c, y, z] = bias[c] + the sum of columns[c, r, s, image, i, j] over the taps (r, s) and pixels (i, j)
    with y = i * stride + r * dilation - padding, and z in the same way. x begins at the first of the n images.
    """
    pixels = grid[0] * grid[1]
    for c in prange(channels):
        for image in range(n):
            start = (image * channels + c) * size[0] * size[1]
            first = bias[c] if bias.size > 0 else x.dtype.type(0)
            for i in range(start, start + size[0] * size[1]):
                x[i] = first
            for tap in range(kh * kw):
                row = ((c * kh * kw + tap) * n + image) * pixels
                top, left = tap // kw * dilation[0] - padding[0], tap % kw * dilation[1] - padding[1]
                for i in range(grid[0]):
                    y = i * stride[0] + top
                    if 0 <= y < size[0]:
                        for j in range(grid[1]):
                            z = j * stride[1] + left
                            if 0 <= z < size[1]:
                                x[start + y * size[1] + z] += columns[row + i * grid[1] + j]


class JoinedColumns:
    """The same in NCHW for images so small that each would leave most of a panel of pixels empty: one product for many.

    Four pixels take a panel of 48 lanes, 32 times four take three: for 512 kernels of 3x3 with stride 2 and images of
    256x4x4, 32 of them take 2.1 ms instead of 7.2 on two threads of Zen 4, one takes 0.4 instead of 1.2. With 16 pixels
    one image takes half as long, 8 or more about as long as before; with 64 pixels 32 take a third longer.
    """

    def __init__(self, grad, weight, result, dtype, stride, padding, dilation):
        self.n, self.pixels, (outputs, channels, *taps) = grad[0], prod(grad[2:]), weight
        self.shape = outputs, channels * prod(taps)
        self.some = max(1, min(self.n, JOINED_BYTES // (self.shape[1] * self.pixels * dtype.itemsize)))
        starts = padding[0][0], padding[1][0]
        self.geometry = (channels, *taps, grad[2:], result[2:], tuple(stride), starts, tuple(dilation))
        work = 1.0 * self.some * self.pixels
        self.join = exchange_images.sized(work * outputs)
        self.add_up = add_columns_up.sized(work * self.shape[1])

    @staticmethod
    def applies(grad, weight, layout):
        """Whether it is faster than `Columns`, where that applies."""
        return layout == "NCHW" and prod(grad[2:]) <= JOINED_PIXELS and weight[1] >= JOINED_CHANNELS

    def __call__(self, grad, weight, result, bias):
        outputs, depth = self.shape
        weight = weight.reshape(outputs, depth)
        for first in range(0, self.n, self.some):
            part = slice(first, min(self.n, first + self.some))
            n = part.stop - first
            joined = np.empty((outputs, n * self.pixels), grad.dtype)
            self.join(grad[part].ravel(), n, outputs, self.pixels, joined.ravel())
            columns = np.empty((depth, n * self.pixels), grad.dtype)
            product = product_by_blocks(depth, n * self.pixels, outputs, False, True, grad.dtype.itemsize)
            product(weight, joined, columns, NO_BIAS[grad.dtype], 0)
            self.add_up(columns.ravel(), n, *self.geometry, bias, result[part].reshape(-1))
