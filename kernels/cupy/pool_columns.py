"""Pooling of NCHW by the common windows, 3 x 3 and 2 x 2, two apart; src/pool_columns.cu says how."""

from tilewise.kernels.cupy.launch import Kernel, blocks_of
from tilewise.kernels.cupy.pool_windows import WINDOWS, windows_of
from tilewise.kernels.pool_plan import SQUARES, Pool

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


def maximum_columns(square, groups, pool: Pool, x, y, indices):
    run = _maximum[*square, indices is not None]
    run(x.place, blocks_of(groups[0]), x, y, indices, *groups, *windows_of(pool))


def average_columns(square, groups, pool: Pool, x, y, divisor, include_pad):
    _average[square](x.place, blocks_of(groups[0]), x, y, divisor, *groups, *windows_of(pool, include_pad))
