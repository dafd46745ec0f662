"""summary and gradient_norms: the numbers, the table, and that the model is left as it was."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import tilewise
from tilewise import nn
from tilewise.nn.nonfinite import nonfinite_loss


@pytest.fixture(autouse=True)
def reference():
    """The NumPy kernels: what is tested here has no kernels of its own."""
    with tilewise.using(backend="reference"):
        yield


def network() -> nn.Sequential:
    branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4))
    return nn.Sequential(
        {"conv": nn.Conv2d(3, 4, 3, rng=0), "block": nn.Residual(branch), "flat": nn.Flatten(), "fc": nn.Linear(64, 5)}
    )


TABLE = """
layer         kind         output        parameters  MFLOP  output MB
---------------------------------------------------------------------
conv          Conv2d       (2, 4, 4, 4)         112   0.01      0.001
block.main.0  Conv2d       (2, 4, 4, 4)          72   0.00      0.001
block.main.1  BatchNorm2d  (2, 4, 4, 4)           8   0.00      0.001
flat          Flatten      (2, 64)                0   0.00      0.001
fc            Linear       (2, 5)               325   0.00      0.000
---------------------------------------------------------------------
517 parameters (112 of them frozen), 0.00 MB with buffers; one forward: 0.000 GFLOP, 0.00 MB of outputs
"""


def test_the_numbers():
    model = network()
    model.conv.requires_grad_(False)
    found = nn.summary(model, (2, 3, 6, 6))
    assert str(found) == TABLE.strip()
    assert (found.parameters, found.trained, found.frozen) == (517, 405, 112)
    assert [layer.flops for layer in found.layers] == [128 * (2 * 27 + 1), 128 * 2 * 18, 0, 0, 10 * (2 * 64 + 1)]
    assert found.flops == sum(layer.flops for layer in found.layers)
    assert found.output_bytes == 4 * (4 * 128 + 10)
    assert found.state_bytes == 4 * (517 + 8) + 8


@pytest.mark.parametrize(
    ("build", "shape", "multiply_adds"),
    [(nn.models.resnet18, (1, 3, 224, 224), 1_814_073_344), (nn.models.mobilenet_v2, (1, 3, 224, 224), 300_774_272)],
    ids=["resnet18", "mobilenet_v2"],
)
def test_known_networks(build, shape, multiply_adds):
    """The counts of multiply-adds that are published for these networks at 224 pixels, without biases."""
    model = build(init="zeros", dtype=np.float32)
    found = nn.summary(model, shape)
    assert found.flops == 2 * multiply_adds + 1000
    assert found.parameters == sum(parameter.size for parameter in model.parameters())
    assert found.layers[-1].output_shape == (1, 1000)


def test_the_model_is_left_as_it_was(rng):
    model = network()
    model.conv.eval()
    x, before = rng.standard_normal((2, 3, 6, 6)).astype(np.float32), model.state_dict()
    model(x)
    attributes = [set(vars(module)) for _, module in model.modules()]
    nn.summary(model, x.shape)
    with pytest.raises(ValueError, match="channels"):
        nn.summary(model, (2, 4, 6, 6))
    assert [set(vars(module)) - {"_prepared"} for _, module in model.modules()] == [
        a - {"_prepared"} for a in attributes
    ]
    assert [name for name, module in model.modules() if not module.training] == ["conv"]
    assert all(module._prepared is None for _, module in model.modules() if isinstance(module, nn.Conv2d))
    model.fc.backward(np.ones((2, 5), np.float32))  # what forward kept is still there
    for name, value in model.state_dict().items():
        if "running" not in name and "num" not in name:
            np.testing.assert_array_equal(value, before[name])
    assert model.block.main[1].num_batches_tracked == 1


def test_modules_that_are_equal_and_have_no_hash():
    @dataclass
    class Scale(nn.Module):
        factor: float = 2.0

        def forward(self, x):
            return x * x.dtype.type(self.factor)

    model = nn.Sequential(Scale(), Scale())
    assert [layer.output_shape for layer in nn.summary(model, (2, 3)).layers] == [(2, 3), (2, 3)]
    assert nonfinite_loss(nn.Sequential(Scale(), Scale(np.inf)), nn.MSELoss(), *np.ones((2, 1, 3)))[1] == "1"


def test_submodules_called_by_name_and_without_an_argument():
    class Scale(nn.Module):
        def forward(self, *nothing: Any, **at_all: Any):
            return np.full((1, 4), self.value, np.float32)

        def __call__(self, *nothing: Any, **at_all: Any):
            return self.forward()

    class Whole(nn.Module):
        def __init__(self, value=1.0):
            self.recurrent, self.scale = nn.LSTM(4, 3), Scale()
            self.scale.value = value

        def forward(self, x):
            return self.recurrent.forward(state=None, x=x * self.scale())[0]

    by_name, plain = nn.summary(Whole(), (5, 2, 4)).layers, nn.summary(nn.LSTM(4, 3), (5, 2, 4)).layers
    assert [(layer.kind, layer.output_shape, layer.flops) for layer in by_name] == [
        ("LSTM", (5, 2, 3), plain[0].flops),
        ("Scale", (1, 4), 0),
    ]
    cause, layer = nonfinite_loss(Whole(np.inf), nn.MSELoss(), np.ones((5, 2, 4), np.float32), np.ones(1))
    assert (cause.endswith("layer scale (Scale), called without an x"), layer) == (True, "scale")


def test_a_forward_that_a_module_was_given_is_kept():
    class Named(nn.Module):
        def __init__(self):
            self.layer = nn.ReLU()

        def forward(self, x):
            return self.layer.forward(x=x)

    model = nn.Sequential(nn.ReLU(), Named())
    own = vars(model[0])["forward"] = np.zeros_like
    assert [layer.output_shape for layer in nn.summary(model, (2, 3)).layers] == [(2, 3), (2, 3)]
    assert vars(model[0])["forward"] is own


def test_single_layers_shared_layers_and_other_dtypes():
    assert [layer.name for layer in nn.summary(nn.ReLU(), (2, 3)).layers] == ["(model)"]
    shared = nn.Linear(3, 3, bias=False, dtype=np.float64)
    (layer,) = nn.summary(nn.Sequential(nn.Sequential(shared), shared), (4, 3)).layers
    assert (layer.name, layer.parameters, layer.flops) == ("0.0", 9, 2 * 2 * 4 * 9)  # both calls
    assert nn.summary(nn.ReLU(), (2, 3), dtype=np.float16).output_bytes == 12


def test_rich_shows_the_same_table():
    rich = pytest.importorskip("rich.console", reason="rich is not installed (extra: bench)")
    console = rich.Console(width=120, record=True, file=io.StringIO())
    found = nn.summary(network(), (2, 3, 6, 6))
    console.print(found)
    text = console.export_text()
    for layer in found.layers:
        assert all(cell in text for cell in layer.cells())


class TestGradientNorms:
    def test_are_those_of_the_gradients(self, rng):
        model = network()
        with pytest.raises(
            RuntimeError, match="gradient_norms: no parameter has a gradient; call forward and backward"
        ):
            nn.gradient_norms(model)
        model.block.requires_grad_(False)
        model(rng.standard_normal((2, 3, 6, 6)).astype(np.float32))
        model.backward(np.ones((2, 5), np.float32))
        norms = nn.gradient_norms(model)
        assert list(norms) == ["conv.weight", "conv.bias", "fc.weight", "fc.bias"]
        assert norms["fc.bias"] == pytest.approx(20**0.5)
        assert norms["conv.weight"] == pytest.approx(np.sqrt((model.conv.weight.grad.astype(float) ** 2).sum()))

    def test_show_that_they_vanish_in_deep_sigmoid_networks(self, rng):
        """The lectures' ten sigmoid layers: each divides the gradient by four at least; ReLU keeps it."""
        x, first = rng.standard_normal((16, 8)).astype(np.float32), {}
        for activation in ("sigmoid", "relu"):
            model = nn.models.mlp([8] * 11, activation=activation, init="he_normal", rng=0)
            model(x)
            model.backward(np.ones((16, 8), np.float32))
            norms = nn.gradient_norms(model)
            first[activation] = norms["0.weight"] / list(norms.values())[-1]
        assert first["sigmoid"] < 1e-3 * first["relu"]

    def test_as_a_picture(self, rng, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: plot)")
        model = nn.models.mlp([3, 4, 2], rng=0)
        model(rng.standard_normal((5, 3)).astype(np.float32))
        model.backward(np.ones((5, 2), np.float32))
        nn.plot_gradient_norms(model, tmp_path / "norms.svg")
        assert "<!-- 3.weight -->" in (tmp_path / "norms.svg").read_text()


def test_wrong_calls():
    with pytest.raises(TypeError, match="summary: model must be a Module, got list"):
        nn.summary([], (1, 3))
