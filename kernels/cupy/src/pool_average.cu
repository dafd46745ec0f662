// Averages of windows and bins: a thread for each unit of the result; global ones: a warp, a block.
//
// Where a window is the whole image there are too few results for a thread each: for NCHW the lanes of a warp, or the
// threads of a block, share a plane; for NHWC the threads of a block share the pixels.
#include "pool_windows.cuh"
#include "reduction.cuh"

namespace tilewise {

// SIDE: 2 or 3 for windows whose taps are all loaded at once where none lies outside of the image, or 0.
// divisor: 0 where it depends on the window. count: units of the result.
template <class T, int N, int SIDE, class Index>
__global__ void __launch_bounds__(THREADS, 1)
avg_pool(const T *__restrict__ x, T *__restrict__ y, Sum<T> divisor, long long count, const Windows windows) {
    const Index i = Index(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= count) return;
    const Index height = windows.height, width = windows.width, units = windows.units;
    Index image = i;
    const Index unit = take_axis(image, units), column = take_axis(image, Index(windows.columns)),
                row = take_axis(image, Index(windows.rows));
    const Range<Index> h = window_of_row(row, windows), w = window_of_column(column, windows);
    const T *const origin = x + (image * height * width * units + unit) * N;
    const auto tap = [&](Index a, Index b) { return load<N>(origin + (a * width + b) * units * N); };

    Sum<T> sums[N] = {};
    const auto add = [&](const Pack<T, N> &values) {
#pragma unroll
        for (int k = 0; k < N; ++k) sums[k] += widen(values.lane[k]);
    };
    if (SIDE > 0 && h.size() == SIDE && w.size() == SIDE) {
        constexpr int TAPS = SIDE > 0 ? SIDE * SIDE : 1, ACROSS = SIDE > 0 ? SIDE : 1;
        Pack<T, N> taps[TAPS];
#pragma unroll
        for (int t = 0; t < TAPS; ++t) taps[t] = tap(h.first + t / ACROSS, w.first + t % ACROSS);
#pragma unroll
        for (int t = 0; t < TAPS; ++t) add(taps[t]);
    } else {
        for (Index a = h.first; a < h.end; ++a)
            for (Index b = w.first; b < w.end; ++b) add(tap(a, b));
    }
    if (divisor == 0) divisor = extent_of_row(row, windows) * extent_of_column(column, windows);
    Pack<T, N> result;
#pragma unroll
    for (int k = 0; k < N; ++k) result.lane[k] = narrow<T>(sums[k] / divisor);
    store(y + i * N, result);
}

// y[p] = the average of the plane p, which has `vectors` whole vectors of 16 bytes, and the rest in elements (all of them
// where it does not begin at a multiple of 16 bytes). `group` threads for each: a warp, or the block.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
average_of_planes(const T *__restrict__ x, T *__restrict__ y, long long planes, long long plane, long long vectors,
                  int group) {
    constexpr int N = LANES<T>;
    __shared__ Sum<T> scratch[WARPS];
    const int thread = threadIdx.x, member = thread & (group - 1);
    const long long which = static_cast<long long>(blockIdx.x) * (THREADS / group) + thread / group;
    Sum<T> total = 0;
    if (which < planes) {
        const T *const first = x + which * plane;
        for (long long v = member; v < vectors; v += group) {
            const Pack<T, N> values = load<N>(first + v * N);
#pragma unroll
            for (int k = 0; k < N; ++k) total += widen(values.lane[k]);
        }
        for (long long i = vectors * N + member; i < plane; i += group) total += widen(first[i]);
    }
    total = group == 32 ? group_sum(total, 32) : block_sum(total, scratch);
    if (member == 0 && which < planes) y[which] = narrow<T>(total / static_cast<Sum<T>>(plane));
}

// y[image, c] = the average of x[image, :, c]. Block (image, tile): `span` units of channels, `rows` pixels at a time.
template <class T, int N>
__global__ void __launch_bounds__(THREADS, 1)
average_of_rows(const T *__restrict__ x, T *__restrict__ y, long long pixels, long long channels, int span, int rows) {
    __shared__ Sum<T> scratch[THREADS * N];
    const int thread = threadIdx.x, row = thread / span;
    const long long begin = static_cast<long long>(blockIdx.y) * span * N, channel = begin + thread % span * N;
    const long long image = blockIdx.x;
    Sum<T> sums[N] = {};
    if (row < rows && channel < channels) {
        const T *const first = x + image * pixels * channels + channel;
        for (long long pixel = row; pixel < pixels; pixel += rows) {
            const Pack<T, N> values = load<N>(first + pixel * channels);
#pragma unroll
            for (int k = 0; k < N; ++k) sums[k] += widen(values.lane[k]);
        }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) scratch[thread * N + k] = sums[k];
    __syncthreads();
    for (int c = thread; c < span * N && begin + c < channels; c += THREADS) {
        Sum<T> total = scratch[c];
        for (int other = 1; other < rows; ++other) total += scratch[other * span * N + c];
        y[image * channels + begin + c] = narrow<T>(total / static_cast<Sum<T>>(pixels));
    }
}

}   // namespace tilewise
