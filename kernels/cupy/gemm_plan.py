"""Which kernel computes a product: by dtype, shape, and the device's compute capability and multiprocessors.

Of an array that comes in vectors of 16 bytes, by compute capability (what does not, and integers, by tiles):

    7.5          float16 on tensor cores (mma); bfloat16, float32 and float64 by tiles
    8.0 to 12.0  float16, bfloat16, and float32 under using(tf32=True), on tensor cores (mma, cp.async)
    9.0          the same on Hopper's (wgmma), where there is enough for its tiles

float32 is multiplied as such, or where SPLIT_ON says so by three products of TF32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tilewise.kernels import settings
from tilewise.kernels.cupy import driver, gemm_parts, gemm_tensor
from tilewise.kernels.cupy.gemm_few import few_of
from tilewise.kernels.cupy.gemm_tensor import AMPERE, LARGE, LITTLE, MEDIUM
from tilewise.kernels.cupy.gemm_tile import BIG, BIG_COPIES, BIG_VECTORS, SINGLY, SMALL, TALL, TINY, VECTORS, WHOLE
from tilewise.kernels.cupy.gemm_wgmma import HOPPER, LAID, MATMULS, NARROW, SINGLES, WIDE, Laid, WgmmaTile
from tilewise.kernels.cupy.launch import Kernel
from tilewise.kernels.gemm_matrices import Matrices, operands_of
from tilewise.kernels.gemm_plan import choose_tile

# Where three products of TF32 on tensor cores are to be faster than one of float32 without them, from NVIDIA's nominal
# rates: a third of the TF32 rate is at least twice the float32 rate there; on 8.6, 8.9 and 12.0 it is less than the
# float32 rate. Predicted, not measured.
SPLIT_ON = ((8, 0), (9, 0), (10, 0))
SPLIT_DEPTH = 64  # a shorter sum would not be worth it
_BLOCK = 4  # product.cuh's
# Of the left operand: as many tiles read the right one as pays for laying it out, by products of 2048 and 4096 on an
# H100. The copy may take that many bytes.
LAID_ROWS = {"tf32": 1024, "split": 4096}
LAID_BYTES = 1 << 30
LIKELY = 0.8  # an estimate is better that is less than so much of another
# rows, columns, depth, matrices, and the device's multiprocessors
Size = tuple[int, int, int, int, int]


class Choice(NamedTuple):
    """tile: its rows and columns are a block's. together: neighbouring columns that a thread stores. laid: how the
    right operand is laid out before, where it is."""

    algorithm: str
    kernel: Kernel
    tile: Any
    together: int
    laid: Laid | None = None


class _Product(NamedTuple):
    """orders: of both operands, whether k is contiguous. aligned: whether both come in vectors of 16 bytes. tf32:
    whether it may stand for float32."""

    dtype: np.dtype
    size: Size
    orders: tuple[bool, bool]
    aligned: bool
    capability: tuple[int, int]
    tf32: bool
    whole: bool = True


def _product(left: Matrices, right: Matrices, matrices: int, engine, tf32: bool | None = None) -> _Product:
    tf32 = settings.active().tf32 if tf32 is None else tf32
    size = left.rows, right.columns, left.columns, matrices, engine.multiprocessors
    orders = left.column_stride == 1, right.row_stride == 1
    return _Product(left.array.dtype, size, orders, left.aligned() and right.aligned(), engine.capability, tf32)


def choose(left: Matrices, right: Matrices, matrices: int, engine, tf32: bool | None = None, whole=True) -> Choice:
    """whole: whether the right operand may be laid out before."""
    product = _product(left, right, matrices, engine, tf32)._replace(whole=whole)
    for way in _ways(product.dtype).values():
        taken = way(product)
        if isinstance(taken, Choice):
            return taken
    return _by_tiles(product)


# ---- on tensor cores: the choice, or why there is none

_NO_VECTORS = "rows of an operand are not whole vectors of 16 bytes"
TOO_LITTLE = "too few rows or columns for its tiles, or too few tiles to occupy the device"
# ways to multiply, gemm_tensor.py's and Hopper's, as explain calls them
NAMES_OF_WAYS = {"wgmma": "wgmma", "half": "mma", "bfloat": "mma", "tf32": "mma in TF32", "split": "mma in 3xTF32"}


def why_not(way: str, capability: tuple[int, int], depth: int, aligned: bool, tf32: bool) -> str | None:
    """Why sums of so many products are not multiplied this way, if not; aligned and tf32: as of a _Product."""
    if way == "wgmma" and capability != HOPPER:
        return "needs compute capability 9.0, and no later one"
    if capability < AMPERE and way != "half":
        return "needs compute capability 8.0"
    if way == "split" and capability not in SPLIT_ON:
        return "predicted to be slower than float32 on this device"
    if not aligned:
        return _NO_VECTORS
    if way == "tf32" and not tf32:
        return "using(tf32=True) would allow it"
    if way == "split" and depth < SPLIT_DEPTH:
        return f"sums of fewer than {SPLIT_DEPTH} products"
    return None


def _why_not(way: str, product: _Product) -> str | None:
    return why_not(way, product.capability, product.size[2], product.aligned, product.tf32)


def _mma(way: str, product: _Product) -> Choice | str:
    if reason := _why_not(way, product):
        return reason
    if way == "split":
        tile = MEDIUM
        if choose_tile(*product.size, (MEDIUM, TINY)) is not MEDIUM:
            return TOO_LITTLE
    else:
        tile = LITTLE if product.capability < AMPERE else choose_tile(*product.size, (LARGE, LITTLE))
    kernel = gemm_tensor.MATMULS[way, tile][product.orders]
    return Choice(NAMES_OF_WAYS[way], kernel, tile, _lanes(product.dtype))


def _wgmma(way: str, product: _Product) -> Choice | str:
    if reason := _why_not(way, product) or _why_not("wgmma", product):
        return reason
    tile = choose_tile(*product.size, (NARROW, LITTLE) if way == "split" else (WIDE, NARROW, LITTLE))
    if not isinstance(tile, WgmmaTile):
        return TOO_LITTLE
    if tile is WIDE and _estimated(way, NARROW, product) < LIKELY * _estimated(way, WIDE, product):
        tile = NARROW
    if _is_laid_out(way, product):
        laid = LAID[way, tile]
        return Choice(_on_hopper(way), laid.products[product.orders[0]], tile, _lanes(product.dtype), laid)
    kernel = (SINGLES[way, tile] if product.dtype == np.float32 else MATMULS[tile])[product.orders]
    return Choice(_on_hopper(way), kernel, tile, _lanes(product.dtype))


def _is_laid_out(way: str, product: _Product) -> bool:
    rows, columns, depth, matrices, _ = product.size
    parts = 2 if way == "split" else 1
    fits = parts * columns * depth * matrices * product.dtype.itemsize <= LAID_BYTES
    return product.whole and depth % 4 == 0 and rows >= LAID_ROWS.get(way, np.inf) and fits


def _estimated(way: str, tile: WgmmaTile, product: _Product) -> float:
    return gemm_parts.split(_on_hopper(way), tile, product.size[:4], product.dtype.itemsize, product.size[4])[0]


def _on_hopper(way: str) -> str:
    return NAMES_OF_WAYS[way].replace("mma", "wgmma", 1)


def _lanes(dtype) -> int:
    return 16 // dtype.itemsize


def _ways(dtype) -> dict[str, Callable[[_Product], Choice | str]]:
    """What multiplies this dtype on tensor cores, by its name: the first that can is taken."""
    ways = {}
    for way, name in gemm_tensor.DTYPES.items():
        if name == dtype.name:
            ways |= {_on_hopper(way): partial(_wgmma, way), NAMES_OF_WAYS[way]: partial(_mma, way)}
    return ways


# ---- by tiles


def _by_tiles(product: _Product) -> Choice:
    dtype, size, orders, aligned, capability, *_ = product
    if dtype.kind in "iu":
        return Choice("tiles", WHOLE, SMALL, _BLOCK)
    if not aligned:
        tile = choose_tile(*size, (TINY,) if dtype == np.float64 else (SMALL, TINY))  # in 64 bits SMALL would spill
        return Choice("tiles", SINGLY[tile], tile, _BLOCK)
    tile = choose_tile(*size, (BIG, TALL, SMALL, TINY) if dtype == np.float32 else (SMALL, TINY))
    if tile is not BIG:
        return Choice("tiles", VECTORS[tile], tile, _BLOCK)
    copies = BIG_COPIES.get(orders) if capability >= AMPERE else None
    return Choice("tiles", copies or BIG_VECTORS[orders], tile, _BLOCK)


# ---- what `explain` tells


class _Explained(NamedTuple):
    algorithm: str
    note: str
    rejected: dict[str, str]


def _explained(name: str, shapes: list, dtype, ordinal: int) -> _Explained:
    """Of a call on that device."""
    left, right, matrices = operands_of(name, shapes, dtype)
    ways = _ways(dtype)
    if not left.rows * right.columns * matrices:
        return _Explained("nothing", "the result is empty", dict.fromkeys(ways, "the result is empty"))
    if few := few_of(left, right, matrices):
        note = "a lane for 16 bytes of rows of the matrix" if few.across else "a warp for each row of the matrix"
        return _Explained("few vectors", note, dict.fromkeys(ways, f"few vectors: {note}"))
    engine = driver.engine(ordinal)
    taken, product = choose(left, right, matrices, engine), _product(left, right, matrices, engine)
    rejected = {}
    for algorithm, way in ways.items():
        if algorithm != taken.algorithm:
            why = way(product)
            rejected[algorithm] = why if isinstance(why, str) else f"{taken.algorithm} needs fewer instructions"
    note = f"tiles of {taken.tile.rows} x {taken.tile.columns}: {taken.kernel.name}"
    return _Explained(taken.algorithm, note, rejected)


def algorithm(name: str, shapes: list, dtype, ordinal: int) -> tuple[str, dict[str, str]]:
    """(algorithm, why not the others) of matmul or linear."""
    explained = _explained(name, shapes, dtype, ordinal)
    return explained.algorithm, explained.rejected


def description(name: str, shapes: list, dtype, ordinal: int) -> str:
    return _explained(name, shapes, dtype, ordinal).note
