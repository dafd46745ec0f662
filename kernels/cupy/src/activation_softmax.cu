// softmax and log_softmax, along any axis:
//
//     softmax(x) = exp(x - m) / s,  log_softmax(x) = x - m - log(s),  m = max(x),  s = sum(exp(x - m))
//
// Where the axis is the last, a row lies in one piece. Short rows are read once: a group of lanes, at most a warp, has the
// row in its registers. A long row is a block's, which reads it twice (m and s together, then the results; the second
// time from a cache). Along another axis neighbouring lanes take neighbouring columns, and a block's threads share the
// axis.
#include "softmax.cuh"

namespace tilewise {

constexpr int SHORT = 8;   // softmax_plan.py's: units of a row that a lane has in its registers

// Rows of n <= SHORT * group units; `group` lanes for each.
template <class T, int N, bool LOG>
__global__ void __launch_bounds__(THREADS, 1)
softmax_short_rows(const T *__restrict__ x, T *__restrict__ y, long long rows, int n, int group) {
    const ShortRow<N> row(rows, n, group);
    Sum<T> values[SHORT][N], largest = minus_infinity<Sum<T>>(), total = 0;
#pragma unroll
    for (int k = 0; k < SHORT; ++k)
        if (row.has(k)) {
            const Pack<T, N> pack = load<N>(x + row.place(k));
#pragma unroll
            for (int i = 0; i < N; ++i) {
                values[k][i] = widen(pack.lane[i]);
                largest = maximum(largest, values[k][i]);
            }
        }
    largest = group_max(largest, group);
#pragma unroll
    for (int k = 0; k < SHORT; ++k)
        if (row.has(k)) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const Sum<T> shifted = values[k][i] - largest, e = exp(shifted);
                total += e;
                values[k][i] = LOG ? shifted : e;
            }
        }
    total = group_sum(total, group);
    const Sum<T> scale = LOG ? 1 : 1 / total, shift = LOG ? log(total) : 0;
#pragma unroll
    for (int k = 0; k < SHORT; ++k)
        if (row.has(k)) {
            Pack<T, N> pack;
#pragma unroll
            for (int i = 0; i < N; ++i) pack.lane[i] = narrow<T>(values[k][i] * scale - shift);
            store(y + row.place(k), pack);
        }
}

// A block a row of n, of which `vectors` of 16 bytes are taken as such.
template <class T, bool LOG>
__global__ void __launch_bounds__(THREADS, 1)
softmax_long_rows(const T *__restrict__ x, T *__restrict__ y, long long n, long long vectors) {
    constexpr int N = LANES<T>;
    __shared__ Sum<T> scratch[WARPS];
    const T *const from = x + blockIdx.x * n;
    T *const to = y + blockIdx.x * n;
    RunningSum<Sum<T>> sum;
    for (long long v = threadIdx.x; v < vectors; v += THREADS) {
        const Pack<T, N> values = load<N>(from + v * N);
        sum.template add<N>([&](int i) { return widen(values.lane[i]); });
    }
    for (long long i = vectors * N + threadIdx.x; i < n; i += THREADS)
        sum.template add<1>([&](int) { return widen(from[i]); });
    const Sum<T> top = block_max(sum.largest, scratch);
    sum.rise_to(top);
    const Sum<T> total = block_sum(sum.total, scratch);
    const Sum<T> scale = 1 / total, shift = log(total);
    const auto result = [&](T value) {
        const Sum<T> shifted = widen(value) - top;
        return narrow<T>(LOG ? shifted - shift : exp(shifted) * scale);
    };
    for (long long v = threadIdx.x; v < vectors; v += THREADS) {
        Pack<T, N> values = load<N>(from + v * N);
#pragma unroll
        for (int i = 0; i < N; ++i) values.lane[i] = result(values.lane[i]);
        store(to + v * N, values);
    }
    for (long long i = vectors * N + threadIdx.x; i < n; i += THREADS) to[i] = result(from[i]);
}

template <class T, bool LOG>
__global__ void __launch_bounds__(THREADS, 1)
softmax_columns(const T *__restrict__ x, T *__restrict__ y, long long n, long long inner, int tiles, int columns) {
    __shared__ Sum<T> maxima[THREADS];
    __shared__ Sum<T> sums[THREADS];
    const ColumnShare share(n, inner, tiles, columns);
    RunningSum<Sum<T>> sum;
    for (long long k = share.member; k < share.end; k += share.group)
        sum.template add<1>([&](int) { return widen(x[share.first + k * inner]); });
    maxima[threadIdx.x] = sum.largest;
    sums[threadIdx.x] = sum.total;
    __syncthreads();
    Sum<T> top = minus_infinity<Sum<T>>(), total = 0;
    for (int k = share.slot; k < THREADS; k += columns) top = maximum(top, maxima[k]);
    for (int k = share.slot; k < THREADS; k += columns)
        total += maxima[k] == top ? sums[k] : sums[k] * exp(maxima[k] - top);
    const Sum<T> scale = 1 / total, shift = log(total);
    for (long long k = share.member; k < share.end; k += share.group) {
        const long long place = share.first + k * inner;
        const Sum<T> shifted = widen(x[place]) - top;
        y[place] = narrow<T>(LOG ? shifted - shift : exp(shifted) * scale);
    }
}

}   // namespace tilewise
