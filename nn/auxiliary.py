"""The loss of a network that gives several predictions of one target, such as GoogLeNet with its auxiliary heads."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np

from ..kernels.shapes import number
from .losses import Loss


class AuxiliaryLoss(Loss):
    """loss(main, target) + sum_i weights_i * loss(auxiliary_i, target) (Szegedy et al. 2015), of several predictions.

    prediction: (main, auxiliary_1, ...), as `GoogLeNet` gives it in training; backward returns the gradients in that
    order. Or an array, as in evaluation: then it is `loss` alone. Metrics and the accuracy are of the main prediction.
    So in `fit` a validation loss lacks the auxiliary terms that the training loss has.

    Args:
        loss: of one prediction; its reduction and target are this one's.
        weights: of the auxiliary predictions, in their order.

    Raises:
        TypeError: loss is not a Loss, or weights are not numbers.
        ValueError: a weight is negative or not finite; later, a tuple that has not one prediction more than weights.
    """

    def __init__(self, loss: Loss, weights: Sequence[float] = (0.3, 0.3)):
        if not isinstance(loss, Loss):
            raise TypeError(
                f"AuxiliaryLoss: loss must be a Loss, such as CrossEntropyLoss(), got {type(loss).__name__}"
            )
        if isinstance(weights, str) or not isinstance(weights, Sequence):
            raise TypeError(f"AuxiliaryLoss: weights must be a sequence of numbers, got {weights!r}")
        super().__init__(loss.reduction)
        self.loss = loss
        self.weights = tuple(number("AuxiliaryLoss", "weights", weight) for weight in weights)
        self.classifies = loss.classifies
        self._parts: tuple[Loss, ...] = (loss,)

    def __getattr__(self, name: str) -> Any:  # the options are those of the loss: ignore_index, weight
        if name == "loss" or name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.loss, name)

    def _kind(self) -> str:
        return f"AuxiliaryLoss of {self.loss._kind()} with weights {self.weights}"

    def _main(self, prediction: Any) -> np.ndarray:
        return prediction[0] if isinstance(prediction, tuple) else prediction

    def check_targets(self, shape, target):
        self.loss.check_targets(shape, target)

    def samples(self, target):
        return self._parts[0].samples(target)

    def forward(self, prediction: Any, target: np.ndarray):
        if not isinstance(prediction, tuple):
            self._parts = (copy(self.loss),)
            self._kept = (False,)
            return self._parts[0](prediction, target)
        if len(prediction) != 1 + len(self.weights):
            raise ValueError(
                f"AuxiliaryLoss: prediction must be a tuple of {1 + len(self.weights)}, one more than weights, got one "
                f"of {len(prediction)}"
            )
        parts = tuple(copy(self.loss) for _ in prediction)  # each keeps what its own backward needs
        values = [part(one, target) for part, one in zip(parts, prediction, strict=True)]
        self._parts, self._kept = parts, (True,)
        return values[0] + sum(w * value for w, value in zip(self.weights, values[1:], strict=True))

    def backward(self, grad: Any = 1.0) -> Any:
        if self._kept is None:
            raise RuntimeError("AuxiliaryLoss.backward: call the loss first (each backward uses up one forward)")
        (several,), self._kept = self._kept, None
        if not several:
            return self._parts[0].backward(grad)
        return tuple(part.backward(w * grad) for w, part in zip((1.0, *self.weights), self._parts, strict=True))

    def __repr__(self):
        return f"AuxiliaryLoss({self.loss!r}, weights={self.weights})"
