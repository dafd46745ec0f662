"""Sums and maxima over the lanes of a warp and the threads of a block, always in the same order."""

from numba import cuda

from tilewise.kernels.cuda.launch import device

ALL_LANES = 0xFFFFFFFF


@device
def maximum(a, b):
    """The larger of two numbers; NaN where one is NaN."""
    return b if b > a or b != b else a


@device
def group_sum(value, lanes):
    """The sum over each group of `lanes` neighbouring lanes, a power of two, in every lane of it."""
    offset = lanes >> 1
    while offset > 0:
        value += cuda.shfl_xor_sync(ALL_LANES, value, offset)
        offset >>= 1
    return value


@device
def group_max(value, lanes):
    """The same for the maximum."""
    offset = lanes >> 1
    while offset > 0:
        value = maximum(value, cuda.shfl_xor_sync(ALL_LANES, value, offset))
        offset >>= 1
    return value


@device
def block_sum(value, scratch, warps):
    """The sum over the block's `warps` warps, in every thread. scratch: `warps` numbers of shared memory.

    Between two calls with one scratch nobody may still read the first's: the barrier at the start sees to that.
    """
    value = group_sum(value, 32)
    thread = cuda.threadIdx.x
    cuda.syncthreads()
    if thread % 32 == 0:
        scratch[thread // 32] = value
    cuda.syncthreads()
    total = scratch[0]
    for warp in range(1, warps):
        total += scratch[warp]
    return total


@device
def block_max(value, scratch, warps):
    """The same for the maximum."""
    value = group_max(value, 32)
    thread = cuda.threadIdx.x
    cuda.syncthreads()
    if thread % 32 == 0:
        scratch[thread // 32] = value
    cuda.syncthreads()
    largest = scratch[0]
    for warp in range(1, warps):
        largest = maximum(largest, scratch[warp])
    return largest
