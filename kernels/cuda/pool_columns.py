"""Pooling of NCHW by the common windows, 3 x 3 (one pixel of padding before) and 2 x 2 (none), two apart.

A thread takes 16 bytes of a result's row: of each input row these are two vectors of 16 bytes, and for 3 x 3 windows
one element before them, where nine loads of one element each per result would be needed otherwise:

    e | v v v v | v v v v
    [e  v v]              the first window
         [v v   v]        the second
"""

import math

from numba import cuda

from tilewise.kernels.cuda.launch import ELEMENTS, INDICES, INT32, INT64, REAL, device, kernel
from tilewise.kernels.cuda.memory import (  # fmt: skip
    at,
    lanes,
    load_vector,
    narrow,
    registers,
    store_vector,
    widen,
    zero,
)
from tilewise.kernels.cuda.pool_maximum import take
from tilewise.kernels.cuda.pool_windows import THREADS, blocks_of, extent, split
from tilewise.kernels.pool_plan import SQUARES, Pool

ROOM = 3 * 17  # lines of two vectors of float16 and one element


@device
def _load_lines(line, raw, x, fill, plane, first_row, base, height, width, count, side, left):
    """line[s * length + k] = x[plane, first_row + s, base - left + k] for s < side, `fill` outside of the image."""
    length = 2 * count + side - 2
    for k in range(side * length):
        line[k] = fill
    for p in range(2 * side):  # one flat loop: a nested one stays a loop for sm_120, and `line` in memory
        h, column = first_row + p // 2, base + p % 2 * count
        if h >= 0 and h < height and column < width:
            load_vector(raw, x, (plane * height + h) * width + column)
            for k in range(count):
                line[p // 2 * length + left + p % 2 * count + k] = raw[k]
    if left:
        for s in range(side):
            h = first_row + s
            if h >= 0 and h < height and base > 0:
                line[s * length] = x[(plane * height + h) * width + base - 1]


def _make_maximum(side: int, left: int, indexed: bool):
    @kernel(
        threads=THREADS, name=f"max_pool_columns_{side}x{side}{'_with_indices' if indexed else ''}",
        promises=("LDG.128", "STG.128"),
    )  # fmt: skip
    def max_pool_columns(
        x: ELEMENTS, y: ELEMENTS, indices: INDICES, groups: INT64, across: INT64,
        height: INT64, width: INT64, rows: INT64, columns: INT64, top: INT32, whole: INT32,
    ):  # fmt: skip
        """across: groups of 16 bytes in a row of the result; groups: all. whole: rows are made of whole ones."""
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < groups:
            count = lanes(x)
            rest, group = split(i, across)
            plane, row = split(rest, rows)
            line, raw = registers(x, ROOM), registers(x, 8)
            best, where = registers(x, 8), registers(indices, 8)
            lowest = narrow(type(zero(x))(-math.inf), x)
            first_row, base, first = row * 2 - top, group * 2 * count, group * count
            _load_lines(line, raw, x, lowest, plane, first_row, base, height, width, count, side, left)
            for j in range(count):
                # what stays where no tap is more than -inf: the first one inside the image
                best[j] = lowest
                where[j] = max(first_row, 0) * width + max(base + 2 * j - left, 0)
                for t in range(side * side):
                    s, k = t // side, 2 * j + t % side
                    take(
                        best, where, j, line, s * (2 * count + side - 2) + k, (first_row + s) * width + base - left + k
                    )
            out = rest * columns + first
            if whole:
                store_vector(y, out, best)
                if indexed:
                    for j in range(0, count, 2):
                        store_vector(indices, out + j, at(where, j))
            else:
                for j in range(count):
                    if first + j < columns:
                        y[out + j] = best[j]
                        if indexed:
                            indices[out + j] = where[j]

    return max_pool_columns


def _make_average(side: int, left: int):
    @kernel(threads=THREADS, name=f"avg_pool_columns_{side}x{side}", promises=("LDG.128", "STG.128"))
    def avg_pool_columns(
        x: ELEMENTS, y: ELEMENTS, divisor: REAL, groups: INT64, across: INT64,
        height: INT64, width: INT64, rows: INT64, columns: INT64, top: INT32, whole: INT32,
        bottom: INT32, right: INT32, include_pad: INT32,
    ):  # fmt: skip
        """As max_pool_columns. divisor: 0 where it depends on the window."""
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < groups:
            count = lanes(x)
            rest, group = split(i, across)
            plane, row = split(rest, rows)
            line, raw = registers(x, ROOM), registers(x, 8)
            first_row, base, first = row * 2 - top, group * 2 * count, group * count
            _load_lines(line, raw, x, narrow(zero(x), x), plane, first_row, base, height, width, count, side, left)
            high = extent(row, height, rows, side, 2, top, bottom, include_pad)
            for j in range(count):
                total = zero(x)
                for t in range(side * side):
                    total += widen(line[t // side * (2 * count + side - 2) + 2 * j + t % side])
                by = divisor
                if divisor == 0:
                    by = type(divisor)(high * extent(first + j, width, columns, side, 2, left, right, include_pad))
                raw[j] = narrow(total / by, y)
            out = rest * columns + first
            if whole:
                store_vector(y, out, raw)
            else:
                for j in range(count):
                    if first + j < columns:
                        y[out + j] = raw[j]

    return avg_pool_columns


_maximum = {(*w, indexed): _make_maximum(*w, indexed) for w in SQUARES for indexed in (False, True)}
_average = {w: _make_average(*w) for w in SQUARES}


def _numbers(groups, pool: Pool) -> tuple[int, ...]:
    count, across, whole = groups
    return (count, across, *pool.size, *pool.out, pool.low[0], whole)


def maximum_columns(square, groups, pool: Pool, x, y, indices):
    run = _maximum[*square, indices is not None]
    run(x.place, blocks_of(groups[0]), x, y, indices, *_numbers(groups, pool))


def average_columns(square, groups, pool: Pool, x, y, divisor, include_pad):
    numbers = (*_numbers(groups, pool), *pool.high, include_pad)
    _average[square](x.place, blocks_of(groups[0]), x, y, divisor, *numbers)
