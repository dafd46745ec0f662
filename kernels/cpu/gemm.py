"""Matrix multiplication and the dense layer on the CPU: shapes and strides here, the kernels in gemm_blocks.py (packed,
register-tiled) and gemm_skinny.py (a few rows or columns)."""

from functools import partial

import numpy as np
from numba import prange

from tilewise.kernels.arrays import canonical
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES
from tilewise.kernels.cpu.gemm_blocks import multiply, multiply_batch
from tilewise.kernels.cpu.gemm_skinny import (
    FEW,
    TINY,
    add_rows,
    dot_rows,
    tiny_linear,
    tiny_linear_backward,
    tiny_product,
    tiny_product_backward,
)
from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.scratch import empty

# Integers are multiplied in a type at least as wide as theirs: sums that wrap there wrap to the same bits in the narrow
# one, signed or not. int8 and uint8 keep the wide type.
_COMPUTED_AS = {
    np.dtype(np.int8): np.dtype(np.int32),
    np.dtype(np.uint8): np.dtype(np.int32),
    np.dtype(np.int16): np.dtype(np.int32),
    np.dtype(np.uint16): np.dtype(np.int32),
    np.dtype(np.uint32): np.dtype(np.int32),
    np.dtype(np.uint64): np.dtype(np.int64),
}
_RESULT_DTYPE = {np.dtype(np.int8): np.dtype(np.int32), np.dtype(np.uint8): np.dtype(np.int32)}
_NO_BIAS = {np.dtype(t): np.empty(0, t) for t in (np.float32, np.float64, np.int32, np.int64)}
_ZERO_START = np.zeros(1, np.int64)
NANOSECONDS_PER_FLOP = 0.01  # a core at 100 GFLOP/s, float32


def prepare_matmul(shapes, dtype):
    """The function for these shapes: `matmul`, or for tiny matrices one without its detours."""
    a, b = shapes
    if dtype in _COMPUTED_AS or len(a) != 2 or len(b) != 2 or a[0] * a[1] * b[1] > TINY:
        return matmul
    shape, product = (a[0], b[1]), tiny_product.serial

    def run(a, b, *, out=None):
        if out is None:
            out = np.empty(shape, dtype)
        product(a if a.flags.carray else canonical(a), b if b.flags.carray else canonical(b), out)
        return out

    return run


def matmul(a, b, *, out=None):
    if a.dtype in _COMPUTED_AS:
        return _matmul_narrow(a, b, out)
    if a.ndim == 2 and b.ndim == 2:
        if out is None:
            out = empty((a.shape[0], b.shape[1]), a.dtype)
        _product(a, b, out, _NO_BIAS[a.dtype], 0)
        return out
    return _matmul_stacked(a, b, out)


def _matmul_narrow(a, b, out):
    wide = _COMPUTED_AS[a.dtype]
    result = matmul(a.astype(wide), b.astype(wide)).astype(_RESULT_DTYPE.get(a.dtype, a.dtype), copy=False)
    if out is None:
        return result
    out[...] = result
    return out


def _matmul_stacked(a, b, out):
    """1-D operands, and stacks of matrices whose leading axes broadcast."""
    rows = a if a.ndim > 1 else a[None, :]
    columns = b if b.ndim > 1 else b[:, None]
    lead = np.broadcast_shapes(rows.shape[:-2], columns.shape[:-2])
    shape = (*lead, rows.shape[-2], columns.shape[-1])
    result = np.empty(shape, a.dtype) if out is None else out.reshape(shape)
    if len(lead) == 0:
        _product(rows, columns, result, _NO_BIAS[a.dtype], 0)
    elif columns.ndim == 2 and rows.flags.c_contiguous:
        # one right operand for the whole stack: a single tall product
        count = rows.size // max(rows.shape[-1], 1) if rows.shape[-1] else int(np.prod(rows.shape[:-1]))
        flat = result.reshape(count, shape[-1])
        _product(rows.reshape(count, rows.shape[-1]), columns, flat, _NO_BIAS[a.dtype], 0)
    else:
        _product_stack(rows, columns, lead, result)
    if out is not None:
        return out
    final = (*lead, *((shape[-2],) if a.ndim > 1 else ()), *((shape[-1],) if b.ndim > 1 else ()))
    return result.reshape(final)


def _flat(matrix):
    """(memory in order, row step, column step) of a matrix; a copy if neither it nor its transpose is contiguous."""
    if matrix.flags.carray:
        return matrix.reshape(-1), matrix.shape[1], 1
    if matrix.T.flags.carray:
        return matrix.T.reshape(-1), 1, matrix.shape[0]
    if matrix.T.flags.c_contiguous:
        return canonical(matrix.T).reshape(-1), 1, matrix.shape[0]
    return canonical(matrix).reshape(-1), matrix.shape[1], 1


def _product(a, b, out, bias, activation):
    """out = activation(a @ b + bias) for matrices; out is C-contiguous."""
    m, whole = a.shape
    n = b.shape[1]
    if m == 0 or n == 0:
        return
    fa, a_row, a_column = _flat(a)
    fb, b_row, b_column = _flat(b)
    work = 2 * m * n * whole * NANOSECONDS_PER_FLOP
    c = out.reshape(-1)
    if bias.size == 0 and activation == 0 and (m <= FEW or n <= FEW):
        if m > FEW:  # few columns: the same product, transposed
            _few_rows(work, fb, b_column, b_row, fa, a_column, a_row, n, m, whole, c, 1, n)
        else:
            _few_rows(work, fa, a_row, a_column, fb, b_row, b_column, m, n, whole, c, n, 1)
        return
    multiply(work, fa, 0, a_row, a_column, fb, 0, b_row, b_column, c, 0, m, n, whole, bias, activation)


def _few_rows(work, p, p_row, p_column, q, q_row, q_column, few, many, whole, c, few_step, many_step):
    """c[i, j] = sum over k of p[i, k] q[k, j] with few rows i; q is read in its own order."""
    work *= 4  # bound by memory, not by multiplications
    if q_row != 1:
        add_rows(work, p, 0, p_row, p_column, q, 0, q_row, few, many, whole, c, 0, few_step, many_step)
        return
    if p_column != 1:
        p, p_row = np.ascontiguousarray(p.reshape(whole, few).T).reshape(-1), whole
    dot_rows(work, p, 0, p_row, q, 0, q_column, few, many, whole, c, 0, few_step, many_step)


def _product_stack(a, b, lead, out):
    m, whole = a.shape[-2:]
    n = b.shape[-1]
    if out.size == 0:
        return
    fa, a_row, a_column, a_starts = _flat_stack(a, lead)
    fb, b_row, b_column, b_starts = _flat_stack(b, lead)
    work = 2 * out.size * whole * NANOSECONDS_PER_FLOP
    c, bias = out.reshape(-1), _NO_BIAS[a.dtype]
    multiply_batch(work, fa, a_starts, a_row, a_column, fb, b_starts, b_row, b_column, c, m, n, whole, bias, 0)


def _flat_stack(stack, lead):
    """Memory in order, the steps within a matrix, and where each matrix of the broadcast stack begins."""
    rows, columns = stack.shape[-2:]
    swapped = stack.swapaxes(-1, -2)
    if not stack.flags.c_contiguous and swapped.flags.c_contiguous:
        memory, row, column = swapped, 1, rows
    else:
        memory, row, column = np.ascontiguousarray(stack), columns, 1
    memory = canonical(memory)
    count = int(np.prod(stack.shape[:-2]))
    starts = (np.arange(count, dtype=np.int64) * (rows * columns)).reshape(stack.shape[:-2])
    return memory.reshape(-1), row, column, np.ascontiguousarray(np.broadcast_to(starts, lead)).reshape(-1)


def prepare_matmul_backward(shapes, dtype, *, needs):
    """As `prepare_matmul`."""
    _, a, b = shapes
    if len(a) != 2 or len(b) != 2 or a[0] * a[1] * b[1] > TINY:
        return partial(matmul_backward, needs=needs)
    products = tiny_product_backward.serial

    def run(grad, of_a, of_b):
        grad_a, grad_b = np.empty(a, dtype), np.empty(b, dtype)
        products(grad, of_a, of_b, grad_a, grad_b)
        return grad_a if "a" in needs else None, grad_b if "b" in needs else None

    return run


def matmul_backward(grad, a, b, *, needs):
    rows = a if a.ndim > 1 else a[None, :]
    columns = b if b.ndim > 1 else b[:, None]
    if b.ndim == 1:
        grad = grad[..., None]
    if a.ndim == 1:
        grad = grad[..., None, :]
    grad_a = grad_b = None
    if "a" in needs:
        grad_a = _sum_to(matmul(grad, columns.swapaxes(-1, -2)), rows.shape).reshape(a.shape)
    if "b" in needs:
        grad_b = _sum_to(matmul(rows.swapaxes(-1, -2), grad), columns.shape).reshape(b.shape)
    return grad_a, grad_b


def _sum_to(array, shape):
    """Sum over the leading axes along which `shape` was broadcast."""
    if array.shape == shape:
        return array
    added = array.ndim - len(shape)
    stretched = tuple(i + added for i, n in enumerate(shape) if n == 1 and array.shape[i + added] != 1)
    return array.sum(axis=(*range(added), *stretched), keepdims=True).reshape(shape)


def prepare_linear(shapes, dtype, *, activation):
    """As `prepare_matmul`."""
    x, weight, _ = shapes
    if len(x) != 2 or x[0] * weight[0] * weight[1] > TINY:
        return partial(linear, activation=activation)
    shape, code, product, no_bias = (x[0], weight[0]), ACTIVATION_CODES[activation], tiny_linear.serial, _NO_BIAS[dtype]

    def run(x, weight, bias, *, out=None):
        if out is None:
            out = np.empty(shape, dtype)
        x = x if x.flags.carray else canonical(x)
        weight = weight if weight.flags.carray else canonical(weight)
        bias = no_bias if bias is None else bias if bias.flags.carray else canonical(bias)
        product(x, weight, bias, out, code)
        return out

    return run


def linear(x, weight, bias, *, activation, out=None):
    if out is None:
        out = empty((*x.shape[:-1], weight.shape[0]), x.dtype)
    rows, flat = (x, out) if x.ndim == 2 else (_matrix(x), _matrix(out))
    bias = _NO_BIAS[x.dtype] if bias is None else canonical(bias)
    _product(rows, weight.T, flat, bias, ACTIVATION_CODES[activation])
    return out


def _matrix(array):
    """All leading axes as one; reshape(-1, ...) cannot tell where an axis is 0."""
    return array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1])


def prepare_linear_backward(shapes, dtype, *, needs):
    """As `prepare_matmul`."""
    _, x, weight = shapes
    if len(x) != 2 or x[0] * weight[0] * weight[1] > TINY:
        return partial(linear_backward, needs=needs)
    products = tiny_linear_backward.serial

    def run(grad, of_x, of_weight):
        results = np.empty(x, dtype), np.empty(weight, dtype), np.empty(weight[0], dtype)
        products(grad, of_x, of_weight, *results)
        return tuple(r if name in needs else None for name, r in zip(("x", "weight", "bias"), results, strict=True))

    return run


def linear_backward(grad, x, weight, *, needs):
    flat_grad, rows = _matrix(grad), _matrix(x)
    grad_x = grad_weight = grad_bias = None
    if "x" in needs:
        grad_x = empty(x.shape, x.dtype)
        _product(flat_grad, weight, _matrix(grad_x), _NO_BIAS[x.dtype], 0)
    if "weight" in needs:
        grad_weight = np.empty(weight.shape, x.dtype)
        _product(flat_grad.T, rows, grad_weight, _NO_BIAS[x.dtype], 0)
    if "bias" in needs:
        grad_bias = np.empty(weight.shape[0], x.dtype)
        column_sums(0.3 * flat_grad.size, flat_grad, grad_bias)
    return grad_x, grad_weight, grad_bias


_SUM_COLUMNS = 256  # columns a chunk: their sums stay in L1


@kernel()
def column_sums(matrix, sums):
    """sums[j] = sum over i of matrix[i, j], row after row, so that the order is the same for any number of threads."""
    rows, columns = matrix.shape
    for chunk in prange((columns + _SUM_COLUMNS - 1) // _SUM_COLUMNS):
        first = chunk * _SUM_COLUMNS
        last = min(columns, first + _SUM_COLUMNS)
        for j in range(first, last):
            sums[j] = 0
        for i in range(rows):
            for j in range(first, last):
                sums[j] += matrix[i, j]
