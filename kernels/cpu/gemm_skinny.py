"""Products too small or too thin to be worth packing: tiny ones, and those with only a few rows or columns on one side
(matrix-vector and its neighbours).

The thin ones are bound by reading the large operand once: it is read in the order it lies in memory.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.epilogue import apply_activation
from tilewise.kernels.cpu.jit import device, kernel

# Up to this many rows, reading the large operand once per row from the cache beats packing it for the register tile.
FEW = 4
CHUNK = 128  # results a chunk: enough work to hide the loop over chunks, and the partition does not know the threads
COLUMN_CHUNK = 1024  # 4 KB of sums stay in L1 while the rows of the large operand pass by


# Up to this many multiplications, the plain loops are done before a panel would be packed.
TINY = 4096


@kernel(parallel=False)
def tiny_product(a, b, c):
    """c = a b, matrices; the textbook loops in the order that runs along the rows of b and c."""
    m, n = c.shape
    for i in range(m):
        for j in range(n):
            c[i, j] = 0
        for k in range(a.shape[1]):
            factor = a[i, k]
            for j in range(n):
                c[i, j] += factor * b[k, j]


@kernel(parallel=False)
def tiny_linear(x, weight, bias, y, activation):
    """y = activation(x weight^T + bias), matrices; bias may be empty."""
    m, n = y.shape
    for i in range(m):
        for j in range(n):
            total = bias[j] if bias.size > 0 else y.dtype.type(0)
            for k in range(x.shape[1]):
                total += x[i, k] * weight[j, k]
            y[i, j] = total
        if activation != 0:
            for j in range(n):
                y[i, j] = apply_activation(y[i, j], activation)


@kernel(parallel=False)
def tiny_product_backward(grad, a, b, grad_a, grad_b):
    """grad_a = grad b^T and grad_b = a^T grad, matrices."""
    m, n = grad.shape
    for k in range(a.shape[1]):
        for j in range(n):
            grad_b[k, j] = 0
        for i in range(m):
            total = grad.dtype.type(0)
            for j in range(n):
                total += grad[i, j] * b[k, j]
                grad_b[k, j] += a[i, k] * grad[i, j]
            grad_a[i, k] = total


@kernel(parallel=False)
def tiny_linear_backward(grad, x, weight, grad_x, grad_weight, grad_bias):
    """grad_x = grad weight, grad_weight = grad^T x and grad_bias = the sum of grad's rows, matrices."""
    m, n = grad.shape
    grad_x[:, :] = 0
    grad_weight[:, :] = 0
    grad_bias[:] = 0
    for i in range(m):
        for j in range(n):
            factor = grad[i, j]
            grad_bias[j] += factor
            for k in range(x.shape[1]):
                grad_x[i, k] += factor * weight[j, k]
                grad_weight[j, k] += factor * x[i, k]


@device()
def _dot(p, p_start, q, q_start, count):
    total = p.dtype.type(0)
    for k in range(count):
        total += p[p_start + k] * q[q_start + k]
    return total


@kernel()
def dot_rows(p, p_start, p_step, q, q_start, q_step, few, many, count, c, c_start, few_step, many_step):
    """c[i, j] = sum over k of p[i, k] q[j, k]; i < few, j < many, both operands contiguous along k."""
    for chunk in prange((many + CHUNK - 1) // CHUNK):
        for j in range(chunk * CHUNK, min(many, (chunk + 1) * CHUNK)):
            for i in range(few):
                c[c_start + i * few_step + j * many_step] = _dot(
                    p, p_start + i * p_step, q, q_start + j * q_step, count
                )


@device()
def _add_rows(p, p_at, p_step, q, q_at, q_step, columns, count, sums):
    """sums[:columns] += sum over k of p[k] q[k, :columns], four rows of q at a time to save passes over the sums."""
    k = 0
    while k + 4 <= count:
        p0, p1 = p[p_at + k * p_step], p[p_at + (k + 1) * p_step]
        p2, p3 = p[p_at + (k + 2) * p_step], p[p_at + (k + 3) * p_step]
        r0 = q[q_at + k * q_step : q_at + k * q_step + columns]
        r1 = q[q_at + (k + 1) * q_step : q_at + (k + 1) * q_step + columns]
        r2 = q[q_at + (k + 2) * q_step : q_at + (k + 2) * q_step + columns]
        r3 = q[q_at + (k + 3) * q_step : q_at + (k + 3) * q_step + columns]
        for j in range(columns):
            sums[j] += p0 * r0[j] + p1 * r1[j] + p2 * r2[j] + p3 * r3[j]
        k += 4
    while k < count:
        p0 = p[p_at + k * p_step]
        r0 = q[q_at + k * q_step : q_at + k * q_step + columns]
        for j in range(columns):
            sums[j] += p0 * r0[j]
        k += 1


@kernel()
def add_rows(p, p_start, p_row, p_column, q, q_start, q_step, few, many, count, c, c_start, few_step, many_step):
    """c[i, j] = sum over k of p[i, k] q[k, j]; i < few, j < many, q contiguous along j."""
    for chunk in prange((many + COLUMN_CHUNK - 1) // COLUMN_CHUNK):
        j0 = chunk * COLUMN_CHUNK
        columns = min(COLUMN_CHUNK, many - j0)
        sums = np.empty(columns, c.dtype)
        for i in range(few):
            sums[:] = 0
            _add_rows(p, p_start + i * p_row, p_column, q, q_start + j0, q_step, columns, count, sums)
            for j in range(columns):
                c[c_start + i * few_step + (j0 + j) * many_step] = sums[j]
