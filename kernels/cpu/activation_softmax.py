"""Softmax, log_softmax and their gradients, on flat arrays.

The input is read twice (the largest value; exponentials and their sum), and what was written is scaled, while a row is
in the cache. Sums along a row are explicit vectors (vector_pass.py): left to LLVM, they would be taken in another order
in the parallel form than in the serial one.
"""

import math

import numpy as np
from numba import prange

from tilewise.kernels.cpu.epilogue import exp, maximum, prefer_widest_vectors
from tilewise.kernels.cpu.jit import EXACT_ORDER, device, kernel
from tilewise.kernels.cpu.simd import address
from tilewise.kernels.cpu.vector_pass import run_product, run_total

# Elements in one unit of parallel work: 64 kB of float32, a few microseconds, so that a launch is worth it and a
# chunk's input is still in the second-level cache when softmax comes back to it.
CHUNK = 16384
BLOCK = 64  # a loop over a multiple of it, in vectors of 16 unrolled 4 times, leaves no rest
SHORT = 64  # rows up to this length are transposed, BLOCK rows at a time, into 2 * 16 kB of float32
COLUMNS = 256  # columns whose maxima and sums stay in the first-level cache, where the axis is not the last


@device()
def _largest(x):
    """The largest of x, whose size is a multiple of BLOCK; NaN where it holds one."""
    prefer_widest_vectors()
    result = x.dtype.type(-np.inf)
    for i in range(x.size // BLOCK * BLOCK):
        result = maximum(result, x[i])
    return result


@device()
def _exponentials(x, y, largest):
    """y = exp(x - largest); x's size is a multiple of BLOCK. y must not be x: LLVM tests for that."""
    prefer_widest_vectors()
    for i in range(x.size // BLOCK * BLOCK):
        y[i] = exp(x[i] - largest)


@device(fastmath=EXACT_ORDER)
def _total(y, last):
    return run_total(address(y, 0), y.size) + run_total(address(last, 0), last.size)


@device(fastmath=EXACT_ORDER)
def _logarithm(x, largest, shift):
    """x - largest - shift. Reassociated, largest + shift would lose the digits that count where x is large."""
    return (x - largest) - shift


@device()
def _softmax_row(x, y, last, last_y, log):
    """last, last_y: BLOCK elements, for the end of the row filled up with -inf, so that no loop has a scalar rest."""
    n = x.size
    whole = n // BLOCK * BLOCK
    for i in range(BLOCK):
        last[i] = -np.inf
    for i in range(n - whole):
        last[i] = x[whole + i]
    largest = maximum(_largest(x[:whole]), _largest(last))
    _exponentials(x[:whole], y[:whole], largest)
    _exponentials(last, last_y, largest)
    total = _total(y[:whole], last_y)
    if log:
        shift = x.dtype.type(math.log(total))
        for i in range(n):
            y[i] = _logarithm(x[i], largest, shift)
    else:
        scale = x.dtype.type(1) / total
        for i in range(whole):
            y[i] *= scale
        for i in range(n - whole):
            y[whole + i] = last_y[i] * scale


@device(allocates=True)
def _softmax_columns_run(x, y, at, n, stride, width, used, log):
    """Softmax down `width` columns from element `at` on, of n rows that are `stride` apart; of the first `used` of them
    the result is wanted."""
    prefer_widest_vectors()
    largest, total = np.empty(width, x.dtype), np.zeros(width, x.dtype)
    largest[:] = -np.inf
    for k in range(at, at + n * stride, stride):
        source = x[k : k + width]
        for j in range(width):
            largest[j] = source[j] if source[j] > largest[j] else largest[j]
    for k in range(at, at + n * stride, stride):
        source, target = x[k : k + width], y[k : k + width]
        for j in range(width):
            target[j] = exp(source[j] - largest[j])
            total[j] += target[j]
    if log:
        for j in range(used):
            total[j] = math.log(total[j])
        for k in range(at, at + n * stride, stride):
            source, target = x[k : k + width], y[k : k + width]
            for j in range(width):
                target[j] = _logarithm(source[j], largest[j], total[j])
    else:
        for j in range(width):
            total[j] = x.dtype.type(1) / total[j]
        for k in range(at, at + n * stride, stride):
            target = y[k : k + width]
            for j in range(width):
                target[j] *= total[j]


@device()
def _softmax_short_rows(x, y, at, count, n, columns, columns_y, log):
    """Softmax of `count` rows from element `at` on, as the columns of a transposed copy: a vector holds one element of
    each row, so that neither the sums nor the ends of the rows cost anything extra."""
    for i in range(count):
        row = x[at + i * n : at + i * n + n]
        for k in range(n):
            columns[k * BLOCK + i] = row[k]
    _softmax_columns_run(columns, columns_y, 0, n, BLOCK, BLOCK, count, log)
    for i in range(count):
        row = y[at + i * n : at + i * n + n]
        for k in range(n):
            row[k] = columns_y[k * BLOCK + i]


@kernel()
def softmax_rows(x, y, n, log):
    """Along the last axis: rows of n."""
    rows = x.size // n
    block = (CHUNK // n // BLOCK + 1) * BLOCK
    for chunk in prange((rows + block - 1) // block):
        stop = min(chunk * block + block, rows)
        if n <= SHORT:
            columns, columns_y = np.zeros(n * BLOCK, x.dtype), np.empty(n * BLOCK, x.dtype)
            for row in range(chunk * block, stop, BLOCK):
                _softmax_short_rows(x, y, row * n, min(BLOCK, stop - row), n, columns, columns_y, log)
        else:
            last, last_y = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
            for at in range(chunk * block * n, stop * n, n):
                _softmax_row(x[at : at + n], y[at : at + n], last, last_y, log)


@kernel()
def softmax_columns(x, y, n, inner, log):
    """Along an axis of n elements that are `inner` apart."""
    outer = x.size // (n * inner)
    blocks = (inner + COLUMNS - 1) // COLUMNS
    for chunk in prange(outer * blocks):
        start = chunk % blocks * COLUMNS
        width = min(COLUMNS, inner - start)
        _softmax_columns_run(x, y, chunk // blocks * n * inner + start, n, inner, width, width, log)


@device(fastmath=EXACT_ORDER)
def _slope_total(grad, y, log):
    if log:
        return run_total(address(grad, 0), grad.size)
    return run_product(address(grad, 0), address(y, 0), y.size)


@device()
def _softmax_backward_row(grad, y, result, log):
    prefer_widest_vectors()
    total = _slope_total(grad, y, log)
    if log:
        for i in range(y.size):
            result[i] = grad[i] - exp(y[i]) * total
    else:
        for i in range(y.size):
            result[i] = y[i] * (grad[i] - total)


@kernel()
def softmax_backward_rows(grad, y, result, n, log):
    rows = y.size // n
    block = CHUNK // n + 1
    for chunk in prange((rows + block - 1) // block):
        for at in range(chunk * block * n, min(chunk * block + block, rows) * n, n):
            _softmax_backward_row(grad[at : at + n], y[at : at + n], result[at : at + n], log)


@device(allocates=True)
def _softmax_backward_columns_run(grad, y, result, at, n, stride, width, log):
    prefer_widest_vectors()
    total = np.zeros(width, y.dtype)
    for k in range(at, at + n * stride, stride):
        slope, value = grad[k : k + width], y[k : k + width]
        for j in range(width):
            total[j] += slope[j] if log else slope[j] * value[j]
    for k in range(at, at + n * stride, stride):
        slope, value, target = grad[k : k + width], y[k : k + width], result[k : k + width]
        if log:
            for j in range(width):
                target[j] = slope[j] - exp(value[j]) * total[j]
        else:
            for j in range(width):
                target[j] = value[j] * (slope[j] - total[j])


@kernel()
def softmax_backward_columns(grad, y, result, n, inner, log):
    outer = y.size // (n * inner)
    blocks = (inner + COLUMNS - 1) // COLUMNS
    for chunk in prange(outer * blocks):
        start = chunk % blocks * COLUMNS
        at = chunk // blocks * n * inner + start
        _softmax_backward_columns_run(grad, y, result, at, n, inner, min(COLUMNS, inner - start), log)
