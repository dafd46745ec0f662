"""Matrix multiplication and the dense layer in NumPy."""

import numpy as np

_EXACT = {np.dtype(np.int8): np.dtype(np.int32), np.dtype(np.uint8): np.dtype(np.int32)}
_ACTIVATIONS = {
    "relu": lambda y: np.maximum(y, 0),
    "relu6": lambda y: np.clip(y, 0, 6),
    "leaky_relu": lambda y: np.where(y > 0, y, 0.01 * y),
    "sigmoid": lambda y: np.exp(-np.logaddexp(0, -y)),  # 1 / (1 + exp(-y)) without its overflow
    "tanh": np.tanh,
}


def matmul_naive(a, b):
    """The definition, for two matrices: (M, K) @ (K, N)."""
    (m, depth), n = a.shape, b.shape[1]
    result = np.zeros((m, n), _EXACT.get(a.dtype, a.dtype))
    for i in range(m):
        for j in range(n):
            for k in range(depth):
                result[i, j] += result.dtype.type(a[i, k]) * result.dtype.type(b[k, j])
    return result


def matmul(a, b, *, out=None):
    # Two 1-D operands give a scalar: as a 0-D array it is of the same kind as every other result.
    return np.asarray(np.matmul(a, b, dtype=_EXACT.get(a.dtype, a.dtype), out=out))


def matmul_backward(grad, a, b, *, needs):
    # A 1-D operand is a matrix of one row (a) or one column (b), whose axis the result lacks.
    rows = a[None, :] if a.ndim == 1 else a
    columns = b[:, None] if b.ndim == 1 else b
    if b.ndim == 1:
        grad = grad[..., None]
    if a.ndim == 1:
        grad = grad[..., None, :]
    grad_a = grad_b = None
    if "a" in needs:
        grad_a = _sum_to(grad @ columns.swapaxes(-1, -2), rows.shape).reshape(a.shape)
    if "b" in needs:
        grad_b = _sum_to(rows.swapaxes(-1, -2) @ grad, columns.shape).reshape(b.shape)
    return grad_a, grad_b


def _sum_to(array, shape):
    """Sum over the axes along which `shape` was broadcast to array.shape."""
    added = array.ndim - len(shape)
    stretched = tuple(i + added for i, n in enumerate(shape) if n == 1 and array.shape[i + added] != 1)
    return array.sum(axis=(*range(added), *stretched), keepdims=True).reshape(shape)


def linear(x, weight, bias, *, activation, out=None):
    y = x.reshape(_rows(x), x.shape[-1]) @ weight.T
    if bias is not None:
        y += bias
    if activation is not None:
        y = _ACTIVATIONS[activation](y)
    y = y.reshape(*x.shape[:-1], weight.shape[0])
    if out is None:
        return y
    out[...] = y
    return out


def linear_backward(grad, x, weight, *, needs):
    rows = _rows(x)
    flat_grad = grad.reshape(rows, weight.shape[0])
    return (
        (flat_grad @ weight).reshape(x.shape) if "x" in needs else None,
        flat_grad.T @ x.reshape(rows, x.shape[-1]) if "weight" in needs else None,
        flat_grad.sum(axis=0) if "bias" in needs else None,
    )


def _rows(x):
    """How many rows x has; reshape(-1, ...) cannot tell where an axis is 0."""
    return int(np.prod(x.shape[:-1]))
