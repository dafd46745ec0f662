"""Products of matrices by tiles on the GPU; src/product.cuh and gemm_tile.cu say how."""

from dataclasses import dataclass

from tilewise.kernels.cupy.launch import FLOATS, INTEGERS, NAMES, Kernel
from tilewise.kernels.cupy.module import OLDEST

_SOURCE = "gemm_tile.cu"
GEMM = "17q2i"  # gemm.cuh's Gemm
SINGLE = ("float32",)
_ORDERS = (True, False)  # whether k is contiguous


@dataclass(frozen=True, slots=True)
class Tile:
    """One of product.cuh's, by its name there. resident: blocks that shall fit a multiprocessor."""

    name: str
    rows: int
    columns: int
    threads: int
    resident: int


BIG = Tile("Big", 128, 128, 256, 2)
TALL = Tile("Tall", 128, 64, 128, 3)
SMALL = Tile("Small", 64, 64, 128, 3)
TINY = Tile("Tiny", 32, 32, 64, 6)


def _matmul(tile: Tile, left: str, right: str, dtypes=SINGLE) -> Kernel:
    copies = ("LDGSTS",) if "COPIED" in (left, right) else ()
    older = {(7, 5): 1, (8, 0): 1} if tile is BIG and not copies else {}
    names = ", ".join(f"{NAMES}{name}" for name in (tile.name, left, right))
    return Kernel(
        _SOURCE, f"matmul<{{T}}, {names}>", f"P P P P P r {GEMM}", threads=tile.threads, blocks=tile.resident,
        blocks_on=older, blocks_of_double=tile.resident * 2 // 3, dtypes=dtypes, least=(8, 0) if copies else OLDEST,
        promises=("LDS.128", *copies, *(("FFMA",) if dtypes == SINGLE else ())),
    )  # fmt: skip


_ALONG = {True: "ALONG_K", False: "ALONG_ROWS"}
_COPIED = {True: "ALONG_K", False: "COPIED"}
# float16 has tensor cores wherever it comes in vectors, bfloat16 on all but the oldest devices; float64 has too many
# registers for large tiles
_IN_VECTORS = ("bfloat16", "float32", "float64")
VECTORS = {
    TALL: _matmul(TALL, "VECTORS", "VECTORS"),
    SMALL: _matmul(SMALL, "VECTORS", "VECTORS", _IN_VECTORS),
    TINY: _matmul(TINY, "VECTORS", "VECTORS", _IN_VECTORS),
}
# Of the largest tile one for each (A, B) of whether k is contiguous, which saves registers; and the same where a matrix
# whose rows lie side by side comes by cp.async
BIG_VECTORS = {(p, q): _matmul(BIG, _ALONG[p], _ALONG[q]) for p in _ORDERS for q in _ORDERS}
BIG_COPIES = {(p, q): _matmul(BIG, _COPIED[p], _COPIED[q]) for p in _ORDERS for q in _ORDERS if not (p and q)}
SINGLY = {
    SMALL: _matmul(SMALL, "SINGLY", "SINGLY", ("float16", "bfloat16", "float32")),
    TINY: _matmul(TINY, "SINGLY", "SINGLY", FLOATS),
}
WHOLE = Kernel(
    _SOURCE, "matmul_integers<{T}>", f"P P P P {GEMM}", threads=SMALL.threads, blocks=2, dtypes=INTEGERS
)  # fmt: skip
