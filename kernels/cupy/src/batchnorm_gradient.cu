// The gradient of batch normalisation:
//
//     grad_bias = sum(grad),  grad_weight = sum(grad * (x - mean)) * invstd
//     grad_x = scale * (grad - a - (x - mean) * b),  a = grad_bias / M,  b = grad_weight * invstd / M     in training
//     grad_x = scale * grad                                                            with frozen statistics
//
// Two reads of grad and x and one write; with frozen statistics grad_x needs no x. Parts of the sums are added in double
// and combined in a fixed order, as in batchnorm_statistics.cu.
#include "batchnorm.cuh"
#include "channel_sums.cuh"

namespace tilewise {

constexpr int PLANE_UNITS = 4;   // units at once, of both operands
constexpr int ROW_UNITS = 4;     // rows at once, of both

struct Products {
    double first = 0, second = 0;

    // Adds COUNT pairs of a gradient and an x - mean.
    template <int COUNT, class S, class Grad, class Centred>
    __device__ __forceinline__ void add(Grad grad, Centred centred) {
        S s = 0, p = 0;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const S g = grad(i);
            s += g;
            p += g * centred(i);
        }
        first += s;
        second += p;
    }
};

template <class T, int N>
__global__ void __launch_bounds__(THREADS, 1)
gradient_sums_of_planes(const T *__restrict__ grad, const T *__restrict__ x, const T *__restrict__ mean,
                        double *__restrict__ sums, long long images, long long channels, long long units, int parts) {
    __shared__ double scratch[WARPS];
    PlaneWalk walk(images, channels, units, parts);
    const Sum<T> centre = widen(mean[walk.channel]);
    Products products;
    while (walk.has(PLANE_UNITS)) {
        Pack<T, N> grads[PLANE_UNITS], values[PLANE_UNITS];
#pragma unroll
        for (int u = 0; u < PLANE_UNITS; ++u) {
            const long long place = walk.next() * N;
            grads[u] = load<N>(grad + place);
            values[u] = load<N>(x + place);
        }
        products.template add<PLANE_UNITS * N, Sum<T>>([&](int i) { return widen(grads[i / N].lane[i % N]); },
                                              [&](int i) { return widen(values[i / N].lane[i % N]) - centre; });
    }
    while (walk.has(1)) {
        const long long place = walk.next() * N;
        const Pack<T, N> grads = load<N>(grad + place), values = load<N>(x + place);
        products.template add<N, Sum<T>>([&](int i) { return widen(grads.lane[i]); },
                                [&](int i) { return widen(values.lane[i]) - centre; });
    }
    store_plane_sums(products.first, products.second, sums, walk, parts, scratch);
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS, 1)
gradient_sums_of_rows(const T *__restrict__ grad, const T *__restrict__ x, const T *__restrict__ mean,
                      double *__restrict__ sums, long long pixels, long long channels, int span, int rows, int parts) {
    __shared__ double scratch[THREADS * N];
    RowWalk<N> walk(pixels, channels, span, rows, parts);
    Sum<T> means[N];
#pragma unroll
    for (int k = 0; k < N; ++k) means[k] = widen(mean[walk.channel_or_first(k)]);
    Products products[N];
    while (walk.has(ROW_UNITS)) {
        Pack<T, N> grads[ROW_UNITS], values[ROW_UNITS];
#pragma unroll
        for (int u = 0; u < ROW_UNITS; ++u) {
            const long long place = walk.next();
            grads[u] = load<N>(grad + place);
            values[u] = load<N>(x + place);
        }
#pragma unroll
        for (int k = 0; k < N; ++k)
            products[k].template add<ROW_UNITS, Sum<T>>([&](int u) { return widen(grads[u].lane[k]); },
                                               [&](int u) { return widen(values[u].lane[k]) - means[k]; });
    }
    while (walk.has(1)) {
        const long long place = walk.next();
        const Pack<T, N> grads = load<N>(grad + place), values = load<N>(x + place);
#pragma unroll
        for (int k = 0; k < N; ++k)
            products[k].template add<1, Sum<T>>([&](int) { return widen(grads.lane[k]); },
                                       [&](int) { return widen(values.lane[k]) - means[k]; });
    }
    double first[N], second[N];
#pragma unroll
    for (int k = 0; k < N; ++k) first[k] = products[k].first, second[k] = products[k].second;
    store_row_sums(first, sums, walk, parts, scratch);
    store_row_sums(second, sums + channels * parts, walk, parts, scratch);
}

// From the parts' sums: grad_weight, grad_bias and `table` (3, channels): scale, a, b. A warp for each channel.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
batch_norm_backward_finish(const T *__restrict__ invstd, const double *__restrict__ sums, const T *__restrict__ weight,
                           T *__restrict__ grad_weight, T *__restrict__ grad_bias, Sum<T> *__restrict__ table,
                           long long channels, long long values, int parts) {
    const long long channel = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
    const bool mine = channel < channels;
    const double first = sum_of_parts(mine ? sums + channel * parts : nullptr, parts);
    const double products = sum_of_parts(mine ? sums + (channels + channel) * parts : nullptr, parts);
    if (threadIdx.x % 32 != 0 || !mine) return;
    const double count = values > 1 ? values : 1;
    const Sum<T> deviation = widen(invstd[channel]);
    const double second = products * deviation;
    grad_bias[channel] = narrow<T>(static_cast<Sum<T>>(first));
    grad_weight[channel] = narrow<T>(static_cast<Sum<T>>(second));
    table[channel] = weight ? deviation * widen(weight[channel]) : deviation;
    table[channels + channel] = first / count;
    table[2 * channels + channel] = second * deviation / count;
}

// Of a channel. TRAINING: else the statistics are frozen.
template <class S, bool TRAINING> struct Slope {
    S mean, scale, a, b;
    __device__ __forceinline__ S operator()(S grad, S x) const {
        return TRAINING ? (grad - a - (x - mean) * b) * scale : grad * scale;
    }
};

template <bool TRAINING, class T>
__device__ __forceinline__ Slope<Sum<T>, TRAINING> slope_of(const Sum<T> *table, const T *mean, long long channel,
                                                            long long channels) {
    return {widen(mean[channel]), table[channel], table[channels + channel], table[2 * channels + channel]};
}

// NCHW; planes as in batch_norm_planes.
template <class T, bool TRAINING>
__global__ void __launch_bounds__(THREADS, 1)
batch_norm_backward_planes(const T *__restrict__ grad, const T *__restrict__ x, T *__restrict__ result,
                           const T *__restrict__ mean, const Sum<T> *__restrict__ table, long long planes,
                           long long channels, long long plane, long long vectors, int group, int chunks) {
    constexpr int N = LANES<T>;
    const PlaneShare share(group, chunks);
    if (share.plane >= planes) return;
    const Slope<Sum<T>, TRAINING> slope = slope_of<TRAINING>(table, mean, share.plane % channels, channels);
    const long long first = share.plane * plane;
    for (long long v = share.start; v < vectors; v += share.step) {
        const long long place = first + v * N;
        Pack<T, N> grads = load<N>(grad + place), values = {};
        if (TRAINING) values = load<N>(x + place);
#pragma unroll
        for (int k = 0; k < N; ++k) grads.lane[k] = narrow<T>(slope(widen(grads.lane[k]), widen(values.lane[k])));
        store(result + place, grads);
    }
    for (long long i = first + vectors * N + share.start; i < first + plane; i += share.step)
        result[i] = narrow<T>(slope(widen(grad[i]), TRAINING ? widen(x[i]) : Sum<T>(0)));
}

// NHWC.
template <class T, int N, bool TRAINING>
__global__ void __launch_bounds__(THREADS, 1)
batch_norm_backward_rows(const T *__restrict__ grad, const T *__restrict__ x, T *__restrict__ result,
                         const T *__restrict__ mean, const Sum<T> *__restrict__ table, long long pixels,
                         long long channels, int span, int rows) {
    const RowShare<N> share(channels, span, rows);
    if (!share.any) return;
    Slope<Sum<T>, TRAINING> slopes[N];
#pragma unroll
    for (int k = 0; k < N; ++k) slopes[k] = slope_of<TRAINING>(table, mean, share.channel + k, channels);
    for (long long pixel = share.pixel; pixel < pixels; pixel += share.step) {
        const long long place = pixel * channels + share.channel;
        Pack<T, N> grads = load<N>(grad + place), values = {};
        if (TRAINING) values = load<N>(x + place);
#pragma unroll
        for (int k = 0; k < N; ++k)
            grads.lane[k] = narrow<T>(slopes[k](widen(grads.lane[k]), widen(values.lane[k])));
        store(result + place, grads);
    }
}

}   // namespace tilewise
