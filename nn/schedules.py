"""Schedules of the learning rate: `schedule.step()` after each epoch sets the optimiser's lr for the next one.

A schedule may be given to `fit` as it is: `fit(..., after_epoch=StepLR(optimizer, 10))`.
"""

import math
from collections.abc import Mapping
from typing import Any

from ..kernels.shapes import integer, number
from .optim import Optimizer


class _State:
    """An optimiser, and the attributes named in `options` as state_dict."""

    options: tuple[str, ...] = ()

    def __init__(self, optimizer: Optimizer):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(self).__name__}: optimizer must be an Optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """All numbers of the schedule, without the optimiser's."""
        return {name: getattr(self, name) for name in self.options}

    def load_state_dict(self, state: Mapping[str, Any]):
        """Continue from what state_dict gave. The optimiser's own state holds its lr.

        Raises:
            ValueError: the state is of another kind of schedule.
        """
        if set(state) != set(self.options):
            raise ValueError(f"{type(self).__name__}: the state has {sorted(state)}, not {sorted(self.options)}")
        for name in self.options:
            setattr(self, name, state[name])

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)}' for name in self.options)})"


class Schedule(_State):
    """lr = rate(base_lr, t) after t steps, where base_lr was the optimiser's lr when the schedule was made.

    A subclass defines `rate`, and names its numbers in `options`. A change of optimizer.lr in between is overwritten.
    """

    options = ("base_lr", "last_epoch")

    def __init__(self, optimizer: Optimizer):
        super().__init__(optimizer)
        self.base_lr = optimizer.lr
        self.last_epoch = 0

    def rate(self, epoch: int) -> float:
        """The learning rate after this many steps."""
        raise NotImplementedError

    def step(self):
        """One epoch is over: the optimiser's lr for the next one."""
        self.last_epoch += 1
        self.optimizer.lr = self.rate(self.last_epoch)

    def __call__(self, history: object):
        """`fit`'s after_epoch: a step. Training goes on."""
        self.step()


class DecadeLR(Schedule):
    """lr = base_lr * 10**(-t / n): a tenth after every n epochs, in equal steps."""

    options = (*Schedule.options, "n")

    def __init__(self, optimizer: Optimizer, n: float):
        super().__init__(optimizer)
        self.n = number("DecadeLR", "n", n, positive=True)

    def rate(self, epoch: int) -> float:
        return self.base_lr * 10 ** (-epoch / self.n)


class ExponentialLR(Schedule):
    """lr = base_lr * gamma**t."""

    options = (*Schedule.options, "gamma")

    def __init__(self, optimizer: Optimizer, gamma: float):
        super().__init__(optimizer)
        self.gamma = number("ExponentialLR", "gamma", gamma)

    def rate(self, epoch: int) -> float:
        return self.base_lr * self.gamma**epoch


class StepLR(Schedule):
    """lr = base_lr * gamma**floor(t / step_size): one drop every step_size epochs."""

    options = (*Schedule.options, "step_size", "gamma")

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1):
        super().__init__(optimizer)
        self.step_size = integer("StepLR", "step_size", step_size)
        self.gamma = number("StepLR", "gamma", gamma)

    def rate(self, epoch: int) -> float:
        return self.base_lr * self.gamma ** (epoch // self.step_size)


class CosineAnnealingLR(Schedule):
    """lr = eta_min + (base_lr - eta_min) * (1 + cos(pi t / T_max)) / 2: eta_min after T_max epochs, then up again.

    Source: Loshchilov and Hutter 2017 (without restarts).
    """

    options = (*Schedule.options, "T_max", "eta_min")

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0):
        super().__init__(optimizer)
        self.T_max = integer("CosineAnnealingLR", "T_max", T_max)
        self.eta_min = number("CosineAnnealingLR", "eta_min", eta_min)

    def rate(self, epoch: int) -> float:
        return self.eta_min + (self.base_lr - self.eta_min) * (1 + math.cos(math.pi * epoch / self.T_max)) / 2


class ReduceLROnPlateau(_State):
    """lr *= factor when `step(metric)` saw no better metric than the best for more than `patience` epochs.

    Args:
        optimizer: whose lr is changed.
        mode: whether the "min" or the "max" of the metric is best.
        factor: below 1.
        patience: how many epochs without an improvement are let pass.
        threshold: how much better counts: as a share of |best| (PyTorch leaves the bars out, so that a metric below
            0 improves by standing still), or with threshold_mode "abs" as a difference.
        cooldown: how many epochs after a drop are not counted.
        min_lr: the least learning rate.
        eps: a drop of this size or less is not made.
    """

    options = (
        "mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps",
        "best", "num_bad_epochs", "cooldown_counter",
    )  # fmt: skip

    def __init__(
        self,
        optimizer: Optimizer,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
        eps: float = 1e-8,
    ):
        name = "ReduceLROnPlateau"
        if mode not in ("min", "max") or threshold_mode not in ("rel", "abs"):
            raise ValueError(
                f'{name}: mode must be "min" or "max" and threshold_mode "rel" or "abs", got {mode!r}, '
                f"{threshold_mode!r}"
            )
        super().__init__(optimizer)
        self.mode, self.threshold_mode = mode, threshold_mode
        self.factor = number(name, "factor", factor)
        if self.factor >= 1:
            raise ValueError(f"{name}: factor must be below 1, got {factor}")
        self.patience = integer(name, "patience", patience, minimum=0)
        self.cooldown = integer(name, "cooldown", cooldown, minimum=0)
        self.threshold = number(name, "threshold", threshold)
        self.min_lr, self.eps = number(name, "min_lr", min_lr), number(name, "eps", eps)
        self.best = math.inf if mode == "min" else -math.inf
        self.num_bad_epochs = self.cooldown_counter = 0

    def _better(self, metric: float) -> bool:
        sign = -1 if self.mode == "min" else 1
        margin = abs(self.best) * self.threshold if self.threshold_mode == "rel" else self.threshold
        if math.isinf(self.best):
            return sign * metric > sign * self.best
        return sign * (metric - self.best) > margin

    def step(self, metric: float):
        """One epoch is over, and this was measured after it. A NaN is no improvement."""
        metric = float(metric)
        if self._better(metric):
            self.best, self.num_bad_epochs = metric, 0
        else:
            self.num_bad_epochs += 1
        if self.cooldown_counter:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            lr = max(self.optimizer.lr * self.factor, self.min_lr)
            if self.optimizer.lr - lr > self.eps:
                self.optimizer.lr = lr
            self.cooldown_counter, self.num_bad_epochs = self.cooldown, 0

    def __call__(self, history: Any):
        """`fit`'s after_epoch: a step with the validation loss, or the training loss where there is none."""
        self.step((history.val_loss or history.loss)[-1])
