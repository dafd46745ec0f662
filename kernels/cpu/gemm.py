"""Matrix multiplication and the dense layer on the CPU: shapes and strides here; gemm_plan.py chooses the kernel."""

from functools import partial
from math import prod

import numpy as np

from tilewise.kernels.arrays import canonical
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES
from tilewise.kernels.cpu.gemm_in_place import column_sums, small_linear_backward
from tilewise.kernels.cpu.gemm_plan import (
    IN_CACHE,
    by_dots,
    dots,
    fits_in_place,
    in_place,
    plan,
    plan_stack,
)
from tilewise.kernels.cpu.scratch import ALIGNED_FROM, empty
from tilewise.kernels.cpu.simd import VECTOR_BYTES

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
# Multiply-adds up to which a dense layer's three gradients are one serial call.
SMALL_BACKWARD = 8 << 20


def _allocator(shape, dtype):
    """How to make a result of this size: small ones need no alignment, and save its cost.

    A product writes hardly more than once, and of AVX2's vectors every second one lies within a line anyway.
    """
    aligned_from = ALIGNED_FROM if VECTOR_BYTES == 64 else 4 * ALIGNED_FROM
    return np.empty if prod(shape) * dtype.itemsize < aligned_from else empty


def prepare_matmul(shapes, dtype):
    """The function for these shapes: `matmul`, or for plain matrices one without its detours."""
    a, b = shapes
    if dtype in _COMPUTED_AS or min(len(a), len(b)) < 2 or 0 in a + b:
        return matmul
    if len(a) > 2 and len(b) > 2:
        return _prepare_stack(a, b, dtype)
    if len(a) > 2 or len(b) > 2:
        return matmul
    (m, depth), n = a, b[1]
    shape, no_bias = (m, n), _NO_BIAS[dtype]
    product, rest = plan(m, n, depth, True, True, dtype), (no_bias, 0)
    if fits_in_place(m, n, depth, True, dtype.itemsize):  # what the plan does, without its detours
        product, *rest = in_place(m, n, depth, True, dtype)
    empty = _allocator(shape, dtype)

    def run(a, b, *, out=None):
        if out is None:
            out = empty(shape, dtype)
        if a.flags.carray and b.flags.carray:
            product(a, b, out, *rest)
        else:
            _product(a, b, out, no_bias, 0)
        return out

    return run


def _prepare_stack(a, b, dtype):
    """Two stacks of matrices: the plan for contiguous ones is made beforehand."""
    lead = np.broadcast_shapes(a[:-2], b[:-2])
    shape, no_bias = (*lead, a[-2], b[-1]), _NO_BIAS[dtype]
    product = plan_stack(a[-2], b[-1], a[-1], a[:-2], b[:-2], lead, True, True, dtype)
    flat_a, flat_b, flat_c = ((prod(s[:-1]), s[-1]) for s in (a, b, shape))

    def run(a, b, *, out=None):
        if out is None:
            out = empty(shape, dtype)
        if a.flags.carray and b.flags.carray:
            product(a.reshape(flat_a), b.reshape(flat_b), out.reshape(flat_c), no_bias, 0)
        else:
            _product_stack(a, b, lead, out)
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


def _matmul_stacked(a, b, out=None):
    """1-D operands, and stacks of matrices whose leading axes broadcast."""
    rows = a if a.ndim > 1 else a[None, :]
    columns = b if b.ndim > 1 else b[:, None]
    lead = np.broadcast_shapes(rows.shape[:-2], columns.shape[:-2])
    shape = (*lead, rows.shape[-2], columns.shape[-1])
    result = empty(shape, a.dtype) if out is None else out.reshape(shape)
    if len(lead) == 0:
        _product(rows, columns, result, _NO_BIAS[a.dtype], 0)
    elif columns.ndim == 2 and rows.flags.c_contiguous:
        # one right operand for the whole stack: a single tall product
        count = rows.size // max(rows.shape[-1], 1) if rows.shape[-1] else int(np.prod(rows.shape[:-1]))
        flat = result.reshape(count, shape[-1])
        _product(rows.reshape(count, rows.shape[-1]), columns, flat, _NO_BIAS[a.dtype], 0)
    elif result.size > 0:
        _product_stack(rows, columns, lead, result)
    if out is not None:
        return out
    if a.ndim > 1 and b.ndim > 1:
        return result
    return result.reshape((*lead, *((shape[-2],) if a.ndim > 1 else ()), *((shape[-1],) if b.ndim > 1 else ())))


def _stored(matrix):
    """(the memory as a C-contiguous matrix, is it stored by rows); a copy if it is stored in neither order."""
    if matrix.flags.carray:
        return matrix, True
    if matrix.T.flags.carray:
        return matrix.T, False
    if matrix.T.flags.c_contiguous:
        return canonical(matrix.T), False
    return canonical(matrix), True


def _product(a, b, out, bias, activation):
    """out = activation(a @ b + bias) for matrices; out is C-contiguous."""
    m, depth = a.shape
    n = b.shape[1]
    if m == 0 or n == 0:
        return
    a_memory, a_by_rows = _stored(a)
    b_memory, b_by_rows = _stored(b)
    plan(m, n, depth, a_by_rows, b_by_rows, out.dtype)(a_memory, b_memory, out, bias, activation)


def _product_stack(a, b, lead, out):
    m, depth = a.shape[-2:]
    n = b.shape[-1]
    a_memory, a_by_rows = _stored_stack(a)
    b_memory, b_by_rows = _stored_stack(b)
    run = plan_stack(m, n, depth, a.shape[:-2], b.shape[:-2], lead, a_by_rows, b_by_rows, out.dtype)
    run(a_memory, b_memory, out.reshape(-1, n), _NO_BIAS[out.dtype], 0)


def _stored_stack(stack):
    """As `_stored`, one matrix below the other."""
    by_rows = True
    if not stack.flags.c_contiguous and stack.swapaxes(-1, -2).flags.c_contiguous:
        stack, by_rows = stack.swapaxes(-1, -2), False
    columns = stack.shape[-1]
    stack = canonical(stack)
    return stack.reshape(stack.size // columns if columns else 0, columns), by_rows


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


def prepare_matmul_backward(shapes, dtype, *, needs):
    """As `prepare_matmul`."""
    _, a, b = shapes
    if len(a) != 2 or len(b) != 2 or min(a + b) < 2:  # one row or column is stored both ways
        return partial(matmul_backward, needs=needs)
    (m, depth), n, no_bias = a, b[1], _NO_BIAS[dtype]
    to_a = plan(m, depth, n, True, False, dtype) if "a" in needs else None
    to_b = plan(depth, n, m, False, True, dtype) if "b" in needs else None

    def run(grad, of_a, of_b):
        grad_a = grad_b = None
        if to_a:
            grad_a = empty(a, dtype)
            to_a(grad, of_b, grad_a, no_bias, 0)
        if to_b:
            grad_b = empty(b, dtype)
            to_b(of_a, grad, grad_b, no_bias, 0)
        return grad_a, grad_b

    return run


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
    if len(x) != 2 or 0 in x + weight:
        return partial(linear, activation=activation)
    shape, code, no_bias = (x[0], weight[0]), ACTIVATION_CODES[activation], _NO_BIAS[dtype]
    # a constant of this closure, not a closure of its own: a tenth of a microsecond
    product, sizes = plan(x[0], weight[0], x[1], True, False, dtype), ()
    if by_dots(x[0], weight[0]):
        product, sizes = dots(x[0], weight[0], x[1], dtype)
    empty = _allocator(shape, dtype)

    def run(x, weight, bias, *, out=None):
        if out is None:
            out = empty(shape, dtype)
        bias = no_bias if bias is None else bias if bias.flags.carray else canonical(bias)
        if x.flags.carray and weight.flags.carray:
            product(x, weight, out, bias, code, *sizes)
        else:
            _product(x, weight.T, out, bias, code)
        return out

    return run


def linear(x, weight, bias, *, activation, out=None):
    if out is None:
        out = empty((*x.shape[:-1], weight.shape[0]), x.dtype)
    bias = _NO_BIAS[x.dtype] if bias is None else canonical(bias)
    _product(_matrix(x), weight.T, _matrix(out), bias, ACTIVATION_CODES[activation])
    return out


def _matrix(array):
    """All leading axes as one; reshape(-1, ...) cannot tell where an axis is 0."""
    return array if array.ndim == 2 else array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1])


def prepare_linear_backward(shapes, dtype, *, needs):
    """As `prepare_matmul`."""
    _, x, weight = shapes
    in_cache = max(weight[0] * weight[1], x[0] * weight[1] if len(x) == 2 else 0) * dtype.itemsize <= IN_CACHE
    if len(x) != 2 or 0 in x + weight or not in_cache or x[0] * weight[0] * weight[1] > SMALL_BACKWARD:
        return partial(linear_backward, needs=needs)
    products = small_linear_backward.serial
    wanted = tuple(int(name in needs) for name in ("x", "weight", "bias"))

    def run(grad, of_x, of_weight):
        grad_x, grad_weight, grad_bias = np.empty(x, dtype), np.empty(weight, dtype), np.empty(weight[0], dtype)
        products(grad, of_x, of_weight, grad_x, grad_weight, grad_bias, *wanted)
        if wanted == (1, 1, 1):
            return grad_x, grad_weight, grad_bias
        return tuple(r if w else None for w, r in zip(wanted, (grad_x, grad_weight, grad_bias), strict=True))

    return run


def linear_backward(grad, x, weight, *, needs):
    flat_grad, rows = _matrix(grad), _matrix(x)
    grad_x = grad_weight = grad_bias = None
    if "x" in needs:
        grad_x = empty(x.shape, x.dtype)
        _product(flat_grad, weight, _matrix(grad_x), _NO_BIAS[x.dtype], 0)
    if "weight" in needs:
        grad_weight = empty(weight.shape, x.dtype)
        _product(flat_grad.T, rows, grad_weight, _NO_BIAS[x.dtype], 0)
    if "bias" in needs:
        grad_bias = np.empty(weight.shape[0], x.dtype)
        column_sums(0.3 * flat_grad.size, flat_grad, grad_bias)
    return grad_x, grad_weight, grad_bias
