"""Recurrent layers on the CPU: how a sequence is shared among threads, and the products over all steps."""

import numba
import numpy as np

from tilewise.kernels import settings
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES
from tilewise.kernels.cpu.gemm import linear, linear_backward
from tilewise.kernels.cpu.gemm_plan import NANOSECONDS_PER_FLOP
from tilewise.kernels.cpu.recurrent_steps import lstm_backward as lstm_steps_back
from tilewise.kernels.cpu.recurrent_steps import lstm_forward, rnn_forward
from tilewise.kernels.cpu.recurrent_steps import rnn_backward as rnn_steps_back
from tilewise.kernels.cpu.scratch import empty
from tilewise.kernels.cpu.simd import MR

# Rows from which on a step multiplies its own part of the input: then its tiles are full, and the sums of the gates
# never leave the caches. Fewer rows are multiplied for all steps at once beforehand.
OWN_INPUT = 8
# Rows of a task at most, so that their gates (4 KB each at H = 256) stay in L2 beside the weights' panels.
MOST_ROWS = 5 * MR
NANOSECONDS_PER_GATE = 0.5


def _rows(n: int) -> int:
    """Rows of one task: an equal share for every thread, within the caches' limits."""
    threads = settings.active().threads or numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
    tasks = max(1, min(threads, n), -(-n // MOST_ROWS))
    return max(1, -(-n // tasks))


def _work(steps, n, rows, depth, itemsize):
    """Nanoseconds on one core, but none where a single row leaves nothing to share."""
    flops = 2 * steps * n * rows * depth * NANOSECONDS_PER_FLOP * itemsize / 4
    return (flops + steps * n * rows * NANOSECONDS_PER_GATE) if n > 1 else 0


def _states(steps: int, initial, n: int, size: int, dtype):
    """(steps + 1, N, H), with the initial one in its place."""
    states = empty((steps + 1, n, size), dtype)
    states[0] = 0 if initial is None else initial
    return states


def _no_bias(rows: int, dtype):
    return np.zeros(rows, dtype)


def prepare_lstm(shapes, dtype, *, return_gates):
    """What follows from the shapes is worked out once."""
    (steps, n, features), _, (_, size), *_ = shapes
    own = features if n >= OWN_INPUT else 0
    kept = return_gates or own == 0
    run_steps = lstm_forward.sized(_work(steps, n, 4 * size, own + size, dtype.itemsize))
    rest = steps, n, size, kept, _rows(n)

    def run(x, weight_ih, weight_hh, bias, h, c):
        bias = _no_bias(4 * size, dtype) if bias is None else bias
        hidden = _states(steps, h, n, size, dtype)
        cells = _states(steps if kept else 1, c, n, size, dtype)
        if own:
            gates = empty((steps if kept else 1, n, 4 * size), dtype)
        else:
            gates = linear(x, weight_ih, None, activation=None)
        arrays = (array.reshape(-1) for array in (weight_ih, weight_hh, bias, gates, hidden, cells))
        run_steps(x.reshape(-1), own, *arrays, *rest)
        if return_gates:
            return hidden, cells, gates
        return hidden, cells[steps if kept else steps % 2]

    return run


def lstm(x, weight_ih, weight_hh, bias, h, c, *, return_gates):
    shapes = (x.shape, weight_ih.shape, weight_hh.shape)
    return prepare_lstm(shapes, x.dtype, return_gates=return_gates)(x, weight_ih, weight_hh, bias, h, c)


def prepare_lstm_backward(shapes, dtype, *, needs):
    """As `prepare_lstm`."""
    (steps, n, size), *_ = shapes
    run_steps = lstm_steps_back.sized(_work(steps, n, 4 * size, size, dtype.itemsize))
    rest = steps, n, size, _rows(n)

    def run(grad, grad_h, grad_c, x, weight_ih, weight_hh, hidden, cells, gates):
        later, d_cells = _copied(grad_h, (n, size), dtype), _copied(grad_c, (n, size), dtype)
        d_gates = empty(gates.shape, dtype)
        arrays = (array.reshape(-1) for array in (grad, weight_hh, gates, cells, later, d_cells, d_gates))
        run_steps(*arrays, *rest)
        return *_products(d_gates, x, weight_ih, weight_hh, hidden, needs), later, d_cells

    return run


def lstm_backward(grad, grad_h, grad_c, x, weight_ih, weight_hh, hidden, cells, gates, *, needs):
    run = prepare_lstm_backward((grad.shape,), grad.dtype, needs=needs)
    return run(grad, grad_h, grad_c, x, weight_ih, weight_hh, hidden, cells, gates)


def prepare_rnn(shapes, dtype, *, nonlinearity):
    """As `prepare_lstm`."""
    (steps, n, features), _, (_, size), *_ = shapes
    own = features if n >= OWN_INPUT else 0
    run_steps = rnn_forward.sized(_work(steps, n, size, own + size, dtype.itemsize))
    rest = ACTIVATION_CODES[nonlinearity], steps, n, size, _rows(n)

    def run(x, weight_ih, weight_hh, bias, h):
        bias = _no_bias(size, dtype) if bias is None else bias
        hidden = _states(steps, h, n, size, dtype)
        if not own:
            linear(x, weight_ih, None, activation=None, out=hidden[1:])
        arrays = (array.reshape(-1) for array in (weight_ih, weight_hh, bias, hidden))
        run_steps(x.reshape(-1), own, *arrays, *rest)
        return hidden

    return run


def rnn(x, weight_ih, weight_hh, bias, h, *, nonlinearity):
    shapes = (x.shape, weight_ih.shape, weight_hh.shape)
    return prepare_rnn(shapes, x.dtype, nonlinearity=nonlinearity)(x, weight_ih, weight_hh, bias, h)


def prepare_rnn_backward(shapes, dtype, *, nonlinearity, needs):
    """As `prepare_lstm`."""
    (steps, n, size), *_ = shapes
    run_steps = rnn_steps_back.sized(_work(steps, n, size, size, dtype.itemsize))
    rest = ACTIVATION_CODES[nonlinearity], steps, n, size, _rows(n)

    def run(grad, grad_h, x, weight_ih, weight_hh, hidden):
        later, d_sums = _copied(grad_h, (n, size), dtype), empty(grad.shape, dtype)
        arrays = (array.reshape(-1) for array in (grad, weight_hh, hidden, later, d_sums))
        run_steps(*arrays, *rest)
        return *_products(d_sums, x, weight_ih, weight_hh, hidden, needs), later

    return run


def rnn_backward(grad, grad_h, x, weight_ih, weight_hh, hidden, *, nonlinearity, needs):
    run = prepare_rnn_backward((grad.shape,), grad.dtype, nonlinearity=nonlinearity, needs=needs)
    return run(grad, grad_h, x, weight_ih, weight_hh, hidden)


def _copied(array, shape, dtype):
    return np.zeros(shape, dtype) if array is None else array.copy()


def _products(d_sums, x, weight_ih, weight_hh, hidden, needs):
    """The gradients of x, weight_ih, weight_hh and bias, each one product (or sum) over all steps."""
    grad_hh = None
    if "weight_hh" in needs:
        grad_hh = linear_backward(d_sums, hidden[:-1], weight_hh, needs=("weight",))[1]
    wanted = tuple("weight" if name == "weight_ih" else name for name in needs if name != "weight_hh")
    grad_x, grad_ih, grad_bias = linear_backward(d_sums, x, weight_ih, needs=wanted)
    return grad_x, grad_ih, grad_hh, grad_bias
