"""Maxima and averages of windows, forward.

An image is walked as rows of W * C elements: C is 1 in NCHW, where every channel is a plane of its own, and the number
of channels in NHWC. A window's rows are folded first, into a row that stays in L1, then that row's columns:

    3x3, stride 2     x   row 0   a a a a a a a
    rows, then            row 1   b b b b b b b   ->  part  m m m m m m m  ->  y  max(m0 m1 m2)  max(m2 m3 m4) ...
    columns               row 2   c c c c c c c

so that 3 + 3 taps do the work of 9, and the first step, the larger one, runs over contiguous memory. Many rows take the
first step before the second one begins: a vector that is read across two vectors just written waits for both, and
short rows, which are most of a network's, cost more in calls and branches than in arithmetic.

A chunk is a range of output rows; it writes these rows and nothing else. Everything that follows from the shapes alone
is in `plan`, an array of integers made once per signature (`plan_of`).
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu import pool_planes, pool_quads
from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.pool_fold import MAXIMA, SUMS, fill_rows, move
from tilewise.kernels.cpu.scratch import keep, scratch
from tilewise.kernels.cpu.simd import address, fused, lane_count

# Bytes of a block of a folded row, a third of L1; and of half of what is worked on at once: the folded rows of a
# group, and what they are folded from.
PART = 16384
# Bytes to prefetch ahead of the second row of a window, or of its last one where windows move by one: far enough for
# memory's latency (100 ns at 20 GB/s are 2 KB), near enough for L1. Of NCHW's short rows, of which processors fetch few
# ahead, those of the next windows are asked for in the order of the memory where windows move by two, which is faster
# than asking for both rows of a window side by side (`make bench-peers ARGS='--only "pool forward"'`, ResNet's pool1,
# Zen 4). In NHWC that gains nothing.
AHEAD = 4096
# Elements that a chunk reads: some tens of microseconds, well above what handing out a chunk costs.
CHUNK = 32768

# The fields of a plan. OH: of a plane; ROWS: output rows of all planes; PER_CHUNK: of a chunk. From INNER_FIRST to
# INNER_LAST - 1: the output rows of a plane whose windows lie inside it. READABLE: the output rows whose windows' rows
# can be read in whole vectors without leaving x. OVERSHOOT: the last rows of a chunk, whose whole vectors would write
# behind it. BLOCK: output columns done at once; PITCH, GROUP: the distance of folded rows, and how many are folded down
# before they are folded across. FLAT: windows follow each other through all folded rows without a gap. SMALL: if not 0,
# averages are left to pool_planes, a row of windows is so many vectors, and chunks own whole planes. QUADS: all is left
# to pool_quads.
(
    ROWS, PER_CHUNK, H, W, OH, OW, C, KH, KW, SH, SW, TOP, LEFT, DH, DW, INNER_FIRST, INNER_LAST,
    READABLE, OVERSHOOT, BLOCK, PITCH, GROUP, FLAT, SMALL, QUADS,
) = range(25)  # fmt: skip


def plan_of(x_shape, y_shape, itemsize, layout, kernel_size, stride, padding, dilation):
    """What the kernels need to know of one signature, as an array."""
    nhwc, starts = layout == "NHWC", (padding[0][0], padding[1][0])
    return np.array(plan_fields(x_shape, y_shape, itemsize, nhwc, kernel_size, stride, starts, dilation), np.int64)


def plan_fields(x_shape, y_shape, itemsize, nhwc, kernel_size, stride, starts, dilation):
    """The fields of a plan; Python for Numba, too (njit/pool.py). starts: padding at the top and on the left."""
    (kh, kw), (sh, sw), (dh, dw), lanes = kernel_size, stride, dilation, lane_count(itemsize)
    top, left = starts
    (n, a, b, d), (_, e, f, g) = x_shape, y_shape
    planes, h, w, oh, ow, c = (n, a, b, e, f, d) if nhwc else (n * a, b, d, f, g, 1)
    quads = pool_quads.serves((h, w), (oh, ow), c, kernel_size, stride, starts, dilation, itemsize)
    if planes and top == 0 and dh * (kh - 1) < sh and h == oh * sh:
        planes, h, oh = 1, planes * h, planes * oh  # windows apart: planes are one tall plane
    rows, tall = planes * oh, dh * (kh - 1) + 1
    inner_first = min(-(-top // sh), oh)
    inner_last = max(min((h + top - tall) // sh + 1, oh), inner_first) if h + top >= tall else inner_first
    reach = dw * (kw - 1) + 1
    block = min(max((PART // itemsize // c - reach) // sw + 1, 1), ow)
    span = (block - 1) * sw + reach
    flat = c == 1 and left == 0 and reach <= sw and block == ow and span <= w
    if flat:
        pitch = ow * sw
    elif block < ow:
        pitch = _rounded(span * c, lanes) + (left + 1) * c + lanes
    else:  # whole vectors of a folded row, or of the padding behind it, do not reach the next one
        inside = min(span - left, w)
        padded = _rounded((span - left - inside) * c, lanes)
        pitch = left * c + max(_rounded(inside * c, lanes), inside * c + padded)
    # Whole vectors reach beyond a row of x, and of y; beyond the end of a block, by an unknown part of a vector.
    longest, unit = min(span, w) * c, c if c > 1 and sw > 1 else block * c
    cut = block < ow
    excess = lanes - 1 if cut else _rounded(longest, lanes) - longest
    full, rest = divmod(-(-excess // (w * c)), h)  # planes, and rows of one, whose reading may go too far
    reading = oh - min(max(-(-(h - rest + top - tall + 1) // sh), 0), oh) if rest else 0
    readable = max(rows - full * oh - reading, 0)
    overshoot = -(-(lanes - 1 if cut else _rounded(unit, lanes) - unit) // (ow * c))
    footprint = sh * w * c + pitch * (2 if sw > 2 else 1)
    group = max(min(rows, 2 * PART // itemsize // max(footprint, 1)), 1) if block == ow else 1
    per_chunk = max(CHUNK // max(w * sh * c, 1), 1)
    fits = left == 0 and inner_last - inner_first == oh and block == ow and span <= w
    small = pool_planes.vectors(span, ow, itemsize) if c == 1 and sw > 2 and dh == dw == 1 and fits else 0
    if small:
        per_chunk = _rounded(per_chunk, oh)
    return (
        rows, per_chunk, h, w, oh, ow, c, kh, kw, sh, sw, top, left, dh, dw, inner_first, inner_last,
        readable, overshoot, block, pitch, group, int(flat), small, int(quads),
    )  # fmt: skip


def _rounded(count, lanes):
    return -(-count // lanes) * lanes


def _rows_of_windows(operation):
    """The walk over output rows [first, last) for one operation."""
    contiguous, every_second, down, contiguous_rows, every_second_rows, pick_rows = operation

    @device()
    def fold_down(part, x, plan, p, o, r, g, w, inside):
        """Fold the rows of windows: `inside` pixels from column w on, for g output rows from row o of plane p on."""
        h_n, width, oh_n = plan[H], plan[W] * plan[C], plan[OH]
        kh, sh, top, dh, inner_first, inner_last = (
            plan[KH],
            plan[SH],
            plan[TOP],
            plan[DH],
            plan[INNER_FIRST],
            plan[INNER_LAST],
        )
        readable, pitch, size = plan[READABLE], plan[PITCH], inside * plan[C]
        ahead, asked = AHEAD // x.itemsize, 2
        if sh == 1 or plan[C] > 1:
            ahead, asked = ahead + (kh - 1 if sh == 1 else 1) * dh * width, 1
        i = 0
        while i < g:
            h, taps, run = o * sh - top, kh, 1
            if inner_first <= o < inner_last:
                run = min(inner_last - o, g - i)
            else:
                while h < 0:  # rows in the padding take no part (a loop, as a division would cost more)
                    h += dh
                    taps -= 1
                while h + (taps - 1) * dh >= h_n:
                    taps -= 1
            source, target = address(x, (p * h_n + h) * width + w * plan[C]), move(part, i * pitch)
            whole = max(min(run, readable - r - i), 0)
            down(target, pitch, source, sh * width, whole, dh * width, taps, size, ahead, asked)
            for k in range(whole, run):
                contiguous(move(target, k * pitch), move(source, k * sh * width), dh * width, taps, size)
            i += run
            o += run
            if o == oh_n:
                o = 0
                p += 1

    @device()
    def fold_across(y, part, dense, plan, r, g, whole, start, count):
        """Fold the columns of windows, of g folded rows; the first `whole` of them in whole vectors."""
        ow_n, c, kw, sw, dw, pitch = plan[OW], plan[C], plan[KW], plan[SW], plan[DW], plan[PITCH]
        out, size = address(y, (r * ow_n + start) * c), ow_n * c
        if sw == 1:
            contiguous_rows(out, size, part, pitch, whole, dw * c, kw, count * c)
            for i in range(whole, g):
                contiguous(move(out, i * size), move(part, i * pitch), dw * c, kw, count * c)
        elif c > 1:
            for i in range(whole):
                contiguous_rows(move(out, i * size), c, move(part, i * pitch), sw * c, count, dw * c, kw, c)
            for i in range(whole, g):
                for j in range(count):
                    contiguous(move(out, i * size + j * c), move(part, i * pitch + j * sw * c), dw * c, kw, c)
        elif sw == 2:
            every_second_rows(out, size, part, pitch, whole, dw, kw, count)
            for i in range(whole, g):
                every_second(move(out, i * size), move(part, i * pitch), dw, kw, count)
        else:  # windows from every column on, of which every sw-th is picked
            contiguous_rows(dense, pitch, part, pitch, g, dw, kw, (count - 1) * sw + 1)
            whole = whole if sw == 3 else 0
            pick_rows(out, size, dense, pitch, whole, count)
            for i in range(whole, g):
                source, target = move(dense, i * pitch), move(out, i * size)
                for j in range(count):
                    target[j] = source[j * sw]

    @device()
    def windows(x, y, empty, plan, p, o, r, g, part, dense, whole):
        """g output rows from row r on, which is row o of plane p. empty: what a tap in the padding counts as."""
        w_n, ow_n, c, sw, left, pitch = plan[W], plan[OW], plan[C], plan[SW], plan[LEFT], plan[PITCH]
        reach, block = plan[DW] * (plan[KW] - 1) + 1, plan[BLOCK]
        if plan[FLAT]:
            fold_down(part, x, plan, p, o, r, g, 0, (ow_n - 1) * sw + reach)
            fold_across(y, part, dense, plan, r, 1, 0, 0, g * ow_n)
            return
        for start in range(0, ow_n, block):
            count = min(block, ow_n - start)
            w = start * sw - left
            span = (count - 1) * sw + reach
            before = max(-w, 0)
            inside = min(w + span, w_n) - (w + before)
            if before:
                fill_rows(part, pitch, g, empty, before * c)
            fold_down(move(part, before * c), x, plan, p, o, r, g, w + before, inside)
            if span > before + inside:
                fill_rows(move(part, (before + inside) * c), pitch, g, empty, (span - before - inside) * c)
            fold_across(y, part, dense, plan, r, g, whole, start, count)

    return windows


_max_windows, _sum_windows = _rows_of_windows(MAXIMA), _rows_of_windows(SUMS)


@device(allocates=True)
def _scratch(like, plan):
    """Folded rows, with room for the vectors that reach beyond the last; twice where columns are picked afterwards."""
    size = plan[PITCH] * plan[GROUP] + plan[DW] * plan[KW] + 256 // like.itemsize
    return scratch(size * (2 if plan[SW] > 2 else 1), like), size * (plan[SW] > 2)


@kernel()
def max_values(x, y, lowest, plan):
    """Maxima of windows; the indices are not computed."""
    rows, per_chunk, oh_n, group = plan[ROWS], plan[PER_CHUNK], plan[OH], plan[GROUP]
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        if plan[QUADS]:
            ow_n, width, c = plan[OW], plan[W] * plan[C], plan[C]
            out, source = address(y, first * ow_n * c), address(x, first * 2 * width)
            pool_quads.max_of_quads(out, source, last - first, ow_n, width, c)
            continue
        memory, half = _scratch(x, plan)
        part, dense = address(memory, 0), address(memory, half)
        for r in range(first, last, group):
            g = min(group, last - r)
            p = r // oh_n
            whole = max(min(g, last - plan[OVERSHOOT] - r), 0)
            _max_windows(x, y, lowest, plan, p, r - p * oh_n, r, g, part, dense, whole)
        keep(memory)


@device()
def _sum_planes(x, y, plan, first, last):
    """Output rows [first, last), of whole planes."""
    h_n, w_n, oh_n, ow_n = plan[H], plan[W], plan[OH], plan[OW]
    planes, source = (last - first) // oh_n, address(x, first // oh_n * h_n * w_n)
    pool_planes.sums_of_planes(
        address(y, first * ow_n), source, planes, h_n, w_n, oh_n, ow_n,
        plan[KH], plan[KW], plan[SH], plan[SW], plan[SMALL],
    )  # fmt: skip


@kernel()
def averages(x, y, plan, divisors):
    """Averages of windows. divisors: what `divisors_of` made."""
    rows, per_chunk, oh_n, ow_n, c, group = plan[ROWS], plan[PER_CHUNK], plan[OH], plan[OW], plan[C], plan[GROUP]
    zero = x.dtype.type(0)
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        first = chunk * per_chunk
        last = min(first + per_chunk, rows)
        if plan[SMALL]:
            _sum_planes(x, y, plan, first, last)
            divide(address(y, first * ow_n * c), divisors, first, last - first, ow_n, c)
            continue
        if plan[QUADS]:
            for r in range(first, last, group):
                g, width, out = min(group, last - r), plan[W] * c, address(y, r * ow_n * c)
                pool_quads.sum_of_quads(out, address(x, r * 2 * width), g, ow_n, width, c)
                divide(out, divisors, r, g, ow_n, c)
            continue
        memory, half = _scratch(x, plan)
        part, dense = address(memory, 0), address(memory, half)
        for r in range(first, last, group):
            g = min(group, last - r)
            p = r // oh_n
            whole = max(min(g, last - plan[OVERSHOOT] - r), 0)
            _sum_windows(x, y, zero, plan, p, r - p * oh_n, r, g, part, dense, whole)
            divide(address(y, r * ow_n * c), divisors, r, g, ow_n, c)
        keep(memory)


@device()
def _quotient(a, b, inverse):
    """a / b, rounded once, where b is a small integer: a product, its exact remainder, and a correction by that
    (Markstein 1990). Three times as fast as the processor's division."""
    quotient = a * inverse
    remainder = fused(-quotient, b, a)
    corrected = fused(remainder, inverse, quotient)
    return corrected if remainder == remainder else quotient  # an infinity has no remainder


@device()
def divide(y, divisors, first, rows, ow_n, c):
    """y /= heights[o] * widths[j] in all columns j of rows `first` on, counted through all planes; o: the row's number
    in its plane.

    divisors: the heights, then the widths.

    Where there is but one divisor, the array holds (its inverse, or 0 where that is not exact, and itself) instead.
    """
    if divisors.size == 2:
        inverse, divisor = divisors[0], divisors[1]
        if inverse:
            for i in range(rows * ow_n * c):
                y[i] = y[i] * inverse
        else:
            inverse = divisors.dtype.type(1) / divisor
            for i in range(rows * ow_n * c):
                y[i] = _quotient(y[i], divisor, inverse)
        return
    oh_n = divisors.size - ow_n
    widths = address(divisors, oh_n)
    o = first % oh_n
    for r in range(rows):
        height, out = divisors[o], move(y, r * ow_n * c)
        if c == 1:
            for j in range(ow_n):
                out[j] = out[j] / (height * widths[j])
        else:
            for j in range(ow_n):
                divisor = height * widths[j]
                for i in range(c):
                    out[j * c + i] = out[j * c + i] / divisor
        o += 1
        if o == oh_n:
            o = 0


def extents_of(shape, counts, kernel_size, stride, padding, count_include_pad):
    """The heights and the widths of windows, whose products are the divisors."""
    axes = zip(counts, shape, kernel_size, stride, padding, strict=True)
    return [_extents(*axis, count_include_pad) for axis in axes]


def as_divisors(extents, override, dtype):
    """What `divide` takes, from the windows' heights and widths; override: the divisor of all, or None."""
    divisor = override or single_divisor(*extents)
    if divisor:
        return np.array((1 / divisor if divisor & (divisor - 1) == 0 else 0, divisor), dtype)
    return np.concatenate(extents).astype(dtype)


def single_divisor(heights, widths) -> int:
    """The product of heights and widths where it is always the same, else 0."""
    return int(heights[0] * widths[0]) if (heights == heights[0]).all() and (widths == widths[0]).all() else 0


def inverse_divisors(extents, override):
    """Weights of rows and of columns whose products are one over the divisors."""
    heights, widths = extents
    divisor = override or single_divisor(heights, widths)
    if divisor:
        return np.full(heights.size, 1 / divisor), np.ones(widths.size)
    return 1 / heights, 1 / widths


def _extents(count, n, k, s, sides, pad):
    """What each of `count` windows along an axis of n pixels contributes to the divisor."""
    low, high = sides
    starts = np.arange(count) * s - low
    ends = np.minimum(starts + k, n + high)
    return ends - starts if pad else np.minimum(ends, n) - np.maximum(starts, 0)
