// What wgmma's kernels of convolution share: the loader of a matrix that is packed.
#pragma once
#include "conv_tensor.cuh"
#include "wgmma_product.cuh"

namespace tilewise {

// An operand's tile of SIZE numbers that lie side by side for each k: zeros beyond the row, and beyond the depth. A thread
// brings the same unit of every step, for several k.
template <class E, int SIZE> struct RowLines {
    using Shape = SwizzledTile<SIZE, false>;
    static constexpr int LINE = SIZE / LANES<E>, APART = WARPGROUP / LINE;   // of a thread's k

    const E *mine;
    long long stride;
    int k, unit;
    bool there;

    // matrix: the tile's first number of the first k; length: from there on, in whole vectors; stride: from k to k.
    __device__ __forceinline__ RowLines(const E *matrix, long long length, long long stride_) : stride(stride_) {
        const int thread = threadIdx.x % WARPGROUP;
        k = thread / LINE;
        unit = thread % LINE;
        there = unit * LANES<E> < length;
        mine = matrix + (there ? k * stride + unit * LANES<E> : 0);
    }
    // The steps come in their order.
    __device__ __forceinline__ void copy(char *tile, int, long long begin, long long end) {
        const int room = !there ? 0 : end - begin < WGMMA_STEP ? static_cast<int>(end - begin) : WGMMA_STEP;
#pragma unroll
        for (int i = 0; i < Shape::VECTORS; ++i)
            copy_16_bytes(tile + Shape::place(k + i * APART, unit), mine + i * APART * stride, k + i * APART < room);
        mine += WGMMA_STEP * stride;
    }
};

}   // namespace tilewise
