// Products of a matrix with few vectors, such as a dense layer for one image: bound by memory.
//
//     C[i, j] = activation(sum over k of big[i, k] * few[j, k] + bias)        j < FEW
//
// A warp takes a row of `big`, whose k are contiguous, 512 bytes at a time; its lanes' sums are added by shuffles.
#include "matrix_result.cuh"
#include "reduction.cuh"

namespace tilewise {

constexpr int FEW = 4;   // gemm_plan.py's

// gemm_plan.py's Few. The first `vectors` 16 bytes of a row are taken as such, and of few, whose k are contiguous then;
// the rest singly.
struct FewVectors {
    long long rows, count, depth, few_stride, few_k, c_row, c_few, bias_row, bias_few, vectors;
};

template <class T>
__global__ void __launch_bounds__(THREADS, 1)
multiply_few(const T *__restrict__ big, const T *__restrict__ few, T *__restrict__ c, const T *__restrict__ bias,
             Sum<T> slope, int code, const FewVectors it) {
    constexpr int N = LANES<T>;
    const long long row = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (row >= it.rows) return;
    const T *const mine = big + row * it.depth;
    Sum<T> sums[FEW] = {};
    for (long long v = lane; v < it.vectors; v += 32) {
        const Pack<T, N> values = load<N>(mine + v * N);
#pragma unroll
        for (int j = 0; j < FEW; ++j)
            if (j < it.count) {
                const Pack<T, N> others = load<N>(few + j * it.few_stride + v * N);
#pragma unroll
                for (int i = 0; i < N; ++i) sums[j] += widen(values.lane[i]) * widen(others.lane[i]);
            }
    }
    for (long long k = it.vectors * N + lane; k < it.depth; k += 32) {
        const Sum<T> value = widen(mine[k]);
#pragma unroll
        for (int j = 0; j < FEW; ++j)
            if (j < it.count) sums[j] += value * widen(few[j * it.few_stride + k * it.few_k]);
    }
#pragma unroll
    for (int j = 0; j < FEW; ++j) {
        const Sum<T> total = group_sum(sums[j], 32);
        if (lane == j && j < it.count)
            c[row * it.c_row + j * it.c_few] = Finish<T>{bias, slope, code}(total, row * it.bias_row + j * it.bias_few);
    }
}

}   // namespace tilewise
