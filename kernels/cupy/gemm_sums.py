"""Sums over the parts of a product's depth, and over the rows of matrices, on the GPU; src/gemm_sums.cu says how."""

from functools import partial

from tilewise.kernels import gemm_plan
from tilewise.kernels.activation_plan import LEAKY_SLOPE, NONE
from tilewise.kernels.cupy.launch import INTEGERS, Kernel, blocks_of, sum_dtype
from tilewise.kernels.device_arrays import DeviceArray

_SOURCE = "gemm_sums.cu"

_add_parts = Kernel(_SOURCE, "add_parts<{T}>", "P P P r q q q i")
_add_integer_parts = Kernel(_SOURCE, "add_integer_parts<{T}>", "P P q q", dtypes=INTEGERS)
_sum_part = Kernel(_SOURCE, "sum_part<{T}>", "P P q q q q q")


def add_parts(sums: DeviceArray, result: DeviceArray, bias, code: int, count: int, n: int, dtype):
    """result[i] = activation(sums added over their first axis + bias), i < count; n: columns. dtype: the operands'."""
    place, blocks, parts = result.place, blocks_of(count), sums.shape[0]
    if dtype.kind not in "iu":
        _add_parts(place, blocks, sums, result, bias, LEAKY_SLOPE, count, n, parts, code, dtype=dtype)
    else:
        _add_integer_parts(place, blocks, sums, result, count, parts, dtype=dtype)


def _add_rows(sums: DeviceArray, result: DeviceArray):
    add_parts(sums, result, None, NONE, result.size, result.shape[1], result.dtype)


sum_rows = partial(gemm_plan.sum_rows, _sum_part, _add_rows, sum_dtype)
