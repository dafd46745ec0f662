"""Losses: `loss(prediction, target)`, then `loss.backward()` is the gradient of the prediction."""

import numpy as np

from ..kernels import log_softmax

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

    def losses(self, prediction: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, tuple]:
        """The single losses, and what `derivative` needs."""
        raise NotImplementedError

    def derivative(self, factors, kept: tuple) -> np.ndarray:
        """factors * d losses / d prediction, where factors is a number or an array of the losses' shape."""
        raise NotImplementedError

    def forward(self, prediction: np.ndarray, target: np.ndarray):
        losses, kept = self.losses(prediction, target)
        if losses.size == 0 and self.reduction == "mean":
            raise ValueError(f"{type(self).__name__}: the mean of no losses (prediction {prediction.shape})")
        self._kept = (losses.shape, kept)
        if self.reduction == "none":
            return losses
        return float(losses.mean() if self.reduction == "mean" else losses.sum())

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
        (shape, kept), self._kept = self._kept, None
        expected = shape if self.reduction == "none" else ()
        if np.shape(grad) not in ((), expected):
            raise ValueError(f"{name}.backward: grad must be a number or have shape {expected}, got {np.shape(grad)}")
        if self.reduction == "mean":
            grad = grad / max(int(np.prod(shape)), 1)
        return self.derivative(grad, kept)

    def __repr__(self):
        return f"{type(self).__name__}(reduction={self.reduction!r})"


class CrossEntropyLoss(Loss):
    """Softmax and cross-entropy in one: -sum_k target_k log softmax(logits)_k, which does not overflow.

    logits: (N, K), (N, K, d1, ...) or (K,), not yet softmaxed. target: the classes as integers, in logits' shape
    without the axis K; or probabilities (one-hot) in logits' shape. The mean is over all positions, N * d1 * ...
    """

    classifies = True

    def losses(self, prediction, target):
        if prediction.ndim == 0:
            raise ValueError("CrossEntropyLoss: logits must have at least 1 dimension")
        axis = min(1, prediction.ndim - 1)
        target = np.asarray(target)
        if target.shape == prediction.shape:
            if target.dtype.kind not in "biuf":
                raise TypeError(f"CrossEntropyLoss: target must be integers or probabilities, got {target.dtype}")
            target = target.astype(prediction.dtype, copy=False)
            logs = log_softmax(prediction, axis)
            return -(target * logs).sum(axis), (logs, target, axis)
        labels = np.expand_dims(self._checked_labels(prediction.shape, target, axis), axis)
        logs = log_softmax(prediction, axis)
        return -np.take_along_axis(logs, labels, axis).squeeze(axis), (logs, labels, axis)

    def _checked_labels(self, shape: tuple[int, ...], target: np.ndarray, axis: int) -> np.ndarray:
        if target.shape != (expected := shape[:axis] + shape[axis + 1 :]):
            raise ValueError(
                f"CrossEntropyLoss: for logits of shape {shape} target must have shape {expected} (classes) or {shape} "
                f"(probabilities), got {target.shape}"
            )
        if target.dtype.kind not in "iu":
            raise TypeError(f"CrossEntropyLoss: classes must be integers, got {target.dtype}")
        if target.size and (target.min() < 0 or target.max() >= shape[axis]):
            raise ValueError(
                f"CrossEntropyLoss: classes must be from 0 to {shape[axis] - 1}, got {target.min()} to {target.max()}"
            )
        return target

    def derivative(self, factors, kept):
        logs, target, axis = kept
        grad = np.exp(logs)
        factors = np.asarray(factors, logs.dtype)
        if factors.ndim:
            factors = np.expand_dims(factors, axis)
        if target.dtype == logs.dtype:  # probabilities, which need not add up to 1; else classes
            grad *= target.sum(axis, keepdims=True)
            grad -= target
        else:
            np.put_along_axis(grad, target, np.take_along_axis(grad, target, axis) - 1, axis)
        grad *= factors
        return grad


class MSELoss(Loss):
    """(prediction - target)**2; the shapes must be equal (a broadcast here is mostly a mistake)."""

    def losses(self, prediction, target):
        if target.shape != prediction.shape:
            raise ValueError(f"MSELoss: target must have prediction's shape {prediction.shape}, got {target.shape}")
        if target.dtype != prediction.dtype:
            raise TypeError(f"MSELoss: target is {target.dtype} but prediction is {prediction.dtype}; they must match")
        difference = prediction - target
        return difference**2, (difference,)

    def derivative(self, factors, kept):
        (difference,) = kept
        return np.asarray(factors * 2, difference.dtype) * difference
