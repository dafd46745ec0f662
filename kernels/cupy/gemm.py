"""Matrix multiplication and the dense layer on the GPU: which kernel computes a product."""

import numpy as np

from tilewise.kernels import settings
from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.cupy import driver
from tilewise.kernels.cupy.activation_codes import ACTIVATION_CODES, LEAKY_SLOPE, NONE
from tilewise.kernels.cupy.copying import contiguous
from tilewise.kernels.cupy.gemm_few import multiply_few
from tilewise.kernels.cupy.gemm_sums import add_parts, sum_rows
from tilewise.kernels.cupy.gemm_tensor import AMPERE, LARGE, LITTLE, MATMULS, MEDIUM
from tilewise.kernels.cupy.gemm_tile import BIG, BIG_COPIES, BIG_VECTORS, SINGLY, SMALL, TALL, TINY, VECTORS, WHOLE
from tilewise.kernels.cupy.launch import sum_dtype
from tilewise.kernels.gemm_matrices import Matrices, Products
from tilewise.kernels.gemm_plan import Launch, choose_tile, few_vectors, launches, split

HAS_BFLOAT16 = True  # operation.py asks
BLOCK = 4  # product.cuh's
# Where three products of TF32 on tensor cores are to be faster than one of float32 without them, from NVIDIA's nominal
# rates: a third of the TF32 rate is at least twice the float32 rate there; on 8.6, 8.9 and 12.0 it is less than the
# float32 rate. Predicted, not measured.
SPLIT_ON = ((8, 0), (9, 0), (10, 0))
SPLIT_DEPTH = 64


def multiply(left: Matrices, right: Matrices, lead: tuple, result, bias=None, code=NONE):
    """result = activation(left @ right + bias), batch by batch."""
    for launch in launches(left, right, lead, result):
        few = few_vectors(launch.left, launch.right) if launch.matrices == 1 else None
        if few is None:
            _by_tiles(launch, bias, code)
        else:
            multiply_few(few, launch.result, bias, code)


def _tensor_way(dtype, tf32: bool, capability: tuple[int, int]) -> str | None:
    """How tensor cores multiply operands that come in vectors; None where they do not."""
    if dtype == np.float16:
        return "half"
    if capability < AMPERE or dtype == np.float64:
        return None
    if dtype != np.float32:
        return "bfloat"
    return "tf32" if tf32 else "split" if capability in SPLIT_ON else None


def _choose(left: Matrices, right: Matrices, matrices: int):
    """(kernel, tile, neighbouring columns that a thread stores) for a product."""
    dtype, engine = left.array.dtype, driver.engine(left.array.place.ordinal)
    size = left.rows, right.columns, left.columns, matrices, engine.multiprocessors
    orders = left.column_stride == 1, right.row_stride == 1  # is k contiguous
    if dtype.kind in "iu":
        return WHOLE, SMALL, BLOCK
    if not (left.aligned() and right.aligned()):
        tile = choose_tile(*size, (TINY,) if dtype == np.float64 else (SMALL, TINY))  # in 64 bits SMALL would spill
        return SINGLY[tile], tile, BLOCK
    way = _tensor_way(dtype, settings.active().tf32, engine.capability)
    if way == "split":
        tile = choose_tile(*size, (MEDIUM, TINY))
        way = way if tile is MEDIUM and left.columns >= SPLIT_DEPTH else None
    if way is not None:
        large = (MEDIUM,) if way == "split" else (LARGE, LITTLE) if engine.capability >= AMPERE else (LITTLE,)
        tile = choose_tile(*size, large)
        return MATMULS[way, tile][orders], tile, 16 // dtype.itemsize
    tile = choose_tile(*size, (BIG, TALL, SMALL, TINY) if dtype == np.float32 else (SMALL, TINY))
    if tile is not BIG:
        return VECTORS[tile], tile, BLOCK
    copies = BIG_COPIES.get(orders) if engine.capability >= AMPERE else None
    return copies or BIG_VECTORS[orders], tile, BLOCK


def _by_tiles(launch: Launch, bias, code: int):
    left, right, batch, matrices, result = launch
    kernel, tile, together = _choose(left, right, matrices)
    m, n, depth = left.rows, right.columns, left.columns
    dtype, place = left.array.dtype, left.array.place
    blocks = ceil_div(m, tile.rows) * ceil_div(n, tile.columns)
    parts, part = split(depth, blocks * matrices)
    partial = place.empty((parts, matrices, m, n), sum_dtype(dtype)) if parts > 1 else None
    stored = result.dtype if partial is None else partial.dtype
    vectors = n % together == 0 and together * stored.itemsize >= 16
    kernel(
        place, (blocks, parts, matrices), left.array, right.array, result, partial,
        *(() if dtype.kind in "iu" else (bias, LEAKY_SLOPE)),
        m, n, depth, part, matrices, left.row_stride, left.column_stride, right.row_stride, right.column_stride,
        *batch.sizes[:2], *batch.left, *batch.right, vectors, code,
    )  # fmt: skip
    if partial is not None:
        add_parts(partial, result, bias, code, m * n * matrices, n, dtype)


_products = Products(multiply, sum_rows, contiguous, ACTIVATION_CODES)
matmul, matmul_backward = _products.matmul, _products.matmul_backward
linear, linear_backward = _products.linear, _products.linear_backward
