"""Optimisers against PyTorch's over several steps, the lectures' claims about them, and their state."""

import numpy as np
import pytest
from tolerances import assert_close

from tilewise import nn

CASES = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd with weight decay": ("SGD", {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.2}),
    "adam": ("Adam", {}),
    "adagrad": ("Adagrad", {}),
    "adagrad with everything": ("Adagrad", {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.1}),
    "rmsprop": ("RMSprop", {}),
    "rmsprop with everything": (
        "RMSprop",
        {"lr": 0.05, "alpha": 0.8, "eps": 1e-3, "weight_decay": 0.1, "momentum": 0.5},
    ),
    "adamw": ("AdamW", {}),
    "adamw with everything": ("AdamW", {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}),
    "adam with everything": ("Adam", {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_steps_equal_pytorchs(torch, rng, name, options, dtype):
    shapes = [(4, 3), (5,)]
    ours = [nn.Parameter(rng.standard_normal(shape).astype(dtype)) for shape in shapes]
    theirs = [torch.tensor(parameter.data.copy(), requires_grad=True) for parameter in ours]
    optimizer, expected = getattr(nn, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)
    for step in range(8):
        for parameter, tensor in zip(ours, theirs, strict=True):
            skipped = step == 3 and parameter is ours[1]  # a parameter that got no gradient this time
            gradient = rng.standard_normal(parameter.shape).astype(dtype)
            parameter.grad = None if skipped else gradient.copy()
            tensor.grad = None if skipped else torch.tensor(gradient)
        optimizer.step()
        expected.step()
    for parameter, tensor in zip(ours, theirs, strict=True):
        assert parameter.dtype == dtype
        assert_close(parameter.data, tensor.detach().numpy(), 16)


def test_step_leaves_the_gradient_alone(rng):
    gradient = rng.standard_normal(6)
    for name, options in CASES.values():
        parameter = nn.Parameter(rng.standard_normal(6))
        optimizer = getattr(nn, name)([parameter], **options)
        for _ in range(2):
            parameter.grad = gradient.copy()
            optimizer.step()
            np.testing.assert_array_equal(parameter.grad, gradient)


def steps_under_constant_gradient(count: int, **options) -> np.ndarray:
    parameter = nn.Parameter(np.zeros(1))
    optimizer = nn.SGD([parameter], lr=0.01, **options)
    positions = [0.0]
    for _ in range(count):
        parameter.grad = np.ones(1)
        optimizer.step()
        positions.append(float(parameter.data[0]))
    return np.diff(positions)


def test_momentum_approaches_ten_times_the_plain_step():
    plain = steps_under_constant_gradient(1)[0]
    steps = steps_under_constant_gradient(100, momentum=0.9)
    assert plain == pytest.approx(-0.01)
    np.testing.assert_allclose(steps / plain, (1 - 0.9 ** np.arange(1, 101)) * 10)
    assert steps[-1] / plain == pytest.approx(10, rel=1e-4)


def test_adams_first_step_is_lr_whatever_the_gradient():
    for gradient in (1e-4, 1.0, 1e4):
        parameter = nn.Parameter(np.zeros(1))
        parameter.grad = np.full(1, gradient)
        nn.Adam([parameter], lr=0.02).step()
        assert parameter.data[0] == pytest.approx(-0.02, rel=1e-3)


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_state_round_trip_continues_the_same_way(rng, name, options):
    gradients = rng.standard_normal((6, 4))

    def walk(parameter, optimizer, some):
        for gradient in some:
            parameter.grad = gradient.copy()
            optimizer.step()

    first = nn.Parameter(np.zeros(4))
    optimizer = getattr(nn, name)([first], **options)
    walk(first, optimizer, gradients[:3])
    state, second = optimizer.state_dict(), nn.Parameter(first.data.copy())
    walk(first, optimizer, gradients[3:])
    other = getattr(nn, name)([second], lr=123.0)
    other.load_state_dict(state)
    walk(second, other, gradients[3:])
    np.testing.assert_array_equal(first.data, second.data)


def test_learning_rate_may_be_changed_between_steps():
    parameter = nn.Parameter(np.zeros(1))
    optimizer = nn.SGD([parameter], lr=1.0)
    for lr in (1.0, 0.5):
        optimizer.lr = lr
        parameter.grad = np.ones(1)
        optimizer.step()
    assert parameter.data[0] == -1.5
    optimizer.zero_grad()
    assert parameter.grad is None


def read_only(optimizer):
    optimizer.parameters[1].data.flags.writeable = False


def lr_nan(optimizer):
    optimizer.lr = float("nan")


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [(read_only, r"parameter 1 \(2,\) is read-only"), (lr_nan, "lr must be at least 0, got nan")],
    ids=["read-only", "lr"],
)
def test_a_step_that_cannot_be_made_changes_nothing(name, spoil, message):
    parameters = [nn.Parameter(np.ones(2)) for _ in range(2)]
    optimizer = getattr(nn, name)(parameters)
    for parameter in parameters:
        parameter.grad = np.ones(2)
    optimizer.step()
    data, state = [p.data.copy() for p in parameters], optimizer.state_dict()
    spoil(optimizer)
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        optimizer.step()
    np.testing.assert_equal([p.data for p in parameters], data)
    np.testing.assert_equal(optimizer.state_dict()["state"], state["state"])
    assert [p.version for p in parameters] == [1, 1]


def test_a_frozen_parameter_may_be_read_only():
    trained, frozen = nn.Parameter(np.ones(2)), nn.Parameter(np.ones(2))
    optimizer, trained.grad = nn.SGD([trained, frozen], 0.5), np.ones(2)
    read_only(optimizer)
    optimizer.step()
    assert trained.data.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_an_update_that_is_refused_is_no_step_of_adam(name):
    parameter = nn.Parameter(np.ones(2))
    optimizer, parameter.grad = getattr(nn, name)([parameter]), np.ones(3)
    with pytest.raises(ValueError, match="grad must have param's shape"):
        optimizer.step()
    assert optimizer.state[0]["step"] == 0


ONE = nn.Parameter(np.zeros(2))
WRONG = {
    "nothing": (lambda: nn.SGD([], 0.1), ValueError, "SGD: there are no parameters"),
    "arrays": (lambda: nn.Adam([np.zeros(2)]), TypeError, "Adam: parameters must be of class Parameter, got ndarray"),
    "twice": (lambda: nn.SGD([ONE, ONE], 0.1), ValueError, "a parameter appears twice"),
    "lr": (lambda: nn.SGD([ONE], -0.1), ValueError, r"SGD: lr must be at least 0, got -0\.1"),
    "lr nan": (lambda: nn.SGD([ONE], float("nan")), ValueError, "SGD: lr must be at least 0, got nan"),
    "nesterov": (lambda: nn.SGD([ONE], 0.1, nesterov=True), ValueError, "nesterov needs a momentum above 0"),
    "beta": (lambda: nn.Adam([ONE], betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be at least 0 and below 1, got 1"),
    "betas": (lambda: nn.Adam([ONE], betas=(0.9,)), ValueError, "betas must be a pair"),
    "other kind": (
        lambda: nn.SGD([ONE]).load_state_dict(nn.Adam([ONE]).state_dict()),
        ValueError,
        "SGD: the state has options .*betas",
    ),
    "adam's": (
        lambda: nn.AdamW([ONE]).load_state_dict(nn.Adam([ONE]).state_dict()),
        ValueError,
        "AdamW: the state has options",
    ),
    "other count": (
        lambda: nn.SGD([ONE]).load_state_dict(nn.SGD([ONE, nn.Parameter(np.zeros(1))]).state_dict()),
        ValueError,
        "the state is of 2 parameters, not 1",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (np.zeros(3), ValueError, r"has shape \(3,\), expected \(2,\)"),
        (np.zeros(2, np.float32), TypeError, "is float32, expected float64"),
    ],
)
def test_state_of_other_parameters(values, error, message):
    other = nn.Parameter(values)
    other.grad = np.ones_like(values)
    optimizer = nn.Adam([other])
    optimizer.step()
    with pytest.raises(error, match=f"Adam: mean of parameter 0 {message}"):
        nn.Adam([ONE]).load_state_dict(optimizer.state_dict())
