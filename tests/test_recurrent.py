"""The recurrent kernels against the reference, and the reference's gradients against numerical ones.

tests/test_nn_recurrent.py compares both with PyTorch.
"""

from typing import Any

import numpy as np
import pytest
from gradcheck import assert_gradient, numerical_gradient
from tolerances import assert_close

import tilewise
from tilewise import kernels
from tilewise.kernels.cpu.recurrent import MOST_ROWS, OWN_INPUT
from tilewise.kernels.cpu.simd import MR

KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "lstm": (4, {}),
    "rnn of tanh": (1, {"nonlinearity": "tanh"}),
    "rnn of relu": (1, {"nonlinearity": "relu"}),
}
BOTH = pytest.mark.parametrize("kind", KINDS)
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["single", "double"])
# (T, N, F, H): one row; below and from where a step multiplies its own input; a register tile's edges; a row too many
# for one task; one step, one unit.
SHAPES = [
    (5, 1, 3, 7),
    (4, OWN_INPUT - 1, 9, 16),
    (4, OWN_INPUT, 9, 33),
    (3, MR + 1, 5, 32),
    (3, MOST_ROWS + 1, 2, 17),
    (1, 2, 4, 65),
    (6, 3, 1, 1),
]


class Layer:
    """Random operands of a layer, and its calls with them."""

    def __init__(self, rng, kind: str, shape: tuple, dtype, optional: bool = True):
        steps, n, features, size = shape
        gates, self.options = KINDS[kind]
        self.name = kind.partition(" ")[0]

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(dtype)

        self.x, scale = normal(steps, n, features), dtype(size**-0.5)
        self.weights = normal(gates * size, features), normal(gates * size, size) * scale
        states = 2 if gates > 1 else 1
        self.bias = normal(gates * size) if optional else None
        self.start = tuple(normal(n, size) if optional else None for _ in range(states))
        self.grad = normal(steps, n, size)
        self.final = tuple(normal(n, size) if optional else None for _ in range(states))

    def forward(self) -> tuple:
        """(hidden, ...) as backward needs them."""
        options = {"return_gates": True} if self.name == "lstm" else self.options
        result = getattr(kernels, self.name)(self.x, *self.weights, self.bias, *self.start, **options)
        return result if isinstance(result, tuple) else (result,)

    def backward(self, kept: tuple, **options) -> tuple:
        function = getattr(kernels, f"{self.name}_backward")
        return function(self.grad, *self.final, self.x, *self.weights, *kept, **self.options, **options)

    def both(self) -> list[np.ndarray]:
        kept = self.forward()
        return [*kept, *self.backward(kept)]


@DTYPES
@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_the_reference(rng, kind, shape, dtype):
    layer = Layer(rng, kind, shape, dtype, optional=shape != SHAPES[1])
    actual = layer.both()
    with tilewise.using(backend="reference"):
        expected = layer.both()
    steps, n, features, size = shape
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, steps * (n + features + 4 * size))


@BOTH
def test_gradients_are_the_numerical_ones(rng, kind):
    layer = Layer(rng, kind, (3, 2, 2, 3), np.float64)
    with tilewise.using(backend="reference"):
        gradients = layer.backward(layer.forward())
        operands = [layer.x, *layer.weights, layer.bias, *layer.start]
        for i, gradient in enumerate(gradients):

            def loss(values, i=i):
                layer.x, weight_ih, weight_hh, layer.bias, *start = (
                    values if i == j else operand for j, operand in enumerate(operands)
                )
                layer.weights, layer.start = (weight_ih, weight_hh), tuple(start)
                hidden, *others = layer.forward()
                finals = (hidden[-1], *(cells[-1] for cells in others[:1]))
                ends = sum((f * g).sum() for f, g in zip(finals, layer.final, strict=True))
                return np.asarray((hidden[1:] * layer.grad).sum() + ends)

            assert_gradient(gradient, numerical_gradient(loss, operands[i], np.asarray(1.0)))


@pytest.mark.parametrize("n", [2, OWN_INPUT])
@pytest.mark.parametrize("steps", [3, 4])
def test_without_gates_the_states_are_the_same(rng, steps, n):
    layer = Layer(rng, "lstm", (steps, n, 5, 9), np.float32)
    hidden, cells, _ = layer.forward()
    short, final = kernels.lstm(layer.x, *layer.weights, layer.bias, *layer.start)
    np.testing.assert_array_equal(short, hidden)
    np.testing.assert_array_equal(final, cells[-1])


@BOTH
def test_threads_do_not_change_the_bits(rng, kind, split_everything):
    layer = Layer(rng, kind, (4, 23, 6, 18), np.float32)
    results = []
    for threads in (1, 2, 3):
        with tilewise.using(threads=threads):
            results.append(layer.both())
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, same)


@BOTH
def test_only_what_is_needed(rng, kind):
    layer = Layer(rng, kind, (3, 2, 4, 5), np.float32)
    kept = layer.forward()
    whole = layer.backward(kept)
    for i, name in enumerate(("x", "weight_ih", "weight_hh", "bias")):
        some = layer.backward(kept, needs=(name,))
        assert [j for j in range(4) if some[j] is not None] == [i]
        for j in (i, *range(4, len(whole))):
            np.testing.assert_array_equal(some[j], whole[j])


@BOTH
def test_strides_halves_and_operands_left_alone(rng, kind):
    layer = Layer(rng, kind, (3, 2, 4, 5), np.float32)
    expected = layer.both()
    layer.x = np.ascontiguousarray(layer.x.swapaxes(0, 1)).swapaxes(0, 1)
    layer.weights = tuple(np.asfortranarray(weight) for weight in layer.weights)
    held = [layer.x, *layer.weights, layer.bias, *layer.start, layer.grad, *layer.final]
    before = [array.copy() for array in held]
    for one, same in zip(layer.both(), expected, strict=True):
        np.testing.assert_array_equal(one, same)
    for array, same in zip(held, before, strict=True):
        np.testing.assert_array_equal(array, same)
    half = [array.astype(np.float16) for array in held]
    layer.x, layer.weights, layer.bias = half[0], tuple(half[1:3]), half[3]
    layer.start = tuple(half[4 : 4 + len(layer.start)])
    (hidden, *_), (exact, *_) = layer.forward(), expected
    assert hidden.dtype == np.float16
    assert_close(hidden, exact, 40, scale=4 * float(np.abs(exact).max()))


@BOTH
def test_no_sequences_and_no_steps(rng, kind):
    for shape in ((3, 0, 4, 5), (0, 2, 4, 5)):
        layer = Layer(rng, kind, shape, np.float32)
        actual = layer.both()
        with tilewise.using(backend="reference"):
            expected = layer.both()
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@BOTH
@pytest.mark.parametrize("n", [3, OWN_INPUT])
def test_a_nan_stays_in_its_sequence(rng, kind, n):
    layer = Layer(rng, kind, (4, n, 3, 20), np.float32)
    expected = layer.forward()[0]
    layer.x[1, 1, 2] = np.nan
    hidden = layer.forward()[0]
    assert np.isnan(hidden[2:, 1]).all()
    np.testing.assert_array_equal(np.delete(hidden, 1, 1), np.delete(expected, 1, 1))


X, IH, HH = np.ones((3, 2, 4), np.float32), np.ones((20, 4), np.float32), np.ones((20, 5), np.float32)
STATE, HIDDEN = np.ones((2, 5), np.float32), np.ones((4, 2, 5), np.float32)
GRAD, GATES = np.ones((3, 2, 5), np.float32), np.ones((3, 2, 20), np.float32)
WRONG = [
    (lambda: kernels.lstm(X[0], IH, HH), ValueError, r"lstm: x must have shape \(steps, N, features\), got \(2, 4\)"),
    (lambda: kernels.lstm(X, IH, HH[:15]), ValueError, r"weight_hh must have shape \(4 \* hidden, hidden\), got \(15"),
    (lambda: kernels.rnn(X, IH, HH), ValueError, r"rnn: weight_hh must have shape \(hidden, hidden\), got \(20, 5\)"),
    (lambda: kernels.lstm(X, IH[:, :3], HH), ValueError, r"weight_ih must have shape .* = \(20, 4\), got \(20, 3\)"),
    (lambda: kernels.lstm(X, IH, HH, IH[:5, 0]), ValueError, r"bias must have shape \(4 \* hidden,\) = \(20,\), got"),
    (lambda: kernels.lstm(X, IH, HH, None, STATE[:1]), ValueError, r"lstm: h must have shape \(N, hidden\) = \(2, 5\)"),
    (lambda: kernels.lstm(X, IH, HH, None, None, STATE.T), ValueError, r"lstm: c must have shape .*, got \(5, 2\)"),
    (lambda: kernels.lstm(X, IH.astype(float), HH), TypeError, r"lstm: weight_ih is float64 but x is float32"),
    (lambda: kernels.rnn(X.astype(int), IH.astype(int), HH.astype(int)), TypeError, r"rnn: x is int64, which is not"),
    (lambda: kernels.lstm(X, None, HH), TypeError, r"lstm: weight_ih must be an array, got None"),
    (
        lambda: kernels.rnn(X, IH[:5], HH[:5], nonlinearity="relu6"),
        ValueError,
        r'must be "tanh" or "relu", got \'relu6',
    ),
    (
        lambda: kernels.lstm_backward(GRAD[:2], None, None, X, IH, HH, HIDDEN, HIDDEN, GATES),
        ValueError,
        r"lstm_backward: grad must have shape \(steps, N, hidden\) = \(3, 2, 5\), got \(2, 2, 5\)",
    ),
    (
        lambda: kernels.lstm_backward(GRAD, None, None, X, IH, HH, HIDDEN, HIDDEN[1:], GATES),
        ValueError,
        r"lstm_backward: cells must have shape \(steps \+ 1, N, hidden\) = \(4, 2, 5\), got \(3, 2, 5\)",
    ),
    (
        lambda: kernels.lstm_backward(GRAD, None, None, X, IH, HH, HIDDEN, HIDDEN, GRAD),
        ValueError,
        r"lstm_backward: gates must have shape \(steps, N, 4 \* hidden\) = \(3, 2, 20\), got",
    ),
    (
        lambda: kernels.rnn_backward(GRAD, None, X, IH[:5], HH[:5], HIDDEN, needs=("h",)),
        ValueError,
        r"rnn_backward: needs may hold 'x', 'weight_ih', 'weight_hh', 'bias', got 'h'",
    ),
    (lambda: kernels.rnn_backward(GRAD, GRAD, X, IH[:5], HH[:5], HIDDEN), ValueError, r"grad_h must have shape \(N, h"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_explained():
    decision = tilewise.explain(kernels.lstm, X, IH, HH)
    assert (decision.backend, decision.flops) == ("cpu", 2 * 3 * 2 * 20 * (4 + 5))
