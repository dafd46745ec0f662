"""Sums over the rows of matrices: the gradient of a bias, and of what was broadcast."""

from functools import partial

from numba import cuda

from tilewise.kernels import gemm_plan
from tilewise.kernels.activation_plan import NONE
from tilewise.kernels.cuda.gemm_tile import add_parts
from tilewise.kernels.cuda.launch import ELEMENTS, INT64, SUMS, ceil_div, kernel, sum_dtype
from tilewise.kernels.cuda.memory import shared_sums, widen, zero
from tilewise.kernels.device_arrays import DeviceArray
from tilewise.kernels.gemm_plan import SUM_COLUMNS

_WALKERS = 8  # warps of a block, each with rows of its own


@kernel(threads=SUM_COLUMNS * _WALKERS)
def sum_part(x: ELEMENTS, partial: SUMS, rows: INT64, columns: INT64, tiles: INT64, batches: INT64, part: INT64):
    """partial[p, z, j] = the sum of x[z, i, j] over the rows i of part p; block (z and tile of columns, p)."""
    sums = shared_sums(x, 256)
    lane, walker = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32
    z, p = cuda.blockIdx.x // tiles, cuda.blockIdx.y
    column = cuda.blockIdx.x % tiles * 32 + lane
    total = zero(x)
    if column < columns:
        for i in range(p * part + walker, min(p * part + part, rows), 8):
            total += widen(x[(z * rows + i) * columns + column])
    sums[cuda.threadIdx.x] = total
    cuda.syncthreads()
    if walker == 0 and column < columns:
        for w in range(1, 8):
            total += sums[w * 32 + lane]
        partial[(p * batches + z) * columns + column] = total


def _add_rows(sums: DeviceArray, result: DeviceArray):
    count, parts = result.size, sums.shape[0]
    add_parts(
        result.place, ceil_div(count, 256), sums, result, None, count, result.shape[1], parts, 0, NONE, 0.0,
        dtype=result.dtype,
    )  # fmt: skip


sum_rows = partial(gemm_plan.sum_rows, sum_part, _add_rows, sum_dtype)
