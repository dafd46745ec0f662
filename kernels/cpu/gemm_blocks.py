"""The blocked matrix product around the register tile, after Goto and van de Geijn (2008) and BLIS (Van Zee and van de
Geijn 2015).

              N                      a task is a block of C, with nothing shared between tasks:
        +-----------+
    K   |     B     |                for each KC of the sum:
        +-----------+                    copy the task's rows of A, KC x rows, if need be: stays in L2
    +---+-----------+                    for each few panels of the task's columns of B, KC x NR:
  M | A |     C     |                        pack them: a panel stays in L1
    +---+-----------+                        for each panel: a register tile of MR x NR after another

B is packed so that the tile reads it front to back. A needs no order, since its elements are broadcast one by one: its
rows are copied only where they lie a harmful distance apart. Every sum is in the order that KC fixes, so
that neither the blocks nor the thread count changes a bit.

With AVX2's 16 registers a large task packs A as well: gemm_packed.py.
"""

from numba import prange

from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.gemm_dots import finish_rows
from tilewise.kernels.cpu.gemm_in_place import multiply_rows_in_place, tall_tiles
from tilewise.kernels.cpu.gemm_packed import multiply_packed_block
from tilewise.kernels.cpu.gemm_panels import FEWER, GROUP, KC, pack_fewer, pack_right_group, pack_right_panel
from tilewise.kernels.cpu.gemm_tile import multiply_and_pack_tile, prefetch_tile
from tilewise.kernels.cpu.jit import kernel
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import MR, NV, VECTOR_BYTES, address, flat, lanes
from tilewise.kernels.cpu.vector_move import copy_lanes, copy_rows, copy_vector

# Panels of A hold MR rows and up to a whole number of vectors.
PAD = 16
# Blocks of C, and so the block of A that a task copies: 448 * KC * 4 = 450 KB stay in L2. With AVX2 the task takes its
# rows in turns (gemm_packed.py), so that it packs its part of B, 512 * KC * 4 = 512 KB at most, for more of them.
BLOCK_ROWS, BLOCK_COLUMNS = (128 * MR, 512) if VECTOR_BYTES == 32 else (32 * MR, 1024)
# Rows of B at most so far apart, in bytes, are packed by the tile that first reads them. Others, each on a page of its
# own, would keep that tile waiting: they are packed beforehand, GROUP panels or FEWER together.
NEAR = 2048
# Sums of more steps are collected beside C: C would be read and written too often.
COLLECTED_FROM = 4 * KC
# Rows a multiple of ALIASING bytes apart, give or take less than a line, share two of L1's 64 places, 12 lines each:
# then A's are copied, and C's sums collected earlier. Other rows of A are read where they lie.
ALIASING, LINE = 2048, 64
# Bytes of a column of A, of whose rows KC steps fit in half of L2, or of a row of B, a few panels, up to which AVX2's
# tasks leave A where it lies.
STAYING, PASSING = 264 * 4, 512
# Steps from which a tile asks for its part of C beforehand, which costs 14 cycles, as much as a step: behind fewer
# steps it would come too late.
AWAITED_DEPTH = 128


@emitted
def _tile_stride(array):
    """MR rounded up to whole vectors."""
    width = lanes(array)
    return (MR + width - 1) // width * width


@emitted
def _copy_left(a, start, row_step, column_step, rows, depth, panels):
    """The task's rows of A for KC of the sum; returns what is between two tiles' panels, two rows and two steps.

    Rows that lie in a row stay rows. Columns become a panel for every tile, since a tile walks over all of them.
    """
    if column_step == 1:
        copy_rows(a, start, row_step, rows, depth, panels, 0, KC + PAD)
        return MR * (KC + PAD), KC + PAD, 1
    width, stride = lanes(a), _tile_stride(a)
    for i in range(0, rows, MR):
        used = min(MR, rows - i)
        for k in range(depth):
            for r in range(0, stride, width):
                place, origin = (i // MR * KC + k) * stride + r, start + i + k * column_step + r
                copy_lanes(1, 0, address(panels, place), address(a, origin), 0, used - r, 1)
    return KC * stride, 1, stride


@emitted
def _multiply_panel(
    a, a_at, tile_step, a_row, a_column, rows, b, b_at, b_row, b_column, panel, panel_at, packed, depth, c, c_at,
    c_step, columns, accumulate,
):  # fmt: skip
    """C[:rows, :columns] (+)= A B under one panel of B, at panel[panel_at], which stays in L1.

    Where it is not packed already, the first tile that reads it does that.
    """
    count = NV * lanes(c)
    i = 0
    awaited = depth >= AWAITED_DEPTH
    if awaited:
        prefetch_tile(MR, NV, address(c, c_at), c_step)
    near = b_column == 1 and columns >= count and rows >= MR and b_row * b.itemsize <= NEAR
    if near and not packed:
        multiply_and_pack_tile(
            MR, NV, address(a, a_at), a_row, a_column, address(b, b_at), b_row, depth, address(c, c_at), c_step,
            accumulate, address(panel, panel_at),
        )  # fmt: skip
        i = MR
    elif not packed:
        pack_right_panel(b, b_at, b_row, b_column, depth, columns, panel, panel_at)
    while i + MR <= rows:
        if awaited:
            prefetch_tile(MR, NV, address(c, c_at + i * c_step), c_step)
        tall_tiles(
            address(a, a_at + i // MR * tile_step), a_row, a_column, address(panel, panel_at), count, depth,
            address(c, c_at + i * c_step), c_step, columns, accumulate,
        )  # fmt: skip
        i += MR
    if i < rows:
        multiply_rows_in_place(
            a, a_at + i // MR * tile_step, a_row, a_column, panel, panel_at, count, depth, c, c_at + i * c_step, c_step,
            rows - i, columns, accumulate,
        )  # fmt: skip


@emitted
def _alias(step):
    """Would rows so many bytes apart share a few places of L1?"""
    beyond = step % ALIASING
    return min(beyond, ALIASING - beyond) < LINE


@emitted
def multiply_block(
    a, a_at, a_row, a_column, b, b_at, b_row, b_column, c, c_at, c_step, rows, columns, whole
):  # fmt: skip
    """One task: C[:rows, :columns] = A B. Sums of many steps are collected beside C, where a tile's lie together."""
    count = NV * lanes(c)
    collected = whole > COLLECTED_FROM or (whole > 2 * KC and _alias(c_step * c.itemsize))
    across = (columns + count - 1) // count * count
    copied = a_column != 1 or _alias(a_row * a.itemsize)
    copy = scratch((rows + MR - 1) // MR * _tile_stride(c) * (KC + PAD) if copied else 0, c)
    panels_a = copy if copied else a
    far = b_column == 1 and b_row * b.itemsize > NEAR
    panel = scratch((GROUP if far else 1) * count * KC, c)
    sums = scratch(across * rows if collected else 1, c)
    for k0 in range(0, max(whole, 1), KC):
        depth = min(KC, whole - k0)
        accumulate = 1 if k0 > 0 else 0
        left, tile_step, row, column = a_at + k0 * a_column, MR * a_row, a_row, 1
        if copied:
            left = 0
            tile_step, row, column = _copy_left(a, a_at + k0 * a_column, a_row, a_column, rows, depth, panels_a)
        first = end = 0  # the panels packed last, in columns
        for j in range(0, columns, count):
            right = b_at + k0 * b_row + j * b_column
            used = min(count, columns - j)
            if j >= end:
                left_over = (columns - j) // count if far else 0
                first = end = j
                if left_over >= GROUP:
                    end += GROUP * count
                    pack_right_group(b, right, b_row, depth, panel, 0)
                elif left_over >= FEWER:
                    end += FEWER * count
                    pack_fewer(b, right, b_row, depth, panel, 0)
            if collected:
                _multiply_panel(
                    panels_a, left, tile_step, row, column, rows, b, right, b_row, b_column, panel,
                    (j - first) * KC, j < end, depth, sums, j * rows, count, used, accumulate,
                )  # fmt: skip
            else:
                _multiply_panel(
                    panels_a, left, tile_step, row, column, rows, b, right, b_row, b_column, panel,
                    (j - first) * KC, j < end, depth, c, c_at + j, c_step, used, accumulate,
                )  # fmt: skip
    if collected:
        _store_sums(sums, rows, columns, c, c_at, c_step)


@emitted
def _store_sums(sums, rows, columns, c, c_at, c_step):
    """C[:rows, :columns] from the panels in which the sums were collected."""
    width = lanes(c)
    count = NV * width
    for i in range(rows):
        for j in range(0, columns, width):
            place, origin = c_at + i * c_step + j, j // count * count * rows + i * count + j % count
            if j + width <= columns:
                copy_vector(address(c, place), address(sums, origin))
            else:
                copy_lanes(1, 1, address(c, place), address(sums, origin), 0, columns - j, 1)


@emitted
def _stays(a_row, a_column, b_row, b_column, rows, columns, itemsize):
    """AVX2: may A's rows stay where they lie?

    They share no places of L1; KC steps of them stay in L2, or few panels of B pass by. Where B comes from memory in
    rows far apart, gemm_packed.py asks for them earlier.
    """
    near = b_column != 1 or b_row * itemsize <= 4 * NEAR
    small = rows * itemsize <= STAYING or columns * itemsize <= PASSING
    return near and small and a_column == 1 and not _alias(a_row * itemsize)


@emitted
def _multiply_task(a, a_at, a_row, a_column, b, b_at, b_row, b_column, c, c_at, c_step, rows, columns, whole):
    """AVX2 has 16 registers, and a large product a tile that must not spend them on addresses (gemm_packed.py).

    A small one loses more by packing A than by its addresses (`make bench-peers ARGS='--only square'`).
    """
    if _stays(a_row, a_column, b_row, b_column, rows, columns, c.itemsize):
        multiply_block(a, a_at, a_row, a_column, b, b_at, b_row, b_column, c, c_at, c_step, rows, columns, whole)
    else:
        multiply_packed_block(
            a, a_at, a_row, a_column, b, b_at, b_row, b_column, c, c_at, c_step, rows, columns, whole
        )  # fmt: skip


multiply_task = _multiply_task if VECTOR_BYTES == 32 else multiply_block


@kernel(one_by_one=True)
def multiply_blocks(
    a, a_starts, a_row, a_column, b, b_starts, b_row, b_column, c, m, n, whole, block_rows, block_columns, bias,
    activation,
):  # fmt: skip
    """C = activation(A B + bias) for one or many matrices; matrix i of A begins at a[a_starts[i]]."""
    flat_a, flat_b, flat_c = flat(a), flat(b), flat(c)
    across = (n + block_columns - 1) // block_columns
    tasks = (m + block_rows - 1) // block_rows * across
    for number in prange(a_starts.size * tasks):
        matrix, task = number // tasks, number % tasks
        i0, j0 = task // across * block_rows, task % across * block_columns
        rows, columns = min(block_rows, m - i0), min(block_columns, n - j0)
        start = (matrix * m + i0) * n + j0
        multiply_task(
            flat_a, a_starts[matrix] + i0 * a_row, a_row, a_column,
            flat_b, b_starts[matrix] + j0 * b_column, b_row, b_column, flat_c, start, n, rows, columns, whole,
        )  # fmt: skip
        finish_rows(flat_c, start, n, rows, columns, bias, j0, activation)
