"""Products of matrices on Hopper's tensor cores; src/wgmma_product.cuh, wgmma_single.cuh and gemm_wgmma.cu say how."""

from dataclasses import dataclass
from typing import NamedTuple

from tilewise.kernels.cupy.gemm_tile import GEMM
from tilewise.kernels.cupy.launch import NAMES, Kernel

HOPPER = (9, 0)
_STAGES, _LINE_BYTES = 4, 128  # wgmma_product.cuh's FILLING, LINE_BYTES
THREADS = 384


@dataclass(frozen=True, slots=True)
class WgmmaTile:
    """128 rows, and 128 or 256 columns."""

    columns: int
    rows: int = 128
    resident: int = 1  # blocks that fit a multiprocessor

    def shared_bytes(self, parts: int = 1) -> int:
        """Of dynamic shared memory: the stages. parts: tiles that the right operand has of each."""
        return _STAGES * (self.rows + parts * self.columns) * _LINE_BYTES


WIDE, NARROW = WgmmaTile(256), WgmmaTile(128)
_ORDERS = [(p, q) for p in (True, False) for q in (True, False)]


class Laid(NamedTuple):
    """A product whose right operand is laid out before: by the first kernel, of its order. parts: of each number."""

    lay_out: dict[bool, Kernel]
    products: dict[bool, Kernel]  # by the left operand's order
    parts: int


def _lay_out(math: str) -> dict[bool, Kernel]:
    return {
        by_k: Kernel(
            "gemm_laid.cu", f"lay_out<{NAMES}{math}, {str(by_k).lower()}>", "P P q q", blocks=2, dtypes=("float32",),
            least=HOPPER, promises=("LDG.128", "STG.128"),
        )
        for by_k in (True, False)
    }  # fmt: skip


def _laid(lay_out: dict[bool, Kernel], math: str, tile: WgmmaTile, parts: int) -> Laid:
    products = {
        by_k: Kernel(
            "gemm_wgmma.cu", f"matmul_wgmma_laid<{NAMES}{math}, {tile.columns}, {str(by_k).lower()}>",
            f"P P P P P r {GEMM}", threads=THREADS, dtypes=("float32",), least=HOPPER, target="sm_90a",
            shared=tile.shared_bytes(parts), promises=("HGMMA", "LDGSTS", "STG.128", "USETMAXREG"),
        )
        for by_k in (True, False)
    }  # fmt: skip
    return Laid(lay_out, products, parts)


def _matmul(template: str, tile: WgmmaTile, order: tuple[bool, bool], dtypes: tuple[str, ...], parts: int) -> Kernel:
    orders = ", ".join(str(by_k).lower() for by_k in order)
    # float32's right operand goes through registers
    moves = ("LDG.128", "STS.128") if dtypes == ("float32",) else ()
    return Kernel(
        "gemm_wgmma.cu", f"{template}, {tile.columns}, {orders}>", f"P P P P P r {GEMM}", threads=THREADS,
        dtypes=dtypes, least=HOPPER, target="sm_90a", shared=tile.shared_bytes(parts),
        promises=("HGMMA", "LDGSTS", *moves, "STG.128", "USETMAXREG"),
    )  # fmt: skip


# tile -> {(A, B) of whether k is contiguous: kernel}
MATMULS = {
    tile: {order: _matmul("matmul_wgmma<{T}", tile, order, ("float16", "bfloat16"), 1) for order in _ORDERS}
    for tile in (WIDE, NARROW)
}
# (way, tile) -> the same of float32; "split": by three products of TF32, for whose 256 columns there are no registers
SINGLES = {
    (way, tile): {
        order: _matmul(f"matmul_wgmma_single<{NAMES}{math}", tile, order, ("float32",), parts) for order in _ORDERS
    }
    for way, math, parts, tiles in (("tf32", "Tf32Math", 1, (WIDE, NARROW)), ("split", "SplitMath", 2, (NARROW,)))
    for tile in tiles
}
# The same where the right operand is laid out before
_ROUNDED, _SPLIT = _lay_out("Tf32Math"), _lay_out("SplitMath")
LAID = {
    ("tf32", WIDE): _laid(_ROUNDED, "Tf32Math", WIDE, 1),
    ("tf32", NARROW): _laid(_ROUNDED, "Tf32Math", NARROW, 1),
    ("split", NARROW): _laid(_SPLIT, "SplitMath", NARROW, 2),
}
LAID_SIDE = 64  # of what a block lays out
