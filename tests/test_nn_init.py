"""Initial values: their variances, their seeds, and that the layers use them."""

from functools import partial

import numpy as np
import pytest

from tilewise import nn

DENSE, FILTERS = (300, 200), (60, 40, 5, 5)


@pytest.mark.parametrize("shape", [DENSE, FILTERS], ids=["dense", "filters"])
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize(
    ("scheme", "options", "variance"),
    [
        ("he", {}, lambda n_in, n_out: 2 / n_in),
        ("he", {"mode": "fan_out"}, lambda n_in, n_out: 2 / n_out),
        ("he", {"mode": "fan_avg"}, lambda n_in, n_out: 4 / (n_in + n_out)),
        ("xavier", {}, lambda n_in, n_out: 2 / (n_in + n_out)),
    ],
)
def test_variances(scheme, distribution, options, variance, shape):
    values = getattr(nn.init, f"{scheme}_{distribution}")(shape, 0, np.float64, **options)
    taps = int(np.prod(shape[2:]))
    expected = variance(shape[1] * taps, shape[0] * taps)
    # The relative spread of a variance of n normal values is sqrt(2 / n); five of them.
    allowed = 5 * (2 / values.size) ** 0.5
    assert abs(values.var() / expected - 1) < allowed
    assert abs(values.mean()) < 5 * (expected / values.size) ** 0.5
    if distribution == "uniform":
        assert 0.99 < np.abs(values).max() / (3 * expected) ** 0.5 <= 1
    else:
        assert np.abs(values).max() > 3.5 * expected**0.5  # tails that a uniform distribution lacks


@pytest.mark.parametrize("shape", [DENSE, FILTERS], ids=["dense", "filters"])
def test_bounds_are_pytorchs(torch, shape):
    for name, theirs in (("he_uniform", "kaiming_uniform_"), ("xavier_uniform", "xavier_uniform_")):
        options = {"nonlinearity": "relu"} if name == "he_uniform" else {}
        expected = getattr(torch.nn.init, theirs)(torch.empty(shape), **options).abs().max().item()
        assert abs(np.abs(getattr(nn.init, name)(shape, 0)).max() / expected - 1) < 1e-3


def test_default_is_pytorchs_distribution():
    layer = nn.Conv2d(40, 600, 5, rng=0)
    assert layer.bias is not None
    bound = (40 * 25) ** -0.5
    for values in (layer.weight.data, layer.bias.data):
        assert 0.98 < np.abs(values).max() / bound <= 1
        assert abs(values.astype(np.float64).var() / (bound**2 / 3) - 1) < 0.2


def test_layers_take_a_scheme_by_name_or_as_a_function():
    for name in ("normal", "he_normal", "he_uniform", "xavier_normal", "xavier_uniform"):
        layer = nn.Linear(20, 30, init=name, rng=3)
        np.testing.assert_array_equal(layer.weight.data, getattr(nn.init, name)((30, 20), 3))
        np.testing.assert_array_equal(layer.bias.data, np.zeros(30))
    assert not nn.Linear(4, 4, init="zeros").weight.data.any()
    layer = nn.Conv2d(2, 3, 5, init=lambda shape, rng, dtype: nn.init.normal(shape, rng, dtype, 0.01), rng=3)
    np.testing.assert_array_equal(layer.weight.data, nn.init.normal((3, 2, 5, 5), 3, np.float32, 0.01))


def test_the_lectures_form_of_he():
    """Variance 4 / (n_in + n_out), in a layer."""
    layer = nn.Linear(300, 500, init=partial(nn.init.he_normal, mode="fan_avg"), rng=0)
    assert layer.weight.data.var() == pytest.approx(4 / 800, rel=5 * (2 / 150_000) ** 0.5)


def test_seeds():
    first, same, other = (nn.models.lenet5(rng=seed).state_dict() for seed in (5, 5, 6))
    for name, value in first.items():
        np.testing.assert_array_equal(value, same[name])
        assert (value != other[name]).any()
    shared = np.random.default_rng(5)  # one generator for several layers: each draws on
    assert (nn.Linear(3, 3, rng=shared).weight.data != nn.Linear(3, 3, rng=shared).weight.data).all()


def test_both_dtypes_get_the_same_numbers():
    single, double = (nn.Linear(5, 6, rng=2, dtype=dtype).weight.data for dtype in (np.float32, np.float64))
    assert (single.dtype, double.dtype) == (np.float32, np.float64)
    np.testing.assert_array_equal(single, double.astype(np.float32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.init.he_normal((5,)), r"at least 2 dimensions for its fans, got shape \(5,\)"),
        (lambda: nn.init.he_normal((5, 5), mode="fan"), "mode must be one of fan_in, fan_out, fan_avg, got 'fan'"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()
