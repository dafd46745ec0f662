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

    const E *pointer;
    long long rows, stride, first;

    __device__ __forceinline__ void copy(E *tile, long long k, long long end) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int vector = threadIdx.x + i * Tile::THREADS, outer = vector / LINE, inner = vector % LINE * WIDTH;
            const long long row = first + (BY_K ? outer : inner), mine = k + (BY_K ? inner : outer);
            const bool inside = row < rows && mine < end;
            const long long offset = BY_K ? row * stride + mine : mine * stride + row;
            copy_16_bytes(tile + outer * PITCH + inner, pointer + (inside ? offset : 0), inside);
        }
    }
};

}   // namespace tilewise
