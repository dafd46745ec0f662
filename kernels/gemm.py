"""Matrix multiplication and the dense layer, forward and backward."""

from math import prod

import numpy as np

from tilewise.kernels import shapes
from tilewise.kernels.arrays import FLOATS, common_dtype, required
from tilewise.kernels.operation import Operation, Problem

_INTEGERS = tuple(np.dtype(kind + bits) for kind in ("int", "uint") for bits in ("8", "16", "32", "64"))
_WIDENED = (np.dtype(np.int8), np.dtype(np.uint8))  # their products go into int32
# What `needs` is by default: then it is no option of the call, whose signature is looked up faster without one.
_BOTH, _ALL = ("a", "b"), ("x", "weight", "bias")


def matmul(a, b, *, out=None):
    """The matrix product: result[..., i, j] = sum over k of a[..., i, k] * b[..., k, j].

    Args:
        a: (..., M, K), or (K,), which counts as one row; float16, float32, float64 or any integer type, any strides.
        b: (..., K, N), or (K,), which counts as one column; a's dtype. The leading axes broadcast, as in np.matmul.
        out: an array of exactly the result's shape and dtype that overlaps neither operand; it is filled and returned.

    Returns:
        (..., M, N), without the axis that a 1-D operand lacks (two of them give a 0-D array); zeros for K = 0. It has
        the operands' dtype, where integers wrap on overflow; but int8 and uint8 give int32, which is exact up to
        K = 131,071 (int8) and 33,025 (uint8).

    Raises:
        TypeError: not arrays, or dtypes that differ or are not supported (bool, complex).
        ValueError: a 0-D operand, a K or leading axes that do not match, a wrong `out`.
    """
    return _MATMUL.call((a, b), (), out)


def matmul_backward(grad, a, b, *, needs=_BOTH):
    """The gradients of `matmul`: grad_a = grad @ b^T and grad_b = a^T @ grad, summed over the axes that were broadcast.

    Args:
        grad: the gradient of the result, of the result's shape and dtype.
        a, b: the operands of the forward call, float16, float32 or float64.
        needs: which gradients to compute, out of "a" and "b".

    Returns:
        (grad_a, grad_b) of the shapes of a and b; None for one that is not needed.

    Raises:
        TypeError, ValueError: as `matmul`; also a grad whose shape is not the result's, or an unknown name in `needs`.
    """
    return _MATMUL_BACKWARD.call((grad, a, b), () if needs is _BOTH else (needs,))


def linear(x, weight, bias=None, *, activation=None, out=None):
    """The dense layer: y = activation(x @ weight^T + bias).

    Args:
        x: (..., in_features), float16, float32 or float64, any strides.
        weight: (out_features, in_features).
        bias: (out_features,), or None for none.
        activation: None, "relu", "relu6", "leaky_relu" (slope 0.01), "sigmoid" or "tanh", applied in the same pass.
        out: an array of exactly the result's shape and dtype that overlaps no operand; it is filled and returned.

    Returns:
        (..., out_features), of x's kind and dtype.

    Raises:
        TypeError: not arrays, or dtypes that differ or are not supported.
        ValueError: shapes that do not fit together, an unknown activation, a wrong `out`.
    """
    return _LINEAR.call((x, weight, bias), () if activation is None else (activation,), out)


def linear_backward(grad, x, weight, *, needs=_ALL):
    """The gradients of `linear` without its activation.

    grad_x = grad @ weight; grad_weight = grad^T @ x and grad_bias = sum of grad, both over all rows.

    Args:
        grad: (..., out_features), the gradient of x @ weight^T + bias: what the activation's backward gave, if there
            is one.
        x, weight: the operands of the forward call.
        needs: which gradients to compute, out of "x", "weight" and "bias".

    Returns:
        (grad_x, grad_weight, grad_bias); None for one that is not needed.

    Raises:
        TypeError, ValueError: as `linear`; also a grad whose shape is not the result's, or an unknown name in `needs`.
    """
    return _LINEAR_BACKWARD.call((grad, x, weight), () if needs is _ALL else (needs,))


def _product_shape(function: str, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a @ b by np.matmul's rules."""
    if 0 in (len(a), len(b)):
        raise ValueError(f"{function}: a and b must have at least 1 dimension, got shapes {a} and {b}")
    axis = -2 if len(b) > 1 else -1
    if a[-1] != b[axis]:
        name = "last" if axis == -1 else "second to last"
        raise ValueError(f"{function}: a's last axis is {a[-1]} but b's {name} is {b[axis]} (a {a}, b {b})")
    try:
        batch = np.broadcast_shapes(a[:-2], b[:-2])
    except ValueError:
        raise ValueError(
            f"{function}: the leading axes {a[:-2]} and {b[:-2]} do not broadcast (a {a}, b {b})"
        ) from None
    return (*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else ()))


def _check_grad(function: str, grad, expected: tuple[int, ...], source: str):
    if grad.shape != expected:
        raise ValueError(f"{function}: grad must have shape {expected} ({source}), got {grad.shape}")


def _check_matmul(a, b) -> Problem:
    required("matmul", a=a, b=b)
    dtype = common_dtype("matmul", {"a": a, "b": b}, FLOATS + _INTEGERS)
    result = np.dtype(np.int32) if dtype in _WIDENED else dtype
    shape = _product_shape("matmul", a.shape, b.shape)
    moved = (a.size + b.size) * dtype.itemsize + prod(shape) * result.itemsize
    return Problem({}, flops=2 * prod(shape) * a.shape[-1], bytes=moved, out=(shape, result))


def _check_matmul_backward(grad, a, b, needs=_BOTH) -> Problem:
    required("matmul_backward", grad=grad, a=a, b=b)
    dtype = common_dtype("matmul_backward", {"grad": grad, "a": a, "b": b})
    expected = _product_shape("matmul_backward", a.shape, b.shape)
    _check_grad("matmul_backward", grad, expected, f"a {a.shape} @ b {b.shape}")
    needs = shapes.needs("matmul_backward", needs, ("a", "b"))
    results = sum({"a": a, "b": b}[name].size for name in needs)
    moved = (grad.size + a.size + b.size + results) * dtype.itemsize
    return Problem({"needs": needs}, flops=2 * grad.size * a.shape[-1] * len(needs), bytes=moved)


def _dense_shape(function: str, x, weight) -> tuple[int, ...]:
    if weight.ndim != 2:
        raise ValueError(f"{function}: weight must have shape (out_features, in_features), got {weight.shape}")
    if x.ndim == 0:
        raise ValueError(f"{function}: x must have at least 1 dimension, got shape ()")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{function}: weight expects {weight.shape[1]} features but x has {x.shape[-1]} "
            f"(x {x.shape}, weight {weight.shape})"
        )
    return (*x.shape[:-1], weight.shape[0])


def _check_linear(x, weight, bias, activation=None) -> Problem:
    required("linear", x=x, weight=weight)
    dtype = common_dtype("linear", {"x": x, "weight": weight, "bias": bias})
    shape = _dense_shape("linear", x, weight)
    shapes.check_bias("linear", bias, shape[-1])
    options = {"activation": shapes.activation("linear", activation)}
    moved = (x.size + weight.size + (0 if bias is None else bias.size) + prod(shape)) * dtype.itemsize
    return Problem(options, flops=2 * prod(shape) * x.shape[-1], bytes=moved, out=(shape, dtype))


def _check_linear_backward(grad, x, weight, needs=_ALL) -> Problem:
    required("linear_backward", grad=grad, x=x, weight=weight)
    dtype = common_dtype("linear_backward", {"grad": grad, "x": x, "weight": weight})
    expected = _dense_shape("linear_backward", x, weight)
    _check_grad("linear_backward", grad, expected, f"x {x.shape}, weight {weight.shape}")
    needs = shapes.needs("linear_backward", needs, ("x", "weight", "bias"))
    sizes = {"x": x.size, "weight": weight.size, "bias": expected[-1]}
    products = ("x" in needs) + ("weight" in needs)
    moved = (grad.size + x.size + weight.size + sum(sizes[name] for name in needs)) * dtype.itemsize
    return Problem({"needs": needs}, flops=2 * grad.size * x.shape[-1] * products, bytes=moved)


# The forward kernels pack their operands anyway, from any strides: a transposed view costs no copy.
_MATMUL = Operation("gemm", "matmul", ("a", "b"), _check_matmul, any_strides=True)
_MATMUL_BACKWARD = Operation("gemm", "matmul_backward", ("grad", "a", "b"), _check_matmul_backward)
_LINEAR = Operation("gemm", "linear", ("x", "weight", "bias"), _check_linear, any_strides=True)
_LINEAR_BACKWARD = Operation("gemm", "linear_backward", ("grad", "x", "weight"), _check_linear_backward)
