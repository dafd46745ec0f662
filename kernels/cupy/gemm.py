"""Matrix multiplication and the dense layer on the GPU; gemm_plan.py chooses the kernel."""

from dataclasses import replace
from functools import partial
from math import prod

from tilewise.kernels import settings
from tilewise.kernels.activation_plan import ACTIVATION_CODES, LEAKY_SLOPE, NONE
from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.cupy import driver, gemm_parts, gemm_plan
from tilewise.kernels.cupy.copying import contiguous
from tilewise.kernels.cupy.gemm_few import few_of, multiply_few
from tilewise.kernels.cupy.gemm_sums import add_parts, sum_rows
from tilewise.kernels.cupy.gemm_wgmma import LAID_SIDE
from tilewise.kernels.cupy.launch import sum_dtype
from tilewise.kernels.gemm_matrices import Matrices, Products
from tilewise.kernels.gemm_plan import Batch, Launch, launches

HAS_BFLOAT16 = True  # operation.py asks


def multiply(left: Matrices, right: Matrices, lead: tuple, result, bias=None, code=NONE, tf32: bool | None = None):
    """result = activation(left @ right + bias), batch by batch. tf32: None for what `using` says."""
    for launch in launches(left, right, lead, result):
        few = few_of(launch.left, launch.right, launch.matrices)
        if few is None:
            _by_tiles(launch, bias, code, tf32, launch.right is right)
        else:
            multiply_few(few, launch.result, bias, code, launch.left.array.dtype)


def _by_tiles(launch: Launch, bias, code: int, tf32: bool | None, whole: bool):
    """whole: whether the right operand is the whole one, not from a matrix on."""
    left, right, batch, matrices, result = launch
    dtype, place = left.array.dtype, left.array.place
    algorithm, kernel, tile, together, laid = gemm_plan.choose(
        left, right, matrices, driver.engine(place.ordinal), tf32, whole
    )
    m, n, depth = left.rows, right.columns, left.columns
    if laid is not None:
        right, batch = _lay_out(laid, right, batch)
    blocks = ceil_div(m, tile.rows) * ceil_div(n, tile.columns)
    _, parts, part = gemm_parts.split(algorithm, tile, (m, n, depth, matrices), dtype.itemsize)
    partial_sums = place.empty((parts, matrices, m, n), sum_dtype(dtype)) if parts > 1 else None
    stored = result.dtype if partial_sums is None else partial_sums.dtype
    vectors = n % together == 0 and together * stored.itemsize >= 16
    kernel(
        place, (blocks, parts, matrices), left.array, right.array, result, partial_sums,
        *(() if dtype.kind in "iu" else (bias, LEAKY_SLOPE)),
        m, n, depth, part, matrices, left.row_stride, left.column_stride, right.row_stride, right.column_stride,
        *batch.sizes[:2], *batch.left, *batch.right, vectors, code,
    )  # fmt: skip
    if partial_sums is not None:
        add_parts(partial_sums, result, bias, code, m * n * matrices, n, dtype)


def _lay_out(laid, right: Matrices, batch: Batch) -> tuple[Matrices, Batch]:
    """The right operand as src/gemm_laid.cu lays it out, and where its matrices are then."""
    rows, depth, count = right.columns, right.rows, prod(right.lead)
    array = right.array.place.empty((count, laid.parts, rows, depth), right.array.dtype)
    tiles = ceil_div(rows, LAID_SIDE) * ceil_div(depth, LAID_SIDE)
    laid.lay_out[right.row_stride == 1](array.place, (tiles, 1, count), right.array, array, rows, depth)
    strides = tuple(laid.parts * stride for stride in batch.right)
    return replace(right, array=array, row_stride=1, column_stride=depth), replace(batch, right=strides)


_products = Products(multiply, sum_rows, contiguous, ACTIVATION_CODES)
matmul, matmul_backward = _products.matmul, _products.matmul_backward
linear, linear_backward = _products.linear, _products.linear_backward


def _choose(name, shapes, dtype, options, ordinal):
    if not settings.active().explaining:  # a launch chooses for the device that it goes to
        return name, {}
    return gemm_plan.algorithm(name, shapes, dtype, ordinal)


def _describe(name, shapes, dtype, options, ordinal):
    return gemm_plan.description(name, shapes, dtype, ordinal)


choose_matmul, choose_linear = partial(_choose, "matmul"), partial(_choose, "linear")
describe_matmul, describe_linear = partial(_describe, "matmul"), partial(_describe, "linear")
