"""The weight gradient by Winograd: its error, its edges, parts of the tiles, NaN and Inf, threads, and when it is
chosen.
"""

import numpy as np
import pytest
from conv_cases import LAYOUTS, laid

from tilewise import conv2d_backward, using
from tilewise.kernels.cpu import conv_weight_gradient, conv_winograd_weight

# (batch, channels, height, width, outputs, padding): around the 4x4 tile, vectors of 16, panels of 48, blocks of 64
CASES = [
    (1, 1, 3, 3, 1, 1),
    (1, 1, 3, 3, 1, 0),
    (2, 3, 4, 5, 7, 1),
    (1, 17, 8, 9, 15, 0),
    (3, 16, 16, 17, 33, ((0, 2), (1, 0))),
    (1, 47, 5, 21, 16, 1),
    (2, 48, 13, 1, 65, 1),
    (1, 49, 1, 18, 8, 1),
    (1, 97, 6, 7, 129, 1),
    (2, 16, 9, 10, 16, 3),
    (9, 32, 14, 15, 32, 1),  # more than 128 tiles
]


def operands(rng, case, layout):
    n, c, h, w, o, padding = case
    (top, bottom), (left, right) = padding if isinstance(padding, tuple) else ((padding,) * 2,) * 2
    x = rng.standard_normal((n, c, h, w), dtype=np.float32)
    grad = rng.standard_normal((n, o, h + top + bottom - 2, w + left + right - 2), dtype=np.float32)
    return laid(grad, layout), laid(x, layout), np.zeros((o, c, 3, 3), np.float32)


def definition(grad, x, weight, **options):
    with using(backend="reference"):
        return conv2d_backward(*(a.astype(np.float64) for a in (grad, x, weight)), **options, needs=("weight",))[1]


@pytest.fixture
def by_winograd(monkeypatch):
    """Every problem that it applies to, and a list of the calls."""
    from tilewise.kernels import operation

    calls = []
    plan = conv_winograd_weight.plan
    monkeypatch.setattr(conv_weight_gradient, "WEIGHT_RATE", 1e-9)
    monkeypatch.setattr(conv_winograd_weight, "plan", lambda *args: (calls.append(args), plan(*args))[1])
    operation.forget_plans()
    yield calls
    operation.forget_plans()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_relative_error_below_1e_5(rng, by_winograd, case, layout):
    grad, x, weight = operands(rng, case, layout)
    expected = definition(grad, x, weight, padding=case[5], layout=layout)
    result = conv2d_backward(grad, x, weight, padding=case[5], layout=layout, needs=("weight",))[1]
    assert by_winograd
    assert np.linalg.norm(result - expected) <= 1e-5 * np.linalg.norm(expected)
    assert np.abs(result - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", [1, 2, 5])
def test_tiles_in_parts(rng, by_winograd, monkeypatch, part, layout):
    """U and V of so many rows of tiles at a time."""
    case = (3, 50, 11, 9, 70, 1)
    tile = 36 * 4 * 3 * (conv_winograd_weight.NR * -(-50 // conv_winograd_weight.NR) + 80)
    monkeypatch.setattr(conv_winograd_weight, "SMALL_BYTES", part * tile)
    grad, x, weight = operands(rng, case, layout)
    expected = definition(grad, x, weight, padding=1, layout=layout)
    result = conv2d_backward(grad, x, weight, padding=1, layout=layout, needs=("weight",))[1]
    (geometry,) = conv_winograd_weight.plan(*by_winograd[0])
    assert geometry[11] <= part
    assert np.linalg.norm(result - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["x", "grad"])
def test_a_non_finite_number_reaches_only_its_taps(rng, by_winograd, value, layout, where):
    """Also one that is finite, but not after the transform."""
    grad, x, weight = operands(rng, (2, 20, 13, 14, 18, 0), layout)
    one = laid(np.zeros((2, 20 if where == "x" else 18, *((13, 14) if where == "x" else (11, 12)))), layout)
    one[(0, 2, 0, 0) if layout == "NCHW" else (0, 0, 0, 2)] = 1
    array = x if where == "x" else grad
    array[one == 1] = value
    if value == 3e38:
        other = grad if where == "x" else x
        other *= 0.01
    expected = definition(grad, x, weight, layout=layout)
    result = conv2d_backward(grad, x, weight, layout=layout, needs=("weight",))[1]
    finite = np.isfinite(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isfinite(result), finite)
    np.testing.assert_array_equal(np.isnan(result), np.isnan(expected))
    assert np.abs(result[finite] - expected[finite]).max() <= 1e-4 * np.abs(expected[finite]).max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_for_any_number_of_threads(rng, by_winograd, split_everything, monkeypatch, layout):
    grad, x, weight = operands(rng, (2, 50, 20, 21, 130, 1), layout)
    for size in (conv_winograd_weight.BYTES, 1 << 20):
        from tilewise.kernels import operation

        operation.forget_plans()
        monkeypatch.setattr(conv_winograd_weight, "SMALL_BYTES", size)
        results = []
        for threads in (1, 2, 3):
            with using(threads=threads):
                results.append(conv2d_backward(grad, x, weight, padding=1, layout=layout, needs=("weight",))[1])
        assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


def test_chosen_where_it_pays(rng, monkeypatch):
    from tilewise.kernels import operation

    calls = []
    plan = conv_winograd_weight.plan
    monkeypatch.setattr(conv_winograd_weight, "plan", lambda *args: (calls.append(args), plan(*args))[1])
    operation.forget_plans()
    for case, dtype, chosen in (
        ((4, 32, 28, 28, 64, 1), np.float32, True),
        ((4, 32, 28, 28, 64, 1), np.float64, False),
        ((4, 3, 28, 28, 64, 1), np.float32, False),
        ((1, 64, 7, 7, 64, 1), np.float32, False),
    ):
        calls.clear()
        grad, x, weight = (a.astype(dtype) for a in operands(rng, case, "NCHW"))
        conv2d_backward(grad, x, weight, padding=1)
        assert bool(calls) == chosen, (case, dtype)
    operation.forget_plans()
