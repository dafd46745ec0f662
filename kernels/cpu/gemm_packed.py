"""A task of the blocked product where registers are few: both operands are packed, and read front to back.

AVX2 has 16 vector registers: a tile of 6 x 16 float32 takes 14 of them, and every step of its sum 6 cycles, for
12 multiply-adds beside 8 loads. Where A's rows stay apart, the tile walks over six lines at a time, with two pointers
more; packed, 4 steps of it are one run of 96 bytes, and the loop is 12 % faster (Zen 3, blocks of 192 rows).

    for each KC of the sum:
        for each ROWS rows of A:            packed: 192 * KC * 4 = 196 KB, of an L2 of 512 KB
            for each panel of B:            packed with the first rows, all panels of the task: 16 KB each, in L1
                a register tile after another

The packing of B is shared by all rows of a task, so tasks are taller than what L2 holds of A.
"""

from tilewise.kernels.cpu.gemm_panels import GROUP, KC, pack_right_group, pack_right_panel, pack_rows
from tilewise.kernels.cpu.gemm_tile import UNROLLED, multiply_packed_tile, prefetch_tile
from tilewise.kernels.cpu.jit import device
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import MR, NV, address, lanes
from tilewise.kernels.cpu.vector_move import copy_lanes

ROWS = 32 * MR  # of float32; half as many of float64


@device()
def _pack_left(a, start, row_step, column_step, rows, depth, steps, panels):
    """Rows of A in panels of MR, MR * KC elements apart: element (i, k) of a panel at k * MR + i, zeros from depth to
    `steps`.
    """
    for i in range(0, rows, MR):
        used, target = min(MR, rows - i), i * KC
        if column_step == 1:
            pack_rows(MR, address(panels, target), address(a, start + i * row_step), row_step, used, depth)
            continue
        for k in range(depth):  # lanes beyond MR belong to the next step, which overwrites them
            for r in range(0, MR, lanes(a)):
                place, origin = target + k * MR + r, start + i + k * column_step + r
                copy_lanes(1, 0, address(panels, place), address(a, origin), 0, used - r, 1)
        for place in range(target + depth * MR, target + steps * MR):
            panels[place] = 0


@device()
def _pack_right(b, start, row_step, column_step, depth, steps, columns, panels, first):
    """Up to GROUP panels of B, from panel number `first` on; zeros from depth to `steps`."""
    count = NV * lanes(b)
    if column_step == 1 and columns >= GROUP * count:
        pack_right_group(b, start, row_step, depth, panels, first * count * KC)
    for j in range(0, columns, count):
        target = (first * count + j) * KC
        if column_step != 1 or columns < GROUP * count:
            pack_right_panel(b, start + j * column_step, row_step, column_step, depth, columns - j, panels, target)
        for place in range(target + depth * count, target + steps * count):
            panels[place] = 0


@device(allocates=True)
def multiply_packed_block(
    a, a_at, a_row, a_column, b, b_at, b_row, b_column, c, c_at, c_step, rows, columns, whole
):  # fmt: skip
    """One task: C[:rows, :columns] = A B."""
    count, most = NV * lanes(c), ROWS * 4 // c.itemsize
    left = scratch((min(rows, most) + MR - 1) // MR * MR * KC, c)
    right = scratch((columns + count - 1) // count * count * KC, c)
    for k0 in range(0, max(whole, 1), KC):
        depth = min(KC, whole - k0)
        steps = (depth + UNROLLED - 1) // UNROLLED * UNROLLED
        for i0 in range(0, rows, most):
            used = min(most, rows - i0)
            _pack_left(a, a_at + i0 * a_row + k0 * a_column, a_row, a_column, used, depth, steps, left)
            for j in range(0, columns, count):
                if i0 == 0 and j % (GROUP * count) == 0:
                    origin, some = b_at + k0 * b_row + j * b_column, min(GROUP * count, columns - j)
                    _pack_right(b, origin, b_row, b_column, depth, steps, some, right, j // count)
                _multiply_panel(left, right, j * KC, used, steps, c, c_at + i0 * c_step + j, c_step, columns - j, k0)


@device()
def _multiply_panel(left, right, right_at, rows, steps, c, c_at, c_step, columns, before):
    """C[:rows, :columns], at most a panel, (+)= A B; the sum's first steps, with none before, overwrite C."""
    for i in range(0, rows, MR):
        prefetch_tile(MR, NV, address(c, c_at + i * c_step), c_step)
        multiply_packed_tile(
            MR, NV, address(left, i * KC), address(right, right_at), steps, address(c, c_at + i * c_step), c_step,
            rows - i, columns, before,
        )  # fmt: skip
