"""What the batch norm kernels of both layouts share: moments of a run of numbers, and a channel's coefficients.

Moments are taken in blocks that stay in the first-level cache: a rough mean first, then the deviations from it and
their squares, so that x is read from memory once, a mean of 1e4 costs no digits, and everything vectorises in x's
dtype. Blocks are merged in float64 (Chan, Golub and LeVeque 1983).

LLVM may reassociate and contract what is compiled with those flags, and does so differently in different surroundings,
such as the serial and the parallel form of a kernel. So that both give the same bits, only what cannot be understood
in two ways has them: the sums over a run, which are vectorised before anything else happens to them.
"""

import math

import numpy as np

from tilewise.kernels.cpu.jit import device

# Elements of one block: 16 kB of float32. With 32 or more accumulators, each adds up 128 numbers at most.
BLOCK = 4096

AS_WRITTEN = frozenset()  # no reassociation and no contraction


@device(fastmath=AS_WRITTEN)
def minus(x, centre):
    """x - centre, which no reassociation may merge with what surrounds it."""
    return x - centre


@device(fastmath=AS_WRITTEN)
def plus(a, b):
    """a + b, in this order."""
    return a + b


@device(inline="always")
def run_moments(x):
    """(mean, sum of squared deviations from it) of a run of numbers, in float64."""
    pivot = x.dtype.type(0)
    for i in range(x.size):
        pivot += x[i]
    pivot = share(pivot, x.size)
    first, second = x.dtype.type(0), x.dtype.type(0)
    for i in range(x.size):
        deviation = minus(x[i], pivot)
        first += deviation
        second += deviation * deviation
    return centred(pivot, first, second, x.size)


@device(fastmath=AS_WRITTEN)
def share(total, count):
    """total / count in total's type."""
    return total / type(total)(count)


@device(fastmath=AS_WRITTEN)
def centred(pivot, first, second, count):
    """(mean, squares) in float64, from the sums of the deviations from a pivot near the mean, and of their squares."""
    excess = np.float64(first) / count
    return np.float64(pivot) + excess, np.float64(second) - np.float64(first) * excess


@device(fastmath=AS_WRITTEN)
def merged(count, mean, squares, other_count, other_mean, other_squares):
    """Mean and squares of two sets of numbers together."""
    share = other_count / (count + other_count)
    distance = other_mean - mean
    return mean + distance * share, squares + other_squares + distance * distance * count * share


@device(fastmath=AS_WRITTEN)
def coefficients(c, mean, invstd, weight, bias, saved_mean, saved_invstd):
    """(centre, scale, offset) of channel c: y = (x - centre) * scale + offset. Notes the statistics where wanted.

    centre is the mean rounded to x's dtype; what the rounding left over goes into the offset.
    """
    scale = invstd * weight[c] if weight.size else invstd
    centre = saved_mean.dtype.type(mean)
    if saved_mean.size:
        saved_mean[c] = centre
        saved_invstd[c] = invstd
    offset = minus(np.float64(centre), mean) * scale
    if bias.size:
        offset += bias[c]
    return centre, saved_mean.dtype.type(scale), saved_mean.dtype.type(offset)


@device(fastmath=AS_WRITTEN)
def settle(c, count, mean, squares, running_mean, running_var, weight, bias, saved_mean, saved_invstd, momentum, eps):
    """The coefficients of channel c in training, whose running statistics move."""
    if running_mean.size:
        running_mean[c] += momentum * (mean - running_mean[c])
        running_var[c] += momentum * (squares / (count - 1) - running_var[c])
    invstd = 1 / math.sqrt(squares / count + eps)
    return coefficients(c, mean, invstd, weight, bias, saved_mean, saved_invstd)


@device(fastmath=AS_WRITTEN)
def gradient_coefficients(c, values, grad_sum, product_sum, invstd, weight, grad_weight, grad_bias, training):
    """(a, b, offset) of channel c: grad_x = grad * a + (x - mean) * b + offset; b and offset are 0 if not training.

    grad_sum, product_sum: the sums of grad and of grad * (x - mean) over the channel's values.
    """
    number = grad_bias.dtype.type
    deviation = np.float64(invstd[c])
    grad_bias[c] = grad_sum
    grad_weight[c] = product_sum * deviation
    a = deviation * weight[c] if weight.size else deviation
    if not training:
        return number(a), number(0), number(0)
    return number(a), number(-a * deviation * deviation * product_sum / values), number(-a * grad_sum / values)
