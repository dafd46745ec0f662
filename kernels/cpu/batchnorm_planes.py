"""Batch norm where a channel's pixels are contiguous: NCHW, as flat arrays of `images` x `channels` planes.

With enough channels each chunk owns a group of them and does everything for them: their planes are still in the
second-level cache when they are read again, so that memory sees x once. With few channels, and in evaluation, the
planes are cut into blocks, whose moments or sums are merged in order between two passes.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.batchnorm_channel import (
    BLOCK,
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
    STREAMED,
    planes_gradient,
    planes_normalise,
    run_moments,
    run_sums,
)
from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.jit import AS_WRITTEN, kernel
from tilewise.kernels.cpu.scratch import double_zeros, scratch
from tilewise.kernels.cpu.simd import address, settle_stores

SPLIT = 8192  # elements in a chunk of blocks: a microsecond of work, so that two threads have as much to do
# Evaluation does not cut planes of so many elements into blocks, each with ends of its own, unless there are few.
WHOLE, FEW = 4 * BLOCK, 4


@emitted
def _normalise_runs(x, y, at, count, length, factors, first, step, streamed):
    """The results of `count` channels from the first one on, whose runs of this length follow each other."""
    source, target = address(x, at), address(y, at)
    centre, scale, offset = address(factors, first), address(factors, step + first), address(factors, 2 * step + first)
    if streamed:
        planes_normalise(STREAMED, source, target, count, length, centre, scale, offset)
    else:
        planes_normalise(KEPT, source, target, count, length, centre, scale, offset)


@emitted
def _forward_channels(
    x, y, images, channels, plane, group, chunk, running_mean, running_var, weight, bias, saved_mean, saved_invstd,
    momentum, eps, code, streamed,
):  # fmt: skip
    """Everything for a chunk's channels, image by image, so that small planes are read in order."""
    first = chunk * group
    own = min(group, channels - first)
    mean, squares, factors = double_zeros(own), double_zeros(own), scratch(3 * own, weight)
    for image in range(images):
        base = (image * channels + first) * plane
        for start in range(0, plane, BLOCK):
            size = min(BLOCK, plane - start)
            for c in range(own):
                run_moments(address(x, base + c * plane + start), size, address(factors, c), own)
            merge_moments(np.float64(image * plane + start), np.float64(size), factors, 0, own, mean, squares)
    settle(
        first, np.float64(images * plane), mean, squares, running_mean, running_var, weight, bias,
        saved_mean, saved_invstd, momentum, eps, factors, own,
    )  # fmt: skip
    for image in range(images):
        base = (image * channels + first) * plane
        _normalise_runs(x, y, base, own, plane, factors, 0, own, streamed)
        activate(y, base, own * plane, code)
    if streamed:
        settle_stores()


@kernel(fastmath=AS_WRITTEN)
def forward_by_channel(
    x, y, images, channels, plane, group, running_mean, running_var, weight, bias, saved_mean, saved_invstd,
    momentum, eps, code, streamed,
):  # fmt: skip
    """Training; each chunk owns `group` channels."""
    for chunk in prange((channels + group - 1) // group):
        _forward_channels(
            x, y, images, channels, plane, group, np.int64(chunk), running_mean, running_var, weight, bias,
            saved_mean, saved_invstd, momentum, eps, code, streamed,
        )  # fmt: skip


@emitted
def _division(images, channels, plane, training):
    """(the blocks of a plane, how many of all blocks a chunk owns, chunks)."""
    blocks = (plane + BLOCK - 1) // BLOCK
    if not training and plane <= WHOLE and images * channels >= FEW:
        blocks = 1
    step = max(SPLIT * blocks // plane, 1)
    return blocks, step, (images * channels * blocks + step - 1) // step


@emitted
def _position(unit, channels, blocks):
    """(image, channel, block of the plane) of a block counted through all of them."""
    return unit // (channels * blocks), unit // blocks % channels, unit % blocks


@emitted
def _next(image, c, block, channels, blocks):
    """The position after this one; divisions would cost more than a small plane."""
    block += 1
    if block == blocks:
        block, c = 0, c + 1
    if c == channels:
        c, image = 0, image + 1
    return image, c, block


@emitted
def _moments_of_blocks(x, images, channels, plane, blocks, chunk, step, moments):
    """The moments of a chunk's blocks, counted through images, channels and the blocks of a plane."""
    parts = images * channels * blocks
    begin, end = chunk * step, min(chunk * step + step, parts)
    image, c, block = _position(begin, channels, blocks)
    for _ in range(begin, end):
        start = block * BLOCK
        at = (image * channels + c) * plane + start
        target = (image * blocks + block) * channels + c
        run_moments(address(x, at), min(BLOCK, plane - start), address(moments, target), parts)
        image, c, block = _next(image, c, block, channels, blocks)


@emitted
def _factors_in_training(
    images, channels, plane, blocks, moments, running_mean, running_var, weight, bias, saved_mean, saved_invstd,
    momentum, eps, factors,
):  # fmt: skip
    """The factors of all channels, from the moments of all blocks."""
    mean, squares = double_zeros(channels), double_zeros(channels)
    count = 0.0
    for part in range(images * blocks):
        size = np.float64(min(BLOCK, plane - part % blocks * BLOCK))
        merge_moments(count, size, moments, part * channels, images * blocks * channels, mean, squares)
        count += size
    settle(
        0, np.float64(images * plane), mean, squares, running_mean, running_var, weight, bias,
        saved_mean, saved_invstd, momentum, eps, factors, channels,
    )  # fmt: skip


@emitted
def _runs(c, block, channels, plane, blocks, left):
    """(how many of the blocks `left` follow each other in one image and are as long, their length)."""
    if blocks > 1:
        return 1, min(BLOCK, plane - block * BLOCK)
    return min(channels - c, left), plane


@emitted
def _normalise_blocks(x, y, images, channels, plane, blocks, chunk, step, factors, code, streamed):
    begin, end = chunk * step, min(chunk * step + step, images * channels * blocks)
    image, c, block = _position(begin, channels, blocks)
    first = at = (image * channels + c) * plane + block * BLOCK
    while begin < end:
        count, length = _runs(c, block, channels, plane, blocks, end - begin)
        _normalise_runs(x, y, at, count, length, factors, c, channels, streamed)
        at += count * length
        begin += count
        image, c, block = _next(image, c + count - 1, block, channels, blocks)
    activate(y, first, at - first, code)
    if streamed:
        settle_stores()


@kernel(fastmath=AS_WRITTEN)
def forward_by_block(
    x, y, images, channels, plane, running_mean, running_var, weight, bias, saved_mean, saved_invstd,
    training, momentum, eps, code, streamed,
):  # fmt: skip
    """Evaluation, and training with few channels; each chunk owns some blocks of the planes."""
    blocks, step, chunks = _division(images, channels, plane, training)
    factors = scratch(3 * channels, weight)
    if training:
        moments = scratch(3 * images * blocks * channels, weight)
        for chunk in prange(chunks):
            _moments_of_blocks(x, images, channels, plane, blocks, np.int64(chunk), step, moments)
        _factors_in_training(
            images, channels, plane, blocks, moments, running_mean, running_var, weight, bias,
            saved_mean, saved_invstd, momentum, eps, factors,
        )  # fmt: skip
    else:
        evaluation_factors(running_mean, running_var, eps, weight, bias, saved_mean, saved_invstd, factors, channels)
    for chunk in prange(chunks):
        _normalise_blocks(x, y, images, channels, plane, blocks, np.int64(chunk), step, factors, code, streamed)


@emitted
def _gradient_runs(grad, x, result, at, count, length, factors, first, step, mode):
    """The gradients of `count` channels from the first one on, whose runs of this length follow each other."""
    slopes, values, target = address(grad, at), address(x, at), address(result, at)
    centre, a = address(factors, first), address(factors, step + first)
    b, offset = address(factors, 2 * step + first), address(factors, 3 * step + first)
    if mode == STREAMED:
        planes_gradient(STREAMED, slopes, values, target, count, length, centre, a, b, offset)
    elif mode >= FROZEN_NEAR:
        planes_gradient(FROZEN, slopes, values, target, count, length, centre, a, b, offset)
    else:
        planes_gradient(KEPT, slopes, values, target, count, length, centre, a, b, offset)


@emitted
def _backward_channels(
    grad, x, result, images, channels, plane, group, chunk, mean, invstd, weight, grad_weight, grad_bias, mode
):
    first = chunk * group
    own = min(group, channels - first)
    total, product, factors = double_zeros(own), double_zeros(own), scratch(4 * own, weight)
    for image in range(images):
        base = (image * channels + first) * plane
        for start in range(0, plane, BLOCK):
            size = min(BLOCK, plane - start)
            for c in range(own):
                at = base + c * plane + start
                run_sums(address(grad, at), address(x, at), size, mean[first + c], address(factors, c), own)
            add_sums(factors, 0, own, total, product)
    gradient_factors(
        first, np.float64(images * plane), total, product, mean, invstd, weight, grad_weight, grad_bias, factors, own
    )  # fmt: skip
    for image in range(images):
        base = (image * channels + first) * plane
        _gradient_runs(grad, x, result, base, own, plane, factors, 0, own, mode)
    if mode == STREAMED:
        settle_stores()


@kernel(fastmath=AS_WRITTEN)
def backward_by_channel(
    grad, x, result, images, channels, plane, group, mean, invstd, weight, grad_weight, grad_bias, mode
):
    """Each chunk owns `group` channels."""
    for chunk in prange((channels + group - 1) // group):
        _backward_channels(
            grad, x, result, images, channels, plane, group, np.int64(chunk), mean, invstd, weight, grad_weight,
            grad_bias, mode,
        )  # fmt: skip


@emitted
def _sums_of_blocks(grad, x, images, channels, plane, blocks, chunk, step, mean, sums):
    parts = images * channels * blocks
    begin, end = chunk * step, min(chunk * step + step, parts)
    image, c, block = _position(begin, channels, blocks)
    for _ in range(begin, end):
        start = block * BLOCK
        at = (image * channels + c) * plane + start
        target = (image * blocks + block) * channels + c
        size = min(BLOCK, plane - start)
        run_sums(address(grad, at), address(x, at), size, mean[c], address(sums, target), parts)
        image, c, block = _next(image, c, block, channels, blocks)


@emitted
def _factors_of_gradient(images, channels, plane, blocks, sums, mean, invstd, weight, grad_weight, grad_bias, factors):
    """The factors of all channels, from the sums of all blocks."""
    total, product = double_zeros(channels), double_zeros(channels)
    for part in range(images * blocks):
        add_sums(sums, part * channels, images * blocks * channels, total, product)
    gradient_factors(
        0, np.float64(images * plane), total, product, mean, invstd, weight, grad_weight, grad_bias, factors, channels
    )  # fmt: skip


@emitted
def _gradients_of_blocks(grad, x, result, images, channels, plane, blocks, chunk, step, factors, mode):
    begin, end = chunk * step, min(chunk * step + step, images * channels * blocks)
    image, c, block = _position(begin, channels, blocks)
    at = (image * channels + c) * plane + block * BLOCK
    while begin < end:
        count, length = _runs(c, block, channels, plane, blocks, end - begin)
        _gradient_runs(grad, x, result, at, count, length, factors, c, channels, mode)
        at += count * length
        begin += count
        image, c, block = _next(image, c + count - 1, block, channels, blocks)
    if mode == STREAMED:
        settle_stores()


@kernel(fastmath=AS_WRITTEN)
def backward_by_block(grad, x, result, images, channels, plane, mean, invstd, weight, grad_weight, grad_bias, mode):
    """With few channels; each chunk owns some blocks of the planes."""
    blocks = (plane + BLOCK - 1) // BLOCK
    step = SPLIT // min(plane, BLOCK)
    chunks = (images * channels * blocks + step - 1) // step
    sums, factors = scratch(2 * images * blocks * channels, weight), scratch(4 * channels, weight)
    for chunk in prange(chunks):
        _sums_of_blocks(grad, x, images, channels, plane, blocks, np.int64(chunk), step, mean, sums)
    _factors_of_gradient(images, channels, plane, blocks, sums, mean, invstd, weight, grad_weight, grad_bias, factors)
    for chunk in prange(chunks):
        _gradients_of_blocks(grad, x, result, images, channels, plane, blocks, np.int64(chunk), step, factors, mode)
