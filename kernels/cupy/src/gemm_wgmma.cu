// Products of matrices on Hopper's tensor cores: C[z] = activation(A[z] B[z] + bias); of float16 and bfloat16
// (wgmma_product.cuh), and of float32 (wgmma_single.cuh).
#include "gemm.cuh"
#include "wgmma_single.cuh"

namespace tilewise {

// A matrix: as gemm_tensor.cu's, in lines that are swizzled. One warp of each scheduler brings, so what a step costs it is
// what the products wait for: addresses that do not change are computed once, and a vector takes a few instructions.
template <class E, class Shape, int SIZE, bool BY_K> struct LineLoader {
    static constexpr int WIDTH = LANES<E>, LINE = BY_K ? LINES : SIZE / WIDTH;   // vectors
    static constexpr int FURTHER = WARPGROUP / LINE;   // lines from a thread's vector to its next
    static_assert(2 * FURTHER % LINES == 0, "every other vector has the same place in the swizzle");

    const E *pointer;   // to the thread's first vector, k = 0
    long long stride;
    int lines, first;   // that there are of its vectors' rows; its first k
    int places[2];      // of its first vectors in a tile

    __device__ __forceinline__ LineLoader(const E *matrix, long long rows, long long stride_, long long first_row)
        : stride(stride_) {
        const int thread = threadIdx.x % WARPGROUP, outer = thread / LINE, inner = thread % LINE;
        const long long row = first_row + (BY_K ? outer : inner * WIDTH), left = rows - row;
        first = BY_K ? inner * WIDTH : outer;
        pointer = matrix + (BY_K ? row * stride + first : first * stride + row);
        lines = static_cast<int>(left < SIZE ? left : SIZE);
#pragma unroll
        for (int i = 0; i < 2; ++i) places[i] = Shape::place(outer + i * FURTHER, inner);
    }
    __device__ __forceinline__ void copy(char *tile, int, long long k, long long end) const {
        const int depth = static_cast<int>(end - k < WGMMA_STEP ? end - k : WGMMA_STEP) - first;
        const int count = BY_K ? (depth > 0 ? lines : 0) : lines > 0 ? depth : 0;
        const E *from = pointer + (BY_K ? k : k * stride);
#pragma unroll
        for (int i = 0; i < Shape::VECTORS; ++i) {
            copy_16_bytes(tile + places[i % 2] + Shape::place(i / 2 * 2 * FURTHER, 0), from, i * FURTHER < count);
            from += FURTHER * stride;
        }
    }
};

template <class E, int N, bool LEFT_BY_K, bool RIGHT_BY_K>
__global__ void __launch_bounds__(WGMMA_THREADS, 1)
matmul_wgmma(const E *__restrict__ a, const E *__restrict__ b, E *__restrict__ c, float *__restrict__ partial,
             const E *__restrict__ bias, float slope, const Gemm it) {
    using Room = WgmmaRoom<E, N, LEFT_BY_K, RIGHT_BY_K>;
    __shared__ unsigned long long filled[FILLING], emptied[FILLING];
    const GemmBlock block(it, WGMMA_ROWS, N);
    const Stages stages{filled, emptied};
    if (threadIdx.x == 0) stages.make();
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        give_registers_up<88>();
        const LineLoader<E, typename Room::Left, WGMMA_ROWS, LEFT_BY_K> left(
            a + block.left, it.m, LEFT_BY_K ? it.a_row : it.a_k, block.first_row);
        const LineLoader<E, typename Room::Right, N, RIGHT_BY_K> right(
            b + block.right, it.n, RIGHT_BY_K ? it.b_column : it.b_k, block.first_column);
        bring<Room>(left, right, stages, block.begin, block.end);
    } else {
        take_registers<208>();
        float sums[N / 2];
        multiply_filled<Room>(sums, stages, block.begin, block.end);
        const MatrixResult<E, float, Finish<E>> result{
            c + block.result, partial ? partial + block.sums : nullptr, it.m, it.n, block.first_row,
            block.first_column, it.vectors, {bias, slope, it.code}};
        store_multiplied<Room>(sums, result);
    }
}

// The same with fewer registers, for a bringer that needs them for the right operand.
template <class E, class Shape, int SIZE, bool BY_K> struct LeanLineLoader {
    static constexpr int WIDTH = LANES<E>, LINE = BY_K ? LINES : SIZE / WIDTH;   // vectors

    const E *pointer;
    long long rows, stride, first;

    __device__ __forceinline__ void copy(char *tile, int thread, long long k, long long end) const {
#pragma unroll
        for (int i = 0; i < Shape::VECTORS; ++i) {
            const int vector = thread + i * WARPGROUP, outer = vector / LINE, inner = vector % LINE;
            const long long row = first + (BY_K ? outer : inner * WIDTH), mine = k + (BY_K ? inner * WIDTH : outer);
            const bool inside = row < rows && mine < end;
            const long long offset = BY_K ? row * stride + mine : mine * stride + row;
            copy_16_bytes(tile + Shape::place(outer, inner), pointer + (inside ? offset : 0), inside);
        }
    }
};

// wgmma_single.cuh's right operand. A thread holds COUNT vectors of the step that comes next, four together: 4 k x 4 rows,
// or where k is contiguous 4 k of four rows. Of each four, as soon as they are stored, the next step's are begun.
template <class Room, bool BY_K> struct SingleLoader {
    static constexpr int COUNT = Room::N * LINES / WARPGROUP;
    // Rows from a vector to the thread's next; from four of them, of a warp's 32 rows x 16 k, to the next four.
    static constexpr int VECTOR_ROWS = WARPGROUP / LINES, FOUR_ROWS = 64;

    const float *pointer;   // to the thread's first row, k = 0
    long long stride;
    int rows, row, unit;    // rows of the operand from there on; the first row, and the unit of 4 k, in the tile
    Pack<float, 4> held[COUNT];

    __device__ __forceinline__ SingleLoader(const float *b, long long count, long long stride_, long long first,
                                            long long k, long long end)
        : stride(stride_) {
        const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
        row = BY_K ? thread / LINES : warp / 2 * 32 + lane / 4 * 4;
        unit = BY_K ? thread % LINES : warp % 2 * 4 + lane % 4;
        const long long before = first + row;
        rows = static_cast<int>(count - before < Room::N ? count - before : Room::N);
        pointer = b + (BY_K ? before * stride + 4 * unit : 4 * unit * stride + before);
        const float *from = pointer + (BY_K ? k : k * stride);
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) fetch(i, from, end - k);
    }
    __device__ __forceinline__ void copy(char *tile, int, long long k, long long end) {
        const long long next = k + Room::STEP;
        const float *from = pointer + (BY_K ? next : next * stride);
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float values[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) values[e] = BY_K ? held[i + j].lane[e] : held[i + e].lane[j];
                Room::store(tile, row + (BY_K ? (i + j) * VECTOR_ROWS : i / 4 * FOUR_ROWS + j), unit, values);
            }
            fetch(i, from, end - next);
        }
    }

private:
    // The i-th vector on; from: to the first one, or where k is contiguous this one, which it leaves at the next. depth: what
    // there still is of k.
    __device__ __forceinline__ void fetch(int i, const float *&from, long long depth) {
        const int there = static_cast<int>(depth < Room::STEP ? depth : Room::STEP) - 4 * unit;   // from the unit on
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int further = BY_K ? (i + j) * VECTOR_ROWS : i / 4 * FOUR_ROWS;
            held[i + j] = {};
            if (further < rows && (BY_K ? 0 : j) < there) held[i + j] = load<4>(BY_K ? from : from + j * stride + further);
            if constexpr (BY_K) from += VECTOR_ROWS * stride;
        }
    }
};

template <class Math, int N, bool LEFT_BY_K, bool RIGHT_BY_K>
__global__ void __launch_bounds__(WGMMA_THREADS, 1)
matmul_wgmma_single(const float *__restrict__ a, const float *__restrict__ b, float *__restrict__ c,
                    float *__restrict__ partial, const float *__restrict__ bias, float slope, const Gemm it) {
    using Room = SingleRoom<Math, N, LEFT_BY_K>;
    using Left = LeanLineLoader<float, typename Room::Left, WGMMA_ROWS, LEFT_BY_K>;
    __shared__ unsigned long long filled[FILLING], emptied[FILLING];
    const GemmBlock block(it, WGMMA_ROWS, N);
    const Stages stages{filled, emptied};
    if (threadIdx.x == 0) stages.make(Room::STORES);
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        // with 136 the compiler spills some in this order, with 128 in the others
        give_registers_up<Room::PARTS == 1 && !LEFT_BY_K && RIGHT_BY_K ? 128 : Room::BRINGER_REGISTERS>();
        const Left left{a + block.left, it.m, LEFT_BY_K ? it.a_row : it.a_k, block.first_row};
        SingleLoader<Room, RIGHT_BY_K> right(b + block.right, it.n, RIGHT_BY_K ? it.b_column : it.b_k,
                                             block.first_column, block.begin, block.end);
        bring<Room>(left, right, stages, block.begin, block.end);
    } else {
        take_registers<Room::MULTIPLIER_REGISTERS>();
        float sums[N / 2];
        multiply_single<Room>(sums, stages, block.begin, block.end);
        const MatrixResult<float, float, Finish<float>> result{
            c + block.result, partial ? partial + block.sums : nullptr, it.m, it.n, block.first_row,
            block.first_column, it.vectors, {bias, slope, it.code}};
        store_multiplied<Room>(sums, result);
    }
}

// Of a right operand that gemm_laid.cu has laid out: parts that are all its rows apart.
template <class Room> struct LaidLoader {
    LineLoader<float, typename Room::Right, Room::N, true> lines;
    long long apart;

    __device__ __forceinline__ void copy(char *tile, int thread, long long k, long long end) const {
        auto part = lines;
#pragma unroll
        for (int i = 0; i < Room::PARTS; ++i) {
            part.copy(tile + i * Room::Right::BYTES, thread, k, end);
            part.pointer += apart;
        }
    }
};

template <class Math, int N, bool LEFT_BY_K>
__global__ void __launch_bounds__(WGMMA_THREADS, 1)
matmul_wgmma_laid(const float *__restrict__ a, const float *__restrict__ b, float *__restrict__ c,
                  float *__restrict__ partial, const float *__restrict__ bias, float slope, const Gemm it) {
    using Room = SingleRoom<Math, N, LEFT_BY_K, true>;
    __shared__ unsigned long long filled[FILLING], emptied[FILLING];
    const GemmBlock block(it, WGMMA_ROWS, N);
    const Stages stages{filled, emptied};
    if (threadIdx.x == 0) stages.make(Room::STORES);
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        give_registers_up<Room::BRINGER_REGISTERS>();
        const LineLoader<float, typename Room::Left, WGMMA_ROWS, LEFT_BY_K> left(
            a + block.left, it.m, LEFT_BY_K ? it.a_row : it.a_k, block.first_row);
        const LaidLoader<Room> right{{b + block.right, it.n, it.depth, block.first_column}, it.n * it.depth};
        bring<Room>(left, right, stages, block.begin, block.end);
    } else {
        take_registers<Room::MULTIPLIER_REGISTERS>();
        float sums[N / 2];
        multiply_single<Room>(sums, stages, block.begin, block.end);
        const MatrixResult<float, float, Finish<float>> result{
            c + block.result, partial ? partial + block.sums : nullptr, it.m, it.n, block.first_row,
            block.first_column, it.vectors, {bias, slope, it.code}};
        store_multiplied<Room>(sums, result);
    }
}

}   // namespace tilewise
