"""Pooling of NCHW by the common windows, 3 x 3 and 2 x 2, two apart; src/pool_columns.cu says how."""

from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.cupy.launch import Kernel, blocks_of
from tilewise.kernels.cupy.pool_windows import WINDOWS, windows_of
from tilewise.kernels.pool_plan import Pool

SQUARES = ((3, 1), (2, 0))  # (side, padding on the left)
_MOVES = ("LDG.128", "STG.128")

_maximum = {
    (side, left, indexed): Kernel(
        "pool_columns.cu", f"max_pool_columns<{{T}}, {side}, {left}, {str(indexed).lower()}>",
        f"P P P q q i {WINDOWS}", promises=_MOVES,
    )
    for side, left in SQUARES for indexed in (False, True)
}  # fmt: skip
_average = {
    (side, left): Kernel(
        "pool_columns.cu", f"avg_pool_columns<{{T}}, {side}, {left}>", f"P P r q q i {WINDOWS}", promises=_MOVES
    )
    for side, left in SQUARES
}


def _plan(pool: Pool, layout: str, x, *results):
    """(side, left) of the kernel, and its groups; None where other kernels must do it."""
    square = pool.kernel[0], pool.low[1]
    known = square in SQUARES and pool.is_square(square[0], 2) and x.dtype.kind not in "iu"
    width = 16 // x.dtype.itemsize
    if layout != "NCHW" or not known or pool.size[1] % width:
        return None
    whole = pool.out[1] % width == 0 and not any(r is not None and r.pointer % 16 for r in results)
    across = ceil_div(pool.out[1], width)
    return square, (pool.images * pool.out[0] * across, across, whole)


def maximum_columns(pool: Pool, layout: str, x, y, indices) -> bool:
    """Runs the kernel if it is for such windows, and tells whether."""
    plan = _plan(pool, layout, x, y, indices)
    if plan:
        square, groups = plan
        run = _maximum[*square, indices is not None]
        run(x.place, blocks_of(groups[0]), x, y, indices, *groups, *windows_of(pool))
    return plan is not None


def average_columns(pool: Pool, layout: str, x, y, divisor, include_pad) -> bool:
    plan = _plan(pool, layout, x, y)
    if plan:
        square, groups = plan
        _average[square](x.place, blocks_of(groups[0]), x, y, divisor, *groups, *windows_of(pool, include_pad))
    return plan is not None
