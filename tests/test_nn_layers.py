"""Every layer against PyTorch's of the same name: forward, gradients of input and parameters, buffers, both modes."""

import copy
import pickle

import numpy as np
import pytest
from gradcheck import assert_gradient, numerical_gradient
from tolerances import assert_close

import tilewise
from tilewise import nn

IMAGE = (4, 6, 9, 8)

# id -> (our layer, PyTorch's expression, input shape, length of the longest sum)
SAME_ARGUMENTS = {
    "linear": ("Linear(6, 5)", (7, 6), 7),
    "linear without bias": ("Linear(6, 5, bias=False)", (7, 6), 7),
    "linear on three axes": ("Linear(6, 5)", (3, 4, 6), 12),
    "conv": ("Conv2d(6, 4, 3)", IMAGE, 4 * 72),
    "conv with everything": ("Conv2d(6, 4, (3, 2), (2, 1), (1, 2), (2, 1), 2, False)", IMAGE, 4 * 90),
    "conv same": ("Conv2d(6, 4, 3, padding='same')", IMAGE, 4 * 72),
    "conv circular": ("Conv2d(6, 4, 3, 1, 1, padding_mode='circular')", IMAGE, 4 * 72),
    "conv reflect": ("Conv2d(6, 4, (3, 5), 2, (1, 3), 1, 1, True, 'reflect')", IMAGE, 4 * 90),
    "conv replicate": ("Conv2d(6, 4, 3, padding=(2, 5), groups=2, padding_mode='replicate')", IMAGE, 4 * 150),
    "conv reflect same": ("Conv2d(6, 4, (2, 4), padding='same', padding_mode='reflect', bias=False)", IMAGE, 4 * 72),
    "max pool": ("MaxPool2d(2)", IMAGE, 1),
    "max pool overlapping": ("MaxPool2d((3, 2), 2, 1, (1, 2), ceil_mode=True)", IMAGE, 4),
    "average pool": ("AvgPool2d(3)", IMAGE, 9),
    "average pool with everything": ("AvgPool2d((3, 2), 2, 1, True, False)", IMAGE, 6),
    "average pool with divisor": ("AvgPool2d(2, divisor_override=3)", IMAGE, 4),
    "adaptive average pool": ("AdaptiveAvgPool2d((3, 2))", IMAGE, 24),
    "global average pool": ("AdaptiveAvgPool2d(1)", IMAGE, 72),
    "batch norm of features": ("BatchNorm1d(6)", (16, 6), 64),
    "batch norm of sequences": ("BatchNorm1d(6, eps=1e-3, momentum=0.3)", (4, 6, 5), 80),
    "batch norm of images": ("BatchNorm2d(6)", IMAGE, 4 * 288),
    "batch norm without affine": ("BatchNorm2d(6, affine=False)", IMAGE, 4 * 288),
    "flatten": ("Flatten()", IMAGE, 1),
    "flatten the middle": ("Flatten(1, 2)", IMAGE, 1),
    "relu": ("ReLU()", (5, 7), 1),
    "leaky relu": ("LeakyReLU(0.2)", (5, 7), 1),
    "sigmoid": ("Sigmoid()", (5, 7), 2),
    "tanh": ("Tanh()", (5, 7), 2),
    "softmax": ("Softmax(1)", (5, 7), 14),
    "log softmax": ("LogSoftmax(1)", (5, 7), 14),
    "log softmax of pixels": ("LogSoftmax(1)", (3, 4, 2, 5), 8),
}


def build(expression: str, dtype, rng):
    """The layer in our library, in this dtype, with parameters that are not the neutral ones."""
    layer = eval(f"nn.{expression}", {"nn": nn})
    for parameter in layer.parameters():
        parameter.data = rng.uniform(0.2, 0.8, parameter.shape).astype(dtype)
    for name in layer.buffers[:2]:
        setattr(layer, name, rng.uniform(0.5, 1.5, getattr(layer, name).shape).astype(dtype))
    return layer


@pytest.mark.parametrize(
    ("dtype", "backend"), [(np.float32, None), (np.float64, "reference")], ids=["single", "double"]
)
@pytest.mark.parametrize(("expression", "shape", "terms"), SAME_ARGUMENTS.values(), ids=SAME_ARGUMENTS)
def test_layer_equals_pytorchs(torch, rng, expression, shape, terms, dtype, backend):
    """float32 with the default kernels; float64, where errors of the layer itself show, needs none compiled."""
    with tilewise.using(backend=backend):
        compare(torch, rng, expression, shape, terms, dtype)


def compare(torch, rng, expression: str, shape: tuple[int, ...], terms: int, dtype):
    ours = build(expression, dtype, rng)
    theirs = eval(f"torch.nn.{expression}", {"torch": torch}).to(getattr(torch, np.dtype(dtype).name))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict({name: torch.tensor(value) for name, value in ours.state_dict().items()})

    x = rng.standard_normal(shape).astype(dtype)
    x_torch = torch.tensor(x, requires_grad=True)
    y, y_torch = ours(x), theirs(x_torch)
    assert_close(y, y_torch.detach().numpy(), terms)
    assert y.dtype == dtype

    cotangent = rng.standard_normal(y.shape).astype(dtype)
    y_torch.backward(torch.tensor(cotangent))
    assert_close(ours.backward(cotangent), x_torch.grad.numpy(), terms)
    for (name, parameter), (_, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert parameter.grad is not None, name
        assert_close(parameter.grad, expected.grad.numpy(), terms)

    for name, expected in theirs.state_dict().items():  # the running statistics have moved alike
        assert_close(ours.state_dict()[name], expected.numpy(), terms)
    with torch.no_grad():
        assert_close(ours.eval()(x), theirs.eval()(x_torch).numpy(), terms)
    with pytest.raises(RuntimeError, match="call forward in training mode first"):  # evaluation kept nothing
        ours.backward(cotangent)


@pytest.fixture
def reference():
    """The NumPy kernels: for what is the layer's own business, and would have more kernels compiled."""
    with tilewise.using(backend="reference"):
        yield


@pytest.mark.parametrize(
    "expression",
    ["Conv2d(6, 4, 3, padding=1)", "MaxPool2d(3, 2)", "AvgPool2d(3, 2)", "AdaptiveAvgPool2d(2)", "BatchNorm2d(6)"],
)
def test_nhwc_is_nchw_with_the_axes_moved(rng, reference, expression):
    usual = build(expression, np.float64, rng)
    other = eval(f"nn.{expression[:-1]}, layout='NHWC')", {"nn": nn})
    for (_, target), (_, source) in zip(other.named_parameters(), usual.named_parameters(), strict=True):
        target.data = source.data.copy()
    for name in usual.buffers:
        setattr(other, name, getattr(usual, name).copy())
    x = rng.standard_normal(IMAGE)
    y = usual(x)
    cotangent = rng.standard_normal(y.shape)
    to_nhwc = (0, 2, 3, 1)
    assert_close(other(x.transpose(to_nhwc)), y.transpose(to_nhwc), 1000)
    grad = other.backward(cotangent.transpose(to_nhwc))
    assert_close(grad, usual.backward(cotangent).transpose(to_nhwc), 1000)
    for mine, expected in zip(other.parameters(), usual.parameters(), strict=True):
        assert mine.grad is not None
        assert expected.grad is not None
        assert_close(mine.grad, expected.grad, 1000)


def small_network(rng) -> nn.Sequential:
    options = {"rng": rng, "dtype": np.float64}
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, **options),
        nn.BatchNorm2d(3, dtype=np.float64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2, stride=2, bias=False, **options),
        nn.Tanh(),
        nn.AvgPool2d(2, 1, ((0, 1), (1, 0))),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, 5, **options),
        nn.BatchNorm1d(5, dtype=np.float64),
        nn.Sigmoid(),
        nn.Linear(5, 3, **options),
        nn.Softmax(),
    )


def test_gradients_of_a_whole_network_are_the_numerical_ones(rng):
    network = small_network(rng)
    x, cotangent = rng.standard_normal((3, 2, 8, 8)), rng.standard_normal((3, 3))
    network(x)
    grad_x = network.backward(cotangent)
    assert_gradient(grad_x, numerical_gradient(network.forward, x, cotangent))
    for _, parameter in network.named_parameters():
        values = parameter.data

        def output(changed, parameter=parameter):
            parameter.data = changed
            return network.forward(x)

        expected = numerical_gradient(output, values, cotangent)
        parameter.data = values
        assert parameter.grad is not None
        assert_gradient(parameter.grad, expected)


def test_frozen_batch_norm_uses_and_keeps_its_statistics(rng):
    norm = build("BatchNorm2d(6)", np.float64, rng)
    x, cotangent = rng.standard_normal(IMAGE), rng.standard_normal(IMAGE)
    expected, before = norm.eval()(x), norm.state_dict()
    norm.train().frozen = True
    assert_close(norm(x), expected, 2)
    assert_gradient(norm.backward(cotangent), numerical_gradient(norm.eval().forward, x, cotangent))
    for name, value in norm.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def prepared_layer(rng, shape=(3, 4, 3), **options):
    layer = nn.Conv2d(*shape, padding=1, rng=rng, **options).eval()
    x = rng.standard_normal((2, shape[0], 6, 7)).astype(np.float32)
    layer(x)
    return layer, x


def plain(layer, x):
    bias = None if layer.bias is None else layer.bias.data
    return tilewise.conv2d(x, layer.weight.data, bias, *layer._options(), layout=layer.layout)


class TestPreparedConvolution:
    """Conv2d in evaluation mode keeps packed weights, and never a result of old ones."""

    def test_is_made_at_the_first_call_and_kept(self, rng, reference):
        layer, x = prepared_layer(rng)
        first = layer._prepared
        assert first is not None
        np.testing.assert_array_equal(layer(x), plain(layer, x))
        layer.eval()(x[:1])
        assert layer._prepared is first

    def test_two_batch_norms_after_one_layer_keep_one_each(self, rng, reference):
        layer, x = prepared_layer(rng)
        norms = [nn.BatchNorm2d(layer.out_channels, dtype=x.dtype).eval() for _ in range(2)]
        norms[1].running_mean += 1
        first = [layer.prepared(norm) for norm in norms]
        assert [layer.prepared(norm) for norm in norms] == first
        assert_close(first[0](x) - first[1](x), np.full_like(first[0](x), 1), 27, scale=10)
        layer.weight.data = layer.weight.data + 1
        assert layer.prepared(norms[0]) is not first[0]
        assert len(layer._prepared) == 2

    def test_on_the_cpu_gives_what_the_plain_call_gives(self, rng):
        with tilewise.using(backend="cpu"):
            for layout in ("NCHW", "NHWC"):
                layer = nn.Conv2d(3, 4, 3, rng=rng, layout=layout).eval()
                x = rng.standard_normal((2, 6, 6, 3) if layout == "NHWC" else (2, 3, 6, 6)).astype(np.float32)
                assert_close(layer(x), plain(layer, x), 27)

    def test_training_mode_has_none(self, rng, reference):
        layer, x = prepared_layer(rng)
        network = nn.Sequential(layer, nn.ReLU())
        network.train()
        assert layer._prepared is None
        network(x)
        assert layer._prepared is None
        layer.eval()(x)
        network.load_state_dict({name: value + 1 for name, value in network.state_dict().items()})
        assert layer._prepared is None
        np.testing.assert_array_equal(layer.eval()(x), plain(layer, x))

    @pytest.mark.parametrize("shape", [(3, 4, 3), (96, 128, 3)], ids=["compared", "sampled"])
    def test_changes_are_noticed(self, rng, reference, shape):
        layer, x = prepared_layer(rng, shape)

        def replace(data):
            layer.weight.data = data

        def freeze():
            layer.weight.data.flags.writeable = False
            replace(layer.weight.data.copy())

        optimizer = nn.SGD(layer.parameters(), 0.1)
        for parameter in layer.parameters():
            parameter.grad = np.ones_like(parameter.data)
        changes = [
            lambda: replace(layer.weight.data * 2),
            lambda: layer.weight.data.__imul__(np.float32(1.5)),
            optimizer.step,
            lambda: layer.weight.data[1].fill(0),  # a filter
            lambda: layer.weight.data[:, 2].fill(0),  # an input channel
            lambda: layer.weight.data[:, :, 1, 1].fill(3),
            lambda: layer.weight.data.fill(np.nan),
            lambda: layer.weight.data.fill(1),
            lambda: layer.bias.data.__setitem__(1, 9),
            lambda: setattr(layer, "bias", None),
            lambda: setattr(layer, "padding", ((0, 0), (1, 1))),
            lambda: replace(np.asfortranarray(layer.weight.data)),
            lambda: layer.weight.data[0].fill(4),
            freeze,
        ]
        for i, change in enumerate(changes):
            before = layer._prepared
            change()
            np.testing.assert_array_equal(layer(x), plain(layer, x), err_msg=f"change {i}")
            assert layer._prepared is not before, i
            kept = layer._prepared
            layer(x)
            assert layer._prepared is kept, i

    def test_release_is_for_what_goes_unnoticed(self, rng, reference):
        layer, x = prepared_layer(rng, (96, 128, 3))
        layer.weight.data[5, 5, 1, 1] += 1
        layer.release()
        np.testing.assert_array_equal(layer(x), plain(layer, x))

    def test_copies_and_pickles_go_without(self, rng, reference):
        layer, x = prepared_layer(rng)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other._prepared is None
            np.testing.assert_array_equal(other(x), layer(x))
            assert other._prepared is not None

    def test_wrong_x_is_refused_as_in_training(self, rng, reference):
        layer, x = prepared_layer(rng)
        with pytest.raises(ValueError, match="conv2d: weight expects 3 channels per group but x has 2"):
            layer(x[:, :2])
        with pytest.raises(TypeError, match="conv2d: weight is float32 but x is float64"):
            layer(x.astype(np.float64))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_step_and_sign_and_identity(torch, rng, reference, dtype):
    x = np.concatenate([[0, -0.0, 1e-30, -1e-30], rng.standard_normal(20)]).astype(dtype)
    grad = rng.standard_normal(x.shape).astype(dtype)
    x_torch = torch.tensor(x, requires_grad=True)
    zero = torch.tensor(0, dtype=x_torch.dtype)
    for layer, expected in ((nn.Step(), torch.heaviside(x_torch.detach(), zero)), (nn.Sign(), torch.sign(x_torch))):
        y = layer(x)
        np.testing.assert_array_equal(y, expected.detach().numpy())
        assert y.dtype == dtype
        np.testing.assert_array_equal(layer.backward(grad), np.zeros_like(x))
    layer = nn.Identity()
    assert layer(x) is x
    assert layer.backward(grad) is grad


def test_step_layers_refuse_a_gradient_of_another_shape(reference):
    layer = nn.Sign()
    layer(np.ones(3))
    with pytest.raises(ValueError, match=r"Sign\.backward: grad must have shape \(3,\), got \(2,\)"):
        layer.backward(np.ones(2))


def test_a_perceptron_computes_and(reference):
    """The lectures' threshold unit: step(x1 + x2 - 1.5)."""
    layer = nn.Linear(2, 1, dtype=np.float64)
    layer.load_state_dict({"weight": np.ones((1, 2)), "bias": np.array([-1.5])})
    inputs = np.array([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    np.testing.assert_array_equal(nn.Sequential(layer, nn.Step())(inputs)[:, 0], [0, 0, 0, 1])


WRONG = {
    "channels": (lambda: nn.Conv2d(0, 4, 3), ValueError, "Conv2d: in_channels must be at least 1, got 0"),
    "kernel": (lambda: nn.Conv2d(1, 4, 0), ValueError, "Conv2d: kernel_size must be at least 1"),
    "float kernel": (lambda: nn.Conv2d(1, 4, 2.5), TypeError, r"Conv2d: kernel_size must be an int, got 2\.5"),
    "groups": (
        lambda: nn.Conv2d(3, 4, 1, groups=2),
        ValueError,
        "in_channels must be divisible by groups, got 3 and 2",
    ),
    "groups of outputs": (lambda: nn.Conv2d(4, 3, 1, groups=2), ValueError, "out_channels must be divisible by groups"),
    "padding": (lambda: nn.Conv2d(3, 4, 1, padding="full"), ValueError, "Conv2d: padding must be .* got 'full'"),
    "negative padding": (lambda: nn.MaxPool2d(2, padding=-1), ValueError, "MaxPool2d: padding must be at least 0"),
    "layout": (lambda: nn.AvgPool2d(2, layout="CHWN"), ValueError, 'AvgPool2d: layout must be "NCHW" or "NHWC"'),
    "features": (lambda: nn.Linear(2, 0), ValueError, "Linear: out_features must be at least 1"),
    "init": (lambda: nn.Linear(2, 2, init="glorot"), ValueError, "Linear: init must be .* got 'glorot'"),
    "init's shape": (lambda: nn.Linear(2, 3, init=lambda *a: np.zeros((3, 3))), ValueError, r"gave shape \(3, 3\)"),
    "rng": (lambda: nn.Linear(2, 2, rng="0"), TypeError, "rng must be a numpy.random.Generator, an int or None"),
    "dtype": (
        lambda: nn.Linear(2, 2, dtype=int),
        TypeError,
        "Linear: dtype must be float16, float32 or float64, got int64",
    ),
    "BatchNorm1d of images": (
        lambda: nn.BatchNorm1d(2)(np.ones((1, 2, 3, 3))),
        ValueError,
        r"BatchNorm1d: x must have",
    ),
    "BatchNorm2d of rows": (
        lambda: nn.BatchNorm2d(2)(np.ones((4, 2))),
        ValueError,
        r"must have 4 dimensions \(N, C, H, W",
    ),
    "flatten": (
        lambda: nn.Flatten(2)(np.ones((3, 4))),
        ValueError,
        r"Flatten: axes 2 to -1 are not in an array of shape",
    ),
    "wrong x": (lambda: nn.Linear(3, 2)(np.ones((4, 5), np.float32)), ValueError, "linear: "),
    "other dtype": (lambda: nn.Linear(3, 2)(np.ones((4, 3))), TypeError, "the dtypes must match"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
