"""What is measured of predictions besides the loss."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..kernels.shapes import integer
from .losses import Loss

Metric = Callable[[np.ndarray, np.ndarray], float]


def accuracy(prediction: np.ndarray, y: np.ndarray, ignore_index: int | None = None) -> float:
    """The share of samples with their largest prediction at the target; of equal ones the first counts.

    Args:
        prediction: (N, K, ...), a value for each of K >= 2 classes.
        y: the classes as integers (N, ...), or one-hot in prediction's shape.
        ignore_index: a class whose positions are left out; 0.0 where that leaves none.

    Raises:
        ValueError: shapes that do not fit.
    """
    hits = _hits(prediction, y, ignore_index)
    return float(hits.mean()) if hits.size else 0.0


def _hits(prediction: np.ndarray, y: np.ndarray, ignore_index: int | None) -> np.ndarray:
    """Whether each target that counts is that of the largest prediction."""
    hits = _largest("accuracy", prediction, y, 1) == _classes(prediction, y)
    if ignore_index is not None and not (counted := _classes(prediction, y) != ignore_index).all():
        hits = hits[counted]
    return hits


def top_k_accuracy(k: int) -> Metric:
    """A metric: the share of samples with their target among the k largest predictions; arguments as `accuracy`.

    `fit(..., metrics={"top5": top_k_accuracy(5)})`.
    """
    k = integer("top_k_accuracy", "k", k)
    return partial(_top_k, k)


def _top_k(k: int, prediction: np.ndarray, y: np.ndarray) -> float:
    best = _largest("top_k_accuracy", prediction, y, k)
    return float((best == np.expand_dims(_classes(prediction, y), 1)).any(1).mean())


def _largest(name: str, prediction: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:
    """The class of the largest prediction (N, ...), or for k > 1 those of the k largest (N, k, ...)."""
    if prediction.ndim < 2 or prediction.shape[1] < 2:
        raise ValueError(f"{name} needs predictions (N, classes, ...), got shape {prediction.shape}")
    if y.shape not in (prediction.shape, prediction.shape[:1] + prediction.shape[2:]):
        raise ValueError(f"{name}: predictions of shape {prediction.shape} do not fit y of shape {y.shape}")
    if k > prediction.shape[1]:
        raise ValueError(f"{name}: k must be at most the number of classes {prediction.shape[1]}, got {k}")
    if k == 1 and name == "accuracy":
        return prediction.argmax(1)
    return np.argsort(-prediction, axis=1, kind="stable")[:, :k]


def _classes(prediction: np.ndarray, y: np.ndarray) -> np.ndarray:
    return y.argmax(1) if y.shape == prediction.shape else y


class Measures:
    """The loss and metrics under their names, each a mean over what it counts: samples, or targets of classes.

    Totals are arrays (2, names), sums and what they are divided by for the mean; those of several batches are added up.
    """

    def __init__(
        self, function: str, loss: Loss, accuracy_too: bool | None, metrics: Mapping[str, Metric] | None = None
    ):
        self.loss, self.metrics = loss, dict(metrics or {})
        for name, metric in self.metrics.items():
            if name in ("loss", "accuracy", "seconds") or name.startswith("val_"):
                raise ValueError(f"{function}: a metric cannot have the name {name!r}, which the history uses")
            if not callable(metric):
                raise TypeError(
                    f"{function}: the metric {name!r} must be callable with (prediction, y), got {metric!r}"
                )
        self.accuracy = loss.classifies if accuracy_too is None else accuracy_too

    @property
    def names(self) -> tuple[str, ...]:
        return ("loss", *(("accuracy",) if self.accuracy else ()), *self.metrics)

    def nothing(self) -> np.ndarray:
        """The totals of no batch."""
        return np.zeros((2, len(self.names)))

    def totals(self, value: float, prediction: Any, y: np.ndarray) -> np.ndarray:
        """Of one batch, whose loss is `value`."""
        prediction = self.loss._main(prediction)
        weight = self.loss.samples(y) if self.loss.reduction == "mean" else len(y)
        pairs = [(value * weight if self.loss.reduction == "mean" else value, weight)]
        if self.accuracy:
            hits = _hits(prediction, y, getattr(self.loss, "ignore_index", None))
            pairs.append((int(np.count_nonzero(hits)), hits.size))
        pairs += [(self._value(name, prediction, y) * len(y), len(y)) for name in self.metrics]
        return np.array(pairs, np.float64).T

    def _value(self, name: str, prediction: np.ndarray, y: np.ndarray) -> float:
        value = self.metrics[name](prediction, y)
        if np.ndim(value):
            raise ValueError(f"metric {name!r} must give a number, got an array of shape {np.shape(value)}")
        return float(value)

    def means(self, totals: np.ndarray) -> dict[str, float]:
        return {n: float(total / of) if of else 0.0 for n, total, of in zip(self.names, *totals, strict=True)}
