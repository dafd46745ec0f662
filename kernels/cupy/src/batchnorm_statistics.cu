// The statistics of batch normalisation: one read of x.
//
// Sums of d = x - shift and of d^2 for each channel, where the shift is the channel's first element:
//
//     mean = shift + S1 / M,  var = S2 / M - (S1 / M)^2
//
// A thread adds up a few elements at a time around their own mean, in the type that it computes in, and moves these sums
// to the common shift in double; so neither a mean of 1e4 nor an outlier in the first element costs digits, and double,
// slow on many devices, has a fraction of the work. Parts are combined in a fixed order.
#include "channel_sums.cuh"

namespace tilewise {

constexpr int PLANE_UNITS = 4;   // units of a plane that a thread loads at once
constexpr int ROW_UNITS = 8;     // rows at once: a channel has one element of each, and a sum in double for all of them

struct Moments {
    double first = 0, second = 0;

    // Adds COUNT numbers, get(0), get(1), ...
    template <int COUNT, class S, class Get> __device__ __forceinline__ void add(S shift, Get get) {
        S pivot = 0;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) pivot += get(i);
        pivot /= COUNT;
        S s = 0, q = 0;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const S d = get(i) - pivot;
            s += d;
            q += d * d;
        }
        const double by = static_cast<double>(pivot) - static_cast<double>(shift), moved = s + COUNT * by;
        first += moved;
        second += q + by * (s + moved);
    }
};

template <class T, int N>
__global__ void __launch_bounds__(THREADS, 1)
sums_of_planes(const T *__restrict__ x, double *__restrict__ sums, long long images, long long channels,
               long long units, int parts) {
    __shared__ double scratch[WARPS];
    PlaneWalk walk(images, channels, units, parts);
    const Sum<T> shift = widen(x[walk.channel * units * N]);
    Moments moments;
    while (walk.has(PLANE_UNITS)) {
        Pack<T, N> values[PLANE_UNITS];
#pragma unroll
        for (int u = 0; u < PLANE_UNITS; ++u) values[u] = load<N>(x + walk.next() * N);
        moments.template add<PLANE_UNITS * N>(shift, [&](int i) { return widen(values[i / N].lane[i % N]); });
    }
    while (walk.has(1)) {
        const Pack<T, N> values = load<N>(x + walk.next() * N);
        moments.template add<N>(shift, [&](int i) { return widen(values.lane[i]); });
    }
    store_plane_sums(moments.first, moments.second, sums, walk, parts, scratch);
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS, 1)
sums_of_rows(const T *__restrict__ x, double *__restrict__ sums, long long pixels, long long channels, int span,
             int rows, int parts) {
    __shared__ double scratch[THREADS * N];
    RowWalk<N> walk(pixels, channels, span, rows, parts);
    Sum<T> shifts[N];
#pragma unroll
    for (int k = 0; k < N; ++k) shifts[k] = widen(x[walk.channel_or_first(k)]);
    Moments moments[N];
    while (walk.has(ROW_UNITS)) {
        Pack<T, N> values[ROW_UNITS];
#pragma unroll
        for (int u = 0; u < ROW_UNITS; ++u) values[u] = load<N>(x + walk.next());
#pragma unroll
        for (int k = 0; k < N; ++k)
            moments[k].template add<ROW_UNITS>(shifts[k], [&](int u) { return widen(values[u].lane[k]); });
    }
    while (walk.has(1)) {
        const Pack<T, N> values = load<N>(x + walk.next());
#pragma unroll
        for (int k = 0; k < N; ++k) moments[k].template add<1>(shifts[k], [&](int) { return widen(values.lane[k]); });
    }
    double first[N], second[N];
#pragma unroll
    for (int k = 0; k < N; ++k) first[k] = moments[k].first, second[k] = moments[k].second;
    store_row_sums(first, sums, walk, parts, scratch);
    store_row_sums(second, sums + channels * parts, walk, parts, scratch);
}

// From the parts' sums: mean, invstd, the running statistics, and `table` (3, channels): centre, scale, offset. A warp
// for each channel. values: M. apart: elements from a channel's first element to the next one's.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
batch_norm_finish(const T *__restrict__ x, const double *__restrict__ sums, const T *__restrict__ weight,
                  const T *__restrict__ bias, T *running_mean, T *running_var, T *__restrict__ mean,
                  T *__restrict__ invstd, Sum<T> *__restrict__ table, Sum<T> momentum, Sum<T> eps, long long channels,
                  long long values, long long apart, int parts) {
    const long long channel = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
    const bool mine = channel < channels;
    double first = sum_of_parts(mine ? sums + channel * parts : nullptr, parts);
    const double second = sum_of_parts(mine ? sums + (channels + channel) * parts : nullptr, parts);
    if (threadIdx.x % 32 != 0 || !mine) return;
    double average = 0, variance = 0;
    if (values > 0) {
        first /= values;
        average = widen(x[channel * apart]) + first;
        variance = second / values - first * first;
        if (variance < 0) variance = 0;   // rounded
    }
    if (running_mean && values > 0) {
        const double old_mean = widen(running_mean[channel]), old_var = widen(running_var[channel]);
        const double unbiased = variance * (static_cast<double>(values) / static_cast<double>(values - 1));
        running_mean[channel] = narrow<T>(static_cast<Sum<T>>(old_mean + momentum * (average - old_mean)));
        running_var[channel] = narrow<T>(static_cast<Sum<T>>(old_var + momentum * (unbiased - old_var)));
    }
    const double deviation = 1 / sqrt(variance + eps);
    const double scale = weight ? deviation * widen(weight[channel]) : deviation;
    const double offset = bias ? static_cast<double>(widen(bias[channel])) : 0.0;
    const Sum<T> centre = average;
    mean[channel] = narrow<T>(centre);
    invstd[channel] = narrow<T>(static_cast<Sum<T>>(deviation));
    table[channel] = centre;
    table[channels + channel] = scale;
    table[2 * channels + channel] = (centre - average) * scale + offset;
}

}   // namespace tilewise
