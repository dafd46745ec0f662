"""Products of rows with rows: C[i, j] = the dot product of row i of A and row j of B, both contiguous along the sum.

That is how a dense layer's weight (outputs, features) lies. Vectors run along the sum, so that nothing is transposed
or packed, and a large B streams from memory once:

    A: 8 rows, in L1        every step: 8 + 3 loads, 24 multiply-adds of a vector
    B: 3 rows at a time     at the end: 24 vectors of partial sums are added up

Adding up costs about 100 cycles a tile, 3 to 10 % of a long sum; packing costs more up to a hundred rows of A.
"""

from numba import prange

from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.epilogue import activate_row
from tilewise.kernels.cpu.gemm_tile import beyond, dot_tile
from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import VECTOR_BYTES, address, flat, lanes
from tilewise.kernels.cpu.vector_move import copy_rows

# Rows of A x rows of B in a register tile: 24 sums and 4 operands of AVX-512's 32 registers, 12 and 4 of AVX2's 16.
ROWS, COLUMNS = (4 if VECTOR_BYTES == 32 else 8), 3
# The sum goes in steps of 3 KB a row: 8 rows of A, 3 of B and the next 3 are 42 KB, in L1. Between the copied rows lies
# a vector, so that rows a power of two apart do not share the same few places of the cache.
STEP_BYTES = 3072
# Rows of B from which, and bytes of A up to which, A is copied only to be aligned: a vector across two lines costs two.
COPIED_FROM, COPIED_BYTES = 64, 256 << 10
# Rows of B a block: 190 KB of a step stay in L2 while all rows of A pass by; a multiple of COLUMNS.
BLOCK = 63


def _make_dot_tiles(height):
    @emitted
    def dot_tiles(a, a_step, b, b_step, depth, c, c_step, columns, accumulate):
        """C[:height, :columns] (+)= A B^T, tile by tile; a, b and c are pointers."""
        j = 0
        while j + COLUMNS <= columns:
            dot_tile(
                height, COLUMNS, a, a_step, beyond(b, j * b_step), b_step, depth, beyond(c, j), c_step, accumulate
            )  # fmt: skip
            j += COLUMNS
        while j < columns:
            dot_tile(height, 1, a, a_step, beyond(b, j * b_step), b_step, depth, beyond(c, j), c_step, accumulate)
            j += 1

    return dot_tiles


tall_dots, middle_dots, short_dots, single_dots = (_make_dot_tiles(height) for height in (ROWS, ROWS // 2, 2, 1))


@emitted
def dot_block(a, a_at, a_step, rows, b, b_at, b_step, columns, depth, c, c_at, c_step, accumulate):
    """C[:rows, :columns] (+)= A B^T, in tiles of ROWS and fewer rows."""
    right = address(b, b_at)
    i = 0
    while i + ROWS <= rows:
        tall_dots(
            address(a, a_at + i * a_step), a_step, right, b_step, depth, address(c, c_at + i * c_step), c_step, columns,
            accumulate,
        )  # fmt: skip
        i += ROWS
    if i + ROWS // 2 <= rows:
        middle_dots(
            address(a, a_at + i * a_step), a_step, right, b_step, depth, address(c, c_at + i * c_step), c_step, columns,
            accumulate,
        )  # fmt: skip
        i += ROWS // 2
    if i + 2 <= rows:
        short_dots(
            address(a, a_at + i * a_step), a_step, right, b_step, depth, address(c, c_at + i * c_step), c_step, columns,
            accumulate,
        )  # fmt: skip
        i += 2
    if i < rows:
        single_dots(
            address(a, a_at + i * a_step), a_step, right, b_step, depth, address(c, c_at + i * c_step), c_step, columns,
            accumulate,
        )  # fmt: skip


@emitted
def finish_rows(c, start, c_step, rows, columns, bias, bias_start, activation):
    """Add the bias (one number a column, if there is any) and apply the activation, on rows still in the cache."""
    for i in range(rows):
        row = start + i * c_step
        if bias.size > 0:
            for j in range(columns):
                c[row + j] += bias[bias_start + j]
        if activation != 0:
            activate_row(c, row, columns, activation)


@emitted
def _dot_chunk(a, a_at, a_step, rows, b, b_at, b_step, columns, depth, c, c_at, c_step, step):
    """One chunk of C, the sum in steps: where there are several, or it pays, A's part of each is copied."""
    width = lanes(a)
    copied = step < depth or (rows > 1 and columns >= COPIED_FROM and rows * depth * a.itemsize <= COPIED_BYTES)
    stride = (min(step, depth) + width - 1) // width * width + width if copied else a_step
    panel = scratch(rows * stride if copied else 1, c)
    for k0 in range(0, max(depth, 1), step):
        used = min(step, depth - k0)
        accumulate = 1 if k0 > 0 else 0
        if copied:
            copy_rows(a, a_at + k0, a_step, rows, used, panel, 0, stride)
        for j in range(0, columns, BLOCK):
            some, right = min(BLOCK, columns - j), b_at + k0 + j * b_step
            if copied:
                dot_block(panel, 0, stride, rows, b, right, b_step, some, used, c, c_at + j, c_step, accumulate)
            else:
                dot_block(a, a_at, a_step, rows, b, right, b_step, some, used, c, c_at + j, c_step, accumulate)


@kernel(parallel=False)
def finish(c, bias, activation):
    """The same for a whole matrix."""
    finish_rows(flat(c), 0, c.shape[1], c.shape[0], c.shape[1], bias, 0, activation)


@kernel()
def multiply_dots(a, b, c, bias, activation, chunk_rows, chunk_columns, step):
    """C = activation(A B^T + bias), the sum in steps of `step`; chunks of C are split over threads."""
    m, depth = a.shape
    n = b.shape[0]
    across = (n + chunk_columns - 1) // chunk_columns
    down = (m + chunk_rows - 1) // chunk_rows
    for chunk in prange(across * down):
        i0 = chunk // across * chunk_rows
        j0 = chunk % across * chunk_columns
        rows, columns = min(chunk_rows, m - i0), min(chunk_columns, n - j0)
        _dot_chunk(a, i0 * depth, depth, rows, b, j0 * depth, depth, columns, depth, c, i0 * n + j0, n, step)
        finish_rows(flat(c), i0 * n + j0, n, rows, columns, bias, j0, activation)


@kernel()
def multiply_stack_dots(a, a_starts, b, b_starts, c, m, n, depth, together):
    """C = A B^T for many matrices, `together` of them a chunk; matrix i of A begins at a[a_starts[i]]."""
    count = a_starts.size
    for chunk in prange((count + together - 1) // together):
        for i in range(chunk * together, min(count, (chunk + 1) * together)):
            dot_block(a, a_starts[i], depth, m, b, b_starts[i], depth, n, depth, c, i * m * n, n, 0)
