"""Losses: `loss(prediction, target)`, then `loss.backward()` is the gradient of the prediction."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ..kernels import log_softmax, sigmoid
from ..kernels.shapes import integer

REDUCTIONS = ("mean", "sum", "none")


class Loss:
    """A function of predictions and targets, reduced to a number.

    Args:
        reduction: "mean" or "sum" over all losses (result: a float), or "none" (result: the array of losses).
    """

    classifies = False  # whether targets are classes, so that there is an accuracy

    def __init__(self, reduction: str = "mean"):
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"{type(self).__name__}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
            )
        self.reduction = reduction
        self._kept: tuple | None = None

    def losses(self, prediction: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float, tuple]:
        """The single losses, what their sum is divided by for the mean, and what `derivative` needs."""
        raise NotImplementedError

    def derivative(self, factors, kept: tuple) -> np.ndarray:
        """factors * d losses / d prediction, where factors is a number or an array of the losses' shape."""
        raise NotImplementedError

    def check_targets(self, shape: tuple[int, ...], target: np.ndarray):
        """Raise, before training, what forward would for a prediction of this shape and one of these targets.

        A loss that knows nothing to look for lets everything pass.
        """

    def _kind(self) -> str:
        """What a checkpoint calls it."""
        return type(self).__name__

    def _main(self, prediction: Any) -> np.ndarray:
        """Of what a model gives, the prediction that metrics are taken of. TypeError for what the loss cannot take."""
        if isinstance(prediction, tuple):
            raise TypeError(
                f"{type(self).__name__}: prediction must be an array, got a tuple of {len(prediction)} "
                f"({type(prediction).__name__}); AuxiliaryLoss takes several predictions"
            )
        return prediction

    def samples(self, target: np.ndarray) -> float:
        """How much the last forward's mean counts beside those of other batches."""
        return len(target)

    def forward(self, prediction: np.ndarray, target: np.ndarray):
        losses, divisor, kept = self.losses(self._main(prediction), target)
        if divisor == 0 and self.reduction == "mean":
            raise ValueError(f"{type(self).__name__}: the mean of no losses (prediction {prediction.shape})")
        self._kept = (losses.shape, divisor, kept)
        if self.reduction == "none":
            return losses
        return float(losses.sum() / divisor if self.reduction == "mean" else losses.sum())

    def __call__(self, prediction: np.ndarray, target: np.ndarray):
        return self.forward(prediction, target)

    def backward(self, grad=1.0) -> np.ndarray:
        """The gradient of the last forward's prediction.

        Args:
            grad: the gradient of the result: a number, or with reduction "none" an array of the losses' shape.

        Raises:
            RuntimeError: no forward went before; each backward uses up one forward.
            ValueError: grad is of another shape.
        """
        name = type(self).__name__
        if self._kept is None:
            raise RuntimeError(f"{name}.backward: call the loss first (each backward uses up one forward)")
        (shape, divisor, kept), self._kept = self._kept, None
        expected = shape if self.reduction == "none" else ()
        if np.shape(grad) not in ((), expected):
            raise ValueError(f"{name}.backward: grad must be a number or have shape {expected}, got {np.shape(grad)}")
        return self.derivative(grad / divisor if self.reduction == "mean" else grad, kept)

    def __repr__(self):
        return f"{type(self).__name__}(reduction={self.reduction!r})"


# ---- classes


def one_hot(labels: ArrayLike, num_classes: int | None = None, *, dtype: DTypeLike = np.float32) -> np.ndarray:
    """(..., num_classes): 1 at each label, else 0. `.argmax(-1)` is the way back.

    Args:
        labels: integers from 0 to num_classes - 1, of any shape.
        num_classes: one more than the largest label where None.

    Raises:
        TypeError, ValueError: labels that are not integers, or out of range.
    """
    labels = np.asarray(labels)
    _check_integers("one_hot", labels)
    if num_classes is None:
        if not labels.size:
            raise ValueError("one_hot: no labels, so num_classes must be given")
        num_classes = int(labels.max()) + 1
    _check_range("one_hot", labels, integer("one_hot", "num_classes", num_classes, minimum=0))
    return (labels[..., None] == np.arange(num_classes)).astype(dtype)


def _check_integers(name: str, labels: np.ndarray):
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{name}: classes must be integers, got {labels.dtype}")


def _check_range(name: str, labels: np.ndarray, classes: int):
    if labels.size and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(f"{name}: classes must be from 0 to {classes - 1}, got {labels.min()} to {labels.max()}")


class _ClassLoss(Loss):
    """What losses of classes share. The mean divides by the sum of the targets' weights, each 1 without `weight`.

    Args:
        weight: (K,), a weight for each class.
        ignore_index: a label whose positions have no loss and no gradient, and are not counted in the mean.
        reduction: as in `Loss`.
    """

    classifies = True

    def __init__(self, weight: ArrayLike | None = None, *, ignore_index: int = -100, reduction: str = "mean"):
        super().__init__(reduction)
        name = type(self).__name__
        self.ignore_index = integer(name, "ignore_index", ignore_index, minimum=-(2**63))
        self.weight = None if weight is None else np.asarray(weight)
        if self.weight is not None and (self.weight.ndim != 1 or self.weight.dtype.kind not in "iuf"):
            raise TypeError(f"{name}: weight must be an array (classes,) of numbers, got {weight!r}")

    def samples(self, target):  # what the mean was divided by, so that a mean over batches is that over all targets
        return len(target) if self._kept is None else self._kept[1]

    def _class_weights(self, classes: int, dtype: np.dtype) -> np.ndarray | None:
        if self.weight is None:
            return None
        if len(self.weight) != classes:
            raise ValueError(f"{type(self).__name__}: weight is of {len(self.weight)} classes, prediction of {classes}")
        return self.weight.astype(dtype)

    def check_targets(self, shape, target):
        if len(shape) < 2 or target.ndim == len(shape):
            return  # probabilities, or shapes that forward refuses
        _check_integers(type(self).__name__, target)
        _check_range(type(self).__name__, target[target != self.ignore_index], shape[1])

    def _labels(self, prediction: np.ndarray, target: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The labels, 0 for the ignored ones, and each one's weight; None where all of them are 1."""
        name, classes = type(self).__name__, prediction.shape[axis]
        _check_integers(name, target)
        counted = target != self.ignore_index
        everything = bool(counted.all())
        _check_range(name, target if everything else target[counted], classes)
        labels = target if everything else np.where(counted, target, 0)
        weights = self._class_weights(classes, prediction.dtype)
        weights = None if weights is None else weights[labels]
        if everything:
            return labels, weights
        return labels, counted.astype(prediction.dtype) if weights is None else np.where(counted, weights, 0)

    def _picked(self, logs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None, axis: int) -> tuple:
        """(-weight * logs[label], divisor, what is kept)."""
        labels = np.expand_dims(labels, axis)
        losses = -np.take_along_axis(logs, labels, axis).squeeze(axis)
        return _scaled(losses, weights), _total(weights, losses.size), (logs, labels, axis, weights)


def _scaled(values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """values * weights, where a weight of 0 gives 0 even for an infinite or undefined value."""
    return values if weights is None else np.where(weights == 0, 0, values * weights).astype(values.dtype, copy=False)


def _total(weights: np.ndarray | None, positions: int) -> float:
    return positions if weights is None else float(weights.sum(dtype=np.float64))


def _class_axis(name: str, prediction: np.ndarray, target: np.ndarray, probabilities: bool) -> int:
    """The axis of the classes: 1, or 0 where there is no batch."""
    if prediction.ndim == 0:
        raise ValueError(f"{name}: prediction must have at least 1 dimension")
    shape, axis = prediction.shape, min(1, prediction.ndim - 1)
    expected = shape[:axis] + shape[axis + 1 :]
    if target.shape != expected and not (probabilities and target.shape == shape):
        also = f" or {shape} (probabilities)" if probabilities else ""
        raise ValueError(
            f"{name}: for a prediction of shape {shape} target must have shape {expected} (classes){also}, "
            f"got {target.shape}"
        )
    return axis


class CrossEntropyLoss(_ClassLoss):
    """Softmax and cross-entropy in one: -sum_k weight_k target_k log softmax(logits)_k, which does not overflow.

    logits: (N, K), (N, K, d1, ...) or (K,), not yet softmaxed. target: the classes as integers, in logits' shape
    without the axis K; or probabilities (one-hot) in logits' shape, whose mean is over all positions, N * d1 * ...,
    whatever the weights (as in PyTorch).

    Args:
        weight: (K,), a weight for each class.
        ignore_index: a class whose positions have no loss and no gradient, and are not counted in the mean.
        reduction: as in `Loss`; the mean over classes divides by the sum of the targets' weights.
        label_smoothing: e in (1 - e) * target + e / K, the target that is used (Szegedy et al. 2016).
    """

    def __init__(
        self,
        weight: ArrayLike | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ):
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"CrossEntropyLoss: label_smoothing must be from 0 to 1, got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def losses(self, prediction, target):
        target = np.asarray(target)
        axis = _class_axis("CrossEntropyLoss", prediction, target, True)
        if target.shape == prediction.shape:
            if target.dtype.kind not in "biuf":
                raise TypeError(f"CrossEntropyLoss: target must be integers or probabilities, got {target.dtype}")
            if self.ignore_index >= 0:
                raise ValueError(f"CrossEntropyLoss: probabilities know no ignore_index, got {self.ignore_index}")
            positions = prediction.size // max(prediction.shape[axis], 1)
            return self._spread(prediction, target.astype(prediction.dtype, copy=False), None, positions, axis)
        labels, weights = self._labels(prediction, target, axis)
        if not self.label_smoothing:
            return self._picked(log_softmax(prediction, axis), labels, weights, axis)
        certain = np.moveaxis(one_hot(labels, prediction.shape[axis], dtype=prediction.dtype), -1, axis)
        counted = None if weights is None else np.expand_dims(target != self.ignore_index, axis)
        return self._spread(prediction, certain, counted, _total(weights, labels.size), axis)

    def _spread(self, logits: np.ndarray, target: np.ndarray, counted: np.ndarray | None, total: float, axis: int):
        """Losses of targets that are spread over the classes; `counted` is False where a position is ignored."""
        if self.label_smoothing:
            target = target * (1 - self.label_smoothing) + self.label_smoothing / logits.shape[axis]
        weights = self._class_weights(logits.shape[axis], logits.dtype)
        if weights is not None:
            target = target * weights.reshape(-1, *[1] * (logits.ndim - axis - 1))
        target = np.asarray(target, logits.dtype)
        logs = log_softmax(logits, axis)
        if counted is not None:
            target = np.where(counted, target, 0)
            logs = np.where(counted, logs, 0)
        return -(target * logs).sum(axis), total, (logs, target, axis, None)

    def derivative(self, factors, kept):
        logs, target, axis, weights = kept
        grad = np.exp(logs)
        if target.dtype == logs.dtype:  # spread over the classes, and need not add up to 1
            grad *= target.sum(axis, keepdims=True)
            grad -= target
        else:
            np.put_along_axis(grad, target, np.take_along_axis(grad, target, axis) - 1, axis)
        factors = np.asarray(factors, logs.dtype)
        grad *= np.expand_dims(factors, axis) if factors.ndim else factors
        return _scaled(grad, None if weights is None else np.expand_dims(weights, axis))


class NLLLoss(_ClassLoss):
    __doc__ = f"""-weight_k logs_k for the target class k: the negative log likelihood, after LogSoftmax.

    logs: (N, K), (N, K, d1, ...) or (K,). target: the classes as integers, in logs' shape without the axis K.

    {_ClassLoss.__doc__}"""

    def losses(self, prediction, target):
        target = np.asarray(target)
        axis = _class_axis("NLLLoss", prediction, target, False)
        return self._picked(prediction, *self._labels(prediction, target, axis), axis)

    def derivative(self, factors, kept):
        logs, labels, axis, weights = kept
        values = -np.broadcast_to(np.asarray(factors, logs.dtype), logs.shape[:axis] + logs.shape[axis + 1 :])
        grad = np.zeros_like(logs)
        np.put_along_axis(grad, labels, np.expand_dims(_scaled(values, weights), axis), axis)
        return grad


# ---- two classes


def _checked(name: str, prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The target, of prediction's shape and dtype: a broadcast or a conversion here is mostly a mistake."""
    if target.shape != prediction.shape:
        raise ValueError(f"{name}: target must have prediction's shape {prediction.shape}, got {target.shape}")
    if target.dtype != prediction.dtype:
        raise TypeError(f"{name}: target is {target.dtype} but prediction is {prediction.dtype}; they must match")
    return target


def _checked_probabilities(name: str, prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The target as probabilities from 0 to 1; booleans and integers 0 and 1 are welcome."""
    target = np.asarray(target)
    if target.dtype.kind in "biu":
        target = target.astype(prediction.dtype)
    target = _checked(name, prediction, target)
    if not ((target >= 0) & (target <= 1)).all():
        raise ValueError(f"{name}: targets must be from 0 to 1, got {target.min()} to {target.max()}")
    return target


class BCELoss(Loss):
    """Binary cross-entropy -(t log p + (1 - t) log(1 - p)), of probabilities p from 0 to 1 (after Sigmoid).

    The logarithms are at least -100 and the gradient's p (1 - p) at least 1e-12, as in PyTorch: finite also for p = 0
    and 1. BCEWithLogitsLoss needs no such limits. target: of p's shape; probabilities of p's dtype, or integers 0, 1.
    """

    def losses(self, prediction, target):
        target = _checked_probabilities("BCELoss", prediction, target)
        if not ((prediction >= 0) & (prediction <= 1)).all() and not np.isnan(prediction).any():
            raise ValueError(
                f"BCELoss: predictions must be from 0 to 1, got {prediction.min()} to {prediction.max()}; use a "
                f"Sigmoid before, or BCEWithLogitsLoss"
            )
        with np.errstate(divide="ignore"):
            yes, no = np.maximum(np.log(prediction), -100), np.maximum(np.log1p(-prediction), -100)
        return -(target * yes + (1 - target) * no), prediction.size, (prediction, target)

    def derivative(self, factors, kept):
        prediction, target = kept
        least = max(1e-12, float(np.finfo(prediction.dtype).tiny))
        spread = np.maximum(prediction * (1 - prediction), prediction.dtype.type(least))
        return np.asarray(factors, prediction.dtype) * (prediction - target) / spread


class BCEWithLogitsLoss(Loss):
    """Sigmoid and binary cross-entropy in one, which does not overflow:

    pos_weight t log(1 + exp(-x)) + (1 - t) log(1 + exp(x)); target t: of x's shape, of x's dtype or integers 0 and 1.

    Args:
        reduction: as in `Loss`.
        pos_weight: the weight of the targets 1, a number or an array that broadcasts to x's shape.
    """

    def __init__(self, reduction: str = "mean", *, pos_weight: ArrayLike | None = None):
        super().__init__(reduction)
        self.pos_weight = None if pos_weight is None else np.asarray(pos_weight)

    def losses(self, prediction, target):
        target = _checked_probabilities("BCEWithLogitsLoss", prediction, target)
        yes: Any = target
        if self.pos_weight is not None:
            try:
                yes = target * np.broadcast_to(self.pos_weight, target.shape).astype(target.dtype)
            except ValueError:
                raise ValueError(
                    f"BCEWithLogitsLoss: pos_weight {self.pos_weight.shape} does not broadcast to {target.shape}"
                ) from None
        small = np.log1p(np.exp(-np.abs(prediction)))  # log(1 + exp(x)) = max(x, 0) + small
        losses = yes * (np.maximum(-prediction, 0) + small) + (1 - target) * (np.maximum(prediction, 0) + small)
        return losses, prediction.size, (prediction, target, yes)

    def derivative(self, factors, kept):
        prediction, target, yes = kept
        grad = (1 - target) * sigmoid(prediction) - yes * sigmoid(-prediction)
        return np.asarray(factors, prediction.dtype) * grad


# ---- numbers


class MSELoss(Loss):
    """(prediction - target)**2; the shapes must be equal (a broadcast here is mostly a mistake)."""

    def losses(self, prediction, target):
        difference = prediction - _checked("MSELoss", prediction, target)
        return difference**2, difference.size, (difference,)

    def derivative(self, factors, kept):
        (difference,) = kept
        return np.asarray(factors * 2, difference.dtype) * difference


class RMSELoss(Loss):
    """sqrt(mean((prediction - target)**2)), over all elements. Its gradient is 0 where prediction equals target."""

    def __init__(self):
        super().__init__()

    def losses(self, prediction, target):
        difference = prediction - _checked("RMSELoss", prediction, target)
        if not difference.size:
            return difference, 0, ()
        root = np.sqrt((difference**2).mean())
        return root, 1, (difference, root)

    def derivative(self, factors, kept):
        difference, root = kept
        return np.asarray(factors / (root * difference.size) if root else 0, difference.dtype) * difference


class L1Loss(Loss):
    """|prediction - target|; the gradient of an equal pair is 0."""

    def losses(self, prediction, target):
        difference = prediction - _checked("L1Loss", prediction, target)
        return np.abs(difference), difference.size, (difference,)

    def derivative(self, factors, kept):
        (difference,) = kept
        return np.asarray(factors, difference.dtype) * np.sign(difference)
