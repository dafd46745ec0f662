"""Sums over the rows of matrices: the gradient of a bias, and of what was broadcast."""

from numba import cuda

from tilewise.kernels.activation_plan import NONE
from tilewise.kernels.cuda.gemm_tile import add_parts
from tilewise.kernels.cuda.launch import ELEMENTS, INT64, SUMS, ceil_div, kernel, sum_dtype
from tilewise.kernels.cuda.memory import shared_sums, widen, zero
from tilewise.kernels.device_arrays import DeviceArray

_COLUMNS, _WALKERS = 32, 8  # a warp reads 32 neighbouring columns of a row, 8 warps rows of their own
_ROWS = 512  # of a part: long enough to be worth a block, short enough to have many


@kernel(threads=_COLUMNS * _WALKERS)
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


def sum_rows(x: DeviceArray) -> DeviceArray:
    """(batch, rows, columns) -> (batch, columns)."""
    batch, rows, columns = x.shape
    place = x.place
    result = place.empty((batch, columns), x.dtype)
    if result.size == 0:
        return result
    part = max(_ROWS, ceil_div(rows, 1 << 15))  # the grid's y is limited
    parts = max(1, ceil_div(rows, part))
    partial = place.empty((parts, batch, columns), sum_dtype(x.dtype))
    tiles = ceil_div(columns, _COLUMNS)
    sum_part(place, (tiles * batch, parts, 1), x, partial, rows, columns, tiles, batch, part)
    blocks = ceil_div(result.size, 256)
    add_parts(
        place, blocks, partial, result, None, result.size, columns, parts, 0, NONE, 0.0, dtype=x.dtype
    )  # fmt: skip
    return result
