// Convolution without tiles of both operands.
//
// conv_direct: by the definition, a result to a thread. Right for everything, and the yardstick of the others.
// conv_direct_few: for few channels, as in first layers. A thread sums OUTPUTS outputs of PIXELS pixels in registers; a block's
// weights lie in shared memory, from where all threads read the same ones at a time, OUTPUTS of a tap and channel side
// by side; numbers of x come from L1.
#include "conv.cuh"

namespace tilewise {

template <class T>
__global__ void __launch_bounds__(THREADS, 1)
conv_direct(const T *__restrict__ x, const T *__restrict__ weight, T *y, const Epilogue<T> finish, const Axis rows,
       const Axis columns, const Steps from, const Steps to, const Filters filters, long long size, int channels_last) {
    long long number = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (number >= size) return;
    const long long all_outputs = filters.groups * filters.outputs;
    long long o = channels_last ? take_axis(number, all_outputs) : 0;
    const long long j = take_axis(number, columns.count), i = take_axis(number, rows.count);
    if (!channels_last) o = take_axis(number, all_outputs);
    const long long group = divide(o, filters.outputs);
    const T *const image = x + number * from.image + group * filters.channels * from.channel;
    const T *const own = weight + group * filters.group_step + (o - group * filters.outputs) * filters.output_step;
    Sum<T> total = 0;
    for (long long t = 0; t < rows.taps; ++t) {
        const long long row = rows.origin + i * rows.stride + t * rows.spacing;
        for (long long u = 0; u < columns.taps; ++u) {
            const long long column = columns.origin + j * columns.stride + u * columns.spacing;
            const bool inside = within(row, rows.size) && within(column, columns.size);
            const T *const tap = own + (rows.first_tap + t * rows.tap_step) * filters.width + columns.first_tap +
                                 u * columns.tap_step;
            for (long long c = 0; c < filters.channels; ++c) {
                const Sum<T> value = inside ? widen(image[row * from.row + column * from.column + c * from.channel]) : 0;
                total += value * widen(tap[c * filters.channel_step]);
            }
        }
    }
    const long long place = (rows.first + i * rows.step) * to.row + (columns.first + j * columns.step) * to.column +
                            number * to.image + o * to.channel;
    y[place] = finish(total, o, place);
}

constexpr int FEW_THREADS = 128, PIXELS = 4;
constexpr int CHUNK = 256;   // (tap, channel) whose weights are in shared memory at a time
template <class T> constexpr int OUTPUTS = 64 / sizeof(Sum<T>);

// Block (FEW_THREADS * PIXELS pixels, OUTPUTS outputs, group). pixels: of all images. filters.channels <= CHUNK; rows and
// columns fit 32 bits.
template <class T>
__global__ void __launch_bounds__(FEW_THREADS, 2)
conv_direct_few(const T *__restrict__ x, const T *__restrict__ weight, T *y, const Epilogue<T> finish, const Axis rows,
           const Axis columns, const Steps from, const Steps to, const Filters filters, long long pixels,
           int channels_last) {
    using S = Sum<T>;
    constexpr int COUNT = OUTPUTS<T>, LANE = LANES<S>;
    alignas(16) __shared__ S weights[CHUNK * COUNT];
    __shared__ S room[FEW_THREADS * COUNT];
    const int thread = threadIdx.x, channels = static_cast<int>(filters.channels);
    const long long first_pixel = static_cast<long long>(blockIdx.x) * (FEW_THREADS * PIXELS);
    const long long first_output = static_cast<long long>(blockIdx.y) * COUNT, group = blockIdx.z;
    const int kw = static_cast<int>(columns.taps), taps = static_cast<int>(rows.taps) * kw;

    S totals[PIXELS][COUNT] = {};
    const T *images[PIXELS];
    int first_row[PIXELS], first_column[PIXELS];
#pragma unroll
    for (int p = 0; p < PIXELS; ++p) {
        const long long number = first_pixel + p * FEW_THREADS + thread;
        const Pixel pixel(number < pixels ? number : pixels - 1, rows.count, columns.count);
        images[p] = x + pixel.image * from.image + group * channels * from.channel;
        first_row[p] = static_cast<int>(rows.origin + pixel.row * rows.stride);
        first_column[p] = static_cast<int>(columns.origin + pixel.column * columns.stride);
    }
    const int at_once = CHUNK / channels;
    for (int first_tap = 0; first_tap < taps; first_tap += at_once) {
        const int some = taps - first_tap < at_once ? taps - first_tap : at_once;
        __syncthreads();
        for (int i = thread; i < some * channels * COUNT; i += FEW_THREADS) {
            const int k = i / COUNT, tap = first_tap + k / channels;
            const long long o = first_output + i % COUNT;
            const long long p = rows.first_tap + tap / kw * rows.tap_step;
            const long long q = columns.first_tap + tap % kw * columns.tap_step;
            weights[i] = o < filters.outputs
                             ? widen(weight[group * filters.group_step + o * filters.output_step +
                                            k % channels * filters.channel_step + p * filters.width + q])
                             : S(0);
        }
        __syncthreads();
        int t = first_tap / kw, u = first_tap % kw;
        const S *line = weights;
        for (int tap = 0; tap < some; ++tap) {
            const T *sources[PIXELS];
            bool inside[PIXELS];
#pragma unroll
            for (int p = 0; p < PIXELS; ++p) {
                const int row = first_row[p] + t * static_cast<int>(rows.spacing);
                const int column = first_column[p] + u * static_cast<int>(columns.spacing);
                inside[p] = within(row, rows.size) && within(column, columns.size);
                sources[p] = images[p] + row * from.row + column * from.column;
            }
            for (int c = 0; c < channels; ++c, line += COUNT) {
                S values[PIXELS];
#pragma unroll
                for (int p = 0; p < PIXELS; ++p) values[p] = inside[p] ? widen(sources[p][c * from.channel]) : S(0);
#pragma unroll
                for (int o = 0; o < COUNT; o += LANE) {
                    const Pack<S, LANE> some_weights = load<LANE>(line + o);
#pragma unroll
                    for (int k = 0; k < LANE; ++k)
#pragma unroll
                        for (int p = 0; p < PIXELS; ++p) totals[p][o + k] += values[p] * some_weights.lane[k];
                }
            }
            if (++u == kw) {
                u = 0;
                ++t;
            }
        }
    }
    // By way of shared memory, so that neighbouring threads write neighbouring numbers; the epilogue is in the code once.
#pragma unroll 1
    for (int p = 0; p < PIXELS; ++p) {
#pragma unroll
        for (int o = 0; o < COUNT; ++o) {
            S chosen = totals[0][o];
#pragma unroll
            for (int other = 1; other < PIXELS; ++other) chosen = p == other ? totals[other][o] : chosen;
            room[o * FEW_THREADS + thread] = chosen;
        }
        __syncthreads();
#pragma unroll 1
        for (int i = thread; i < FEW_THREADS * COUNT; i += FEW_THREADS) {
            const int own = channels_last ? i / COUNT : i % FEW_THREADS, k = channels_last ? i % COUNT : i / FEW_THREADS;
            const long long number = first_pixel + p * FEW_THREADS + own, o = first_output + k;
            if (number < pixels && o < filters.outputs) {
                const long long channel = group * filters.outputs + o;
                const long long place =
                    place_of(Pixel(number, rows.count, columns.count), rows, columns, to) + channel * to.channel;
                y[place] = finish(room[k * FEW_THREADS + own], channel, place);
            }
        }
        __syncthreads();
    }
}

}   // namespace tilewise
