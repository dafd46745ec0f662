"""Who takes which part of an array in softmax on a GPU: groups of lanes, blocks, tiles of columns."""

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
