"""Batch norm where a pixel's channels are contiguous: NHWC and (N, C), as flat arrays.

Sums run down the rows, vectors across the channels. The rows are cut into blocks, whose moments or sums are merged in
order between two passes. Several pixels together make one row of `width` elements, a multiple of the number of
channels, so that few channels fill vectors too; element j of a row belongs to channel j % channels. The pixels that are
left after the last whole row are its tail.

Unlike in NCHW, no group of channels can stay in a cache between the passes: a strip of them, a power of two of bytes
apart, falls into a few of the cache's sets. So memory sees x twice, but for what a thread read last: there its second
pass starts. Three transfers instead of two in training, five instead of three for the gradient: where the arrays leave
the second-level cache, NCHW is faster by that much. Copying a strip of some cache lines of every pixel aside, so
that it does fit, was 1.3 to 3 times slower for the gradient, with or without prefetching.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.batchnorm_channel import (
    activate,
    add_sums,
    evaluation_factors,
    gradient_factors,
    merge_moments,
    settle,
)
from tilewise.kernels.cpu.batchnorm_vector import (
    FROZEN,
    FROZEN_NEAR,
    KEPT,
    NEAR,
    SEVERAL,
    STREAMED,
    rows_deviations,
    rows_gradient,
    rows_normalise,
    rows_sums,
    rows_total,
)
from tilewise.kernels.cpu.half_vector import number
from tilewise.kernels.cpu.jit import AS_WRITTEN, device, kernel
from tilewise.kernels.cpu.simd import address, settle_stores

# One row in so many gives a block's pivot, their mean: the other rows are read once. It lies within sqrt(3) standard
# deviations of the block's mean, wherever the outliers are, so that the variance loses two bits at most.
PIVOT_SHARE = 4


@device(fastmath=AS_WRITTEN)
def _block_moments(x, start, stride, rows, columns, moments, at, step):
    """The moments of a block's columns, as `merge_moments` takes them: moments[at + j], step further and so on."""
    pivots = moments[at : at + columns]
    pivots[:] = 0
    moments[at + step : at + step + columns] = 0
    moments[at + 2 * step : at + 2 * step + columns] = 0
    first = (rows + PIVOT_SHARE - 1) // PIVOT_SHARE
    rows_total(address(x, start), stride, first, columns, address(moments, at))
    share = moments.dtype.type(1) / moments.dtype.type(first)
    for j in range(columns):
        pivots[j] *= share
    rows_deviations(
        address(x, start), stride, rows, columns,
        address(moments, at), address(moments, at + step), address(moments, at + 2 * step), rows * stride,
    )  # fmt: skip


@device(fastmath=AS_WRITTEN)
def _fold_moments(x, channels, width, mean, squares):
    """Merge the columns that belong to one channel, and the tail, into the first `channels` columns."""
    rows = np.float64(x.size // width)
    for other in range(channels, width, channels):
        share = rows / (other // channels * rows + rows)
        weight = other // channels * rows * share
        means, deviations = mean[other : other + channels], squares[other : other + channels]
        for c in range(channels):
            distance = means[c] - mean[c]
            mean[c] += distance * share
            squares[c] += deviations[c] + distance * distance * weight
    count = rows * (width // channels)
    for start in range(x.size // width * width, x.size, channels):
        share = 1 / (count + 1)
        for c in range(channels):
            distance = np.float64(number(address(x, start + c))) - mean[c]
            mean[c] += distance * share
            squares[c] += distance * distance * count * share
        count += 1


@device(fastmath=AS_WRITTEN)
def _spread(factors, kinds, channels, width):
    """Repeat the channels' factors, of some kinds, over a row."""
    for kind in range(kinds):
        for j in range(kind * width + channels, (kind + 1) * width):
            factors[j] = factors[j - channels]


@device(fastmath=AS_WRITTEN)
def _backwards(turn, chunks, threads):
    """The chunk to take when `turn` of them have been taken: each of the threads goes through its share from the end.

    Numba gives each thread the turns of one range. Where it draws the line differently, only time is lost."""
    thread = turn * threads // chunks
    first = (thread * chunks + threads - 1) // threads
    end = ((thread + 1) * chunks + threads - 1) // threads
    return first + end - 1 - turn


@device(fastmath=AS_WRITTEN)
def _normalise_rows(x, y, at, stride, rows, columns, factors, step, mode):
    values, target = address(x, at), address(y, at)
    centre, scale, offset = address(factors, 0), address(factors, step), address(factors, 2 * step)
    if SEVERAL and mode == NEAR:
        rows_normalise(NEAR, values, target, stride, rows, columns, centre, scale, offset)
    elif mode == STREAMED:
        rows_normalise(STREAMED, values, target, stride, rows, columns, centre, scale, offset)
        settle_stores()
    else:
        rows_normalise(KEPT, values, target, stride, rows, columns, centre, scale, offset)


@kernel(fastmath=AS_WRITTEN)
def forward_by_row(
    x, y, channels, width, block, running_mean, running_var, weight, bias, saved_mean, saved_invstd,
    training, momentum, eps, code, mode, threads,
):  # fmt: skip
    """Each chunk owns a block of `block` rows."""
    rows = x.size // width
    blocks = (rows + block - 1) // block
    factors = np.empty(3 * width, weight.dtype)
    if training:
        moments = np.empty(3 * blocks * width, weight.dtype)
        for chunk in prange(blocks):
            count = min(block, rows - chunk * block)
            _block_moments(x, chunk * block * width, width, count, width, moments, chunk * width, blocks * width)
        mean, squares = np.zeros(width), np.zeros(width)
        for part in range(blocks):
            before = part * block
            count = min(block, rows - before)
            merge_moments(np.float64(before), np.float64(count), moments, part * width, blocks * width, mean, squares)
        _fold_moments(x, channels, width, mean, squares)
        settle(
            0, np.float64(x.size // channels), mean[:channels], squares[:channels], running_mean, running_var,
            weight, bias, saved_mean, saved_invstd, momentum, eps, factors, width,
        )  # fmt: skip
    else:
        evaluation_factors(running_mean, running_var, eps, weight, bias, saved_mean, saved_invstd, factors, width)
    _spread(factors, 3, channels, width)
    step = block * width
    chunks = (x.size + step - 1) // step
    for turn in prange(chunks):
        chunk = _backwards(turn, chunks, threads) if training else turn
        start = chunk * step
        whole = min(block, rows - chunk * block)
        _normalise_rows(x, y, start, width, whole, width, factors, width, mode)
        tail = start + whole * width
        stop = min(start + step, x.size)
        if tail < stop:
            _normalise_rows(x, y, tail, width, 1, stop - tail, factors, width, mode)
        activate(y, start, stop - start, code)


@device(fastmath=AS_WRITTEN)
def _block_sums(grad, x, start, stride, rows, columns, centre, sums, at, step, mode):
    """sums[at + j] and [at + step + j] = the sums of grad and of grad * (x - centre[j]) down a block's columns."""
    sums[at : at + columns] = 0
    sums[at + step : at + step + columns] = 0
    slopes, values, total, product = (
        address(grad, start),
        address(x, start),
        address(sums, at),
        address(sums, at + step),
    )
    if SEVERAL and NEAR <= mode <= FROZEN_NEAR:
        rows_sums(NEAR, slopes, values, stride, rows, columns, centre, total, product)
    elif mode == STREAMED:
        rows_sums(STREAMED, slopes, values, stride, rows, columns, centre, total, product)
    else:
        rows_sums(KEPT, slopes, values, stride, rows, columns, centre, total, product)


@device(fastmath=AS_WRITTEN)
def _fold_sums(grad, x, channels, width, centre, total, product):
    for j in range(channels, width):
        total[j % channels] += total[j]
        product[j % channels] += product[j]
    for start in range(x.size // width * width, x.size, channels):
        for c in range(channels):
            slope = number(address(grad, start + c))
            total[c] += slope
            product[c] += slope * (number(address(x, start + c)) - centre[c])


@device(fastmath=AS_WRITTEN)
def _gradient_rows(grad, x, result, at, stride, rows, columns, factors, step, mode):
    slopes, values, target = address(grad, at), address(x, at), address(result, at)
    centre, a = address(factors, 0), address(factors, step)
    b, offset = address(factors, 2 * step), address(factors, 3 * step)
    if SEVERAL and mode == NEAR:
        rows_gradient(NEAR, slopes, values, target, stride, rows, columns, centre, a, b, offset)
    elif mode == STREAMED:
        rows_gradient(STREAMED, slopes, values, target, stride, rows, columns, centre, a, b, offset)
        settle_stores()
    elif mode >= FROZEN_NEAR:  # which reads one factor only
        rows_gradient(FROZEN, slopes, values, target, stride, rows, columns, centre, a, b, offset)
    else:
        rows_gradient(KEPT, slopes, values, target, stride, rows, columns, centre, a, b, offset)


@kernel(fastmath=AS_WRITTEN)
def backward_by_row(
    grad, x, result, channels, width, block, mean, invstd, weight, grad_weight, grad_bias, mode, threads,
):  # fmt: skip
    """Each chunk owns a block of `block` rows."""
    rows = x.size // width
    blocks = (rows + block - 1) // block
    factors = np.empty(4 * width, weight.dtype)
    factors[:channels] = mean
    _spread(factors, 1, channels, width)
    sums = np.empty(2 * blocks * width, weight.dtype)
    for chunk in prange(blocks):
        count = min(block, rows - chunk * block)
        start = chunk * block * width
        _block_sums(grad, x, start, width, count, width, address(factors, 0), sums, chunk * width, blocks * width, mode)
    total, product = np.zeros(width), np.zeros(width)
    for part in range(blocks):
        add_sums(sums, part * width, blocks * width, total, product)
    _fold_sums(grad, x, channels, width, factors, total, product)
    gradient_factors(
        0, np.float64(x.size // channels), total[:channels], product[:channels], mean, invstd, weight,
        grad_weight, grad_bias, factors, width,
    )  # fmt: skip
    _spread(factors, 4, channels, width)
    step = block * width
    chunks = (x.size + step - 1) // step
    for turn in prange(chunks):
        chunk = _backwards(turn, chunks, threads)
        start = chunk * step
        whole = min(block, rows - chunk * block)
        _gradient_rows(grad, x, result, start, width, whole, width, factors, width, mode)
        tail = start + whole * width
        stop = min(start + step, x.size)
        if tail < stop:
            _gradient_rows(grad, x, result, tail, width, 1, stop - tail, factors, width, mode)
