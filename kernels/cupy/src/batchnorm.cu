// Batch normalisation:
//
//     y = activation((x - centre) * scale + offset),  scale = weight / sqrt(var + eps)
//
// Evaluation is one read and one write of x, training another read for the statistics (batchnorm_statistics.cu).
#include "batchnorm.cuh"
#include "activation.cuh"

namespace tilewise {

// Of a channel, in registers.
template <class S> struct Coefficients {
    S centre, scale, offset;
    __device__ __forceinline__ S operator()(S x, int code, S slope) const {
        return activate((x - centre) * scale + offset, code, slope);
    }
};

// table: (3, channels), from training; null in evaluation. weight, bias: may be null.
template <class T>
__device__ __forceinline__ Coefficients<Sum<T>> coefficients(const Sum<T> *table, const T *mean, const T *var,
                                                             const T *weight, const T *bias, Sum<T> eps,
                                                             long long channel, long long channels) {
    if (table) return {table[channel], table[channels + channel], table[2 * channels + channel]};
    Sum<T> scale = 1 / sqrt(widen(var[channel]) + eps);
    if (weight) scale *= widen(weight[channel]);
    return {widen(mean[channel]), scale, bias ? widen(bias[channel]) : Sum<T>(0)};
}

// NCHW. planes: of `plane` elements, of which `vectors` whole ones of 16 bytes.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
batch_norm_planes(const T *__restrict__ x, T *__restrict__ y, const Sum<T> *__restrict__ table,
                  const T *__restrict__ mean, const T *__restrict__ var, const T *__restrict__ weight,
                  const T *__restrict__ bias, Sum<T> eps, Sum<T> slope, int code, long long planes,
                  long long channels, long long plane, long long vectors, int group, int chunks) {
    constexpr int N = LANES<T>;
    const PlaneShare share(group, chunks);
    if (share.plane >= planes) return;
    const Coefficients<Sum<T>> normalise =
        coefficients(table, mean, var, weight, bias, eps, share.plane % channels, channels);
    const T *const from = x + share.plane * plane;
    T *const to = y + share.plane * plane;
    const auto write = [&](long long v, Pack<T, N> values) {
#pragma unroll
        for (int k = 0; k < N; ++k) values.lane[k] = narrow<T>(normalise(widen(values.lane[k]), code, slope));
        store(to + v * N, values);
    };
    long long v = share.start;
    for (; v + share.step < vectors; v += 2 * share.step) {   // two loads under way
        const Pack<T, N> one = load<N>(from + v * N), other = load<N>(from + (v + share.step) * N);
        write(v, one);
        write(v + share.step, other);
    }
    if (v < vectors) write(v, load<N>(from + v * N));
    for (long long i = vectors * N + share.start; i < plane; i += share.step)
        to[i] = narrow<T>(normalise(widen(from[i]), code, slope));
}

// NHWC.
template <class T, int N>
__global__ void __launch_bounds__(THREADS, 1)
batch_norm_rows(const T *__restrict__ x, T *__restrict__ y, const Sum<T> *__restrict__ table,
                const T *__restrict__ mean, const T *__restrict__ var, const T *__restrict__ weight,
                const T *__restrict__ bias, Sum<T> eps, Sum<T> slope, int code, long long pixels, long long channels,
                int span, int rows) {
    const RowShare<N> share(channels, span, rows);
    if (!share.any) return;
    Coefficients<Sum<T>> normalise[N];
#pragma unroll
    for (int k = 0; k < N; ++k)
        normalise[k] = coefficients(table, mean, var, weight, bias, eps, share.channel + k, channels);
    const auto write = [&](long long place, Pack<T, N> values) {
#pragma unroll
        for (int k = 0; k < N; ++k) values.lane[k] = narrow<T>(normalise[k](widen(values.lane[k]), code, slope));
        store(y + place, values);
    };
    long long pixel = share.pixel;
    for (; pixel + share.step < pixels; pixel += 2 * share.step) {   // two loads under way
        const long long place = pixel * channels + share.channel, next = place + share.step * channels;
        const Pack<T, N> one = load<N>(x + place), other = load<N>(x + next);
        write(place, one);
        write(next, other);
    }
    if (pixel < pixels) {
        const long long place = pixel * channels + share.channel;
        write(place, load<N>(x + place));
    }
}

// What evaluation returns for the backward: the running mean, and 1 / sqrt(running variance + eps).
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
batch_norm_evaluated(const T *__restrict__ mean, const T *__restrict__ var, T *__restrict__ copied,
                     T *__restrict__ invstd, Sum<T> eps, long long channels) {
    const long long channel = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (channel >= channels) return;
    copied[channel] = mean[channel];
    invstd[channel] = narrow<T>(1 / sqrt(widen(var[channel]) + eps));
}

}   // namespace tilewise
