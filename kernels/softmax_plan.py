"""Softmax on a GPU: who takes which part of an array (groups of lanes, blocks, tiles of columns), and which of a
backend's kernels (`SoftmaxKernels`) runs."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from tilewise.kernels.channel_plan import ceil_div

THREADS = 256
SHORT = 8  # units, 16 bytes or an element, of a row that a lane has in its registers: 32 float32, and no spills
FEW_ROWS = 16  # elements of a column that are left to one thread, where there are columns enough for a warp


def _power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()


def plan_rows(n: int, each: int, dtype) -> tuple[bool, int]:
    """(whether rows of n are taken in vectors of 16 bytes, lanes for each row); 0 lanes: a block for each."""
    width = 16 // dtype.itemsize
    vector = n % width == 0
    units = n // width if vector else n
    return vector, 0 if units > 32 * each else min(32, _power_of_two(units))


def plan_columns(n: int, inner: int) -> tuple[int, int]:
    """(tiles of the columns, columns of a tile): wide tiles for short columns, and a warp's width for long ones."""
    columns = min(THREADS, _power_of_two(inner))
    while columns > 32 and ceil_div(n, THREADS // columns) > FEW_ROWS:
        columns //= 2
    return ceil_div(inner, columns), columns


@dataclass(frozen=True, slots=True)
class SoftmaxKernels:
    """How a backend starts its kernels, by whether rows are taken in vectors, and by whether they are the logarithm's.

    short_rows[vector, log](place, blocks, *operands, rows, n, group), long_rows[log](place, blocks, *operands, n,
    vectors), columns[log](place, blocks, *operands, n, inner, tiles, columns).
    short: units of a row that a lane has in its registers.
    """

    short_rows: dict[tuple[bool, bool], Callable]
    long_rows: dict[bool, Callable]
    columns: dict[bool, Callable]
    short: int

    def run(self, operands: tuple, axis: int, log: bool):
        """The operands' shapes are one."""
        x, place = operands[0], operands[0].place
        if x.size == 0:
            return
        n, inner = x.shape[axis], prod(x.shape[axis + 1 :])
        rows = x.size // (n * inner)
        if inner > 1:
            tiles, columns = plan_columns(n, inner)
            self.columns[log](place, rows * tiles, *operands, n, inner, tiles, columns)
            return
        vector, group = plan_rows(n, self.short, x.dtype)
        if group:
            self.short_rows[vector, log](place, ceil_div(rows * group, THREADS), *operands, rows, n, group)
        else:
            self.long_rows[log](place, rows, *operands, n, n * x.dtype.itemsize // 16 if vector else 0)


def forward(kernels: SoftmaxKernels, log: bool, x, *, axis):
    y = x.place.empty(x.shape, x.dtype)
    kernels.run((x, y), axis, log)
    return y


def backward(kernels: SoftmaxKernels, log: bool, grad, y, *, axis):
    result = y.place.empty(y.shape, y.dtype)
    kernels.run((grad, y, result), axis, log)
    return result
