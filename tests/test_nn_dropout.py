"""Dropout: what it drops, and that the choice is the kernel's."""

import pickle

import numpy as np
import pytest

import tilewise
from tilewise import nn


class TestDropout:
    def test_drops_a_share_p_and_rescales_the_rest(self):
        x = np.full((200, 500), 3.0)
        y = nn.Dropout(0.3, rng=0)(x)
        dropped = (y == 0).mean()
        assert abs(dropped - 0.3) < 5 * (0.3 * 0.7 / x.size) ** 0.5  # five standard deviations
        np.testing.assert_allclose(y[y != 0], 3 / 0.7)
        assert abs(y.mean() - 3) < 0.05

    def test_backward_drops_the_same_elements(self, rng):
        dropout = nn.Dropout(0.5, rng=1)
        x, grad = rng.standard_normal((20, 30)), rng.standard_normal((20, 30))
        y = dropout(x)
        np.testing.assert_allclose(dropout.backward(grad), np.where(y == 0, 0, 2 * grad))

    def test_evaluation_is_the_identity(self, rng):
        x = rng.standard_normal((4, 5)).astype(np.float32)
        np.testing.assert_array_equal(nn.Dropout(0.9, rng=0).eval()(x), x)

    def test_same_seed_same_choice(self, rng):
        x = rng.standard_normal((50, 50)).astype(np.float32)
        first, second, other = (nn.Dropout(0.5, rng=seed)(x) for seed in (7, 7, 8))
        np.testing.assert_array_equal(first, second)
        assert (first != other).any()
        assert first.dtype == np.float32

    def test_the_choice_depends_on_seed_and_call_alone(self, rng):
        x = rng.standard_normal((30, 7))
        first = nn.Dropout(0.5, rng=7)
        choices = [first(x) != 0 for _ in range(3)]
        assert (choices[0] != choices[1]).any()
        other = nn.Dropout(0.5, rng=7)
        other.calls = 2
        np.testing.assert_array_equal(other(x.astype(np.float32)) != 0, choices[2])
        other.eval()(x)  # counts nothing
        assert other.calls == first.calls == 3
        other.train().calls = 1
        np.testing.assert_array_equal(other(np.asfortranarray(x)) != 0, choices[1])
        other.calls = 0  # a longer array begins alike
        np.testing.assert_array_equal(other(np.ones((40, 7)))[:30] != 0, choices[0])
        resumed = pickle.loads(pickle.dumps(first))
        np.testing.assert_array_equal(resumed(x), first(x))

    def test_layers_of_one_generator_choose_differently(self):
        shared, x = np.random.default_rng(0), np.ones((50, 50))
        assert (nn.Dropout(0.5, rng=shared)(x) != nn.Dropout(0.5, rng=shared)(x)).any()

    @pytest.mark.parametrize("seed", [0, 2**64 - 1])
    def test_the_choice_is_the_kernels(self, rng, seed):
        x, dropout = rng.standard_normal((9, 11)), nn.Dropout(0.3, rng=seed)
        dropout.calls = 5
        y = dropout(x)
        np.testing.assert_array_equal(y, tilewise.dropout(x, 0.3, seed=seed, call=5))
        dropout.calls = 8  # backward is that of the last forward, whatever is set since
        np.testing.assert_array_equal(dropout.backward(x), y)

    @pytest.mark.parametrize(("p", "expected"), [(0, 1.0), (1, 0.0)])
    def test_extremes(self, p, expected):
        np.testing.assert_array_equal(nn.Dropout(p)(np.ones((3, 3))), np.full((3, 3), expected))


WRONG = {
    "p": (lambda: nn.Dropout(1.5), ValueError, r"Dropout: p must be from 0 to 1, got 1\.5"),
    "array for p": (lambda: nn.Dropout(np.array(0.5)), TypeError, r"Dropout: p must be a number, got array\(0\.5\)"),
    "text for p": (lambda: nn.Dropout("0.5"), TypeError, "Dropout: p must be a number, got '0.5'"),
    "True for p": (lambda: nn.Dropout(True), TypeError, "Dropout: p must be a number, got True"),
    "negative seed": (lambda: nn.Dropout(rng=-1), ValueError, "Dropout: rng must be at least 0, got -1"),
    "large seed": (lambda: nn.Dropout(rng=2**64), ValueError, r"Dropout: rng must be below 2\*\*64"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
