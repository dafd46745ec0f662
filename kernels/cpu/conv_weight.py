"""The gradient of a convolution with respect to its weights: a matrix product that sums over pixels.

    grad_weight[o, k] = sum over images and pixels of grad[o, pixel] * columns[k, pixel],   k = (channel, tap)

The columns are gathered from x in blocks as in the forward pass (conv_nchw.py, conv_nhwc.py), never as a whole matrix.
A chunk owns a block of k for all outputs of a group, so no two chunks add to the same weight; where that gives too few
chunks for several threads, the images are split as well, each part adds up on its own, and the parts are added in
order. The split follows from the problem's shape, so the bits do not depend on the number of threads.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.conv_columns import find_runs, gather_columns
from tilewise.kernels.cpu.conv_nhwc import _segment_bounds, locate_pixels
from tilewise.kernels.cpu.gemm_blocks import multiply_rows, pack_left, pack_right_panel
from tilewise.kernels.cpu.jit import EXACT_ORDER, device, kernel
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import MR, NV, address, lanes
from tilewise.kernels.cpu.vector_move import add_scaled, copy_lanes

# Steps k a chunk: 9 panels of 32, for 256 pixels 295 KB of columns, which L2 holds beside a panel of grad.
WEIGHTS = 288
PIXELS = 256
# Parts of the batch that add up on their own: at most this many copies of the weights.
MAX_PARTS = 8


@device()
def count_parts(n, chunks):
    """Into how many parts to split n images so that there are about 8 chunks."""
    return max(1, min(n, MAX_PARTS, (8 + chunks - 1) // chunks))


@device()
def _columns_of_pixels(
    x, base, h, w, some, tap_rows, tap_columns, stride_h, stride_w, p0, pixels, ow, runs, columns, panels_b
):  # fmt: skip
    """panels_b: pixels p0 .. p0 + pixels down, the k of `some` channels across, in panels of NR."""
    width = lanes(x)
    panel_width = NV * width
    depth = some * tap_rows.size * tap_columns.size
    for t in range(0, pixels, panel_width):
        used = min(panel_width, pixels - t)
        n_runs = find_runs(p0 + t, used, width, NV if used > width else 1, ow, runs)
        gather_columns(
            x, base, h, w, some, tap_rows, tap_columns, stride_h, stride_w, runs, n_runs, columns, 0, panel_width
        )
        for k in range(0, depth, panel_width):
            target = k * pixels + t * panel_width
            pack_right_panel(columns, k * panel_width, 1, panel_width, used, depth - k, panels_b, target)


@device(allocates=True)
def _nchw_chunk(
    x, grad, first_image, last_image, g, groups, channels, c0, some, h, w, outputs, tap_rows, tap_columns,
    stride_h, stride_w, oh, ow, result, start,
):  # fmt: skip
    width = NV * lanes(x)
    taps = tap_rows.size * tap_columns.size
    depth = some * taps
    across = ((depth + width - 1) // width) * width
    columns = scratch((depth + width) * width, x)
    panels_b = scratch(across * PIXELS, x)
    panels_a = scratch((outputs + MR) * PIXELS, x)
    runs = np.empty((width + NV, 5), np.int64)
    accumulate = 0
    for image in range(first_image, last_image):
        base = ((image * groups + g) * channels + c0) * h * w
        for p0 in range(0, oh * ow, PIXELS):
            pixels = min(PIXELS, oh * ow - p0)
            _columns_of_pixels(
                x, base, h, w, some, tap_rows, tap_columns, stride_h, stride_w, p0, pixels, ow, runs, columns, panels_b
            )
            left = (image * groups + g) * outputs * oh * ow + p0
            pack_left(grad, left, oh * ow, 1, outputs, pixels, panels_a, 0)
            multiply_rows(
                panels_a, outputs, panels_b, depth, pixels, result, start + c0 * taps, channels * taps, accumulate
            )
            accumulate = 1


@kernel()
def weight_gradient_nchw(
    x, grad, n, groups, channels, h, w, outputs, tap_rows, tap_columns, stride_h, stride_w, oh, ow, result
):
    """result: (groups * outputs, channels, taps), flat, for x and grad in NCHW; arguments as `conv_nchw.convolve`."""
    taps = tap_rows.size * tap_columns.size
    block = min(channels, max(1, WEIGHTS // max(taps, 1)))
    blocks = (channels + block - 1) // block
    parts = count_parts(n, groups * blocks)
    size = groups * outputs * channels * taps
    sums = result if parts == 1 else np.empty(parts * size, x.dtype)
    for chunk in prange(groups * blocks * parts):
        part = chunk % parts
        c0 = chunk // parts % blocks * block
        g = chunk // (parts * blocks)
        _nchw_chunk(
            x, grad, n * part // parts, n * (part + 1) // parts, g, groups, channels, c0, min(block, channels - c0),
            h, w,
            outputs, tap_rows, tap_columns, stride_h, stride_w, oh, ow, sums,
            part * size + g * outputs * channels * taps,
        )  # fmt: skip
    if parts > 1:
        add_parts(sums, parts, size, result)


@device()
def add_parts(sums, parts, size, result):
    for i in range(size):
        result[i] = sums[i]
    for part in range(1, parts):
        for i in range(size):
            result[i] += sums[part * size + i]


@device()
def _rows_of_pixels(
    x, first_channel, h, w, all_channels, channels, tap_rows, tap_columns, joined, where, pixels, k0, depth,
    offsets, lows, highs, panels_b,
):  # fmt: skip
    """panels_b: pixels down, k0 .. k0 + depth of the k of (tap, channel) across, in panels of NR; MR pixels at a
    time.
    """
    width = lanes(x)
    panel_width = NV * width
    for i in range(((depth + panel_width - 1) // panel_width) * panel_width * pixels):
        panels_b[i] = 0
    segment_taps = tap_columns.size if joined else 1
    length = segment_taps * channels
    per_row = tap_columns.size // segment_taps
    for p in range(0, pixels, MR):
        segment = k0 // length
        while segment * length < k0 + depth:
            row = segment // per_row
            column_offset = tap_columns[(segment - row * per_row) * segment_taps]
            _segment_bounds(
                where[p : p + MR], tap_rows[row], column_offset, segment_taps, channels, h, w, all_channels, offsets,
                lows,
                highs,
            )  # fmt: skip
            shift = segment * length - k0  # the segment's first k within the block; may be negative
            for r in range(min(MR, pixels - p)):
                low = max(lows[r] + shift, 0)
                high = min(highs[r] + shift, depth)
                k = low
                while k < high:
                    lane = k % width
                    vector = k - lane
                    target = vector // panel_width * panel_width * pixels + (p + r) * panel_width + vector % panel_width
                    source = first_channel + offsets[r] + vector - shift
                    copy_lanes(1, 1, address(panels_b, target), address(x, source), lane, high - vector, 1)
                    k = vector + width
            segment += 1


@device(allocates=True)
def _nhwc_chunk(
    x, grad, first_pixel, last_pixel, g, groups, channels, k0, depth, joined, h, w, outputs, tap_rows, tap_columns,
    stride_h, stride_w, oh, ow, result, start,
):  # fmt: skip
    width = NV * lanes(x)
    across = ((depth + width - 1) // width) * width
    panels_b = scratch(across * PIXELS, x)
    panels_a = scratch((outputs + MR) * PIXELS, x)
    where = np.empty((PIXELS + MR, 3), np.int64)
    offsets, lows, highs = np.empty(MR, np.int64), np.empty(MR, np.int64), np.empty(MR, np.int64)
    whole = channels * tap_rows.size * tap_columns.size
    accumulate = 0
    for p0 in range(first_pixel, last_pixel, PIXELS):
        pixels = min(PIXELS, last_pixel - p0)
        locate_pixels(p0, pixels + MR, last_pixel, oh, ow, stride_h, stride_w, where)
        _rows_of_pixels(
            x, g * channels, h, w, groups * channels, channels, tap_rows, tap_columns, joined, where, pixels, k0, depth,
            offsets, lows, highs, panels_b,
        )  # fmt: skip
        all_outputs = groups * outputs
        pack_left(grad, p0 * all_outputs + g * outputs, 1, all_outputs, outputs, pixels, panels_a, 0)
        multiply_rows(panels_a, outputs, panels_b, depth, pixels, result, start + k0, whole, accumulate)
        accumulate = 1


@kernel()
def weight_gradient_nhwc(
    x, grad, n, groups, channels, h, w, outputs, tap_rows, tap_columns, stride_h, stride_w, oh, ow, result
):
    """result: (groups * outputs, taps, channels), flat, for x and grad in NHWC; arguments as `conv_nhwc.convolve`."""
    taps = tap_rows.size * tap_columns.size
    whole = channels * taps
    joined = (
        groups == 1
        and tap_columns.size > 1
        and tap_columns[tap_columns.size - 1] - tap_columns[0] == (tap_columns.size - 1)
    )
    blocks = (whole + WEIGHTS - 1) // WEIGHTS
    parts = count_parts(n, groups * blocks)
    size = groups * outputs * whole
    sums = result if parts == 1 else np.empty(parts * size, x.dtype)
    for chunk in prange(groups * blocks * parts):
        part = chunk % parts
        k0 = chunk // parts % blocks * WEIGHTS
        g = chunk // (parts * blocks)
        _nhwc_chunk(
            x, grad, n * part // parts * oh * ow, n * (part + 1) // parts * oh * ow, g, groups, channels, k0,
            min(WEIGHTS, whole - k0), joined, h, w, outputs, tap_rows, tap_columns, stride_h, stride_w, oh, ow, sums,
            part * size + g * outputs * whole,
        )  # fmt: skip
    if parts > 1:
        add_parts(sums, parts, size, result)


# Partial sums of a channel, added to in explicit vectors: a plain loop is vectorised as the compiler likes, differently
# in the serial and the parallel form, and the bits differ. 128 floats are 8 of the widest vectors.
SUM_LANES = 128


@kernel(fastmath=EXACT_ORDER)
def channel_sums(grad, n, outputs, pixels, sums):
    """sums[o] = sum of grad[:, o, :] for a flat (n, outputs, pixels) array: the gradient of the bias in NCHW."""
    one = grad.dtype.type(1)
    for o in prange(outputs):
        partial = np.zeros(SUM_LANES, grad.dtype)
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
