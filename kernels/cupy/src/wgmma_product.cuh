// The product on Hopper's tensor cores, wgmma: float16 and bfloat16, summed in float.
//
// A block computes 128 x N of C. Of its three warpgroups one brings the operands, by cp.async; two multiply, 64 rows each,
// and read both operands from shared memory. They meet at two barriers for each of the stages:
//
//     the bringer                                         the two that multiply
//     waits until `emptied`                               wait until `filled`
//     copies a step of 64 of the depth                    start the products of the step
//     `filled` is told when they are there                wait for those of the step before
//                                                         and tell `emptied` of its stage
//
// A tile is what the instruction reads with a swizzle of 128 bytes: lines of 128 bytes, whose 16-byte units change places
// with the line's number modulo 8, so that the same unit of eight lines is in different banks.
//
//     k contiguous: a line is 64 k of a row               rows contiguous: a line is 64 rows of a k, 64 lines a panel
//     unit u of row r at 128 r + 16 (u ^ r % 8)           unit u of panel p, k, at 8192 p + 128 k + 16 (u ^ k % 8)
//
// NVIDIA, "PTX ISA", wgmma: shared memory layouts and the matrix descriptor.
#pragma once
#include "laid_sums.cuh"
#include "wgmma.cuh"

namespace tilewise {

constexpr int WARPGROUP = 128, MULTIPLIERS = 2 * WARPGROUP, WGMMA_THREADS = 3 * WARPGROUP;
constexpr int WGMMA_ROWS = 128, WGMMA_STEP = 64, WGMMA_DEPTH = 16;   // of an instruction
constexpr int LINE_BYTES = 128, LINES = 8, PANEL = 64;               // of a swizzle; elements of a line
constexpr int FILLING = 4;                                           // stages
constexpr int WGMMA_OUT_GAP = 8, WGMMA_TURNED_GAP = 4;   // of the sums: lanes write to different banks

// An operand's tile, SIZE x WGMMA_STEP, and how instructions find their part of it.
template <int SIZE, bool BY_K> struct SwizzledTile {
    static constexpr int BYTES = SIZE * LINE_BYTES;
    static constexpr int VECTORS = BYTES / 16 / WARPGROUP;   // of a thread that brings them

    // The place of 16 bytes: unit `inner` of line `outer`, of a row (k contiguous) or of a k.
    static __device__ __forceinline__ int place(int outer, int inner) {
        const int panel = BY_K ? 0 : inner / LINES * (WGMMA_STEP * LINE_BYTES);
        return panel + outer * LINE_BYTES + ((inner % LINES ^ outer % LINES) << 4);
    }
    // The descriptor of the rows from `row` on, a multiple of PANEL, and the 16 of the depth from k on. In units of 16
    // bytes: the address; the leading offset, from a panel to the next (where k is contiguous there is one only); the
    // stride, from eight lines to the next eight; bit 62: a swizzle of 128 bytes.
    static __device__ __forceinline__ unsigned long long descriptor(const void *tile, int row, int k) {
        const int start = BY_K ? row * LINE_BYTES + k * 2 : row / PANEL * (WGMMA_STEP * LINE_BYTES) + k * LINE_BYTES;
        constexpr unsigned long long LEADING = BY_K ? 1 : WGMMA_STEP * LINE_BYTES / 16, STRIDE = LINES * LINE_BYTES / 16;
        return ((shared_address(tile) + start) & 0x3ffff) >> 4 | LEADING << 16 | STRIDE << 32 | 1ull << 62;
    }
};

template <class E_, int N_, bool LEFT_BY_K_, bool RIGHT_BY_K_> struct WgmmaRoom {
    using E = E_;
    static constexpr int N = N_, STEP = WGMMA_STEP;
    static constexpr bool LEFT_BY_K = LEFT_BY_K_, RIGHT_BY_K = RIGHT_BY_K_;
    using Left = SwizzledTile<WGMMA_ROWS, LEFT_BY_K>;
    using Right = SwizzledTile<N, RIGHT_BY_K>;
    static constexpr int STAGE = Left::BYTES + Right::BYTES, OUT_PITCH = N + WGMMA_OUT_GAP;
    static constexpr bool STORES = false;
    // what the launch has to give: gemm_wgmma.py
    static constexpr int BYTES = FILLING * STAGE;
    static_assert(WGMMA_ROWS * OUT_PITCH * 4 <= BYTES, "the sums have no room");
};

struct Stages {
    unsigned long long *filled, *emptied;   // FILLING barriers each

    // By one thread; all must meet afterwards. stores: whether the bringer also stores numbers itself, which copies do not
    // tell of.
    __device__ __forceinline__ void make(bool stores = false) const {
        for (int s = 0; s < FILLING; ++s) {
            make_barrier(filled + s, stores ? 2 * WARPGROUP : WARPGROUP);
            make_barrier(emptied + s, MULTIPLIERS / 32);   // a lane of each warp
        }
    }
};

// The bringer's work. A loader has copy(tile, thread, k, end): begins the copies of the step at k, or does them; called in
// the steps' order; every k >= end is 0.
template <class Room, class Left, class Right>
__device__ __forceinline__ void bring(Left &left, Right &right, const Stages &stages, long long begin, long long end) {
    char *const tiles = static_cast<char *>(dynamic_shared());
    const int thread = threadIdx.x % WARPGROUP, steps = static_cast<int>((end - begin + Room::STEP - 1) / Room::STEP);
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
        const int stage = s % FILLING;
        const long long k = begin + static_cast<long long>(s) * Room::STEP;
        wait_phase(stages.emptied + stage, (s / FILLING + 1) % 2);
        left.copy(tiles + stage * Room::STAGE, thread, k, end);
        right.copy(tiles + stage * Room::STAGE + Room::Left::BYTES, thread, k, end);
        arrive_with_copies(stages.filled + stage);
        if constexpr (Room::STORES) arrive(stages.filled + stage);
    }
}

// A multiplier's work: sums += its 64 rows of the tile.
template <class Room>
__device__ __forceinline__ void multiply_filled(float (&sums)[Room::N / 2], const Stages &stages, long long begin,
                                                long long end) {
    const char *const tiles = static_cast<const char *>(dynamic_shared());
    const int row = threadIdx.x / WARPGROUP * 64 - 64, lane = threadIdx.x % 32;
    const int steps = static_cast<int>((end - begin + WGMMA_STEP - 1) / WGMMA_STEP);
#pragma unroll
    for (int i = 0; i < Room::N / 2; ++i) sums[i] = 0;
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
        const int stage = s % FILLING;
        const char *const left = tiles + stage * Room::STAGE, *const right = left + Room::Left::BYTES;
        wait_phase(stages.filled + stage, s / FILLING % 2);
        show_to_products();
        begin_products();
#pragma unroll
        for (int k = 0; k < WGMMA_STEP; k += WGMMA_DEPTH)
            start_product<!Room::LEFT_BY_K, !Room::RIGHT_BY_K>(sums, Room::Left::descriptor(left, row, k),
                                                               Room::Right::descriptor(right, 0, k),
                                                               typename Room::E{});
        commit_products();
        wait_products<1>();
        if (s > 0 && lane == 0) arrive(stages.emptied + (s - 1) % FILLING);
    }
    wait_products<0>();
    hold_registers(sums);
}

// The multipliers lay their sums out as a matrix where the stages were, and hand them out in 16 bytes of the result:
// product.cuh's epilogue. TURNED: of the transposed matrix, N x 128.
template <class Room, bool TURNED = false, class Epilogue>
__device__ __forceinline__ void store_multiplied(const float (&sums)[Room::N / 2], Epilogue &epilogue) {
    constexpr int HIGH = TURNED ? Room::N : WGMMA_ROWS, LONG = TURNED ? WGMMA_ROWS : Room::N;
    constexpr int PITCH = TURNED ? LONG + WGMMA_TURNED_GAP : Room::OUT_PITCH;
    constexpr int ROW = TURNED ? 1 : PITCH, COLUMN = TURNED ? PITCH : 1;
    static_assert(HIGH * PITCH * 4 <= Room::BYTES, "the sums have no room");
    float *const laid = static_cast<float *>(dynamic_shared());
    const int thread = threadIdx.x - WARPGROUP, lane = thread % 32;
    float *const mine = laid + (thread / 32 * 16 + lane / 4) * ROW + lane % 4 * 2 * COLUMN;
    meet<MULTIPLIERS>(1);   // the stages are read
#pragma unroll
    for (int i = 0; i < Room::N / 2; ++i) mine[i % 4 / 2 * 8 * ROW + (i / 4 * 8 + i % 2) * COLUMN] = sums[i];
    meet<MULTIPLIERS>(1);
    hand_out_sums<typename Room::E, HIGH, LONG, PITCH, MULTIPLIERS>(laid, thread, epilogue);
}

}   // namespace tilewise
