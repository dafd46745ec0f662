"""Recurrent layers' walk over a sequence: one call for all steps, in which nothing but the kernel's own code runs.

    forward, for each t:                             backward, for each t from the last:
      gates[t] = x[t] W_ih^T                           later += grad[t]               (of hidden[t + 1])
      gates[t] += hidden[t] W_hh^T                     d[t] = later * slopes of the gates
      gates[t] = sigmoid, tanh of them                 later = d[t] W_hh              (of hidden[t])
      cells[t + 1], hidden[t + 1] from them

The weights are packed once, in panels that the register tiles read front to back in every step, and the gates are
formed while their rows are in the caches. A row, one sequence of the batch, needs no other: threads share the rows and
never wait for each other before the end. Every element's sum runs over k in its order whatever rows stand beside it,
so the bits do not depend on how the rows are shared.

LLVM vectorises a loop only where eight comparisons tell it that its arrays do not overlap: hence several short ones.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.epilogue import ACTIVATION_CODES, prefer_widest_vectors, sigmoid, tanh
from tilewise.kernels.cpu.gemm_in_place import multiply_rows_in_place
from tilewise.kernels.cpu.gemm_panels import pack_right_panel
from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import NV, lanes

RELU = ACTIVATION_CODES["relu"]


@emitted
def _pack(matrix, row_step, column_step, depth, columns, panels, number):
    """Panel `number` of a matrix of depth x columns, element (k, j) at matrix[k * row_step + j * column_step]."""
    width = NV * lanes(matrix)
    first = number * width
    pack_right_panel(
        matrix, first * column_step, row_step, column_step, depth, min(width, columns - first), panels, first * depth
    )


@emitted
def _multiply(a, a_at, panels, depth, columns, c, c_at, rows, accumulate):
    """C[:rows, :columns] (+)= A B, one panel of B after another; A and C have no gaps between their rows."""
    width = NV * lanes(c)
    for j in range(0, columns, width):
        multiply_rows_in_place(
            a, a_at, depth, 1, panels, j * depth, width, depth, c, c_at + j, columns, rows, min(width, columns - j),
            accumulate,
        )  # fmt: skip


@device(inline="always")
def _panels(columns, depth, like):
    """Room for a packed matrix of depth x columns."""
    width = NV * lanes(like)
    return scratch((columns + width - 1) // width * width * depth, like)


@device()
def _sigmoids(row, bias):
    prefer_widest_vectors()
    for j in range(row.size):
        row[j] = sigmoid(row[j] + bias[j])


@device()
def _tanhs(row, bias):
    prefer_widest_vectors()
    for j in range(row.size):
        row[j] = tanh(row[j] + bias[j])


@device()
def _relus(row, bias):
    for j in range(row.size):
        value = row[j] + bias[j]
        row[j] = row.dtype.type(0) if value < 0 else value


@device()
def _next_cells(enter, forget, candidate, before, cells):
    for j in range(cells.size):
        cells[j] = forget[j] * before[j] + enter[j] * candidate[j]


@device()
def _next_hidden(leave, bias, cells, hidden):
    prefer_widest_vectors()
    for j in range(hidden.size):
        leave[j] = sigmoid(leave[j] + bias[j])
        hidden[j] = leave[j] * tanh(cells[j])


@device()
def _lstm_row(gates, at, bias, before, cells, hidden):
    """From the sums of one row's gates, at gates[at], to its states."""
    size = hidden.size
    enter, forget = gates[at : at + size], gates[at + size : at + 2 * size]
    candidate, leave = gates[at + 2 * size : at + 3 * size], gates[at + 3 * size : at + 4 * size]
    _sigmoids(gates[at : at + 2 * size], bias[: 2 * size])
    _tanhs(candidate, bias[2 * size : 3 * size])
    _next_cells(enter, forget, candidate, before, cells)
    _next_hidden(leave, bias[3 * size :], cells, hidden)


@kernel()
def lstm_forward(x, features, weight_ih, weight_hh, bias, gates, hidden, cells, steps, n, size, kept, together):
    """All steps of an LSTM; arrays are flat.

    x: (T, N, features). With features = 0 gates holds x W_ih^T already.
    gates: (T, N, 4H), becomes i, f, g, o; hidden, cells: (T + 1, N, H), whose first step is given.
    kept: 0 where gates has room for one step, and cells for two, which take turns.
    together: rows of one task.
    """
    width, columns = NV * lanes(gates), 4 * size
    count = (columns + width - 1) // width
    inputs, recurrent = _panels(columns, features, gates), _panels(columns, size, gates)
    for panel in prange(count):
        number = np.int64(panel)
        if features > 0:
            _pack(weight_ih, 1, features, features, columns, inputs, number)
        _pack(weight_hh, 1, size, size, columns, recurrent, number)
    for task in prange((n + together - 1) // together):
        first = np.int64(task) * together
        rows = min(together, n - first)
        for t in range(steps):
            at = ((t if kept else 0) * n + first) * columns
            before, after = (
                ((t if kept else t % 2) * n + first) * size,
                ((t + 1 if kept else (t + 1) % 2) * n + first) * size,
            )
            row = (t * n + first) * size
            if features > 0:
                _multiply(x, (t * n + first) * features, inputs, features, columns, gates, at, rows, 0)
            _multiply(hidden, row, recurrent, size, columns, gates, at, rows, 1)
            for r in range(rows):
                here, following = r * size, row + (n + r) * size
                _lstm_row(
                    gates, at + r * columns, bias, cells[before + here : before + here + size],
                    cells[after + here : after + here + size], hidden[following : following + size],
                )  # fmt: skip


@device()
def _squashed(cells, grad, later, result):
    """tanh(cells); and `later` becomes the whole gradient of the hidden state."""
    prefer_widest_vectors()
    for j in range(cells.size):
        result[j] = tanh(cells[j])
        later[j] += grad[j]


@device()
def _leave_slopes(later, leave, squashed, d_cell, d_leave):
    one = leave.dtype.type(1)
    for j in range(later.size):
        d_cell[j] += later[j] * leave[j] * (one - squashed[j] * squashed[j])
        d_leave[j] = later[j] * squashed[j] * leave[j] * (one - leave[j])


@device()
def _enter_slopes(d_cell, enter, candidate, d_enter, d_candidate):
    one = enter.dtype.type(1)
    for j in range(d_cell.size):
        d_enter[j] = d_cell[j] * candidate[j] * enter[j] * (one - enter[j])
        d_candidate[j] = d_cell[j] * enter[j] * (one - candidate[j] * candidate[j])


@device()
def _forget_slopes(d_cell, forget, before, d_forget):
    """And d_cell becomes the gradient of the cell before."""
    one = forget.dtype.type(1)
    for j in range(d_cell.size):
        d_forget[j] = d_cell[j] * before[j] * forget[j] * (one - forget[j])
        d_cell[j] *= forget[j]


@device()
def _lstm_row_back(grad, gates, before, cells, at, later, d_cell, d_gates, squashed):
    """One row's step: `at` is where its gates lie, and their gradients go."""
    size = cells.size
    a, b, c, end = at + size, at + 2 * size, at + 3 * size, at + 4 * size
    _squashed(cells, grad, later, squashed)
    _leave_slopes(later, gates[c:end], squashed, d_cell, d_gates[c:end])
    _enter_slopes(d_cell, gates[at:a], gates[b:c], d_gates[at:a], d_gates[b:c])
    _forget_slopes(d_cell, gates[a:b], before, d_gates[a:b])


@kernel()
def lstm_backward(grad, weight_hh, gates, cells, later, d_cells, d_gates, steps, n, size, together):
    """All steps back. later, d_cells: (N, H), from the gradients of the final states to those of the initial ones.
    grad: (T, N, H), of hidden[1:]. d_gates: (T, N, 4H), of the gates' sums.
    """
    width, depth = NV * lanes(gates), 4 * size
    count = (size + width - 1) // width
    panels = _panels(size, depth, gates)
    for panel in prange(count):
        _pack(weight_hh, size, 1, depth, size, panels, np.int64(panel))
    for task in prange((n + together - 1) // together):
        first = np.int64(task) * together
        rows = min(together, n - first)
        squashed = scratch(size, gates)[:size]
        for t in range(steps - 1, -1, -1):
            for r in range(first, first + rows):
                row, own = (t * n + r) * size, r * size
                following = row + n * size
                _lstm_row_back(
                    grad[row : row + size], gates, cells[row : row + size], cells[following : following + size],
                    row * 4, later[own : own + size], d_cells[own : own + size], d_gates, squashed,
                )  # fmt: skip
            _multiply(d_gates, (t * n + first) * depth, panels, depth, size, later, first * size, rows, 0)


@kernel()
def rnn_forward(x, features, weight_ih, weight_hh, bias, hidden, activation, steps, n, size, together):
    """All steps of an RNN, as `lstm_forward`. With features = 0 hidden[1:] holds x W_ih^T already."""
    width = NV * lanes(hidden)
    count = (size + width - 1) // width
    inputs, recurrent = _panels(size, features, hidden), _panels(size, size, hidden)
    for panel in prange(count):
        number = np.int64(panel)
        if features > 0:
            _pack(weight_ih, 1, features, features, size, inputs, number)
        _pack(weight_hh, 1, size, size, size, recurrent, number)
    for task in prange((n + together - 1) // together):
        first = np.int64(task) * together
        rows = min(together, n - first)
        for t in range(steps):
            row = (t * n + first) * size
            following = row + n * size
            if features > 0:
                _multiply(x, (t * n + first) * features, inputs, features, size, hidden, following, rows, 0)
            _multiply(hidden, row, recurrent, size, size, hidden, following, rows, 1)
            for at in range(following, following + rows * size, size):
                if activation == RELU:
                    _relus(hidden[at : at + size], bias)
                else:
                    _tanhs(hidden[at : at + size], bias)


@device()
def _rnn_row_back(grad, later, hidden, d_sum, activation):
    zero, one = hidden.dtype.type(0), hidden.dtype.type(1)
    if activation == RELU:
        for j in range(grad.size):
            d_sum[j] = zero if hidden[j] <= zero else grad[j] + later[j]
    else:
        for j in range(grad.size):
            d_sum[j] = (grad[j] + later[j]) * (one - hidden[j] * hidden[j])


@kernel()
def rnn_backward(grad, weight_hh, hidden, later, d_sums, activation, steps, n, size, together):
    """All steps back, as `lstm_backward`; d_sums: (T, N, H), of what the activation was applied to."""
    width = NV * lanes(hidden)
    panels = _panels(size, size, hidden)
    for panel in prange((size + width - 1) // width):
        _pack(weight_hh, size, 1, size, size, panels, np.int64(panel))
    for task in prange((n + together - 1) // together):
        first = np.int64(task) * together
        rows = min(together, n - first)
        for t in range(steps - 1, -1, -1):
            for r in range(first, first + rows):
                row, own = (t * n + r) * size, r * size
                following = row + n * size
                _rnn_row_back(
                    grad[row : row + size], later[own : own + size], hidden[following : following + size],
                    d_sums[row : row + size], activation,
                )  # fmt: skip
            _multiply(d_sums, (t * n + first) * size, panels, size, size, later, first * size, rows, 0)
