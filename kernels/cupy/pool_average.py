"""Averages of windows and bins on the GPU; src/pool_average.cu says how."""

from tilewise.kernels.cupy.launch import Kernel, blocks_of
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

average_of_planes = Kernel("pool_average.cu", "average_of_planes<{T}>", "P P q q q i", promises=("LDG.128",))
average_of_rows = {
    vector: Kernel(
        "pool_average.cu", f"average_of_rows<{{T}}, {'{N}' if vector else 1}>", "P P q q i i",
        promises=("LDG.128",) if vector else (),
    )
    for vector in (False, True)
}  # fmt: skip


def run_average(pool: Pool, x, y, divisor, include_pad):
    """y: the sums of the windows over x, divided; divisor: 0 where it depends on the window."""
    run = _units[pool.width > 1, pool.side, index_type(pool)]
    run(x.place, blocks_of(pool.windows), x, y, divisor, pool.windows, *windows_of(pool, include_pad))
