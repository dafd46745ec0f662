"""Losses against PyTorch's, their gradients, and the calls that are wrong."""

import numpy as np
import pytest
from gradcheck import assert_gradient, numerical_gradient
from tolerances import assert_close

from tilewise import nn

SHAPES = {"rows": (7, 5), "pixels": (3, 5, 4, 2), "single": (5,)}


def targets(kind: str, shape: tuple[int, ...], rng) -> np.ndarray:
    axis = min(1, len(shape) - 1)
    labels = rng.integers(0, shape[axis], shape[:axis] + shape[axis + 1 :])
    if kind == "labels":
        return labels
    if kind == "one-hot":
        return np.moveaxis(np.eye(shape[axis])[labels], -1, axis)
    values = rng.random(shape)
    return values / values.sum(axis, keepdims=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["labels", "one-hot", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cross_entropy_equals_pytorchs(torch, rng, shape, kind, reduction, dtype):
    logits = (3 * rng.standard_normal(shape)).astype(dtype)
    target = targets(kind, shape, rng)
    target = target if kind == "labels" else target.astype(dtype)
    loss = nn.CrossEntropyLoss(reduction)
    theirs_logits = torch.tensor(logits, requires_grad=True)
    theirs = torch.nn.CrossEntropyLoss(reduction=reduction)(theirs_logits, torch.tensor(target))
    value = loss(logits, target)
    assert_close(np.asarray(value, dtype), theirs.detach().numpy(), logits.size)
    grad = rng.standard_normal(np.shape(value)).astype(dtype)
    theirs.backward(torch.tensor(grad))
    ours = loss.backward(grad)
    assert_close(ours, theirs_logits.grad.numpy(), 8)
    assert ours.dtype == dtype


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mse_equals_pytorchs(torch, rng, reduction):
    prediction, target = rng.standard_normal((2, 6, 3))
    loss = nn.MSELoss(reduction)
    theirs_prediction = torch.tensor(prediction, requires_grad=True)
    theirs = torch.nn.MSELoss(reduction=reduction)(theirs_prediction, torch.tensor(target))
    value = loss(prediction, target)
    assert_close(np.asarray(value), theirs.detach().numpy(), 18)
    grad = rng.standard_normal(np.shape(value))
    theirs.backward(torch.tensor(grad))
    assert_close(loss.backward(grad), theirs_prediction.grad.numpy(), 2)


def test_gradients_are_the_numerical_ones(rng):
    logits = rng.standard_normal((3, 4))
    for loss, target in (
        (nn.CrossEntropyLoss("none"), np.array([3, 0, 1])),
        (nn.CrossEntropyLoss("none"), rng.random((3, 4))),  # rows that do not add up to 1
        (nn.MSELoss("none"), rng.standard_normal((3, 4))),
    ):
        cotangent = rng.standard_normal(loss(logits, target).shape)
        actual = loss.backward(cotangent)
        expected = numerical_gradient(lambda x, loss=loss, target=target: loss(x, target), logits, cotangent)
        assert_gradient(actual, expected)


def test_one_hot_integers_count_as_probabilities(rng):
    logits, labels = rng.standard_normal((6, 3)), rng.integers(0, 3, 6)
    loss = nn.CrossEntropyLoss()
    assert loss(logits, np.eye(3, dtype=np.int64)[labels]) == pytest.approx(loss(logits, labels), rel=1e-14)


def test_large_logits_do_not_overflow():
    """The lectures' softmax([1, 2, 788, 789]) = [0, 0, 0.268941, 0.731059]."""
    loss = nn.CrossEntropyLoss()
    logits = np.array([[1.0, 2, 788, 789]])
    assert loss(logits, np.array([2])) == pytest.approx(-np.log(0.268941), abs=1e-5)
    np.testing.assert_allclose(loss.backward(), [[0, 0, 0.268941 - 1, 0.731059]], atol=1e-6)
    assert loss(logits, np.array([0])) == pytest.approx(788 + np.log1p(np.exp(-1)))


def test_mse_of_the_lectures_line():
    """y = 3x + 76 against the marks 81, 93, 91, 97: MSE 11, RMSE 3.3166."""
    hours, marks = np.array([2.0, 4, 6, 8]), np.array([81.0, 93, 91, 97])
    value = nn.MSELoss()(3 * hours + 76, marks)
    assert value == 11
    assert value**0.5 == pytest.approx(3.3166, abs=5e-5)


LOGITS = np.zeros((4, 3), np.float32)
WRONG = {
    "class too large": (
        lambda: nn.CrossEntropyLoss()(LOGITS, np.array([0, 1, 2, 3])),
        ValueError,
        "from 0 to 2, got 0 to 3",
    ),
    "negative class": (
        lambda: nn.CrossEntropyLoss()(LOGITS, np.array([0, -1, 2, 1])),
        ValueError,
        "from 0 to 2, got -1 to",
    ),
    "float classes": (
        lambda: nn.CrossEntropyLoss()(LOGITS, np.zeros(4)),
        TypeError,
        "classes must be integers, got float64",
    ),
    "column of classes": (lambda: nn.CrossEntropyLoss()(LOGITS, np.zeros((4, 1), int)), ValueError, r"got \(4, 1\)"),
    "text": (lambda: nn.CrossEntropyLoss()(LOGITS, np.full((4, 3), "a")), TypeError, "integers or probabilities"),
    "no samples": (lambda: nn.CrossEntropyLoss()(LOGITS[:0], np.zeros(0, int)), ValueError, "mean of no losses"),
    "mse shapes": (
        lambda: nn.MSELoss()(LOGITS, LOGITS[:, :1]),
        ValueError,
        r"prediction's shape \(4, 3\), got \(4, 1\)",
    ),
    "mse dtypes": (
        lambda: nn.MSELoss()(LOGITS, LOGITS.astype(float)),
        TypeError,
        "target is float64 but prediction is float32",
    ),
    "reduction": (lambda: nn.MSELoss("average"), ValueError, "reduction must be one of mean, sum, none, got 'average'"),
    "backward first": (lambda: nn.MSELoss().backward(), RuntimeError, "MSELoss.backward: call the loss first"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_wrong_gradient_shape():
    loss = nn.MSELoss("none")
    loss(LOGITS, LOGITS)
    with pytest.raises(ValueError, match=r"must be a number or have shape \(4, 3\), got \(3,\)"):
        loss.backward(np.ones(3))
