"""Products of matrices on tensor cores; src/tensor.cuh and gemm_tensor.cu say how."""

from dataclasses import dataclass

from tilewise.kernels.cupy.gemm_tile import GEMM
from tilewise.kernels.cupy.launch import NAMES, Kernel
from tilewise.kernels.cupy.module import OLDEST

STAGES, GAP, OUT_GAP = 4, 8, 4  # tensor.cuh's
_STEP_BYTES = 64  # of the depth
_VECTOR_BYTES = 16
AMPERE = (8, 0)


@dataclass(frozen=True, slots=True)
class TensorTile:
    """One of tensor.cuh's, by its name there. resident: blocks that shall fit a multiprocessor."""

    name: str
    rows: int
    columns: int
    threads: int
    resident: int

    def shared_bytes(self, by_k: tuple[bool, bool]) -> int:
        """Of dynamic shared memory: the stages; the sums lie in the same place. by_k: whether k is contiguous."""
        sides = zip((self.rows, self.columns), by_k, strict=True)
        stage = sum(size * (_STEP_BYTES + _VECTOR_BYTES) if k else _STEP_BYTES * (size + GAP) for size, k in sides)
        return max(STAGES * stage, 4 * self.rows * (self.columns + OUT_GAP))


LARGE = TensorTile("Large", 128, 128, 256, 2)
MEDIUM = TensorTile("Medium", 128, 128, 256, 1)
LITTLE = TensorTile("Little", 64, 64, 128, 4)
# A way to multiply -> its dtype; "split" is float32 by three products of TF32
DTYPES = {"half": "float16", "bfloat": "bfloat16", "tf32": "float32", "split": "float32"}
MATHS = {"half": "HalfMath", "bfloat": "BfloatMath", "tf32": "Tf32Math", "split": "SplitMath"}
_ORDERS = [(p, q) for p in (True, False) for q in (True, False)]


def make(
    source: str, function: str, way: str, tile: TensorTile, by_k: tuple[bool, bool], flags: tuple[bool, ...],
    parameters: str, promises: tuple[str, ...] = (),
) -> Kernel:  # fmt: skip
    """The function's instance for this way and tile. by_k: of both operands, whether k is contiguous."""
    names = [f"{NAMES}{name}" for name in (MATHS[way], tile.name)] + [str(flag).lower() for flag in flags]
    on_oldest = way == "half" and tile is LITTLE  # the stages of a larger one have no room there
    return Kernel(
        source, f"{function}<{', '.join(names)}>", parameters, threads=tile.threads, blocks=tile.resident,
        dtypes=(DTYPES[way],), least=OLDEST if on_oldest else AMPERE, shared=tile.shared_bytes(by_k),
        promises=("HMMA", *promises, *(() if on_oldest else ("LDGSTS",))),
    )  # fmt: skip


def _matmul(way: str, tile: TensorTile, order: tuple[bool, bool]) -> Kernel:
    return make("gemm_tensor.cu", "matmul_tensor", way, tile, order, order, f"P P P P P f {GEMM}")


# (way, tile) -> {(A, B) of whether k is contiguous: kernel}
MATMULS = {
    (way, tile): {order: _matmul(way, tile, order) for order in _ORDERS}
    for way in DTYPES for tile in ((MEDIUM,) if way == "split" else (LARGE, LITTLE))
}  # fmt: skip
