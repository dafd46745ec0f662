"""3x3 depthwise convolution with stride 1 and one pixel of padding, where the image lies: see depthwise_slide.py.

Most depthwise layers are of this kind. Against strips and regions (conv_depthwise.py), which serve all others, 8 images
of 512 channels and 14x14 pixels take 0.16 ms for 0.43 in NCHW, and 0.25 for 0.48 in NHWC (Zen 4, a thread;
`make bench-peers ARGS='--batch 8 --only dw7'` prints the former).
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.conv_depthwise_nchw import CHUNKS, FEWEST, ceil_ratio
from tilewise.kernels.cpu.depthwise_slide import slide_plane, slide_products, tile_pixels
from tilewise.kernels.cpu.depthwise_strip import clear, step
from tilewise.kernels.cpu.depthwise_vector import sum_of_lanes
from tilewise.kernels.cpu.epilogue import activate_row
from tilewise.kernels.cpu.jit import EXACT_ORDER, device, kernel
from tilewise.kernels.cpu.row_moves import copy_lines
from tilewise.kernels.cpu.scratch import ALIGNMENT, keep, scratch
from tilewise.kernels.cpu.simd import VECTOR_BYTES, address, lanes, settle_stores

# The tile in NHWC. AVX-512's 32 registers hold 9 weights, 8 sums and a few inputs; of 16, four sums fit.
ROWS, COLUMNS = 2 if VECTOR_BYTES == 64 else 1, 4
WHOLE_LINES = VECTOR_BYTES == ALIGNMENT  # vectors are, which alone are written past the caches
# Bytes of the planes whose columns are computed together.
GROUP_BYTES = 8 << 10
# NHWC: from one pixel to the next is a power of two in the usual networks. From FAR_APART bytes on, a tile's pixels
# compete for two of the first-level cache's 64 sets; so COPIED_BYTES of each are copied together first, of as many rows
# as stay in the second-level cache.
FAR_APART, COPIED_BYTES, COPY_ROOM = 2048, 256, 256 << 10


def is_same(taps, stride, outputs, x_size, y_size):
    """Whether these kernels serve a convolution; taps: as for Depthwise."""
    phases = [len(axis) for axis in taps]
    near = all(offsets.tolist() == [-1, 0, 1] for axis in taps for _, offsets in axis)
    return (
        phases == [1, 1]
        and near
        and tuple(stride) == (1, 1)
        and outputs == 1
        and x_size == y_size
        and x_size[1] >= COLUMNS
    )


def tap_numbers(taps, kernel_width):
    """Which weight tap (r, s) has, rows of taps first."""
    (rows, _), (columns, _) = (axis[0] for axis in taps)
    return (rows[:, None] * kernel_width + columns).astype(np.int64).ravel()


def planes_together(size, dtype):
    return max(1, GROUP_BYTES // (size[0] * size[1] * dtype.itemsize))


def channels_copied(channels, dtype):
    """How many channels are copied together; all of them, so none, where pixels are near or blocks do not divide."""
    block = COPIED_BYTES // dtype.itemsize
    return block if channels * dtype.itemsize >= FAR_APART and channels % block == 0 else channels


def channel_cuts(images, size, channels, dtype):
    """(bands of rows, channels that are copied together) in NHWC; None where copying does not pay."""
    block = channels_copied(channels, dtype)
    if block == channels:
        return None
    bands = max(ceil_ratio(FEWEST, images), ceil_ratio(size[0] * size[1] * COPIED_BYTES, COPY_ROOM))
    return min(bands, ceil_ratio(size[0], 2 * ROWS)), block


def whole_tiles(images, height, bands):
    """At most `bands` bands of whole tiles in NHWC; of two, as each reads the rows around it, if that leaves enough."""
    tiles = ceil_ratio(height, ROWS)
    halves = ceil_ratio(tiles, 2)
    return min(bands, halves if images * halves >= FEWEST else tiles)


@kernel()
def convolve_same_nchw(x, weight, y, bias, planes, channels, h, w, numbers, group, activation):
    """numbers: which weight tap (r, s) has; group: planes whose vectors of the same columns follow each other."""
    shift = bias if bias.size > 0 else np.zeros(channels, x.dtype)
    width = lanes(x)
    chunks = min((planes + group - 1) // group, CHUNKS)
    for chunk in prange(chunks):
        for first in range(planes * chunk // chunks, planes * (chunk + 1) // chunks, group):
            end = min(first + group, planes * (chunk + 1) // chunks)
            for j in range(0, w, width):
                column = max(min(j, w - width), 0)  # the last two vectors of a row overlap
                for plane in range(first, end):
                    c, place = plane % channels, plane * h * w + column
                    slide_plane(
                        address(x, place), column, w, address(numbers, 0), address(weight, c * 9), address(shift, c),
                        address(y, place), h,
                    )  # fmt: skip
            if activation != 0:
                activate_row(y, first * h * w, (end - first) * h * w, activation)


@device()
def _band(h, bands, band):
    """(the first row of a band, its end); all but the last band have whole tiles."""
    tiles = (h + ROWS - 1) // ROWS
    return tiles * band // bands * ROWS, min(tiles * (band + 1) // bands * ROWS, h)


@device()
def _tile_rows(x, row, pixel, rows, above, below, zeros, w, weights, bias, y, y_row, y_pixel, count, past):
    """`rows` rows of y, at least one, from x's, of which there may be one above and one below.

    Tests of constants come first: Numba leaves out what they rule out.
    """
    for i in range(0, rows, ROWS):
        before = 1 if i > 0 else above
        after = 1 if i + ROWS < rows else below
        for start in range(0, w, COLUMNS):
            j = min(start, w - COLUMNS)  # the last two tiles overlap
            source, target = step(x, i * row + j * pixel), step(y, i * y_row + j * y_pixel)
            left, right = min(j, 1), min(w - j - COLUMNS, 1)
            if ROWS > 1 and i + ROWS > rows:
                tile_pixels(
                    1, COLUMNS, 0, source, row, pixel, before, after, left, right, zeros, weights, bias, target, y_row,
                    y_pixel, count,
                )  # fmt: skip
            elif WHOLE_LINES and past:
                tile_pixels(
                    ROWS, COLUMNS, 2, source, row, pixel, before, after, left, right, zeros, weights, bias, target,
                    y_row, y_pixel, count,
                )  # fmt: skip
            elif pixel == y_pixel:
                tile_pixels(
                    ROWS, COLUMNS, 1, source, row, pixel, before, after, left, right, zeros, weights, bias, target,
                    y_row, y_pixel, count,
                )  # fmt: skip
            else:
                tile_pixels(
                    ROWS, COLUMNS, 0, source, row, pixel, before, after, left, right, zeros, weights, bias, target,
                    y_row, y_pixel, count,
                )  # fmt: skip


@kernel()
def convolve_same_nhwc(x, weight, y, bias, n, channels, h, w, numbers, bands, block, activation, past):
    """The same in NHWC; w is at least COLUMNS. block: channels that are copied together first; all: nothing is."""
    width = lanes(x)
    shift = bias if bias.size > 0 else np.zeros(channels, x.dtype)
    packed = scratch((channels + width - 1) // width * width * 9, x)
    for c in range(channels):
        for t in range(9):
            packed[(c // width * 9 + t) * width + c % width] = weight[c * 9 + numbers[t]]
    row = w * channels
    units = n * bands
    chunks = min(units, CHUNKS)
    copied = ((h + ROWS - 1) // ROWS + bands - 1) // bands * ROWS + 2 if block < channels else 0
    for chunk in prange(chunks):
        nothing_memory = scratch((COLUMNS + 2) * block, x)
        nothing_memory[:] = 0
        band_memory = scratch(copied * w * block, x)
        for unit in range(units * chunk // chunks, units * (chunk + 1) // chunks):
            image = unit // bands
            band = unit - image * bands
            i0, i1 = _band(h, bands, band)
            above, below = min(i0, 1), min(h - i1, 1)
            first, count = (image * h + i0) * row, (i1 - i0) * row
            for c in range(0, channels, block):
                some = min(block, channels - c)
                source, x_row, pixel = address(x, first + c), row, channels
                if copied > 0:
                    x_row, pixel, source = w * block, block, address(band_memory, above * w * block)
                    where = address(x, first - above * row + c)
                    copy_lines(
                        1, address(band_memory, 0), block, 0, where, channels, some, (above + i1 - i0 + below) * w
                    )
                _tile_rows(
                    source, x_row, pixel, i1 - i0, above, below, address(nothing_memory, 0), w, address(packed, c * 9),
                    address(shift, c), address(y, first + c), row, channels, some, past,
                )  # fmt: skip
            if activation != 0:
                activate_row(y, first, count, activation)
        if past:
            settle_stores()
        keep(nothing_memory)
        keep(band_memory)


@device(fastmath=EXACT_ORDER)
def add_parts(sums, parts, size):
    """The parts' sums, in order, into the first."""
    for part in range(1, parts):
        for i in range(size):
            sums[i] += sums[part * size + i]


@device(fastmath=EXACT_ORDER)
def sum_lanes(sums, totals, channels, all_taps, width):
    """Each channel's sums of all_taps taps and of grad, from ten vectors of them."""
    for c in range(channels):
        for t in range(all_taps):
            sums[c * (all_taps + 1) + t] = sum_of_lanes(step(totals, (c * 10 + t) * width))
        sums[c * (all_taps + 1) + all_taps] = sum_of_lanes(step(totals, (c * 10 + 9) * width))


@device(fastmath=EXACT_ORDER)
def write_gradients(sums, parts, channels, all_taps, result, bias):
    size = all_taps + 1
    add_parts(sums, parts, channels * size)
    for c in range(channels):
        for t in range(all_taps):
            result[c * all_taps + t] = sums[c * size + t]
        bias[c] = sums[c * size + all_taps]


@kernel(fastmath=EXACT_ORDER)
def weight_gradient_same_nchw(x, grad, result, bias, n, channels, h, w, numbers, all_taps, blocks, parts):
    """result: (channels, 9), bias: (channels), flat; h is at least 2. all_taps: 0 for the bias alone."""
    width, size = lanes(x), all_taps + 1
    sums = np.empty(parts * channels * size, x.dtype)
    for chunk in prange(blocks * parts):
        part = chunk % parts
        block = chunk // parts
        first, count = channels * block // blocks, channels * (block + 1) // blocks - channels * block // blocks
        totals = scratch(count * 10 * width, x)
        clear(address(totals, 0), count * 10 * width)
        # Image after image, whose planes lie one behind the other: what is asked for ahead is what comes next.
        for image in range(n * part // parts, n * (part + 1) // parts):
            for c in range(count):
                plane, into = ((image * channels) + first + c) * h * w, address(totals, c * 10 * width)
                for j in range(0, w, width):
                    if all_taps > 0:
                        slide_products(
                            9, into, address(x, plane + j), address(grad, plane + j), j, w, address(numbers, 0), h
                        )
                    else:
                        slide_products(
                            0, into, address(x, plane + j), address(grad, plane + j), j, w, address(numbers, 0), h
                        )
        sum_lanes(address(sums, (part * channels + first) * size), address(totals, 0), count, all_taps, width)
        keep(totals)
    write_gradients(sums, parts, channels, all_taps, result, bias)
