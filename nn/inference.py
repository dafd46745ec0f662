"""Networks in evaluation mode, as fewer and larger steps.

    conv - batch norm - activation              one convolution, batch norm folded into its prepared weights
    main branch, + shortcut, activation         the main branch's last convolution adds the shortcut in its own pass
    dense - activation                          one product

Dropout and Identity are left out; containers are opened, so that what meets across their borders is joined too. Modules
of other classes, with a forward of their own, and modules in training mode inside a network in evaluation mode are
called as they are.

A program holds modules, not numbers: parameters, statistics and options are read at each call, and `Conv2d.prepared`
compares what it was made of. Where a module was replaced or set to another mode, the network makes a new program. Both
look at attributes only where `changes` tells that one was set anywhere: reading those of a network of fifty
convolutions, which nothing else of a call needs, takes longer than one of the convolutions.
"""

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..kernels import linear
from .activation import Identity, LeakyReLU, ReLU, ReLU6, Sigmoid, Tanh
from .batchnorm import BatchNorm2d
from .conv import Conv2d
from .dropout import Dropout
from .linear import Linear
from .module import Module, changes

_ACTIVATIONS = {ReLU: "relu", ReLU6: "relu6", LeakyReLU: "leaky_relu", Sigmoid: "sigmoid", Tanh: "tanh"}
_SLOPE = 0.01  # of the kernels' leaky_relu


class Network(Module):
    """A module made of modules. In evaluation mode it runs a program, in training mode `_one_by_one`."""

    transient = ("_kept", "_program")
    _program: "Program | None" = None

    def forward(self, x: np.ndarray) -> np.ndarray:
        if self.training:
            return self._one_by_one(x)
        program = self._program  # once: another thread may be at it
        if program is None or not program.is_current():
            program = self._program = Program(self)
        try:
            return program(x)
        except (TypeError, ValueError) as error:
            refusal = error
        y = self._one_by_one(x)  # which tells the layer that refuses x, if one does
        warnings.warn(f"evaluation went layer by layer, which is slower: {refusal}", RuntimeWarning, stacklevel=2)
        return y

    def _one_by_one(self, x: np.ndarray) -> np.ndarray:
        """The definition: every module inside by its own forward."""
        raise NotImplementedError

    def _members(self) -> tuple[Module | None, ...]:
        """The modules that `_steps` speaks of."""
        raise NotImplementedError

    def _steps(self, opened: "Opened") -> list[Any]:
        """What evaluation consists of."""
        raise NotImplementedError

    def release(self):
        vars(self).pop("_program", None)
        for _, module in self.children():
            module.release()


class Program:
    """A network's steps, and what they were decided by."""

    def __init__(self, network: Network):
        opened, self.mark = Opened(), changes.latest
        self.steps = opened.sequence([network], root=network)
        # weakly: the network holds this program, and should go when its last user lets it go
        self.members = [(weakref.ref(module), module._members()) for module in opened.networks]
        self.states = [(weakref.ref(module), _state(module)) for module in opened.leaves]

    def is_current(self) -> bool:
        mark = changes.latest
        if self.mark is mark:
            return True
        for found, members in self.members:
            if (network := found()) is None or network._members() != members:
                return False
        if not all((module := found()) is not None and _state(module) == state for found, state in self.states):
            return False
        self.mark = mark
        return True

    def __call__(self, x: np.ndarray) -> np.ndarray:
        for step in self.steps:
            x = step(x)
        return x


def _state(module: Module) -> tuple:
    """The attributes that decide whether and how a module is joined with others; parameters are not among them."""
    own = vars(module)
    return module.training, "forward" in own, own.get("layout"), own.get("negative_slope")


class Opened:
    """Collects a program's steps, and the modules that they come from."""

    def __init__(self):
        self.networks: list[Network] = []
        self.leaves: list[Module] = []

    def sequence(self, modules: Iterable[Module], root: Module | None = None) -> list[Any]:
        """The steps of modules that follow one another; root is opened also where its class has its own forward."""
        steps: list[Any] = []
        for module in modules:
            self.leaves.append(module)
            if isinstance(module, Network) and (module is root or _is_plain(module, Network)):
                self.networks.append(module)
                found = module._steps(self)
            else:
                found = [_step(module)]
            for step in found:
                if not (_vanishes(step) or (steps and steps[-1].joined(step))):
                    steps.append(step)
        return steps

    def residual(
        self, network: Network, main: Iterable[Module], shortcut: Module | None, activation: Module | None
    ) -> list[Any]:
        """The steps of activation(main(x) + shortcut(x))."""
        other, last = ([] if module is None else self.sequence([module]) for module in (shortcut, activation))
        return [Sum(network, self.sequence(main), other), *last]


def _is_plain(module: Module, kind: type) -> bool:
    """Whether a module does what its class says: in evaluation mode, with the class's own forward."""
    if not isinstance(module, kind) or module.training or "forward" in vars(module):
        return False
    return type(module).forward is kind.forward  # pyright: ignore


def _step(module: Module) -> "Call":
    for kind, step in ((Conv2d, Convolution), (Linear, Dense)):
        if _is_plain(module, kind):
            return step(module)
    return Call(module)


def _vanishes(step: Any) -> bool:
    kind = type(step.module)
    return kind in (Dropout, Identity) and _is_plain(step.module, kind)


class Call:
    """A module by its own forward."""

    def __init__(self, module: Any):
        self.module = module

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.module(x)

    def joined(self, step: Any) -> bool:
        """Take the step that follows into this one, if that can be."""
        return False


class _Activated(Call):
    """A step whose kernel applies an activation."""

    activation: str | None = None

    def joined(self, step: Any) -> bool:
        if self.activation is not None:
            return False
        kind = type(step.module)
        name = _ACTIVATIONS.get(kind)
        if name is None or not _is_plain(step.module, kind) or getattr(step.module, "negative_slope", _SLOPE) != _SLOPE:
            return False
        self.activation = name
        return True


class Convolution(_Activated):
    """A convolution with the batch norm and the activation that follow it."""

    norm: BatchNorm2d | None = None

    def joined(self, step: Any) -> bool:
        norm = step.module
        if not _is_plain(norm, BatchNorm2d):
            return super().joined(step)
        if self.norm is not None or self.activation is not None or norm.layout != self.module.layout:
            return False
        self.norm = norm
        return True

    def __call__(self, x: np.ndarray, add: np.ndarray | None = None) -> np.ndarray:
        if self.norm is not None and x.ndim != 4:
            raise ValueError("a batch norm wants images with a batch axis")
        prepared = self.module.prepared(self.norm, self.activation)
        return prepared(self.module.padded(x), add=add)


class Dense(_Activated):
    """A dense layer with the activation that follows it."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        weight, bias = self.module.weight.data, self.module.bias
        return linear(x, weight, None if bias is None else bias.data, activation=self.activation)


class Sum(Call):
    """A residual block up to its activation, which its last convolution takes in."""

    def __init__(self, network: Network, main: list[Any], shortcut: list[Any]):
        super().__init__(weakref.proxy(network))
        self.main, self.shortcut, self.last = main, shortcut, None
        if main and isinstance(main[-1], Convolution) and main[-1].activation is None:
            self.main, self.last = main[:-1], main[-1]

    def joined(self, step: Any) -> bool:
        # a batch norm after the sum cannot be folded into one of its terms
        return self.last is not None and _Activated.joined(self.last, step)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y = x
        for step in self.main:
            y = step(y)
        for step in self.shortcut:
            x = step(x)
        if self.last is not None:
            return self.last(y, add=x)
        if y.shape != x.shape:
            raise ValueError(f"main gives shape {y.shape}, the shortcut {x.shape}")
        return y + x


class Join(Call):
    """Branches on the same x, joined along an axis."""

    def __init__(self, network: Network, branches: list[list[Any]]):
        super().__init__(weakref.proxy(network))
        self.branches = branches

    def __call__(self, x: np.ndarray) -> np.ndarray:
        results = []
        for steps in self.branches:
            y = x
            for step in steps:
                y = step(y)
            results.append(y)
        return np.concatenate(results, self.module.axis)
