"""Networks of modules: one after the other, around a shortcut, side by side."""

from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any

import numpy as np

from .inference import Join, Network, Opened
from .module import Module, changes


def learns(module: Module) -> bool:
    """Whether a parameter inside is not frozen."""
    return any(parameter.requires_grad for parameter in module.parameters())


class Container(Network):
    """Modules by name: "0", "1", ..., or a dict's keys, which are attributes too (`network.fc`, `network.fc = ...`)."""

    _modules: dict[str, Module]

    def __init__(self, *modules: Module | Mapping[str, Module]):
        if len(modules) == 1 and isinstance(modules[0], Mapping):
            named = dict(modules[0])
        else:
            named = {str(i): module for i, module in enumerate(modules)}
        for name, module in named.items():
            self._check(name, module)
            if hasattr(type(self), name) or name in ("", "_modules") or "." in name:
                raise ValueError(f"{type(self).__name__}: a module cannot have the name {name!r}")
        object.__setattr__(self, "_modules", named)

    def _check(self, name: str, module):
        if not isinstance(module, Module):
            raise TypeError(f"{type(self).__name__}: {name!r} must be a Module, got {type(module).__name__}")

    def children(self) -> Iterator[tuple[str, Module]]:
        return iter(self._modules.items())

    def _members(self) -> tuple[Module, ...]:
        return tuple(self._modules.values())

    def __len__(self):
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._modules.values())

    def __getitem__(self, index: int | slice) -> Any:
        """A module by position, or the same kind of container of a slice, whose modules keep their names."""
        items = list(self._modules.items())
        if not isinstance(index, slice):
            return items[index][1]
        part = copy(self)
        part._modules = dict(items[index])
        return part

    def __setitem__(self, index: int, module: Module):
        """Another module at a position, under the same name."""
        setattr(self, list(self._modules)[index], module)

    def __getattr__(self, name: str) -> Any:
        modules = vars(self).get("_modules", {})
        if name in modules:
            return modules[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any):
        if name in vars(self).get("_modules", {}):
            self._check(name, value)
            self._modules[name] = value
            changes.note()
        else:
            super().__setattr__(name, value)


class Sequential(Container):
    """Modules one after the other: Sequential(a, b) is b(a(x)). Names are "0", "1", ..., or a dict's keys."""

    def _one_by_one(self, x: np.ndarray) -> np.ndarray:
        for module in self:
            x = module(x)
        return x

    def _steps(self, opened: Opened) -> list[Any]:
        return opened.sequence(self)

    def backward(self, grad: np.ndarray) -> np.ndarray:
        for module in reversed(self._modules.values()):
            grad = module.backward(grad)
        return grad

    def backward_parameters(self, grad: np.ndarray):
        """Goes back no further than to the first layer that learns: layers frozen before it cost nothing."""
        layers = list(self)
        learning = [i for i, layer in enumerate(layers) if learns(layer)]
        if not learning:
            return
        for layer in reversed(layers[learning[0] + 1 :]):
            grad = layer.backward(grad)
        layers[learning[0]].backward_parameters(grad)


class Residual(Network):
    """y = activation(main(x) + shortcut(x)) (He et al. 2016).

    The sum is a new array: the main branch's last layer may have kept its result for backward.

    Args:
        main: the branch that learns the difference.
        shortcut: the other branch; None: x itself.
        activation: after the sum; None: nothing.
    """

    def __init__(self, main: Module, shortcut: Module | None = None, activation: Module | None = None):
        for name, module in (("main", main), ("shortcut", shortcut), ("activation", activation)):
            if not isinstance(module, Module) and (name == "main" or module is not None):
                raise TypeError(f"{type(self).__name__}: {name} must be a Module, got {type(module).__name__}")
        self.main = main
        self.shortcut = shortcut
        self.activation = activation

    def _members(self) -> tuple[Module | None, ...]:
        return self.main, self.shortcut, self.activation

    def _one_by_one(self, x: np.ndarray) -> np.ndarray:
        y = self.main(x)
        other = x if self.shortcut is None else self.shortcut(x)
        if y.shape != other.shape:
            raise ValueError(f"{type(self).__name__}: main gives shape {y.shape}, the shortcut {other.shape}")
        y = y + other
        return y if self.activation is None else self.activation(y)

    def _steps(self, opened: Opened) -> list[Any]:
        return opened.residual(self, [self.main], self.shortcut, self.activation)

    def _before_sum(self, grad: np.ndarray) -> np.ndarray:
        return grad if self.activation is None else self.activation.backward(grad)

    def backward(self, grad: np.ndarray) -> np.ndarray:
        grad = self._before_sum(grad)
        return self.main.backward(grad) + (grad if self.shortcut is None else self.shortcut.backward(grad))

    def backward_parameters(self, grad: np.ndarray):
        """Goes through no branch that is frozen."""
        grad = self._before_sum(grad)
        for branch in (self.main, self.shortcut):
            if branch is not None and learns(branch):
                branch.backward_parameters(grad)


class Concat(Container):
    """The results of several branches on the same x, joined along an axis: GoogLeNet's inception block.

    Args:
        modules: the branches, or a dict of them.
        axis: 1, the channels of (N, C, H, W); -1 for NHWC.
    """

    def __init__(self, *modules: Module | Mapping[str, Module], axis: int = 1):
        super().__init__(*modules)
        if not len(self):
            raise ValueError("Concat: there must be at least one branch")
        self.axis = axis

    def _one_by_one(self, x: np.ndarray) -> np.ndarray:
        results = [branch(x) for branch in self]
        if len({tuple(np.delete(result.shape, self.axis)) for result in results}) > 1:
            shapes = ", ".join(f"{name} {y.shape}" for (name, _), y in zip(self.children(), results, strict=True))
            raise ValueError(f"Concat: the branches' shapes must agree but for axis {self.axis}, got {shapes}")
        self.keep([result.shape[self.axis] for result in results])
        return np.concatenate(results, self.axis)

    def _steps(self, opened: Opened) -> list[Any]:
        return [Join(self, [opened.sequence([branch]) for branch in self])]

    def _parts(self, grad: np.ndarray) -> list[tuple[Module, np.ndarray]]:
        (sizes,) = self.kept()
        return list(zip(self, np.split(grad, np.cumsum(sizes)[:-1], self.axis), strict=True))

    def backward(self, grad: np.ndarray) -> np.ndarray:
        (first, part), *others = self._parts(grad)
        total = first.backward(part)
        for branch, part in others:
            total = total + branch.backward(part)
        return total

    def backward_parameters(self, grad: np.ndarray):
        """Goes through no branch that is frozen."""
        for branch, part in self._parts(grad):
            if learns(branch):
                branch.backward_parameters(part)

    def describe(self) -> str:
        return f"axis={self.axis}"
