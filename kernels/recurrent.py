"""Recurrent layers, RNN (Elman 1990) and LSTM (Hochreiter and Schmidhuber 1997): one layer over a whole sequence.

With T steps of N sequences, F features and H hidden units. The states that a forward returns begin with the initial
one, so that the output of step t is hidden[t + 1], and their last is the final one. Gates are in PyTorch's order.
"""

from tilewise.kernels import shapes
from tilewise.kernels.arrays import common_dtype, required
from tilewise.kernels.operation import Operation, Problem

_ALL = ("x", "weight_ih", "weight_hh", "bias")
NONLINEARITIES = ("tanh", "relu")


def lstm(x, weight_ih, weight_hh, bias=None, h=None, c=None, *, return_gates=False):
    """c_t = f * c_(t-1) + i * g and h_t = o * tanh(c_t), where * goes element by element.

    (i, f, g, o) = x_t weight_ih^T + h_(t-1) weight_hh^T + bias, each of H features, then tanh for g and the sigmoid for
    the others.

    Args:
        x: (T, N, F), float16, float32 or float64, any strides.
        weight_ih: (4H, F). weight_hh: (4H, H).
        bias: (4H,), PyTorch's bias_ih + bias_hh, or None for none.
        h, c: the initial states, (N, H); None for zeros.
        return_gates: whether the gates and the cells of all steps are returned, which `lstm_backward` needs.

    Returns:
        (hidden (T + 1, N, H), the final cells (N, H)), or with return_gates
        (hidden, cells (T + 1, N, H), gates (T, N, 4H)).

    Raises:
        TypeError: not arrays, or dtypes that differ or are not supported.
        ValueError: shapes that do not fit together.
    """
    return _LSTM.call((x, weight_ih, weight_hh, bias, h, c), (bool(return_gates),))


def lstm_backward(grad, grad_h, grad_c, x, weight_ih, weight_hh, hidden, cells, gates, *, needs=_ALL):
    """The gradients of `lstm`, by backpropagation through time (Werbos 1990).

    Args:
        grad: (T, N, H), the gradient of the outputs hidden[1:].
        grad_h, grad_c: (N, H), those of the final states (added to grad's last step); None for zeros.
        x, weight_ih, weight_hh: the operands of the forward call.
        hidden, cells, gates: what it returned with return_gates.
        needs: which gradients to compute, out of "x", "weight_ih", "weight_hh" and "bias".

    Returns:
        (grad_x, grad_weight_ih, grad_weight_hh, grad_bias, grad_h, grad_c), the last two of the initial states; None
        for one that is not needed.

    Raises:
        TypeError, ValueError: as `lstm`; also for an unknown name in `needs`.
    """
    return _LSTM_BACKWARD.call((grad, grad_h, grad_c, x, weight_ih, weight_hh, hidden, cells, gates), (needs,))


def rnn(x, weight_ih, weight_hh, bias=None, h=None, *, nonlinearity="tanh"):
    """h_t = nonlinearity(x_t weight_ih^T + h_(t-1) weight_hh^T + bias).

    Args:
        x: (T, N, F), float16, float32 or float64, any strides.
        weight_ih: (H, F). weight_hh: (H, H).
        bias: (H,), PyTorch's bias_ih + bias_hh, or None for none.
        h: the initial state, (N, H); None for zeros.
        nonlinearity: "tanh" or "relu".

    Returns:
        hidden (T + 1, N, H).

    Raises:
        TypeError: not arrays, or dtypes that differ or are not supported.
        ValueError: shapes that do not fit together, an unknown nonlinearity.
    """
    return _RNN.call((x, weight_ih, weight_hh, bias, h), (nonlinearity,))


def rnn_backward(grad, grad_h, x, weight_ih, weight_hh, hidden, *, nonlinearity="tanh", needs=_ALL):
    """The gradients of `rnn`, by backpropagation through time (Werbos 1990).

    Args:
        grad: (T, N, H), the gradient of the outputs hidden[1:].
        grad_h: (N, H), that of the final state (added to grad's last step); None for zeros.
        x, weight_ih, weight_hh, nonlinearity: as in the forward call. hidden: what it returned.
        needs: which gradients to compute, out of "x", "weight_ih", "weight_hh" and "bias".

    Returns:
        (grad_x, grad_weight_ih, grad_weight_hh, grad_bias, grad_h), the last of the initial state; None for one that is
        not needed.

    Raises:
        TypeError, ValueError: as `rnn`; also for an unknown name in `needs`.
    """
    return _RNN_BACKWARD.call((grad, grad_h, x, weight_ih, weight_hh, hidden), (nonlinearity, needs))


def _shape(function: str, name: str, array, expected: tuple[int, ...], axes: str):
    if array is not None and array.shape != expected:
        raise ValueError(f"{function}: {name} must have shape {axes} = {expected}, got {array.shape}")


def _sizes(function: str, x, weight_ih, weight_hh, gates: int) -> tuple[int, int, int, int]:
    """(T, N, F, H), of operands that fit together."""
    if x.ndim != 3:
        raise ValueError(f"{function}: x must have shape (steps, N, features), got {x.shape}")
    blocks = f"{gates} * " if gates > 1 else ""
    if weight_hh.ndim != 2 or weight_hh.shape[0] != gates * weight_hh.shape[1] or not weight_hh.size:
        raise ValueError(f"{function}: weight_hh must have shape ({blocks}hidden, hidden), got {weight_hh.shape}")
    steps, n, features = x.shape
    size = weight_hh.shape[1]
    _shape(function, "weight_ih", weight_ih, (gates * size, features), f"({blocks}hidden, features)")
    return steps, n, features, size


def _problem(sizes, gates: int, products: int, arrays, results: int, options: dict) -> Problem:
    """products: how often the forward's two products, or products of their size, are computed."""
    steps, n, features, size = sizes
    moved = sum(a.size for a in arrays if a is not None) + results
    work = 2 * steps * n * gates * size * (features + size) * products
    return Problem(options, flops=work, bytes=moved * arrays[0].dtype.itemsize)


def _forward(function: str, gates: int, x, weight_ih, weight_hh, bias, states: dict, options: dict) -> Problem:
    required(function, x=x, weight_ih=weight_ih, weight_hh=weight_hh)
    arrays = {"x": x, "weight_ih": weight_ih, "weight_hh": weight_hh, "bias": bias} | states
    common_dtype(function, arrays)
    sizes = steps, n, _, size = _sizes(function, x, weight_ih, weight_hh, gates)
    _shape(function, "bias", bias, (gates * size,), "(4 * hidden,)" if gates > 1 else "(hidden,)")
    for name, state in states.items():
        _shape(function, name, state, (n, size), "(N, hidden)")
    results = len(states) * (steps + 1) * n * size + (gates * steps * n * size if options.get("return_gates") else 0)
    return _problem(sizes, gates, 1, tuple(arrays.values()), results, options)


def _backward(function: str, gates: int, grad, x, weight_ih, weight_hh, states: dict, kept: dict, needs, options: dict):
    arrays = {"grad": grad, "x": x, "weight_ih": weight_ih, "weight_hh": weight_hh} | kept
    required(function, **arrays)
    common_dtype(function, arrays | states)
    sizes = steps, n, _, size = _sizes(function, x, weight_ih, weight_hh, gates)
    _shape(function, "grad", grad, (steps, n, size), "(steps, N, hidden)")
    for name, state in states.items():
        _shape(function, name, state, (n, size), "(N, hidden)")
    for name, array in kept.items():
        if name == "gates":
            _shape(function, name, array, (steps, n, gates * size), "(steps, N, 4 * hidden)")
        else:
            _shape(function, name, array, (steps + 1, n, size), "(steps + 1, N, hidden)")
    needs = shapes.needs(function, needs, _ALL)
    sources = {"x": x.size, "weight_ih": weight_ih.size, "weight_hh": weight_hh.size, "bias": gates * size}
    results = sum(sources[name] for name in needs) + len(states) * n * size
    products = 1 + ("x" in needs) + ("weight_ih" in needs) + ("weight_hh" in needs)
    problem = _problem(sizes, gates, 1, (*arrays.values(), *states.values()), results, options | {"needs": needs})
    problem.flops = problem.flops * products // 2  # each is about half of the forward's
    return problem


def _check_lstm(x, weight_ih, weight_hh, bias, h, c, return_gates=False) -> Problem:
    options = {"return_gates": return_gates}
    return _forward("lstm", 4, x, weight_ih, weight_hh, bias, {"h": h, "c": c}, options)


def _check_lstm_backward(
    grad, grad_h, grad_c, x, weight_ih, weight_hh, hidden, cells, gates, needs=_ALL
) -> Problem:  # fmt: skip
    states, kept = {"grad_h": grad_h, "grad_c": grad_c}, {"hidden": hidden, "cells": cells, "gates": gates}
    return _backward("lstm_backward", 4, grad, x, weight_ih, weight_hh, states, kept, needs, {})


def _checked_nonlinearity(function: str, value) -> dict[str, str]:
    if value not in NONLINEARITIES:
        raise ValueError(f'{function}: nonlinearity must be "tanh" or "relu", got {value!r}')
    return {"nonlinearity": value}


def _check_rnn(x, weight_ih, weight_hh, bias, h, nonlinearity="tanh") -> Problem:
    options = _checked_nonlinearity("rnn", nonlinearity)
    return _forward("rnn", 1, x, weight_ih, weight_hh, bias, {"h": h}, options)


def _check_rnn_backward(grad, grad_h, x, weight_ih, weight_hh, hidden, nonlinearity="tanh", needs=_ALL) -> Problem:
    options = _checked_nonlinearity("rnn_backward", nonlinearity)
    states, kept = {"grad_h": grad_h}, {"hidden": hidden}
    return _backward("rnn_backward", 1, grad, x, weight_ih, weight_hh, states, kept, needs, options)


_FORWARD = ("x", "weight_ih", "weight_hh", "bias", "h")
_BACKWARD = ("x", "weight_ih", "weight_hh", "hidden")
_LSTM = Operation("recurrent", "lstm", (*_FORWARD, "c"), _check_lstm)
_LSTM_BACKWARD = Operation(
    "recurrent", "lstm_backward", ("grad", "grad_h", "grad_c", *_BACKWARD, "cells", "gates"), _check_lstm_backward
)
_RNN = Operation("recurrent", "rnn", _FORWARD, _check_rnn)
_RNN_BACKWARD = Operation("recurrent", "rnn_backward", ("grad", "grad_h", *_BACKWARD), _check_rnn_backward)
