"""The gradients of pooling on the GPU, as a gather: every pixel adds up what it gets from the windows that cover it.

Nothing is added to memory, so there are no atomics, and the order of the sum is that of the windows. A maximum's
gradient goes to a pixel from those of its windows whose index is the pixel's. A thread takes a unit of channels (NHWC)
or 16 bytes of a row (NCHW), where from column to column the windows move on without a division.
"""

from numba import cuda

from tilewise.kernels.cuda.launch import ELEMENTS, INDICES, INT32, INT64, REAL, kernel
from tilewise.kernels.cuda.launch import device as device_function
from tilewise.kernels.cuda.memory import (
    at,
    lanes,
    load_vector,
    narrow,
    register_sums,
    registers,
    store_vector,
    widen,
    zero,
)  # fmt: skip
from tilewise.kernels.cuda.pool_windows import THREADS, blocks_of, covering, covering_next, extent, put, split
from tilewise.kernels.pool_plan import Pool


def _make_maximum_units(vector: bool):
    @kernel(
        threads=THREADS, name=f"max_pool_backward_{'vectors' if vector else 'elements'}",
        promises=("LDG.128", "STG.128") if vector else (),
    )  # fmt: skip
    def max_pool_backward(
        grad: ELEMENTS, indices: INDICES, result: ELEMENTS, pixels: INT64,
        height: INT64, width: INT64, rows: INT64, columns: INT64, units: INT64,
        sh: INT32, sw: INT32, top: INT32, left: INT32, reach_h: INT32, reach_w: INT32,
    ):  # fmt: skip
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < pixels:
            count = lanes(grad) if vector else 1
            rest, unit = split(i, units)
            rest, w = split(rest, width)
            image, h = split(rest, height)
            pixel = h * width + w
            first_row, last_row = covering(h, height, rows, sh, top, reach_h)
            first_column, last_column = covering(w, width, columns, sw, left, reach_w)
            raw, where, sums = registers(grad, 16), registers(indices, 8), register_sums(grad, 16)
            for k in range(count):
                sums[k] = zero(grad)
            for row in range(first_row, last_row + 1):
                for column in range(first_column, last_column + 1):
                    place = (((image * rows + row) * columns + column) * units + unit) * count
                    if vector:
                        load_vector(raw, grad, place)
                        for k in range(0, count, 2):
                            load_vector(at(where, k), indices, place + k)
                    else:
                        raw[0], where[0] = grad[place], indices[place]
                    for k in range(count):
                        if where[k] == pixel:
                            sums[k] += widen(raw[k])
            for k in range(count):
                raw[k] = narrow(sums[k], result)
            if vector:
                store_vector(result, i * count, raw)
            else:
                result[i] = raw[0]

    return max_pool_backward


def _make_average_units(vector: bool):
    @kernel(
        threads=THREADS, name=f"avg_pool_backward_{'vectors' if vector else 'elements'}",
        promises=("LDG.128", "STG.128") if vector else (),
    )  # fmt: skip
    def avg_pool_backward(
        grad: ELEMENTS, result: ELEMENTS, divisor: REAL, pixels: INT64,
        height: INT64, width: INT64, rows: INT64, columns: INT64, units: INT64,
        sh: INT32, sw: INT32, top: INT32, left: INT32, kh: INT32, kw: INT32, bottom: INT32, right: INT32,
        include_pad: INT32,
    ):  # fmt: skip
        """divisor: 0 where it depends on the window."""
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < pixels:
            count = lanes(grad) if vector else 1
            rest, unit = split(i, units)
            rest, w = split(rest, width)
            image, h = split(rest, height)
            first_row, last_row = covering(h, height, rows, sh, top, kh - 1)
            first_column, last_column = covering(w, width, columns, sw, left, kw - 1)
            raw, sums = registers(grad, 16), register_sums(grad, 16)
            for k in range(count):
                sums[k] = zero(grad)
            for row in range(first_row, last_row + 1):
                for column in range(first_column, last_column + 1):
                    place = (((image * rows + row) * columns + column) * units + unit) * count
                    if vector:
                        load_vector(raw, grad, place)
                    else:
                        raw[0] = grad[place]
                    by = divisor
                    if divisor == 0:
                        high = extent(row, height, rows, kh, sh, top, bottom, include_pad)
                        wide = extent(column, width, columns, kw, sw, left, right, include_pad)
                        by = type(divisor)(high * wide)
                    for k in range(count):
                        sums[k] += widen(raw[k]) / by
            for k in range(count):
                raw[k] = narrow(sums[k], result)
            if vector:
                store_vector(result, i * count, raw)
            else:
                result[i] = raw[0]

    return avg_pool_backward


_maximum_units = {vector: _make_maximum_units(vector) for vector in (False, True)}
_average_units = {vector: _make_average_units(vector) for vector in (False, True)}


@device_function
def _store_row(result, raw, place, column, width, count, whole):
    """result[place], ... = raw: the 16 bytes from `column` on of a row that is `width` long."""
    if whole:
        store_vector(result, place, raw)
    else:
        for k in range(count):
            if column + k < width:
                result[place + k] = raw[k]


@kernel(threads=THREADS, promises=("STG.128",))
def max_pool_backward_columns(
    grad: ELEMENTS, indices: INDICES, result: ELEMENTS, groups: INT64, across: INT64, whole: INT32,
    height: INT64, width: INT64, rows: INT64, columns: INT64,
    sh: INT32, sw: INT32, top: INT32, left: INT32, reach_h: INT32, reach_w: INT32,
):  # fmt: skip
    """across: groups of 16 bytes in a row of the result; groups: all of them. whole: rows are made of whole ones."""
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < groups:
        count = lanes(grad)
        rest, group = split(i, across)
        plane, h = split(rest, height)
        w = group * count
        first_row, last_row = covering(h, height, rows, sh, top, reach_h)
        first_column, last_column = covering(w, width, columns, sw, left, reach_w)
        raw = registers(grad, 8)
        for k in range(count):
            if k > 0:
                first_column, last_column = covering_next(
                    first_column, last_column, w + k, width, columns, sw, left, reach_w
                )
            total = zero(grad)
            for row in range(first_row, last_row + 1):
                for column in range(first_column, last_column + 1):
                    place = (plane * rows + row) * columns + column
                    if indices[place] == h * width + w + k:
                        total += widen(grad[place])
            put(raw, k, narrow(total, result), count)
        _store_row(result, raw, rest * width + w, w, width, count, whole)


@kernel(threads=THREADS, promises=("STG.128",))
def avg_pool_backward_columns(
    grad: ELEMENTS, result: ELEMENTS, divisor: REAL, groups: INT64, across: INT64, whole: INT32,
    height: INT64, width: INT64, rows: INT64, columns: INT64,
    sh: INT32, sw: INT32, top: INT32, left: INT32, kh: INT32, kw: INT32, bottom: INT32, right: INT32,
    include_pad: INT32,
):  # fmt: skip
    """As max_pool_backward_columns. divisor: 0 where it depends on the window."""
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < groups:
        count = lanes(grad)
        rest, group = split(i, across)
        plane, h = split(rest, height)
        w = group * count
        first_row, last_row = covering(h, height, rows, sh, top, kh - 1)
        first_column, last_column = covering(w, width, columns, sw, left, kw - 1)
        raw = registers(grad, 8)
        for k in range(count):
            if k > 0:
                first_column, last_column = covering_next(
                    first_column, last_column, w + k, width, columns, sw, left, kw - 1
                )
            total = zero(grad)
            for row in range(first_row, last_row + 1):
                for column in range(first_column, last_column + 1):
                    by = divisor
                    if divisor == 0:
                        high = extent(row, height, rows, kh, sh, top, bottom, include_pad)
                        wide = extent(column, width, columns, kw, sw, left, right, include_pad)
                        by = type(divisor)(high * wide)
                    total += widen(grad[(plane * rows + row) * columns + column]) / by
            put(raw, k, narrow(total, result), count)
        _store_row(result, raw, rest * width + w, w, width, count, whole)


def run_maximum_gradient(pool: Pool, groups, grad, indices, result):
    windows = (*pool.stride, *pool.low, *pool.reach)
    if groups:
        operands = (grad, indices, result, *groups)
        max_pool_backward_columns(grad.place, blocks_of(groups[0]), *operands, *pool.shape[:4], *windows)
    else:
        run = _maximum_units[pool.width > 1]
        run(grad.place, blocks_of(pool.pixels), grad, indices, result, pool.pixels, *pool.shape, *windows)


def run_average_gradient(pool: Pool, groups, grad, result, divisor, include_pad):
    windows = (*pool.stride, *pool.low, *pool.kernel, *pool.high, include_pad)
    if groups:
        operands = (grad, result, divisor, *groups)
        avg_pool_backward_columns(grad.place, blocks_of(groups[0]), *operands, *pool.shape[:4], *windows)
    else:
        run = _average_units[pool.width > 1]
        run(grad.place, blocks_of(pool.pixels), grad, result, divisor, pool.pixels, *pool.shape, *windows)
