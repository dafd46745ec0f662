"""Which kernel computes a product: by dtype, shape, and the device's number of multiprocessors."""

import numpy as np

from tilewise.kernels import settings
from tilewise.kernels.activation_plan import LEAKY_SLOPE, NONE
from tilewise.kernels.cuda.gemm_few import ROWS, multiply_few
from tilewise.kernels.cuda.gemm_tensor import MATMULS
from tilewise.kernels.cuda.gemm_tile import (
    BIG,
    BIG_COPIES,
    BIG_VECTORS,
    INTEGERS,
    SMALL,
    STRIDED,
    TALL,
    TINY,
    VECTORS,
    add_integer_parts,
    add_parts,
)
from tilewise.kernels.cuda.launch import ceil_div, sum_dtype
from tilewise.kernels.cuda.memory import VECTOR_BYTES
from tilewise.kernels.cuda.tensor_product import LARGE as TENSOR_LARGE
from tilewise.kernels.cuda.tensor_product import SMALL as TENSOR_SMALL
from tilewise.kernels.cuda.tensor_product import TensorTile
from tilewise.kernels.gemm_matrices import Matrices
from tilewise.kernels.gemm_plan import Launch, choose_tile, few_vectors, launches, split


def multiply(left: Matrices, right: Matrices, lead: tuple, result, bias=None, code=NONE):
    """result = activation(left @ right + bias), batch by batch."""
    for launch in launches(left, right, lead, result):
        _launch(launch, bias, code)


def choose(left: Matrices, right: Matrices, matrices: int, tf32: bool):
    """(kernel, tile) for a product."""
    dtype, engine = left.array.dtype, left.array.place.engine
    size = left.rows, right.columns, left.columns, matrices, engine.multiprocessors
    orders = left.column_stride == 1, right.row_stride == 1  # is k contiguous
    if dtype.kind != "f":
        return INTEGERS, SMALL
    aligned = left.aligned() and right.aligned()
    half = dtype.itemsize == 2
    if aligned and engine.capability >= (8, 0) and (half or (tf32 and dtype == np.float32)):
        width = VECTOR_BYTES // dtype.itemsize
        tile = choose_tile(*size, (TENSOR_LARGE[width], TENSOR_SMALL[width]))
        return MATMULS[tile][orders], tile
    if not aligned:
        tile = choose_tile(*size, (TINY,) if dtype == np.float64 else (SMALL, TINY))  # in 64 bits SMALL would spill
        return STRIDED[tile], tile
    tile = choose_tile(*size, (BIG, TALL, SMALL, TINY) if dtype == np.float32 else (SMALL, TINY))
    if tile is not BIG:
        return VECTORS[tile], tile
    copies = BIG_COPIES.get(orders) if engine.capability >= (8, 0) else None
    return copies or BIG_VECTORS[orders], tile


def _launch(launch: Launch, bias, code):
    left, right, batch, matrices, result = launch
    few = few_vectors(left, right) if matrices == 1 else None
    if few is not None:
        big, vectors, *numbers = few[:-1]  # never across
        options = bias is not None, code, LEAKY_SLOPE
        multiply_few(
            result.place, ceil_div(few.rows, ROWS), big, vectors, result, bias, *numbers, *options
        )  # fmt: skip
        return
    kernel, tile = choose(left, right, matrices, settings.active().tf32)
    k_contiguous = left.column_stride == 1, right.row_stride == 1
    shared = tile.shared_bytes(*k_contiguous) if isinstance(tile, TensorTile) else 0
    m, n, depth = left.rows, right.columns, left.columns
    dtype, place = left.array.dtype, left.array.place
    blocks = ceil_div(m, tile.rows) * ceil_div(n, tile.columns)
    parts, part = split(depth, blocks * matrices)
    widened = result.dtype != dtype  # bytes: the sums are the result
    partial = result if widened else None
    if parts > 1:
        partial = place.empty((parts, matrices, m, n), sum_dtype(dtype))
    target = partial if partial is not None else result
    # 16 bytes at a time: a thread of `tile` writes four neighbouring numbers, or as many as 16 bytes hold
    together = tile.width if isinstance(tile, TensorTile) else 4
    vectors = dtype.kind == "f" and n % together == 0 and together * target.dtype.itemsize >= VECTOR_BYTES
    to_sums = parts > 1 or widened
    kernel(
        place, (blocks, parts, matrices),
        left.array, right.array, None if widened else result, partial, bias, m, n, depth, part, matrices,
        left.row_stride, left.column_stride, right.row_stride, right.column_stride,
        *batch.sizes[:2], *batch.left, *batch.right,
        to_sums, bias is not None, code, vectors, LEAKY_SLOPE if dtype.kind == "f" else 0, shared=shared,
    )  # fmt: skip
    if parts > 1:
        _add_parts(partial, result, bias, code, m * n * matrices, n, parts, dtype)


def _add_parts(partial, result, bias, code, count, n, parts, dtype):
    place, blocks = partial.place, ceil_div(count, 256)
    if dtype.kind == "f":
        has_bias = bias is not None
        add_parts(
            place, blocks, partial, result, bias, count, n, parts, has_bias, code, LEAKY_SLOPE, dtype=dtype
        )  # fmt: skip
    else:
        widened = result.dtype != dtype
        c, total = (None, result) if widened else (result, None)
        add_integer_parts(place, blocks, partial, c, total, count, parts, widened, dtype=dtype)
