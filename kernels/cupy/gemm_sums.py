"""Sums over the parts of a product's depth, and over the rows of matrices, on the GPU; src/gemm_sums.cu says how."""

from tilewise.kernels.activation_plan import LEAKY_SLOPE, NONE
from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.cupy.launch import INTEGERS, Kernel, blocks_of, sum_dtype
from tilewise.kernels.device_arrays import DeviceArray

_SOURCE = "gemm_sums.cu"
_COLUMNS = 32
_ROWS = 512  # of a part: long enough to be worth a block, short enough to have many
_MOST_PARTS = 1 << 15  # the grid's y is limited

_add_parts = Kernel(_SOURCE, "add_parts<{T}>", "P P P r q q q i")
_add_integer_parts = Kernel(_SOURCE, "add_integer_parts<{T}>", "P P q q", dtypes=INTEGERS)
_sum_part = Kernel(_SOURCE, "sum_part<{T}>", "P P q q q q q")


def add_parts(partial: DeviceArray, result: DeviceArray, bias, code: int, count: int, n: int, dtype):
    """result[i] = activation(the sum over partial's first axis + bias), i < count; n: columns. dtype: the operands'."""
    place, blocks, parts = result.place, blocks_of(count), partial.shape[0]
    if dtype.kind not in "iu":
        _add_parts(place, blocks, partial, result, bias, LEAKY_SLOPE, count, n, parts, code, dtype=dtype)
    else:
        _add_integer_parts(place, blocks, partial, result, count, parts, dtype=dtype)


def sum_rows(x: DeviceArray) -> DeviceArray:
    """(batch, rows, columns) -> (batch, columns)."""
    batch, rows, columns = x.shape
    place = x.place
    result = place.empty((batch, columns), x.dtype)
    if result.size == 0:
        return result
    part = max(_ROWS, ceil_div(rows, _MOST_PARTS))
    parts = max(1, ceil_div(rows, part))
    partial = place.empty((parts, batch, columns), sum_dtype(x.dtype))
    tiles = ceil_div(columns, _COLUMNS)
    _sum_part(place, (tiles * batch, parts, 1), x, partial, rows, columns, tiles, batch, part)
    add_parts(partial, result, None, NONE, result.size, columns, x.dtype)
    return result
