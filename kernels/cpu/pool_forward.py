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
from tilewise.kernels.cpu.pool_fold import MAXIMUM, SUM, fold, fold_indexed, larger, move
from tilewise.kernels.cpu.simd import address
from tilewise.kernels.cpu.vector_move import prefetch

# Elements of the folded row that are worked on at once: 16 KB of float32, half of a small L1.
PART = 4096
# Rows folded in one go: each is a stream for the hardware's prefetcher, which follows about 16.
GROUP = 8
# The distance of prefetching: far enough for the memory's latency (100 ns at 20 GB/s are 2 KB), near enough for L1.
AHEAD = 4096


def _rows_of_windows(operation):
    """The walk over output rows [first, last) for one operation, a literal in the compiled code."""

    @device()
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
                if taps == 3:  # a constant number of taps is unrolled
                    fold(operation, 1, target, rows, dh * w_n * c, 3, inside * c)
                else:
                    fold(operation, 1, target, rows, dh * w_n * c, taps, inside * c)
                out = address(y, (r * ow_n + start) * c)
                if sw == 1:
                    fold(operation, 1, out, part, dw * c, kw, count * c)
                elif sw == 2 and c == 1:
                    if kw == 3 and dw == 1:
                        fold(operation, 2, out, part, 1, 3, count)
                    else:
                        fold(operation, 2, out, part, dw, kw, count)
                else:
                    for i in range(count):
                        fold(operation, 1, move(out, i * c), move(part, i * sw * c), dw * c, kw, c)
            o += 1
            if o == oh_n:
                o = 0
                p += 1

    return windows


_max_windows = _rows_of_windows(MAXIMUM)
_sum_windows = _rows_of_windows(SUM)


@kernel()
def max_values(x, y, lowest, h_n, w_n, oh_n, ow_n, c, kh, kw, sh, sw, top, left, dh, dw, rows, per_chunk):
    """Maxima of windows over `rows` output rows in all; the indices are not computed."""
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        _max_windows(x, y, lowest, h_n, w_n, oh_n, ow_n, c, kh, kw, sh, sw, top, left, dh, dw, first, last)


@kernel()
def averages(
    x, y, zero, h_n, w_n, oh_n, ow_n, c, kh, kw, sh, sw, top, bottom, left, right, pad, override, rows, per_chunk
):
    """Averages of windows. pad: whether the divisor counts taps in the padding; override: the divisor, or 0."""
    heights = np.empty(oh_n, y.dtype)
    widths = np.empty(ow_n, y.dtype)
    extents(heights, h_n, kh, sh, top, bottom, pad, override)
    extents(widths, w_n, kw, sw, left, right, pad, min(override, 1))
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        _sum_windows(x, y, zero, h_n, w_n, oh_n, ow_n, c, kh, kw, sh, sw, top, left, 1, 1, first, last)
        _divide(y, heights, widths, c, first, last)


@device()
def extents(sizes, n, k, s, low, high, pad, override):
    """What the windows along one axis contribute to the divisor: their extent, or an override."""
    for o in range(sizes.size):
        start = o * s - low
        end = min(start + k, n + high)
        if not pad:
            start, end = max(start, 0), min(end, n)
        sizes[o] = override if override else end - start


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


@device()
def bin_start(i, n, count):
    return i * n // count


@device()
def bin_end(i, n, count):
    return ((i + 1) * n + count - 1) // count


def _rows_of_bins(operation):
    """The walk over output rows of an adaptive pool: a bin's rows are folded in groups, then each bin's columns."""

    @device()
    def bins(x, y, h_n, w_n, oh_n, ow_n, c, first, last):
        size = w_n * c
        scratch = np.empty(2 * size, x.dtype)
        part, group = address(scratch, 0), address(scratch, size)
        for r in range(first, last):
            p = r // oh_n
            i = r - p * oh_n
            top, bottom = bin_start(i, h_n, oh_n), bin_end(i, h_n, oh_n)
            line = address(x, (p * h_n + top) * size)
            fold(operation, 1, part, line, size, min(bottom - top, GROUP), size)
            for h in range(top + GROUP, bottom, GROUP):
                line = address(x, (p * h_n + h) * size)
                fold(operation, 1, group, line, size, min(bottom - h, GROUP), size)
                if operation == MAXIMUM:
                    for k in range(size):
                        part[k] = larger(group[k], part[k])
                else:
                    for k in range(size):
                        part[k] += group[k]
            for j in range(ow_n):
                left, right = bin_start(j, w_n, ow_n), bin_end(j, w_n, ow_n)
                out = address(y, (r * ow_n + j) * c)
                fold(operation, 1, out, move(part, left * c), c, right - left, c)

    return bins


_max_bins = _rows_of_bins(MAXIMUM)
_sum_bins = _rows_of_bins(SUM)


@kernel()
def adaptive_max_values(x, y, h_n, w_n, oh_n, ow_n, c, rows, per_chunk):
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        _max_bins(x, y, h_n, w_n, oh_n, ow_n, c, first, min(first + per_chunk, rows))


@kernel()
def adaptive_averages(x, y, h_n, w_n, oh_n, ow_n, c, rows, per_chunk):
    heights = np.empty(oh_n, y.dtype)
    widths = np.empty(ow_n, y.dtype)
    for i in range(oh_n):
        heights[i] = bin_end(i, h_n, oh_n) - bin_start(i, h_n, oh_n)
    for j in range(ow_n):
        widths[j] = bin_end(j, w_n, ow_n) - bin_start(j, w_n, ow_n)
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        _sum_bins(x, y, h_n, w_n, oh_n, ow_n, c, first, last)
        _divide(y, heights, widths, c, first, last)


@kernel()
def max_with_indices(
    x, y, indices, h_n, w_n, oh_n, ow_n, c, kh, kw, sh, sw, top, left, dh, dw, bulk_first, bulk_last, rows, per_chunk
):
    """Maxima of windows, and where they are.

    bulk_first, bulk_last: the output columns whose windows lie inside the image, done many at a time in NCHW.
    """
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        for r in range(first, last):
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
                    fold_indexed(1, out, where, source, taps, row_step, kw, dw, count, index, 1, width, dw)
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
                fold_indexed(1, out, where, source, taps, row_step, columns, dw * c, c, index, 0, width, dw)


@kernel()
def adaptive_max_with_indices(x, y, indices, h_n, w_n, oh_n, ow_n, c, rows, per_chunk):
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        for r in range(first, min(first + per_chunk, rows)):
            p = r // oh_n
            i = r - p * oh_n
            top, bottom = bin_start(i, h_n, oh_n), bin_end(i, h_n, oh_n)
            for j in range(ow_n):
                left, right = bin_start(j, w_n, ow_n), bin_end(j, w_n, ow_n)
                out, where = address(y, (r * ow_n + j) * c), address(indices, (r * ow_n + j) * c)
                source, index = address(x, ((p * h_n + top) * w_n + left) * c), top * w_n + left
                fold_indexed(1, out, where, source, bottom - top, w_n * c, right - left, c, c, index, 0, w_n, 1)
