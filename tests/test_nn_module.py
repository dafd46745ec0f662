"""Module, Parameter and Sequential: what is found, kept, saved and loaded."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest

import tilewise
from tilewise import nn


def network(rng=0) -> nn.Sequential:
    rng = np.random.default_rng(rng)
    inner = nn.Sequential(nn.Linear(4, 3, rng=rng), nn.BatchNorm1d(3))
    return nn.Sequential(nn.Linear(2, 4, rng=rng), nn.ReLU(), inner)


KEYS = ["0.weight", "0.bias", "2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias"]
BUFFERS = ["2.1.running_mean", "2.1.running_var", "2.1.num_batches_tracked"]


def test_import_loads_no_third_party_module():
    code = "import sys, tilewise.nn; print({'numpy', 'numba', 'tqdm', 'matplotlib'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_every_exported_name_is_there():
    assert {getattr(nn, name).__name__.rpartition(".")[2] for name in nn.__all__} == set(nn.__all__)
    assert set(nn.__all__) <= set(dir(nn))
    assert tilewise.nn is nn
    with pytest.raises(AttributeError, match="no attribute 'Conv3d'"):
        nn.Conv3d  # noqa: B018


def test_named_parameters_and_state_have_pytorchs_names(torch):
    model = network()
    assert [name for name, _ in model.named_parameters()] == KEYS
    theirs = torch.nn.Sequential(
        torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    )
    expected = {name: (tuple(value.shape), value.numpy().dtype) for name, value in theirs.state_dict().items()}
    assert {name: (value.shape, value.dtype) for name, value in model.state_dict().items()} == expected
    assert list(model.state_dict()) == list(expected) == KEYS + BUFFERS
    model.load_state_dict(theirs.state_dict())
    np.testing.assert_array_equal(model[0].weight.data, theirs[0].weight.detach().numpy())


def test_own_modules_find_their_parameters_in_the_order_set():
    class Twice(nn.Module):
        def __init__(self):
            self.second = nn.Linear(2, 2)
            self.scale = nn.Parameter(np.ones(1))
            self.first = self.second

        def forward(self, x):
            return self.first(x)

    model = Twice()
    assert [name for name, _ in model.named_parameters()] == ["scale", "second.weight", "second.bias"]
    assert list(model.state_dict())[:3] == ["scale", "second.weight", "second.bias"]
    with pytest.raises(NotImplementedError, match="Twice does not define backward"):
        model.backward(np.ones(1))


class TestState:
    def test_round_trip(self, rng):
        source, target = network(0), network(1)
        x = rng.standard_normal((8, 2)).astype(np.float32)
        source(x)
        arrays = [parameter.data for parameter in target.parameters()]
        assert target.load_state_dict(source.state_dict()) == ([], [])
        np.testing.assert_array_equal(target.eval()(x), source.eval()(x))
        assert all(p.data is array for p, array in zip(target.parameters(), arrays, strict=True))  # loaded in place

    def test_is_a_copy(self):
        model = network()
        state = model.state_dict()
        state["0.weight"][:] = 7
        assert (model[0].weight.data != 7).all()
        model[0].bias.data[:] = 9
        assert (state["0.bias"] != 9).all()

    def test_converts_to_the_models_dtype(self):
        model = network()
        model.load_state_dict(
            {name: value.astype(np.float64) for name, value in model.state_dict().items() if name in KEYS}, False
        )
        assert model[0].weight.dtype == np.float32

    def test_wrong_names(self):
        model = network()
        state = model.state_dict()
        state["head.weight"] = state.pop("0.weight")
        with pytest.raises(ValueError, match=r"missing \['0.weight'\], unexpected \['head.weight'\]; strict=False"):
            model.load_state_dict(state)
        assert model.load_state_dict(state, strict=False) == (["0.weight"], ["head.weight"])

    def test_wrong_shape_changes_nothing(self):
        model = network()
        before = model.state_dict()
        state = {name: value + 1 for name, value in before.items()} | {"2.0.bias": np.zeros(4)}
        with pytest.raises(ValueError, match=r"2\.0\.bias has shape \(4,\), expected \(3,\)"):
            model.load_state_dict(state)
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(value, before[name])

    def test_wrong_kind_of_number(self):
        model = network()
        with pytest.raises(TypeError, match=r"0\.bias is complex128, which does not fit float32"):
            model.load_state_dict(model.state_dict() | {"0.bias": np.zeros(4, complex)})


class TestBackward:
    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("Linear", (2, 2)),
            ("Conv2d", (1, 1, 1)),
            ("MaxPool2d", (2,)),
            ("AvgPool2d", (2,)),
            ("AdaptiveAvgPool2d", (1,)),
        ]
        + [("BatchNorm1d", (2,)), ("BatchNorm2d", (2,))]
        + [(name, ()) for name in ("Flatten", "Dropout", "ReLU", "LeakyReLU", "Sigmoid", "Tanh", "Softmax")],
    )
    def test_needs_a_forward(self, name, arguments):
        layer = getattr(nn, name)(*arguments)
        with pytest.raises(RuntimeError, match=rf"{name}\.backward: nothing to go back from; call forward in training"):
            layer.backward(np.ones((2, 2), np.float32))

    def test_after_evaluation_goes_back_from_the_last_training_forward(self, rng):
        layer = nn.Linear(2, 3, rng=0)
        x, grad = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 2), (4, 3)))
        layer(x)
        layer.eval()(np.zeros((9, 2), np.float32))  # a validation in between
        layer.train().backward(grad)
        np.testing.assert_allclose(layer.weight.grad, grad.T @ x, rtol=1e-5)

    def test_one_backward_for_one_forward(self):
        shared = nn.ReLU()
        model = nn.Sequential(shared, nn.Linear(2, 2), shared)
        model(np.ones((4, 2), np.float32))
        with pytest.raises(RuntimeError, match="each backward uses up one forward"):
            model.backward(np.ones((4, 2), np.float32))

    def test_gradients_add_up_until_zero_grad(self, rng):
        layer = nn.Linear(3, 2, rng=0)
        x, grad = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 3), (5, 2)))
        for _ in range(2):
            layer(x)
            layer.backward(grad)
        np.testing.assert_allclose(layer.weight.grad, 2 * grad.T @ x, rtol=1e-5)
        layer.zero_grad()
        assert layer.weight.grad is None

    def test_of_parameters_only_gives_the_same_gradients(self, rng):
        x, grad = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 2), (5, 3)))
        whole, part = network(), network()
        for model, backward in ((whole, whole.backward), (part, part.backward_parameters)):
            model(x)
            backward(grad)
        for one, other in zip(whole.parameters(), part.parameters(), strict=True):
            np.testing.assert_array_equal(one.grad, other.grad)

    def test_asks_only_for_what_is_needed(self, rng):
        asked = []

        class Watched(nn.Linear):
            def gradients(self, grad, x, needs):
                asked.append(needs)
                return super().gradients(grad, x, needs)

        layer = Watched(2, 3)
        x, grad = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 2), (5, 3)))
        for backward in (layer.backward, layer.backward_parameters):
            layer(x)
            backward(grad)
        layer.weight.requires_grad = False
        layer(x)
        layer.backward(grad)
        layer.bias.requires_grad = False
        layer(x)
        layer.backward_parameters(grad)
        assert asked == [("x", "weight", "bias"), ("weight", "bias"), ("x", "bias")]
        assert [gradient is None for gradient in layer.gradients(grad, x, ("x",))] == [False, True, True]
        image = np.ones((2, 1, 4, 4), np.float32)
        assert [gradient is None for gradient in nn.Conv2d(1, 1, 1).gradients(image, image, ("weight",))] == [
            True,
            False,
            True,
        ]

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_frozen_parameters_get_no_gradient(self, rng, name):
        x = rng.standard_normal((5, 3)).astype(np.float32)
        for layer in (nn.Linear(3, 3), nn.BatchNorm1d(3)):
            getattr(layer, name).requires_grad = False
            layer(x)
            layer.backward(x)
            assert {n for n, parameter in layer.named_parameters() if parameter.grad is None} == {name}

    def test_frozen_layers_get_no_gradient_and_are_not_gone_through(self, rng):
        x, grad = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 2), (5, 3)))
        model = network()
        for parameter in model[0].parameters():
            parameter.requires_grad = False
        model(x)
        model.backward_parameters(grad)
        assert [parameter.grad is None for parameter in model.parameters()] == [True, True, False, False, False, False]
        model[0].backward(np.ones((5, 4), np.float32))  # what its forward kept is still there
        assert model[0].weight.grad is None
        for parameter in model.parameters():
            parameter.requires_grad = False
        model(x)
        model.backward_parameters(grad)


class TestSequential:
    def test_names_positions_and_slices(self):
        model = network()
        assert len(model) == 3
        assert model[-1] is list(model)[2]
        assert list(model[1:].state_dict()) == [name for name in KEYS + BUFFERS if name.startswith("2.")]
        named = nn.Sequential({"hidden": nn.Linear(2, 3), "head": nn.Linear(3, 1)})
        assert list(named.state_dict()) == ["hidden.weight", "hidden.bias", "head.weight", "head.bias"]

    def test_of_something_else(self):
        with pytest.raises(TypeError, match="Sequential: '1' must be a Module, got ufunc"):
            nn.Sequential(nn.ReLU(), np.tanh)

    def test_repr_shows_the_layers(self):
        text = repr(
            nn.Sequential(nn.Conv2d(1, 6, 5, padding="same", bias=False), nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
        )
        assert text == (
            "Sequential(\n"
            "  (0): Conv2d(1, 6, kernel_size=(5, 5), padding='same', bias=False)\n"
            "  (1): Sequential(\n"
            "    (0): Linear(2, 3)\n"
            "    (1): ReLU()\n"
            "  )\n"
            ")"
        )


def test_modes_reach_every_module():
    model = network()
    assert model.eval() is model
    assert not any(module.training for _, module in model.modules())
    assert all(module.training for _, module in model.train().modules())


def test_copies_and_pickles_go_without_what_forward_kept(rng):
    model = network()
    x = rng.standard_normal((4, 2)).astype(np.float32)
    model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match="call forward in training mode first"):
            other.backward(np.ones((4, 3), np.float32))
        np.testing.assert_array_equal(other.eval()(x), copy.deepcopy(model).eval()(x))
