"""Matrix multiplication and the dense layer on the GPU; gemm_plan.py chooses the kernel."""

from functools import partial

from tilewise.kernels import settings
from tilewise.kernels.activation_plan import ACTIVATION_CODES, LEAKY_SLOPE, NONE
from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.cupy import driver, gemm_parts, gemm_plan
from tilewise.kernels.cupy.copying import contiguous
from tilewise.kernels.cupy.gemm_few import few_of, multiply_few
from tilewise.kernels.cupy.gemm_sums import add_parts, sum_rows
from tilewise.kernels.cupy.launch import sum_dtype
from tilewise.kernels.gemm_matrices import Matrices, Products
from tilewise.kernels.gemm_plan import Launch, launches

HAS_BFLOAT16 = True  # operation.py asks


def multiply(left: Matrices, right: Matrices, lead: tuple, result, bias=None, code=NONE, tf32: bool | None = None):
    """result = activation(left @ right + bias), batch by batch. tf32: None for what `using` says."""
    for launch in launches(left, right, lead, result):
        few = few_of(launch.left, launch.right, launch.matrices)
        if few is None:
            _by_tiles(launch, bias, code, tf32)
        else:
            multiply_few(few, launch.result, bias, code, launch.left.array.dtype)


def _by_tiles(launch: Launch, bias, code: int, tf32: bool | None):
    left, right, batch, matrices, result = launch
    dtype, place = left.array.dtype, left.array.place
    algorithm, kernel, tile, together = gemm_plan.choose(left, right, matrices, driver.engine(place.ordinal), tf32)
    m, n, depth = left.rows, right.columns, left.columns
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
