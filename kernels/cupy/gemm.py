"""Matrix multiplication and the dense layer on the GPU: which kernel computes a product."""

import numpy as np

from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.cupy import driver
from tilewise.kernels.cupy.activation_codes import ACTIVATION_CODES, LEAKY_SLOPE, NONE
from tilewise.kernels.cupy.copying import contiguous
from tilewise.kernels.cupy.gemm_few import multiply_few
from tilewise.kernels.cupy.gemm_sums import add_parts, sum_rows
from tilewise.kernels.cupy.gemm_tile import BIG, BIG_COPIES, BIG_VECTORS, SINGLY, SMALL, TALL, TINY, VECTORS, WHOLE
from tilewise.kernels.cupy.launch import sum_dtype
from tilewise.kernels.gemm_matrices import Matrices, Products
from tilewise.kernels.gemm_plan import Launch, choose_tile, few_vectors, launches, split

_TOGETHER = 4  # neighbouring columns that a thread stores


def multiply(left: Matrices, right: Matrices, lead: tuple, result, bias=None, code=NONE):
    """result = activation(left @ right + bias), batch by batch."""
    for launch in launches(left, right, lead, result):
        few = few_vectors(launch.left, launch.right) if launch.matrices == 1 else None
        if few is None:
            _by_tiles(launch, bias, code)
        else:
            multiply_few(few, launch.result, bias, code)


def _choose(left: Matrices, right: Matrices, matrices: int):
    """(kernel, tile) for a product."""
    dtype, engine = left.array.dtype, driver.engine(left.array.place.ordinal)
    size = left.rows, right.columns, left.columns, matrices, engine.multiprocessors
    orders = left.column_stride == 1, right.row_stride == 1  # is k contiguous
    if dtype.kind != "f":
        return WHOLE, SMALL
    if not (left.aligned() and right.aligned()):
        tile = choose_tile(*size, (TINY,) if dtype == np.float64 else (SMALL, TINY))  # in 64 bits SMALL would spill
        return SINGLY[tile], tile
    tile = choose_tile(*size, (BIG, TALL, SMALL, TINY) if dtype == np.float32 else (SMALL, TINY))
    if tile is not BIG:
        return VECTORS[tile], tile
    copies = BIG_COPIES.get(orders) if engine.capability >= (8, 0) else None
    return copies or BIG_VECTORS[orders], tile


def _by_tiles(launch: Launch, bias, code: int):
    left, right, batch, matrices, result = launch
    kernel, tile = _choose(left, right, matrices)
    m, n, depth = left.rows, right.columns, left.columns
    dtype, place = left.array.dtype, left.array.place
    blocks = ceil_div(m, tile.rows) * ceil_div(n, tile.columns)
    parts, part = split(depth, blocks * matrices)
    partial = place.empty((parts, matrices, m, n), sum_dtype(dtype)) if parts > 1 else None
    stored = result.dtype if partial is None else partial.dtype
    vectors = n % _TOGETHER == 0 and _TOGETHER * stored.itemsize >= 16
    kernel(
        place, (blocks, parts, matrices), left.array, right.array, result, partial,
        *((bias, LEAKY_SLOPE) if dtype.kind == "f" else ()),
        m, n, depth, part, matrices, left.row_stride, left.column_stride, right.row_stride, right.column_stride,
        *batch.sizes[:2], *batch.left, *batch.right, vectors, code,
    )  # fmt: skip
    if partial is not None:
        add_parts(partial, result, bias, code, m * n * matrices, n, dtype)


_products = Products(multiply, sum_rows, contiguous, ACTIVATION_CODES)
matmul, matmul_backward = _products.matmul, _products.matmul_backward
linear, linear_backward = _products.linear, _products.linear_backward
