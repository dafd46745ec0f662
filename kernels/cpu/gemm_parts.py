"""Small results of long sums: the sum is split into parts, which threads share, as there is too little of C to share.

      parts of K                 C = P0 + P1 + ... , added in this order
A: +----+----+----+
 M | P0 | P1 | P2 |              How many parts there are depends on the shapes alone, so that every number of
   +----+----+----+              threads gives the same bits.
"""

from numba import prange

from tilewise.kernels.cpu.gemm_blocks import multiply_task
from tilewise.kernels.cpu.gemm_dots import finish_rows
from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import address, lanes
from tilewise.kernels.cpu.vector_move import add_rows, copy_lanes

# Rows of C whose parts are added up by one task.
ROWS_ADDED = 16


@device()
def _add_parts(parts, at, part_step, count, c, c_at, columns):
    """One row of C: the sum of its `count` parts, the first of which holds the sum afterwards."""
    width = lanes(c)
    for j in range(0, columns, width):
        add_rows(address(parts, at + j), address(parts, at + part_step + j), part_step, count - 1)
        copy_lanes(1, 1, address(c, c_at + j), address(parts, at + j), 0, columns - j, 1)


@kernel()
def multiply_parts(a, a_row, a_column, b, b_row, b_column, c, m, n, whole, part, bias, activation):
    """C = activation(A B + bias), the sum in parts of `part` steps."""
    flat_a, flat_b, flat_c = a.reshape(a.size), b.reshape(b.size), c.reshape(c.size)
    count = (whole + part - 1) // part
    width = lanes(flat_c)
    step = (n + width - 1) // width * width  # rows of whole vectors
    parts = scratch(count * m * step, flat_c)
    for i in prange(count):
        k0 = i * part
        multiply_task(
            flat_a, k0 * a_column, a_row, a_column, flat_b, k0 * b_row, b_row, b_column, parts, i * m * step, step,
            m, n, min(part, whole - k0),
        )  # fmt: skip
    for number in prange((m + ROWS_ADDED - 1) // ROWS_ADDED):
        first = number * ROWS_ADDED
        rows = min(ROWS_ADDED, m - first)
        for i in range(first, first + rows):
            _add_parts(parts, i * step, m * step, count, flat_c, i * n, n)
        finish_rows(flat_c, first * n, n, rows, n, bias, 0, activation)
