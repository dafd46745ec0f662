"""Matrix multiplication and the dense layer of the GPU backends: shapes and strides; a backend has the kernels."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from tilewise.kernels.device_arrays import DeviceArray

_RESULT_DTYPE = {np.dtype(np.int8): np.dtype(np.int32), np.dtype(np.uint8): np.dtype(np.int32)}


@dataclass(frozen=True, slots=True)
class Matrices:
    """A batch of rows x columns matrices, in row-major order but for the matrix itself, whose strides are given."""

    array: DeviceArray
    lead: tuple[int, ...]
    rows: int
    columns: int
    row_stride: int
    column_stride: int

    def transposed(self) -> "Matrices":
        return replace(
            self, rows=self.columns, columns=self.rows, row_stride=self.column_stride, column_stride=self.row_stride
        )

    def aligned(self) -> bool:
        """Whether its contiguous rows (or columns) consist of whole vectors of 16 bytes, where the first one begins."""
        width = 16 // self.array.dtype.itemsize
        along = self.columns if self.column_stride == 1 else self.rows
        size = self.rows * self.columns
        return along % width == 0 and size % width == 0

    def moved(self, elements: int) -> "Matrices":
        """From an element on."""
        a = self.array
        moved = DeviceArray(a.place, a.pointer + elements * a.dtype.itemsize, a.shape, a.dtype, a.owner)
        return replace(self, array=moved)


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


@dataclass(frozen=True)
class Products:
    """The family's functions, from a backend's kernels.

    multiply(left, right, lead, result, bias, code): result = activation(left @ right + bias), batch by batch.
    sum_rows: (batch, rows, columns) -> (batch, columns). contiguous: a copy where an array is not.
    codes: the numbers of linear's activations.
    """

    multiply: Callable
    sum_rows: Callable
    contiguous: Callable
    codes: dict[str | None, int]

    def matmul(self, a, b):
        return self._matmul(_rows(a), _columns(b)).reshape(*_result_shape(a.shape, b.shape))

    def _matmul(self, left: Matrices, right: Matrices) -> DeviceArray:
        """The batch of products, with the leading axes of both broadcast."""
        array = left.array
        lead = np.broadcast_shapes(left.lead, right.lead)
        shape = (*lead, left.rows, right.columns)
        result = array.place.empty(shape, _RESULT_DTYPE.get(array.dtype, array.dtype))
        if left.lead and not right.lead and left.column_stride == 1 and result.size:
            # matrices below each other are one
            left, lead = replace(left, lead=(), rows=prod(left.lead) * left.rows, row_stride=left.columns), ()
        if result.size:
            self.multiply(left, right, lead, result)
        return result

    def matmul_backward(self, grad, a, b, *, needs):
        left, right = _rows(a), _columns(b)
        lead = grad.shape[: len(np.broadcast_shapes(left.lead, right.lead))]
        grads = Matrices(grad, lead, left.rows, right.columns, right.columns, 1)
        grad_a = grad_b = None
        if "a" in needs:
            product, shape = self._matmul(grads, right.transposed()), (*left.lead, left.rows, left.columns)
            grad_a = self._sum_to(product, shape).reshape(*a.shape)
        if "b" in needs:
            product, shape = self._matmul(left.transposed(), grads), (*right.lead, right.rows, right.columns)
            grad_b = self._sum_to(product, shape).reshape(*b.shape)
        return grad_a, grad_b

    def _sum_to(self, array: DeviceArray, shape: tuple) -> DeviceArray:
        """Sum over the leading axes along which `shape` was broadcast."""
        added = array.ndim - len(shape)
        full = (1,) * added + shape
        for axis in range(array.ndim):
            if full[axis] == 1 and array.shape[axis] != 1:
                before, length, after = prod(array.shape[:axis]), array.shape[axis], prod(array.shape[axis + 1 :])
                summed = self.sum_rows(array.reshape(before, length, after))
                array = summed.reshape(*array.shape[:axis], 1, *array.shape[axis + 1 :])
        return array.reshape(*shape)

    def linear(self, x, weight, bias, *, activation):
        rows, features = prod(x.shape[:-1]), weight.shape[1]
        left = Matrices(x, (), rows, features, features, 1)
        right = Matrices(weight, (), features, weight.shape[0], 1, features)
        result = x.place.empty((*x.shape[:-1], weight.shape[0]), x.dtype)
        if result.size:
            self.multiply(left, right, (), result, bias, self.codes[activation])
        return result

    def linear_backward(self, grad, x, weight, *, needs):
        rows, (outputs, features) = prod(x.shape[:-1]), weight.shape
        grads = Matrices(grad, (), rows, outputs, outputs, 1)
        grad_x = grad_weight = grad_bias = None
        if "x" in needs:
            product = self._matmul(grads, Matrices(weight, (), outputs, features, features, 1))
            grad_x = product.reshape(*x.shape)
        if "weight" in needs:
            grad_weight = self._matmul(grads.transposed(), Matrices(x, (), rows, features, features, 1))
        if "bias" in needs:
            grad_bias = self.sum_rows(self.contiguous(grad).reshape(1, rows, outputs)).reshape(outputs)
        return grad_x, grad_weight, grad_bias
