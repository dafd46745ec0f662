// Depthwise convolution (one input channel a group), bound by memory: every x is wanted by all taps, and comes from L1
// after the first. Padding is multiplied as zeros, so that it makes NaN of an infinite weight everywhere.
//
//     NCHW   a thread sums a few results below each other; threads run along the columns, so that a warp reads 128 bytes.
//            A row of x, once loaded, serves all results it meets.
//     NHWC   a thread sums COLUMNS results of the channels that 16 bytes hold; threads run along the channels. The weights
//            are turned into (tap, channel) first, and a weight, once loaded, serves all results.
#include "conv.cuh"

namespace tilewise {

constexpr int DEPTHWISE_THREADS = 128, COLUMNS = 4;

template <class T, int TAPS, int STRIDE, int RESULTS>
__global__ void __launch_bounds__(DEPTHWISE_THREADS, 1)
conv_depthwise_planes(const T *__restrict__ x, const T *__restrict__ weight, T *y, const Epilogue<T> finish, const Axis rows,
                 const Axis columns, const Steps from, const Steps to, const Filters filters, long long work) {
    long long number = static_cast<long long>(blockIdx.x) * DEPTHWISE_THREADS + threadIdx.x;
    if (number >= work) return;
    const long long j = take_axis(number, columns.count);
    const long long first = take_axis(number, divide(rows.count + RESULTS - 1, static_cast<long long>(RESULTS))) * RESULTS;
    const long long o = take_axis(number, filters.groups * filters.outputs);
    const T *const plane = x + number * from.image + divide(o, filters.outputs) * from.channel;
    const T *const own = weight + o * (TAPS * TAPS);
    Sum<T> weights[TAPS][TAPS], totals[RESULTS] = {};
#pragma unroll
    for (int p = 0; p < TAPS; ++p)
#pragma unroll
        for (int q = 0; q < TAPS; ++q)
            weights[p][q] = widen(own[(rows.first_tap + p * rows.tap_step) * TAPS + columns.first_tap + q * columns.tap_step]);
#pragma unroll
    for (int r = 0; r < (RESULTS - 1) * STRIDE + TAPS; ++r) {   // the rows of x that the results meet
        const long long row = rows.origin + first * STRIDE + r;
        Sum<T> values[TAPS];
#pragma unroll
        for (int q = 0; q < TAPS; ++q) {
            const long long column = columns.origin + j * STRIDE + q;
            const bool inside = within(row, rows.size) && within(column, columns.size);
            values[q] = inside ? widen(plane[row * from.row + column]) : Sum<T>(0);
        }
#pragma unroll
        for (int a = 0; a < RESULTS; ++a) {
            const int p = r - a * STRIDE;
            if (p >= 0 && p < TAPS)
#pragma unroll
                for (int q = 0; q < TAPS; ++q) totals[a] += values[q] * weights[p][q];
        }
    }
#pragma unroll
    for (int a = 0; a < RESULTS; ++a)
        if (first + a < rows.count) {
            const long long place = number * to.image + o * to.channel + (first + a) * to.row + j;
            y[place] = finish(totals[a], o, place);
        }
}

// y (N, ..., channels) from x (N, H, W, channels) and weight (tap, channels).
template <class T>
__global__ void __launch_bounds__(DEPTHWISE_THREADS, 1)
conv_depthwise_channels(const T *__restrict__ x, const T *__restrict__ weight, T *y, const Epilogue<T> finish,
                   const Axis rows, const Axis columns, const Steps from, const Steps to, const Filters filters,
                   long long work) {
    constexpr int N = LANES<T>;
    long long number = static_cast<long long>(blockIdx.x) * DEPTHWISE_THREADS + threadIdx.x;
    if (number >= work) return;
    const long long channels = filters.groups;
    const long long c = take_axis(number, divide(channels, static_cast<long long>(N))) * N;
    const long long j = take_axis(number, divide(columns.count + COLUMNS - 1, static_cast<long long>(COLUMNS))) * COLUMNS;
    const long long i = take_axis(number, rows.count);
    const T *const image = x + number * from.image + c;
    Sum<T> totals[COLUMNS][N] = {};
    for (long long t = 0; t < rows.taps; ++t) {
        const long long row = rows.origin + i * rows.stride + t * rows.spacing;
        for (long long u = 0; u < columns.taps; ++u) {
            const long long tap = (rows.first_tap + t * rows.tap_step) * filters.width + columns.first_tap +
                                  u * columns.tap_step;
            const Pack<T, N> weights = load<N>(weight + tap * channels + c);
#pragma unroll
            for (int b = 0; b < COLUMNS; ++b) {
                const long long column = columns.origin + (j + b) * columns.stride + u * columns.spacing;
                const bool inside = within(row, rows.size) && within(column, columns.size);
                const Pack<T, N> values =
                    inside ? load<N>(image + row * from.row + column * from.column) : Pack<T, N>{};
#pragma unroll
                for (int k = 0; k < N; ++k) totals[b][k] += widen(values.lane[k]) * widen(weights.lane[k]);
            }
        }
    }
#pragma unroll 1
    for (int b = 0; b < COLUMNS; ++b) {   // the epilogue is in the code once for a column, not for each
        if (j + b >= columns.count) break;
        const long long place = number * to.image + (rows.first + i * rows.step) * to.row +
                                (columns.first + (j + b) * columns.step) * to.column + c;
        Pack<T, N> results;
#pragma unroll
        for (int k = 0; k < N; ++k) {
            Sum<T> chosen = totals[0][k];
#pragma unroll
            for (int other = 1; other < COLUMNS; ++other) chosen = b == other ? totals[other][k] : chosen;
            results.lane[k] = finish(chosen, c + k, place + k);
        }
        store(y + place, results);
    }
}

}   // namespace tilewise
