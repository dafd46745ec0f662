"""Products that read both operands where they lie, without packing: small ones, and those with few rows.

B is stored by rows. The register tile reads its rows and broadcasts A's elements from any place, so nothing has to be
moved: worth it as long as B stays in the L2 cache while every row of A passes by, or passes only once itself. A large
B is read in steps of a few whole rows, in the order of the memory, each step adding to C:

              N                              the step's rows of B stream by, while
        +-----------+                        the few rows of C stay in the cache
    K   |===========| one step
        |     B     |
    +---+-----------+
  M | A |     C     |
    +---+-----------+

With a single row of A, a tile's rows of B are too short for the prefetchers: gemm_vector.py reads longer runs.
"""

from numba import prange

from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.gemm_tile import beyond, multiply_tile
from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.simd import MR, NV, address, lanes

# Register tiles below MR rows, for what is left: with 14 rows, 8, 4, 2 and 1.
MIDDLE = 8 if MR > 8 else 4


def _make_row_tiles(height):
    @emitted
    def row_tiles(a, a_row, a_column, b, b_step, depth, c, c_step, columns, accumulate):
        """C[:height, :columns] (+)= A B, register tile by register tile; a, b and c are pointers."""
        width = lanes(c)
        j = 0
        while j + NV * width <= columns:
            multiply_tile(
                height, NV, 0, a, a_row, a_column, beyond(b, j), b_step, depth, beyond(c, j), c_step,
                height, NV * width, accumulate,
            )  # fmt: skip
            j += NV * width
        while j < columns:
            multiply_tile(
                height, 1, 1, a, a_row, a_column, beyond(b, j), b_step, depth, beyond(c, j), c_step,
                height, columns - j, accumulate,
            )  # fmt: skip
            j += width

    return row_tiles


tall_tiles, middle_tiles, short_tiles, pair_tiles, single_tiles = (
    _make_row_tiles(height) for height in (MR, MIDDLE, MIDDLE // 2, MIDDLE // 4, 1)
)


@emitted
def multiply_rows_in_place(
    a, a_at, a_row, a_column, b, b_at, b_step, depth, c, c_at, c_step, rows, columns, accumulate
):  # fmt: skip
    """C[:rows, :columns] (+)= A B; a's element (i, k) at a[a_at + i * a_row + k * a_column], b's rows b_step apart."""
    right = address(b, b_at)
    i = 0
    while i + MR <= rows and i + 2 * MIDDLE != rows:
        tall_tiles(
            address(a, a_at + i * a_row), a_row, a_column, right, b_step, depth, address(c, c_at + i * c_step), c_step,
            columns, accumulate,
        )  # fmt: skip
        i += MR
    while i + MIDDLE <= rows:
        middle_tiles(
            address(a, a_at + i * a_row), a_row, a_column, right, b_step, depth, address(c, c_at + i * c_step), c_step,
            columns, accumulate,
        )  # fmt: skip
        i += MIDDLE
    if i + MIDDLE // 2 <= rows:
        short_tiles(
            address(a, a_at + i * a_row), a_row, a_column, right, b_step, depth, address(c, c_at + i * c_step), c_step,
            columns, accumulate,
        )  # fmt: skip
        i += MIDDLE // 2
    if i + MIDDLE // 4 <= rows and MIDDLE // 4 > 1:
        pair_tiles(
            address(a, a_at + i * a_row), a_row, a_column, right, b_step, depth, address(c, c_at + i * c_step), c_step,
            columns, accumulate,
        )  # fmt: skip
        i += MIDDLE // 4
    while i < rows:
        single_tiles(
            address(a, a_at + i * a_row), a_row, a_column, right, b_step, depth, address(c, c_at + i * c_step), c_step,
            columns, accumulate,
        )  # fmt: skip
        i += 1


@kernel()
def multiply_in_place(a, b, c, geometry):
    """C = A B for one matrix, the sum in steps of `step`; chunks of C are split over threads.

    geometry: an array, as nine arguments more would cost a tiny product a tenth of a microsecond.
    """
    m, n, depth, a_row, a_column, chunk_rows, chunk_columns, step = (
        geometry[0], geometry[1], geometry[2], geometry[3], geometry[4], geometry[5], geometry[6], geometry[7]
    )  # fmt: skip
    across = (n + chunk_columns - 1) // chunk_columns
    down = (m + chunk_rows - 1) // chunk_rows
    for chunk in prange(across * down):
        i0 = chunk // across * chunk_rows
        j0 = chunk % across * chunk_columns
        for k0 in range(0, max(depth, 1), step):
            multiply_rows_in_place(
                a, i0 * a_row + k0 * a_column, a_row, a_column, b, k0 * n + j0, n, min(step, depth - k0),
                c, i0 * n + j0, n, min(chunk_rows, m - i0), min(chunk_columns, n - j0), 1 if k0 > 0 else 0,
            )  # fmt: skip


@kernel()
def multiply_stack_in_place(a, a_starts, a_row, a_column, b, b_starts, c, m, n, depth, together):
    """C = A B for many matrices, `together` of them a chunk; matrix i of A begins at a[a_starts[i]]."""
    count = a_starts.size
    for chunk in prange((count + together - 1) // together):
        for i in range(chunk * together, min(count, (chunk + 1) * together)):
            multiply_rows_in_place(
                a, a_starts[i], a_row, a_column, b, b_starts[i], n, depth, c, i * m * n, n, m, n, 0
            )  # fmt: skip


@emitted
def _add_rows_up(matrix, sums, rows, columns):
    for j in range(columns):
        sums[j] = 0
    for i in range(rows):
        for j in range(columns):
            sums[j] += matrix[i, j]


@kernel(parallel=False)
def small_linear_backward(grad, x, weight, grad_x, grad_weight, grad_bias, want_x, want_weight, want_bias):
    """grad_x = grad weight, grad_weight = grad^T x and grad_bias = the sum of grad's rows, those that are wanted."""
    rows, outputs = grad.shape
    features = x.shape[1]
    if want_x:
        multiply_rows_in_place(
            grad, 0, outputs, 1, weight, 0, features, outputs, grad_x, 0, features, rows, features, 0
        )  # fmt: skip
    if want_weight:
        multiply_rows_in_place(
            grad, 0, 1, outputs, x, 0, features, rows, grad_weight, 0, features, outputs, features, 0
        )  # fmt: skip
    if want_bias:
        _add_rows_up(grad, grad_bias, rows, outputs)


_SUM_COLUMNS = 256  # columns a chunk: their sums stay in L1


@kernel()
def column_sums(matrix, sums):
    """sums[j] = sum over i of matrix[i, j], row after row, so that the order is the same for any number of threads."""
    rows, columns = matrix.shape
    for chunk in prange((columns + _SUM_COLUMNS - 1) // _SUM_COLUMNS):
        first = chunk * _SUM_COLUMNS
        last = min(columns, first + _SUM_COLUMNS)
        for j in range(first, last):
            sums[j] = 0
        for i in range(rows):
            for j in range(first, last):
                sums[j] += matrix[i, j]
