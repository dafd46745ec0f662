"""RNN and LSTM against PyTorch's, their gradients through time, and the three uses of the lectures."""

import pickle
from typing import Any

import numpy as np
import pytest
from gradcheck import assert_gradient, numerical_gradient
from tolerances import assert_close

import tilewise
from tilewise import nn

STEPS, N, INPUTS, HIDDEN = 6, 3, 4, 5

CASES = {
    "rnn": ("RNN", {}),
    "rnn of relu": ("RNN", {"nonlinearity": "relu", "num_layers": 2}),
    "rnn of three layers": ("RNN", {"num_layers": 3, "batch_first": True}),
    "rnn without bias": ("RNN", {"bias": False}),
    "lstm": ("LSTM", {}),
    "lstm of two layers": ("LSTM", {"num_layers": 2}),
    "lstm of three layers": ("LSTM", {"num_layers": 3, "batch_first": True}),
    "lstm without bias": ("LSTM", {"bias": False, "num_layers": 2}),
}


def tuple_of(state) -> tuple:
    return state if isinstance(state, tuple) else (state,)


def states(rng, layer, dtype) -> Any:
    """A random state, in the form that this kind of layer takes."""
    found = [rng.standard_normal((layer.num_layers, N, HIDDEN)).astype(dtype) for _ in layer.names]
    return tuple(found) if len(found) > 1 else found[0]


@pytest.mark.parametrize(
    ("dtype", "backend"), [(np.float32, None), (np.float64, "reference")], ids=["single", "double"]
)
@pytest.mark.parametrize("given", [False, True], ids=["from zeros", "from a state"])
@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_layer_equals_pytorchs(torch, rng, name, options, given, dtype, backend):
    with tilewise.using(backend=backend):
        compare(torch, rng, name, options, given, dtype)


def compare(torch, rng, name, options, given, dtype):
    theirs = getattr(torch.nn, name)(INPUTS, HIDDEN, **options).to(getattr(torch, np.dtype(dtype).name))
    ours = getattr(nn, name)(INPUTS, HIDDEN, **options, dtype=dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict({key: value.numpy() for key, value in theirs.state_dict().items()})

    x = rng.standard_normal((N, STEPS, INPUTS) if options.get("batch_first") else (STEPS, N, INPUTS)).astype(dtype)
    x_torch = torch.tensor(x, requires_grad=True)
    start = states(rng, ours, dtype) if given else None
    start_torch = tuple(torch.tensor(s, requires_grad=True) for s in tuple_of(start)) if given else ()
    output, final = ours(x, start)
    their_output, their_final = theirs(x_torch, start_torch if len(start_torch) > 1 else next(iter(start_torch), None))
    terms = STEPS * HIDDEN * 4
    assert_close(output, their_output.detach().numpy(), terms)
    assert output.dtype == dtype
    for actual, expected in zip(tuple_of(final), tuple_of(their_final), strict=True):
        assert_close(actual, expected.detach().numpy(), terms)

    cotangent, final_cotangent = rng.standard_normal(output.shape).astype(dtype), states(rng, ours, dtype)
    torch.autograd.backward(
        [their_output, *tuple_of(their_final)], [torch.tensor(c) for c in (cotangent, *tuple_of(final_cotangent))]
    )
    grad_x, grad_start = ours.backward(cotangent, final_cotangent)
    assert_close(grad_x, x_torch.grad.numpy(), terms)
    for (key, parameter), (_, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert parameter.grad is not None, key
        assert_close(parameter.grad, expected.grad.numpy(), terms * N)
    if given:
        for actual, expected in zip(tuple_of(grad_start), start_torch, strict=True):
            assert_close(actual, expected.grad.numpy(), terms)
    with pytest.raises(RuntimeError, match="call forward in training mode first"):
        ours.backward(cotangent)
    np.testing.assert_array_equal(ours.eval()(x, start)[0], output)


@pytest.fixture
def reference():
    with tilewise.using(backend="reference"):
        yield


def layer_of(kind: str, **options):
    return getattr(nn, kind)(INPUTS, HIDDEN, **({"rng": 0, "dtype": np.float64} | options))


@pytest.mark.parametrize("returns", ["all", "sequence", "last"])
@pytest.mark.parametrize("kind", ["RNN", "LSTM"])
def test_gradients_are_the_numerical_ones(rng, reference, kind, returns):
    layer = layer_of(kind, num_layers=2, returns=returns, batch_first=True)
    x = rng.standard_normal((2, 4, INPUTS))

    def output(x):
        result = layer(x)
        return result[0] if returns == "all" else result

    cotangent = rng.standard_normal(output(x).shape)
    grad = layer.backward(cotangent)
    assert_gradient(grad[0] if returns == "all" else grad, numerical_gradient(output, x, cotangent))
    for name, parameter in layer.named_parameters():
        values = parameter.data

        def changed(data, parameter=parameter):
            parameter.data = data
            return output(x)

        expected = numerical_gradient(changed, values, cotangent)
        parameter.data = values
        assert parameter.grad is not None, name
        assert_gradient(parameter.grad, expected)


@pytest.mark.parametrize("kind", ["RNN", "LSTM"])
def test_dropout_lies_between_the_layers(rng, reference, kind):
    layer = layer_of(kind, num_layers=3, dropout=0.4, returns="sequence")
    plain, x = layer_of(kind, num_layers=3, returns="sequence"), rng.standard_normal((4, 2, INPUTS))
    plain.load_state_dict(layer.state_dict())
    drops = [module for _, module in layer.modules() if isinstance(module, nn.Dropout)]
    assert len(drops) == 2

    def output(x):
        for drop in drops:
            drop.calls = 7
        return layer(x)

    cotangent = rng.standard_normal(output(x).shape)
    assert_gradient(layer.backward(cotangent), numerical_gradient(output, x, cotangent))
    assert (output(x) != layer(x)).any()  # another call, another choice
    np.testing.assert_array_equal(layer.eval()(x), plain.eval()(x))
    for name in ("dropout_l0", "dropout_l1"):
        setattr(layer.train(), name, nn.Identity())
    np.testing.assert_array_equal(layer(x), plain(x))


@pytest.mark.parametrize("kind", ["RNN", "LSTM"])
def test_what_is_returned(rng, reference, kind):
    x = rng.standard_normal((STEPS, N, INPUTS))
    output, final = layer_of(kind, num_layers=2)(x)
    np.testing.assert_array_equal(layer_of(kind, num_layers=2, returns="sequence")(x), output)
    np.testing.assert_array_equal(layer_of(kind, num_layers=2, returns="last")(x), output[-1])
    np.testing.assert_array_equal(tuple_of(final)[0][-1], output[-1])
    batch_first = layer_of(kind, num_layers=2, batch_first=True)
    np.testing.assert_array_equal(batch_first(x.swapaxes(0, 1))[0].swapaxes(0, 1), output)


@pytest.mark.parametrize("kind", ["RNN", "LSTM"])
def test_a_state_carries_a_sequence_on(rng, reference, kind):
    layer, x = layer_of(kind, num_layers=2).eval(), rng.standard_normal((STEPS, N, INPUTS))
    whole, final = layer(x)
    first, state = layer(x[:2])
    second, last = layer(x[2:], state)
    assert_close(np.concatenate([first, second]), whole, 5)
    for actual, expected in zip(tuple_of(last), tuple_of(final), strict=True):
        assert_close(actual, expected, 5)


def test_backward_leaves_what_the_caller_holds(rng, reference):
    layer, x = layer_of("LSTM"), rng.standard_normal((STEPS, N, INPUTS))
    output, final = layer(x)
    grad, grad_final = rng.standard_normal(output.shape), states(rng, layer, np.float64)
    held = (x, output, *final, grad, *grad_final)
    before = [array.copy() for array in held]
    layer.backward(grad, grad_final)
    for array, expected in zip(held, before, strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("kind", ["RNN", "LSTM"])
def test_frozen_parameters_and_first_layers(rng, reference, kind):
    layer, x = layer_of(kind, num_layers=2, returns="last"), rng.standard_normal((STEPS, N, INPUTS))
    cotangent = rng.standard_normal(layer(x).shape)
    layer.backward(cotangent)
    expected = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    frozen = ("weight_hh_l0", "weight_ih_l1", "bias_ih_l0")
    for name, parameter in layer.named_parameters():
        parameter.requires_grad = name not in frozen
    layer(x)
    layer.backward_parameters(cotangent)
    for name, parameter in layer.named_parameters():
        if name in frozen:
            assert parameter.grad is None
        else:
            np.testing.assert_array_equal(parameter.grad, expected[name])
    assert layer_of(kind).bias_ih_l0.grad is None


def test_the_two_biases_have_gradients_of_their_own(rng, reference):
    layer, x = layer_of("RNN", returns="last"), rng.standard_normal((STEPS, N, INPUTS))
    layer.backward(np.ones_like(layer(x)))
    kept = layer.bias_hh_l0.grad.copy()
    layer.bias_ih_l0.grad *= 2
    np.testing.assert_array_equal(layer.bias_hh_l0.grad, kept)


def test_initial_values_are_pytorchs_distribution():
    layer = nn.LSTM(50, 100, rng=0)
    for name, parameter in layer.named_parameters():
        assert 0.095 < np.abs(parameter.data).max() <= 0.1, name
    same = nn.LSTM(50, 100, rng=0).state_dict()
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, same[name])


def test_copies_repr_and_saturated_gates(reference):
    layer = layer_of("LSTM", num_layers=2, batch_first=True, returns="last")
    assert repr(layer) == "LSTM(4, 5, num_layers=2, batch_first=True, returns='last')"
    x = np.full((2, 3, INPUTS), 1e6)
    assert np.isfinite(layer(x)).all()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_a_network_names_and_sums_up_its_recurrent_layers(reference):
    model = nn.Sequential(nn.Identity(), nn.LSTM(INPUTS, HIDDEN, returns="last"), nn.Linear(HIDDEN, 2))
    with pytest.raises(ValueError, match="LSTM: x must have shape") as refused:
        model(X[..., :3])
    assert refused.value.__notes__ == ["in layer 1 (LSTM), called with x of shape (6, 3, 3)"]
    shapes = {layer.name: layer.output_shape for layer in nn.summary(model, X.shape).layers}
    assert shapes["1"] == (N, HIDDEN)
    assert shapes["2"] == (N, 2)


@pytest.mark.parametrize(("kind", "gates"), [("RNN", 1), ("LSTM", 4)])
@pytest.mark.parametrize("returns", ["all", "sequence", "last"])
def test_summary_counts_the_products_of_all_steps(kind, gates, returns):
    """Every gate of every step: 2 for each weight, and the two biases, added together, once."""
    layer = getattr(nn, kind)(5, 3, 2, batch_first=True, returns=returns)
    (found,) = nn.summary(layer, (4, 7, 5)).layers
    assert found.flops == 4 * 7 * gates * 3 * ((2 * (5 + 3) + 1) + (2 * (3 + 3) + 1))
    (found,) = nn.summary(getattr(nn, kind)(5, 3, bias=False, returns=returns), (7, 4, 5)).layers
    assert found.flops == 4 * 7 * gates * 3 * 2 * (5 + 3)


def learn(model: nn.Module, loss: nn.Loss, x: np.ndarray, y: np.ndarray, epochs: int, lr: float = 0.02) -> float:
    with tilewise.using(backend="reference"):
        descent = nn.Adam(model.parameters(), lr)
        nn.fit(model, loss, descent, x, y, epochs=epochs, batch_size=16, rng=0, progress=False)
        return nn.evaluate(model, loss, x, y).loss


KINDS = pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM], ids=["RNN", "LSTM"])


@KINDS
def test_sequence_to_sequence_learns_to_remember(kind, rng):
    """The input of the step before: no layer without a memory can tell it, and the mean square of guessing is 1."""
    x = rng.choice([-1.0, 1.0], (64, 8, 1))
    y = np.concatenate([np.zeros((64, 1, 1)), x[:, :-1]], 1)
    options = {"rng": rng, "dtype": np.float64}
    recurrent = kind(1, 8, batch_first=True, returns="sequence", **options)
    assert learn(nn.Sequential(recurrent, nn.Linear(8, 1, **options)), nn.MSELoss(), x, y, 40) < 0.05


@KINDS
def test_sequence_to_vector_learns_which_came_first(kind, rng):
    x = rng.standard_normal((64, 6, 2)) * 0.1
    labels = rng.integers(0, 2, 64)
    x[np.arange(64), 0, labels] += 1
    options = {"rng": rng, "dtype": np.float64}
    recurrent = kind(2, 8, 2, batch_first=True, returns="last", **options)
    model = nn.Sequential(recurrent, nn.Linear(8, 2, **options))
    assert learn(model, nn.CrossEntropyLoss(), x, labels, 40) < 0.1


@KINDS
def test_vector_to_sequence_learns_to_count(kind, rng):
    """From (start, step) to start, start + step, start + 2 step, ..."""
    x = rng.uniform(-0.3, 0.3, (64, 2))
    y = x[:, None, :1] + np.arange(5)[None, :, None] * x[:, None, 1:]
    options = {"rng": rng, "dtype": np.float64}
    recurrent = kind(2, 12, batch_first=True, returns="sequence", **options)
    model = nn.Sequential(nn.Repeat(5, batch_first=True), recurrent, nn.Linear(12, 1, **options))
    assert learn(model, nn.MSELoss(), x, y, 60) < 0.05 * y.var()


@pytest.mark.parametrize("batch_first", [False, True])
def test_repeat(rng, batch_first):
    layer, x = nn.Repeat(3, batch_first), rng.standard_normal((2, 4))
    y = layer(x)
    assert y.shape == ((2, 3, 4) if batch_first else (3, 2, 4))
    cotangent = rng.standard_normal(y.shape)
    assert_gradient(layer.backward(cotangent), numerical_gradient(layer.eval(), x, cotangent))
    assert repr(layer) == f"Repeat(steps=3, batch_first={batch_first})"


X = np.ones((STEPS, N, INPUTS), np.float32)
STATE = np.zeros((1, N, HIDDEN), np.float32)
WRONG = {
    "features": (
        lambda: nn.RNN(3, HIDDEN)(X),
        ValueError,
        r"RNN: x must have shape \(steps, N, 3\), got \(6, 3, 4\)",
    ),
    "axes": (
        lambda: nn.LSTM(INPUTS, HIDDEN, batch_first=True)(X[0]),
        ValueError,
        r"LSTM: x must have shape \(N, steps, 4\), got \(3, 4\)",
    ),
    "no steps": (lambda: nn.RNN(INPUTS, HIDDEN)(X[:0]), ValueError, "RNN: x has no steps"),
    "state's shape": (
        lambda: nn.RNN(INPUTS, HIDDEN, 2)(X, STATE),
        ValueError,
        r"RNN: state h must have shape \(2, 3, 5\), got \(1, 3, 5\)",
    ),
    "state's dtype": (
        lambda: nn.RNN(INPUTS, HIDDEN)(X, STATE.astype(float)),
        TypeError,
        "RNN: state h is float64 but x is float32",
    ),
    "one state": (
        lambda: nn.LSTM(INPUTS, HIDDEN)(X, STATE),
        TypeError,
        r"LSTM: state must be a tuple \(h, c\), got ndarray",
    ),
    "returns": (lambda: nn.RNN(1, 1, returns="first"), ValueError, "RNN: returns must be one of all, sequence, last"),
    "nonlinearity": (lambda: nn.RNN(1, 1, nonlinearity="sin"), ValueError, 'must be "tanh" or "relu", got \'sin\''),
    "layers": (lambda: nn.LSTM(1, 1, 0), ValueError, "LSTM: num_layers must be at least 1, got 0"),
    "dropout": (lambda: nn.LSTM(1, 1, 2, dropout=2), ValueError, "LSTM: dropout must be from 0 to 1, got 2"),
    "dropout True": (lambda: nn.LSTM(1, 1, 2, dropout=True), TypeError, "LSTM: dropout must be a number, got True"),
    "dropout, one layer": (lambda: nn.RNN(1, 1, dropout=-1), ValueError, "RNN: dropout must be from 0 to 1, got -1"),
    "dtype": (lambda: nn.LSTM(1, 1, dtype=int), TypeError, "LSTM: dtype must be float16, float32 or float64"),
    "repeated images": (lambda: nn.Repeat(2)(X), ValueError, r"Repeat: x must have shape \(N, features\), got"),
    "backward first": (lambda: nn.RNN(1, 1).backward(X), RuntimeError, "RNN.backward: nothing to go back from"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("returns", "shape"), [("sequence", (6, 3, 5)), ("last", (3, 5))])
def test_wrong_gradient_shape(reference, returns, shape):
    layer = nn.RNN(INPUTS, HIDDEN, returns=returns)
    layer(X)
    with pytest.raises(ValueError, match=rf"RNN\.backward: grad must have shape \({str(shape)[1:-1]}\), got \(6, 5\)"):
        layer.backward(np.ones((6, 5), np.float32))


@pytest.mark.parametrize("name", ["RNN", "LSTM"])
def test_on_the_cpu_also_where_a_gpu_is_pinned(gpu, rng, name):
    layer = getattr(nn, name)(INPUTS, HIDDEN, returns="last", rng=0)
    x = rng.standard_normal((STEPS, N, INPUTS), dtype=np.float32)
    with tilewise.using(device="gpu"):
        pinned = layer(x), layer.backward(np.ones((N, HIDDEN), np.float32))
    with tilewise.using(device="cpu"):
        free = layer(x), layer.backward(np.ones((N, HIDDEN), np.float32))
    assert all(one.tobytes() == other.tobytes() for one, other in zip(pinned, free, strict=True))
