"""What the batch norm kernels of both layouts share: how moments are merged, and the channels' factors.

Moments are taken in blocks that stay in the first-level cache: a rough mean first, then the deviations from it and
their squares, so that x is read from memory once, a mean of 1e4 costs no digits, and everything is vectors of the
factors' dtype: x's, but float32 for float16. Blocks are merged in float64 (Chan, Golub and LeVeque 1983).

Everything here goes through some channels at a time, from `first` on, in loops that LLVM can vectorise: with planes of
7x7, two divisions and a root in scalars would cost more than a channel's pixels. Nothing but the activations, which are
epilogue.py's, is reassociated or contracted, so these loops give the same bits however they are vectorised.
"""

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from tilewise.kernels.cpu.epilogue import BOUNDED, activate_row
from tilewise.kernels.cpu.jit import AS_WRITTEN, FASTMATH, device

# Elements of one block: 16 kB of float32. With 32 or more accumulators, each adds up 128 numbers at most.
BLOCK = 4096


# float16 as bits: from the first number below zero to -inf, after which come NaN; 6; inf.
_BELOW_ZERO, _LOWEST, _SIX, _INFINITE = np.uint16(0x8000), np.uint16(0xFC00), np.uint16(0x4600), np.uint16(0x7C00)


def activates_halves(code: int) -> bool:
    """Whether `activate` takes float16: rounding first must not change the result."""
    return code <= BOUNDED


@device()
def _bound_halves(flat, start, count, code):
    """relu or relu6 of float16's bits; NaN stays NaN."""
    row = flat[start : start + count]
    for i in range(count):
        if _BELOW_ZERO <= row[i] <= _LOWEST:
            row[i] = 0
    if code == BOUNDED:
        for i in range(count):
            if _SIX < row[i] <= _INFINITE:
                row[i] = _SIX


def activate(flat, start, count, code) -> Any:
    """`activate_row`, also of float16 as bits where `activates_halves`."""
    raise NotImplementedError("for compiled code only")


@overload(activate, jit_options={"fastmath": set(FASTMATH), "error_model": "numpy"}, inline="always")
def _overload_activate(flat, start, count, code):
    if flat.dtype == types.uint16:

        def halves(flat, start, count, code):
            if code:
                _bound_halves(flat, start, count, code)

        return halves
    return lambda flat, start, count, code: activate_row(flat, start, count, code)


@device(fastmath=AS_WRITTEN)
def merge_moments(count, other_count, moments, start, step, mean, squares):
    """Merge a block of `other_count` values of each channel into mean and squares (sums of squared deviations), so far
    of `count` values, in float64.

    moments: pivots from `start` on, `step` further the sums of the deviations from them, and then of their squares.
    """
    own = mean.size
    share = other_count / (count + other_count)
    weight = count * share
    pivots, firsts = moments[start : start + own], moments[start + step : start + step + own]
    seconds = moments[start + 2 * step : start + 2 * step + own]
    for c in range(own):
        deviations = np.float64(firsts[c])
        excess = deviations / other_count
        distance = np.float64(pivots[c]) + excess - mean[c]
        mean[c] += distance * share
        squares[c] = squares[c] + (np.float64(seconds[c]) - deviations * excess) + distance * distance * weight


@device(fastmath=AS_WRITTEN, inline="always")
def _part(vector, first, count):
    """Elements of a vector from `first` on, or nothing of one that is absent.

    Loops run over such slices, because Numba would look whether an index `first + c` is negative, and LLVM then no
    longer sees a vector in the loop.
    """
    last = min(first + count, vector.size)
    return vector[min(first, last) : last]


@device(fastmath=AS_WRITTEN)
def coefficients(mean, invstd, weight, bias, saved_mean, saved_invstd, factors, step):
    """factors[c], [step + c], [2 * step + c] = (centre, scale, offset): y = (x - centre) * scale + offset.

    mean, invstd: in float64 or the factors' dtype; both are overwritten, and noted where wanted. centre is the mean
    rounded to the factors' dtype; what the rounding left over goes into the offset.
    """
    own = mean.size
    centre, scale, offset = factors[:own], factors[step : step + own], factors[2 * step : 2 * step + own]
    for c in range(saved_mean.size):
        saved_mean[c] = mean[c]
    for c in range(saved_invstd.size):
        saved_invstd[c] = invstd[c]
    for c in range(weight.size):
        invstd[c] *= weight[c]
    for c in range(own):
        centre[c] = mean[c]
        scale[c] = invstd[c]
        mean[c] = (mean.dtype.type(centre[c]) - mean[c]) * invstd[c]
    for c in range(bias.size):
        mean[c] += bias[c]
    for c in range(own):
        offset[c] = mean[c]


@device(fastmath=AS_WRITTEN)
def settle(
    first, count, mean, squares, running_mean, running_var, weight, bias, saved_mean, saved_invstd, momentum, eps,
    factors, step,
):  # fmt: skip
    """The factors in training of the channels from `first` on, whose running statistics move; mean and squares are
    overwritten."""
    own = mean.size
    moving = _part(running_mean, first, own)
    for c in range(moving.size):
        moving[c] += momentum * (mean[c] - moving[c])
    moving = _part(running_var, first, own)
    unbiased = 1 / (count - 1)
    for c in range(moving.size):
        moving[c] += momentum * (squares[c] * unbiased - moving[c])
    share = 1 / count
    for c in range(own):
        squares[c] = 1 / math.sqrt(squares[c] * share + eps)
    coefficients(
        mean, squares, _part(weight, first, own), _part(bias, first, own),
        _part(saved_mean, first, own), _part(saved_invstd, first, own), factors, step,
    )  # fmt: skip


@device(fastmath=AS_WRITTEN, allocates=True)
def evaluation_factors(running_mean, running_var, eps, weight, bias, saved_mean, saved_invstd, factors, step):
    """The factors of every channel from the running statistics, in their dtype: for a small batch of many channels,
    roots and divisions in float64 would cost as much as the pixels."""
    number = running_mean.dtype.type
    mean, invstd = np.empty_like(running_mean), np.empty_like(running_mean)
    for c in range(mean.size):
        mean[c] = running_mean[c]
        invstd[c] = number(1) / math.sqrt(running_var[c] + number(eps))
    coefficients(mean, invstd, weight, bias, saved_mean, saved_invstd, factors, step)


@device(fastmath=AS_WRITTEN)
def add_sums(sums, start, step, total, product):
    """Add sums[start + c] to total[c], and what lies `step` further to product[c]."""
    totals, products = sums[start : start + total.size], sums[start + step : start + step + total.size]
    for c in range(total.size):
        total[c] += totals[c]
        product[c] += products[c]


@device(fastmath=AS_WRITTEN)
def gradient_factors(first, count, total, product, mean, invstd, weight, grad_weight, grad_bias, factors, step):
    """factors[c], [step + c], [2 * step + c], [3 * step + c] = (centre, a, b, offset) of the channels from `first` on:

        grad_x = grad * a + ((x - centre) * b + offset)      in training; else grad * a

    total, product: the sums of grad and of grad * (x - mean) over a channel's `count` values, in float64; they are
    overwritten.
    """
    own = total.size
    share = -1 / count
    centre, deviation, factor = mean[first : first + own], invstd[first : first + own], _part(weight, first, own)
    bias_sums, weight_sums = grad_bias[first : first + own], grad_weight[first : first + own]
    for c in range(own):
        bias_sums[c] = total[c]
        product[c] *= deviation[c]
        weight_sums[c] = product[c]
    scale, b, offset = factors[step:], factors[2 * step :], factors[3 * step :]
    for c in range(own):
        factors[c] = centre[c]
        scale[c] = deviation[c]
        product[c] *= share * deviation[c] * deviation[c]
        total[c] *= share * deviation[c]
    for c in range(factor.size):
        scale[c] = np.float64(deviation[c]) * factor[c]
        product[c] *= factor[c]
        total[c] *= factor[c]
    for c in range(own):
        b[c] = product[c]
        offset[c] = total[c]
