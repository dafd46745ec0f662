"""Products of matrices on Hopper's tensor cores; src/wgmma_product.cuh and gemm_wgmma.cu say how."""

from dataclasses import dataclass

from tilewise.kernels.cupy.gemm_tile import GEMM
from tilewise.kernels.cupy.launch import Kernel

HOPPER = (9, 0)
_STAGES, _LINE_BYTES = 4, 128  # wgmma_product.cuh's FILLING, LINE_BYTES
_THREADS = 384


@dataclass(frozen=True, slots=True)
class WgmmaTile:
    """128 rows, and 128 or 256 columns."""

    columns: int
    rows: int = 128

    @property
    def shared_bytes(self) -> int:
        return _STAGES * (self.rows + self.columns) * _LINE_BYTES


WIDE, NARROW = WgmmaTile(256), WgmmaTile(128)


def _matmul(tile: WgmmaTile, order: tuple[bool, bool]) -> Kernel:
    orders = ", ".join(str(by_k).lower() for by_k in order)
    return Kernel(
        "gemm_wgmma.cu", f"matmul_wgmma<{{T}}, {tile.columns}, {orders}>", f"P P P P P r {GEMM}", threads=_THREADS,
        dtypes=("float16", "bfloat16"), least=HOPPER, target="sm_90a", shared=tile.shared_bytes,
        promises=("HGMMA", "LDGSTS", "STG.128", "USETMAXREG"),
    )  # fmt: skip


# tile -> {(A, B) of whether k is contiguous: kernel}
MATMULS = {
    tile: {(p, q): _matmul(tile, (p, q)) for p in (True, False) for q in (True, False)} for tile in (WIDE, NARROW)
}
