"""Convolution without a matrix product: for groups too thin to fill a register tile and for tiny problems.

The kernels walk along the axis that is contiguous: an output row in NCHW, the channels in NHWC. `definition_nhwc` is
the definition itself: to read first.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.epilogue import activate_row, apply_activation
from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.simd import address, fused
from tilewise.kernels.cpu.vector_move import add_scaled


@device()
def ceil_div(a, b):
    """a / b rounded up. A 64-bit division takes up to 90 cycles, more than a row of sums, so the usual strides do
    without.
    """
    if b == 1:
        return a
    if b == 2:
        return (a + 1) >> 1
    return -((-a) // b)


@device()
def _one_pixel(x, base, all_channels, h, w, weight, start, channels, tap_rows, tap_columns, i, j):
    total = x.dtype.type(0)
    taps_w = tap_columns.size
    for r in range(tap_rows.size):
        row = i + tap_rows[r]
        if row < 0 or row >= h:
            continue
        for s in range(taps_w):
            column = j + tap_columns[s]
            if column < 0 or column >= w:
                continue
            where = base + (row * w + column) * all_channels
            for c in range(channels):
                total = fused(x[where + c], weight[start + (c * tap_rows.size + r) * taps_w + s], total)
    return total


@kernel()
def definition_nhwc(
    x, n, groups, channels, h, w, weight, outputs, tap_rows, tap_columns, stride_h, stride_w, oh, ow,
    y, y_start, image_step, row_step, column_step, bias, extra, activation,
):  # fmt: skip
    """The definition, one output after the other; arguments as `conv_nhwc.convolve`."""
    taps = tap_rows.size * tap_columns.size
    for chunk in prange(n * groups * outputs):
        image = chunk // (groups * outputs)
        o = chunk - image * groups * outputs
        base = image * h * w * groups * channels + o // outputs * channels
        for i in range(oh):
            for j in range(ow):
                value = _one_pixel(
                    x, base, groups * channels, h, w, weight, o * channels * taps, channels, tap_rows, tap_columns,
                    i * stride_h, j * stride_w,
                )  # fmt: skip
                if bias.size > 0:
                    value += bias[o]
                target = y_start + image * image_step + i * row_step + j * column_step + o
                if extra.size > 0:
                    value += extra[target]
                y[target] = apply_activation(value, activation)


@device()
def _add_tap(x, source, stride, factor, sums, first, last):
    """sums[j] += factor * x[source + j * stride] for first <= j < last; contiguous where the stride is 1."""
    if stride == 1:
        add_scaled(address(sums, first), address(x, source + first), factor, last - first)
    else:
        for j in range(first, last):
            sums[j] += factor * x[source + j * stride]


@device(allocates=True)
def _plane(
    x, base, channels, h, w, weight, start, tap_rows, tap_columns, stride_h, stride_w, oh, ow, y, target, row_step,
    column_step, value, extra, activation,
):  # fmt: skip
    """One output plane, a row at a time: the row's sums stay in L1 while every tap of every channel is added."""
    sums = np.empty(ow, x.dtype)
    for i in range(oh):
        sums[:] = value
        for c in range(channels):
            for r in range(tap_rows.size):
                row = i * stride_h + tap_rows[r]
                if row < 0 or row >= h:
                    continue
                for s in range(tap_columns.size):
                    offset = tap_columns[s]
                    first = max(0, ceil_div(-offset, stride_w))
                    last = min(ow, ceil_div(w - offset, stride_w))
                    if first < last:
                        factor = weight[start + (c * tap_rows.size + r) * tap_columns.size + s]
                        _add_tap(x, base + (c * h + row) * w + offset, stride_w, factor, sums, first, last)
        where = target + i * row_step
        if extra.size > 0:
            for j in range(ow):
                sums[j] += extra[where + j * column_step]
        if activation != 0:
            activate_row(sums, 0, ow, activation)
        for j in range(ow):
            y[where + j * column_step] = sums[j]


@kernel()
def rows_nchw(
    x, n, groups, channels, h, w, weight, outputs, tap_rows, tap_columns, stride_h, stride_w, oh, ow,
    y, y_start, plane, row_step, column_step, bias, extra, activation,
):  # fmt: skip
    """Row by row, for few channels a group; arguments as `conv_nchw.convolve`."""
    taps = tap_rows.size * tap_columns.size
    for chunk in prange(n * groups * outputs):
        o = chunk % (groups * outputs)
        source = (chunk // outputs) * channels * h * w
        value = bias[o] if bias.size > 0 else x.dtype.type(0)
        _plane(
            x, source, channels, h, w, weight, o * channels * taps, tap_rows, tap_columns, stride_h, stride_w, oh, ow,
            y, y_start + chunk * plane, row_step, column_step, value, extra, activation,
        )  # fmt: skip
