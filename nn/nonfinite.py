"""Where a NaN or an infinity came from. Looked for when there is one, by computing the batch once more."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from .hooks import observed
from .losses import Loss
from .module import Module, Parameter, described


class NonFiniteError(FloatingPointError):
    """Training came to a loss, or to a gradient, of NaN or infinity; nothing of it went into the weights.

    layer: the dotted name of the first layer whose output (or gradient) was not finite; None where no layer made it.
    """

    layer: str | None = None


def finite(*values: Any) -> bool:
    """Whether all numbers in these arrays, or tuples of arrays, are; None counts as finite."""
    return all(
        finite(*value) if isinstance(value, tuple) else value is None or bool(np.isfinite(value).all())
        for value in values
    )


def nonfinite_loss(model: Module, loss: Loss, x: np.ndarray, y: np.ndarray) -> tuple[str, str | None]:
    """(what made the loss of this batch not finite, the layer's name), by one more forward in training mode."""
    if not finite(x):
        return "x holds a number that is not finite", None
    if not finite(y):
        return "y holds a number that is not finite", None
    found = []

    def look(module: Module, arguments: tuple, result: Any):
        if not found and not finite(result):
            found.append((module, arguments))

    with observed(_once(model), ("forward",), look), np.errstate(all="ignore"):
        model(x)
    if not found:
        return f"every layer's output is finite, so it was made by {type(loss).__name__} itself", None
    module, arguments = found[0]
    name, text = _place(model, module)
    called = f"called with x {described(arguments[0])}" if arguments else "called without an x"
    text = f"the first output that is not finite is that of {text}, {called}"
    spoilt = [key for key, array in module.own_state().items() if not finite(array)]
    return text + (f", whose {' and '.join(spoilt)} held such a number before" if spoilt else ""), name


def nonfinite_gradient(model: Module, loss: Loss, x: np.ndarray, y: np.ndarray) -> tuple[str, str | None]:
    """As nonfinite_loss, of a gradient whose loss is finite: by one more forward and backward."""
    found = []

    def look(module: Module, arguments: tuple, result: Any):
        if not found and not finite(result, *(p.grad for p in vars(module).values() if isinstance(p, Parameter))):
            found.append(module)

    model.zero_grad()
    with np.errstate(all="ignore"):
        loss(model(x), y)
        grad = loss.backward()
        if not finite(grad):
            return f"it was made by {type(loss).__name__} itself", None
        with observed(_once(model), ("backward", "backward_parameters"), look):
            model.backward_parameters(grad)
    if not found:
        return "every layer's gradient is finite, so before_step made it", None
    name, text = _place(model, found[0])
    return f"on the way back the first that is not finite is that of {text}", name


def _once(model: Module) -> Iterable[Module]:
    return {id(module): module for _, module in model.modules()}.values()


def _place(model: Module, module: Module) -> tuple[str, str]:
    """(dotted name, the name in words) of a module of the model."""
    name = next(name for name, other in model.modules() if other is module)
    return name, f"layer {name} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
