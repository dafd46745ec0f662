// How a matrix comes to the tiles of tensor.cuh.
#pragma once
#include "tensor.cuh"

namespace tilewise {

// `rows` from the pointer on; stride: of what is not contiguous. The pointer, the stride and the length of what is
// contiguous are multiples of 16 bytes.
template <class E, class Tile, int SIZE, bool BY_K> struct TensorLoader {
    static constexpr int WIDTH = LANES<E>, STEP = 4 * WIDTH, PITCH = BY_K ? STEP + WIDTH : SIZE + GAP;
    static constexpr int LINE = (BY_K ? STEP : SIZE) / WIDTH;   // vectors in a row of the tile
    static constexpr int COUNT = SIZE * STEP / WIDTH / Tile::THREADS;
    static constexpr int FURTHER = Tile::THREADS / LINE;   // rows of the tile from a thread's vector to its next
    static_assert(FURTHER * LINE == Tile::THREADS && COUNT * Tile::THREADS * WIDTH == SIZE * STEP, "whole rows each time");

    const E *pointer;   // to the thread's first vector, k = 0
    long long stride;
    int lines, first, place;   // rows that there are of its vectors; its first k; its first place in a tile

    __device__ __forceinline__ TensorLoader(const E *matrix, long long rows, long long stride_, long long first_row)
        : stride(stride_) {
        const int thread = threadIdx.x, outer = thread / LINE, inner = thread % LINE * WIDTH;
        const long long row = first_row + (BY_K ? outer : inner), left = rows - row;
        first = BY_K ? inner : outer;
        place = outer * PITCH + inner;
        pointer = matrix + (BY_K ? row * stride + first : first * stride + row);
        lines = static_cast<int>(left < SIZE ? left : SIZE);
    }
    __device__ __forceinline__ void copy(E *tile, long long k, long long end) const {
        const int depth = static_cast<int>(end - k < STEP ? end - k : STEP) - first;
        const int count = BY_K ? (depth > 0 ? lines : 0) : lines > 0 ? depth : 0;
        const E *from = pointer + (BY_K ? k : k * stride);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            copy_16_bytes(tile + place + i * FURTHER * PITCH, from, i * FURTHER < count);
            from += FURTHER * stride;
        }
    }
};

}   // namespace tilewise
