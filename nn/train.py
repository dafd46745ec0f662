"""The training loop: mini-batches, a progress bar, validation, a history."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..kernels.shapes import integer
from .init import Rng, generator
from .losses import Loss
from .module import Module
from .optim import Optimizer


class Evaluation(NamedTuple):
    """loss: the mean over the samples. accuracy: the share of samples classified rightly, None where not asked for."""

    loss: float
    accuracy: float | None


@dataclass
class History:
    """One entry for each epoch. loss and accuracy are means over the epoch's batches, made while the weights changed;
    val_loss and val_accuracy were measured after the epoch. Lists that were not asked for stay empty."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __len__(self):
        return len(self.loss)

    def plot(self, path: str | Path):
        """Write a picture of the curves (loss, and accuracy where there is one); the ending chooses PNG, SVG or PDF.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError as error:
            raise ImportError('History.plot needs matplotlib: pip install "tilewise[plot]"') from error
        panels = [("loss", self.loss, self.val_loss)]
        if self.accuracy or self.val_accuracy:
            panels.append(("accuracy", self.accuracy, self.val_accuracy))
        figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
        for axes, (name, training, validation) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            for label, values in (("training", training), ("validation", validation)):
                if values:
                    axes.plot(range(1, len(values) + 1), values, marker=".", label=label)
            axes.set(xlabel="epoch", ylabel=name)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(path, dpi=150)


def fit(
    model: Module,
    loss: Loss,
    optimizer: Optimizer,
    x: np.ndarray,
    y: np.ndarray,
    *,
    epochs: int,
    batch_size: int = 32,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    accuracy: bool | None = None,
    before_step: Callable[[], object] | None = None,
    after_epoch: Callable[[History], object] | None = None,
    rng: Rng = None,
    progress: bool = True,
) -> History:
    """Train by mini-batches: forward, loss, backward, one step of the optimiser, for every batch of every epoch.

    Args:
        model, loss, optimizer: the loss's reduction is "mean" or "sum".
        x: (N, ...), of the parameters' dtype.
        y: (N, ...), as the loss wants it.
        epochs: how many times every sample is seen.
        batch_size: samples for one step. The last batch of an epoch may be smaller; drop_last leaves it out.
        validation: (x, y) on which the model is measured after each epoch.
        shuffle: whether each epoch goes through the samples in a new order.
        accuracy: whether to record it; None: where the loss is one of classes.
        before_step: called when the batch's gradients are there and before they are used: clipping, an L1 penalty.
        after_epoch: called with the history after each epoch; training ends when it returns a true value (early
            stopping). It may change optimizer.lr (a schedule).
        rng: a numpy.random.Generator or a seed, for the order. With it, with seeded initial values and seeded dropout,
            the same call gives the same bits on one machine.
        progress: whether to show it on stderr: a bar where tqdm is installed, else a line for each epoch.

    Returns:
        The history. The model is left in the modes (training, evaluation) it was in.

    Raises:
        TypeError: x or y is not an array, or x has another dtype than the parameters.
        ValueError: x and y of different or no length; epochs or batch_size below 1; a loss without reduction.
    """
    integer("fit", "epochs", epochs)
    _check_data("fit", model, loss, x, y, batch_size)
    if validation is not None:
        _check_data("fit (validation)", model, loss, *validation, batch_size)
    accuracy = loss.classifies if accuracy is None else accuracy
    rng, history, parameters = generator(rng), History(), model.parameters()
    starts = range(0, len(x) - batch_size + 1 if drop_last else len(x), batch_size)
    if not starts:
        raise ValueError(f"fit: drop_last leaves no batch of {batch_size} out of {len(x)} samples")
    with _modes(model, True), _Progress(epochs, len(starts), progress) as shown:
        for _ in range(epochs):
            begin = time.perf_counter()
            order = rng.permutation(len(x)) if shuffle else np.arange(len(x))
            totals = np.zeros(3)  # losses, hits, samples
            for start in starts:
                chosen = order[start : start + batch_size]
                target = y[chosen]
                prediction = model(x[chosen])
                totals += _measure(loss, prediction, target, accuracy)
                for parameter in parameters:
                    parameter.grad = None
                model.backward_parameters(loss.backward())
                if before_step is not None:
                    before_step()
                optimizer.step()
                shown.batch(totals[0] / totals[2])
            _record(history, "", totals, accuracy)
            if validation is not None:
                _record(history, "val_", _totals(model, loss, *validation, batch_size, accuracy), accuracy)
            history.seconds.append(time.perf_counter() - begin)
            shown.epoch(history)
            if after_epoch is not None and after_epoch(history):
                break
    return history


def evaluate(
    model: Module, loss: Loss, x: np.ndarray, y: np.ndarray, *, batch_size: int = 256, accuracy: bool | None = None
) -> Evaluation:
    """The mean loss over the samples (x, y), and the accuracy, in evaluation mode. Arguments and errors as `fit`."""
    _check_data("evaluate", model, loss, x, y, batch_size)
    accuracy = loss.classifies if accuracy is None else accuracy
    losses, hits, samples = _totals(model, loss, x, y, batch_size, accuracy)
    return Evaluation(float(losses / samples), float(hits / samples) if accuracy else None)


def predict(model: Module, x: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
    """model(x) in evaluation mode, batch by batch. Raises TypeError and ValueError as `fit`."""
    _check_samples("predict", model, x, batch_size)
    with _modes(model, False):
        return np.concatenate([model(x[i : i + batch_size]) for i in range(0, len(x), batch_size)])


def _check_samples(function: str, model: Module, x, batch_size: int):
    integer(function, "batch_size", batch_size)
    if not isinstance(model, Module):
        raise TypeError(f"{function}: model must be a Module, got {type(model).__name__}")
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{function}: x must be a NumPy array, got {type(x).__name__}")
    if x.ndim == 0 or len(x) == 0:
        raise ValueError(f"{function}: x has no samples (shape {x.shape})")
    for name, parameter in model.named_parameters()[:1]:
        if x.dtype != parameter.dtype:
            raise TypeError(
                f"{function}: x is {x.dtype} but the model's {name} is {parameter.dtype}; use "
                f"x.astype(np.{parameter.dtype})"
            )


def _check_data(function: str, model: Module, loss: Loss, x, y, batch_size: int):
    if not isinstance(loss, Loss):
        raise TypeError(f"{function}: loss must be a Loss, such as CrossEntropyLoss(), got {type(loss).__name__}")
    _check_samples(function, model, x, batch_size)
    if not isinstance(y, np.ndarray):
        raise TypeError(f"{function}: y must be a NumPy array, got {type(y).__name__}")
    if y.ndim == 0 or len(x) != len(y):
        raise ValueError(f"{function}: x and y must have the same length, got shapes {x.shape} and {y.shape}")
    if loss.reduction == "none":
        raise ValueError(f'{function}: the loss must have reduction "mean" or "sum", got "none"')


@contextmanager
def _modes(model: Module, training: bool) -> Iterator[None]:
    """The whole model in one mode; afterwards each module is in its own again."""
    before = [(module, module.training) for _, module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _measure(loss: Loss, prediction: np.ndarray, y: np.ndarray, accuracy: bool) -> np.ndarray:
    """The batch's (sum of losses, hits, samples)."""
    value = loss(prediction, y)
    total = value * len(y) if loss.reduction == "mean" else value
    ignored = getattr(loss, "ignore_index", None)
    return np.array([total, _hits(prediction, y, ignored) if accuracy else 0, len(y)], np.float64)


def _hits(prediction: np.ndarray, y: np.ndarray, ignored: int | None) -> float:
    """How many samples have their largest prediction at the target; further axes (pixels) count as shares.

    Ignored targets are left out, and count as the share of the others does.
    """
    if prediction.ndim < 2 or prediction.shape[1] < 2:
        raise ValueError(f"accuracy needs predictions (N, classes, ...), got shape {prediction.shape}")
    classes = y.argmax(1) if y.shape == prediction.shape else y
    hits = prediction.argmax(1) == classes
    if ignored is not None and not (counted := classes != ignored).all():
        hits = hits[counted]
    return float(hits.mean() * len(y)) if hits.size else 0.0


def _totals(model: Module, loss: Loss, x: np.ndarray, y: np.ndarray, batch_size: int, accuracy: bool) -> np.ndarray:
    totals = np.zeros(3)
    with _modes(model, False):
        for i in range(0, len(x), batch_size):
            totals += _measure(loss, model(x[i : i + batch_size]), y[i : i + batch_size], accuracy)
    return totals


def _record(history: History, prefix: str, totals: np.ndarray, accuracy: bool):
    losses, hits, samples = totals
    getattr(history, f"{prefix}loss").append(float(losses / samples))
    if accuracy:
        getattr(history, f"{prefix}accuracy").append(float(hits / samples))


class _Progress:
    """A tqdm bar over all batches; a line for each epoch where tqdm is missing; nothing where not wanted."""

    def __init__(self, epochs: int, batches: int, wanted: bool):
        self.epochs, self.batches, self.wanted = epochs, batches, wanted
        self.bar = None

    def __enter__(self):
        if self.wanted:
            try:
                from tqdm import tqdm
            except ImportError:
                return self
            self.bar = tqdm(total=self.epochs * self.batches, unit="batch", desc=f"epoch 1/{self.epochs}")
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()
        return False

    def batch(self, loss: float):
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self.bar.update()

    def epoch(self, history: History):
        done = len(history)
        if self.bar is not None:
            self.bar.set_description(f"epoch {min(done + 1, self.epochs)}/{self.epochs}", refresh=False)
        elif self.wanted:
            names = ("loss", "accuracy", "val_loss", "val_accuracy")
            shown = [f"{name} {values[-1]:.4f}" for name in names if (values := getattr(history, name))]
            print(f"epoch {done}/{self.epochs}: {', '.join(shown)}, {history.seconds[-1]:.1f} s", file=sys.stderr)
