"""Recurrent layers in NumPy, step by step."""

import numpy as np

from tilewise.kernels.reference.activation import relu, relu_backward, sigmoid, sigmoid_backward, tanh, tanh_backward
from tilewise.kernels.reference.gemm import linear, linear_backward

_ACTIVATIONS = {"tanh": (tanh, tanh_backward), "relu": (relu, relu_backward)}


def _states(steps, initial, n, size, dtype):
    """(steps + 1, N, H), from the initial state on."""
    states = np.zeros((steps + 1, n, size), dtype)
    if initial is not None:
        states[0] = initial
    return states


def lstm(x, weight_ih, weight_hh, bias, h, c, *, return_gates):
    (steps, n, _), size = x.shape, weight_hh.shape[1]
    hidden, cells = (_states(steps, initial, n, size, x.dtype) for initial in (h, c))
    gates = linear(x, weight_ih, bias, activation=None)
    for t in range(steps):
        gates[t] += hidden[t] @ weight_hh.T
        enter, forget, candidate, leave = np.split(gates[t], 4, axis=1)  # views
        for gate in (enter, forget, leave):
            gate[...] = sigmoid(gate)
        candidate[...] = tanh(candidate)
        cells[t + 1] = forget * cells[t] + enter * candidate
        hidden[t + 1] = leave * tanh(cells[t + 1])
    return (hidden, cells, gates) if return_gates else (hidden, cells[-1].copy())


def lstm_backward(grad, grad_h, grad_c, x, weight_ih, weight_hh, hidden, cells, gates, *, needs):
    later = np.zeros_like(hidden[0]) if grad_h is None else grad_h
    d_cell = np.zeros_like(cells[0]) if grad_c is None else grad_c
    d_sums = np.empty_like(gates)
    for t in reversed(range(len(x))):
        enter, forget, candidate, leave = np.split(gates[t], 4, axis=1)
        d_hidden, squashed = grad[t] + later, tanh(cells[t + 1])
        d_cell = d_cell + tanh_backward(d_hidden * leave, squashed)
        slopes = (
            sigmoid_backward(d_cell * candidate, enter),
            sigmoid_backward(d_cell * cells[t], forget),
            tanh_backward(d_cell * enter, candidate),
            sigmoid_backward(d_hidden * squashed, leave),
        )
        d_sums[t] = np.concatenate(slopes, axis=1)
        later, d_cell = d_sums[t] @ weight_hh, d_cell * forget
    return *_products(d_sums, x, weight_ih, weight_hh, hidden, needs), later.copy(), d_cell.copy()


def rnn(x, weight_ih, weight_hh, bias, h, *, nonlinearity):
    (steps, n, _), size, activation = x.shape, weight_hh.shape[1], _ACTIVATIONS[nonlinearity][0]
    hidden, inputs = _states(steps, h, n, size, x.dtype), linear(x, weight_ih, bias, activation=None)
    for t in range(steps):
        hidden[t + 1] = activation(inputs[t] + hidden[t] @ weight_hh.T)
    return hidden


def rnn_backward(grad, grad_h, x, weight_ih, weight_hh, hidden, *, nonlinearity, needs):
    later, backward = np.zeros_like(hidden[0]) if grad_h is None else grad_h, _ACTIVATIONS[nonlinearity][1]
    d_sums = np.empty_like(grad)
    for t in reversed(range(len(x))):
        d_sums[t] = backward(grad[t] + later, hidden[t + 1])
        later = d_sums[t] @ weight_hh
    return *_products(d_sums, x, weight_ih, weight_hh, hidden, needs), later.copy()


def _products(d_sums, x, weight_ih, weight_hh, hidden, needs):
    """The gradients of x, weight_ih, weight_hh and bias: sums over all steps."""
    grad_hh = linear_backward(d_sums, hidden[:-1], weight_hh, needs=("weight",))[1] if "weight_hh" in needs else None
    wanted = tuple("weight" if name == "weight_ih" else name for name in needs)
    grad_x, grad_ih, grad_bias = linear_backward(d_sums, x, weight_ih, needs=wanted)
    return grad_x, grad_ih, grad_hh, grad_bias
