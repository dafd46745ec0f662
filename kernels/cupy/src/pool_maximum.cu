// Maxima of windows and bins: a thread for each unit of the result. The common 2 x 2 and 3 x 3 windows over units of 16
// bytes (NHWC) load all their taps at once where none lies outside of the image; pool_columns.cu has those of NCHW.
#include "pool_maximum.cuh"
#include "pool_windows.cuh"

namespace tilewise {

// Indices are flat in the plane, and fit Index as every offset does; they are stored as 64 bits.
template <int N, class Index>
__device__ __forceinline__ void store_indices(long long *to, const Index (&where)[N]) {
    if constexpr (N == 1) {
        *to = where[0];
    } else {
#pragma unroll
        for (int k = 0; k < N; k += 2) store(to + k, Pack<long long, 2>{{where[k], where[k + 1]}});
    }
}

// SIDE: as in pool_average.cu. count: units of the result. indices: null where they are not wanted (kernels for integers
// come in the form with indices only).
template <class T, int N, int SIDE, bool INDEXED, class Index>
__global__ void __launch_bounds__(THREADS, 1)
max_pool(const T *__restrict__ x, T *__restrict__ y, long long *__restrict__ indices, long long count,
         const Windows windows) {
    const Index i = Index(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= count) return;
    const Index height = windows.height, width = windows.width, units = windows.units;
    Index image = i;
    const Index unit = take_axis(image, units), column = take_axis(image, Index(windows.columns)),
                row = take_axis(image, Index(windows.rows));
    const Range<Index> h = window_of_row(row, windows), w = window_of_column(column, windows);
    const T *const origin = x + (image * height * width * units + unit) * N;
    const auto tap = [&](Index place) { return load<N>(origin + place * units * N); };

    Index where[N];
    const Index start = h.first * width + w.first;
    Pack<T, N> best = tap(start);
#pragma unroll
    for (int k = 0; k < N; ++k) where[k] = start;
    const auto take = [&](const Pack<T, N> &values, Index place) {
#pragma unroll
        for (int k = 0; k < N; ++k)
            if (wins(values.lane[k], best.lane[k])) {
                best.lane[k] = values.lane[k];
                where[k] = place;
            }
    };
    if (SIDE > 0 && h.size() == SIDE && w.size() == SIDE) {
        constexpr int TAPS = SIDE > 0 ? SIDE * SIDE : 1, ACROSS = SIDE > 0 ? SIDE : 1;
        Pack<T, N> taps[TAPS];
#pragma unroll
        for (int t = 1; t < TAPS; ++t) taps[t] = tap(start + t / ACROSS * width + t % ACROSS);
#pragma unroll
        for (int t = 1; t < TAPS; ++t) take(taps[t], start + t / ACROSS * width + t % ACROSS);
    } else {
        for (Index a = h.first; a < h.end; a += windows.dilation_h)
            for (Index b = w.first; b < w.end; b += windows.dilation_w) take(tap(a * width + b), a * width + b);
    }
    store(y + i * N, best);
    if (INDEXED && indices) store_indices(indices + i * N, where);
}

}   // namespace tilewise
