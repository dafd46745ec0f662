"""Which kernel computes a product: by dtype, shape, and the device's compute capability and multiprocessors.

Of an array that comes in vectors of 16 bytes, by compute capability (what does not, and integers, by tiles):

    7.5          float16 on tensor cores (mma); bfloat16, float32 and float64 by tiles
    8.0 to 12.0  float16, bfloat16, and float32 under using(tf32=True), on tensor cores (mma, cp.async)
    9.0          float16 and bfloat16 on Hopper's (wgmma), where there is enough for its tiles

float32 is multiplied as such, or where SPLIT_ON says so by three products of TF32.
"""

from typing import Any, NamedTuple

import numpy as np

from tilewise.kernels import settings
from tilewise.kernels.cupy import driver, gemm_tensor, gemm_wgmma
from tilewise.kernels.cupy.gemm_tensor import AMPERE, LARGE, LITTLE, MEDIUM
from tilewise.kernels.cupy.gemm_tile import BIG, BIG_COPIES, BIG_VECTORS, SINGLY, SMALL, TALL, TINY, VECTORS, WHOLE
from tilewise.kernels.cupy.gemm_wgmma import HOPPER, NARROW, WIDE
from tilewise.kernels.cupy.launch import Kernel
from tilewise.kernels.gemm_matrices import Matrices, operands_of
from tilewise.kernels.gemm_plan import choose_tile, few_vectors

# Where three products of TF32 on tensor cores are to be faster than one of float32 without them, from NVIDIA's nominal
# rates: a third of the TF32 rate is at least twice the float32 rate there; on 8.6, 8.9 and 12.0 it is less than the
# float32 rate. Predicted, not measured.
SPLIT_ON = ((8, 0), (9, 0), (10, 0))
SPLIT_DEPTH = 64  # a shorter sum would not be worth it
_BLOCK = 4  # product.cuh's
# rows, columns, depth, matrices, and the device's multiprocessors
Size = tuple[int, int, int, int, int]


class Choice(NamedTuple):
    """tile: its rows and columns are a block's. together: neighbouring columns that a thread stores."""

    algorithm: str
    kernel: Kernel
    tile: Any
    together: int


def choose(left: Matrices, right: Matrices, matrices: int, engine) -> Choice:
    dtype = left.array.dtype
    if dtype.kind in "iu":
        return Choice("tiles", WHOLE, SMALL, _BLOCK)
    size = left.rows, right.columns, left.columns, matrices, engine.multiprocessors
    if not (left.aligned() and right.aligned()):
        tile = choose_tile(*size, (TINY,) if dtype == np.float64 else (SMALL, TINY))  # in 64 bits SMALL would spill
        return Choice("tiles", SINGLY[tile], tile, _BLOCK)
    orders = left.column_stride == 1, right.row_stride == 1  # is k contiguous
    return _on_tensor_cores(dtype, size, orders, engine.capability) or _by_tiles(dtype, size, orders, engine.capability)


def _on_tensor_cores(dtype, size: Size, orders, capability) -> Choice | None:
    if dtype == np.float64:
        return None
    together = 16 // dtype.itemsize
    if capability < AMPERE:
        if dtype != np.float16:
            return None
        return Choice("mma", gemm_tensor.MATMULS["half", LITTLE][orders], LITTLE, together)
    if dtype == np.float32:
        if settings.active().tf32:
            way, algorithm, tiles = "tf32", "mma in TF32", (LARGE, LITTLE)
        elif capability in SPLIT_ON and size[2] >= SPLIT_DEPTH and choose_tile(*size, (MEDIUM, TINY)) is MEDIUM:
            way, algorithm, tiles = "split", "mma in 3xTF32", (MEDIUM,)
        else:
            return None
        tile = choose_tile(*size, tiles)
        return Choice(algorithm, gemm_tensor.MATMULS[way, tile][orders], tile, together)
    if capability == HOPPER:
        tile = choose_tile(*size, (WIDE, NARROW, LITTLE))
        if isinstance(tile, gemm_wgmma.WgmmaTile):
            return Choice("wgmma", gemm_wgmma.MATMULS[tile][orders], tile, together)
    tile = choose_tile(*size, (LARGE, LITTLE))
    return Choice("mma", gemm_tensor.MATMULS["half" if dtype == np.float16 else "bfloat", tile][orders], tile, together)


def _by_tiles(dtype, size: Size, orders, capability) -> Choice:
    tile = choose_tile(*size, (BIG, TALL, SMALL, TINY) if dtype == np.float32 else (SMALL, TINY))
    if tile is not BIG:
        return Choice("tiles", VECTORS[tile], tile, _BLOCK)
    copies = BIG_COPIES.get(orders) if capability >= AMPERE else None
    return Choice("tiles", copies or BIG_VECTORS[orders], tile, _BLOCK)


# ---- what `explain` tells


def _explained(name: str, shapes: list, dtype) -> tuple[str, str]:
    """(algorithm, kernel) of a call on the first device."""
    left, right, matrices = operands_of(name, shapes, dtype)
    if not left.rows * right.columns * matrices:
        return "nothing", "the result is empty"
    if matrices == 1 and few_vectors(left, right) is not None:
        return "few vectors", "a warp for each row of the matrix"
    choice = choose(left, right, matrices, driver.engine())
    return choice.algorithm, f"tiles of {choice.tile.rows} x {choice.tile.columns}: {choice.kernel.name}"


def algorithm(name: str, shapes: list, dtype) -> tuple[str, dict[str, str]]:
    """(algorithm, why not the others) of matmul or linear."""
    taken = _explained(name, shapes, dtype)[0]
    capability = driver.engine().capability
    reasons = {}
    if dtype == np.float32:
        reasons["mma in TF32"] = "using(tf32=True) would allow it"
        reasons["mma in 3xTF32"] = (
            "too few rows, columns or depth, or rows that are no whole vectors"
            if capability in SPLIT_ON else "predicted to be slower than float32 on this device"
        )  # fmt: skip
    elif dtype.itemsize == 2 and dtype.kind not in "iu":
        reasons["wgmma"] = (
            "too few rows or columns for its tiles, or rows that are no whole vectors"
            if capability == HOPPER else "needs compute capability 9.0"
        )  # fmt: skip
    return taken, {name: reason for name, reason in reasons.items() if name != taken}


def description(name: str, shapes: list, dtype) -> str:
    return _explained(name, shapes, dtype)[1]
