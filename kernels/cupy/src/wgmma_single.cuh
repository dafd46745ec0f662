// The product of float32 on Hopper's tensor cores: rounded to TF32 (Tf32Math of tensor.cuh), or exact by three products of
// TF32 (SplitMath). Blocks, warpgroups, barriers and stages are wgmma_product.cuh's; a step is 32 deep.
//
// wgmma takes TF32 from shared memory only where k is contiguous, and cuts off what float has beyond TF32: operands as they
// are would lose up to twice what rounded ones lose, always toward 0, so that a long sum of one sign would be too small by
// as much. Both operands are therefore rounded, or split, on their way, and neither has to be by k:
//
//     left     cp.async brings it as it lies in memory; the multipliers read what they need of it to registers, where the
//              instruction takes it, and round it there
//     right    the bringer loads it to registers, a step ahead, rounds it, turns it where rows are contiguous, and stores
//              lines of 32 k for the instruction's swizzle of 128 bytes; of SplitMath a second tile for the small parts
//
// Of 128 x 256 sums a multiplier has 128 in registers. Three products have 128 x 128: tensor cores cut off what they add,
// so that every 16 of the depth are summed from 0, in 64 registers, the small products first, and added to the 64 of the
// sums (SplitMath tells why). While one warpgroup waits for its products, and adds or rounds, those of the other one run.
//
// In the machine code (sm_90a, A B of two matrices by rows), for a step, a warp's instructions, products and accesses:
//
//                          a multiplier                                    the bringer
//     TF32, 128 x 256      177: 4 products, 16 loads from shared memory    659: 16 loads, 16 stores, 8 cp.async
//     3xTF32, 128 x 128    689: 12 products, 16 loads, 128 additions       1151: 8 loads, 16 stores, 8 cp.async
//
// of which in 3xTF32 about 20 of each number are for those that are not ordinary (SplitMath), and jumped over.
//
// Banks, for which 16-byte accesses of a warp count by eight lanes:
//
//     left, BY_K    unit u of row r at 128 r + 16 (u ^ r % 8): lanes read 8 rows x 4 k, units u ^ 0 ... u ^ 7
//     left, else    unit u of k at 512 k + 16 (u ^ 2 k % 8): lanes read 4 k x 8 rows, units {u, u + 1} ^ {0, 2, 4, 6}
//     right, BY_K   eight lanes store the 8 units of a row
//     right, else   a lane has 4 k x 4 rows; eight lanes store 4 units of rows j and j + 4: {0, 1, 2, 3} ^ {j, j + 4}
//
// so that each access meets each bank once, and a load from memory takes whole lines of 128 bytes.
#pragma once
#include "tensor.cuh"
#include "wgmma_product.cuh"

namespace tilewise {

constexpr int SINGLE_DEPTH = 8;   // of an instruction

// A left operand's tile: SIZE x STEP floats, as it lies in memory.
template <int SIZE, bool BY_K> struct PlainTile {
    static constexpr int BYTES = SIZE * LINE_BYTES, VECTORS = BYTES / 16 / WARPGROUP;

    // The place of 16 bytes: unit `inner` of a row (k contiguous) or of a k.
    static __device__ __forceinline__ unsigned place(unsigned outer, unsigned inner) {
        return BY_K ? outer * LINE_BYTES + ((inner ^ outer % LINES) << 4)
                    : outer * SIZE * 4 + ((inner ^ outer * 2 % LINES) << 4);
    }
    static __device__ __forceinline__ float number(const char *tile, unsigned row, unsigned k) {
        const unsigned outer = BY_K ? row : k, inner = BY_K ? k : row;
        return *reinterpret_cast<const float *>(tile + place(outer, inner / 4) + inner % 4 * 4);
    }
};

// LAID: whether the right operand comes as gemm_laid.cu lays it out.
template <class Math_, int N_, bool LEFT_BY_K_, bool LAID = false> struct SingleRoom {
    using E = float;
    using Math = Math_;
    using Operand = typename Math::Operand;
    using Left = PlainTile<WGMMA_ROWS, LEFT_BY_K_>;
    using Right = SwizzledTile<N_, true>;
    static constexpr int N = N_, STEP = LINE_BYTES / 4;
    static constexpr bool STORES = !LAID;
    static constexpr int PARTS = sizeof(Operand) / 16;       // tiles of the right operand
    static constexpr int TOGETHER = PARTS == 1 ? 1 : 2;      // instructions' depths of a sum from 0
    static constexpr int STAGE = Left::BYTES + PARTS * Right::BYTES, OUT_PITCH = N + WGMMA_OUT_GAP;
    // a thread's, of both kinds: 65,536 in all, less what the launch leaves over
    static constexpr int BRINGER_REGISTERS = LAID ? 88 : PARTS == 1 ? 136 : 104;
    static constexpr int MULTIPLIER_REGISTERS = LAID ? 208 : PARTS == 1 ? 184 : 200;
    // what the launch has to give: gemm_wgmma.py
    static constexpr int BYTES = FILLING * STAGE;
    static_assert(WGMMA_ROWS * OUT_PITCH * 4 <= BYTES, "the sums have no room");

    // Stores 4 k of a row of the right operand, as words for the instruction.
    static __device__ __forceinline__ void store(char *right, int row, int unit, const float (&values)[4]) {
        Operand operand;
        Math::set_all(operand, values);
        unsigned words[4 * PARTS];
        memcpy(words, &operand, sizeof operand);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const unsigned *const four = words + 4 * part;
            store_16_bytes_shared(right + part * Right::BYTES + Right::place(row, unit),
                                  uint4{four[0], four[1], four[2], four[3]});
        }
    }
    // What the thread has of 64 rows of the left operand for an instruction.
    static __device__ __forceinline__ void load(float (&values)[4], const char *left, unsigned row, unsigned k) {
        const unsigned lane = threadIdx.x % 32, first = row + threadIdx.x % WARPGROUP / 32 * 16 + lane / 4;
#pragma unroll
        for (int word = 0; word < 4; ++word)
            values[word] = Left::number(left, first + word % 2 * 8, k + lane % 4 + word / 2 * 4);
    }
    // After the wait.
    static __device__ __forceinline__ void hold(Operand &operand) {
        if constexpr (PARTS == 1) {
            hold_registers(operand.words);
        } else {
            hold_registers(operand.big);
            hold_registers(operand.small);
        }
    }
    // sums, or of three products part, by the products of TOGETHER times 8 of the depth, from k on; the small ones first.
    static __device__ __forceinline__ void start(float (&sums)[N / 2], float (&part)[N / 2], const Operand *a,
                                                 const char *right, int k) {
        const auto tile = [&](int which, int i) {   // the descriptor counts in 16 bits
            return Right::descriptor(right + which * Right::BYTES, 0, 2 * (k + i * SINGLE_DEPTH));
        };
        if constexpr (PARTS == 1) {
            start_product<true>(sums, a[0].words, tile(0, 0));
        } else {
            start_product<false>(part, a[0].small, tile(0, 0));
            start_product<true>(part, a[0].big, tile(1, 0));
#pragma unroll
            for (int i = 1; i < TOGETHER; ++i) {
                start_product<true>(part, a[i].small, tile(0, i));
                start_product<true>(part, a[i].big, tile(1, i));
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) start_product<true>(part, a[i].big, tile(0, i));
        }
    }
};

// A multiplier's work: sums += its 64 rows of the tile.
template <class Room>
__device__ __forceinline__ void multiply_single(float (&sums)[Room::N / 2], const Stages &stages, long long begin,
                                                long long end) {
    constexpr int COUNT = Room::STEP / SINGLE_DEPTH, TOGETHER = Room::TOGETHER;
    const char *const tiles = static_cast<const char *>(dynamic_shared());
    const int row = threadIdx.x / WARPGROUP * 64 - 64, lane = threadIdx.x % 32;
    const int steps = static_cast<int>((end - begin + Room::STEP - 1) / Room::STEP);
    float part[Room::N / 2];
#pragma unroll
    for (int i = 0; i < Room::N / 2; ++i) sums[i] = 0;
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
        const int stage = s % FILLING;
        const char *const left = tiles + stage * Room::STAGE, *const right = left + Room::Left::BYTES;
        typename Room::Operand a[COUNT];
        wait_phase(stages.filled + stage, s / FILLING % 2);
        show_to_products();
        float next[TOGETHER][4];
        const auto load = [&](int first) {
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) Room::load(next[i], left, row, (first + i) * SINGLE_DEPTH);
        };
        load(0);
#pragma unroll
        for (int i = 0; i < COUNT; i += TOGETHER) {
            const bool last = i + TOGETHER == COUNT;
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j) Room::Math::set_all(a[i + j], next[j]);
            begin_products();
            Room::start(sums, part, a + i, right, i * SINGLE_DEPTH);
            commit_products();
            if (!last) load(i + TOGETHER);
            if (Room::PARTS > 1 || last) wait_products<0>();
            if constexpr (Room::PARTS > 1) {
                hold_registers(part);
#pragma unroll
                for (int j = 0; j < Room::N / 2; ++j) sums[j] += part[j];
            }
            if (Room::PARTS > 1 || last) {
#pragma unroll
                for (int j = Room::PARTS > 1 ? i : 0; j < i + TOGETHER; ++j) Room::hold(a[j]);
            }
        }
        if (lane == 0) arrive(stages.emptied + stage);
    }
    if constexpr (Room::PARTS == 1) hold_registers(sums);
}

}   // namespace tilewise
