"""Pooling kernels, backward, and unpooling.

Averages: a row of grad_x is a sum of rows of grad, so each chunk gathers its own rows of grad_x. Maxima and unpooling
follow the indices: each chunk owns some planes (in NHWC: some channels of an image), so no two chunks write to the same
place, and the order of the additions is that of the windows whatever the number of threads.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.pool_fold import SUM, fold, move
from tilewise.kernels.cpu.pool_forward import bin_end, bin_start, extents
from tilewise.kernels.cpu.simd import address


@kernel()
def averages_backward(
    g, gx, h_n, w_n, oh_n, ow_n, c, kh, kw, sh, sw, top, bottom, left, right, pad, override, rows, per_chunk
):
    """Gradient of averages of windows; arguments as the forward's, but rows and chunks are those of gx."""
    heights, widths = np.empty(oh_n, g.dtype), np.empty(ow_n, g.dtype)
    extents(heights, h_n, kh, sh, top, bottom, pad, override)
    extents(widths, w_n, kw, sw, left, right, pad, min(override, 1))
    starts_h, ends_h = np.empty(oh_n, np.int64), np.empty(oh_n, np.int64)
    starts_w, ends_w = np.empty(ow_n, np.int64), np.empty(ow_n, np.int64)
    _window_bounds(starts_h, ends_h, h_n, kh, sh, top)
    _window_bounds(starts_w, ends_w, w_n, kw, sw, left)
    for i in range(oh_n):
        heights[i] = 1 / heights[i]
    for i in range(ow_n):
        widths[i] = 1 / widths[i]
    stride = sw if c == 1 else 0
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        _gather_rows(
            g, gx, starts_h, ends_h, heights, starts_w, ends_w, widths, h_n, w_n, c, kw, stride, left, first, last
        )


@kernel()
def adaptive_averages_backward(g, gx, h_n, w_n, oh_n, ow_n, c, rows, per_chunk):
    heights, widths = np.empty(oh_n, g.dtype), np.empty(ow_n, g.dtype)
    starts_h, ends_h = np.empty(oh_n, np.int64), np.empty(oh_n, np.int64)
    starts_w, ends_w = np.empty(ow_n, np.int64), np.empty(ow_n, np.int64)
    for i in range(oh_n):
        starts_h[i], ends_h[i] = bin_start(i, h_n, oh_n), bin_end(i, h_n, oh_n)
        heights[i] = 1 / g.dtype.type(ends_h[i] - starts_h[i])
    for i in range(ow_n):
        starts_w[i], ends_w[i] = bin_start(i, w_n, ow_n), bin_end(i, w_n, ow_n)
        widths[i] = 1 / g.dtype.type(ends_w[i] - starts_w[i])
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        _gather_rows(g, gx, starts_h, ends_h, heights, starts_w, ends_w, widths, h_n, w_n, c, 0, 0, 0, first, last)


@device()
def _window_bounds(starts, ends, n, k, s, low):
    for o in range(starts.size):
        start = o * s - low
        starts[o] = max(start, 0)
        ends[o] = min(start + k, n)


@device()
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
            fold(SUM, 1, out, move(part, left - kw + 1), 1, kw, w_n)
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
                    fold(SUM, 1, move(out, w * c), move(part, near * c), c, far - near, c)
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
            fold(SUM, 1, values, move(part, q - taps + 1), 1, taps, half)
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
def scatter(values, indices, result, outside, planes, count, size, c, channels, blocks, add):
    """result[p, indices[p, o]] += values[p, o], or = with add = 0, over o < count, in `planes` planes of `size` pixels.

    c: channels side by side in a pixel (NHWC; NCHW: 1). A chunk owns `channels` of them in one plane, or, in NCHW,
    `channels` planes. blocks: chunks per plane. An index outside the plane is not written; outside[0] becomes 1.
    """
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
def gather(values, indices, result, outside, planes, count, size, c, per_chunk):
    """result[p, o] = values[p, indices[p, o]] over o < count, in `planes` planes of `size` pixels of c channels."""
    rows = planes * count
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        wrong = 0
        target, where = address(result, 0), address(indices, 0)
        p = first // count
        end = (p + 1) * count
        source = address(values, p * size * c)
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
