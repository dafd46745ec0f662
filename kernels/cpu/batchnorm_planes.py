"""Batch norm where a channel's pixels are contiguous: NCHW, as arrays of (images, channels, pixels).

With enough channels each chunk owns some of them and does everything for them: their planes are still in the
second-level cache when they are read again, so that memory sees x once. With few channels, and in evaluation, the
planes are cut into blocks, whose moments or sums are merged in order between two passes.
"""

import math

import numpy as np
from numba import prange

from tilewise.kernels.cpu.batchnorm_channel import (
    AS_WRITTEN,
    BLOCK,
    coefficients,
    gradient_coefficients,
    merged,
    minus,
    plus,
    run_moments,
    settle,
)
from tilewise.kernels.cpu.epilogue import activate_row
from tilewise.kernels.cpu.jit import device, kernel

SPLIT = 32768  # elements in a chunk of blocks: a few microseconds of work


@device(inline="always")
def _normalise(x, y, centre, scale, offset):
    for i in range(x.size):
        y[i] = minus(x[i], centre) * scale + offset


@device(allocates=True)
def _forward_channels(
    x, y, first, last, running_mean, running_var, weight, bias, saved_mean, saved_invstd, momentum, eps, code
):
    """Everything for the channels from first to last, image by image, so that small planes are read in order."""
    images, channels, plane = x.shape
    means, squares = np.zeros(last - first), np.zeros(last - first)
    for image in range(images):
        for c in range(last - first):
            row = x[image, first + c]
            for start in range(0, plane, BLOCK):
                stop = min(start + BLOCK, plane)
                moments = run_moments(row[start:stop])
                count = np.float64(image * plane + start)
                means[c], squares[c] = merged(count, means[c], squares[c], stop - start, moments[0], moments[1])
    own = last - first
    centre, scale, offset = np.empty(own, x.dtype), np.empty(own, x.dtype), np.empty(own, x.dtype)
    for c in range(last - first):
        centre[c], scale[c], offset[c] = settle(
            first + c, images * plane, means[c], squares[c],
            running_mean, running_var, weight, bias, saved_mean, saved_invstd, momentum, eps,
        )  # fmt: skip
    for image in range(images):
        for c in range(last - first):
            row, result = x[image, first + c], y[image, first + c]
            for start in range(0, plane, BLOCK):
                stop = min(start + BLOCK, plane)
                _normalise(row[start:stop], result[start:stop], centre[c], scale[c], offset[c])
        if code:
            activate_row(y.reshape(y.size), (image * channels + first) * plane, own * plane, code)


@kernel()
def forward_by_channel(
    x, y, group, running_mean, running_var, weight, bias, saved_mean, saved_invstd, momentum, eps, code
):
    """Training; each chunk owns `group` channels."""
    channels = x.shape[1]
    for chunk in prange((channels + group - 1) // group):
        first = chunk * group
        _forward_channels(
            x, y, first, min(first + group, channels),
            running_mean, running_var, weight, bias, saved_mean, saved_invstd, momentum, eps, code,
        )  # fmt: skip


@device()
def _position(unit, channels, blocks):
    """(image, channel, block of the plane) of a block counted through all of them."""
    return unit // (channels * blocks), unit // blocks % channels, unit % blocks


@device()
def _next(image, c, block, channels, blocks):
    """The position after this one; divisions would cost more than a small plane."""
    block += 1
    if block == blocks:
        block, c = 0, c + 1
    if c == channels:
        c, image = 0, image + 1
    return image, c, block


@device()
def _moments_of_blocks(x, blocks, begin, end, part_mean, part_squares):
    """The moments of the blocks from begin to end, counted through images, channels and the blocks of a plane."""
    _, channels, plane = x.shape
    image, c, block = _position(begin, channels, blocks)
    for _ in range(begin, end):
        start = block * BLOCK
        part = image * blocks + block
        row = x[image, c, start : min(start + BLOCK, plane)]
        part_mean[part, c], part_squares[part, c] = run_moments(row)
        image, c, block = _next(image, c, block, channels, blocks)


@device(fastmath=AS_WRITTEN)
def _merge_blocks(images, plane, blocks, c, part_mean, part_squares):
    mean, squares, count = 0.0, 0.0, 0.0
    for part in range(images * blocks):
        size = np.float64(min(BLOCK, plane - part % blocks * BLOCK))
        mean, squares = merged(count, mean, squares, size, part_mean[part, c], part_squares[part, c])
        count += size
    return mean, squares


@device()
def _normalise_blocks(x, y, blocks, begin, end, centre, scale, offset, code):
    _, channels, plane = x.shape
    image, c, block = _position(begin, channels, blocks)
    first = (image * channels + c) * plane + block * BLOCK
    for _ in range(begin, end):
        start = block * BLOCK
        stop = min(start + BLOCK, plane)
        _normalise(x[image, c, start:stop], y[image, c, start:stop], centre[c], scale[c], offset[c])
        image, c, block = _next(image, c, block, channels, blocks)
    if code:
        last = (image * channels + c) * plane + block * BLOCK
        activate_row(y.reshape(y.size), first, last - first, code)


@kernel()
def forward_by_block(
    x, y, running_mean, running_var, weight, bias, saved_mean, saved_invstd, training, momentum, eps, code
):
    """Evaluation, and training with few channels; each chunk owns some blocks of the planes."""
    images, channels, plane = x.shape
    blocks = (plane + BLOCK - 1) // BLOCK
    units = images * channels * blocks
    step = SPLIT // min(plane, BLOCK)
    chunks = (units + step - 1) // step
    parts = images * blocks if training else 0
    part_mean, part_squares = np.empty((parts, channels)), np.empty((parts, channels))
    centre, scale, offset = np.empty(channels, x.dtype), np.empty(channels, x.dtype), np.empty(channels, x.dtype)
    if training:
        for chunk in prange(chunks):
            _moments_of_blocks(x, blocks, chunk * step, min(chunk * step + step, units), part_mean, part_squares)
        for c in range(channels):
            mean, squares = _merge_blocks(images, plane, blocks, c, part_mean, part_squares)
            centre[c], scale[c], offset[c] = settle(
                c, images * plane, mean, squares,
                running_mean, running_var, weight, bias, saved_mean, saved_invstd, momentum, eps,
            )  # fmt: skip
    else:
        for c in range(channels):
            invstd = 1 / math.sqrt(np.float64(running_var[c]) + eps)
            centre[c], scale[c], offset[c] = coefficients(
                c, np.float64(running_mean[c]), invstd, weight, bias, saved_mean, saved_invstd
            )
    for chunk in prange(chunks):
        _normalise_blocks(x, y, blocks, chunk * step, min(chunk * step + step, units), centre, scale, offset, code)


@device(inline="always")
def _run_sums(grad, x, centre):
    """The sums of grad and of grad * (x - centre) over a run, in float64."""
    total, product = x.dtype.type(0), x.dtype.type(0)
    for i in range(x.size):
        total += grad[i]
        product += grad[i] * minus(x[i], centre)
    return np.float64(total), np.float64(product)


@device(inline="always")
def _run_gradient(grad, x, result, centre, a, b, offset, training):
    if training:
        for i in range(x.size):
            result[i] = plus(grad[i] * a, minus(x[i], centre) * b + offset)
    else:
        for i in range(x.size):
            result[i] = grad[i] * a


@device(allocates=True)
def _backward_channels(grad, x, result, first, last, mean, invstd, weight, grad_weight, grad_bias, training):
    images, _, plane = x.shape
    totals, products = np.zeros(last - first), np.zeros(last - first)
    for image in range(images):
        for c in range(last - first):
            for start in range(0, plane, BLOCK):
                stop = min(start + BLOCK, plane)
                slopes, row = grad[image, first + c, start:stop], x[image, first + c, start:stop]
                sums = _run_sums(slopes, row, mean[first + c])
                totals[c] = plus(totals[c], sums[0])
                products[c] = plus(products[c], sums[1])
    own = last - first
    a, b, offset = np.empty(own, x.dtype), np.empty(own, x.dtype), np.empty(own, x.dtype)
    for c in range(last - first):
        a[c], b[c], offset[c] = gradient_coefficients(
            first + c, images * plane, totals[c], products[c], invstd, weight, grad_weight, grad_bias, training
        )
    for image in range(images):
        for c in range(last - first):
            _run_gradient(
                grad[image, first + c], x[image, first + c], result[image, first + c],
                mean[first + c], a[c], b[c], offset[c], training,
            )  # fmt: skip


@kernel()
def backward_by_channel(grad, x, result, group, mean, invstd, weight, grad_weight, grad_bias, training):
    """Each chunk owns `group` channels."""
    channels = x.shape[1]
    for chunk in prange((channels + group - 1) // group):
        first = chunk * group
        last = min(first + group, channels)
        _backward_channels(grad, x, result, first, last, mean, invstd, weight, grad_weight, grad_bias, training)


@device()
def _sums_of_blocks(grad, x, blocks, begin, end, mean, totals, products):
    _, channels, plane = x.shape
    image, c, block = _position(begin, channels, blocks)
    for _ in range(begin, end):
        start = block * BLOCK
        part = image * blocks + block
        stop = min(start + BLOCK, plane)
        totals[part, c], products[part, c] = _run_sums(grad[image, c, start:stop], x[image, c, start:stop], mean[c])
        image, c, block = _next(image, c, block, channels, blocks)


@device()
def _gradients_of_blocks(grad, x, result, blocks, begin, end, mean, a, b, offset, training):
    _, channels, plane = x.shape
    image, c, block = _position(begin, channels, blocks)
    for _ in range(begin, end):
        start = block * BLOCK
        stop = min(start + BLOCK, plane)
        _run_gradient(
            grad[image, c, start:stop], x[image, c, start:stop], result[image, c, start:stop],
            mean[c], a[c], b[c], offset[c], training,
        )  # fmt: skip
        image, c, block = _next(image, c, block, channels, blocks)


@device(fastmath=AS_WRITTEN)
def _column_sum(parts, c):
    total = 0.0
    for part in range(parts.shape[0]):
        total += parts[part, c]
    return total


@kernel()
def backward_by_block(grad, x, result, mean, invstd, weight, grad_weight, grad_bias, training):
    """With few channels; each chunk owns some blocks of the planes."""
    images, channels, plane = x.shape
    blocks = (plane + BLOCK - 1) // BLOCK
    units = images * channels * blocks
    step = SPLIT // min(plane, BLOCK)
    chunks = (units + step - 1) // step
    totals, products = np.empty((images * blocks, channels)), np.empty((images * blocks, channels))
    a, b, offset = np.empty(channels, x.dtype), np.empty(channels, x.dtype), np.empty(channels, x.dtype)
    for chunk in prange(chunks):
        _sums_of_blocks(grad, x, blocks, chunk * step, min(chunk * step + step, units), mean, totals, products)
    for c in range(channels):
        total, product = _column_sum(totals, c), _column_sum(products, c)
        a[c], b[c], offset[c] = gradient_coefficients(
            c, images * plane, total, product, invstd, weight, grad_weight, grad_bias, training
        )
    for chunk in prange(chunks):
        begin, end = chunk * step, min(chunk * step + step, units)
        _gradients_of_blocks(grad, x, result, blocks, begin, end, mean, a, b, offset, training)
