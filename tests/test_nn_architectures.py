"""The known networks against the same built of torch modules: state_dict keys, results, gradients, sizes."""

import copy
import warnings

import numpy as np
import pytest
from tolerances import assert_close

import tilewise
from tilewise import nn

IMAGES = (2, 3, 32, 32)
# id -> (ours, PyTorch's, shape of x, terms: of the longest sum, times the layers that it goes through)
NETWORKS = {
    "mlp": ("mlp((6, 8, 7, 5))", "MLP((6, 8, 7, 5))", (4, 6), 30),
    "mlp with batch norm": (
        "mlp((6, 8, 7, 5), activation='tanh', batch_norm=True)",
        "MLP((6, 8, 7, 5), True, torch.nn.Tanh)",
        (4, 6),
        30,
    ),
    "vgg11": ("vgg11(5, width=8, hidden=16, dropout=0)", "VGG(11, False, 8, 16, 5)", IMAGES, 576 * 11),
    "vgg11 with batch norm": (
        "vgg11(5, width=8, hidden=16, dropout=0, batch_norm=True)",
        "VGG(11, True, 8, 16, 5)",
        IMAGES,
        576 * 11,
    ),
    "vgg16": ("vgg16(5, width=4, hidden=16, dropout=0)", "VGG(16, False, 4, 16, 5)", IMAGES, 288 * 16),
    "vgg16 with batch norm": (
        "vgg16(5, width=4, hidden=16, dropout=0, batch_norm=True)",
        "VGG(16, True, 4, 16, 5)",
        IMAGES,
        288 * 16,
    ),
    "resnet18": ("resnet18(5, width=8)", "ResNet(BasicBlock, [2, 2, 2, 2], 8, 5)", (2, 3, 65, 64), 576 * 18),
    "resnet50": ("resnet50(5, width=4)", "ResNet(Bottleneck, [3, 4, 6, 3], 4, 5)", (2, 3, 64, 65), 288 * 50),
    "googlenet": (
        "googlenet(5, width=16, dropout=0, transform_input=True)",
        "GoogLeNet(5, True, 4)",
        (2, 3, 33, 48),
        432 * 22,
    ),
    "mobilenet_v2": (
        "mobilenet_v2(5, width_mult=0.25, dropout=0)",
        "MobileNetV2(5, 0.25)",
        (2, 3, 64, 64),
        1280 * 53,
    ),
}
PARAMETERS = {  # as torchvision has them
    "vgg11()": 132_863_336,
    "vgg11(batch_norm=True)": 132_868_840,
    "vgg16()": 138_357_544,
    "vgg16(batch_norm=True)": 138_365_992,
    "resnet18()": 11_689_512,
    "resnet50()": 25_557_032,
    "googlenet()": 6_624_904,
    "googlenet(aux_logits=True)": 13_004_888,
    "mobilenet_v2()": 3_504_872,
}
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# some of torchvision's keys, as its trained weights have them
KEYS = {
    "vgg11()": ["features.0.weight", "features.18.bias", "classifier.0.weight", "classifier.6.bias"],
    "vgg11(batch_norm=True)": ["features.25.weight", *(f"features.26.{name}" for name in NORM), "classifier.3.bias"],
    "vgg16()": ["features.28.weight", "classifier.3.weight"],
    "vgg16(batch_norm=True)": ["features.40.weight", "features.41.running_var", "classifier.6.weight"],
    "resnet18()": [
        *("conv1.weight", *(f"bn1.{name}" for name in NORM), "layer1.0.conv1.weight", "layer1.1.bn2.bias"),
        *("layer2.0.downsample.0.weight", *(f"layer2.0.downsample.1.{name}" for name in NORM), "fc.weight", "fc.bias"),
    ],
    "resnet50()": ["layer1.0.downsample.0.weight", "layer3.5.conv3.weight", "layer4.2.bn3.running_mean"],
    "googlenet()": [
        *("conv1.conv.weight", *(f"conv3.bn.{name}" for name in NORM), "inception3a.branch1.conv.weight"),
        *("inception3a.branch2.0.conv.weight", "inception4e.branch3.1.bn.bias", "inception5b.branch4.1.conv.weight"),
        "fc.weight",
    ],
    "googlenet(aux_logits=True)": [
        *("inception5b.branch4.1.conv.weight", "aux1.conv.conv.weight", *(f"aux1.conv.bn.{name}" for name in NORM)),
        *("aux1.fc1.weight", "aux1.fc1.bias", "aux1.fc2.weight", "aux1.fc2.bias", "aux2.conv.conv.weight"),
        *("aux2.fc2.bias", "fc.weight"),
    ],
    "mobilenet_v2()": [
        *("features.0.0.weight", "features.0.1.running_mean", "features.1.conv.0.0.weight", "features.1.conv.1.weight"),
        *(f"features.2.conv.3.{name}" for name in NORM),
        *("features.17.conv.2.weight", "features.18.1.bias", "classifier.1.weight", "classifier.1.bias"),
    ],
}


def networks(torch, rng, ours: str, theirs: str):
    """Ours and PyTorch's in float64, with the same parameters and statistics, none of them neutral."""
    import torch_networks

    model = eval(f"models.{ours[:-1]}, rng=0, dtype=np.float64)", {"models": nn.models, "np": np})
    for _, module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for values in (module.weight.data, module.running_var):
                values[:] = rng.uniform(0.5, 1.5, values.shape)
            for values in (module.bias.data, module.running_mean):
                values[:] = rng.uniform(-0.3, 0.3, values.shape)
    other = eval(theirs, vars(torch_networks) | {"torch": torch}).double()
    assert list(model.state_dict()) == list(other.state_dict())
    other.load_state_dict({name: torch.tensor(value) for name, value in model.state_dict().items()})
    return model, other


@pytest.mark.parametrize(("ours", "theirs", "shape", "terms"), NETWORKS.values(), ids=NETWORKS)
def test_network_equals_pytorchs(torch, rng, ours, theirs, shape, terms):
    """Evaluation, training, every gradient and the running statistics in float64 (NumPy kernels); float32 after it."""
    model, other = networks(torch, rng, ours, theirs)
    single = convert(model)
    x = rng.standard_normal(shape)
    with torch.no_grad():
        expected = other.eval()(torch.tensor(x)).numpy()
    assert_close(single.eval()(x.astype(np.float32)), expected, terms)
    with tilewise.using(backend="reference"):
        assert_close(model.eval()(x), expected, terms)
        compare_training(torch, rng, model.train(), other.train(), x, terms)


def compare_training(torch, rng, model, other, x, terms):
    x_torch = torch.tensor(x, requires_grad=True)
    y, y_torch = model(x), other(x_torch)
    assert_close(y, y_torch.detach().numpy(), terms)
    cotangent = rng.standard_normal(y.shape)
    y_torch.backward(torch.tensor(cotangent))
    # Batch norm divides by deviations: 1e6 terms allow for what that magnifies, layer by layer.
    assert_close(model.backward(cotangent), x_torch.grad.numpy(), 10**6)
    largest = max(float(expected.grad.abs().max()) for expected in other.parameters())
    for (name, parameter), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None, name
        size = float(expected.grad.abs().max())
        cancelled = size < 1e-9 * largest  # a bias before batch norm: the gradient is zero but for rounding
        assert_close(parameter.grad, expected.grad.numpy(), 10**6, scale=largest if cancelled else size)
    state = model.state_dict()
    for name, expected in other.state_dict().items():
        assert_close(state[name], expected.numpy(), terms)


def googlenets(torch, rng):
    return networks(
        torch, rng,
        "googlenet(5, width=16, dropout=0, aux_logits=True, dropout_aux=0)", "GoogLeNet(5, False, 4, True)",
    )  # fmt: skip


class TestAuxiliaryHeads:
    def test_training_equals_pytorchs(self, torch, rng):
        model, other = googlenets(torch, rng)
        x = rng.standard_normal((3, 3, 64, 64))
        x_torch = torch.tensor(x, requires_grad=True)
        cotangents = rng.standard_normal((3, 3, 5))
        with tilewise.using(backend="reference"):
            outputs = model(x)
            grad_x = model.backward(tuple(cotangents))
        assert outputs._fields == ("logits", "aux_logits2", "aux_logits1")
        theirs = other(x_torch)
        for ours, expected in zip(outputs, theirs, strict=True):
            assert_close(ours, expected.detach().numpy(), 432 * 22)
        torch.autograd.backward(theirs, [torch.tensor(c) for c in cotangents])
        assert_close(grad_x, x_torch.grad.numpy(), 10**6)
        for (name, parameter), expected in zip(model.named_parameters(), other.parameters(), strict=True):
            assert parameter.grad is not None, name
            assert_close(parameter.grad, expected.grad.numpy(), 10**6, scale=float(expected.grad.abs().max()))

    def test_evaluation_leaves_them_out(self, torch, rng):
        model, other = googlenets(torch, rng)
        x = rng.standard_normal((2, 3, 32, 32))
        for head in (model.aux1, model.aux2):
            head.forward = None  # would raise if it were called
        with torch.no_grad():
            expected = other.eval()(torch.tensor(x)).numpy()
        with tilewise.using(backend="reference"), warnings.catch_warnings():
            warnings.simplefilter("error")  # from layer to layer, a program's failure would not be seen
            assert_close(model.eval()(x), expected, 432 * 22)
        plain = nn.models.googlenet(5, width=16, dtype=np.float64, init="zeros")
        unmatched = plain.load_state_dict(model.state_dict(), strict=False)
        assert unmatched.missing_keys == []
        assert {name.split(".")[0] for name in unmatched.unexpected_keys} == {"aux1", "aux2"}

    @pytest.mark.parametrize("learning", [("aux1.*",), ("aux2.fc2.*", "fc.*"), ("inception4d.*",), ("*",)])
    def test_frozen_layers_get_nothing_and_the_others_all(self, rng, learning):
        model = nn.models.googlenet(5, width=16, dropout=0, aux_logits=True, dropout_aux=0, rng=0)
        x, cotangents = rng.standard_normal((2, 3, 32, 32)).astype(np.float32), np.ones((3, 2, 5), np.float32)
        with tilewise.using(backend="reference"):
            model(x)
            model.backward(tuple(cotangents))
            whole = {name: parameter.grad for name, parameter in model.named_parameters()}
            for parameter in model.parameters():
                parameter.grad = None
            model.freeze("*")
            model.unfreeze(*learning)
            for _, module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.frozen = False
            model(x)
            model.backward_parameters(tuple(cotangents))
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            if parameter.requires_grad:
                assert_close(parameter.grad, whole[name], 10**4, scale=float(np.abs(whole[name]).max()) + 1e-6)

    @pytest.mark.parametrize("part", [slice(5), slice(-1), slice(None)], ids=str)
    def test_slices_are_of_the_trunk(self, rng, part):
        model = nn.models.googlenet(5, width=16, dropout=0, aux_logits=True, init="he_normal", rng=0)
        plain = nn.models.googlenet(5, width=16, dropout=0, init="zeros")
        plain.load_state_dict(model.state_dict(), strict=False)
        names = [name for name in list(dict(model.children()))[part] if not name.startswith("aux")]
        expected = nn.Sequential({name: plain.get_submodule(name) for name in names})
        found, x = model[part], rng.standard_normal((2, 3, 32, 32)).astype(np.float32)
        assert type(found) is nn.Sequential
        assert [name for name, _ in found.children()] == names
        with tilewise.using(backend="reference"):
            y = found(x)
            np.testing.assert_array_equal(y, expected(x))
            np.testing.assert_array_equal(found.backward(y), expected.backward(y))
            np.testing.assert_array_equal(model.eval()[part](x), expected.eval()(x))
        assert model[0] is model.conv1
        assert not model[part].training

    def test_a_head_without_gradient_is_left_out(self, rng):
        model = nn.models.googlenet(5, width=16, aux_logits=True, rng=0)
        model(rng.standard_normal((2, 3, 32, 32)).astype(np.float32))
        ones = np.ones((2, 5), np.float32)
        model.backward((ones, None, ones))
        assert model.aux2.fc2.weight.grad is None
        assert model.aux1.fc2.weight.grad is not None
        with pytest.raises(TypeError, match=r"GoogLeNet\.backward: grad must be the gradients of logits"):
            model.backward(ones)


def convert(model):
    """A copy in float32."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data = parameter.data.astype(np.float32)
    for _, module in other.modules():
        for name in module.buffers[:2]:
            setattr(module, name, getattr(module, name).astype(np.float32))
    return other


@pytest.mark.parametrize("network", PARAMETERS)
def test_size_and_keys_are_torchvisions(network):
    model = eval(f"models.{network[:-1]}, init='zeros')".replace("(,", "("), {"models": nn.models})
    assert sum(parameter.size for parameter in model.parameters()) == PARAMETERS[network]
    names = [name for name in model._state() if name in KEYS[network]]
    assert names == KEYS[network]


def test_initial_values_are_torchvisions():
    """He's of fan_out for ResNet's convolutions, deviation 0.01 for VGG's dense layers; within five of their own."""
    conv = nn.models.resnet18(5, width=16, rng=0).layer4[1].conv2.weight
    assert conv.data.std() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=5 / (2 * conv.size) ** 0.5)
    dense = nn.models.vgg11(5, width=4, hidden=64, rng=0).classifier[3].weight
    assert dense.data.std() == pytest.approx(0.01, rel=5 / (2 * dense.size) ** 0.5)
    assert not nn.models.mobilenet_v2(width_mult=0.1, init="zeros").classifier[1].weight.data.any()
    one, same, other = (nn.models.googlenet(5, rng=seed).fc.weight.data for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize(("channels", "expected"), [(1, 8), (8.4, 8), (10, 16), (11.2, 16), (33.6, 32), (44.8, 48)])
def test_mobilenets_channels_are_rounded_as_torchvisions(channels, expected):
    model = nn.models.mobilenet_v2(width_mult=channels / 32, init="zeros")
    assert model.features[0][0].out_channels == expected


def test_frozen_layers_before_the_head_are_not_gone_through(rng):
    model = nn.models.resnet18(3, width=4, rng=0)
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.fc = nn.Linear(32, 3, rng=0)
    y = model(rng.standard_normal((2, 3, 32, 32)).astype(np.float32))
    model.backward_parameters(np.ones_like(y))
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == [
        "fc.weight",
        "fc.bias",
    ]
    model.layer1.backward(np.ones((2, 4, 8, 8), np.float32))  # what its forward kept is still there


def test_relu6_equals_pytorchs(torch, rng):
    x = np.append(rng.uniform(-4, 10, 200), [0, 6, np.nan, np.inf, -np.inf]).astype(np.float32)
    x_torch, layer = torch.tensor(x, requires_grad=True), nn.ReLU6()
    y_torch = torch.nn.ReLU6()(x_torch)
    np.testing.assert_array_equal(layer(x), y_torch.detach().numpy())
    y_torch.backward(torch.ones_like(x_torch))
    np.testing.assert_array_equal(layer.backward(np.ones_like(x)), x_torch.grad.numpy())
    with pytest.raises(RuntimeError, match=r"ReLU6\.backward: nothing to go back from"):
        layer.backward(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.models.mlp([3]), r"mlp: sizes must hold the input's and the output's at least, got \(3,\)"),
        (lambda: nn.models.mlp([3, 2], activation="swish"), "mlp: activation must be one of relu, tanh, sigmoid, got"),
        (
            lambda: nn.models.googlenet(transform_input=True, init="zeros")(np.ones((1, 1, 32, 32), np.float32)),
            r"ImageNetInput: x must have shape \(N, 3, H, W\), got \(1, 1, 32, 32\)",
        ),
        (lambda: nn.models.vgg11(width=0), "Conv2d: out_channels must be at least 1, got 0"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()
