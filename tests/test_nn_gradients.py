"""What changes gradients before a step: clipping against PyTorch's, the L1 penalty, and both in fit."""

import numpy as np
import pytest
from gradcheck import assert_gradient, numerical_gradient
from tolerances import assert_close

from tilewise import nn


def parameters(rng, dtype=np.float64) -> list[nn.Parameter]:
    """Three parameters, of which one got no gradient."""
    found = [nn.Parameter(rng.standard_normal(shape).astype(dtype)) for shape in ((4, 3), (5,), (2, 2, 2))]
    for parameter in found[::2]:
        parameter.grad = rng.standard_normal(parameter.shape).astype(dtype)
    return found


def their_parameters(torch, ours):
    theirs = [torch.tensor(parameter.data, requires_grad=True) for parameter in ours]
    for tensor, parameter in zip(theirs, ours, strict=True):
        tensor.grad = None if parameter.grad is None else torch.tensor(parameter.grad)
    return theirs


def assert_same_gradients(ours, theirs):
    for parameter, tensor in zip(ours, theirs, strict=True):
        assert (parameter.grad is None) == (tensor.grad is None)
        if parameter.grad is not None:
            assert_close(parameter.grad, tensor.grad.numpy(), 20)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("norm_type", [1, 2, 3.5, np.inf])
@pytest.mark.parametrize("max_norm", [0, 0.5, 100])
def test_norms_equal_pytorchs(torch, rng, max_norm, norm_type, dtype):
    ours = parameters(rng, dtype)
    theirs = their_parameters(torch, ours)
    before = [None if p.grad is None else p.grad.copy() for p in ours]
    norm = nn.clip_grad_norm_(ours, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    assert_close(np.asarray(norm, dtype), expected.numpy(), 20)
    assert_same_gradients(ours, theirs)
    if max_norm == 100:
        for parameter, grad in zip(ours, before, strict=True):
            np.testing.assert_array_equal(parameter.grad, grad)
    elif max_norm:
        assert nn.clip_grad_norm_(ours, max_norm, norm_type) == pytest.approx(max_norm, rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_equal_pytorchs(torch, rng, dtype):
    ours = parameters(rng, dtype)
    ours[0].grad[0] = (np.nan, np.inf, -np.inf)
    theirs = their_parameters(torch, ours)
    nn.clip_grad_value_(ours, 0.4)
    torch.nn.utils.clip_grad_value_(theirs, 0.4)
    assert_same_gradients(ours, theirs)
    assert np.abs(ours[2].grad).max() == dtype(0.4)


def test_a_norm_beyond_float32_is_clipped():
    parameter = nn.Parameter(np.zeros(2, np.float32))
    parameter.grad = np.array([3e30, 4e30], np.float32)
    assert nn.clip_grad_norm_([parameter], 1.0) == pytest.approx(5e30)
    np.testing.assert_allclose(parameter.grad, [0.6, 0.8], rtol=1e-6)


def test_a_nan_is_spread_or_refused(rng):
    ours = parameters(rng)
    ours[0].grad[1, 1] = np.nan
    before = ours[2].grad.copy()
    with pytest.raises(RuntimeError, match="the norm of the gradients is nan"):
        nn.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)
    np.testing.assert_array_equal(ours[2].grad, before)
    assert np.isnan(nn.clip_grad_norm_(ours, 1.0))
    assert np.isnan(ours[2].grad).all()


def test_no_gradients_have_norm_zero(rng):
    assert nn.clip_grad_norm_([nn.Parameter(np.ones(3))], 1.0) == 0


def test_l1_penalty_is_the_gradient_of_its_value(rng):
    ours = parameters(rng)
    before = ours[0].grad.copy()
    value = nn.l1_penalty_(ours, 0.3)
    assert value == pytest.approx(0.3 * (np.abs(ours[0].data).sum() + np.abs(ours[2].data).sum()))
    expected = numerical_gradient(lambda w: np.array(0.3 * np.abs(w).sum()), ours[0].data, np.array(1.0))
    assert_gradient(ours[0].grad - before, expected)
    assert ours[1].grad is None


def descend(rng, **options) -> np.ndarray:
    """The weights of a line through noise in ten features, of which one matters."""
    x = rng.standard_normal((64, 10))
    y = 2 * x[:, :1] + 0.3 * rng.standard_normal((64, 1))
    model = nn.Linear(10, 1, rng=0, dtype=np.float64)
    prepare = options.pop("prepare", None)
    before = None if prepare is None else lambda: prepare([model.weight])
    descent = nn.SGD(model.parameters(), 0.02, **options)
    nn.fit(model, nn.MSELoss(), descent, x, y, epochs=80, rng=1, before_step=before, progress=False)
    return model.weight.data[0]


def test_l1_makes_weights_zero_where_l2_makes_them_small():
    plain, first, second = (
        descend(np.random.default_rng(3), **options)
        for options in ({}, {"prepare": lambda weights: nn.l1_penalty_(weights, 0.4)}, {"weight_decay": 0.4})
    )
    assert np.abs(first[1:]).max() < 0.02 < np.abs(plain[1:]).max()
    assert 1.6 < first[0] < 1.9
    assert np.abs(second).sum() < np.abs(plain).sum()
    assert np.abs(first[1:]).sum() < np.abs(second[1:]).sum()


def test_clipping_bounds_the_steps_of_fit():
    """Twenty of at most 0.1, at a rate at which plain descent explodes."""
    x, y = np.array([[2.0], [4], [6], [8]]), np.array([[81.0], [93], [91], [97]])

    def line(prepare) -> np.ndarray:
        model = nn.Linear(1, 1, rng=0, dtype=np.float64)
        before = None if prepare is None else lambda: prepare(model.parameters(), 1.0)
        start = model.weight.data.copy()
        nn.fit(
            model, nn.MSELoss(), nn.SGD(model.parameters(), 0.1), x, y, epochs=20, before_step=before, progress=False
        )
        return np.abs(model.weight.data - start)

    assert line(None) > 1e3
    assert line(nn.clip_grad_norm_) < 2 + 1e-12
    assert line(nn.clip_grad_value_) < 2 + 1e-12


PARAMETER = nn.Parameter(np.zeros(2))
WRONG = {
    "max_norm": (lambda: nn.clip_grad_norm_([PARAMETER], -1), ValueError, "clip_grad_norm_: max_norm must be at least"),
    "norm_type": (lambda: nn.clip_grad_norm_([PARAMETER], 1, 0), ValueError, "norm_type must be positive"),
    "clip_value": (lambda: nn.clip_grad_value_([PARAMETER], "1"), TypeError, "clip_value must be a number"),  # pyright: ignore[reportArgumentType]
    "strength": (lambda: nn.l1_penalty_([PARAMETER], float("nan")), ValueError, "l1_penalty_: strength must be"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
