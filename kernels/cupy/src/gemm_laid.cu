// The right operand of a product of float32 on Hopper, as its instruction takes it: k contiguous, and rounded to TF32 or taken
// apart into two parts of TF32 (tensor.cuh's Math). Where many tiles read it, that is done once, in memory, and not again
// on the way to each of them (wgmma_single.cuh).
#include "tensor.cuh"

namespace tilewise {

constexpr int SIDE = 64, WALKED = THREADS * 4 / SIDE;   // of a block's tile; its rows that the threads move at once

// laid[z, part, row, k], of matrices that lie one after the other, by k or by rows. Block (tile of rows and of k, 1, z).
template <class Math, bool BY_K>
__global__ void __launch_bounds__(THREADS, 2)
lay_out(const float *__restrict__ b, float *__restrict__ laid, long long rows, long long depth) {
    using Operand = typename Math::Operand;
    constexpr int PARTS = sizeof(Operand) / 16, ROUNDS = SIDE / WALKED;
    __shared__ float tile[BY_K ? 1 : SIDE][SIDE + 1];
    const long long row_tiles = (rows + SIDE - 1) / SIDE, column = blockIdx.x / row_tiles;
    const long long first_row = (blockIdx.x - column * row_tiles) * SIDE, first_k = column * SIDE, z = blockIdx.z;
    const int outer = threadIdx.x * 4 / SIDE, inner = threadIdx.x * 4 % SIDE;
    const float *const from = b + z * rows * depth;
    float *const to = laid + z * PARTS * rows * depth;
    if constexpr (!BY_K) {
        Pack<float, 4> values[ROUNDS] = {};
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i) {
            const long long k = first_k + outer + i * WALKED, row = first_row + inner;
            if (k < depth && row < rows) values[i] = load<4>(from + k * rows + row);
        }
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) tile[outer + i * WALKED][inner + e] = values[i].lane[e];
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
        const long long row = first_row + outer + i * WALKED, k = first_k + inner;
        if (row >= rows || k >= depth) continue;
        float values[4];
        if constexpr (BY_K) {
            const Pack<float, 4> four = load<4>(from + row * depth + k);
#pragma unroll
            for (int e = 0; e < 4; ++e) values[e] = four.lane[e];
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) values[e] = tile[inner + e][outer + i * WALKED];
        }
        Operand operand;
        Math::set_all(operand, values);
        Pack<float, 4> parts[PARTS];
        memcpy(parts, &operand, sizeof operand);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) store(to + part * rows * depth + row * depth + k, parts[part]);
    }
}

}   // namespace tilewise
