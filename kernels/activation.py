"""Activation functions, and their gradients computed from the forward's output y.

Each f_backward(grad, y) returns the gradient of the loss with respect to x, given grad, that with respect to y = f(x).
All take float16, float32 or float64 arrays (on a GPU also bfloat16) of any shape and strides and return an array of the
same shape, dtype and kind.

They raise TypeError for what is not an array or not of a supported dtype, or where dtypes differ, and ValueError where
the shapes of grad and y differ. A NaN in x is a NaN in the result.
"""

from math import isfinite

from tilewise.kernels.arrays import common_dtype
from tilewise.kernels.operation import Operation, Problem


def relu(x):
    """max(x, 0)."""
    return _RELU.call((x,))


def relu_backward(grad, y):
    """grad where y > 0, else 0 (also at x = 0, as in PyTorch)."""
    return _RELU_BACKWARD.call((grad, y))


def leaky_relu(x, negative_slope=0.01):
    """x where x > 0, else negative_slope * x.

    Raises:
        TypeError, ValueError: besides the module's, a slope that is not a finite number.
    """
    return _LEAKY_RELU.call((x,), (negative_slope,))


def leaky_relu_backward(grad, y, negative_slope=0.01):
    """grad where y > 0, else negative_slope * grad.

    Raises:
        TypeError, ValueError: besides the module's, a slope that is not a finite number, or is negative: y's sign does
            not tell x's sign then.
    """
    return _LEAKY_RELU_BACKWARD.call((grad, y), (negative_slope,))


def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow."""
    return _SIGMOID.call((x,))


def sigmoid_backward(grad, y):
    """grad * y * (1 - y)."""
    return _SIGMOID_BACKWARD.call((grad, y))


def tanh(x):
    """The hyperbolic tangent, (1 - exp(-2x)) / (1 + exp(-2x))."""
    return _TANH.call((x,))


def tanh_backward(grad, y):
    """grad * (1 - y^2)."""
    return _TANH_BACKWARD.call((grad, y))


def softmax(x, axis=-1):
    """exp(x - m) / sum(exp(x - m)) along an axis, where m is the largest x: no overflow for any finite x.

    A row with a NaN or +inf, or of -inf alone, is NaN.

    Args:
        x: an array of at least one dimension.
        axis: along which the results add up to 1, from -ndim to ndim - 1.

    Raises:
        TypeError, ValueError: besides the module's, an axis that is not an int, or that x does not have.
    """
    return _SOFTMAX.call((x,), (axis,))


def softmax_backward(grad, y, axis=-1):
    """y * (grad - sum(grad * y)), summed along the axis of the forward. Raises as `softmax`."""
    return _SOFTMAX_BACKWARD.call((grad, y), (axis,))


def log_softmax(x, axis=-1):
    """log(softmax(x)) = x - m - log(sum(exp(x - m))) along an axis, where m is the largest x. Raises as `softmax`."""
    return _LOG_SOFTMAX.call((x,), (axis,))


def log_softmax_backward(grad, y, axis=-1):
    """grad - exp(y) * sum(grad), summed along the axis of the forward. Raises as `softmax`."""
    return _LOG_SOFTMAX_BACKWARD.call((grad, y), (axis,))


def step(x):
    """1 where x > 0, else 0: the perceptron's threshold. 0 at x = 0, so that a neuron needs a positive sum to fire."""
    return _STEP.call((x,))


def sign(x):
    """1 where x > 0, -1 where x < 0, 0 at 0."""
    return _SIGN.call((x,))


def _problem(name: str, operands: dict, options: dict) -> Problem:
    for operand, array in operands.items():
        if array is None:
            raise TypeError(f"{name}: {operand} must be an array, got None")
    dtype = common_dtype(name, operands)
    if len(operands) == 2 and operands["grad"].shape != operands["y"].shape:
        raise ValueError(
            f"{name}: grad and y must have the same shape, got {operands['grad'].shape} and {operands['y'].shape}"
        )
    size = next(iter(operands.values())).size
    return Problem(options, flops=size, bytes=(len(operands) + 1) * size * dtype.itemsize)


def _axis(name: str, ndim: int, axis) -> int:
    """The axis counted from the front."""
    if isinstance(axis, bool) or not hasattr(axis, "__index__"):
        raise TypeError(f"{name}: axis must be an int, got {axis!r}")
    if not -ndim <= axis < ndim:
        raise ValueError(f"{name}: axis {axis} is out of range for an array of {ndim} dimensions")
    return int(axis) % ndim


def _slope(name: str, value, minimum: float = float("-inf")) -> float:
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: negative_slope must be a number, got {value!r}")
    slope = float(value)
    if not isfinite(slope):
        raise ValueError(f"{name}: negative_slope must be finite, got {value!r}")
    if slope < minimum:
        raise ValueError(f"{name}: negative_slope must not be negative where x's sign is taken from y, got {value!r}")
    return slope


def _operation(name: str) -> Operation:
    """The operation of an activation or gradient: its operands and option follow from its name."""
    operands = ("grad", "y") if name.endswith("_backward") else ("x",)
    minimum = 0.0 if name.endswith("_backward") else float("-inf")

    def check(*arguments) -> Problem:
        arrays = dict(zip(operands, arguments[: len(operands)], strict=True))
        options = {}
        if "softmax" in name and arguments[0] is not None:
            options["axis"] = _axis(name, arguments[0].ndim, arguments[-1])
        elif "leaky" in name:
            options["negative_slope"] = _slope(name, arguments[-1], minimum)
        return _problem(name, arrays, options)

    return Operation("activation", name, operands, check, elementwise="softmax" not in name)


_RELU, _RELU_BACKWARD = _operation("relu"), _operation("relu_backward")
_LEAKY_RELU, _LEAKY_RELU_BACKWARD = _operation("leaky_relu"), _operation("leaky_relu_backward")
_SIGMOID, _SIGMOID_BACKWARD = _operation("sigmoid"), _operation("sigmoid_backward")
_TANH, _TANH_BACKWARD = _operation("tanh"), _operation("tanh_backward")
_SOFTMAX, _SOFTMAX_BACKWARD = _operation("softmax"), _operation("softmax_backward")
_LOG_SOFTMAX, _LOG_SOFTMAX_BACKWARD = _operation("log_softmax"), _operation("log_softmax_backward")
_STEP, _SIGN = _operation("step"), _operation("sign")
