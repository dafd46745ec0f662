"""Batch norm where a pixel's channels are contiguous: NHWC and (N, C), as flat arrays.

Sums run down the rows, vectors across the channels. Several pixels together make one row of `width` elements, a
multiple of the number of channels, so that few or odd numbers of channels fill vectors too; element j of a row belongs
to channel j % channels. The pixels that are left after the last whole row are its tail.
"""

import math

import numpy as np
from numba import prange

from tilewise.kernels.cpu.batchnorm_channel import (
    AS_WRITTEN,
    centred,
    coefficients,
    gradient_coefficients,
    minus,
    settle,
)
from tilewise.kernels.cpu.epilogue import activate_row
from tilewise.kernels.cpu.jit import device, kernel

UNROLLED = 4  # rows taken together, so that sums in memory are touched once for four rows


@device(fastmath=AS_WRITTEN)
def _add_rows(x, start, rows, width, total):
    """total[j] = the sum of column j over some rows."""
    for j in range(width):
        total[j] = 0
    whole = rows // UNROLLED * UNROLLED
    for i in range(0, whole, UNROLLED):
        at = start + i * width
        r0, r1 = x[at : at + width], x[at + width : at + 2 * width]
        r2, r3 = x[at + 2 * width : at + 3 * width], x[at + 3 * width : at + 4 * width]
        for j in range(width):
            total[j] += (r0[j] + r1[j]) + (r2[j] + r3[j])
    for i in range(whole, rows):
        row = x[start + i * width : start + (i + 1) * width]
        for j in range(width):
            total[j] += row[j]


@device(fastmath=AS_WRITTEN)
def _add_deviations(x, start, rows, width, pivot, first, second):
    """The sums of the deviations from the pivot, and of their squares, down the columns."""
    for j in range(width):
        first[j] = 0
        second[j] = 0
    whole = rows // UNROLLED * UNROLLED
    for i in range(0, whole, UNROLLED):
        at = start + i * width
        r0, r1 = x[at : at + width], x[at + width : at + 2 * width]
        r2, r3 = x[at + 2 * width : at + 3 * width], x[at + 3 * width : at + 4 * width]
        for j in range(width):
            d0, d1 = minus(r0[j], pivot[j]), minus(r1[j], pivot[j])
            d2, d3 = minus(r2[j], pivot[j]), minus(r3[j], pivot[j])
            first[j] += (d0 + d1) + (d2 + d3)
            second[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
    for i in range(whole, rows):
        row = x[start + i * width : start + (i + 1) * width]
        for j in range(width):
            deviation = minus(row[j], pivot[j])
            first[j] += deviation
            second[j] += deviation * deviation


@device(fastmath=AS_WRITTEN)
def _block_moments(x, start, rows, width, mean, squares):
    """Mean and sum of squared deviations of each column of a block of rows, in float64; see batchnorm_channel.py."""
    pivot, first, second = np.empty(width, x.dtype), np.empty(width, x.dtype), np.empty(width, x.dtype)
    _add_rows(x, start, rows, width, pivot)
    share = x.dtype.type(1) / x.dtype.type(rows)
    for j in range(width):
        pivot[j] *= share
    _add_deviations(x, start, rows, width, pivot, first, second)
    for j in range(width):
        mean[j], squares[j] = centred(pivot[j], first[j], second[j], rows)


@device(fastmath=AS_WRITTEN)
def _channel_moments(x, channels, width, block, part_mean, part_squares, mean, squares):
    """Merge the blocks' columns and the tail into each channel's mean and sum of squared deviations."""
    rows = x.size // width
    column = np.zeros(width)
    for part in range(part_mean.shape[0]):
        count = np.float64(min(block, rows - part * block))
        for j in range(width):
            column[j] += count * part_mean[part, j]
    mean[:] = 0
    for j in range(width):
        mean[j % channels] += column[j]
    for i in range(rows * width, x.size):
        mean[(i - rows * width) % channels] += x[i]
    for c in range(channels):
        mean[c] /= x.size // channels
    centre = np.empty(width)
    for j in range(width):
        centre[j] = mean[j % channels]
        column[j] = 0
    for part in range(part_mean.shape[0]):
        count = np.float64(min(block, rows - part * block))
        for j in range(width):
            distance = part_mean[part, j] - centre[j]
            column[j] += part_squares[part, j] + count * distance * distance
    squares[:] = 0
    for j in range(width):
        squares[j % channels] += column[j]
    for i in range(rows * width, x.size):
        distance = x[i] - mean[(i - rows * width) % channels]
        squares[(i - rows * width) % channels] += distance * distance


@device(fastmath=AS_WRITTEN)
def _normalise(x, y, start, stop, width, centre, scale, offset, code):
    """start: where a row begins; the last row may be a tail."""
    for at in range(start, stop, width):
        used = min(width, stop - at)
        row, result = x[at : at + used], y[at : at + used]
        for j in range(used):
            result[j] = minus(row[j], centre[j]) * scale[j] + offset[j]
    activate_row(y, start, stop - start, code)


@kernel(fastmath=AS_WRITTEN)
def forward_by_row(
    x, y, channels, width, block,
    running_mean, running_var, weight, bias, saved_mean, saved_invstd, training, momentum, eps, code,
):  # fmt: skip
    """Each chunk owns a block of `block` rows."""
    rows = x.size // width
    blocks = (rows + block - 1) // block
    centre, scale, offset = np.empty(width, x.dtype), np.empty(width, x.dtype), np.empty(width, x.dtype)
    if training:
        part_mean, part_squares = np.empty((blocks, width)), np.empty((blocks, width))
        for chunk in prange(blocks):
            count = min(block, rows - chunk * block)
            _block_moments(x, chunk * block * width, count, width, part_mean[chunk], part_squares[chunk])
        mean, squares = np.empty(channels), np.empty(channels)
        _channel_moments(x, channels, width, block, part_mean, part_squares, mean, squares)
        for c in range(channels):
            centre[c], scale[c], offset[c] = settle(
                c, x.size // channels, mean[c], squares[c],
                running_mean, running_var, weight, bias, saved_mean, saved_invstd, momentum, eps,
            )  # fmt: skip
    else:
        for c in range(channels):
            invstd = 1 / math.sqrt(np.float64(running_var[c]) + eps)
            centre[c], scale[c], offset[c] = coefficients(
                c, np.float64(running_mean[c]), invstd, weight, bias, saved_mean, saved_invstd
            )
    for j in range(channels, width):
        centre[j], scale[j], offset[j] = centre[j - channels], scale[j - channels], offset[j - channels]
    step = block * width
    for chunk in prange((x.size + step - 1) // step):
        start = chunk * step
        _normalise(x, y, start, min(start + step, x.size), width, centre, scale, offset, code)


@device(fastmath=AS_WRITTEN)
def _block_sums(grad, x, start, rows, width, centre, totals, products):
    """The sums of grad and of grad * (x - centre) down the columns of a block of rows."""
    total, product = np.zeros(width, x.dtype), np.zeros(width, x.dtype)
    whole = rows // 2 * 2
    for i in range(0, whole, 2):
        at = start + i * width
        g0, g1 = grad[at : at + width], grad[at + width : at + 2 * width]
        r0, r1 = x[at : at + width], x[at + width : at + 2 * width]
        for j in range(width):
            total[j] += g0[j] + g1[j]
            product[j] += g0[j] * minus(r0[j], centre[j]) + g1[j] * minus(r1[j], centre[j])
    for at in range(start + whole * width, start + rows * width, width):
        slopes, row = grad[at : at + width], x[at : at + width]
        for j in range(width):
            total[j] += slopes[j]
            product[j] += slopes[j] * minus(row[j], centre[j])
    for j in range(width):
        totals[j] = total[j]
        products[j] = product[j]


@device(fastmath=AS_WRITTEN)
def _gradient(grad, x, result, start, stop, width, centre, a, b, offset, training):
    for at in range(start, stop, width):
        used = min(width, stop - at)
        slopes, row, target = grad[at : at + used], x[at : at + used], result[at : at + used]
        if training:
            for j in range(used):
                target[j] = slopes[j] * a[j] + (minus(row[j], centre[j]) * b[j] + offset[j])
        else:
            for j in range(used):
                target[j] = slopes[j] * a[j]


@kernel(fastmath=AS_WRITTEN)
def backward_by_row(grad, x, result, channels, width, block, mean, invstd, weight, grad_weight, grad_bias, training):
    """Each chunk owns a block of `block` rows."""
    rows = x.size // width
    blocks = (rows + block - 1) // block
    centre = np.empty(width, x.dtype)
    for j in range(width):
        centre[j] = mean[j % channels]
    totals, products = np.empty((blocks, width)), np.empty((blocks, width))
    for chunk in prange(blocks):
        count = min(block, rows - chunk * block)
        _block_sums(grad, x, chunk * block * width, count, width, centre, totals[chunk], products[chunk])
    total, product = np.zeros(width), np.zeros(width)
    for part in range(blocks):
        for j in range(width):
            total[j] += totals[part, j]
            product[j] += products[part, j]
    for j in range(channels, width):
        total[j % channels] += total[j]
        product[j % channels] += product[j]
    for i in range(rows * width, x.size):
        c = (i - rows * width) % channels
        total[c] += grad[i]
        product[c] += grad[i] * minus(x[i], mean[c])
    a, b, offset = np.empty(width, x.dtype), np.empty(width, x.dtype), np.empty(width, x.dtype)
    for c in range(channels):
        a[c], b[c], offset[c] = gradient_coefficients(
            c, x.size // channels, total[c], product[c], invstd, weight, grad_weight, grad_bias, training
        )
    for j in range(channels, width):
        a[j], b[j], offset[j] = a[j - channels], b[j - channels], offset[j - channels]
    step = block * width
    for chunk in prange((x.size + step - 1) // step):
        start = chunk * step
        _gradient(grad, x, result, start, min(start + step, x.size), width, centre, a, b, offset, training)
