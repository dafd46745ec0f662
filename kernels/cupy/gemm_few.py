"""Products of a matrix with few vectors on the GPU; src/gemm_few.cu says how."""

from tilewise.kernels.activation_plan import LEAKY_SLOPE
from tilewise.kernels.channel_plan import ceil_div
from tilewise.kernels.cupy.launch import THREADS, Kernel
from tilewise.kernels.gemm_plan import Few

_WARPS = THREADS // 32  # of a block: one for each row

_multiply_few = Kernel("gemm_few.cu", "multiply_few<{T}>", "P P P P r i 10q", promises=("LDG.128",))


def multiply_few(it: Few, result, bias, code: int):
    big, few, *numbers = it
    blocks = ceil_div(it.rows, _WARPS)
    _multiply_few(result.place, blocks, big, few, result, bias, LEAKY_SLOPE, code, *numbers)
