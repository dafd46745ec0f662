// How sums of tensor cores leave a block: they are laid out as a matrix in shared memory, and handed to product.cuh's
// epilogue.
#pragma once
#include "element.cuh"

namespace tilewise {

// By COUNT threads, after a barrier: ROWS x COLUMNS sums, rows PITCH apart, in 16 bytes of E each time, a row's
// neighbouring columns by neighbouring threads.
template <class E, int ROWS, int COLUMNS, int PITCH, int COUNT, class Epilogue>
__device__ __forceinline__ void hand_out_sums(const float *laid, int thread, Epilogue &epilogue) {
    constexpr int WIDTH = LANES<E>, LINE = COLUMNS / WIDTH;
#pragma unroll 1
    for (int v = thread; v < ROWS * LINE; v += COUNT) {
        float values[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i += 4) {
            const Pack<float, 4> some = load<4>(laid + v / LINE * PITCH + v % LINE * WIDTH + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) values[i + j] = some.lane[j];
        }
        epilogue.put(epilogue.row(v / LINE), v % LINE * WIDTH, values);
    }
}

}   // namespace tilewise
