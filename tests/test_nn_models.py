"""LeNet-5: its size, and that it computes and learns what PyTorch's layers compute and learn."""

import numpy as np
import pytest
from tolerances import assert_close

from tilewise import nn

ACTIVATIONS = {"relu": "ReLU", "tanh": "Tanh"}
POOLS = {"max": "MaxPool2d", "avg": "AvgPool2d"}


def torch_lenet(torch, activation: str, pool: str):
    layers, act, window = torch.nn, ACTIVATIONS[activation], POOLS[pool]
    convolutions = [
        *(layers.Conv2d(1, 6, 5), getattr(layers, act)(), getattr(layers, window)(2)),
        *(layers.Conv2d(6, 16, 5), getattr(layers, act)(), getattr(layers, window)(2)),
    ]
    dense = [layers.Linear(400, 120), getattr(layers, act)(), layers.Linear(120, 84), getattr(layers, act)()]
    return layers.Sequential(*convolutions, layers.Flatten(), *dense, layers.Linear(84, 10)).double()


@pytest.mark.parametrize(("activation", "pool"), [("relu", "max"), ("tanh", "avg")])
def test_lenet_trains_as_pytorchs_does(torch, rng, activation, pool):
    """Five steps of Adam in float64: the same losses and the same weights."""
    ours, theirs = (
        nn.models.lenet5(activation=activation, pool=pool, rng=0, dtype=np.float64),
        torch_lenet(torch, activation, pool),
    )
    theirs.load_state_dict({name: torch.tensor(value) for name, value in ours.state_dict().items()})
    x, y = rng.standard_normal((6, 1, 32, 32)), rng.integers(0, 10, 6)
    loss, optimizer = nn.CrossEntropyLoss(), nn.Adam(ours.parameters(), 1e-3)
    their_loss, their_optimizer = torch.nn.CrossEntropyLoss(), torch.optim.Adam(theirs.parameters(), 1e-3)
    for _ in range(5):
        value, expected = loss(ours(x), y), their_loss(theirs(torch.tensor(x)), torch.tensor(y))
        assert value == pytest.approx(expected.item(), rel=1e-9)
        optimizer.zero_grad()
        ours.backward_parameters(loss.backward())
        optimizer.step()
        their_optimizer.zero_grad()
        expected.backward()
        their_optimizer.step()
    for name, value in theirs.state_dict().items():
        # Adam divides by the root of tiny squares: 1e6 terms allow for what that magnifies.
        assert_close(ours.state_dict()[name], value.numpy(), 10**6)


def test_lenet_has_61706_parameters():
    model = nn.models.lenet5()
    assert sum(parameter.size for parameter in model.parameters()) == 61706
    assert model.eval()(np.zeros((2, 1, 32, 32), np.float32)).shape == (2, 10)
    assert nn.models.lenet5(5, 3).eval()(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 5)


def test_lenet_with_dropout():
    layers = [type(layer).__name__ for layer in nn.models.lenet5(dropout=0.5)]
    assert layers[6:9] == ["Flatten", "Dropout", "Linear"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "sigmoid"}, "lenet5: activation must be one of relu, tanh, got 'sigmoid'"),
        ({"pool": "median"}, "lenet5: pool must be one of max, avg, got 'median'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        nn.models.lenet5(**options)
