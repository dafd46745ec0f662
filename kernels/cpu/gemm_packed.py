"""A large task of the blocked product where registers are few: both operands are packed, and read front to back.

AVX2 has 16 vector registers: a tile of 6 x 16 float32 takes 14 of them, and every step of its sum 6 cycles, for
12 multiply-adds beside 8 loads. Where A's rows stay apart, the tile walks over six lines at a time, with two pointers
more; packed, 4 steps of it are one run of 96 bytes, and the loop is 12 % faster (Zen 3, blocks of 192 rows).

    for each KC of the sum:
        for each ROWS rows of A:            packed: 192 * KC * 4 = 196 KB, of an L2 of 512 KB
            for each panel of B:            packed with the first rows, all panels of the task: 16 KB each, in L1
                a register tile after another

The packing of B is shared by all rows of a task, so tasks are taller than what L2 holds of A.

The multiplications of a task's last rows ask for what the sum's next steps will pack first, as packing takes as long
as memory lets it: 64x16384 @ 16384x64 takes 7 to 8 % less time. Asking for the next rows and panels of the same steps
too gained nothing for large squares, and cost 2 to 4 % of short sums; so did divisions in each tile to find the line.
In this loop L1 holds what is packed: 93 GFLOP/s, all that the core has; what large products lose, they lose outside.
"""

from tilewise.kernels.cpu.emitted import emitted
from tilewise.kernels.cpu.gemm_panels import GROUP, KC, pack_right_group, pack_right_panel, pack_rows
from tilewise.kernels.cpu.gemm_tile import UNROLLED, beyond, multiply_packed_tile, prefetch_tile
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import MR, NV, address, lanes
from tilewise.kernels.cpu.vector_move import copy_lanes

ROWS = 32 * MR  # of float32; half as many of float64


@emitted
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


@emitted
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


@emitted
def multiply_packed_block(
    a, a_at, a_row, a_column, b, b_at, b_row, b_column, c, c_at, c_step, rows, columns, whole
):  # fmt: skip
    """One task: C[:rows, :columns] = A B."""
    count, most = NV * lanes(c), ROWS * 4 // c.itemsize
    left = scratch((min(rows, most) + MR - 1) // MR * MR * KC, c)
    right = scratch((columns + count - 1) // count * count * KC, c)
    group = GROUP * count
    for k0 in range(0, max(whole, 1), KC):
        depth = min(KC, whole - k0)
        steps = (depth + UNROLLED - 1) // UNROLLED * UNROLLED
        for i0 in range(0, rows, most):
            used = min(most, rows - i0)
            _pack_left(a, a_at + i0 * a_row + k0 * a_column, a_row, a_column, used, depth, steps, left)
            asked = min(KC, whole - k0 - KC) if i0 + most >= rows and b_column == 1 else 0
            line = 0 if asked > 0 and a_column == 1 else KC
            row = 0
            for j in range(0, columns, count):
                if i0 == 0 and j % group == 0:
                    origin, some = b_at + k0 * b_row + j * b_column, min(group, columns - j)
                    _pack_right(b, origin, b_row, b_column, depth, steps, some, right, j // count)
                # of the sum's next steps: the panels of B that are packed first, and the rows of A that are
                first = j + group - (columns + group - 1) // group * group
                line, row = _multiply_panel(
                    left, right, j * KC, used, steps, c, c_at + i0 * c_step + j, c_step, columns - j, k0,
                    address(b, b_at + (k0 + KC) * b_row + first), b_row, asked if first >= 0 else 0,
                    address(a, a_at + (k0 + KC) * a_column), a_row, min(rows, most), line, row,
                )  # fmt: skip


@emitted
def _multiply_panel(
    left, right, right_at, rows, steps, c, c_at, c_step, columns, before,
    right_next, right_step, right_rows, left_next, left_step, left_rows, line, row,
):  # fmt: skip
    """C[:rows, :columns], at most a panel, (+)= A B; the sum's first steps, with none before, overwrite C.

    Each tile asks for one line of some rows of what is packed next: first of right_next, whose rows are one line each,
    then of left_next, from this line and row on; the line and row that follow are returned.
    """
    each, elements = steps // UNROLLED, 64 // c.itemsize
    for i in range(0, rows, MR):
        wanted, step = address(left, i * KC), 0
        if right_rows > 0:
            wanted, step = right_next, right_step
            right_next, right_rows = beyond(right_next, each * right_step), right_rows - each
        elif line * elements < KC:
            wanted, step = beyond(left_next, row * left_step + line * elements), left_step
            row += each
            if row >= left_rows:
                line, row = line + 1, 0
        prefetch_tile(MR, NV, address(c, c_at + i * c_step), c_step)
        multiply_packed_tile(
            MR, NV, address(left, i * KC), address(right, right_at), steps, wanted, step,
            address(c, c_at + i * c_step), c_step, rows - i, columns, before,
        )  # fmt: skip
    return line, row
