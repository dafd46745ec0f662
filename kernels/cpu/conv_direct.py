"""Convolution as its definition: the naive kernel, for reading, for tiny problems, and to compare with; and depthwise
convolution, whose groups are too thin for a matrix product.

The naive kernel takes both layouts through strides. The depthwise ones walk along the axis that is contiguous: an output
row in NCHW, the channels in NHWC.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.epilogue import activate_row, apply_activation
from tilewise.kernels.cpu.jit import device, kernel


@device()
def _one_pixel(x, base, channel_step, row_step, column_step, h, w, weight, start, channels, tap_rows, tap_columns, i, j):
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
            where = base + row * row_step + column * column_step
            for c in range(channels):
                total += x[where + c * channel_step] * weight[start + (c * tap_rows.size + r) * taps_w + s]
    return total


@kernel()
def convolve(
    x, n, groups, channels, h, w, x_steps, weight, outputs, tap_rows, tap_columns, stride_h, stride_w, oh, ow,
    y, y_steps, bias, activation,
):  # fmt: skip
    """The definition, one output pixel after the other.

    x_steps, y_steps: (image, channel, row, column) steps in elements. Other arguments as `conv_nchw.convolve`.
    """
    taps = tap_rows.size * tap_columns.size
    for chunk in prange(n * groups * outputs):
        image = chunk // (groups * outputs)
        o = chunk - image * groups * outputs
        g = o // outputs
        base = image * x_steps[0] + g * channels * x_steps[1]
        target = image * y_steps[0] + o * y_steps[1]
        for i in range(oh):
            for j in range(ow):
                value = _one_pixel(
                    x, base, x_steps[1], x_steps[2], x_steps[3], h, w, weight, o * channels * taps, channels,
                    tap_rows, tap_columns, i * stride_h, j * stride_w,
                )  # fmt: skip
                if bias.size > 0:
                    value += bias[o]
                y[target + i * y_steps[2] + j * y_steps[3]] = apply_activation(value, activation)


@device()
def _add_tap(x, source, stride, factor, sums, first, last):
    """sums[j] += factor * x[source + j * stride] for first <= j < last; contiguous where the stride is 1."""
    if stride == 1:
        row = x[source + first : source + last]
        part = sums[first:last]
        for j in range(part.size):
            part[j] += factor * row[j]
    else:
        for j in range(first, last):
            sums[j] += factor * x[source + j * stride]


@device()
def _depthwise_plane(
    x, base, h, w, weight, start, tap_rows, tap_columns, stride_h, stride_w, oh, ow, y, target, row_step, column_step,
    value, activation,
):  # fmt: skip
    sums = np.empty(ow, x.dtype)
    for i in range(oh):
        sums[:] = value
        for r in range(tap_rows.size):
            row = i * stride_h + tap_rows[r]
            if row < 0 or row >= h:
                continue
            for s in range(tap_columns.size):
                offset = tap_columns[s]
                first = max(0, -(offset // stride_w))
                last = min(ow, -((offset - w) // stride_w))
                if first < last:
                    factor = weight[start + r * tap_columns.size + s]
                    _add_tap(x, base + row * w + offset, stride_w, factor, sums, first, last)
        if activation != 0:
            activate_row(sums, 0, ow, activation)
        where = target + i * row_step
        if column_step == 1:
            y[where : where + ow] = sums
        else:
            for j in range(ow):
                y[where + j * column_step] = sums[j]


@kernel()
def depthwise_nchw(
    x, n, groups, h, w, weight, outputs, tap_rows, tap_columns, stride_h, stride_w, oh, ow,
    y, y_start, plane, row_step, column_step, bias, activation,
):  # fmt: skip
    """One input channel a group, `outputs` output channels each; arguments as `conv_nchw.convolve`."""
    taps = tap_rows.size * tap_columns.size
    for chunk in prange(n * groups * outputs):
        o = chunk % (groups * outputs)
        source = (chunk // outputs) * h * w
        value = bias[o] if bias.size > 0 else x.dtype.type(0)
        _depthwise_plane(
            x, source, h, w, weight, o * taps, tap_rows, tap_columns, stride_h, stride_w, oh, ow,
            y, y_start + chunk * plane, row_step, column_step, value, activation,
        )  # fmt: skip


@device()
def _depthwise_pixel(x, source, weight, start, sums):
    row = x[source : source + sums.size]
    factors = weight[start : start + sums.size]
    for c in range(sums.size):
        sums[c] += row[c] * factors[c]


@kernel()
def depthwise_nhwc(
    x, n, groups, h, w, weight, tap_rows, tap_columns, stride_h, stride_w, oh, ow,
    y, y_start, image_step, row_step, column_step, bias, activation,
):  # fmt: skip
    """One input and one output channel a group. weight: (taps, groups), flat: a tap's factors lie side by side."""
    for chunk in prange(n * oh):
        image = chunk // oh
        i = chunk - image * oh
        for j in range(ow):
            target = y_start + image * image_step + i * row_step + j * column_step
            sums = y[target : target + groups]
            if bias.size > 0:
                sums[:] = bias
            else:
                sums[:] = 0
            for r in range(tap_rows.size):
                row = i * stride_h + tap_rows[r]
                if row < 0 or row >= h:
                    continue
                for s in range(tap_columns.size):
                    column = j * stride_w + tap_columns[s]
                    if 0 <= column < w:
                        where = ((image * h + row) * w + column) * groups
                        _depthwise_pixel(x, where, weight, (r * tap_columns.size + s) * groups, sums)
            if activation != 0:
                activate_row(y, target, groups, activation)


@device()
def _row_product(x, source, stride, grad, start, count):
    total = x.dtype.type(0)
    if stride == 1:
        for j in range(count):
            total += x[source + j] * grad[start + j]
    else:
        for j in range(count):
            total += x[source + j * stride] * grad[start + j]
    return total


@kernel()
def depthwise_weight_gradient_nchw(
    x, grad, n, groups, h, w, outputs, tap_rows, tap_columns, stride_h, stride_w, oh, ow, result
):
    """result: (groups * outputs, taps), flat: each weight is one long sum over images, rows and columns."""
    taps_w = tap_columns.size
    for o in prange(groups * outputs):
        g = o // outputs
        for r in range(tap_rows.size):
            for s in range(taps_w):
                offset = tap_columns[s]
                first = max(0, -(offset // stride_w))
                last = min(ow, -((offset - w) // stride_w))
                total = x.dtype.type(0)
                for image in range(n):
                    for i in range(oh):
                        row = i * stride_h + tap_rows[r]
                        if 0 <= row < h and first < last:
                            source = ((image * groups + g) * h + row) * w + offset + first * stride_w
                            start = ((image * groups * outputs + o) * oh + i) * ow + first
                            total += _row_product(x, source, stride_w, grad, start, last - first)
                result[(o * tap_rows.size + r) * taps_w + s] = total
