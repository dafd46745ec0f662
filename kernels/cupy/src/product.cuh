// The product at the heart of matmul and convolution: one block's tile of C = A B, summed in registers.
//
// A block owns ROWS x COLUMNS of C. It walks along k in steps of STEP; at each step both operands' tiles lie in shared
// memory, k by k, so that the numbers a thread needs for one k are 16-byte vectors. There are two such buffers: while one
// is multiplied, the next step's numbers are on their way to the other: through registers, or by cp.async.
//
//                     columns (right operand's tile, STEP x COLUMNS)         C's tile, shared out
//                k  +---------------------------------------------+          +----+----+----+----+
//                   +---------------------------------------------+          | w0 | w1 |    a warp: lanes 4 x 8,
//     rows, k       |                                             |          +----+----+
//    +---+---+      | +---- 4 ----+  ...  +---- 4 ----+           |          | w2 | w3 |    each with 4 x 4 blocks
//    |   |   |      | | 4 x 4 of  |       | the same  |           |          +----+----+    of its tile, so that
//    | k fastest    | | a thread  |       | thread's  |           |          | ..      |    neighbouring lanes read
//    |   |   |      | +-----------+       +-----------+           |                         neighbouring vectors
//    +---+---+
//
// A kernel is made of a Tile, two loaders and an epilogue:
//
//     __shared__ TileRoom<S, Tile> room;
//     S sums[Tile::DOWN][Tile::ACROSS];
//     multiply_tile<Tile>(sums, room, left, right, begin, end);   // begin <= k < end; by all threads of the block
//     store_tile<Tile>(sums, room, epilogue);
//
// S is what it sums in: Sum<T>, or an unsigned integer. What the operands are, this file does not know. A loader is an
// object that brings one side, `left` SIZE = ROWS of A, `right` SIZE = COLUMNS of B; both sides are loaded alike ("row"
// means column for the right one). It begins at the block's first row, which its constructor is given, and has
//
//     static constexpr bool COPIES;                  whether it sends by cp.async (compute capability 8.0)
//     void fetch(S *tile, long long k, long long end);   sends for the thread's elements of the step at k: to registers of
//                                                    its own, or to shared memory where it copies
//     void keep(S *tile);                            writes the registers to shared memory; nothing where it copies
//
// In the tile (k, row) is at k * (SIZE + PAD) + row. What lies beyond the operand is 0, or any number in rows whose sums
// belong to no element; every k >= end is 0. matrix_loader.cuh has those for plain matrices. An epilogue has
//
//     auto row(int i);                               anything, such as where the tile's row i lies in the result
//     void put(place, int column, const S (&values)[N]);   N = BLOCK neighbouring columns of a row (tensor.cuh: as many as
//                                                    make 16 bytes), the first of which is the tile's `column`
//
// What lies outside of the result is the epilogue's to leave out. matrix_result.cuh has that of plain matrices.
#pragma once
#include "element.cuh"

namespace tilewise {

// A tile's rows in shared memory are apart by this more than their length: a thread that stores one row's neighbouring k
// then meets another in a bank at most once, and rows stay aligned to 16 bytes.
constexpr int PAD = 4;
constexpr int BLOCK = 4;                             // a thread's rows and columns come in blocks of so many
constexpr int LANES_DOWN = 4, LANES_ACROSS = 8;      // of a warp

// WARPS_DOWN x WARPS_ACROSS warps in a block; DOWN x ACROSS sums in a thread; RESIDENT blocks shall fit a multiprocessor.
template <int WARPS_DOWN_, int WARPS_ACROSS_, int DOWN_, int ACROSS_, int STEP_, int RESIDENT_> struct Tile {
    static constexpr int WARPS_DOWN = WARPS_DOWN_, WARPS_ACROSS = WARPS_ACROSS_, DOWN = DOWN_, ACROSS = ACROSS_;
    static constexpr int STEP = STEP_, RESIDENT = RESIDENT_, THREADS = 32 * WARPS_DOWN * WARPS_ACROSS;
    static constexpr int WARP_ROWS = LANES_DOWN * DOWN, WARP_COLUMNS = LANES_ACROSS * ACROSS;
    static constexpr int ROWS = WARPS_DOWN * WARP_ROWS, COLUMNS = WARPS_ACROSS * WARP_COLUMNS;

    // Of the first of a thread's sums, in the tile.
    static __device__ __forceinline__ int first_row(int thread) {
        return thread / 32 / WARPS_ACROSS * WARP_ROWS + thread % 32 / LANES_ACROSS * BLOCK;
    }
    static __device__ __forceinline__ int first_column(int thread) {
        return thread / 32 % WARPS_ACROSS * WARP_COLUMNS + thread % LANES_ACROSS * BLOCK;
    }
};

// 8 x 8 sums a thread need 16 loads of 4 numbers for 256 products: 64 products to 4 instructions that load, for each k.
using Big = Tile<4, 2, 8, 8, 16, 2>;     // 128 x 128, 256 threads of 128 registers: two blocks fill a multiprocessor
using Tall = Tile<4, 1, 8, 8, 16, 3>;    // 128 x 64, 128 threads
using Small = Tile<2, 2, 8, 4, 16, 3>;   // 64 x 64, 128 threads; double fits
using Tiny = Tile<2, 1, 4, 4, 32, 6>;    // 32 x 32, 64 threads: few rows or columns, bound by memory

// For __launch_bounds__: a device before 8.6 whose numbers come through registers has none left for a second large block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 860
constexpr int FULL = 128 * 128;   // sums of such a block
#else
constexpr int FULL = 1 << 30;
#endif
// Numbers of eight bytes take twice the registers: a third of the blocks less.
template <class Shape, bool COPIES, class S = float>
constexpr int RESIDENT_BLOCKS = !COPIES && Shape::ROWS * Shape::COLUMNS >= FULL ? 1
                                : sizeof(S) > sizeof(float)                     ? Shape::RESIDENT * 2 / 3
                                                                                : Shape::RESIDENT;

// The stages of both operands; afterwards the sums lie there on their way to the epilogue.
template <class S, class T> struct alignas(16) TileRoom {
    S left[2][T::STEP * (T::ROWS + PAD)];
    S right[2][T::STEP * (T::COLUMNS + PAD)];
};

// A thread's N numbers from a row of a tile: blocks of four, `apart` blocks apart.
template <int APART, class S, int N> __device__ __forceinline__ void load_blocks(S (&numbers)[N], const S *row) {
    constexpr int WIDTH = LANES<S> < BLOCK ? LANES<S> : BLOCK;
#pragma unroll
    for (int n = 0; n < N; n += WIDTH) {
        const Pack<S, WIDTH> some = load<WIDTH>(row + n / BLOCK * BLOCK * APART + n % BLOCK);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) numbers[n + i] = some.lane[i];
    }
}

// A step's products; left and right: the thread's places in both tiles.
template <class T, class S>
__device__ __forceinline__ void add_products(S (&sums)[T::DOWN][T::ACROSS], const S *left, const S *right) {
#pragma unroll
    for (int k = 0; k < T::STEP; ++k) {
        S a[T::DOWN], b[T::ACROSS];
        load_blocks<LANES_DOWN>(a, left + k * (T::ROWS + PAD));
        load_blocks<LANES_ACROSS>(b, right + k * (T::COLUMNS + PAD));
#pragma unroll
        for (int i = 0; i < T::DOWN; ++i)
#pragma unroll
            for (int j = 0; j < T::ACROSS; ++j) sums[i][j] += a[i] * b[j];
    }
}

template <class T, class S, class Left, class Right>
__device__ __forceinline__ void multiply_tile(S (&sums)[T::DOWN][T::ACROSS], TileRoom<S, T> &room, Left &left,
                                              Right &right, long long begin, long long end) {
    constexpr bool COPIES = Left::COPIES || Right::COPIES;
    const int row = T::first_row(threadIdx.x), column = T::first_column(threadIdx.x);
#pragma unroll
    for (int i = 0; i < T::DOWN; ++i)
#pragma unroll
        for (int j = 0; j < T::ACROSS; ++j) sums[i][j] = 0;
    const auto fetch = [&](int stage, long long k) {
        left.fetch(room.left[stage], k, end);
        right.fetch(room.right[stage], k, end);
        if constexpr (COPIES) commit_copies();
    };
    const auto keep = [&](int stage) {
        left.keep(room.left[stage]);
        right.keep(room.right[stage]);
        if constexpr (COPIES) wait_copies<0>();
    };
    if (begin < end) {
        fetch(0, begin);
        keep(0);
    }
    __syncthreads();
    int stage = 0;
    for (long long k = begin; k < end; k += T::STEP) {
        const bool further = k + T::STEP < end;
        if (further) fetch(1 - stage, k + T::STEP);   // nobody reads it any more: all have passed the last barrier
        add_products<T>(sums, room.left[stage] + row, room.right[stage] + column);
        if (further) keep(1 - stage);
        stage = 1 - stage;
        __syncthreads();
    }
}

// Hands out the block's sums in fours. Warps side by side lay their rows of sums into shared memory, and the whole block
// takes them out again, a row's neighbouring columns by neighbouring threads: full lines of memory are written. `put` is
// in the code once, not once for each sum, so that it may be long.
template <class T, class S, class Epilogue>
__device__ __forceinline__ void store_tile(const S (&sums)[T::DOWN][T::ACROSS], TileRoom<S, T> &room,
                                           Epilogue &epilogue) {
    constexpr int PITCH = T::COLUMNS + PAD, LINE = T::COLUMNS / BLOCK;
    static_assert(T::WARP_ROWS * PITCH * sizeof(S) <= sizeof room, "the sums of warps side by side have no room");
    S *const laid = reinterpret_cast<S *>(&room);
    const int thread = threadIdx.x, row = T::first_row(thread), column = T::first_column(thread);
#pragma unroll 1
    for (int strip = 0; strip < T::WARPS_DOWN; ++strip) {
        if (row / T::WARP_ROWS == strip) {
            S *const mine = laid + row % T::WARP_ROWS * PITCH + column;
#pragma unroll
            for (int i = 0; i < T::DOWN; ++i)
#pragma unroll
                for (int j = 0; j < T::ACROSS; ++j)
                    mine[(i / BLOCK * LANES_DOWN * BLOCK + i % BLOCK) * PITCH + j / BLOCK * LANES_ACROSS * BLOCK +
                         j % BLOCK] = sums[i][j];
        }
        __syncthreads();
#pragma unroll 1
        for (int v = thread; v < T::WARP_ROWS * LINE; v += T::THREADS) {
            S values[BLOCK];
            load_blocks<1>(values, laid + v / LINE * PITCH + v % LINE * BLOCK);
            epilogue.put(epilogue.row(strip * T::WARP_ROWS + v / LINE), v % LINE * BLOCK, values);
        }
        __syncthreads();
    }
}

}   // namespace tilewise
