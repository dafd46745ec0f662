"""Sequential, Residual and Concat: results, gradients, names, and what frozen branches cost."""

import copy
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
from gradcheck import assert_gradient, numerical_gradient
from tolerances import assert_close

import tilewise
from tilewise import nn
from tilewise.nn.module import described

DOUBLE = {"dtype": np.float64}


@pytest.fixture(autouse=True)
def reference():
    """The NumPy kernels: what is tested here is the containers' own."""
    with tilewise.using(backend="reference"):
        yield


def conv(*sizes: int, rng, **options) -> nn.Conv2d:
    return nn.Conv2d(*sizes, rng=rng, **DOUBLE, **options)


def residual(rng, projected: bool = True, channels: int = 4) -> nn.Residual:
    """A block of ResNet whose main branch ends in Tanh, which keeps its result."""
    main = nn.Sequential(conv(3, channels, 3, rng=rng, padding=1), nn.BatchNorm2d(channels, **DOUBLE), nn.Tanh())
    return nn.Residual(main, conv(3, channels, 1, rng=rng) if projected else None, nn.Sigmoid())


def concat(rng) -> nn.Concat:
    """A block of GoogLeNet; the middle branch gives back what it got."""
    return nn.Concat(
        conv(3, 2, 1, rng=rng), nn.Sequential(), nn.Sequential(conv(3, 5, 3, rng=rng, padding=1), nn.Tanh())
    )


BUILDERS = {
    "projected": residual,
    "identity": lambda rng: residual(rng, False, 3),
    "without activation": lambda rng: nn.Residual(conv(3, 3, 1, rng=rng)),
    "concat": concat,
    "nested": lambda rng: nn.Residual(nn.Sequential(concat(rng), conv(10, 3, 1, rng=rng)), None, nn.Tanh()),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_gradients_are_the_numerical_ones(rng, build):
    module, x = build(rng), rng.standard_normal((2, 3, 4, 3))
    cotangent = rng.standard_normal(module(x).shape)
    given = cotangent.copy()
    assert_gradient(module.backward(cotangent), numerical_gradient(module.forward, x, cotangent))
    np.testing.assert_array_equal(cotangent, given)
    for name, parameter in module.named_parameters():
        values = parameter.data

        def output(changed, parameter=parameter):
            parameter.data = changed
            return module.forward(x)

        expected = numerical_gradient(output, values, cotangent)
        parameter.data = values
        assert parameter.grad is not None, name
        assert_gradient(parameter.grad, expected)


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_backward_of_parameters_only_gives_the_same_gradients(rng, build):
    module, x = build(rng), rng.standard_normal((2, 3, 4, 3))
    other = copy.deepcopy(module)
    cotangent = rng.standard_normal(module(x).shape)
    module.backward(cotangent)
    other(x)
    other.backward_parameters(cotangent)
    for mine, expected in zip(other.parameters(), module.parameters(), strict=True):
        np.testing.assert_array_equal(mine.grad, expected.grad)


def test_residual_equals_pytorchs_sum(torch, rng):
    ours, layers = residual(rng).eval(), torch.nn
    main = layers.Sequential(layers.Conv2d(3, 4, 3, padding=1), layers.BatchNorm2d(4), layers.Tanh()).double().eval()
    shortcut = layers.Conv2d(3, 4, 1).double()
    for module, theirs in ((ours.main, main), (ours.shortcut, shortcut)):
        theirs.load_state_dict({name: torch.tensor(value) for name, value in module.state_dict().items()})
    x = rng.standard_normal((2, 3, 5, 4))
    expected = torch.sigmoid(main(torch.tensor(x)) + shortcut(torch.tensor(x)))
    assert_close(ours(x), expected.detach().numpy(), 27)


def test_concat_joins_channels_in_both_layouts(rng):
    x = rng.standard_normal((2, 3, 4, 4))
    usual, pools = nn.Concat(nn.ReLU(), nn.Sequential(), nn.Tanh()), (0, 2, 3, 1)
    y = usual(x)
    np.testing.assert_array_equal(y, np.concatenate([np.maximum(x, 0), x, y[:, 6:]], 1))
    other = nn.Concat(nn.ReLU(), nn.Sequential(), nn.Tanh(), axis=-1)
    np.testing.assert_array_equal(other(x.transpose(pools)), y.transpose(pools))
    cotangent = rng.standard_normal(y.shape)
    expected = usual.backward(cotangent)
    np.testing.assert_array_equal(other.backward(cotangent.transpose(pools)), expected.transpose(pools))
    assert other[1:].axis == -1
    assert len(other[1:]) == 2


def test_frozen_branches_are_not_gone_through(rng):
    x = rng.standard_normal((2, 3, 4, 3))
    for module, frozen, learning in (
        ((m := residual(rng)), m.main, m.shortcut),
        ((m := residual(rng)), m.shortcut, m.main),
        ((m := concat(rng)), m[0], m[2]),
    ):
        for parameter in frozen.parameters():
            parameter.requires_grad = False
        y = module(x)
        module.backward_parameters(np.ones_like(y))
        assert all(parameter.grad is not None for parameter in learning.parameters())
        assert all(parameter.grad is None for parameter in frozen.parameters())
        frozen.backward(np.ones_like(y[:, : 4 if isinstance(module, nn.Residual) else 2]))  # still there: not used up


class TestNames:
    def test_of_residual_and_concat(self, rng):
        assert list(residual(rng).state_dict())[:3] == ["main.0.weight", "main.0.bias", "main.1.weight"]
        assert list(residual(rng).state_dict())[-2:] == ["shortcut.weight", "shortcut.bias"]
        named = nn.Concat({"left": conv(3, 2, 1, rng=rng), "right": nn.ReLU()})
        assert list(named.state_dict()) == ["left.weight", "left.bias"]

    def test_are_attributes(self):
        head = nn.Linear(3, 4)
        model = nn.Sequential({"hidden": nn.Linear(2, 3), "fc": nn.Linear(3, 1)})
        assert model.fc is model[1]
        model.fc = head
        assert model[1] is head
        assert dict(model.children())["fc"] is head
        model[0] = nn.Linear(5, 3)
        assert model.hidden.in_features == 5
        assert model(np.ones((1, 5), np.float32)).shape == (1, 4)
        with pytest.raises(TypeError, match="Sequential: 'fc' must be a Module, got int"):
            model.fc = 3
        with pytest.raises(AttributeError, match="'Sequential' object has no attribute 'head'"):
            model.head  # noqa: B018

    def test_survive_copies_and_pickles(self):
        model = nn.Sequential({"fc": nn.Linear(3, 1)})
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.fc is other[0]
            assert other.fc is not model.fc

    @pytest.mark.parametrize("name", ["forward", "training", "a.b", ""])
    def test_that_cannot_be(self, name):
        with pytest.raises(ValueError, match=rf"Sequential: a module cannot have the name '{name}'"):
            nn.Sequential({name: nn.ReLU()})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: nn.Residual(np.tanh), TypeError, "Residual: main must be a Module, got ufunc"),
        (lambda x: nn.Residual(nn.ReLU(), 1), TypeError, "Residual: shortcut must be a Module, got int"),
        (lambda x: nn.Concat(), ValueError, "Concat: there must be at least one branch"),
        (
            lambda x: nn.Residual(nn.AvgPool2d(2))(x),
            ValueError,
            r"Residual: main gives shape \(1, 3, 2, 2\), the shortcut \(1, 3, 4, 4\)",
        ),
        (
            lambda x: nn.Concat({"a": nn.ReLU(), "b": nn.AvgPool2d(2)})(x),
            ValueError,
            r"agree but for axis 1, got a \(1, 3, 4, 4\), b \(1, 3, 2, 2\)",
        ),
        (lambda x: nn.Concat(nn.ReLU()).backward(x), RuntimeError, "Concat.backward: nothing to go back from"),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call(np.ones((1, 3, 4, 4), np.float32))


class TestErrorsNameTheLayer:
    def notes(self, model, x, error=ValueError):
        with pytest.raises(error) as raised:
            model(x)
        return raised.value.__notes__

    def test_by_its_place_in_the_outermost_network(self):
        x = np.ones((1, 3, 32, 32), np.float32)
        model = nn.models.resnet18(4, width=2, init="zeros")
        model.layer2[1].conv2 = nn.Conv2d(5, 4, 3)
        where = "in layer layer2.1.conv2 (Conv2d), called with x of shape (1, 4, 4, 4)"
        assert self.notes(model, x) == [where]
        assert self.notes(nn.Sequential(nn.ReLU(), model), x) == [where.replace("layer2", "1.layer2")]
        model.layer2[1].conv2 = nn.Conv2d(4, 4, 3)  # without padding: it is the block that the sum does not fit
        assert self.notes(model, x) == ["in layer layer2.1 (NamedResidual), called with x of shape (1, 4, 4, 4)"]

    def test_wrong_dtypes_and_branches(self):
        model = nn.Concat({"a": nn.ReLU(), "b": nn.Sequential(nn.Conv2d(3, 1, 1))})
        assert self.notes(model, np.ones((1, 3, 4, 4)), TypeError) == [
            "in layer b.0 (Conv2d), called with x of shape (1, 3, 4, 4)"
        ]

    def test_going_back(self, rng):
        """The gradient's shape is checked by the layer that it does not fit, wherever it lies."""
        x = rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
        block = nn.Residual(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)), None, nn.ReLU())
        model = nn.Sequential(nn.Sequential(block, nn.Dropout(0.5, rng=0)), nn.Concat({"a": nn.MaxPool2d(2)}))
        for layer, of, shape in (
            ("1.a (MaxPool2d)", lambda: model, (2, 3, 5, 4)),
            ("1 (Dropout)", lambda: model[0], (2, 3, 1, 1)),
            ("0.activation (ReLU)", lambda: model[0][:1], (2, 3, 8, 1)),
            ("main.1 (BatchNorm2d)", lambda: nn.Residual(block.main), (2, 3, 1, 8)),
            ("0 (Conv2d)", lambda: block.main[:1], (2, 2, 8, 8)),
        ):
            for method in ("backward", "backward_parameters"):
                model(x)
                with pytest.raises(ValueError, match="shape") as raised:
                    getattr(of(), method)(np.ones(shape, np.float32))
                (note,) = raised.value.__notes__
                assert note == f"in layer {layer}, going back with grad of shape {shape}"

    def test_going_back_with_a_wrong_dtype(self, rng):
        model = nn.models.resnet18(4, width=2, rng=0)
        model(np.ones((2, 3, 32, 32), np.float32))
        model.layer1[0].relu.backward = lambda grad: grad.astype(np.float64)
        with pytest.raises(TypeError, match="float64") as raised:
            model.backward(np.ones((2, 4), np.float32))
        (note,) = raised.value.__notes__
        assert note == "in layer layer1.0.bn2 (BatchNorm2d), going back with grad of shape (2, 2, 8, 8)"

    def test_other_notes_stay_and_a_single_layer_has_no_place(self):
        class Strict(nn.Module):
            def forward(self, x):
                error = ValueError("no")
                error.add_note("what the user wrote")
                raise error

        assert self.notes(Strict(), np.ones(2)) == ["what the user wrote"]
        inner = "in layer 0.0 (Strict), called with x of shape (2,)"
        assert self.notes(nn.Sequential(nn.Sequential(Strict())), np.ones(2)) == ["what the user wrote", inner]

    @pytest.mark.parametrize("wrong", [0, 2])
    def test_going_back_with_several_gradients(self, wrong):
        model = nn.models.googlenet(5, width=16, aux_logits=True, rng=0)
        grads = [np.ones((2, 5), np.float32), None, np.ones((2, 5), np.float32)]
        grads[wrong] = np.ones((2, 4), np.float32)
        for whole, place in ((model, ""), (nn.Sequential(model), "0.")):
            for method in ("backward", "backward_parameters"):
                with tilewise.using(backend="reference"):
                    whole(np.ones((2, 3, 32, 32), np.float32))
                    with pytest.raises(ValueError, match=r"grad must have shape \(2, 5\).*got \(2, 4\)") as raised:
                        getattr(whole, method)(tuple(grads))
                layer = {0: "fc", 2: "aux1.fc2"}[wrong]
                assert raised.value.__notes__ == [
                    f"in layer {place}{layer} (Linear), going back with grad of shape (2, 4)"
                ]

    @pytest.mark.parametrize(
        ("value", "told"),
        [
            ((np.ones((2, 3)), None), "of shapes (2, 3), NoneType"),
            (None, "of type NoneType"),
            ([[1, 2], [3]], "of type list"),
            ((), "of type tuple"),
        ],
    )
    def test_whatever_was_refused(self, value, told):
        class Strict(nn.Module):
            def forward(self, x):
                raise ValueError("mine")

            def backward(self, grad):
                raise ValueError("mine")

        model = nn.Sequential(Strict())
        assert self.notes(model, value) == [f"in layer 0 (Strict), called with x {told}"]
        with pytest.raises(ValueError, match="mine") as raised:
            model.backward(value)
        assert raised.value.__notes__ == [f"in layer 0 (Strict), going back with grad {told}"]

    def test_in_modules_that_have_no_hash(self):
        @dataclass
        class Strict(nn.Module):
            limit: int = 1

            def forward(self, x):
                raise ValueError("mine")

        assert self.notes(nn.Sequential(Strict()), np.ones(2)) == ["in layer 0 (Strict), called with x of shape (2,)"]

    def test_a_call_without_its_gradient(self):
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'grad'") as raised:
            nn.Sequential(nn.Sequential(nn.ReLU()))[0].backward()
        assert not raised.value.__notes__

    def test_an_argument_that_has_no_shape_after_all(self):
        class Broken:
            @property
            def shape(self):
                raise RuntimeError("no shape")

        assert described(Broken()) == described((Broken(),)).replace("tuple", "Broken") == "of type Broken"
