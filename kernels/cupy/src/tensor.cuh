// The product on tensor cores, mma.sync: float16, bfloat16 and float rounded to TF32, summed in float; and float itself, by
// three products of TF32.
//
// A block computes ROWS x COLUMNS of C; each warp has 32 columns, and 64 or 32 rows, as products of 16 x 8. Tiles of both
// operands come to shared memory by 16-byte cp.async, zeros where there is nothing, STAGES steps ahead of the products:
//
//     stage 0    stage 1    stage 2    stage 3            a step: 64 bytes of the depth, two products deep
//     products   arrived    on its way  on its way        one barrier a step: the stage that was multiplied before it is
//                                                         the one that is filled after it
//
// A tile keeps the order that the operand has in memory, so that nothing is transposed:
//
//     k contiguous: rows of 64 bytes, 80 apart            rows contiguous: a k's numbers and 8 more
//     8 rows begin at 0 80 32 112 64 16 96 48 mod 128     16 bits: 272 or 144 bytes apart, 8 of them 16 apart mod 128
//     so that ldmatrix meets each bank once               (float: words t * 8 + g, each bank once)
//
// Fragments of 16 bits are read by ldmatrix, transposing where k is not contiguous; those of float word by word: with
// g = lane / 4, t = lane % 4 the words g * 20 + t, or t * 136 + g, are in 32 different banks.
//
// A kernel is made of a way to multiply (HalfMath, ...), a TensorTile, two loaders, and product.cuh's epilogue:
//
//     using Room = TensorRoom<Math, Tile, LEFT_BY_K, RIGHT_BY_K>;      // Room::BYTES of dynamic shared memory
//     float sums[Tile::HIGH][4][4];
//     multiply_tensor_tile<Room>(sums, left, right, begin, end);       // by all threads of the block
//     store_tensor_tile<Room>(sums, epilogue);                         // whose put gets as many as make 16 bytes
//
// A loader begins at the block's first row ("row" means column for the right one), and has
//
//     void copy(Element *tile, long long k, long long end);   begins the copies of the step at k, all STEP of them; called
//                                                         in the steps' order. (k, row) is at row * ALONG + k where k is
//                                                         contiguous, else at k * (SIZE + GAP) + row; every k >= end is 0
#pragma once
#include "laid_sums.cuh"

namespace tilewise {

constexpr int STAGES = 4;
constexpr int GAP = 8;       // numbers between the ends of a k's rows, or columns, and the next k's
constexpr int OUT_GAP = 4;   // the same for the sums, which lie where the stages were

// HIGH: products of 16 rows in a warp. RESIDENT: so many blocks shall fit a multiprocessor.
template <int WARPS_DOWN_, int WARPS_ACROSS_, int HIGH_, int RESIDENT_> struct TensorTile {
    static constexpr int WARPS_DOWN = WARPS_DOWN_, WARPS_ACROSS = WARPS_ACROSS_, HIGH = HIGH_, RESIDENT = RESIDENT_;
    static constexpr int ROWS = WARPS_DOWN * HIGH * 16, COLUMNS = WARPS_ACROSS * 32;
    static constexpr int THREADS = 32 * WARPS_DOWN * WARPS_ACROSS;

    static __device__ __forceinline__ int first_row(int thread) { return thread / 32 % WARPS_DOWN * HIGH * 16; }
    static __device__ __forceinline__ int first_column(int thread) { return thread / 32 / WARPS_DOWN * 32; }
};
using Large = TensorTile<2, 4, 4, 2>;     // 128 x 128: reads each operand least often
using Medium = TensorTile<2, 4, 4, 1>;    // the same with twice the registers
using Little = TensorTile<2, 2, 2, 4>;    // 64 x 64: more blocks

// ---- ways to multiply: an operand's words for 16 rows (or 2 x 8 columns), and sums += a[...] b[..., 8 columns of j]

template <class E, int DEPTH_> struct PlainMath {
    using Element = E;
    static constexpr int DEPTH = DEPTH_;   // of an instruction
    struct Operand {
        unsigned words[4];
    };
    static __device__ __forceinline__ unsigned word(float value) { return to_tf32(value); }
    static __device__ __forceinline__ void set(Operand &operand, int i, float value) {
        operand.words[i] = word(value);
    }
    static __device__ __forceinline__ void set_all(Operand &operand, const float (&values)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) set(operand, i, values[i]);
    }
    static __device__ __forceinline__ void add(float (&sums)[4], const Operand &a, const Operand &b, int j) {
        multiply_add(sums, a.words, b.words[2 * j], b.words[2 * j + 1], E{});
    }
};
using HalfMath = PlainMath<Half, 16>;
using BfloatMath = PlainMath<Bfloat, 16>;
using Tf32Math = PlainMath<float, 8>;

// float as the sum of two TF32 numbers, which have 11 digits each: big * big + big * small + small * big lacks what is
// beyond the last digit of float. Tensor cores cut off what they add, so that a long sum would come out too small: each
// 8 of the depth (wgmma: 16) are summed from 0 there, the small products first, and added to the rest in float, to nearest.
// So the error is float's, in the tests at most twice that of one product each, down to 2^-113: below, small would be less
// than TF32's least step, 2^-136, and digits are lost.
//
// H. Ootomo, R. Yokota: Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
// performance, International Journal of High Performance Computing Applications 36(4), 2022.
struct SplitMath {
    using Element = float;
    static constexpr int DEPTH = 8;
    struct Operand {
        unsigned big[4], small[4];
    };
    // Infinity and NaN are the small part of 1, since big * small would be Infinity - Infinity or Infinity * 0 otherwise.
    static __device__ __forceinline__ void set(Operand &operand, int i, float value) {
        constexpr unsigned EXPONENT = 0x7f800000u, SIGN = 0x80000000u, TF32 = 0xffffe000u, ONE = 0x3f800000u;
        const unsigned bits = __float_as_int(value);
        unsigned big = to_tf32(value), small;
        if ((bits & EXPONENT) == EXPONENT) {
            small = big;
            big = (bits & SIGN) | ONE;
        } else {
            if ((big & EXPONENT) == EXPONENT) big = bits & TF32;   // it was rounded beyond the largest number
            small = to_tf32(value - __int_as_float(static_cast<int>(big)));
        }
        operand.big[i] = big;
        operand.small[i] = small;
    }
    // The same of four, with fewer instructions where all are less than what rounding makes Infinity of, and none is NaN: half
    // a step added before bits are cut off rounds to nearest, ties away from 0; those of small tensor cores cut off.
    static __device__ __forceinline__ void set_all(Operand &operand, const float (&values)[4]) {
        constexpr unsigned HALF_STEP = 0x1000u, TF32 = 0xffffe000u;
        constexpr float INFINITE = 0x1.ffep127f;
        bool ordinary = true;
#pragma unroll
        for (int i = 0; i < 4; ++i) ordinary &= fabsf(values[i]) < INFINITE;
        if (ordinary) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                operand.big[i] = (__float_as_int(values[i]) + HALF_STEP) & TF32;
                const float rest = values[i] - __int_as_float(static_cast<int>(operand.big[i]));
                operand.small[i] = __float_as_int(rest) + HALF_STEP;
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) set(operand, i, values[i]);
        }
    }
    static __device__ __forceinline__ void add(float (&sums)[4], const Operand &a, const Operand &b, int j) {
        float part[4] = {};
        multiply_add(part, a.small, b.big[2 * j], b.big[2 * j + 1], float{});
        multiply_add(part, a.big, b.small[2 * j], b.small[2 * j + 1], float{});
        multiply_add(part, a.big, b.big[2 * j], b.big[2 * j + 1], float{});
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[e] += part[e];
    }
};

// ---- shared memory

template <class Math_, class Tile_, bool LEFT_BY_K_, bool RIGHT_BY_K_> struct TensorRoom {
    using Math = Math_;
    using Tile = Tile_;
    using Element = typename Math::Element;
    static constexpr bool LEFT_BY_K = LEFT_BY_K_, RIGHT_BY_K = RIGHT_BY_K_;
    static constexpr int WIDTH = LANES<Element>, STEP = 4 * WIDTH, ALONG = STEP + WIDTH;
    static constexpr int LEFT_PITCH = LEFT_BY_K ? ALONG : Tile::ROWS + GAP;
    static constexpr int RIGHT_PITCH = RIGHT_BY_K ? ALONG : Tile::COLUMNS + GAP;
    static constexpr int LEFT = (LEFT_BY_K ? Tile::ROWS : STEP) * LEFT_PITCH;       // numbers of a stage
    static constexpr int RIGHT = (RIGHT_BY_K ? Tile::COLUMNS : STEP) * RIGHT_PITCH;
    static constexpr int OUT_PITCH = Tile::COLUMNS + OUT_GAP;
};

// ---- fragments

// Words of 16 rows (the left operand), or of 16 columns, and DEPTH of k, from a tile. Left: word r + 2s is of rows 8r on
// and the s-th half of k; right: word s + 2r.
template <class Math, bool BY_K, bool LEFT, class E>
__device__ __forceinline__ void load_operand(typename Math::Operand &operand, const E *tile, int pitch, int row, int k) {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(E) == 2) {
        // lane l gives the address of row l % 8 of matrix l / 8, whose words are in the order above
        const int r = LEFT ? lane / 8 % 2 : lane / 16, s = LEFT ? lane / 16 : lane / 8 % 2, i = lane % 8;
        if constexpr (BY_K)
            load_matrices(operand.words, tile + (row + 8 * r + i) * pitch + k + 8 * s);
        else
            load_matrices_transposed(operand.words, tile + (k + 8 * s + i) * pitch + row + 8 * r);
    } else {
        const int row_step = BY_K ? pitch : 1, k_step = BY_K ? 1 : pitch;
        const E *const mine = tile + (row + lane / 4) * row_step + (k + lane % 4) * k_step;
        float values[4];
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            const int r = LEFT ? word % 2 : word / 2, s = LEFT ? word / 2 : word % 2;
            values[word] = mine[8 * r * row_step + 4 * s * k_step];
        }
        Math::set_all(operand, values);
    }
}

// A step's products: 4 x HIGH of them for each half of the step.
template <class Room>
__device__ __forceinline__ void add_tensor_products(float (&sums)[Room::Tile::HIGH][4][4],
                                                    const typename Room::Element *left,
                                                    const typename Room::Element *right) {
    using Math = typename Room::Math;
    const int row = Room::Tile::first_row(threadIdx.x), column = Room::Tile::first_column(threadIdx.x);
#pragma unroll
    for (int k = 0; k < Room::STEP; k += Math::DEPTH) {
        typename Math::Operand b[2];
#pragma unroll
        for (int j = 0; j < 2; ++j)
            load_operand<Math, Room::RIGHT_BY_K, false>(b[j], right, Room::RIGHT_PITCH, column + 16 * j, k);
#pragma unroll
        for (int i = 0; i < Room::Tile::HIGH; ++i) {
            typename Math::Operand a;
            load_operand<Math, Room::LEFT_BY_K, true>(a, left, Room::LEFT_PITCH, row + 16 * i, k);
#pragma unroll
            for (int j = 0; j < 4; ++j) Math::add(sums[i][j], a, b[j / 2], j % 2);
        }
    }
}

template <class Room, class Left, class Right>
__device__ __forceinline__ void multiply_tensor_tile(float (&sums)[Room::Tile::HIGH][4][4], Left &left, Right &right,
                                                     long long begin, long long end) {
    using E = typename Room::Element;
    constexpr int STEP = Room::STEP, AHEAD = STAGES - 1;
    E *const lefts = static_cast<E *>(dynamic_shared()), *const rights = lefts + STAGES * Room::LEFT;
#pragma unroll
    for (int i = 0; i < Room::Tile::HIGH; ++i)
#pragma unroll
        for (int j = 0; j < 16; ++j) sums[i][j / 4][j % 4] = 0;
    const auto copy = [&](int stage, long long k) {
        if (k < end) {
            left.copy(lefts + stage * Room::LEFT, k, end);
            right.copy(rights + stage * Room::RIGHT, k, end);
        }
        commit_copies();
    };
#pragma unroll 1
    for (int s = 0; s < AHEAD; ++s) copy(s, begin + s * STEP);
    int stage = 0;
#pragma unroll 1
    for (long long k = begin; k < end; k += STEP) {
        wait_copies<STAGES - 2>();
        __syncthreads();   // this stage has arrived for all, and the one before it is free
        copy((stage + AHEAD) % STAGES, k + AHEAD * STEP);
        add_tensor_products<Room>(sums, lefts + stage * Room::LEFT, rights + stage * Room::RIGHT);
        stage = (stage + 1) % STAGES;
    }
    // what is still to be waited for is empty groups
}

// Lays the block's sums out as a matrix in shared memory, and hands them out in 16 bytes of the result, a row's
// neighbouring columns by neighbouring threads.
template <class Room, class Epilogue>
__device__ __forceinline__ void store_tensor_tile(const float (&sums)[Room::Tile::HIGH][4][4], Epilogue &epilogue) {
    using Tile = typename Room::Tile;
    constexpr int PITCH = Room::OUT_PITCH;
    float *const laid = static_cast<float *>(dynamic_shared());
    const int thread = threadIdx.x, lane = thread % 32;
    float *const mine =
        laid + (Tile::first_row(thread) + lane / 4) * PITCH + Tile::first_column(thread) + lane % 4 * 2;
    __syncthreads();   // the stages are read
#pragma unroll
    for (int i = 0; i < Tile::HIGH; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) mine[(i * 16 + e / 2 * 8) * PITCH + j * 8 + e % 2] = sums[i][j][e];
    __syncthreads();
    hand_out_sums<typename Room::Element, Tile::ROWS, Tile::COLUMNS, PITCH, Tile::THREADS>(laid, thread, epilogue);
}

}   // namespace tilewise
