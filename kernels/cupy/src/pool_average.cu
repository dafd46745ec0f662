// Averages of windows and bins: a thread for each unit of the result.
#include "pool_windows.cuh"

namespace tilewise {

// SIDE: 2 or 3 for windows whose taps are all loaded at once where none lies outside of the image, or 0.
// divisor: 0 where it depends on the window. count: units of the result.
template <class T, int N, int SIDE, class Index>
__global__ void __launch_bounds__(THREADS)
avg_pool(const T *__restrict__ x, T *__restrict__ y, Sum<T> divisor, long long count, const Windows windows) {
    const Index i = Index(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= count) return;
    const Index height = windows.height, width = windows.width, units = windows.units;
    Index image = i;
    const Index unit = take_axis(image, units), column = take_axis(image, Index(windows.columns)),
                row = take_axis(image, Index(windows.rows));
    const Range<Index> h =
        window(row, height, Index(windows.rows), windows.kernel_h, windows.stride_h, windows.top, 1);
    const Range<Index> w =
        window(column, width, Index(windows.columns), windows.kernel_w, windows.stride_w, windows.left, 1);
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
    if (divisor == 0)
        divisor = extent(row, height, Index(windows.rows), windows.kernel_h, windows.stride_h, windows.top,
                         windows.bottom, windows.include_pad) *
                  extent(column, width, Index(windows.columns), windows.kernel_w, windows.stride_w, windows.left,
                         windows.right, windows.include_pad);
    Pack<T, N> result;
#pragma unroll
    for (int k = 0; k < N; ++k) result.lane[k] = narrow<T>(sums[k] / divisor);
    store(y + i * N, result);
}

}   // namespace tilewise
