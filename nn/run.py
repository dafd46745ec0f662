"""One training: the loop over epochs and batches, and its whole state for checkpoints."""

import math
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from .augment import Augmentation
from .checkpoint import Checkpoint, counters, set_counters
from .data import Samples, split_indices
from .history import History
from .losses import Loss
from .metrics import Measures
from .module import Module
from .nonfinite import NonFiniteError, finite, nonfinite_gradient, nonfinite_loss
from .optim import Optimizer
from .progress import Progress
from .stopping import EarlyStopping


@contextmanager
def modes(model: Module, training: bool) -> Iterator[None]:
    """The whole model in one mode; afterwards each module is in its own again, without what evaluation prepared."""
    before = [(module, module.training) for _, module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
            if mode:
                module.release()


def measured(model: Module, measures: Measures, x: np.ndarray, y: np.ndarray, batch_size: int) -> dict[str, float]:
    """The measures over the samples, in evaluation mode."""
    totals = measures.nothing()
    with modes(model, False):
        for i in range(0, len(x), batch_size):
            prediction, target = model(x[i : i + batch_size]), y[i : i + batch_size]
            totals += measures.totals(float(measures.loss(prediction, target)), prediction, target)
    return measures.means(totals)


class _CtrlC:
    """Inside, Ctrl-C waits for the end of a step, so that none is half made. It reaches the main thread only."""

    before: Any = None  # the handler
    ours = stepping = pressed = False

    def __enter__(self):
        self.before = signal.getsignal(signal.SIGINT)
        self.ours = callable(self.before) and threading.current_thread() is threading.main_thread()
        if self.ours:
            signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *error):
        if self.ours:
            signal.signal(signal.SIGINT, self.before)
        return False

    def _press(self, number: int, frame: Any):
        self.pressed = self.stepping
        if not self.stepping:
            self.before(number, frame)

    def step(self, optimizer: Optimizer):
        self.stepping = True
        try:
            optimizer.step()
        finally:
            self.stepping = False
        if self.pressed:
            self.pressed = False
            self.before(signal.SIGINT, None)


class _Traces:
    """What a forward in training mode leaves behind besides its result, so that it can be undone: buffers, counts."""

    def __init__(self, model: Module):
        modules = [module for _, module in model.modules()]
        self.buffers = [(module, name) for module in modules for name in module.buffers]
        self.counters = [(module, name) for module in modules for name in module.counters]
        self.keep()

    def keep(self):
        self.arrays = [getattr(module, name).copy() for module, name in self.buffers]
        self.counts = [getattr(module, name) for module, name in self.counters]

    def undo(self):
        for (module, name), array in zip(self.buffers, self.arrays, strict=True):
            getattr(module, name)[...] = array
        for (module, name), count in zip(self.counters, self.counts, strict=True):
            setattr(module, name, count)


@dataclass(eq=False)
class Run:
    """What `fit` was called with, and how far it is."""

    model: Module
    loss: Loss
    optimizer: Optimizer
    x: np.ndarray
    y: np.ndarray
    measures: Measures
    validation: Samples | float | None
    batch_size: int
    shuffle: bool
    drop_last: bool
    augment: Augmentation | None
    before_step: Callable[[], object] | None
    after_epoch: tuple[Any, ...]  # callables; some have a state
    early_stopping: EarlyStopping | None
    rng: np.random.Generator
    history: History = field(default_factory=History)
    ended: bool = False  # by after_epoch

    def __post_init__(self):
        self.began = self.rng.bit_generator.state
        self.held_out = np.zeros(len(self.x), bool)
        if isinstance(self.validation, float):
            shares = (1 - self.validation, self.validation)
            self.held_out[split_indices("fit (validation)", len(self.x), shares, self.rng)[1]] = True
        if not self.batches:
            raise ValueError(f"fit: drop_last leaves no batch of {self.batch_size} out of {self.samples} samples")
        self.traces, self.ctrl_c, self.parameters = _Traces(self.model), _CtrlC(), self.model.parameters()

    @property
    def samples(self) -> int:
        """That are trained on."""
        return len(self.x) - int(np.count_nonzero(self.held_out))

    @property
    def batches(self) -> int:
        return self.samples // self.batch_size if self.drop_last else -(-self.samples // self.batch_size)

    @property
    def stopped(self) -> bool:
        return self.ended or (self.early_stopping is not None and self.early_stopping.stopped)

    # ---- the loop

    def train(self, epochs: int, checkpoint: Checkpoint | None, progress: bool):
        self._begin(checkpoint, epochs)
        shown = Progress(epochs, self.batches, progress, len(self.history))
        with modes(self.model, True), self.ctrl_c, shown:
            while len(self.history) < epochs and not self.stopped:
                self._epoch(shown)
                last = self.stopped or len(self.history) == epochs
                if checkpoint is not None and (last or len(self.history) % checkpoint.every == 0):
                    checkpoint.save(self.state_dict())
        if self.early_stopping is not None:
            self.early_stopping.restore(self.model)

    def _begin(self, checkpoint: Checkpoint | None, epochs: int):
        """Forget what early stopping saw in another training, unless this one cannot begin."""
        stopping = self.early_stopping
        seen = None if stopping is None else stopping.state_dict()
        try:
            if stopping is not None:
                stopping.reset()
            if checkpoint is not None:
                self._go_on(checkpoint, epochs)
        except BaseException:  # Ctrl-C too
            if stopping is not None and seen is not None:
                stopping.load_state_dict(seen)
            raise

    def _epoch(self, shown: Progress):
        begin = time.perf_counter()
        rows = np.flatnonzero(~self.held_out)
        order = rows[self.rng.permutation(len(rows))] if self.shuffle else rows
        totals = self.measures.nothing()
        for i in range(self.batches):
            totals += self._batch(order[i * self.batch_size : (i + 1) * self.batch_size], i)
            shown.batch(totals[0, 0] / totals[1, 0])
        self.history.add(self.measures.means(totals))
        if self.validation is not None:
            self.history.add(measured(self.model, self.measures, *self._validation(), self.batch_size), "val_")
        self.history.add({"seconds": time.perf_counter() - begin})
        if self.early_stopping is not None:
            self.early_stopping.update(self.history, self.model)
        shown.epoch(self.history)
        for call in self.after_epoch:
            if call(self.history):
                self.ended = True

    def _validation(self) -> Samples:
        if isinstance(self.validation, tuple):
            return self.validation
        return self.x[self.held_out], self.y[self.held_out]

    def _batch(self, chosen: np.ndarray, number: int) -> np.ndarray:
        """One step; returns the totals. Until the weights change, whatever happens leaves all as it was."""
        x, y = self.x[chosen], self.y[chosen]
        if self.augment is not None:
            x = self._augmented(x)
        self.traces.keep()
        try:
            totals = self._gradients(x, y, number)
        except BaseException:  # Ctrl-C too
            self.traces.undo()
            raise
        self.ctrl_c.step(self.optimizer)
        return totals

    def _gradients(self, x: np.ndarray, y: np.ndarray, number: int) -> np.ndarray:
        prediction = self.model(x)
        if not len(self.history) and not number:  # now it is known how many classes there are
            shape = self.loss._main(prediction).shape
            for targets in (self.y, *(self.validation[1:] if isinstance(self.validation, tuple) else ())):
                self.loss.check_targets(shape, targets)
        value = float(self.loss(prediction, y))
        if not math.isfinite(value):
            raise self._nonfinite(f"the loss is {value}", nonfinite_loss, x, y, number)
        totals = self.measures.totals(value, prediction, y)
        for parameter in self.parameters:
            parameter.grad = None
        self.model.backward_parameters(self.loss.backward())
        if self.before_step is not None:
            self.before_step()
        if not finite(*(parameter.grad for parameter in self.optimizer.parameters)):
            raise self._nonfinite("a gradient is not finite", nonfinite_gradient, x, y, number)
        self.optimizer.check()
        return totals

    def _nonfinite(self, what: str, cause: Callable, x: np.ndarray, y: np.ndarray, number: int) -> NonFiniteError:
        self.traces.undo()  # so that dropout makes the same choice
        why, layer = cause(self.model, self.loss, x, y)
        error = NonFiniteError(
            f"fit: {what} in epoch {len(self.history) + 1}, batch {number + 1}: {why}; the weights are those before "
            f"this step"
        )
        error.layer = layer
        return error

    def _augmented(self, x: np.ndarray) -> np.ndarray:
        assert self.augment is not None
        changed = self.augment(x, self.rng)
        kind = (x.shape, x.dtype)
        if not isinstance(changed, np.ndarray) or (changed.shape, changed.dtype) != kind:
            got = f"{changed.dtype} {changed.shape}" if isinstance(changed, np.ndarray) else type(changed).__name__
            raise ValueError(f"fit: augment must give an array of x's {x.dtype} {x.shape}, got {got}")
        return changed

    # ---- checkpoints

    def _go_on(self, checkpoint: Checkpoint, epochs: int):
        """From the file, where there is one; else write it, so that a wrong path is found before the work is done."""
        if not checkpoint.path.exists():
            checkpoint.save(self.state_dict())
            return
        before = self.state_dict()
        try:
            state = checkpoint.load()
            _check_settings(state["settings"], self.settings())
            self.load_state_dict(state)
            if len(self.history) > epochs:
                raise ValueError(f"it is of {len(self.history)} epochs, more than the {epochs} asked for")
        except Exception as error:
            self.load_state_dict(before)
            self.rng.bit_generator.state = self.began
            message = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"fit: cannot go on from {str(checkpoint.path)!r}: {message}") from error

    def settings(self) -> dict[str, Any]:
        """What must be the same in a training that goes on, in the words that an error says it with."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        described: dict[str, Any] = {
            "loss": self.loss._kind(),
            "optimizer": type(self.optimizer).__name__,
            **self._data,
            "augment": None if self.augment is None else _kind(self.augment),
            "before_step": None if self.before_step is None else _identity(self.before_step),
            "early_stopping": None if self.early_stopping is None else self.early_stopping.monitor,
            "metrics": ", ".join(self.measures.names),
            "rng": type(self.rng.bit_generator).__name__,
        }
        described |= {name: getattr(self, name) for name in ("batch_size", "shuffle", "drop_last")}
        described |= {f"loss's {name}": _option(self.loss, name) for name in _LOSS_OPTIONS if hasattr(self.loss, name)}
        described |= {f"after_epoch {i}": _kind(call) for i, call in enumerate(self.after_epoch)}
        for name, module in self.model.modules():
            described[f"layer {name}"] = type(module).__name__
            described |= {f"{name}.{key}".lstrip("."): _described(a) for key, a in module.own_state().items()}
        trained = enumerate(self.optimizer.parameters)
        return described | {f"optimizer's parameter {i}": names.get(id(p), str(p.shape)) for i, p in trained}

    @cached_property  # because it reads all of it
    def _data(self) -> dict[str, Any]:
        validation = self.validation
        if isinstance(validation, tuple):
            validation = " and ".join(map(_content, validation))
        return {"x": _content(self.x), "y": _content(self.y), "validation": validation}

    def state_dict(self) -> dict[str, Any]:
        return {
            "settings": self.settings(),
            "model": self.model.state_dict(),
            "requires_grad": {name: p.requires_grad for name, p in self.model.named_parameters()},
            "counters": counters(self.model),
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.bit_generator.state,
            "held_out": self.held_out,
            "history": self.history.as_dict(),
            "early_stopping": None if self.early_stopping is None else self.early_stopping.state_dict(),
            "after_epoch": [call.state_dict() if _has_state(call) else None for call in self.after_epoch],
            "ended": self.ended,
        }

    def load_state_dict(self, state: Mapping[str, Any]):
        self.model.load_state_dict(state["model"])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = state["requires_grad"][name]
        set_counters(self.model, state["counters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.bit_generator.state = state["rng"]
        self.held_out = state["held_out"]
        self.history.replace(state["history"])
        if self.early_stopping is not None:
            self.early_stopping.load_state_dict(state["early_stopping"])
        for call, saved in zip(self.after_epoch, state["after_epoch"], strict=True):
            if _has_state(call):
                call.load_state_dict(saved)
        self.ended = state["ended"]


def _check_settings(saved: Mapping[str, Any], own: Mapping[str, Any]):
    wrong = [
        f"{name} is {saved.get(name, 'missing')} there and {own.get(name, 'missing')} here"
        for name in dict.fromkeys((*own, *saved))
        if saved.get(name, "missing") != own.get(name, "missing")
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more differences" if len(wrong) > 5 else ""
        raise ValueError(f"{'; '.join(wrong[:5])}{more}")


def _described(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"


def _content(array: np.ndarray) -> str:
    crc = 0
    for i in range(0, len(array), 1024):  # so that no whole array is copied to be contiguous
        crc = zlib.crc32(np.ascontiguousarray(array[i : i + 1024]).data, crc)
    return f"{_described(array)} of crc32 {crc:08x}"


# What changes a loss's value, of the losses here and of others with the same names.
_LOSS_OPTIONS = ("reduction", "weight", "ignore_index", "label_smoothing", "pos_weight")


def _option(loss: Loss, name: str) -> str:
    value = getattr(loss, name)
    return _content(np.atleast_1d(value)) if isinstance(value, np.ndarray) else str(value)


def _identity(call: Any) -> str:
    named = call if hasattr(call, "__qualname__") else type(call)
    return f"{named.__module__}.{named.__qualname__}"


def _kind(call: Any) -> str:
    return getattr(call, "__name__", type(call).__name__)


def _has_state(call: Any) -> bool:
    return hasattr(call, "state_dict") and hasattr(call, "load_state_dict")
