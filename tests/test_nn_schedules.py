"""Schedules of the learning rate against PyTorch's, the lectures' formula, and their states."""

import numpy as np
import pytest

from tilewise import nn

CASES = {
    "step": ("StepLR", {"step_size": 3}),
    "step with gamma": ("StepLR", {"step_size": 1, "gamma": 0.7}),
    "exponential": ("ExponentialLR", {"gamma": 0.9}),
    "cosine": ("CosineAnnealingLR", {"T_max": 7}),
    "cosine with a floor": ("CosineAnnealingLR", {"T_max": 4, "eta_min": 0.01}),  # 20 steps: down and up again
}


def optimizer(lr: float = 0.5) -> nn.SGD:
    return nn.SGD([nn.Parameter(np.zeros(1))], lr)


def rates(schedule, steps: int) -> list[float]:
    found = [schedule.optimizer.lr]
    for _ in range(steps):
        schedule.step()
        found.append(schedule.optimizer.lr)
    return found


def their_optimizer(torch, lr: float = 0.5):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_rates_equal_pytorchs(torch, name, options):
    theirs = their_optimizer(torch)
    schedule = getattr(torch.optim.lr_scheduler, name)(theirs, **options)
    expected = [0.5]
    for _ in range(20):
        theirs.step()
        schedule.step()
        expected.append(theirs.param_groups[0]["lr"])
    # PyTorch goes from rate to rate, and so adds up rounding errors
    np.testing.assert_allclose(rates(getattr(nn, name)(optimizer(), **options), 20), expected, rtol=1e-12, atol=1e-15)


def test_the_lectures_schedule():
    """eta = eta0 * 10**(-t/n)"""
    found = rates(nn.DecadeLR(optimizer(0.1), 4), 8)
    np.testing.assert_allclose(found, 0.1 * 10.0 ** (-np.arange(9) / 4), rtol=1e-15)
    assert found[4] == pytest.approx(0.01)
    assert found[8] == pytest.approx(0.001)


PLATEAUS = {
    "default": {},
    "patience": {"patience": 2},
    "at once": {"patience": 0, "factor": 0.5},
    "cooldown": {"patience": 1, "cooldown": 3},
    "absolute": {"patience": 1, "threshold": 0.05, "threshold_mode": "abs"},
    "maximum": {"mode": "max", "patience": 1, "threshold": 0.01},
    "absolute maximum": {"mode": "max", "patience": 1, "threshold": 0.05, "threshold_mode": "abs"},
    "floor": {"patience": 0, "min_lr": 0.02},
    "small steps": {"patience": 0, "eps": 0.01},
}


@pytest.mark.parametrize("options", PLATEAUS.values(), ids=PLATEAUS)
def test_plateaus_equal_pytorchs(torch, rng, options):
    metrics = 1 + np.exp(-np.arange(60) / 5) + 0.02 * rng.random(60)
    metrics[50] = np.nan
    theirs, ours = their_optimizer(torch), optimizer()
    their_schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, **options)
    schedule = nn.ReduceLROnPlateau(ours, **options)
    for metric in metrics:
        schedule.step(metric)
        their_schedule.step(metric)
        assert ours.lr == theirs.param_groups[0]["lr"]
    assert ours.lr < 0.5


def test_a_plateau_below_zero_is_one():
    schedule = nn.ReduceLROnPlateau(optimizer(), patience=3)
    for _ in range(5):
        schedule.step(-1.0)
    assert schedule.optimizer.lr == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("name", "options"), [*CASES.values(), ("DecadeLR", {"n": 3}), ("ReduceLROnPlateau", {"patience": 1})]
)
def test_states_continue_the_same_way(name, options):
    arguments = (1.0,) if name == "ReduceLROnPlateau" else ()
    first = getattr(nn, name)(optimizer(), **options)
    for _ in range(4):
        first.step(*arguments)
    other = getattr(nn, name)(optimizer(first.optimizer.lr), **options)
    other.load_state_dict(first.state_dict())
    assert other.state_dict() == first.state_dict()
    for _ in range(4):
        first.step(*arguments)
        other.step(*arguments)
        assert other.optimizer.lr == first.optimizer.lr


def test_fit_takes_a_schedule_as_it_is(rng):
    x, y = rng.standard_normal((8, 2)), rng.standard_normal((8, 1))
    model = nn.Linear(2, 1, rng=0, dtype=np.float64)
    for make in (lambda descent: nn.StepLR(descent, 2), lambda descent: nn.ReduceLROnPlateau(descent, patience=1)):
        descent = nn.SGD(model.parameters(), 0.01)
        schedule = make(descent)
        losses = nn.fit(model, nn.MSELoss(), descent, x, y, epochs=3, after_epoch=schedule, progress=False).loss
        assert len(losses) == 3
        assert getattr(schedule, "best", losses[-1]) == min(losses)
        assert descent.lr == pytest.approx(0.001 if isinstance(schedule, nn.StepLR) else 0.01)


WRONG = {
    "optimizer": (lambda: nn.StepLR(0.1, 3), TypeError, "StepLR: optimizer must be an Optimizer, got float"),  # pyright: ignore[reportArgumentType]
    "plateau's optimizer": (lambda: nn.ReduceLROnPlateau(None), TypeError, "must be an Optimizer, got NoneType"),  # pyright: ignore[reportArgumentType]
    "step size": (lambda: nn.StepLR(optimizer(), 0), ValueError, "StepLR: step_size must be at least 1, got 0"),
    "n": (lambda: nn.DecadeLR(optimizer(), 0), ValueError, "DecadeLR: n must be positive and finite, got 0"),
    "gamma": (lambda: nn.ExponentialLR(optimizer(), float("nan")), ValueError, "ExponentialLR: gamma must be"),
    "T_max": (lambda: nn.CosineAnnealingLR(optimizer(), 2.5), TypeError, "T_max must be an int, got 2.5"),  # pyright: ignore[reportArgumentType]
    "factor": (lambda: nn.ReduceLROnPlateau(optimizer(), factor=1), ValueError, "factor must be below 1, got 1"),
    "mode": (lambda: nn.ReduceLROnPlateau(optimizer(), "least"), ValueError, "mode must be .* got 'least'"),
    "state": (
        lambda: nn.StepLR(optimizer(), 3).load_state_dict(nn.DecadeLR(optimizer(), 3).state_dict()),
        ValueError,
        "StepLR: the state has .*'n'",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
