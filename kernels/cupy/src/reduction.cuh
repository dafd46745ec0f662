// Sums and maxima over the lanes of a warp and the threads of a block, always in the same order.
#pragma once
#include "element.cuh"

namespace tilewise {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARPS = THREADS / 32;

// The larger of two numbers; NaN where one is NaN.
template <class S> __device__ __forceinline__ S maximum(S a, S b) { return b > a || b != b ? b : a; }

// The sum over each group of `lanes` neighbouring lanes, a power of two, in every lane of it.
template <class S> __device__ __forceinline__ S group_sum(S value, int lanes) {
    for (int offset = lanes >> 1; offset > 0; offset >>= 1) value += __shfl_xor_sync(ALL_LANES, value, offset);
    return value;
}
template <class S> __device__ __forceinline__ S group_max(S value, int lanes) {
    for (int offset = lanes >> 1; offset > 0; offset >>= 1)
        value = maximum(value, __shfl_xor_sync(ALL_LANES, value, offset));
    return value;
}

// Every warp's number by all threads of the block. Between two calls with one scratch, of WARPS numbers, nobody may still
// read the first's: the barrier at the start sees to that.
template <class S> __device__ __forceinline__ void share_of_warps(S value, S *scratch) {
    const int thread = threadIdx.x;
    __syncthreads();
    if (thread % 32 == 0) scratch[thread / 32] = value;
    __syncthreads();
}

// The sum over the block, in every thread.
template <class S> __device__ __forceinline__ S block_sum(S value, S *scratch) {
    share_of_warps(group_sum(value, 32), scratch);
    S total = scratch[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) total += scratch[warp];
    return total;
}
template <class S> __device__ __forceinline__ S block_max(S value, S *scratch) {
    share_of_warps(group_max(value, 32), scratch);
    S largest = scratch[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) largest = maximum(largest, scratch[warp]);
    return largest;
}

}   // namespace tilewise
