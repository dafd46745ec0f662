"""Padding on the GPU, and its gradient as a gather; padding_plan.py tells how threads share the result."""

from functools import partial

from numba import cuda

from tilewise.kernels import padding_plan
from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64, REAL, device, kernel
from tilewise.kernels.cuda.memory import lanes, narrow, registers, store_vector, widen, zero
from tilewise.kernels.cuda.pool_windows import THREADS, put, split
from tilewise.kernels.padding_plan import CIRCULAR, CONSTANT, REFLECT, REPLICATE


@device
def _source(p, n, mode):
    """Which of an axis' n pixels the padded pixel at p, counted from the first of them, is a copy of; outside: none."""
    if mode == CONSTANT or (p >= 0 and p < n):
        return p
    if mode == REPLICATE:
        return 0 * p if p < 0 else n - 1
    if mode == REFLECT:
        return -p if p < 0 else 2 * (n - 1) - p
    return p + n if p < 0 else p - n


@kernel(threads=THREADS, promises=("STG.128",))
def pad_all(
    x: ELEMENTS, y: ELEMENTS, value: REAL, count: INT64, height: INT64, width: INT64, rows: INT64, columns: INT64,
    top: INT64, left: INT64, mode: INT32, vector: INT32,
):  # fmt: skip
    """y: (planes, rows, columns) of `count` elements; x: (planes, height, width)."""
    number = lanes(x)
    begin = (cuda.blockIdx.x * THREADS + cuda.threadIdx.x) * number
    if begin < count:
        rest, column = split(begin, columns)
        plane, row = split(rest, rows)
        raw = registers(x, 16)
        for k in range(number):
            raw[k] = narrow(value, x)
            h, w = _source(row - top, height, mode), _source(column - left, width, mode)
            if begin + k < count and h >= 0 and h < height and w >= 0 and w < width:
                raw[k] = x[(plane * height + h) * width + w]
            column += 1
            if column == columns:
                column = 0 * column
                row += 1
                if row == rows:
                    row = 0 * row
                    plane += 1
        if vector and begin + number <= count:
            store_vector(y, begin, raw)
        else:
            for k in range(number):
                if begin + k < count:
                    y[begin + k] = raw[k]


@device
def _copies(p, n, low, high, mode, which):
    """(first, last): the padded pixels that are copies of pixel p, for `which` of 0 (before the axis), 1, 2 (after)."""
    here = p + low
    if mode == REPLICATE and which == 1:
        return 0 * p if p == 0 else here, here + high if p == n - 1 else here
    at = here
    if which != 1:
        at = 0 * p - 1
        if mode == REFLECT and which == 0 and p > 0:
            at = low - p
        if mode == CIRCULAR and which == 0:
            at = here - n
        if mode == REFLECT and which == 2 and p < n - 1:
            at = low + 2 * (n - 1) - p
        if mode == CIRCULAR and which == 2:
            at = here + n
    if at < 0 or at >= n + low + high:
        return 0 * p, 0 * p - 1
    return at, at


@kernel(threads=THREADS, promises=("STG.128",))
def pad_backward_all(
    grad: ELEMENTS, result: ELEMENTS, count: INT64, height: INT64, width: INT64,
    top: INT64, bottom: INT64, left: INT64, right: INT64, mode: INT32, vector: INT32,
):  # fmt: skip
    """result: (planes, height, width) of `count` elements: each the sum of its copies in grad."""
    number = lanes(grad)
    begin = (cuda.blockIdx.x * THREADS + cuda.threadIdx.x) * number
    if begin < count:
        rest, w = split(begin, width)
        plane, h = split(rest, height)
        rows, columns = height + top + bottom, width + left + right
        raw = registers(grad, 16)
        edges = mode in (REFLECT, CIRCULAR)
        first, end = 0 if edges else 1, 3 if edges else 2
        for k in range(number):
            total = zero(grad)
            if begin + k < count:
                for i in range(first, end):
                    first_row, last_row = _copies(h, height, top, bottom, mode, i)
                    for row in range(first_row, last_row + 1):
                        for j in range(first, end):
                            first_column, last_column = _copies(w, width, left, right, mode, j)
                            for column in range(first_column, last_column + 1):
                                total += widen(grad[(plane * rows + row) * columns + column])
            put(raw, k, narrow(total, result), number)
            w += 1
            if w == width:
                w = 0 * w
                h += 1
                if h == height:
                    h = 0 * h
                    plane += 1
        if vector and begin + number <= count:
            store_vector(result, begin, raw)
        else:
            for k in range(number):
                if begin + k < count:
                    result[begin + k] = raw[k]


pad, pad_backward = partial(padding_plan.pad, pad_all), partial(padding_plan.pad_backward, pad_backward_all)
