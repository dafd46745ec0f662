// Convolution without tiles of both operands.
//
// conv_direct: by the definition, a result to a thread. Right for everything, and the yardstick of the others.
// conv_direct_few: for few channels, as in first layers. A thread sums OUTPUTS outputs of PIXELS neighbouring pixels in
// registers; a block's weights lie in shared memory while it goes from pixels to pixels; numbers of x come from L1. `lanes`
// neighbouring threads have the same pixels, and other outputs, which alternate in vectors of 16 bytes of the result:
//
//     outputs, 4 lanes   [lane 0][lane 1][lane 2][lane 3][lane 0][lane 1] ...      NHWC: neighbours store neighbours
//     pixels             [p p p p][p p p p] ...    of lanes 0, `lanes`, ...         NCHW: a thread stores its four at once
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

constexpr int FEW_THREADS = 256, PIXELS = 4;
constexpr int FEW_BYTES = 48 << 10;   // of shared memory: weights, as many taps at a time as there is room for
template <class T> constexpr int OUTPUTS = 64 / sizeof(Sum<T>);
template <class T> constexpr int CHANNELS_AT_ONCE = sizeof(Sum<T>) == 4 ? 2 : 1;

// PIXELS numbers that lie side by side; a multiple of as many elements.
template <class T> __device__ __forceinline__ void store_pixels(T *to, const Pack<T, PIXELS> &pack) {
    if constexpr (sizeof pack == 8) {
        uint2 bits;
        memcpy(&bits, &pack, 8);
        store_8_bytes(to, bits);
    } else {
#pragma unroll
        for (int i = 0; i < PIXELS; i += LANES<T>) {
            Pack<T, LANES<T>> some;
#pragma unroll
            for (int k = 0; k < LANES<T>; ++k) some.lane[k] = pack.lane[i + k];
            store(to + i, some);
        }
    }
}

// Where a thread's results are. place: of its first pixel in the block's first output; apart: of its pixels from there;
// there: how many of them exist.
template <class T> struct FewResults {
    static constexpr int COUNT = OUTPUTS<T>, WIDTH = LANES<T>;
    T *y;
    long long place, channel_step;
    int apart[PIXELS], there, lane, lanes, outputs;

    // Of its k-th output, from the block's first one on.
    __device__ __forceinline__ int output(int k) const { return (k / WIDTH * lanes + lane) * WIDTH + k % WIDTH; }

    __device__ __forceinline__ void put_rows(const Sum<T> (&totals)[PIXELS][COUNT]) const {
#pragma unroll
        for (int p = 0; p < PIXELS; ++p) {
            if (p >= there) break;
#pragma unroll
            for (int k = 0; k < COUNT; k += WIDTH) {
                const int o = output(k);
                T *const to = y + place + apart[p] + o;
                if (o + WIDTH <= outputs && (place + apart[p] + o) % WIDTH == 0) {
                    Pack<T, WIDTH> pack;
#pragma unroll
                    for (int i = 0; i < WIDTH; ++i) pack.lane[i] = narrow<T>(totals[p][k + i]);
                    store(to, pack);
                } else {
#pragma unroll
                    for (int i = 0; i < WIDTH; ++i)
                        if (o + i < outputs) to[i] = narrow<T>(totals[p][k + i]);
                }
            }
        }
    }
    __device__ __forceinline__ void put_planes(const Sum<T> (&totals)[PIXELS][COUNT]) const {
        const bool together = there == PIXELS && apart[PIXELS - 1] == PIXELS - 1;
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            const int o = output(k);
            if (o >= outputs) continue;
            const long long first = place + o * channel_step;
            if (together && first % PIXELS == 0) {
                Pack<T, PIXELS> pack;
#pragma unroll
                for (int p = 0; p < PIXELS; ++p) pack.lane[p] = narrow<T>(totals[p][k]);
                store_pixels(y + first, pack);
            } else {
#pragma unroll
                for (int p = 0; p < PIXELS; ++p)
                    if (p < there) y[first + apart[p]] = narrow<T>(totals[p][k]);
            }
        }
    }
    // The epilogue in registers, where it is a bias and relu at most.
    __device__ __forceinline__ void finish_plainly(Sum<T> (&totals)[PIXELS][COUNT], const Epilogue<T> &finish,
                                                   long long channel) const {
        if (finish.bias)
#pragma unroll
            for (int k = 0; k < COUNT; ++k) {
                const int o = output(k);
                const Sum<T> bias = o < outputs ? widen(finish.bias[channel + o]) : Sum<T>(0);
#pragma unroll
                for (int p = 0; p < PIXELS; ++p) totals[p][k] += bias;
            }
        if (finish.code == RELU)
#pragma unroll
            for (int k = 0; k < COUNT; ++k)
#pragma unroll
                for (int p = 0; p < PIXELS; ++p) totals[p][k] = totals[p][k] <= 0 ? 0 : totals[p][k];
    }
    // Any other one, as a loop, or it would be in the code 64 times: by way of shared memory, a thread's own numbers each.
    __device__ __forceinline__ void finish_anyhow(Sum<T> (&totals)[PIXELS][COUNT], Sum<T> *room,
                                                  const Epilogue<T> &finish, long long channel) const {
#pragma unroll
        for (int first = 0; first < PIXELS; first += 2) {
#pragma unroll
            for (int i = 0; i < 2 * COUNT; ++i) room[i * FEW_THREADS] = totals[first + i / COUNT][i % COUNT];
#pragma unroll 1
            for (int i = 0; i < 2 * COUNT; ++i) {
                const int p = first + i / COUNT, o = output(i % COUNT);
                if (p >= there || o >= outputs) continue;
                const long long own = place + (i < COUNT ? apart[first] : apart[first + 1]) + o * channel_step;
                room[i * FEW_THREADS] = widen(finish(room[i * FEW_THREADS], channel + o, own));
            }
#pragma unroll
            for (int i = 0; i < 2 * COUNT; ++i) totals[first + i / COUNT][i % COUNT] = room[i * FEW_THREADS];
        }
    }
};

// Block (tiles of pixels, lanes * OUTPUTS outputs, group). pixels: of all images, in so many tiles. lanes: 1, 2 or 4. All
// channels of a tap fit FEW_BYTES; rows, columns, elements of x and of an image of y fit 32 bits.
template <class T>
__global__ void __launch_bounds__(FEW_THREADS, 2)
conv_direct_few(const T *__restrict__ x, const T *__restrict__ weight, T *y, const Epilogue<T> finish, const Axis rows,
           const Axis columns, const Steps from, const Steps to, const Filters filters, long long pixels, int tiles,
           int lanes, int channels_last) {
    using S = Sum<T>;
    // 16 bytes more for a lane, so that four of them read from different banks
    constexpr int COUNT = OUTPUTS<T>, LANE = LANES<S>, LINE = COUNT + LANE, WIDTH = LANES<T>;
    constexpr int AT_ONCE = CHANNELS_AT_ONCE<T>;
    alignas(16) __shared__ S weights[FEW_BYTES / sizeof(S)];
    const int thread = threadIdx.x, channels = static_cast<int>(filters.channels);
    const int kw = static_cast<int>(columns.taps), taps = static_cast<int>(rows.taps) * kw;
    const int height = static_cast<int>(rows.size), width = static_cast<int>(columns.size);
    const int of_block = COUNT * lanes, at_once = FEW_BYTES / static_cast<int>(sizeof(S)) / (LINE * lanes * channels);
    const long long first_output = static_cast<long long>(blockIdx.y) * of_block, group = blockIdx.z;
    const long long channel = group * filters.outputs + first_output, left = filters.outputs - first_output;
    const S *const own_weights = weights + thread % lanes * LINE;
    const bool plain = !finish.extra && (finish.code == NONE || finish.code == RELU);
    const int channel_step = static_cast<int>(from.channel);
    const int down_step = static_cast<int>(rows.spacing), right_step = static_cast<int>(columns.spacing);
    weight += group * filters.group_step + first_output * filters.output_step;

    // PIXELS pixels each: 32 bits count them
    const unsigned sharers = lanes, of_tile = FEW_THREADS / sharers, own = thread / sharers;
    const bool fits = plain && taps <= at_once;   // then the weights are those of the tile before
    for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
        const long long number = static_cast<long long>(i * of_tile + own) * PIXELS;
        S totals[PIXELS][COUNT] = {};
        int images[PIXELS], first_row[PIXELS], first_column[PIXELS];
        PixelCounter pixel(number < pixels ? number : pixels - 1, rows.count, columns.count);
#pragma unroll
        for (int p = 0; p < PIXELS; ++p) {
            first_row[p] = static_cast<int>(rows.origin + pixel.row * rows.stride);
            first_column[p] = static_cast<int>(columns.origin + pixel.column * columns.stride);
            images[p] = static_cast<int>(pixel.image * from.image + group * channels * from.channel +
                                         first_row[p] * from.row + first_column[p] * from.column);
            if (number + p + 1 < pixels) pixel.advance(1, rows.count, columns.count);
        }
        for (int first_tap = 0; first_tap < taps; first_tap += at_once) {
            const int some = taps - first_tap < at_once ? taps - first_tap : at_once;
            if (!fits || i == static_cast<int>(blockIdx.x)) {
                __syncthreads();
                for (int place = thread; place < some * channels * of_block; place += FEW_THREADS) {
                    const int k = place / of_block, o = place - k * of_block, tap = first_tap + k / channels;
                    const long long t = rows.first_tap + tap / kw * rows.tap_step;
                    const long long u = columns.first_tap + tap % kw * columns.tap_step;
                    const int vector = o / WIDTH;
                    weights[(k * lanes + vector % lanes) * LINE + vector / lanes * WIDTH + o % WIDTH] =
                        o < left ? widen(weight[o * filters.output_step + k % channels * filters.channel_step +
                                                t * filters.width + u])
                                 : S(0);
                }
                __syncthreads();
            }
            int t = first_tap / kw, u = first_tap % kw;
            const S *line = own_weights;
#pragma unroll 1
            for (int tap = 0; tap < some; ++tap) {
                const int down = t * down_step, right = u * right_step;
                const int step = down * static_cast<int>(from.row) + right * static_cast<int>(from.column);
                bool inside[PIXELS];
#pragma unroll
                for (int p = 0; p < PIXELS; ++p)
                    inside[p] = static_cast<unsigned>(first_row[p] + down) < static_cast<unsigned>(height) &&
                                static_cast<unsigned>(first_column[p] + right) < static_cast<unsigned>(width);
#pragma unroll 1
                for (int first_c = 0; first_c < channels; first_c += AT_ONCE) {
                    S values[AT_ONCE][PIXELS];
#pragma unroll
                    for (int c = 0; c < AT_ONCE; ++c)
#pragma unroll
                        for (int p = 0; p < PIXELS; ++p)
                            values[c][p] = inside[p] && first_c + c < channels
                                               ? widen(x[images[p] + (step + (first_c + c) * channel_step)])
                                               : S(0);
#pragma unroll
                    for (int c = 0; c < AT_ONCE; ++c) {
                        if (first_c + c >= channels) break;
#pragma unroll
                        for (int o = 0; o < COUNT; o += LANE) {
                            const Pack<S, LANE> some_weights = load<LANE>(line + o);
#pragma unroll
                            for (int k = 0; k < LANE; ++k)
#pragma unroll
                                for (int p = 0; p < PIXELS; ++p)
                                    totals[p][o + k] += values[c][p] * some_weights.lane[k];
                        }
                        line += LINE * lanes;
                    }
                }
                if (++u == kw) {
                    u = 0;
                    ++t;
                }
            }
        }

        const int outputs = static_cast<int>(left < of_block ? left : of_block);
        FewResults<T> results{y, 0, to.channel, {}, 0, thread % lanes, lanes, outputs};
        PixelCounter place(number < pixels ? number : pixels - 1, rows.count, columns.count);
#pragma unroll
        for (int p = 0; p < PIXELS; ++p) {
            const long long found = place.image * to.image + (rows.first + place.row * rows.step) * to.row +
                                    (columns.first + place.column * columns.step) * to.column + channel * to.channel;
            if (p == 0) results.place = found;
            results.apart[p] = static_cast<int>(found - results.place);
            results.there += number + p < pixels;
            if (number + p + 1 < pixels) place.advance(1, rows.count, columns.count);
        }
        if (plain) {
            results.finish_plainly(totals, finish, channel);
        } else {
            __syncthreads();
            results.finish_anyhow(totals, weights + thread, finish, channel);
        }
        if (channels_last)
            results.put_rows(totals);
        else
            results.put_planes(totals);
    }
}

}   // namespace tilewise
