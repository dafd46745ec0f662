// A batch of products of matrices: what its kernels are told, and which block computes what.
#pragma once
#include "matrix_loader.cuh"
#include "matrix_result.cuh"

namespace tilewise {

// C[z] = A[z] B[z], A m x depth, B depth x n, with their strides. z counts n0 x n1 x ... matrices, which are a0, a1 and a2
// elements apart, or 0 where they are broadcast; `batches` in all. part: of the depth, for blockIdx.y.
struct Gemm {
    long long m, n, depth, part, batches, a_row, a_k, b_k, b_column, n0, n1, a0, a1, a2, b0, b1, b2;
    int vectors, code;
};

// The grid: x counts tiles, rows first, so that blocks at work together share columns of B; y counts parts of the depth,
// each of which goes to its own matrix of partial sums, added in order by gemm_sums.cu; z counts the batch.
struct GemmBlock {
    long long first_row, first_column, begin, end, left, right, result, sums;

    __device__ __forceinline__ GemmBlock(const Gemm &it, int rows, int columns) {
        const unsigned row_tiles = static_cast<unsigned>((it.m + rows - 1) / rows), z = blockIdx.z;
        const unsigned column_tile = blockIdx.x / row_tiles;
        first_row = static_cast<long long>(blockIdx.x - column_tile * row_tiles) * rows;
        first_column = static_cast<long long>(column_tile) * columns;
        begin = blockIdx.y * it.part;
        end = begin + it.part < it.depth ? begin + it.part : it.depth;
        left = offset(z, it.n0, it.n1, it.a0, it.a1, it.a2);
        right = offset(z, it.n0, it.n1, it.b0, it.b1, it.b2);
        result = z * it.m * it.n;
        sums = (blockIdx.y * it.batches + z) * it.m * it.n;
    }

private:
    static __device__ __forceinline__ long long offset(unsigned z, long long n0, long long n1, long long s0, long long s1,
                                                       long long s2) {
        if (n0 * n1 == 1) return z * s2;
        const unsigned inner = z % static_cast<unsigned>(n0 * n1), outer = z / static_cast<unsigned>(n0 * n1);
        return inner % static_cast<unsigned>(n0) * s0 + inner / static_cast<unsigned>(n0) * s1 + outer * s2;
    }
};

}   // namespace tilewise
