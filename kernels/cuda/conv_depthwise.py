"""Depthwise convolution (one input channel a group) on the GPU, bound by memory: every x is wanted by all taps, and
comes from L1 after the first. Padding is multiplied as zeros, so that it makes NaN of an infinite weight everywhere.

    NCHW   a thread sums a few results below each other; threads run along the columns, so that a warp reads 128 bytes.
           A row of x, once loaded, serves all results it meets.
    NHWC   a thread sums COLUMNS results of the channels that 16 bytes hold; threads run along the channels. The weights
           are turned into (tap, channel) first, and a weight, once loaded, serves all results.
"""

from numba import cuda

from tilewise.kernels.conv_geometry import Correlation, weight_view
from tilewise.kernels.conv_plan import DEPTHWISE_COLUMNS, DEPTHWISE_PLANES
from tilewise.kernels.cuda.conv_direct import epilogue_arguments, finished
from tilewise.kernels.cuda.conv_product import pick
from tilewise.kernels.cuda.copying import contiguous
from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64, REAL, ceil_div, kernel
from tilewise.kernels.cuda.memory import (
    VECTOR_BYTES,
    at,
    lanes,
    load_vector,
    narrow,
    register_sums,
    registers,
    store_vector,
    widen,
    zero,
)

_THREADS = 128
_COLUMNS = DEPTHWISE_COLUMNS
_TOTALS = 8 * _COLUMNS  # at most 8 numbers in 16 bytes


def _make_planes(taps: int, stride: int, results: int):
    area = taps * taps
    met = (results - 1) * stride + taps  # rows of x that the results of a thread meet

    @kernel(threads=_THREADS, name=f"depthwise_planes_{taps}x{taps}_stride{stride}")
    def planes(
        x: ELEMENTS, weight: ELEMENTS, y: ELEMENTS, bias: ELEMENTS, has_bias: INT32, extra: ELEMENTS, has_extra: INT32,
        code: INT32, slope: REAL, h: INT64, w: INT64, oh: INT64, ow: INT64, top: INT64, left: INT64,
        p0: INT64, p_step: INT64, q0: INT64, q_step: INT64, outputs: INT64, multiplier: INT64, work: INT64,
    ):  # fmt: skip
        """y (N, outputs, oh, ow) from x (N, outputs / multiplier, h, w)."""
        number = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
        if number >= work:
            return
        j, number = number % ow, number // ow
        strips = (oh + results - 1) // results
        strip, plane = number % strips, number // strips
        o = plane % outputs
        first = (plane // outputs * (outputs // multiplier) + o // multiplier) * h * w
        weights = register_sums(x, area)
        for p in range(taps):
            for q in range(taps):
                weights[p * taps + q] = widen(weight[o * taps * taps + (p0 + p * p_step) * taps + q0 + q * q_step])
        totals, values = register_sums(x, results), register_sums(x, taps)
        for a in range(results):
            totals[a] = zero(x)
        for r in range(met):
            row = strip * results * stride + r + top
            for q in range(taps):
                column = j * stride + q + left
                inside = row >= 0 and row < h and column >= 0 and column < w
                values[q] = widen(x[first + row * w + column]) if inside else zero(x)
            for a in range(results):
                p = r - a * stride
                if p >= 0 and p < taps:
                    for q in range(taps):
                        totals[a] += values[q] * weights[p * taps + q]
        for a in range(results):
            i = strip * results + a
            if i < oh:
                place = (plane * oh + i) * ow + j
                y[place] = narrow(finished(totals[a], o, place, bias, has_bias, extra, has_extra, code, slope), y)

    return planes


planes_kernels = {plane: _make_planes(*plane, results) for plane, results in DEPTHWISE_PLANES.items()}


@kernel(threads=_THREADS)
def depthwise_channels(
    x: ELEMENTS, weight: ELEMENTS, y: ELEMENTS, bias: ELEMENTS, has_bias: INT32, extra: ELEMENTS, has_extra: INT32,
    code: INT32, slope: REAL,
    h: INT64, row0: INT64, row_step: INT64, oh: INT64, top: INT64, stride_h: INT64, spacing_h: INT64, kh: INT64,
    p0: INT64, p_step: INT64,
    w: INT64, col0: INT64, col_step: INT64, ow: INT64, left: INT64, stride_w: INT64, spacing_w: INT64, kw: INT64,
    q0: INT64, q_step: INT64,
    yn: INT64, yh: INT64, channels: INT64, all_taps_width: INT64, work: INT64,
):  # fmt: skip
    """y (N, ..., channels) from x (N, h, w, channels), weight (tap, channels)."""
    number = cuda.blockIdx.x * _THREADS + cuda.threadIdx.x
    if number >= work:
        return
    width = lanes(x)
    vectors, strips = channels // width, (ow + _COLUMNS - 1) // _COLUMNS
    c, number = number % vectors * width, number // vectors
    j, number = number % strips * _COLUMNS, number // strips
    i, n = number % oh, number // oh
    totals, row_of_results = register_sums(x, _TOTALS), register_sums(x, 8)
    values, weights, results = registers(x, 8), registers(x, 8), registers(x, 8)
    for k in range(_COLUMNS * width):
        totals[k] = zero(x)
    for t in range(kh):
        row = top + i * stride_h + t * spacing_h
        for u in range(kw):
            load_vector(weights, weight, ((p0 + t * p_step) * all_taps_width + q0 + u * q_step) * channels + c)
            for b in range(_COLUMNS):
                column = left + (j + b) * stride_w + u * spacing_w
                if row >= 0 and row < h and column >= 0 and column < w:
                    load_vector(values, x, ((n * h + row) * w + column) * channels + c)
                else:
                    for k in range(width):
                        values[k] = narrow(zero(x), x)
                for k in range(width):
                    totals[k * _COLUMNS + b] += widen(values[k]) * widen(weights[k])
    for b in range(_COLUMNS):
        if j + b < ow:
            place = n * yn + (row0 + i * row_step) * yh + (col0 + (j + b) * col_step) * channels + c
            for k in range(width):
                row_of_results[k] = pick(at(totals, k * _COLUMNS), 1, _COLUMNS, b)
            for k in range(width):  # in turn, for registers have no index; the epilogue is there once
                total = finished(row_of_results[0], c + k, place + k, bias, has_bias, extra, has_extra, code, slope)
                for m in range(width - 1):
                    row_of_results[m] = row_of_results[m + 1]
                row_of_results[width - 1] = total
            for k in range(width):
                results[k] = narrow(row_of_results[k], y)
            store_vector(y, place, results)


def correlate(it: Correlation, x, weight, y, bias, extra, code: int):
    """y = activation(the depthwise correlation + bias + extra); bias and extra may be None."""
    epilogue = epilogue_arguments(bias, extra, code)
    rows, columns = it.rows, it.columns
    if it.channels_last:
        width = VECTOR_BYTES // x.dtype.itemsize
        turned = contiguous(weight_view(weight, it, "tg"))
        work = it.images * rows.count * ceil_div(columns.count, _COLUMNS) * (it.groups // width)
        yn, _, yh, _ = it.steps[4:]
        depthwise_channels(
            x.place, ceil_div(work, _THREADS), x, turned, y, *epilogue, *rows.numbers, *columns.numbers, yn, yh,
            it.groups, it.width, work,
        )  # fmt: skip
        return
    outputs = it.groups * it.outputs
    results = DEPTHWISE_PLANES[rows.taps, rows.stride]
    work = it.images * outputs * ceil_div(rows.count, results) * columns.count
    planes_kernels[rows.taps, rows.stride](
        x.place, ceil_div(work, _THREADS), x, weight, y, *epilogue, rows.size, columns.size, rows.count, columns.count,
        rows.origin, columns.origin, rows.first_tap, rows.tap_step, columns.first_tap, columns.tap_step, outputs,
        it.outputs, work,
    )  # fmt: skip
