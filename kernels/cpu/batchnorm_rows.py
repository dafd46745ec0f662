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
from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.half_vector import number
from tilewise.kernels.cpu.jit import AS_WRITTEN, kernel
from tilewise.kernels.cpu.scratch import double_zeros, scratch
from tilewise.kernels.cpu.simd import address, settle_stores

# One row in so many gives a block's pivot, their mean: the other rows are read once. It lies within sqrt(3) standard
# deviations of the block's mean, wherever the outliers are, so that the variance loses two bits at most.
PIVOT_SHARE = 4


@emitted
def _row_blocks(x, width, block):
    return (x.size // width + block - 1) // block


@emitted
def _clear(flat, start, count):
    for i in range(start, start + count):
        flat[i] = 0


@emitted
def _block_moments(x, chunk, width, block, moments):
    """The moments of a block's columns, as `merge_moments` takes them, those of all blocks side by side."""
    step = _row_blocks(x, width, block) * width
    rows = min(block, x.size // width - chunk * block)
    source, at = address(x, chunk * block * width), chunk * width
    pivots, sums, squares = address(moments, at), address(moments, at + step), address(moments, at + 2 * step)
    for kind in range(3):
        _clear(moments, at + kind * step, width)
    first = (rows + PIVOT_SHARE - 1) // PIVOT_SHARE
    rows_total(source, width, first, width, pivots)
    kind_of = moments.dtype.type
    share = kind_of(1) / kind_of(first)
    for j in range(width):
        moments[at + j] *= share
    rows_deviations(source, width, rows, width, pivots, sums, squares, rows * width)


@emitted
def _fold_moments(x, channels, width, mean, squares):
    """Merge the columns that belong to one channel, and the tail, into the first `channels` columns."""
    rows = np.float64(x.size // width)
    for other in range(channels, width, channels):
        share = rows / (other // channels * rows + rows)
        weight = other // channels * rows * share
        for c in range(channels):
            distance = mean[other + c] - mean[c]
            mean[c] += distance * share
            squares[c] += squares[other + c] + distance * distance * weight
    count = rows * (width // channels)
    for start in range(x.size // width * width, x.size, channels):
        share = 1 / (count + 1)
        for c in range(channels):
            distance = np.float64(number(address(x, start + c))) - mean[c]
            mean[c] += distance * share
            squares[c] += distance * distance * count * share
        count += 1


@emitted
def _spread(factors, kinds, channels, width):
    """Repeat the channels' factors, of some kinds, over a row."""
    for kind in range(kinds):
        for j in range(kind * width + channels, (kind + 1) * width):
            factors[j] = factors[j - channels]


@emitted
def _factors_in_training(
    x, channels, width, block, moments, running_mean, running_var, weight, bias, saved_mean, saved_invstd,
    momentum, eps, factors,
):  # fmt: skip
    """The factors of a row, from the moments of all blocks."""
    rows, blocks = x.size // width, _row_blocks(x, width, block)
    mean, squares = double_zeros(width), double_zeros(width)
    for part in range(blocks):
        before = part * block
        count = min(block, rows - before)
        merge_moments(np.float64(before), np.float64(count), moments, part * width, blocks * width, mean, squares)
    _fold_moments(x, channels, width, mean, squares)
    settle(
        0, np.float64(x.size // channels), mean[:channels], squares[:channels], running_mean, running_var,
        weight, bias, saved_mean, saved_invstd, momentum, eps, factors, width,
    )  # fmt: skip


@emitted
def _backwards(turn, chunks, threads):
    """The chunk to take when `turn` of them have been taken: each of the threads goes through its share from the end.

    Numba gives each thread the turns of one range. Where it draws the line differently, only time is lost."""
    thread = turn * threads // chunks
    first = (thread * chunks + threads - 1) // threads
    end = ((thread + 1) * chunks + threads - 1) // threads
    return first + end - 1 - turn


@emitted
def _normalise_rows(x, y, chunk, width, block, factors, mode):
    """A chunk's whole rows, then its part of a row, if it has one."""
    centre, scale, offset = address(factors, 0), address(factors, width), address(factors, 2 * width)
    at, end = chunk * block * width, min((chunk + 1) * block * width, x.size)
    while at < end:
        rows, columns = max((end - at) // width, 1), min(end - at, width)
        values, target = address(x, at), address(y, at)
        if SEVERAL and mode == NEAR:
            rows_normalise(NEAR, values, target, width, rows, columns, centre, scale, offset)
        elif mode == STREAMED:
            rows_normalise(STREAMED, values, target, width, rows, columns, centre, scale, offset)
            settle_stores()
        else:
            rows_normalise(KEPT, values, target, width, rows, columns, centre, scale, offset)
        at += rows * columns


@emitted
def _normalise_chunk(x, y, chunk, width, block, factors, code, mode):
    _normalise_rows(x, y, chunk, width, block, factors, mode)
    start = chunk * block * width
    activate(y, start, min(start + block * width, x.size) - start, code)


@kernel(fastmath=AS_WRITTEN)
def forward_by_row(
    x, y, channels, width, block, running_mean, running_var, weight, bias, saved_mean, saved_invstd,
    training, momentum, eps, code, mode, threads,
):  # fmt: skip
    """Each chunk owns a block of `block` rows."""
    factors = scratch(3 * width, weight)
    if training:
        blocks = _row_blocks(x, width, block)
        moments = scratch(3 * blocks * width, weight)
        for chunk in prange(blocks):
            _block_moments(x, np.int64(chunk), width, block, moments)
        _factors_in_training(
            x, channels, width, block, moments, running_mean, running_var, weight, bias, saved_mean, saved_invstd,
            momentum, eps, factors,
        )  # fmt: skip
    else:
        evaluation_factors(running_mean, running_var, eps, weight, bias, saved_mean, saved_invstd, factors, width)
    _spread(factors, 3, channels, width)
    chunks = (x.size + block * width - 1) // (block * width)
    shares = threads if training else chunks  # which are taken in order
    for turn in prange(chunks):
        chunk = _backwards(np.int64(turn), chunks, shares)
        _normalise_chunk(x, y, chunk, width, block, factors, code, mode)


@emitted
def _centres(mean, channels, width, factors):
    for c in range(channels):
        factors[c] = mean[c]
    _spread(factors, 1, channels, width)


@emitted
def _block_sums(grad, x, chunk, width, block, centre, sums, mode):
    """The sums of grad and of grad * (x - centre[j]) down a block's columns, those of all blocks side by side."""
    rows = min(block, x.size // width - chunk * block)
    start, at = chunk * block * width, chunk * width
    slopes, values, middle = address(grad, start), address(x, start), address(centre, 0)
    step = _row_blocks(x, width, block) * width
    total, product = address(sums, at), address(sums, at + step)
    _clear(sums, at, width)
    _clear(sums, at + step, width)
    if SEVERAL and NEAR <= mode <= FROZEN_NEAR:
        rows_sums(NEAR, slopes, values, width, rows, width, middle, total, product)
    elif mode == STREAMED:
        rows_sums(STREAMED, slopes, values, width, rows, width, middle, total, product)
    else:
        rows_sums(KEPT, slopes, values, width, rows, width, middle, total, product)


@emitted
def _fold_sums(grad, x, channels, width, centre, total, product):
    """Add the columns that belong to one channel, and the tail, to the first `channels` columns."""
    for j in range(channels, width):
        total[j % channels] += total[j]
        product[j % channels] += product[j]
    for start in range(x.size // width * width, x.size, channels):
        for c in range(channels):
            slope = number(address(grad, start + c))
            total[c] += slope
            product[c] += slope * (number(address(x, start + c)) - centre[c])


@emitted
def _factors_of_gradient(grad, x, channels, width, block, sums, mean, invstd, weight, grad_weight, grad_bias, factors):
    """The factors of a row, from the sums of all blocks."""
    blocks = _row_blocks(x, width, block)
    total, product = double_zeros(width), double_zeros(width)
    for part in range(blocks):
        add_sums(sums, part * width, blocks * width, total, product)
    _fold_sums(grad, x, channels, width, factors, total, product)
    gradient_factors(
        0, np.float64(x.size // channels), total[:channels], product[:channels], mean, invstd, weight,
        grad_weight, grad_bias, factors, width,
    )  # fmt: skip
    _spread(factors, 4, channels, width)


@emitted
def _gradient_rows(grad, x, result, chunk, width, block, factors, mode):
    """As `_normalise_rows`."""
    centre, a = address(factors, 0), address(factors, width)
    b, offset = address(factors, 2 * width), address(factors, 3 * width)
    at, end = chunk * block * width, min((chunk + 1) * block * width, x.size)
    while at < end:
        rows, columns = max((end - at) // width, 1), min(end - at, width)
        slopes, values, target = address(grad, at), address(x, at), address(result, at)
        if SEVERAL and mode == NEAR:
            rows_gradient(NEAR, slopes, values, target, width, rows, columns, centre, a, b, offset)
        elif mode == STREAMED:
            rows_gradient(STREAMED, slopes, values, target, width, rows, columns, centre, a, b, offset)
            settle_stores()
        elif mode >= FROZEN_NEAR:  # which reads one factor only
            rows_gradient(FROZEN, slopes, values, target, width, rows, columns, centre, a, b, offset)
        else:
            rows_gradient(KEPT, slopes, values, target, width, rows, columns, centre, a, b, offset)
        at += rows * columns


@kernel(fastmath=AS_WRITTEN)
def backward_by_row(
    grad, x, result, channels, width, block, mean, invstd, weight, grad_weight, grad_bias, mode, threads,
):  # fmt: skip
    """Each chunk owns a block of `block` rows."""
    blocks = _row_blocks(x, width, block)
    factors, sums = scratch(4 * width, weight), scratch(2 * blocks * width, weight)
    _centres(mean, channels, width, factors)
    for chunk in prange(blocks):
        _block_sums(grad, x, np.int64(chunk), width, block, factors, sums, mode)
    _factors_of_gradient(grad, x, channels, width, block, sums, mean, invstd, weight, grad_weight, grad_bias, factors)
    chunks = (x.size + block * width - 1) // (block * width)
    for turn in prange(chunks):
        chunk = _backwards(np.int64(turn), chunks, threads)
        _gradient_rows(grad, x, result, chunk, width, block, factors, mode)
