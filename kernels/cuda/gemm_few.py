"""Products of a matrix with few vectors on the GPU, such as a dense layer for one image: bound by memory.

    C[i, j] = activation(sum over k of big[i, k] * few[j, k] + bias)        j < gemm_plan's FEW

A warp takes a row of `big`, whose k are contiguous, 512 bytes at a time; its lanes' sums are added by shuffles.
"""

from numba import cuda

from tilewise.kernels.cuda.epilogue import activate
from tilewise.kernels.cuda.launch import ELEMENTS, INT32, INT64, REAL, kernel
from tilewise.kernels.cuda.memory import lanes, load_vector, narrow, register_sums, registers, widen, zero

ROWS = 8  # of a block: one for each warp
_ALL = 0xFFFFFFFF


@kernel(threads=32 * ROWS)
def multiply_few(
    big: ELEMENTS, few: ELEMENTS, c: ELEMENTS, bias: ELEMENTS, rows: INT64, count: INT64, depth: INT64,
    few_stride: INT64, few_k: INT64, c_row: INT64, c_few: INT64, bias_row: INT64, bias_few: INT64,
    vectors: INT64, has_bias: INT32, code: INT32, slope: REAL,
):  # fmt: skip
    """The first `vectors` 16 bytes of the rows of big, and of few, whose k are contiguous then; the rest singly."""
    row = cuda.blockIdx.x * 8 + cuda.threadIdx.x // 32
    lane = cuda.threadIdx.x % 32
    if row >= rows:
        return
    width = lanes(big)
    sums = register_sums(big, 4)
    for j in range(4):
        sums[j] = zero(big)
    values, others = registers(big, 16), registers(few, 16)
    for v in range(lane, vectors, 32):
        load_vector(values, big, row * depth + v * width)
        for j in range(4):
            if j < count:
                load_vector(others, few, j * few_stride + v * width)
                for i in range(width):
                    sums[j] += widen(values[i]) * widen(others[i])
    for k in range(vectors * width + lane, depth, 32):
        value = widen(big[row * depth + k])
        for j in range(4):
            if j < count:
                sums[j] += value * widen(few[j * few_stride + k * few_k])
    for j in range(4):
        total = sums[j]
        for apart in (16, 8, 4, 2, 1):
            total += cuda.shfl_xor_sync(_ALL, total, apart)
        if lane == j and j < count:
            if has_bias:
                total += widen(bias[row * bias_row + j * bias_few])
            c[row * c_row + j * c_few] = narrow(activate(total, code, slope), c)
