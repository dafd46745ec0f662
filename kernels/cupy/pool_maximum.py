"""Maxima of windows and bins on the GPU; src/pool_maximum.cu says how."""

from tilewise.kernels.cupy.launch import FLOATS, INTEGERS, Kernel, blocks_of
from tilewise.kernels.cupy.pool_windows import INDICES, WINDOWS, index_type, windows_of
from tilewise.kernels.pool_plan import Pool


def _make(vector: bool, side: int, indexed: bool, index: str) -> Kernel:
    arguments = f"{{T}}, {'{N}' if vector else 1}, {side}, {str(indexed).lower()}, {index}"
    return Kernel(
        "pool_maximum.cu", f"max_pool<{arguments}>", f"P P P q {WINDOWS}",
        dtypes=FLOATS + INTEGERS if indexed and not side else FLOATS, promises=("LDG.128", "STG.128") if vector else (),
    )  # fmt: skip


_units = {
    (vector, side, indexed, index): _make(vector, side, indexed, index)
    for index in INDICES for indexed in (False, True)
    for vector in (False, True) for side in ((0, 2, 3) if vector else (0,))
}  # fmt: skip


def run_maximum(pool: Pool, x, y, indices):
    """y, and where indices is not None they: the maxima of the windows over x."""
    vector, floats = pool.width > 1, x.dtype.kind not in "iu"
    side = pool.kernel[0] if pool.kernel in ((2, 2), (3, 3)) and pool.dilation == (1, 1) else 0
    indexed = indices is not None or not floats
    run = _units[vector, side if vector and floats else 0, indexed, index_type(pool)]
    run(x.place, blocks_of(pool.windows), x, y, indices, pool.windows, *windows_of(pool))
