// Products of matrices on Hopper's tensor cores (wgmma_product.cuh): C[z] = activation(A[z] B[z] + bias).
#include "gemm.cuh"
#include "wgmma_product.cuh"

namespace tilewise {

// A matrix: as gemm_tensor.cu's, in lines that are swizzled.
template <class E, class Shape, int SIZE, bool BY_K> struct LineLoader {
    static constexpr int WIDTH = LANES<E>, LINE = (BY_K ? WGMMA_STEP : SIZE) / WIDTH;

    const E *pointer;
    long long rows, stride, first;

    __device__ __forceinline__ void copy(char *tile, int thread, long long k, long long end) const {
#pragma unroll
        for (int i = 0; i < Shape::VECTORS; ++i) {
            const int vector = thread + i * WARPGROUP, outer = vector / LINE, inner = vector % LINE;
            const long long row = first + (BY_K ? outer : inner * WIDTH), mine = k + (BY_K ? inner * WIDTH : outer);
            const bool inside = row < rows && mine < end;
            const long long offset = BY_K ? row * stride + mine : mine * stride + row;
            copy_16_bytes(tile + Shape::place(outer, inner), pointer + (inside ? offset : 0), inside);
        }
    }
};

template <class E, int N, bool LEFT_BY_K, bool RIGHT_BY_K>
__global__ void __launch_bounds__(WGMMA_THREADS, 1)
matmul_wgmma(const E *__restrict__ a, const E *__restrict__ b, E *__restrict__ c, float *__restrict__ partial,
             const E *__restrict__ bias, float slope, const Gemm it) {
    using Room = WgmmaRoom<E, N, LEFT_BY_K, RIGHT_BY_K>;
    __shared__ unsigned long long filled[FILLING], emptied[FILLING];
    const GemmBlock block(it, WGMMA_ROWS, N);
    const Stages stages{filled, emptied};
    if (threadIdx.x == 0) stages.make();
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        give_registers_up<88>();
        const LineLoader<E, typename Room::Left, WGMMA_ROWS, LEFT_BY_K> left{
            a + block.left, it.m, LEFT_BY_K ? it.a_row : it.a_k, block.first_row};
        const LineLoader<E, typename Room::Right, N, RIGHT_BY_K> right{
            b + block.right, it.n, RIGHT_BY_K ? it.b_column : it.b_k, block.first_column};
        bring<Room>(left, right, stages, block.begin, block.end);
    } else {
        take_registers<208>();
        float sums[N / 2];
        multiply_filled<Room>(sums, stages, block.begin, block.end);
        const MatrixResult<E, float, Finish<E>> result{
            c + block.result, partial ? partial + block.sums : nullptr, it.m, it.n, block.first_row,
            block.first_column, it.vectors, {bias, slope, it.code}};
        store_multiplied<Room>(sums, result);
    }
}

}   // namespace tilewise
