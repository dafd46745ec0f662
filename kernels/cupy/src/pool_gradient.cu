// The gradients of pooling, as a gather: every pixel adds up what it gets from the windows that cover it.
//
// Nothing is added to memory, so there are no atomics, and the order of the sum is that of the windows. A maximum's
// gradient goes to a pixel from those of its windows whose index is the pixel's. A thread takes a unit of channels (NHWC)
// or 16 bytes of a row (NCHW), where from column to column the windows move on without a division.
#include "pool_windows.cuh"

namespace tilewise {

template <int N> __device__ __forceinline__ void load_indices(const long long *from, long long (&where)[N]) {
    if constexpr (N == 1) {
        where[0] = *from;
    } else {
#pragma unroll
        for (int k = 0; k < N; k += 2) {
            const Pack<long long, 2> two = load<2>(from + k);
            where[k] = two.lane[0];
            where[k + 1] = two.lane[1];
        }
    }
}

// count: units of the result.
template <class T, int N, class Index>
__global__ void __launch_bounds__(THREADS, 1)
max_pool_backward(const T *__restrict__ grad, const long long *__restrict__ indices, T *__restrict__ result,
                  long long count, const Windows windows) {
    const Index i = Index(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= count) return;
    const Index units = windows.units;
    Index image = i;
    const Index unit = take_axis(image, units), w = take_axis(image, Index(windows.width)),
                h = take_axis(image, Index(windows.height));
    const long long pixel = h * Index(windows.width) + w;
    const Range<Index> rows = rows_covering(h, windows), columns = columns_covering(w, windows);
    Sum<T> sums[N] = {};
    for (Index row = rows.first; row < rows.end; ++row)
        for (Index column = columns.first; column < columns.end; ++column) {
            const Index place = (((image * Index(windows.rows) + row) * Index(windows.columns) + column) * units + unit) * N;
            const Pack<T, N> values = load<N>(grad + place);
            long long where[N];
            load_indices(indices + place, where);
#pragma unroll
            for (int k = 0; k < N; ++k)
                if (where[k] == pixel) sums[k] += widen(values.lane[k]);
        }
    Pack<T, N> narrowed;
#pragma unroll
    for (int k = 0; k < N; ++k) narrowed.lane[k] = narrow<T>(sums[k]);
    store(result + i * N, narrowed);
}

// divisor: 0 where it depends on the window.
template <class T, class Index>
__device__ __forceinline__ Sum<T> divisor_of(Sum<T> divisor, Index row, Index column, const Windows &windows) {
    if (divisor != 0) return divisor;
    return static_cast<Sum<T>>(extent_of_row(row, windows) * extent_of_column(column, windows));
}

template <class T, int N, class Index>
__global__ void __launch_bounds__(THREADS, 1)
avg_pool_backward(const T *__restrict__ grad, T *__restrict__ result, Sum<T> divisor, long long count,
                  const Windows windows) {
    const Index i = Index(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= count) return;
    const Index units = windows.units;
    Index image = i;
    const Index unit = take_axis(image, units), w = take_axis(image, Index(windows.width)),
                h = take_axis(image, Index(windows.height));
    const Range<Index> rows = rows_covering(h, windows), columns = columns_covering(w, windows);
    Sum<T> sums[N] = {};
    for (Index row = rows.first; row < rows.end; ++row)
        for (Index column = columns.first; column < columns.end; ++column) {
            const Index place = (((image * Index(windows.rows) + row) * Index(windows.columns) + column) * units + unit) * N;
            const Pack<T, N> values = load<N>(grad + place);
            const Sum<T> by = divisor_of<T>(divisor, row, column, windows);
#pragma unroll
            for (int k = 0; k < N; ++k) sums[k] += widen(values.lane[k]) / by;
        }
    Pack<T, N> narrowed;
#pragma unroll
    for (int k = 0; k < N; ++k) narrowed.lane[k] = narrow<T>(sums[k]);
    store(result + i * N, narrowed);
}

// ---- NCHW: 16 bytes of a row to a thread. total(row, column, w): what a window gives to the column w.

template <class T, class Index, class Add>
__device__ __forceinline__ void gather_columns(T *result, long long groups, Index across, int whole,
                                               const Windows &windows, Add add) {
    constexpr int N = LANES<T>;
    Index i = Index(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= groups) return;
    const Index width = windows.width;
    const Index first = take_axis(i, across) * N, line = i, h = take_axis(i, Index(windows.height)), plane = i;
    const Range<Index> rows = rows_covering(h, windows);
    Range<Index> columns = columns_covering(first, windows);
    Pack<T, N> values;
#pragma unroll
    for (int k = 0; k < N; ++k) {
        if (k > 0) columns = columns_covering_next(columns, Index(first + k), windows);
        Sum<T> total = 0;
        for (Index row = rows.first; row < rows.end; ++row)
            for (Index column = columns.first; column < columns.end; ++column) {
                const Index place = (plane * Index(windows.rows) + row) * Index(windows.columns) + column;
                total = add(total, place, row, column, Index(h * width + first + k));
            }
        values.lane[k] = narrow<T>(total);
    }
    T *const to = result + line * width + first;
    if (whole) {
        store(to, values);
    } else {
#pragma unroll
        for (int k = 0; k < N; ++k)
            if (first + k < width) to[k] = values.lane[k];
    }
}

// across: groups of 16 bytes in a row of the result; groups: all of them. whole: rows are made of whole ones.
template <class T, class Index>
__global__ void __launch_bounds__(THREADS, 1)
max_pool_backward_columns(const T *__restrict__ grad, const long long *__restrict__ indices, T *__restrict__ result,
                          long long groups, long long across, int whole, const Windows windows) {
    const auto add = [&](Sum<T> total, Index place, Index, Index, Index pixel) {
        return indices[place] == pixel ? total + widen(grad[place]) : total;
    };
    gather_columns(result, groups, Index(across), whole, windows, add);
}

template <class T, class Index>
__global__ void __launch_bounds__(THREADS, 1)
avg_pool_backward_columns(const T *__restrict__ grad, T *__restrict__ result, Sum<T> divisor, long long groups,
                          long long across, int whole, const Windows windows) {
    const auto add = [&](Sum<T> total, Index place, Index row, Index column, Index) {
        return total + widen(grad[place]) / divisor_of<T>(divisor, row, column, windows);
    };
    gather_columns(result, groups, Index(across), whole, windows, add);
}

}   // namespace tilewise
