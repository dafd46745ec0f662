"""Convolutions that pad with more than zeros, and the average with given weights."""

import numpy as np
import pytest
from gradcheck import assert_gradient, numerical_gradient
from tolerances import assert_close

import tilewise
from tilewise import nn

IMAGE = (3, 4, 7, 6)


@pytest.fixture(autouse=True)
def _reference():
    """The NumPy kernels: what is tested here is the layers' own business."""
    with tilewise.using(backend="reference"):
        yield


def convolution(rng, **options) -> nn.Conv2d:
    layer = nn.Conv2d(4, 6, **({"kernel_size": 3, "padding": 1, "rng": 0, "dtype": np.float64} | options))
    for parameter in layer.parameters():
        parameter.data = rng.standard_normal(parameter.shape)
    return layer


MODES = {
    "reflect": {"padding_mode": "reflect"},
    "replicate": {"padding_mode": "replicate", "stride": 2, "padding": (3, 1)},
    "circular": {"padding_mode": "circular", "groups": 2, "padding": ((0, 2), (1, 0))},
    "value": {"padding_value": -1.5, "padding": (2, 1)},
    "value same": {"padding_value": 2.0, "padding": "same", "kernel_size": (2, 3), "dilation": (1, 2)},
}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_padded_gradients_are_the_numerical_ones(rng, options, layout):
    layer = convolution(rng, **options, layout=layout)
    x = rng.standard_normal(IMAGE if layout == "NCHW" else (3, 7, 6, 4))
    cotangent = rng.standard_normal(layer(x).shape)
    assert_gradient(layer.backward(cotangent), numerical_gradient(layer.eval(), x, cotangent))
    weight = layer.weight.data

    def output(changed):
        layer.weight.data = changed
        return layer(x)

    expected = numerical_gradient(output, weight, cotangent)
    assert layer.weight.grad is not None
    assert_gradient(layer.weight.grad, expected)


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_layouts_and_single_images_agree(rng, options):
    layer = convolution(rng, **options)
    other = nn.Conv2d(4, 6, **({"kernel_size": 3, "padding": 1, "dtype": np.float64} | options), layout="NHWC")
    other.load_state_dict(layer.state_dict())
    x = rng.standard_normal(IMAGE)
    for mode in (True, False):
        layer.train(mode)
        other.train(mode)
        expected = layer(x)
        assert_close(other(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2), expected, 36)
        assert_close(layer(x[1]), expected[1], 36)
        assert_close(other(x[1].transpose(1, 2, 0)).transpose(2, 0, 1), expected[1], 36)


def test_a_value_is_what_pytorch_pads_with(torch, rng):
    layer, x = convolution(rng, padding=(2, 1), padding_value=-1.5), rng.standard_normal(IMAGE)
    padded = torch.nn.functional.pad(torch.tensor(x), (1, 1, 2, 2), value=-1.5)
    weight, bias = (torch.tensor(parameter.data) for parameter in layer.parameters())
    assert_close(layer(x), torch.nn.functional.conv2d(padded, weight, bias).numpy(), 36)


def test_parameters_alone(rng):
    layer, x = convolution(rng, padding_mode="reflect"), rng.standard_normal(IMAGE)
    cotangent = rng.standard_normal(layer(x).shape)
    layer.backward(cotangent)
    expected, layer.weight.grad = layer.weight.grad, None
    layer(x)
    layer.backward_parameters(cotangent)
    np.testing.assert_array_equal(layer.weight.grad, expected)


def test_the_lectures_convolutions():
    x = np.array([[[[1.0, 0, 2, 3], [2, 1, 0, 1], [1, 0, 1, 3], [2, 0, 3, 2]]]])
    other = np.array([[[[1.0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 1, 0]]]])
    large = [[1.0, 2, 0], [3, 2, 1], [0, 1, 3]]
    for images, weight, options, expected in (
        (x, large, {}, [[12, 18], [17, 15]]),
        (x, large, {"padding": 1}, [[7, 6, 10, 13], [8, 12, 18, 13], [8, 17, 15, 13], [6, 10, 10, 20]]),
        (x, [[1.0, 2], [3, 2]], {"stride": 2}, [[9, 10], [7, 20]]),
        (other, [[1.0, 0], [0, 1]], {}, [[2, 1, 1], [0, 2, 2], [0, 1, 1]]),
    ):
        layer = nn.Conv2d(1, 1, len(weight), bias=False, dtype=np.float64, **options)
        layer.load_state_dict({"weight": np.array([[weight]])})
        for mode in (True, False):
            np.testing.assert_array_equal(layer.train(mode)(images), [[expected]])


class TestWeightedAverage:
    def test_by_hand(self):
        x = np.array([[[[1.0, 2, 5], [3, 4, 6]]]])
        layer = nn.WeightedAvgPool2d([[1, 2], [3, 4]], stride=1)
        np.testing.assert_allclose(layer(x), [[[[(1 + 4 + 9 + 16) / 10, (2 + 10 + 12 + 24) / 10]]]], rtol=1e-15)

    @pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
    def test_equal_weights_are_the_plain_average(self, rng, layout):
        x = rng.standard_normal(IMAGE)
        for options in ({}, {"stride": (1, 2), "padding": 1}):
            weighted = nn.WeightedAvgPool2d(np.full((2, 3), 7), **options, layout=layout)
            plain = nn.AvgPool2d((2, 3), **options, layout=layout)
            y = weighted(x)
            assert_close(y, plain(x), 6)
            cotangent = rng.standard_normal(y.shape)
            assert_close(weighted.backward(cotangent), plain.backward(cotangent), 6)

    def test_gradient_is_the_numerical_one(self, rng):
        layer, x = nn.WeightedAvgPool2d(rng.random((3, 2)), (2, 1), (1, 0)), rng.standard_normal(IMAGE)
        cotangent = rng.standard_normal(layer(x).shape)
        assert_gradient(layer.backward(cotangent), numerical_gradient(layer.eval(), x, cotangent))

    def test_on_the_cpus_kernels(self, rng):
        x = rng.standard_normal(IMAGE).astype(np.float32)
        layer = nn.WeightedAvgPool2d([[1, 2], [2, 1]])
        cotangent = rng.standard_normal(layer(x).shape).astype(np.float32)
        expected, expected_grad = layer(x), layer.backward(cotangent)
        with tilewise.using(backend="cpu"):
            y = layer(x)
            assert_close(y, expected, 4)
            assert_close(layer.backward(cotangent), expected_grad, 4)
        assert y.dtype == np.float32

    def test_has_no_state(self):
        layer = nn.WeightedAvgPool2d([[1, 3]])
        assert layer.state_dict() == {}
        assert repr(layer) == "WeightedAvgPool2d(weights=[[0.25, 0.75]], kernel_size=(1, 2), stride=(1, 2))"


def test_reprs():
    assert repr(nn.Conv2d(1, 2, 3, padding_mode="reflect")) == (
        "Conv2d(1, 2, kernel_size=(3, 3), padding_mode='reflect')"
    )


WRONG = {
    "mode": (
        lambda: nn.Conv2d(1, 1, 3, padding_mode="constant"),
        ValueError,
        "Conv2d: padding_mode must be one of zeros, reflect, replicate, circular, got 'constant'",
    ),
    "value and mode": (
        lambda: nn.Conv2d(1, 1, 3, padding_mode="reflect", padding_value=1),
        ValueError,
        "a padding_value needs padding_mode zeros, got 'reflect'",
    ),
    "rows": (
        lambda: nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")(np.ones((4, 4), np.float32)),
        ValueError,
        r"Conv2d: x must have 4 dimensions \(N, C, H, W\), or 3 without N, got shape \(4, 4\)",
    ),
    "too small to reflect": (
        lambda: nn.Conv2d(1, 1, 3, padding=4, padding_mode="reflect")(np.ones((1, 1, 4, 9), np.float32)),
        ValueError,
        "reflect padding of 4 needs a larger height than 4",
    ),
    "weights' shape": (lambda: nn.WeightedAvgPool2d([1, 2]), ValueError, r"weights must have shape \(KH, KW\), got"),
    "weights' sum": (lambda: nn.WeightedAvgPool2d([[1, -1]]), ValueError, "finite and their sum positive"),
    "weights' nan": (lambda: nn.WeightedAvgPool2d([[1, np.nan]]), ValueError, "finite and their sum positive"),
    "pooled rows": (lambda: nn.WeightedAvgPool2d([[1, 1]])(np.ones((4, 4))), ValueError, "WeightedAvgPool2d: x must"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
