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
    ours, theirs = nn.CrossEntropyLoss(reduction=reduction), torch.nn.CrossEntropyLoss(reduction=reduction)
    compare(torch, rng, ours, theirs, logits, target, logits.size)


def compare(torch, rng, ours, theirs, prediction, target, terms, accurate=8):
    """Value and gradient of two losses, under a random gradient of the result."""
    theirs_prediction = torch.tensor(prediction, requires_grad=True)
    expected = theirs(theirs_prediction, torch.tensor(target))
    value = ours(prediction, target)
    assert_close(np.asarray(value, prediction.dtype), expected.detach().numpy(), terms)
    grad = rng.standard_normal(np.shape(value)).astype(prediction.dtype)
    expected.backward(torch.tensor(grad))
    actual = ours.backward(grad)
    assert_close(actual, theirs_prediction.grad.numpy(), accurate)
    assert actual.dtype == prediction.dtype


CLASS_OPTIONS = {
    "weight": {"weight": np.array([0.5, 2.0, 1.0, 0.0, 3.0])},
    "ignored": {"ignore_index": 3},
    "ignored outside": {},
    "weight and ignored": {"weight": np.array([0.5, 2.0, 1.0, 0.3, 3.0]), "ignore_index": 1},
    "smoothing": {"label_smoothing": 0.1},
    "everything": {"weight": np.array([0.5, 2.0, 1.0, 0.3, 3.0]), "ignore_index": 1, "label_smoothing": 0.3},
}


def their_options(torch, options: dict, dtype) -> dict:
    return options | ({"weight": torch.tensor(options["weight"].astype(dtype))} if "weight" in options else {})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["labels", "one-hot", "probabilities"])
@pytest.mark.parametrize("options", CLASS_OPTIONS.values(), ids=CLASS_OPTIONS)
def test_cross_entropys_options_equal_pytorchs(torch, rng, options, kind, reduction, dtype):
    if kind != "labels":
        options = {name: value for name, value in options.items() if name != "ignore_index"}
    for shape in ((16, 5), (3, 5, 4, 2)):
        logits = (3 * rng.standard_normal(shape)).astype(dtype)
        target = targets(kind, shape, rng)
        if kind == "labels" and not options:
            target[0] = -100
        target = target if kind == "labels" else target.astype(dtype)
        ours = nn.CrossEntropyLoss(**options, reduction=reduction)
        theirs = torch.nn.CrossEntropyLoss(**their_options(torch, options, dtype), reduction=reduction)
        compare(torch, rng, ours, theirs, logits, target, logits.size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, *CLASS_OPTIONS.values()], ids=["plain", *CLASS_OPTIONS])
def test_nll_equals_pytorchs(torch, rng, options, reduction, dtype):
    options = {name: value for name, value in options.items() if name != "label_smoothing"}
    for shape in ((16, 5), (3, 5, 4, 2)):
        logs = np.log(targets("probabilities", shape, rng)).astype(dtype)
        ours = nn.NLLLoss(**options, reduction=reduction)
        theirs = torch.nn.NLLLoss(**their_options(torch, options, dtype), reduction=reduction)
        compare(torch, rng, ours, theirs, logs, targets("labels", shape, rng), logs.size)


def test_ignored_positions_may_hold_anything(rng):
    logits = rng.standard_normal((3, 4))
    for options in ({}, {"label_smoothing": 0.1}):
        loss = nn.CrossEntropyLoss(**options)
        expected, gradient = loss(logits[:2], np.array([1, 2])), loss.backward()
        spoilt = np.concatenate([logits[:2], [[np.inf, np.nan, 0, 0]]])
        with np.errstate(invalid="ignore"):
            assert loss(spoilt, np.array([1, 2, -100])) == pytest.approx(expected, rel=1e-14)
            actual = loss.backward()
        np.testing.assert_allclose(actual[:2], gradient, rtol=1e-14)
        np.testing.assert_array_equal(actual[2], np.zeros(4))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["MSELoss", "L1Loss", "BCELoss", "BCEWithLogitsLoss"])
def test_losses_of_numbers_equal_pytorchs(torch, rng, name, reduction, dtype):
    prediction = (3 * rng.standard_normal((6, 5))).astype(dtype)
    target = rng.random((6, 5)).astype(dtype)
    target[0, :4] = (0, 1, 0, 1)
    if name == "BCELoss":
        prediction = (1 / (1 + np.exp(-prediction))).astype(dtype)
    else:
        prediction[1] = target[1]  # the gradient of an equal pair
    ours, theirs = getattr(nn, name)(reduction), getattr(torch.nn, name)(reduction=reduction)
    compare(torch, rng, ours, theirs, prediction, target, prediction.size)


@pytest.mark.parametrize("pos_weight", [3.0, np.array([0.5, 1.0, 2.0, 3.0, 0.0])], ids=["number", "each"])
def test_pos_weight_equals_pytorchs(torch, rng, pos_weight):
    logits, target = 3 * rng.standard_normal((6, 5)), rng.random((6, 5))
    ours = nn.BCEWithLogitsLoss(pos_weight=pos_weight)
    theirs = torch.nn.BCEWithLogitsLoss(pos_weight=torch.as_tensor(pos_weight, dtype=torch.float64))
    compare(torch, rng, ours, theirs, logits, target, 30)


def test_binary_cross_entropies_stay_finite():
    loss = nn.BCELoss("none")
    certain, target = np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.0, 1.0, 0.0, 1.0])
    np.testing.assert_array_equal(loss(certain, target), [0, 100, 100, 0])
    np.testing.assert_allclose(loss.backward(), [0, -1e12, 1e12, 0], rtol=1e-14)
    logits = np.array([-800.0, 800.0, -800.0, 800.0])
    loss = nn.BCEWithLogitsLoss("sum")
    assert loss(logits, np.array([0, 0, 1, 1])) == 1600
    np.testing.assert_array_equal(loss.backward(), [0, 1, -1, 0])
    loss(np.array([-50.0, 50.0]), np.array([0, 1]))
    np.testing.assert_allclose(loss.backward(), [np.exp(-50), -np.exp(-50)], rtol=1e-14)  # not 1 - 1


def test_the_two_binary_cross_entropies_agree_on_integers_and_booleans(rng):
    logits, target = rng.standard_normal(9), rng.integers(0, 2, 9)
    expected = nn.BCELoss()(1 / (1 + np.exp(-logits)), target.astype(float))
    for labels in (target, target.astype(bool), target.astype(np.uint8)):
        assert nn.BCEWithLogitsLoss()(logits, labels) == pytest.approx(expected, rel=1e-13)


def test_rmse_is_the_root_of_mse(rng):
    prediction, target = rng.standard_normal((2, 4, 3))
    loss = nn.RMSELoss()
    assert loss(prediction, target) == pytest.approx(nn.MSELoss()(prediction, target) ** 0.5, rel=1e-15)
    expected = numerical_gradient(lambda x: np.array(nn.RMSELoss()(x, target)), prediction, np.array(0.7))
    assert_gradient(loss.backward(0.7), expected)
    assert loss(prediction, prediction) == 0
    np.testing.assert_array_equal(loss.backward(), np.zeros((4, 3)))


def test_one_hot_and_back(torch, rng):
    labels = rng.integers(0, 4, (3, 5))
    for classes in (None, 6):
        encoded = nn.one_hot(labels, classes)
        expected = torch.nn.functional.one_hot(torch.tensor(labels), classes or -1)
        np.testing.assert_array_equal(encoded, expected.numpy())
        np.testing.assert_array_equal(encoded.argmax(-1), labels)
    assert encoded.dtype == np.float32


def test_gradients_are_the_numerical_ones(rng):
    logits = rng.standard_normal((3, 4))
    for loss, target in (
        (nn.CrossEntropyLoss(reduction="none"), np.array([3, 0, 1])),
        (nn.CrossEntropyLoss(reduction="none"), rng.random((3, 4))),  # rows that do not add up to 1
        (nn.CrossEntropyLoss(rng.random(4), reduction="none", label_smoothing=0.2), np.array([3, 0, 1])),
        (nn.NLLLoss(rng.random(4), reduction="none"), np.array([3, 0, 1])),
        (nn.BCEWithLogitsLoss("none", pos_weight=2), rng.random((3, 4))),
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
    assert nn.MSELoss()(3 * hours + 76, marks) == 11
    assert nn.RMSELoss()(3 * hours + 76, marks) == pytest.approx(3.3166, abs=5e-5)


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
    "all ignored": (
        lambda: nn.CrossEntropyLoss(ignore_index=1)(LOGITS, np.ones(4, int)),
        ValueError,
        "the mean of no losses",
    ),
    "ignored probabilities": (
        lambda: nn.CrossEntropyLoss(ignore_index=1)(LOGITS, LOGITS),
        ValueError,
        "probabilities know no ignore_index",
    ),
    "class beside ignored ones": (
        lambda: nn.NLLLoss()(LOGITS, np.array([0, -100, 7, 2])),
        ValueError,
        "NLLLoss: classes must be from 0 to 2, got 0 to 7",
    ),
    "probabilities for nll": (lambda: nn.NLLLoss()(LOGITS, LOGITS), ValueError, r"\(4,\) \(classes\), got \(4, 3\)"),
    "weights": (
        lambda: nn.CrossEntropyLoss(np.ones(4))(LOGITS, np.zeros(4, int)),
        ValueError,
        "weight is of 4 classes, prediction of 3",
    ),
    "reduction as weight": (lambda: nn.CrossEntropyLoss("sum"), TypeError, "weight must be an array .* got 'sum'"),  # pyright: ignore[reportArgumentType]
    "smoothing": (lambda: nn.CrossEntropyLoss(label_smoothing=1.5), ValueError, "label_smoothing must be from 0 to 1"),
    "negative one-hot": (lambda: nn.one_hot([0, -1]), ValueError, "one_hot: classes must be from 0 to 0, got -1 to 0"),
    "one-hot of floats": (lambda: nn.one_hot([0.5]), TypeError, "one_hot: classes must be integers, got float64"),
    "one-hot of nothing": (lambda: nn.one_hot(np.zeros(0, int)), ValueError, "num_classes must be given"),
    "logits for bce": (
        lambda: nn.BCELoss()(LOGITS - 1, LOGITS),
        ValueError,
        r"predictions must be from 0 to 1, got -1",
    ),
    "binary labels": (
        lambda: nn.BCEWithLogitsLoss()(LOGITS, LOGITS.astype(int) + 2),
        ValueError,
        r"BCEWithLogitsLoss: targets must be from 0 to 1, got 2\.0 to 2",
    ),
    "binary nan": (lambda: nn.BCELoss()(LOGITS, LOGITS * np.nan), ValueError, "targets must be from 0 to 1, got nan"),
    "pos_weight": (
        lambda: nn.BCEWithLogitsLoss(pos_weight=np.ones(4))(LOGITS, LOGITS),
        ValueError,
        r"pos_weight \(4,\) does not broadcast to \(4, 3\)",
    ),
    "l1 shapes": (lambda: nn.L1Loss()(LOGITS, LOGITS[0]), ValueError, "L1Loss: target must have prediction's shape"),
    "rmse of nothing": (lambda: nn.RMSELoss()(LOGITS[:0], LOGITS[:0]), ValueError, "RMSELoss: the mean of no losses"),
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
