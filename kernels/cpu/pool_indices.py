"""Maxima of windows and of adaptive bins with their indices, forward."""

from numba import prange

from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.pool_bins import bins
from tilewise.kernels.cpu.pool_fold import chunk_rows, fold_indexed, sizes
from tilewise.kernels.cpu.simd import address


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
