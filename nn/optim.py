"""Optimisers in PyTorch's forms. The updates are made in place, in the parameters' own dtype."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..kernels import adagrad_step, adam_step, rmsprop_step, sgd_step
from .module import Parameter


class Optimizer:
    """Changes parameters by their gradients: `zero_grad()`, backward, `step()`.

    A parameter without a gradient is left alone. `lr` may be changed between steps. A subclass defines `update`.
    """

    options: tuple[str, ...] = ("lr",)  # the attributes that state_dict holds besides the state

    def __init__(self, parameters: Iterable[Parameter], lr: float):
        name = type(self).__name__
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError(f"{name}: there are no parameters to optimise")
        for parameter in self.parameters:
            if not isinstance(parameter, Parameter):
                raise TypeError(f"{name}: parameters must be of class Parameter, got {type(parameter).__name__}")
        if len({id(p) for p in self.parameters}) < len(self.parameters):
            raise ValueError(f"{name}: a parameter appears twice")
        self.lr = self.checked("lr", lr)
        self.state: list[dict[str, Any]] = [{} for _ in self.parameters]

    def checked(self, name: str, value: float, below: float = float("inf")) -> float:
        if not 0 <= value < below:
            limit = "" if below == float("inf") else f" and below {below:g}"
            raise ValueError(f"{type(self).__name__}: {name} must be at least 0{limit}, got {value}")
        return value

    def zero_grad(self):
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def check(self):
        """Whether `step` can be made: a learning rate that is a number, parameters that can be written to.

        Raises:
            ValueError: it cannot. Nothing is changed, so that no step is half made.
        """
        self.checked("lr", self.lr)
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is not None and not parameter.data.flags.writeable:
                raise ValueError(f"{type(self).__name__}: parameter {i} {parameter.shape} is read-only")

    def step(self):
        """One update of every parameter that has a gradient. Raises as `check`, before the first one."""
        self.check()
        for parameter, state in zip(self.parameters, self.state, strict=True):
            if parameter.grad is not None:
                try:
                    self.update(parameter.data, parameter.grad, state)
                finally:  # not before: who reads the numbers meanwhile would take them for the new ones
                    parameter.version += 1

    def update(self, data: np.ndarray, grad: np.ndarray, state: dict[str, Any]):
        """Change `data` in place. `grad` must stay as it is; `state` is this parameter's own, empty at first."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """A copy of the options and of what was collected for each parameter, in the parameters' order."""
        state = [{k: v.copy() if isinstance(v, np.ndarray) else v for k, v in s.items()} for s in self.state]
        return {"options": {name: getattr(self, name) for name in self.options}, "state": state}

    def load_state_dict(self, state: Mapping[str, Any]):
        """Continue from what state_dict gave.

        Raises:
            ValueError: it is of another number of parameters, of other shapes, or of another kind of optimiser.
            TypeError: it is of another dtype.
        """
        name = type(self).__name__
        if set(state["options"]) != set(self.options):
            raise ValueError(f"{name}: the state has options {sorted(state['options'])}, not {sorted(self.options)}")
        if len(state["state"]) != len(self.parameters):
            raise ValueError(f"{name}: the state is of {len(state['state'])} parameters, not {len(self.parameters)}")
        for i, (values, parameter) in enumerate(zip(state["state"], self.parameters, strict=True)):
            for key, value in values.items():
                if not isinstance(value, np.ndarray):
                    continue
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"{name}: {key} of parameter {i} has shape {value.shape}, expected {parameter.shape}"
                    )
                if value.dtype != parameter.dtype:
                    raise TypeError(f"{name}: {key} of parameter {i} is {value.dtype}, expected {parameter.dtype}")
        for option, value in state["options"].items():
            setattr(self, option, value)
        self.state = [{k: v.copy() if isinstance(v, np.ndarray) else v for k, v in s.items()} for s in state["state"]]

    def __repr__(self):
        options = ", ".join(f"{name}={getattr(self, name)}" for name in self.options)
        return f"{type(self).__name__}({len(self.parameters)} parameters, {options})"


class SGD(Optimizer):
    """Stochastic gradient descent: v = momentum * v + g, data -= lr * v; g = grad + weight_decay * data.

    With nesterov, data -= lr * (g + momentum * v). Under a constant gradient g the step approaches
    lr * g / (1 - momentum), ten times plain descent's for a momentum of 0.9.
    """

    options = ("lr", "momentum", "nesterov", "weight_decay")

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 1e-3,
        momentum: float = 0.0,
        *,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ):
        super().__init__(parameters, lr)
        self.momentum = self.checked("momentum", momentum)
        self.weight_decay = self.checked("weight_decay", weight_decay)
        self.nesterov = nesterov
        if nesterov and momentum == 0:
            raise ValueError("SGD: nesterov needs a momentum above 0")

    def update(self, data, grad, state):
        if self.momentum and "velocity" not in state:
            state["velocity"] = np.zeros_like(data)
        sgd_step(
            data, grad, state["velocity"] if self.momentum else None, lr=self.lr, momentum=self.momentum,
            nesterov=self.nesterov, weight_decay=self.weight_decay,
        )  # fmt: skip


class Adagrad(Optimizer):
    """AdaGrad (Duchi, Hazan, Singer 2011): s = s + g**2, data -= lr * g / (sqrt(s) + eps).

    g = grad + weight_decay * data.
    """

    options = ("lr", "eps", "weight_decay")

    def __init__(
        self, parameters: Iterable[Parameter], lr: float = 1e-2, *, eps: float = 1e-10, weight_decay: float = 0.0
    ):
        super().__init__(parameters, lr)
        self.eps = self.checked("eps", eps)
        self.weight_decay = self.checked("weight_decay", weight_decay)

    def update(self, data, grad, state):
        if not state:
            state["square"] = np.zeros_like(data)
        adagrad_step(data, grad, state["square"], lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)


class RMSprop(Optimizer):
    """RMSProp (Hinton 2012): s = alpha * s + (1 - alpha) * g**2, data -= lr * g / (sqrt(s) + eps).

    With a momentum, v = momentum * v + g / (sqrt(s) + eps), data -= lr * v; g = grad + weight_decay * data.
    """

    options = ("lr", "alpha", "eps", "weight_decay", "momentum")

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
    ):
        super().__init__(parameters, lr)
        self.alpha = self.checked("alpha", alpha)
        self.eps = self.checked("eps", eps)
        self.weight_decay = self.checked("weight_decay", weight_decay)
        self.momentum = self.checked("momentum", momentum)

    def update(self, data, grad, state):
        if not state:
            state["square"] = np.zeros_like(data)
        if self.momentum and "velocity" not in state:
            state["velocity"] = np.zeros_like(data)
        rmsprop_step(
            data, grad, state["square"], state["velocity"] if self.momentum else None, lr=self.lr, alpha=self.alpha,
            eps=self.eps, momentum=self.momentum, weight_decay=self.weight_decay,
        )  # fmt: skip


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015), with the correction of the zero start in both means:

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g**2, data -= lr * m / (1 - b1**t) / (sqrt(v / (1 - b2**t)) + eps);
    g = grad + weight_decay * data.
    """

    options = ("lr", "betas", "eps", "weight_decay")
    decoupled = False  # whether weight_decay shrinks the weights by itself, as AdamW's does

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(parameters, lr)
        if len(betas) != 2:
            raise ValueError(f"{type(self).__name__}: betas must be a pair, got {betas!r}")
        self.betas = (self.checked("betas[0]", betas[0], 1), self.checked("betas[1]", betas[1], 1))
        self.eps = self.checked("eps", eps)
        self.weight_decay = self.checked("weight_decay", weight_decay)

    def update(self, data, grad, state):
        if not state:
            state.update(step=0, mean=np.zeros_like(data), square=np.zeros_like(data))
        step = state["step"] + 1
        adam_step(
            data, grad, state["mean"], state["square"], step=step, lr=self.lr, betas=self.betas, eps=self.eps,
            weight_decay=self.weight_decay, decoupled=self.decoupled,
        )  # fmt: skip
        state["step"] = step  # only now: an update that is refused does not count


class AdamW(Adam):
    """Adam with g = grad, and data *= 1 - lr * weight_decay before each step (Loshchilov and Hutter 2019)."""

    options = (*Adam.options, "decoupled")  # so that Adam's state is refused
    decoupled = True

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(parameters, lr, betas, eps, weight_decay)
