"""The blocked matrix product around the register micro-kernel, after Goto and van de Geijn (2008) and BLIS (Van Zee and
van de Geijn 2015).

              N                          KC x NR panel of B: stays in L1/L2 while
        +-----------+                    every row block of A passes by
    K   |     B     |                    MC x KC block of A: stays in L2 while
        +-----------+                    every panel of B passes by
    +---+-----------+
  M | A |     C     |   for each NC columns, each KC of the sum: pack B; for each chunk of MC rows: pack A,
    +---+-----------+   then a register tile of MR x NR at a time

Panels are packed so that the micro-kernel reads both operands front to back. Rows are split over threads in chunks of
MC; the order of every sum is fixed by KC alone, so the thread count never changes a bit.
"""

import numpy as np
from numba import prange

from tilewise.kernels.cpu.epilogue import activate_row
from tilewise.kernels.cpu.jit import device, kernel
from tilewise.kernels.cpu.scratch import scratch
from tilewise.kernels.cpu.simd import MR, NV, address, lanes, micro_kernel
from tilewise.kernels.cpu.vector_move import copy_lanes, transpose_block

# KC steps of the sum: a panel of A (KC * MR * 4 = 21 KB) stays in L1 while a panel of B (KC * NR * 4 = 48 KB) streams
# from L2 at 128 bytes in 14 cycles. Of 192, 256 and 384, 384 was the fastest at sizes 512 to 2048: fewer passes over C.
KC = 384
# MC rows: a block of A is KC * MC * 4 = 172 KB, a third of the smallest L2 in use (512 KB).
MC = 8 * MR
# NC columns: a packed block of B is KC * NC * 4 = 6 MB, which a shared L3 holds.
NC = 4096


@device()
def clear_lanes(array, start, count):
    for i in range(start, start + count):
        array[i] = 0


def make_pack_left(height):
    """The packing of A for register tiles of `height` rows."""

    @device(allocates=True)
    def pack_left(a, start, row_step, column_step, rows, depth, panels, panels_start):
        """Pack a rows x depth block of A, element (i, k) at a[start + i * row_step + k * column_step], into panels.

        panels[panels_start + (i // height) * height * depth + k * height + i % height]; missing rows of the last
        panel are zero.
        """
        width = lanes(a)
        offsets = np.empty(height, np.int64)
        lows = np.zeros(height, np.int64)
        highs = np.empty(height, np.int64)
        for first in range(0, rows, height):
            used = min(height, rows - first)
            target = panels_start + first * depth
            source = start + first * row_step
            if column_step == 1:
                for r in range(height):
                    offsets[r] = r * row_step
                    highs[r] = depth if r < used else 0
                for k in range(0, depth, width):
                    transpose_block(
                        height,
                        address(panels, target + k * height),
                        address(a, source),
                        address(offsets, 0),
                        address(lows, 0),
                        address(highs, 0),
                        k,
                        depth - k,
                    )
            elif row_step == 1:
                for k in range(depth):
                    for r in range(0, height, width):
                        # the lanes beyond height belong to the next step: clear what is missing, then merge what is
                        # there
                        clear_lanes(panels, target + k * height + r, min(width, height - r))
                        part = min(used - r, width)
                        copy_lanes(
                            1,
                            1,
                            address(panels, target + k * height + r),
                            address(a, source + k * column_step + r),
                            0,
                            part,
                            1,
                        )
            else:
                for k in range(depth):
                    for r in range(height):
                        value = a[source + r * row_step + k * column_step] if r < used else a.dtype.type(0)
                        panels[target + k * height + r] = value

    return pack_left


pack_left = make_pack_left(MR)


@device()
def pack_right_panel(b, start, row_step, column_step, depth, columns, panel, target):
    """Pack depth x columns (at most NR) of B, element (k, j) at b[start + k * row_step + j * column_step].

    panel[target + k * NR + j]; missing columns are zero.
    """
    width = lanes(b)
    count = NV * width
    if column_step == 1:
        for k in range(depth):
            for j in range(0, count, width):
                copy_lanes(
                    1,
                    0,
                    address(panel, target + k * count + j),
                    address(b, start + k * row_step + j),
                    0,
                    columns - j,
                    1,
                )
    elif row_step == 1:
        _pack_right_transposed(b, start, column_step, depth, columns, panel, target)
    else:
        for k in range(depth):
            for j in range(count):
                value = b[start + k * row_step + j * column_step] if j < columns else b.dtype.type(0)
                panel[target + k * count + j] = value


@device(allocates=True)
def _pack_right_transposed(b, start, column_step, depth, columns, panel, target):
    width = lanes(b)
    count = NV * width
    stage = scratch(width * width, b)
    offsets = np.empty(width, np.int64)
    lows = np.zeros(width, np.int64)
    highs = np.empty(width, np.int64)
    for j in range(0, count, width):
        for r in range(width):
            offsets[r] = r * column_step
            highs[r] = depth if j + r < columns else 0
        for k in range(0, depth, width):
            transpose_square(stage, b, start + j * column_step, offsets, lows, highs, k)
            for i in range(min(width, depth - k)):
                where = target + (k + i) * count + j
                copy_lanes(1, 0, address(panel, where), address(stage, i * width), 0, width, 1)


@device()
def transpose_square(stage, source, start, offsets, lows, highs, k):
    """A lanes x lanes square: stage[i * lanes + r] = source[start + offsets[r] + k + i] within the rows' bounds."""
    if lanes(source) == 16:
        transpose_block(
            16,
            address(stage, 0),
            address(source, start),
            address(offsets, 0),
            address(lows, 0),
            address(highs, 0),
            k,
            16,
        )
    elif lanes(source) == 8:
        transpose_block(
            8, address(stage, 0), address(source, start), address(offsets, 0), address(lows, 0), address(highs, 0), k, 8
        )
    elif lanes(source) == 4:
        transpose_block(
            4, address(stage, 0), address(source, start), address(offsets, 0), address(lows, 0), address(highs, 0), k, 4
        )
    else:
        transpose_block(
            2, address(stage, 0), address(source, start), address(offsets, 0), address(lows, 0), address(highs, 0), k, 2
        )


@device()
def multiply_rows(panels_a, rows, panels_b, columns, depth, c, start, c_step, accumulate):
    """C[:rows, :columns] (+)= A B from packed panels, register tile by register tile; C starts at c[start]."""
    width = NV * lanes(c)
    for j in range(0, columns, width):
        for i in range(0, rows, MR):
            micro_kernel(
                MR,
                NV,
                address(panels_a, i * depth),
                MR,
                address(panels_b, j * depth),
                width,
                depth,
                address(c, start + i * c_step + j),
                c_step,
                rows - i,
                columns - j,
                accumulate,
            )


@device()
def finish_rows(c, start, c_step, rows, columns, bias, bias_start, activation):
    """Add the bias (one number a column, if there is any) and apply the activation, on rows still in the cache."""
    for i in range(rows):
        row = start + i * c_step
        if bias.size > 0:
            for j in range(columns):
                c[row + j] += bias[bias_start + j]
        if activation != 0:
            activate_row(c, row, columns, activation)


@device(allocates=True)
def _row_chunk(
    a, a_start, a_row, a_column, panels_b, c, c_start, c_step, rows, columns, k0, depth, whole, bias, j0, activation
):
    """One chunk of rows against a packed block of B: pack its part of A, multiply, and finish after the last block."""
    panels_a = scratch((rows + MR) * depth, a)
    pack_left(a, a_start + k0 * a_column, a_row, a_column, rows, depth, panels_a, 0)
    multiply_rows(panels_a, rows, panels_b, columns, depth, c, c_start + j0, c_step, 1 if k0 > 0 else 0)
    if k0 + depth == whole:
        finish_rows(c, c_start + j0, c_step, rows, columns, bias, j0, activation)


def _multiply(a, a_start, a_row, a_column, b, b_start, b_row, b_column, c, c_start, m, n, whole, bias, activation):
    width = NV * lanes(c)
    chunks = (m + MC - 1) // MC
    # equal chunks of whole register tiles, so that no thread is left with a sliver
    chunk_rows = (((m + chunks - 1) // chunks + MR - 1) // MR) * MR
    block = min(NC, ((n + width - 1) // width) * width)
    panels_b = scratch(min(KC, whole) * block + width, a)
    for j0 in range(0, n, NC):
        columns = min(NC, n - j0)
        for k0 in range(0, max(whole, 1), KC):
            depth = min(KC, whole - k0)
            for p in prange((columns + width - 1) // width):
                first = p * width
                origin = b_start + k0 * b_row + (j0 + first) * b_column
                pack_right_panel(b, origin, b_row, b_column, depth, columns - first, panels_b, first * depth)
            for chunk in prange(chunks):
                i0 = chunk * chunk_rows
                rows = min(chunk_rows, m - i0)
                if rows > 0:
                    _row_chunk(
                        a,
                        a_start + i0 * a_row,
                        a_row,
                        a_column,
                        panels_b,
                        c,
                        c_start + i0 * n,
                        n,
                        rows,
                        columns,
                        k0,
                        depth,
                        whole,
                        bias,
                        j0,
                        activation,
                    )


_multiply_one = device(allocates=True)(_multiply)

# C = activation(A B + bias) for one matrix, rows split over threads.
multiply = kernel()(_multiply)


@kernel()
def multiply_batch(a, a_starts, a_row, a_column, b, b_starts, b_row, b_column, c, m, n, whole, bias, activation):
    """The same for many matrices, a matrix at a time on each thread; matrix i of A begins at a[a_starts[i]]."""
    for i in prange(a_starts.size):
        _multiply_one(
            a,
            a_starts[i],
            a_row,
            a_column,
            b,
            b_starts[i],
            b_row,
            b_column,
            c,
            i * m * n,
            m,
            n,
            whole,
            bias,
            activation,
        )
