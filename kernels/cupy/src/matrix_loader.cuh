// How a matrix comes to shared memory: product.cuh's loaders for strided rows, 16 bytes at a time or one by one.
#pragma once
#include "product.cuh"

namespace tilewise {

// One side of a product. `rows` from this pointer on; where one lies, and where a k.
template <class T> struct Side {
    const T *pointer;
    long long rows, row_stride, k_stride;
};

// Which is contiguous, known when the kernel is compiled, which saves registers; or found out in it.
enum Order : int { BY_K, BY_ROW, EITHER };

// Vectors of N elements: 1, or 16 bytes; then the pointer, the stride that is not 1, and the length of what is contiguous
// are multiples of it. Where k is contiguous it is fastest among the threads, else rows are. What a thread finds beyond
// the last row is any number: it meets only sums that belong to no element.
template <class S, class T, class Tile, int SIZE, int N, int ORDER> struct MatrixLoader {
    static constexpr bool COPIES = false;
    static constexpr int THREADS = Tile::THREADS, STEP = Tile::STEP, PITCH = SIZE + PAD;
    static constexpr int COUNT = SIZE * STEP / N / THREADS;
    static constexpr int ROWS_APART = THREADS * N / STEP, K_APART = THREADS * N / SIZE;   // of a thread's vectors
    static_assert(COUNT * THREADS * N == SIZE * STEP && COUNT <= 32, "threads share a tile evenly");

    Pack<T, N> kept[COUNT];
    const T *mine;
    unsigned inside = ~0u;   // a bit for each vector: one register holds which rows the matrix has
    int first_k, place;
    long long k_stride, apart;
    bool along;   // k

    __device__ __forceinline__ MatrixLoader(const Side<T> &side, long long first)
        : k_stride(side.k_stride), along(ORDER == BY_K || (ORDER == EITHER && side.k_stride == 1)) {
        const int thread = threadIdx.x;
        const int room = side.rows - first < SIZE ? static_cast<int>(side.rows - first) : SIZE;
        if (along) {
            const int row = thread / (STEP / N);
            first_k = thread % (STEP / N) * N;
            inside = 0;
#pragma unroll
            for (int i = 0; i < COUNT; ++i) inside |= static_cast<unsigned>(row + i * ROWS_APART < room) << i;
            apart = ROWS_APART * side.row_stride;
            mine = side.pointer + (first + row) * side.row_stride + first_k;
            place = first_k * PITCH + row;
        } else {
            const int row = thread % (SIZE / N) * N, at = row < room - N ? row : room - N;
            first_k = thread / (SIZE / N);
            apart = K_APART * k_stride;
            mine = side.pointer + (first + at) * (N > 1 ? 1 : side.row_stride) + first_k * k_stride;
            place = first_k * PITCH + row;
        }
    }

    __device__ __forceinline__ void fetch(S *, long long k, long long end) {
        unsigned wanted = inside;
        if (k + STEP > end) {
            const int room = static_cast<int>(end - k) - first_k, step = along ? 0 : K_APART;
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                if (i * step >= room) wanted &= ~(1u << i);
        }
        const T *const from = mine + (along ? k : k * k_stride);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) kept[i] = wanted >> i & 1 ? load<N>(from + i * apart) : Pack<T, N>{};
    }

    __device__ __forceinline__ void keep(S *tile) {
        if (along) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
#pragma unroll
                for (int j = 0; j < N; ++j)
                    tile[place + i * ROWS_APART + j * PITCH] = static_cast<S>(widen(kept[i].lane[j]));
        } else {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) store_wide(tile + place + i * K_APART * PITCH, kept[i]);
        }
    }

private:
    static __device__ __forceinline__ void store_wide(S *to, const Pack<T, N> &pack) {
        if constexpr (N == 1) {
            *to = static_cast<S>(widen(pack.lane[0]));
        } else {
            constexpr int WIDTH = LANES<S>;
#pragma unroll
            for (int j = 0; j < N; j += WIDTH) {
                Pack<S, WIDTH> wide;
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) wide.lane[i] = static_cast<S>(widen(pack.lane[j + i]));
                store_shared(to + j, wide);
            }
        }
    }
};

// float whose rows are contiguous, by cp.async, without a register in between: a k's rows are side by side in memory as
// in the tile. Where k is contiguous they would have to be transposed.
template <class Tile, int SIZE> struct CopyingLoader {
    static constexpr bool COPIES = true;
    static constexpr int STEP = Tile::STEP, PITCH = SIZE + PAD, WIDTH = 4;
    static constexpr int LINE = SIZE / WIDTH, APART = Tile::THREADS / LINE, COUNT = STEP / APART;
    static_assert(APART * COUNT == STEP, "threads share a tile evenly");

    const float *mine;
    long long k_stride;
    int first_k, place;

    __device__ __forceinline__ CopyingLoader(const Side<float> &side, long long first) : k_stride(side.k_stride) {
        const int row = static_cast<int>(threadIdx.x) % LINE * WIDTH;
        const int room = side.rows - first < SIZE ? static_cast<int>(side.rows - first) : SIZE;
        first_k = threadIdx.x / LINE;
        mine = side.pointer + first + (row < room - WIDTH ? row : room - WIDTH) + first_k * k_stride;
        place = first_k * PITCH + row;
    }
    __device__ __forceinline__ void fetch(float *tile, long long k, long long end) {
        const int room = (end - k < STEP ? static_cast<int>(end - k) : STEP) - first_k;
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            copy_16_bytes(tile + place + i * APART * PITCH, mine + (k + i * APART) * k_stride, i * APART < room);
    }
    __device__ __forceinline__ void keep(float *) {}   // they are there
};

}   // namespace tilewise
