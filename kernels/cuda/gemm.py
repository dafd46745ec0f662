"""Matrix multiplication and the dense layer on the GPU: shapes and strides here; gemm_plan.py chooses the kernel."""

from dataclasses import replace
from math import prod

import numpy as np

from tilewise.kernels.cuda.copying import contiguous
from tilewise.kernels.cuda.epilogue import ACTIVATION_CODES
from tilewise.kernels.cuda.gemm_plan import Matrices, multiply
from tilewise.kernels.cuda.gemm_sums import sum_rows
from tilewise.kernels.device_arrays import DeviceArray

_RESULT_DTYPE = {np.dtype(np.int8): np.dtype(np.int32), np.dtype(np.uint8): np.dtype(np.int32)}


def matmul(a, b):
    return _matmul(_rows(a), _columns(b)).reshape(*_result_shape(a.shape, b.shape))


def _matmul(left: Matrices, right: Matrices) -> DeviceArray:
    """The batch of products, with the leading axes of both broadcast."""
    array = left.array
    lead = np.broadcast_shapes(left.lead, right.lead)
    shape = (*lead, left.rows, right.columns)
    result = array.place.empty(shape, _RESULT_DTYPE.get(array.dtype, array.dtype))
    if left.lead and not right.lead and left.column_stride == 1 and result.size:  # matrices below each other are one
        left, lead = replace(left, lead=(), rows=prod(left.lead) * left.rows, row_stride=left.columns), ()
    if result.size:
        multiply(left, right, lead, result)
    return result


def _rows(a) -> Matrices:
    """The left operand: a 1-D one is a row."""
    shape = a.shape if a.ndim > 1 else (1, *a.shape)
    return Matrices(a, shape[:-2], shape[-2], shape[-1], shape[-1], 1)


def _columns(b) -> Matrices:
    """The right operand: a 1-D one is a column."""
    shape = b.shape if b.ndim > 1 else (*b.shape, 1)
    return Matrices(b, shape[:-2], shape[-2], shape[-1], shape[-1], 1)


def _result_shape(a: tuple, b: tuple) -> tuple:
    lead = np.broadcast_shapes(a[:-2], b[:-2])
    return (*lead, *a[-2:-1], *(b[-1:] if len(b) > 1 else ()))


def matmul_backward(grad, a, b, *, needs):
    left, right = _rows(a), _columns(b)
    lead = grad.shape[: len(np.broadcast_shapes(left.lead, right.lead))]
    grads = Matrices(grad, lead, left.rows, right.columns, right.columns, 1)
    grad_a = grad_b = None
    if "a" in needs:
        grad_a = _sum_to(_matmul(grads, right.transposed()), (*left.lead, left.rows, left.columns)).reshape(*a.shape)
    if "b" in needs:
        grad_b = _sum_to(_matmul(left.transposed(), grads), (*right.lead, right.rows, right.columns)).reshape(*b.shape)
    return grad_a, grad_b


def _sum_to(array: DeviceArray, shape: tuple) -> DeviceArray:
    """Sum over the leading axes along which `shape` was broadcast."""
    added = array.ndim - len(shape)
    full = (1,) * added + shape
    for axis in range(array.ndim):
        if full[axis] == 1 and array.shape[axis] != 1:
            before, length, after = prod(array.shape[:axis]), array.shape[axis], prod(array.shape[axis + 1 :])
            summed = sum_rows(array.reshape(before, length, after))
            array = summed.reshape(*array.shape[:axis], 1, *array.shape[axis + 1 :])
    return array.reshape(*shape)


def linear(x, weight, bias, *, activation):
    rows, features = prod(x.shape[:-1]), weight.shape[1]
    left = Matrices(x, (), rows, features, features, 1)
    right = Matrices(weight, (), features, weight.shape[0], 1, features)
    result = x.place.empty((*x.shape[:-1], weight.shape[0]), x.dtype)
    if result.size:
        multiply(left, right, (), result, bias, ACTIVATION_CODES[activation])
    return result


def linear_backward(grad, x, weight, *, needs):
    rows, (outputs, features) = prod(x.shape[:-1]), weight.shape
    grads = Matrices(grad, (), rows, outputs, outputs, 1)
    grad_x = grad_weight = grad_bias = None
    if "x" in needs:
        grad_x = _matmul(grads, Matrices(weight, (), outputs, features, features, 1)).reshape(*x.shape)
    if "weight" in needs:
        grad_weight = _matmul(grads.transposed(), Matrices(x, (), rows, features, features, 1))
    if "bias" in needs:
        grad_bias = sum_rows(contiguous(grad).reshape(1, rows, outputs)).reshape(outputs)
    return grad_x, grad_weight, grad_bias
