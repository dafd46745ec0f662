// Products of a matrix with few vectors, such as a dense layer for one image: bound by memory.
//
//     C[i, j] = activation(sum over k of big[i, k] * few[j, k] + bias)        j < FEW
//
// multiply_few: the k of `big` are contiguous. A warp takes ROWS of its rows, 512 bytes at a time; its lanes' sums are added
// by shuffles. multiply_few_across: its rows are contiguous. A lane takes 16 bytes of them, and a warp every eighth k; the
// warps' sums are added in shared memory. Of both, loads are begun a few at a time before the first is used, and with few
// blocks the depth is shared out among parts, which gemm_sums.cu adds.
#include "matrix_result.cuh"
#include "reduction.cuh"

namespace tilewise {

// gemm_plan.py's Few. The first `vectors` 16 bytes of a row are taken as such, and of few, whose k are contiguous then;
// the rest singly. part: of the depth, for blockIdx.y; of vectors where there are some.
struct FewVectors {
    long long rows, count, depth, few_stride, few_k, c_row, c_few, bias_row, bias_few, vectors, part;
};

// Where sums go: to the result, or where partial is not null to its part.
template <class T> struct FewResult {
    T *c;
    Sum<T> *partial;
    Finish<T> finish;

    __device__ __forceinline__ void put(Sum<T> total, long long row, long long j, const FewVectors &it) const {
        const long long place = row * it.c_row + j * it.c_few;
        if (partial)
            partial[blockIdx.y * it.rows * it.count + place] = total;
        else
            c[place] = finish(total, row * it.bias_row + j * it.bias_few);
    }
};

// What is beyond the last row or vector is computed from the last one's, and dropped.
template <class T, int FEW, int ROWS, int AHEAD>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 8 ? 1 : 2)
multiply_few(const T *__restrict__ big, const T *__restrict__ few, T *__restrict__ c, Sum<T> *__restrict__ partial,
             const T *__restrict__ bias, Sum<T> slope, int code, const FewVectors it) {
    constexpr int N = LANES<T>;
    const long long first = (static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32) * ROWS;
    const int lane = threadIdx.x % 32;
    if (first >= it.rows) return;
    const T *mine[ROWS], *others[FEW];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) mine[r] = big + (first + r < it.rows ? first + r : it.rows - 1) * it.depth;
#pragma unroll
    for (int j = 0; j < FEW; ++j) others[j] = few + (j < it.count ? j : it.count - 1) * it.few_stride;
    Sum<T> sums[ROWS][FEW] = {};
    const bool whole = it.vectors > 0, last = blockIdx.y + 1 == gridDim.y;
    const long long begin = blockIdx.y * it.part, end = last ? it.vectors : begin + it.part;
    if (whole) {
#pragma unroll 1
        for (long long v = begin + lane; v < end; v += 32 * AHEAD) {
            Pack<T, N> values[AHEAD][ROWS];
#pragma unroll
            for (int a = 0; a < AHEAD; ++a)
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    values[a][r] = {};
                    if (v + 32 * a < end) values[a][r] = load<N>(mine[r] + (v + 32 * a) * N);
                }
#pragma unroll
            for (int a = 0; a < AHEAD; ++a)
#pragma unroll
                for (int j = 0; j < FEW; ++j) {
                    Pack<T, N> vector = {};
                    if (v + 32 * a < end) vector = load<N>(others[j] + (v + 32 * a) * N);
#pragma unroll
                    for (int r = 0; r < ROWS; ++r)
#pragma unroll
                        for (int i = 0; i < N; ++i) sums[r][j] += widen(values[a][r].lane[i]) * widen(vector.lane[i]);
                }
        }
    }
    if (last)
        for (long long k = it.vectors * N + lane; k < it.depth; k += 32)
#pragma unroll
            for (int j = 0; j < FEW; ++j) {
                const Sum<T> other = widen(others[j][k * it.few_k]);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) sums[r][j] += widen(mine[r][k]) * other;
            }
    static_assert(ROWS * FEW <= 32, "a lane has one result");
    Sum<T> own = 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int j = 0; j < FEW; ++j) {
            const Sum<T> total = group_sum(sums[r][j], 32);
            if (lane == r * FEW + j) own = total;
        }
    const long long row = first + lane / FEW;
    if (lane < ROWS * FEW && lane % FEW < it.count && row < it.rows)
        FewResult<T>{c, partial, {bias, slope, code}}.put(own, row, lane % FEW, it);
}

// it.vectors: of 16 bytes, of the rows of a k.
template <class T, int FEW, int AHEAD>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 8 ? 1 : 2)
multiply_few_across(const T *__restrict__ big, const T *__restrict__ few, T *__restrict__ c, Sum<T> *__restrict__ partial,
                    const T *__restrict__ bias, Sum<T> slope, int code, const FewVectors it) {
    constexpr int N = LANES<T>, WIDE = 32 * N;   // rows of a block
    __shared__ Sum<T> scratch[WARPS][WIDE];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const long long vector = static_cast<long long>(blockIdx.x) * 32 + lane;
    const T *const mine = big + vector * N, *others[FEW];
#pragma unroll
    for (int j = 0; j < FEW; ++j) others[j] = few + (j < it.count ? j : it.count - 1) * it.few_stride;
    const long long begin = blockIdx.y * it.part, end = begin + it.part < it.depth ? begin + it.part : it.depth;
    Sum<T> sums[FEW][N] = {};
    if (vector < it.vectors) {
#pragma unroll 1
        for (long long k = begin + warp; k < end; k += WARPS * AHEAD) {
            Pack<T, N> values[AHEAD];
            T factors[AHEAD][FEW];
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                const long long now = k + a * WARPS;
                const bool there = now < end;
                values[a] = {};
                if (there) values[a] = load<N>(mine + now * it.rows);
#pragma unroll
                for (int j = 0; j < FEW; ++j) factors[a][j] = there ? others[j][now * it.few_k] : T{};
            }
#pragma unroll
            for (int a = 0; a < AHEAD; ++a)
#pragma unroll
                for (int j = 0; j < FEW; ++j)
#pragma unroll
                    for (int i = 0; i < N; ++i) sums[j][i] += widen(values[a].lane[i]) * widen(factors[a][j]);
        }
    }
    const FewResult<T> result{c, partial, {bias, slope, code}};
    const long long row = static_cast<long long>(blockIdx.x) * WIDE + threadIdx.x;
#pragma unroll
    for (int j = 0; j < FEW; ++j) {
        __syncthreads();   // the scratch is read
#pragma unroll
        for (int i = 0; i < N; ++i) scratch[warp][lane * N + i] = sums[j][i];
        __syncthreads();
        if (threadIdx.x < WIDE && row < it.rows && j < it.count) {
            Sum<T> total = scratch[0][threadIdx.x];
#pragma unroll
            for (int w = 1; w < WARPS; ++w) total += scratch[w][threadIdx.x];
            result.put(total, row, j, it);
        }
    }
}

}   // namespace tilewise
