"""Training, evaluation and prediction by mini-batches."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..kernels.shapes import integer
from .augment import Augmentation
from .checkpoint import Checkpoint
from .data import Samples
from .history import History
from .init import Rng, generator
from .losses import Loss
from .metrics import Measures, Metric
from .module import Module
from .optim import Optimizer
from .run import Run, measured, modes
from .stopping import EarlyStopping

AfterEpoch = Callable[[History], object]


class Evaluation(NamedTuple):
    """loss: the mean over the samples. accuracy: the share of targets hit, None where not asked for."""

    loss: float
    accuracy: float | None


def fit(
    model: Module,
    loss: Loss,
    optimizer: Optimizer,
    x: np.ndarray,
    y: np.ndarray,
    *,
    epochs: int,
    batch_size: int = 32,
    validation: Samples | float | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    augment: Augmentation | None = None,
    accuracy: bool | None = None,
    metrics: Mapping[str, Metric] | None = None,
    before_step: Callable[[], object] | None = None,
    after_epoch: AfterEpoch | Sequence[AfterEpoch] = (),
    early_stopping: EarlyStopping | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    rng: Rng = None,
    progress: bool = True,
) -> History:
    """Train by mini-batches: forward, loss, backward, one step of the optimiser, for every batch of every epoch.

    Args:
        model, loss, optimizer: the loss's reduction is "mean" or "sum". Means as `evaluate` describes.
        x: (N, ...), of the parameters' dtype.
        y: (N, ...), as the loss wants it.
        epochs: how many times every sample is seen.
        batch_size: samples for one step. The last batch of an epoch may be smaller; drop_last leaves it out.
        validation: (x, y) on which the model is measured after each epoch; or a share of the samples, between 0 and 1,
            that is drawn by rng and held out from training (`split` does so beforehand, and by classes).
        shuffle: whether each epoch goes through the samples in a new order.
        augment: changes each batch before the model sees it: augment(x, rng), see `tilewise.nn.augment`.
        accuracy: whether to record it; None: where the loss is one of classes.
        metrics: more to record, name -> metric(prediction, y), such as {"top5": top_k_accuracy(5)}. A number
            is taken as the mean over a batch's samples: an epoch's is the mean of them, weighted by the batches' sizes.
        before_step: called when the batch's gradients are there and before they are used: clipping, an L1 penalty.
        after_epoch: one or several, called with the history after each epoch; training ends when one of them returns a
            true value. They may change optimizer.lr (a schedule). Where one has state_dict and load_state_dict, a
            checkpoint holds its state.
        early_stopping: ends training when the validation loss has stopped falling, and restores the best weights.
        checkpoint: a file, or a `Checkpoint` with more options, that holds the state of the whole training. Where it
            is there already, training goes on from it as if it had never stopped; the state of the model, optimizer,
            rng and callbacks is replaced by the file's. To start anew, remove it.
        rng: a numpy.random.Generator or a seed, for the held-out share, the order and augment. With it, with seeded
            initial values and seeded dropout, the same call gives the same bits on one machine.
        progress: whether to show it on stderr: a bar where tqdm is installed, else a line for each epoch.

    Returns:
        The history. The model is left in the modes (training, evaluation) it was in.

    Raises:
        TypeError: x or y is not an array, or x has another dtype than the parameters.
        ValueError: x and y of different or no length; epochs or batch_size below 1; a loss without reduction; classes
            out of range (before the first step); a checkpoint that is damaged or of another model, loss, optimiser,
            data (by their CRC-32), before_step or batch size, which changes neither the model nor the file.
        NonFiniteError: the loss or a gradient is NaN or infinite. It names the first layer that made it so.

    Whatever is raised before or after a step, Ctrl-C's KeyboardInterrupt too, the weights are those of the last whole
    step: a learning rate that is no number and a read-only parameter are found before. An optimiser that fails amid its
    updates leaves the earlier parameters changed. The last checkpoint stays.
    """
    integer("fit", "epochs", epochs)
    _check_data("fit", model, loss, x, y, batch_size)
    validation = _validation(model, loss, validation, batch_size)
    measures = Measures("fit", loss, accuracy, metrics)
    _check_monitor(early_stopping, measures, validation is not None)
    if isinstance(checkpoint, (str, Path)):
        checkpoint = Checkpoint(checkpoint)
    calls = (after_epoch,) if callable(after_epoch) else tuple(after_epoch)
    run = Run(
        model, loss, optimizer, x, y, measures, validation, batch_size, shuffle, drop_last, augment, before_step, calls,
        early_stopping, generator(rng),
    )  # fmt: skip
    run.train(epochs, checkpoint, progress)
    return run.history


def evaluate(
    model: Module, loss: Loss, x: np.ndarray, y: np.ndarray, *, batch_size: int = 256, accuracy: bool | None = None
) -> Evaluation:
    """The mean loss over the samples (x, y), and the accuracy, in evaluation mode. Arguments and errors as `fit`.

    With classes both are those over all targets at once, whatever batch_size, class weights and ignore_index are; but a
    batch in which no target counts has no mean loss, and raises ValueError. Other losses' means over batches are
    weighted by samples: exact but for those that are no mean, such as RMSELoss.

    Other metrics: `top_k_accuracy(5)(predict(model, x), y)`.
    """
    _check_data("evaluate", model, loss, x, y, batch_size)
    means = measured(model, Measures("evaluate", loss, accuracy), x, y, batch_size)
    return Evaluation(means["loss"], means.get("accuracy"))


def predict(model: Module, x: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
    """model(x) in evaluation mode, batch by batch. Raises TypeError and ValueError as `fit`."""
    _check_samples("predict", model, x, batch_size)
    with modes(model, False):
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


def _validation(model: Module, loss: Loss, validation, batch_size: int) -> Samples | float | None:
    what = "fit: validation must be a pair (x, y) or a share, got"
    if validation is None:
        return None
    if isinstance(validation, (tuple, list)):
        if len(validation) != 2:
            raise ValueError(f"{what} {len(validation)} arrays")
        x, y = validation
        _check_data("fit (validation)", model, loss, x, y, batch_size)
        return x, y
    if isinstance(validation, bool) or not isinstance(validation, (int, float)):
        raise TypeError(f"{what} {type(validation).__name__}")
    if not 0 < validation < 1:
        raise ValueError(f"fit: validation as a share must be between 0 and 1, got {validation}")
    return float(validation)


def _check_monitor(early_stopping: EarlyStopping | None, measures: Measures, validated: bool):
    names = [*measures.names, *(f"val_{name}" for name in measures.names if validated)]
    if early_stopping is not None and early_stopping.monitor not in names:
        hint = "" if validated else "; there is no validation"
        monitor = early_stopping.monitor
        raise ValueError(f"fit: early_stopping watches {monitor!r}, but the history will have {', '.join(names)}{hint}")
