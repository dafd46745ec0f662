"""Transfer learning: layers frozen by name, heads replaced, and what backward and optimisers make of it."""

import numpy as np
import pytest

import tilewise
from tilewise import nn


@pytest.fixture(autouse=True)
def reference():
    """The NumPy kernels: what is tested here is the modules' own."""
    with tilewise.using(backend="reference"):
        yield


def network() -> nn.Sequential:
    features = nn.Sequential(nn.Conv2d(1, 4, 3, rng=0), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    return nn.Sequential({"features": features, "hidden": nn.Linear(16, 6, rng=1), "fc": nn.Linear(6, 3, rng=2)})


NAMES = [name for name, _ in network().named_parameters()]


def frozen(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


@pytest.mark.parametrize(
    ("patterns", "expected", "statistics"),
    [
        ((), NAMES, True),
        (("features",), [name for name in NAMES if name.startswith("features.")], True),
        (("features.*",), [name for name in NAMES if name.startswith("features.")], True),
        (("features.0", "fc"), ["features.0.weight", "features.0.bias", "fc.weight", "fc.bias"], False),
        (("features.1",), ["features.1.weight", "features.1.bias"], True),
        (("*.bias",), [name for name in NAMES if name.endswith(".bias")], False),
        (("hidden.weight",), ["hidden.weight"], False),
        (("f*.weight",), ["features.0.weight", "features.1.weight", "fc.weight"], False),
    ],
    ids=str,
)
def test_freeze_and_unfreeze_by_name(patterns, expected, statistics):
    model = network()
    for parameter in model.parameters():
        parameter.grad = np.ones_like(parameter.data)
    assert model.freeze(*patterns) is model
    assert frozen(model) == expected
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == expected
    assert model.features[1].frozen == statistics
    assert model.unfreeze(*patterns) is model
    assert frozen(model) == []
    assert not model.features[1].frozen


def test_a_pattern_that_fits_nothing_changes_nothing():
    model = network()
    with pytest.raises(
        ValueError, match=r"freeze: 'layer\*' fits no module or parameter; the modules are features, hid"
    ):
        model.freeze("features", "layer*")
    assert frozen(model) == []


def test_requires_grad_as_in_pytorch():
    model = network()
    assert model.requires_grad_(False) is model
    assert frozen(model) == NAMES
    assert not model.features[1].frozen
    model.fc.requires_grad_()
    assert frozen(model) == NAMES[:-2]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: nn.SGD(p, 0.1, 0.9, weight_decay=0.1),
        lambda p: nn.Adam(p, 0.1, weight_decay=0.1),
        lambda p: nn.AdamW(p, 0.1),
    ],
)
def test_only_what_is_not_frozen_learns(rng, optimizer):
    """A step before freezing, so that there is momentum; then three after it, of which frozen layers see nothing."""
    model, loss = network(), nn.CrossEntropyLoss()
    x, y = rng.standard_normal((8, 1, 4, 4)).astype(np.float32), rng.integers(0, 3, 8)
    trained = optimizer(model.parameters())

    def step():
        loss(model(x), y)
        model.backward_parameters(loss.backward())
        trained.step()

    step()
    model.freeze("features", "hidden.bias")
    before = model.state_dict()
    for _ in range(3):
        step()
        trained.zero_grad()
    after = model.state_dict()
    changed = [name for name in before if (before[name] != after[name]).any()]
    assert changed == ["hidden.weight", "fc.weight", "fc.bias"]
    model.unfreeze()
    step()
    assert all((model.state_dict()[name] != after[name]).any() for name in after)


def test_a_head_for_other_classes_learns_on_frozen_features(rng):
    """As the lecture has it: load, freeze, replace the head, fine-tune."""
    x = rng.standard_normal((24, 1, 4, 4)).astype(np.float32)
    y = (x[:, 0, 1, 1] > 0).astype(np.int64)
    model = network()
    model.load_state_dict(network().state_dict())
    model.freeze().fc = nn.Linear(6, 2, rng=3)
    before = model.state_dict()
    history = nn.fit(
        model, nn.CrossEntropyLoss(), nn.Adam(model.parameters(), 0.05), x, y, epochs=30, rng=0, progress=False
    )
    assert history.loss[-1] < 0.8 * history.loss[0]
    changed = [name for name, value in model.state_dict().items() if (value != before[name]).any()]
    assert changed == ["fc.weight", "fc.bias"]


class TestSubmodules:
    def test_are_found_and_replaced_by_their_dotted_names(self):
        model = nn.models.resnet18(4, width=2, init="zeros")
        assert model.get_submodule("") is model
        assert model.get_submodule("layer2.0.downsample.0") is model.layer2[0].downsample[0]
        block, conv = nn.Residual(nn.ReLU()), nn.Conv2d(2, 2, 1, rng=0)
        model.set_submodule("layer1.1", block)
        model.set_submodule("layer1.1.main", conv)
        model.set_submodule("layer1.0.conv2", conv)
        assert model.layer1[1] is block
        assert block.main is conv
        assert model.layer1[0].conv2 is conv
        assert "layer1.1.main.weight" in model.state_dict()

    def test_that_are_not_there(self):
        model = network()
        with pytest.raises(AttributeError, match=r"Sequential has no module '9' \('features\.9'\); it has 0, 1, 2, 3"):
            model.get_submodule("features.9")
        with pytest.raises(AttributeError, match="Sequential has no module 'head'"):
            model.set_submodule("head", nn.ReLU())
        with pytest.raises(TypeError, match="set_submodule: 'fc' must be a Module, got NoneType"):
            model.set_submodule("fc", None)
        with pytest.raises(ValueError, match="set_submodule: name must not be empty"):
            model.set_submodule("", nn.ReLU())
