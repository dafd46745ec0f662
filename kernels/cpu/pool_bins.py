"""Maxima and averages of adaptive bins, forward.

As in pool_windows, the rows of a bin are folded first, in groups, into a row that stays in L1, then that row's columns.
Rows are W * C elements, C = 1 in NCHW.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.pool_fold import (
    MAXIMUM,
    SUM,
    chunk_rows,
    larger,
    max_contiguous,
    move,
    sizes,
    sum_contiguous,
    sum_rows,
)
from tilewise.kernels.cpu.pool_windows import divide
from tilewise.kernels.cpu.scratch import keep
from tilewise.kernels.cpu.simd import address

# Rows folded in one go: each is a stream for the hardware's prefetcher, which follows about 16.
GROUP = 8
# Elements of a bin as wide as the image that are summed before the sum is added to the others'.
BLOCK = 4096


@device(allocates=True)
def bins(n, count):
    """Starts and ends of `count` bins over n pixels: floor(i n / count) and ceil((i + 1) n / count)."""
    starts, ends = np.empty(count, np.int64), np.empty(count, np.int64)
    for i in range(count):
        starts[i] = i * n // count
        ends[i] = ((i + 1) * n + count - 1) // count
    return starts, ends


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
        keep(scratch)

    return rows_of_bins


_max_bins = _rows_of_bins(MAXIMUM, max_contiguous)
_sum_bins = _rows_of_bins(SUM, sum_contiguous)


@device(allocates=True)
def _sum_whole_rows(x, y, tops, bottoms, h_n, w_n, first, last):
    """Bins as wide as the image, in NCHW: contiguous memory, summed in blocks so that rounding errors stay small."""
    out = address(y, 0)
    if tops.size == 1 and h_n * w_n <= BLOCK:
        sum_rows(move(out, first), address(x, first * h_n * w_n), h_n * w_n, last - first, h_n * w_n)
        return
    sums = np.empty(1, y.dtype)
    p = first // tops.size
    o = first - p * tops.size
    for r in range(first, last):
        size = (bottoms[o] - tops[o]) * w_n
        block = address(x, (p * h_n + tops[o]) * w_n)
        sum_rows(move(out, r), block, 0, 1, min(size, BLOCK))
        for start in range(BLOCK, size, BLOCK):
            sum_rows(address(sums, 0), move(block, start), 0, 1, min(size - start, BLOCK))
            out[r] += sums[0]
        o += 1
        if o == tops.size:
            o = 0
            p += 1


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
def adaptive_averages(x, y, nhwc, divisors):
    """divisors: as `divide` takes them."""
    _, h_n, w_n, _ = sizes(x, nhwc)
    planes, oh_n, ow_n, c = sizes(y, nhwc)
    rows, per_chunk = planes * oh_n, chunk_rows(w_n * c * h_n // oh_n)
    tops, bottoms = bins(h_n, oh_n)
    lefts, rights = bins(w_n, ow_n)
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        if ow_n * c == 1:
            _sum_whole_rows(x, y, tops, bottoms, h_n, w_n, first, last)
        else:
            _sum_bins(x, y, tops, bottoms, lefts, rights, h_n, w_n, c, first, last)
        divide(address(y, first * ow_n * c), divisors, first, last - first, ow_n, c)


def bounds(n, count):
    """`bins` in NumPy."""
    i = np.arange(count)
    return i * n // count, ((i + 1) * n + count - 1) // count
