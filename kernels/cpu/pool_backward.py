"""Pooling kernels, backward, and unpooling.

Averages: a row of grad_x is a sum of rows of grad, so each chunk gathers its own rows of grad_x. Maxima and unpooling
follow the indices: each chunk owns some planes (in NHWC: some channels of an image), so no two chunks write to the same
place, and the order of the additions is that of the windows whatever the number of threads.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.pool_fold import move, sum_contiguous
from tilewise.kernels.cpu.pool_forward import bin_sizes, bins, chunk_rows, extents, sizes
from tilewise.kernels.cpu.simd import address

# Channels of an NHWC plane that one chunk scatters to, where the batch alone makes too few chunks: two cache lines of
# float32. Fewer would occupy more threads, but each pixel's line is then fetched for little work.
CHANNELS = 32
# A batch of this many images makes chunks enough.
IMAGES = 8


@kernel()
def averages_backward(g, gx, nhwc, kh, kw, sh, sw, top, bottom, left, right, pad, override):
    """Gradient of averages of windows; arguments as the forward's."""
    planes, h_n, w_n, c = sizes(gx, nhwc)
    _, oh_n, ow_n, _ = sizes(g, nhwc)
    rows, per_chunk = planes * h_n, chunk_rows(w_n * c)
    heights = _inverse(extents(g, oh_n, h_n, kh, sh, top, bottom, pad, override))
    widths = _inverse(extents(g, ow_n, w_n, kw, sw, left, right, pad, min(override, 1)))
    starts_h, ends_h = _window_bounds(oh_n, h_n, kh, sh, top)
    starts_w, ends_w = _window_bounds(ow_n, w_n, kw, sw, left)
    stride = sw if c == 1 else 0
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        _gather_rows(
            g, gx, starts_h, ends_h, heights, starts_w, ends_w, widths, h_n, w_n, c, kw, stride, left, first, last
        )


@kernel()
def adaptive_averages_backward(g, gx, nhwc):
    planes, h_n, w_n, c = sizes(gx, nhwc)
    _, oh_n, ow_n, _ = sizes(g, nhwc)
    if oh_n * ow_n * c == 1:
        h_n, w_n = 1, h_n * w_n  # a plane is one bin, so it may as well be one row
    rows, per_chunk = planes * h_n, chunk_rows(w_n * c)
    starts_h, ends_h = bins(h_n, oh_n)
    starts_w, ends_w = bins(w_n, ow_n)
    heights, widths = _inverse(bin_sizes(g, starts_h, ends_h)), _inverse(bin_sizes(g, starts_w, ends_w))
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        _gather_rows(g, gx, starts_h, ends_h, heights, starts_w, ends_w, widths, h_n, w_n, c, 0, 0, 0, first, last)


@device()
def _inverse(sizes):
    for i in range(sizes.size):
        sizes[i] = 1 / sizes[i]
    return sizes


@device(allocates=True)
def _window_bounds(count, n, k, s, low):
    starts, ends = np.empty(count, np.int64), np.empty(count, np.int64)
    for o in range(count):
        start = o * s - low
        starts[o] = max(start, 0)
        ends[o] = min(start + k, n)
    return starts, ends


@device(allocates=True)
def _gather_rows(
    g, gx, starts_h, ends_h, heights, starts_w, ends_w, widths, h_n, w_n, c, kw, stride, left, first, last
):
    """Rows [first, last) of gx from windows that cover pixels [start, end) and weigh heights[i] * widths[j].

        g rows i..i'  -> (weighted sum) ->  part, one value per window column  -> (spread over its pixels) ->  gx row

    stride: that of evenly spaced windows in NCHW, where 1 and 2 have a vector form; 0 where there is none.
    """
    oh_n, ow_n = starts_h.size, starts_w.size
    margin = kw * c  # zeros on both sides of the part, for pixels that fewer than kw windows reach
    scratch = np.zeros(2 * margin + ow_n * c + 2 * w_n + 2, g.dtype)
    part = address(scratch, margin)
    even = address(scratch, 2 * margin + ow_n * c)
    odd = move(even, w_n + 1)
    top = bottom = 0  # the windows that cover row h are [top, bottom)
    p = first // h_n
    h = first - p * h_n
    for r in range(first, last):
        while bottom < oh_n and starts_h[bottom] <= h:
            bottom += 1
        while top < bottom and ends_h[top] <= h:
            top += 1
        _weighted_sum(part, g, p * oh_n + top, bottom - top, heights, top, widths, ow_n, c)
        out = address(gx, r * w_n * c)
        if stride == 1:
            sum_contiguous(out, move(part, left - kw + 1), 1, kw, w_n)
        elif stride == 2:
            _spread_two(out, part, even, odd, kw, left, w_n)
        elif c == 1:
            for w in range(w_n):
                out[w] = 0
            for j in range(ow_n):
                for w in range(starts_w[j], ends_w[j]):
                    out[w] += part[j]
        else:
            near = far = 0  # the windows that cover column w are [near, far)
            for w in range(w_n):
                while far < ow_n and starts_w[far] <= w:
                    far += 1
                while near < far and ends_w[near] <= w:
                    near += 1
                if near < far:
                    sum_contiguous(move(out, w * c), move(part, near * c), c, far - near, c)
                else:
                    for i in range(c):
                        out[w * c + i] = 0
        h += 1
        if h == h_n:
            h = top = bottom = 0
            p += 1


@device()
def _weighted_sum(part, g, row, count, heights, top, widths, ow_n, c):
    """part[j] = widths[j] * (sum over i < count of heights[top + i] * row i of g), each c elements wide."""
    size = ow_n * c
    for k in range(size):
        part[k] = 0
    for i in range(count):
        source = address(g, (row + i) * size)
        weight = heights[top + i]
        for k in range(size):
            part[k] += weight * source[k]
    for j in range(ow_n):
        weight = widths[j]
        for i in range(c):
            part[j * c + i] *= weight


@device()
def _spread_two(out, part, even, odd, kw, left, w_n):
    """out[w] = the sum of part over the windows, two apart, that reach pixel w: two sequences, interleaved.

    Pixel w lies at w + left = 2 q + phase; tap phase + 2 t of window q - t reaches it, where that is a tap.
    """
    half = (w_n + 1) // 2
    q, phase = left // 2, left % 2
    for side in range(2):
        values = odd if side else even
        taps = (kw - phase + 1) // 2
        if taps > 0:
            sum_contiguous(values, move(part, q - taps + 1), 1, taps, half)
        else:
            for i in range(half):
                values[i] = 0
        phase += 1
        if phase == 2:
            phase = 0
            q += 1
    for i in range(w_n // 2):
        out[2 * i] = even[i]
        out[2 * i + 1] = odd[i]
    if w_n % 2:
        out[w_n - 1] = even[half - 1]


@kernel()
def scatter(values, indices, result, outside, nhwc, add):
    """result[p, indices[p, o]] += values[p, o], or = with add = 0, for all o of each plane p; zero elsewhere.

    A chunk owns whole planes, or some channels of an NHWC one. An index outside the plane is not written; outside[0]
    becomes 1.
    """
    planes, h_n, w_n, c = sizes(result, nhwc)
    _, oh_n, ow_n, _ = sizes(values, nhwc)
    size, count = h_n * w_n, oh_n * ow_n
    # `channels` of one plane to a chunk (all of them where the batch alone makes enough chunks), or, in NCHW, planes
    channels = chunk_rows(size) if c == 1 else c if planes >= IMAGES else CHANNELS
    blocks = (c + channels - 1) // channels
    chunks = planes * blocks if c > 1 else (planes + channels - 1) // channels
    for chunk in prange(chunks):
        if c > 1:
            p = chunk // blocks
            low = (chunk - p * blocks) * channels
            _scatter_plane(values, indices, result, outside, p, count, size, c, low, min(low + channels, c), add)
        else:
            for p in range(chunk * channels, min((chunk + 1) * channels, planes)):
                _scatter_plane(values, indices, result, outside, p, count, size, 1, 0, 1, add)


@device()
def _scatter_plane(values, indices, result, outside, p, count, size, c, low, high, add):
    target = address(result, p * size * c)
    source, where = address(values, p * count * c), address(indices, p * count * c)
    if high - low == c:
        for i in range(size * c):
            target[i] = 0
    elif high - low == CHANNELS:
        for i in range(size):
            for k in range(CHANNELS):  # a constant: one or two vector stores, not a call of memset
                target[i * c + low + k] = 0
    else:
        for i in range(size):
            for k in range(low, high):
                target[i * c + k] = 0
    wrong = 0
    for o in range(count):
        for k in range(low, high):
            index = where[o * c + k]
            if 0 <= index < size:
                place = index * c + k
                target[place] = target[place] + source[o * c + k] if add else source[o * c + k]
            else:
                wrong = 1
    if wrong:
        outside[0] = 1  # several chunks may do so, all with the same value


@kernel()
def gather(values, indices, result, outside, nhwc):
    """result[p, o] = values[p, indices[p, o]] for all o of each plane p."""
    _, h_n, w_n, _ = sizes(values, nhwc)
    planes, oh_n, ow_n, c = sizes(indices, nhwc)
    size, count = h_n * w_n, oh_n * ow_n
    rows, per_chunk = planes * count, chunk_rows(c)
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        _gather_pixels(values, indices, result, outside, count, size, c, first, min(first + per_chunk, rows))


@device()
def _gather_pixels(values, indices, result, outside, count, size, c, first, last):
    target, where = address(result, 0), address(indices, 0)
    p = first // count
    end = (p + 1) * count
    source = address(values, p * size * c)
    wrong = 0
    for r in range(first, last):
        if r == end:
            source = move(source, size * c)
            end += count
        for k in range(c):
            index = where[r * c + k]
            if 0 <= index < size:
                target[r * c + k] = source[index * c + k]
            else:
                wrong = 1
    if wrong:
        outside[0] = 1
