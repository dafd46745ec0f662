"""Products of a matrix with few vectors on the GPU; src/gemm_few.cu says how."""

from tilewise.kernels.activation_plan import LEAKY_SLOPE
from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.cupy.gemm_sums import add_parts
from tilewise.kernels.cupy.launch import FLOATS, THREADS, Kernel, sum_dtype
from tilewise.kernels.gemm_matrices import Matrices
from tilewise.kernels.gemm_plan import ENOUGH_BLOCKS, Few, few_vectors, few_vectors_across

MOST = 8  # vectors
_WARPS = THREADS // 32  # of a block
_PARAMETERS = "P P P P P r i 11q"
_LEAST_VECTORS, _LEAST_ROWS = 32 * 8, 64  # of a part: of a row's vectors of 16 bytes; of rows that lie side by side


def _kernel(name: str, dtypes: tuple[str, ...]) -> Kernel:
    return Kernel(
        "gemm_few.cu", name, _PARAMETERS, blocks=2, blocks_of_double=1, dtypes=dtypes, promises=("LDG.128",)
    )  # fmt: skip


def _along(few: int, rows: int, ahead: int, dtypes: tuple[str, ...] = FLOATS) -> tuple[int, Kernel]:
    return rows, _kernel(f"multiply_few<{{T}}, {few}, {rows}, {ahead}>", dtypes)


def _across(few: int, ahead: int) -> Kernel:
    return _kernel(f"multiply_few_across<{{T}}, {few}, {ahead}>", _WITHOUT_TENSOR_CORES)


# Most vectors -> (rows that a warp takes, kernel); and -> kernel. Of 16 bits tensor cores multiply more vectors, and
# those whose matrix has contiguous rows: that is as fast as memory, and takes fewer instructions.
_WITHOUT_TENSOR_CORES = ("float32", "float64")
ALONG = {1: _along(1, 1, 4), 4: _along(4, 2, 2), MOST: _along(MOST, 4, 1, _WITHOUT_TENSOR_CORES)}
ACROSS = {1: _across(1, 8), 4: _across(4, 4)}


def few_of(left: Matrices, right: Matrices, matrices: int) -> Few | None:
    """The product as one of a matrix with few vectors; None where it is none."""
    if matrices > 1:
        return None
    if left.array.dtype.name not in _WITHOUT_TENSOR_CORES:
        return few_vectors(left, right)
    return few_vectors(left, right, MOST) or few_vectors_across(left, right)


def multiply_few(it: Few, result, bias, code: int, dtype):
    """dtype: the operands'."""
    most = next(most for most in (ACROSS if it.across else ALONG) if most >= it.number)
    if it.across:
        kernel, width = ACROSS[most], 16 // dtype.itemsize
        blocks, length, least = ceil_div(it.rows, 32 * width), it.depth, _LEAST_ROWS
    else:
        rows, kernel = ALONG[most]
        blocks, length, least = ceil_div(it.rows, _WARPS * rows), it.vectors, _LEAST_VECTORS
    parts = max(1, min(ceil_div(ENOUGH_BLOCKS, blocks), length // least))
    part = max(1, ceil_div(length, parts))
    parts = max(1, ceil_div(length, part))
    size, place = it.rows * it.number, result.place
    sums = place.empty((parts, size), sum_dtype(dtype)) if parts > 1 else None
    kernel(
        place, (blocks, parts, 1), it.big, it.few, result, sums, bias, LEAKY_SLOPE, code, it.rows, it.number, it.depth,
        it.few_stride, it.few_k, it.c_row, it.c_few, it.bias_row, it.bias_few, it.vectors, part,
    )  # fmt: skip
    if sums is not None:
        columns = it.number if it.c_few == 1 else it.rows
        add_parts(sums, result, bias, code, size, columns, dtype)
