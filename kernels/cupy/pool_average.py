"""Averages of windows and bins on the GPU; src/pool_average.cu says how."""

from tilewise.kernels.channel_plan import Rows, ceil_div, unit_width
from tilewise.kernels.cupy.launch import THREADS, Kernel, blocks_of
from tilewise.kernels.cupy.pool_windows import INDICES, WINDOWS, index_type, windows_of
from tilewise.kernels.pool_plan import Pool

_MOVES = ("LDG.128", "STG.128")

_units = {
    (vector, side, index): Kernel(
        "pool_average.cu", f"avg_pool<{{T}}, {'{N}' if vector else 1}, {side}, {index}>", f"P P r q {WINDOWS}",
        promises=_MOVES if vector else (),
    )
    for index in INDICES for vector in (False, True) for side in ((0, 2, 3) if vector else (0,))
}  # fmt: skip

_planes = Kernel("pool_average.cu", "average_of_planes<{T}>", "P P q q q i", promises=("LDG.128",))
_rows = {
    vector: Kernel(
        "pool_average.cu", f"average_of_rows<{{T}}, {'{N}' if vector else 1}>", "P P q q i i",
        promises=("LDG.128",) if vector else (),
    )
    for vector in (False, True)
}  # fmt: skip


def run_average(pool: Pool, x, y, divisor, include_pad):
    """y: the sums of the windows over x, divided; divisor: 0 where it depends on the window."""
    vector = pool.width > 1
    side = pool.kernel[0] if vector and pool.kernel in ((2, 2), (3, 3)) else 0
    run = _units[vector, side, index_type(pool)]
    run(x.place, blocks_of(pool.windows), x, y, divisor, pool.windows, *windows_of(pool, include_pad))


def run_global_average(x, y, layout):
    if layout == "NCHW":
        n, c, h, w = x.shape
        width = unit_width(h * w, x.dtype)
        vectors = h * w // width if width > 1 else 0
        group = 32 if (vectors or h * w) <= 32 * 16 else THREADS
        _planes(x.place, ceil_div(n * c * group, THREADS), x, y, n * c, h * w, vectors, group)
    else:
        n, h, w, c = x.shape
        plan = Rows(h * w, c, unit_width(c, x.dtype))
        _rows[plan.width > 1](x.place, (n, plan.tiles, 1), x, y, h * w, c, plan.span, plan.rows)
