"""Winograd F(4x4, 3x3): its error, its edges, and what a NaN or an Inf does to the tile it lies in."""

import numpy as np
import pytest
from conv_cases import LAYOUTS, laid, nchw

from tilewise import conv2d, explain, using
from tilewise.kernels import operation
from tilewise.kernels.cpu import conv_winograd_nhwc

# (batch, channels, height, width, outputs, groups, padding): around the 4x4 tile, the block of 48 tiles, the 16 lanes
CASES = [
    (1, 1, 3, 3, 1, 1, 1),
    (2, 3, 4, 5, 7, 1, 1),
    (1, 17, 8, 9, 15, 1, 0),
    (3, 16, 16, 17, 33, 1, ((0, 2), (1, 0))),
    (1, 8, 29, 51, 16, 2, 1),
    (2, 65, 28, 28, 24, 1, 1),
    (1, 4, 57, 6, 5, 1, 3),
    # few tiles of many channels: chunks own outputs, and the channels come in pieces of 128
    (2, 130, 9, 10, 70, 1, 1),
    (1, 64, 30, 29, 66, 2, 1),
    # more tiles than that, in blocks of 56
    (3, 20, 21, 22, 34, 1, 1),
]


def operands(rng, case):
    n, c, h, w, o, groups, _ = case
    x = rng.standard_normal((n, c, h, w), dtype=np.float32)
    weight = rng.standard_normal((o, c // groups, 3, 3), dtype=np.float32)
    return x, weight, rng.standard_normal(o, dtype=np.float32)


def definition(x, weight, bias, groups, padding, activation=None):
    with using(backend="reference"):
        arrays = [a.astype(np.float64) for a in (x, weight, bias)]
        return conv2d(*arrays, groups=groups, padding=padding, activation=activation)


def winograd(x, weight, bias, layout, **options):
    return nchw(conv2d(laid(x, layout), weight, bias, layout=layout, algorithm="winograd", **options), layout)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relative_error_below_1e_5(rng, case, activation, layout):
    x, weight, bias = operands(rng, case)
    weight /= weight[0].size ** 0.5  # or tanh would be 1 everywhere
    expected = definition(x, weight, bias, *case[5:], activation)
    y = winograd(x, weight, bias, layout, groups=case[5], padding=case[6], activation=activation)
    assert y.shape == expected.shape
    assert np.linalg.norm(y - expected) <= 1e-5 * np.linalg.norm(expected)
    assert np.abs(y - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_weights_are_shared_out_by_outputs(rng, layout, monkeypatch):
    case = (3, 40, 29, 30, 34, 1, 1)
    monkeypatch.setattr(conv_winograd_nhwc, "LARGE_U", 36 * 40 * 34)
    assert conv_winograd_nhwc.convolve(3, 40, 34, 29, 30) is conv_winograd_nhwc.convolve_few
    x, weight, bias = operands(rng, case)
    operation.forget_plans()
    try:
        results = []
        for threads in (1, 2, 3):
            with using(threads=threads):
                results.append(winograd(x, weight, bias, layout, padding=1))
    finally:
        operation.forget_plans()
    expected = definition(x, weight, bias, 1, 1)
    assert np.linalg.norm(results[0] - expected) <= 1e-5 * np.linalg.norm(expected)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [5, 40])
def test_a_non_finite_input_reaches_only_its_windows(rng, value, layout, channels):
    x, weight, bias = operands(rng, (2, channels, 13, 14, 9, 1, 1))
    x[0, 2, 5, 6] = value
    x[1, 4, 12, 13] = value
    expected = definition(x, weight, bias, 1, 1)
    y = winograd(x, weight, bias, layout, padding=1)
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(expected))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    finite = np.isfinite(expected)
    assert finite.sum() == expected.size - 9 * (9 + 4)  # nine outputs; a window inside, and one in the corner
    assert np.abs(y[finite] - expected[finite]).max() <= 1e-4 * np.abs(expected[finite]).max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_non_finite_weight_reaches_its_output_alone(rng, layout):
    x, weight, bias = operands(rng, (1, 5, 13, 14, 9, 1, 1))
    weight[3, 1, 1, 1] = np.inf
    y = winograd(x, weight, bias, layout, padding=1)
    assert not np.isfinite(y[0, 3]).any()
    assert np.isfinite(np.delete(y[0], 3, axis=0)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("finite", [True, False])
def test_same_bits_for_any_number_of_threads(rng, split_everything, layout, images, finite):
    x, weight, bias = operands(rng, (images, 48, 28, 28, 66, 1, 1))
    if not finite:
        x[0, 3, 9, 14] = np.nan  # its tiles' other outputs are computed by the definition
    results = []
    for threads in (1, 2, 3):
        with using(threads=threads):
            results.append(winograd(x, weight, bias, layout, padding=1))
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


def test_chosen_where_it_pays_and_never_in_float64():
    x, weight = np.ones((8, 64, 56, 56), np.float32), np.ones((64, 64, 3, 3), np.float32)
    assert explain(conv2d, x, weight, padding=1).algorithm == "winograd"
    decision = explain(conv2d, x.astype(np.float64), weight.astype(np.float64), padding=1)
    assert decision.algorithm == "gemm"
    assert "float32 only" in decision.rejected["winograd"]
    small = explain(conv2d, x[:1, :, :7, :7], weight, padding=1)
    assert small.algorithm == "gemm"
    assert "estimated" in small.rejected["winograd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"stride": 2}, "3x3 kernel with stride"), ({"dilation": 2}, "3x3 kernel")],
)
def test_where_it_does_not_apply_it_raises(options, message):
    x, weight = np.ones((1, 8, 8, 8), np.float32), np.ones((8, 8, 3, 3), np.float32)
    with pytest.raises(ValueError, match=message):
        conv2d(x, weight, algorithm="winograd", **options)
