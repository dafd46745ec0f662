"""Early stopping: training ends when the validation loss stops falling, and the best weights come back."""

import math
from collections.abc import Mapping
from typing import Any

from ..kernels.shapes import integer, number
from .history import History
from .module import Module


class EarlyStopping:
    """`fit(..., validation=..., early_stopping=EarlyStopping(patience=5))`.

    Training ends after `patience` epochs in a row without an improvement. Then, and also after the last epoch, the
    model gets the parameters and buffers of the best epoch.

    Args:
        patience: at least 1.
        min_delta: how much better than the best counts as an improvement, as a difference.
        monitor: a name of the history.
        mode: whether the "min" or the "max" is best; None: by the monitor's name, which ends in loss or accuracy.
        restore_best: whether the model gets the best epoch's weights.

    Attributes:
        best, best_epoch: the best value so far and its epoch, from 1 on; 0 where there is none.
        bad_epochs: how many epochs went by since.
        stopped: whether these are `patience` or more.

    Raises:
        TypeError, ValueError: a wrong patience, min_delta or mode.
    """

    def __init__(
        self,
        patience: int = 5,
        *,
        min_delta: float = 0.0,
        monitor: str = "val_loss",
        mode: str | None = None,
        restore_best: bool = True,
    ):
        self.patience = integer("EarlyStopping", "patience", patience)
        self.min_delta = number("EarlyStopping", "min_delta", min_delta)
        if mode is None:
            mode = {"loss": "min", "accuracy": "max"}.get(monitor.removeprefix("val_"), "")
        if mode not in ("min", "max"):
            raise ValueError(f'EarlyStopping: mode must be "min" or "max" for the monitor {monitor!r}, got {mode!r}')
        self.monitor, self.mode, self.restore_best = monitor, mode, restore_best
        self.reset()

    def reset(self):
        """Forget what was seen. `fit` begins with it."""
        self.best = math.inf if self.mode == "min" else -math.inf
        self.best_epoch = self.bad_epochs = 0
        self.best_state: dict[str, Any] = {}

    @property
    def stopped(self) -> bool:
        return self.bad_epochs >= self.patience

    def update(self, history: History, model: Module) -> bool:
        """An epoch is over. Returns `stopped`. A NaN is no improvement."""
        value = history[self.monitor][-1]
        gain = self.best - value if self.mode == "min" else value - self.best
        if gain > self.min_delta:
            self.best, self.best_epoch, self.bad_epochs = value, len(history), 0
            self.best_state = model.state_dict() if self.restore_best else {}
        else:
            self.bad_epochs += 1
        return self.stopped

    def restore(self, model: Module):
        """Give the model the weights of the best epoch, if there was one and they were kept."""
        if self.best_state:
            model.load_state_dict(self.best_state)

    def state_dict(self) -> dict[str, Any]:
        names = ("best", "best_epoch", "bad_epochs", "best_state")
        return {"monitor": self.monitor} | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]):
        """Continue from what state_dict gave. ValueError: it is of another monitor."""
        if state["monitor"] != self.monitor:
            raise ValueError(f"EarlyStopping: the state is of {state['monitor']}, not of {self.monitor}")
        for name in ("best", "best_epoch", "bad_epochs", "best_state"):
            setattr(self, name, state[name])

    def __repr__(self):
        return (
            f"EarlyStopping(patience={self.patience}, min_delta={self.min_delta}, monitor={self.monitor!r}, "
            f"mode={self.mode!r}, restore_best={self.restore_best})"
        )
