"""What the batch norm kernels of both layouts share: how moments are merged, and the channels' factors.

Moments are taken in blocks that stay in the first-level cache: a rough mean first, then the deviations from it and
their squares, so that x is read from memory once, a mean of 1e4 costs no digits, and everything is vectors of the
factors' dtype: x's, but float32 for float16. Blocks are merged in float64 (Chan, Golub and LeVeque 1983).

Everything here goes through some channels at a time, from `first` on, in loops that LLVM can vectorise: with planes of
7x7, two divisions and a root in scalars would cost more than a channel's pixels. LLVM gives up where more than eight
pairs of arrays might overlap, so each loop has few of them. The kernels that call this are compiled AS_WRITTEN: nothing
but the activations, which are epilogue.py's, is reassociated or contracted, so these loops give the same bits however
they are vectorised.
"""

import numpy as np
from numba import types

from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.epilogue import BOUNDED, activate_row
from tilewise.kernels.cpu.jit import device
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import square_root

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


@emitted
def activate(flat, start, count, code):
    """`activate_row`, also of float16 as bits where `activates_halves`."""
    if code == 0:
        return
    if flat.dtype == types.uint16:
        _bound_halves(flat, start, count, code)
    else:
        activate_row(flat, start, count, code)


@emitted
def merge_moments(count, other_count, moments, start, step, mean, squares):
    """Merge a block of `other_count` values of each channel into mean and squares (sums of squared deviations), so far
    of `count` values, in float64.

    moments: pivots from `start` on, `step` further the sums of the deviations from them, and then of their squares.
    """
    share = other_count / (count + other_count)
    weight = count * share
    for c in range(mean.size):
        deviations = np.float64(moments[start + step + c])
        excess = deviations / other_count
        distance = np.float64(moments[start + c]) + excess - mean[c]
        mean[c] += distance * share
        seconds = np.float64(moments[start + 2 * step + c])
        squares[c] = squares[c] + (seconds - deviations * excess) + distance * distance * weight


@emitted
def coefficients(first, mean, invstd, weight, bias, saved_mean, saved_invstd, factors, step):
    """factors[c], [step + c], [2 * step + c] = (centre, scale, offset) of the channels from `first` on:

        y = (x - centre) * scale + offset

    mean, invstd: in float64 or the factors' dtype; both are overwritten, and noted where wanted. centre is the mean
    rounded to the factors' dtype; what the rounding left over goes into the offset.
    """
    own = mean.size
    if saved_mean.size > 0:
        for c in range(own):
            saved_mean[first + c] = mean[c]
        for c in range(own):
            saved_invstd[first + c] = invstd[c]
    if weight.size > 0:
        for c in range(own):
            invstd[c] *= weight[first + c]
    for c in range(own):
        factors[c] = mean[c]
        factors[step + c] = invstd[c]
        mean[c] = (mean.dtype.type(factors[c]) - mean[c]) * invstd[c]
    if bias.size > 0:
        for c in range(own):
            mean[c] += bias[first + c]
    for c in range(own):
        factors[2 * step + c] = mean[c]


@emitted
def settle(
    first, count, mean, squares, running_mean, running_var, weight, bias, saved_mean, saved_invstd, momentum, eps,
    factors, step,
):  # fmt: skip
    """The factors in training of the channels from `first` on, whose running statistics move; mean and squares are
    overwritten."""
    own = mean.size
    unbiased = 1 / (count - 1)
    if running_mean.size > 0:
        for c in range(own):
            running_mean[first + c] += momentum * (mean[c] - running_mean[first + c])
        for c in range(own):
            running_var[first + c] += momentum * (squares[c] * unbiased - running_var[first + c])
    share = 1 / count
    for c in range(own):
        squares[c] = 1 / square_root(squares[c] * share + eps)
    coefficients(first, mean, squares, weight, bias, saved_mean, saved_invstd, factors, step)


@emitted
def evaluation_factors(running_mean, running_var, eps, weight, bias, saved_mean, saved_invstd, factors, step):
    """The factors of every channel from the running statistics, in their dtype: for a small batch of many channels,
    roots and divisions in float64 would cost as much as the pixels."""
    number, channels = running_mean.dtype.type, running_mean.size
    mean, invstd = scratch(channels, running_mean), scratch(channels, running_mean)
    for c in range(channels):
        mean[c] = running_mean[c]
        invstd[c] = number(1) / square_root(running_var[c] + number(eps))
    coefficients(0, mean[:channels], invstd, weight, bias, saved_mean, saved_invstd, factors, step)


@emitted
def add_sums(sums, start, step, total, product):
    """Add sums[start + c] to total[c], and what lies `step` further to product[c]."""
    for c in range(total.size):
        total[c] += sums[start + c]
        product[c] += sums[start + step + c]


@emitted
def gradient_factors(first, count, total, product, mean, invstd, weight, grad_weight, grad_bias, factors, step):
    """factors[c], [step + c], [2 * step + c], [3 * step + c] = (centre, a, b, offset) of the channels from `first` on:

        grad_x = grad * a + ((x - centre) * b + offset)      in training; else grad * a

    total, product: the sums of grad and of grad * (x - mean) over a channel's `count` values, in float64; they are
    overwritten.
    """
    own = total.size
    share = -1 / count
    for c in range(own):
        grad_bias[first + c] = total[c]
    for c in range(own):
        product[c] *= invstd[first + c]
        grad_weight[first + c] = product[c]
    for c in range(own):
        factors[c] = mean[first + c]
        factors[step + c] = invstd[first + c]
    for c in range(own):
        product[c] *= share * invstd[first + c] * invstd[first + c]
        total[c] *= share * invstd[first + c]
    if weight.size > 0:
        for c in range(own):
            factors[step + c] = np.float64(invstd[first + c]) * weight[first + c]
        for c in range(own):
            product[c] *= weight[first + c]
            total[c] *= weight[first + c]
    for c in range(own):
        factors[2 * step + c] = product[c]
        factors[3 * step + c] = total[c]
