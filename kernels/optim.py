"""Optimisers' updates of one parameter, each in one pass over its arrays, which are changed in place.

Each step(param, grad, state..., *, ...) takes float16, float32 or float64 arrays (on a GPU also bfloat16) of one shape
and dtype, of any strides, on the host or all of them on one GPU; `grad` stays as it is. State begins as zeros. With
weight_decay, g stands for grad + weight_decay * param, else for grad. The forms are PyTorch's.

They return None, and raise TypeError for what is not an array or not of a supported dtype, or where dtypes differ, and
ValueError where shapes differ or a number is out of its range.
"""

from contextvars import ContextVar
from math import isfinite
from typing import Any

import numpy as np

from tilewise.kernels.arrays import common_dtype, required
from tilewise.kernels.operation import Operation, Problem


def sgd_step(param, grad, velocity=None, *, lr, momentum=0.0, nesterov=False, weight_decay=0.0):
    """param -= lr * g; with momentum: velocity = momentum * velocity + g, param -= lr * velocity.

    nesterov: param -= lr * (g + momentum * velocity).

    Raises:
        TypeError, ValueError: besides the module's, a momentum without velocity, or nesterov without momentum.
    """
    numbers = _checked("sgd_step", lr=lr, momentum=momentum, weight_decay=weight_decay)
    if (velocity is None) != (momentum == 0):
        raise ValueError(f"sgd_step: a momentum needs velocity, and only a momentum, got momentum {momentum}")
    if nesterov and not momentum:
        raise ValueError("sgd_step: nesterov needs a momentum above 0")
    _SGD.update((param, grad, velocity), (bool(nesterov),), numbers)


def adagrad_step(param, grad, square, *, lr=1e-2, eps=1e-10, weight_decay=0.0):
    """AdaGrad (Duchi, Hazan, Singer 2011): square += g^2, param -= lr * g / (sqrt(square) + eps)."""
    numbers = _checked("adagrad_step", lr=lr, eps=eps, weight_decay=weight_decay)
    _ADAGRAD.update((param, grad, square), (), numbers)


def rmsprop_step(param, grad, square, velocity=None, *, lr=1e-2, alpha=0.99, eps=1e-8, momentum=0.0, weight_decay=0.0):
    """RMSProp (Hinton 2012): square = alpha * square + (1 - alpha) * g^2, param -= lr * g / (sqrt(square) + eps).

    With momentum: velocity = momentum * velocity + g / (sqrt(square) + eps), param -= lr * velocity.

    Raises:
        TypeError, ValueError: besides the module's, a momentum without velocity.
    """
    numbers = _checked("rmsprop_step", lr=lr, alpha=alpha, eps=eps, momentum=momentum, weight_decay=weight_decay)
    if (velocity is None) != (momentum == 0):
        raise ValueError(f"rmsprop_step: a momentum needs velocity, and only a momentum, got momentum {momentum}")
    _RMSPROP.update((param, grad, square, velocity), (), numbers)


def adam_step(
    param, grad, mean, square, *, step, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False
):
    """Adam (Kingma and Ba 2015), with the correction of the zero start in both means, at step 1, 2, ...:

        mean = b1 * mean + (1 - b1) * g, square = b2 * square + (1 - b2) * g^2
        param -= lr * mean / (1 - b1^step) / (sqrt(square / (1 - b2^step)) + eps)

    decoupled: AdamW (Loshchilov and Hutter 2019): g is grad, and param *= 1 - lr * weight_decay before.
    """
    first, second = betas
    numbers = _checked("adam_step", lr=lr, first=first, second=second, eps=eps, weight_decay=weight_decay)
    if not step >= 1:
        raise ValueError(f"adam_step: step counts from 1, got {step}")
    if max(first, second) >= 1:
        raise ValueError(f"adam_step: betas must be below 1, got {betas}")
    numbers["rate"] = numbers.pop("lr") / (1 - first**step)
    numbers["scale"] = 1 / (1 - second**step) ** 0.5
    numbers["kept"] = 1 - lr * weight_decay if decoupled else 1.0
    if decoupled:
        numbers["weight_decay"] = 0.0
    _ADAM.update((param, grad, mean, square), (), numbers)


def _checked(function: str, **numbers) -> dict[str, float]:
    for name, value in numbers.items():
        if isinstance(value, str) or not hasattr(value, "__float__"):
            raise TypeError(f"{function}: {name} must be a number, got {value!r}")
        if not (isfinite(value) and value >= 0):
            raise ValueError(f"{function}: {name} must be finite and at least 0, got {value!r}")
    return {name: float(value) for name, value in numbers.items()}


# The numbers of the update that runs in this context.
_numbers: ContextVar[dict[str, float]] = ContextVar("tilewise_update_numbers")


class Update(Operation):
    """An operation whose numbers change from call to call, such as a learning rate, and so belong to no plan."""

    replayable = False

    def update(self, arrays: tuple, options: tuple, numbers: dict[str, float]):
        for i in self.mutates:
            if isinstance(arrays[i], np.ndarray) and not arrays[i].flags.writeable:
                raise ValueError(f"{self.name}: {self.operands[i]} is read-only, but the update changes it in place")
        token = _numbers.set(numbers)
        try:
            self.call(arrays, options)
        finally:
            _numbers.reset(token)

    def _implementation(self, module, dtype, shapes: list, options: dict):
        function = getattr(module, self.name)

        def run(*arrays, out: Any = None):
            function(*arrays, **options, **_numbers.get())
            return ()  # no result

        return run


def _operation(name: str, operands: tuple[str, ...], optional: str = "", options: tuple[str, ...] = ()) -> Update:
    def check(*arguments) -> Problem:
        arrays = dict(zip(operands, arguments[: len(operands)], strict=True))
        required(name, **{operand: a for operand, a in arrays.items() if operand != optional})
        dtype = common_dtype(name, arrays)
        param, present = arrays["param"], {operand: a for operand, a in arrays.items() if a is not None}
        for operand, array in present.items():
            if array.shape != param.shape:
                raise ValueError(f"{name}: {operand} must have param's shape {param.shape}, got {array.shape}")
        moved = (2 * len(present) - 1) * param.size * dtype.itemsize  # all but the gradient are written, too
        chosen = dict(zip(options, arguments[len(operands) :], strict=True))
        return Problem(chosen, flops=4 * len(present) * param.size, bytes=moved)

    changed = tuple(i for i, operand in enumerate(operands) if operand != "grad")
    return Update("optim", name, operands, check, mutates=changed, elementwise=True)


_SGD = _operation("sgd_step", ("param", "grad", "velocity"), "velocity", ("nesterov",))
_ADAGRAD = _operation("adagrad_step", ("param", "grad", "square"))
_RMSPROP = _operation("rmsprop_step", ("param", "grad", "square", "velocity"), "velocity")
_ADAM = _operation("adam_step", ("param", "grad", "mean", "square"))
