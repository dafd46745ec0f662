"""Gradient of maxima, and unpooling: what follows indices.

Each chunk owns some planes (in NHWC: some channels of an image), so no two chunks write to the same place, and the
order of the additions is that of the windows whatever the number of threads.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.pool_fold import chunk_rows, move, sizes
from tilewise.kernels.cpu.simd import address

# Channels of an NHWC plane that one chunk scatters to, where the batch alone makes too few chunks: two cache lines of
# float32. Fewer would occupy more threads, but each pixel's line is then fetched for little work.
CHANNELS = 32
# A batch of this many images makes chunks enough.
IMAGES = 8
# Elements of the result that small NCHW planes are zeroed together for: 8 KB of float32.
GROUP = 2048


@kernel()
def scatter(values, indices, result, nhwc, add):
    """result[p, indices[p, o]] += values[p, o], or = with add = 0, for all o of each plane p; zero elsewhere.

    A chunk owns whole planes, or some channels of an NHWC one. Returns how many chunks met an index outside the plane,
    which is not written.
    """
    planes, h_n, w_n, c = sizes(result, nhwc)
    _, oh_n, ow_n, _ = sizes(values, nhwc)
    size, count = h_n * w_n, oh_n * ow_n
    # `channels` of one plane to a chunk (all of them where the batch alone makes enough chunks), or, in NCHW, planes
    channels = chunk_rows(size) if c == 1 else c if planes >= IMAGES else CHANNELS
    blocks = (c + channels - 1) // channels
    chunks = planes * blocks if c > 1 else (planes + channels - 1) // channels
    wrong = np.zeros(chunks, np.int64)
    group = max(GROUP // max(size, 1), 1)
    for chunk in prange(chunks):
        if c > 1:
            p = chunk // blocks
            low = (chunk - p * blocks) * channels
            wrong[chunk] = _scatter_channels(
                values, indices, result, p, count, size, c, low, min(low + channels, c), add
            )
        else:
            last = min((chunk + 1) * channels, planes)
            for p in range(chunk * channels, last, group):
                wrong[chunk] |= _scatter_planes(values, indices, result, p, min(group, last - p), count, size, add)
    total = 0
    for chunk in range(chunks):
        total += wrong[chunk]
    return total


@device()
def _scatter_planes(values, indices, result, p, planes, count, size, add):
    """Some NCHW planes."""
    target, source, where = address(result, p * size), address(values, p * count), address(indices, p * count)
    for i in range(planes * size):
        target[i] = 0
    limit, wrong = np.uint64(size), 0
    for _ in range(planes):
        for o in range(count):
            index = where[o]
            if np.uint64(index) >= limit:
                wrong = 1
            elif add:
                target[index] += source[o]
            else:
                target[index] = source[o]
        target, source, where = move(target, size), move(source, count), move(where, count)
    return wrong


@device()
def _scatter_channels(values, indices, result, p, count, size, c, low, high, add):
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
    return wrong


@kernel()
def gather(values, indices, result, nhwc):
    """result[p, o] = values[p, indices[p, o]] for all o of each plane p. Returns as `scatter` does."""
    _, h_n, w_n, _ = sizes(values, nhwc)
    planes, oh_n, ow_n, c = sizes(indices, nhwc)
    size, count = h_n * w_n, oh_n * ow_n
    rows, per_chunk = planes * count, chunk_rows(c)
    chunks = (rows + per_chunk - 1) // per_chunk
    wrong = np.zeros(chunks, np.int64)
    for chunk in prange(chunks):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        wrong[chunk] = _gather_pixels(values, indices, result, count, size, c, first, last)
    total = 0
    for chunk in range(chunks):
        total += wrong[chunk]
    return total


@device()
def _gather_pixels(values, indices, result, count, size, c, first, last):
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
    return wrong
