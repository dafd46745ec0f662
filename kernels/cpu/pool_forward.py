"""Pooling kernels, forward: maxima and averages of windows and of adaptive bins.

An image is walked as rows of W * C elements: C is 1 in NCHW, where every channel is a plane of its own, and the number
of channels in NHWC. A window's rows are folded first, into one row that stays in L1, then that row's columns:

    3x3, stride 2     x   row 0   a a a a a a a
    rows, then            row 1   b b b b b b b   ->  part  m m m m m m m  ->  y  max(m0 m1 m2)  max(m2 m3 m4) ...
    columns               row 2   c c c c c c c

so that 3 + 3 taps do the work of 9, and the first step, the larger one, runs over contiguous memory.
A chunk is a range of output rows; it writes these rows and nothing else.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.pool_fold import (
    MAXIMUM,
    SUM,
    fold_indexed,
    larger,
    max_contiguous,
    max_every_second,
    move,
    sum_contiguous,
    sum_every_second,
)
from tilewise.kernels.cpu.simd import address
from tilewise.kernels.cpu.vector_move import prefetch

# Elements of the folded row that are worked on at once: 16 KB of float32, half of a small L1.
PART = 4096
# Rows folded in one go: each is a stream for the hardware's prefetcher, which follows about 16.
GROUP = 8
# The distance of prefetching: far enough for the memory's latency (100 ns at 20 GB/s are 2 KB), near enough for L1.
AHEAD = 4096


# Elements that a chunk reads: some tens of microseconds, well above what handing out a chunk costs.
CHUNK = 32768


@device()
def sizes(image, nhwc):
    """(planes, height, width, channels side by side)"""
    a, b, c, d = image.shape
    return (a, b, c, d) if nhwc else (a * b, c, d, 1)


@device()
def chunk_rows(width):
    """How many rows of this many elements make a chunk."""
    return max(CHUNK // max(width, 1), 1)


def _rows_of_windows(operation, contiguous, every_second):
    """The walk over output rows [first, last) for one operation, a literal in the compiled code."""

    @device()
    def spaced(out, part, stride, step, taps, count):
        for i in range(count):
            out[i] = part[i * stride]
        for t in range(1, taps):
            tap = move(part, t * step)
            for i in range(count):
                if operation == MAXIMUM:
                    out[i] = larger(tap[i * stride], out[i])
                else:
                    out[i] += tap[i * stride]

    @device(allocates=True)
    def windows(x, y, empty, h_n, w_n, oh_n, ow_n, c, kh, kw, sh, sw, top, left, dh, dw, first, last):
        """empty: what a tap in the padding counts as: the lowest number, or zero."""
        reach = dw * (kw - 1) + 1
        block = max((PART // c - reach) // sw + 1, 1)
        # one element of slack: taking every second element reads pairs
        scratch = np.empty(((min(block, ow_n) - 1) * sw + reach) * c + 1, x.dtype)
        part = address(scratch, 0)
        cache_line, ahead = 64 // x.itemsize, AHEAD // x.itemsize
        p = first // oh_n
        o = first - p * oh_n
        for r in range(first, last):
            h, taps = o * sh - top, kh
            while h < 0:  # rows in the padding take no part (a loop, as a division would cost more)
                h += dh
                taps -= 1
            while h + (taps - 1) * dh >= h_n:
                taps -= 1
            line = (p * h_n + h) * w_n * c
            following = line + taps * dh * w_n * c + ahead
            for i in range(0, sh * w_n * c, cache_line):
                prefetch(address(x, following + i))
            for start in range(0, ow_n, block):
                count = min(block, ow_n - start)
                w = start * sw - left
                span = (count - 1) * sw + reach
                before = max(-w, 0)
                inside = min(w + span, w_n) - (w + before)
                for i in range(before * c):
                    part[i] = empty
                for i in range((before + inside) * c, span * c):
                    part[i] = empty
                rows = address(x, line + (w + before) * c)
                target = move(part, before * c)
                contiguous(target, rows, dh * w_n * c, taps, inside * c)
                out = address(y, (r * ow_n + start) * c)
                if sw == 1:
                    contiguous(out, part, dw * c, kw, count * c)
                elif c > 1:
                    for i in range(count):
                        contiguous(move(out, i * c), move(part, i * sw * c), dw * c, kw, c)
                elif sw == 2:
                    every_second(out, part, dw, kw, count)
                else:
                    spaced(out, part, sw, dw, kw, count)
            o += 1
            if o == oh_n:
                o = 0
                p += 1

    return windows


_max_windows = _rows_of_windows(MAXIMUM, max_contiguous, max_every_second)
_sum_windows = _rows_of_windows(SUM, sum_contiguous, sum_every_second)


@kernel()
def max_values(x, y, lowest, nhwc, kh, kw, sh, sw, top, left, dh, dw):
    """Maxima of windows; the indices are not computed."""
    _, h_n, w_n, _ = sizes(x, nhwc)
    planes, oh_n, ow_n, c = sizes(y, nhwc)
    rows, per_chunk = planes * oh_n, chunk_rows(w_n * sh * c)
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        _max_windows(x, y, lowest, h_n, w_n, oh_n, ow_n, c, kh, kw, sh, sw, top, left, dh, dw, first, last)


@kernel()
def averages(x, y, nhwc, kh, kw, sh, sw, top, bottom, left, right, pad, override):
    """Averages of windows. pad: whether the divisor counts taps in the padding; override: the divisor, or 0."""
    _, h_n, w_n, _ = sizes(x, nhwc)
    planes, oh_n, ow_n, c = sizes(y, nhwc)
    rows, per_chunk = planes * oh_n, chunk_rows(w_n * sh * c)
    zero = x.dtype.type(0)
    heights = extents(y, oh_n, h_n, kh, sh, top, bottom, pad, override)
    widths = extents(y, ow_n, w_n, kw, sw, left, right, pad, min(override, 1))
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        _sum_windows(x, y, zero, h_n, w_n, oh_n, ow_n, c, kh, kw, sh, sw, top, left, 1, 1, first, last)
        _divide(y, heights, widths, c, first, last)


@device(allocates=True)
def extents(like, count, n, k, s, low, high, pad, override):
    """What the windows along one axis contribute to the divisor: their extent, or an override."""
    sizes = np.empty(count, like.dtype)
    for o in range(count):
        start = o * s - low
        end = min(start + k, n + high)
        if not pad:
            start, end = max(start, 0), min(end, n)
        sizes[o] = override if override else end - start
    return sizes


@device()
def _divide(y, heights, widths, c, first, last):
    ow_n = widths.size
    o = first % heights.size
    for r in range(first, last):
        height = heights[o]
        if c == 1:
            out = address(y, r * ow_n)
            for i in range(ow_n):
                out[i] = out[i] / (height * widths[i])
        else:
            for j in range(ow_n):
                out = address(y, (r * ow_n + j) * c)
                divisor = height * widths[j]
                for i in range(c):
                    out[i] = out[i] / divisor
        o += 1
        if o == heights.size:
            o = 0


@device(allocates=True)
def bins(n, count):
    """Starts and ends of `count` bins over n pixels: floor(i n / count) and ceil((i + 1) n / count)."""
    starts, ends = np.empty(count, np.int64), np.empty(count, np.int64)
    for i in range(count):
        starts[i] = i * n // count
        ends[i] = ((i + 1) * n + count - 1) // count
    return starts, ends


@device(allocates=True)
def bin_sizes(like, starts, ends):
    sizes = np.empty(starts.size, like.dtype)
    for i in range(sizes.size):
        sizes[i] = ends[i] - starts[i]
    return sizes


def _rows_of_bins(operation, contiguous):
    """The walk over output rows of an adaptive pool: a bin's rows are folded in groups, then each bin's columns."""

    @device(allocates=True)
    def rows_of_bins(x, y, tops, bottoms, lefts, rights, h_n, w_n, c, first, last):
        size = w_n * c
        oh_n, ow_n = tops.size, lefts.size
        scratch = np.empty(2 * size, x.dtype)
        part, group = address(scratch, 0), address(scratch, size)
        p = first // oh_n
        o = first - p * oh_n
        for r in range(first, last):
            top, bottom = tops[o], bottoms[o]
            contiguous(part, address(x, (p * h_n + top) * size), size, min(bottom - top, GROUP), size)
            for h in range(top + GROUP, bottom, GROUP):
                contiguous(group, address(x, (p * h_n + h) * size), size, min(bottom - h, GROUP), size)
                for k in range(size):
                    if operation == MAXIMUM:
                        part[k] = larger(group[k], part[k])
                    else:
                        part[k] += group[k]
            for j in range(ow_n):
                left = lefts[j]
                contiguous(address(y, (r * ow_n + j) * c), move(part, left * c), c, rights[j] - left, c)
            o += 1
            if o == oh_n:
                o = 0
                p += 1

    return rows_of_bins


_max_bins = _rows_of_bins(MAXIMUM, max_contiguous)
_sum_bins = _rows_of_bins(SUM, sum_contiguous)


@device()
def _sum_whole_rows(x, y, tops, bottoms, h_n, w_n, first, last):
    """Bins as wide as the image, in NCHW: contiguous memory, summed in blocks so that rounding errors stay small."""
    for r in range(first, last):
        p = r // tops.size
        o = r - p * tops.size
        source = address(x, (p * h_n + tops[o]) * w_n)
        size = (bottoms[o] - tops[o]) * w_n
        total = y.dtype.type(0)
        for start in range(0, size, PART):
            block = move(source, start)
            subtotal = y.dtype.type(0)
            for k in range(min(PART, size - start)):
                subtotal += block[k]
            total += subtotal
        address(y, r)[0] = total


@kernel()
def adaptive_max_values(x, y, nhwc):
    _, h_n, w_n, _ = sizes(x, nhwc)
    planes, oh_n, ow_n, c = sizes(y, nhwc)
    rows, per_chunk = planes * oh_n, chunk_rows(w_n * c * h_n // oh_n)
    tops, bottoms = bins(h_n, oh_n)
    lefts, rights = bins(w_n, ow_n)
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        _max_bins(x, y, tops, bottoms, lefts, rights, h_n, w_n, c, first, min(first + per_chunk, rows))


@kernel()
def adaptive_averages(x, y, nhwc):
    _, h_n, w_n, _ = sizes(x, nhwc)
    planes, oh_n, ow_n, c = sizes(y, nhwc)
    rows, per_chunk = planes * oh_n, chunk_rows(w_n * c * h_n // oh_n)
    tops, bottoms = bins(h_n, oh_n)
    lefts, rights = bins(w_n, ow_n)
    heights, widths = bin_sizes(y, tops, bottoms), bin_sizes(y, lefts, rights)
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        if ow_n * c == 1:
            _sum_whole_rows(x, y, tops, bottoms, h_n, w_n, first, last)
        else:
            _sum_bins(x, y, tops, bottoms, lefts, rights, h_n, w_n, c, first, last)
        _divide(y, heights, widths, c, first, last)


@device()
def _indexed(out, where, source, rows, row_step, columns, column_step, count, index, lane, width, dilation):
    """fold_indexed as a function, compiled once where a kernel uses it in two places."""
    fold_indexed(1, out, where, source, rows, row_step, columns, column_step, count, index, lane, width, dilation)


@kernel()
def max_with_indices(x, y, indices, nhwc, kh, kw, sh, sw, top, left, dh, dw):
    """Maxima of windows, and where they are."""
    _, h_n, w_n, _ = sizes(x, nhwc)
    planes, oh_n, ow_n, c = sizes(y, nhwc)
    rows, per_chunk = planes * oh_n, chunk_rows(w_n * sh * c)
    # The output columns whose windows lie inside the image are done many at a time in NCHW. With stride 2 a pixel must
    # follow the last one, as pixels are read in pairs.
    bulk_first = bulk_last = 0
    room = w_n - (sw - 1) - dw * (kw - 1) - 1 + left
    if c == 1 and sw <= 2 and room >= 0:
        bulk_first = min((left + sw - 1) // sw, ow_n)
        bulk_last = max(min(room // sw + 1, ow_n), bulk_first)
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        for r in range(chunk * per_chunk, min((chunk + 1) * per_chunk, rows)):
            _indexed_windows(
                x, y, indices, r, h_n, w_n, oh_n, ow_n, c, kh, kw, sh, sw, top, left, dh, dw, bulk_first, bulk_last
            )


@device()
def _indexed_windows(
    x, y, indices, r, h_n, w_n, oh_n, ow_n, c, kh, kw, sh, sw, top, left, dh, dw, bulk_first, bulk_last
):
    p = r // oh_n
    h, taps = (r - p * oh_n) * sh - top, kh
    while h < 0:
        h += dh
        taps -= 1
    while h + (taps - 1) * dh >= h_n:
        taps -= 1
    row_step, width = dh * w_n * c, dh * w_n
    if bulk_first < bulk_last:
        o, count = bulk_first, bulk_last - bulk_first
        w = o * sw - left
        out, where = address(y, r * ow_n + o), address(indices, r * ow_n + o)
        source, index = address(x, (p * h_n + h) * w_n + w), h * w_n + w
        if sw == 1:
            _indexed(out, where, source, taps, row_step, kw, dw, count, index, 1, width, dw)
        else:
            fold_indexed(2, out, where, source, taps, row_step, kw, dw, count, index, 2, width, dw)
    for o in range(ow_n):
        if bulk_first <= o < bulk_last:
            continue
        w, columns = o * sw - left, kw
        while w < 0:
            w += dw
            columns -= 1
        while w + (columns - 1) * dw >= w_n:
            columns -= 1
        out, where = address(y, (r * ow_n + o) * c), address(indices, (r * ow_n + o) * c)
        source, index = address(x, ((p * h_n + h) * w_n + w) * c), h * w_n + w
        _indexed(out, where, source, taps, row_step, columns, dw * c, c, index, 0, width, dw)


@kernel()
def adaptive_max_with_indices(x, y, indices, nhwc):
    _, h_n, w_n, _ = sizes(x, nhwc)
    planes, oh_n, ow_n, c = sizes(y, nhwc)
    rows, per_chunk = planes * oh_n, chunk_rows(w_n * c * h_n // oh_n)
    tops, bottoms = bins(h_n, oh_n)
    lefts, rights = bins(w_n, ow_n)
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        for r in range(chunk * per_chunk, min((chunk + 1) * per_chunk, rows)):
            _indexed_bins(x, y, indices, r, tops, bottoms, lefts, rights, h_n, w_n, c)


@device()
def _indexed_bins(x, y, indices, r, tops, bottoms, lefts, rights, h_n, w_n, c):
    p = r // tops.size
    o = r - p * tops.size
    top, height = tops[o], bottoms[o] - tops[o]
    for j in range(lefts.size):
        left, width = lefts[j], rights[j] - lefts[j]
        place = (r * lefts.size + j) * c
        source, index = address(x, ((p * h_n + top) * w_n + left) * c), top * w_n + left
        out, where = address(y, place), address(indices, place)
        _indexed(out, where, source, height, w_n * c, width, c, c, index, 0, w_n, 1)
