// Convolution of few outputs of an x in NCHW, such as the gradient with respect to an image: a tile of a product would be
// rows of zeros. A thread sums the THIN outputs of THIN_PIXELS pixels; the weights of all taps and some channels lie in
// shared memory, THIN side by side, where all threads read the same ones at a time; lanes run along the pixels.
#include "conv.cuh"

namespace tilewise {

constexpr int THIN = 4, THIN_PIXELS = 4, THIN_CHANNELS = 4;   // channels that are loaded at a time
constexpr int THIN_BYTES = 32 << 10;

// Block (THREADS * THIN_PIXELS pixels, 1, group). pixels: of all images. filters.outputs <= THIN; THIN_CHANNELS channels of
// all taps fit THIN_BYTES; rows, columns and elements of x fit 32 bits.
template <class T>
__global__ void __launch_bounds__(THREADS, 2)
conv_thin(const T *__restrict__ x, const T *__restrict__ weight, T *y, const Epilogue<T> finish, const Axis rows,
          const Axis columns, const Steps from, const Steps to, const Filters filters, long long pixels) {
    using S = Sum<T>;
    constexpr int LANE = LANES<S>;
    alignas(16) __shared__ S weights[THIN_BYTES / sizeof(S)];
    const int thread = threadIdx.x, channels = static_cast<int>(filters.channels);
    const int outputs = static_cast<int>(filters.outputs), kw = static_cast<int>(columns.taps);
    const int taps = static_cast<int>(rows.taps) * kw, channel_step = static_cast<int>(from.channel);
    const int height = static_cast<int>(rows.size), width = static_cast<int>(columns.size);
    const int down_step = static_cast<int>(rows.spacing), right_step = static_cast<int>(columns.spacing);
    const int at_once = THIN_BYTES / static_cast<int>(sizeof(S)) / (THIN * taps) / THIN_CHANNELS * THIN_CHANNELS;
    const long long first = static_cast<long long>(blockIdx.x) * (THREADS * THIN_PIXELS) + thread, group = blockIdx.z;
    weight += group * filters.group_step;

    S totals[THIN_PIXELS][THIN] = {};
    int images[THIN_PIXELS], first_row[THIN_PIXELS], first_column[THIN_PIXELS];
#pragma unroll
    for (int p = 0; p < THIN_PIXELS; ++p) {
        const long long number = first + p * THREADS;
        const Pixel pixel(number < pixels ? number : pixels - 1, rows.count, columns.count);
        first_row[p] = static_cast<int>(rows.origin + pixel.row * rows.stride);
        first_column[p] = static_cast<int>(columns.origin + pixel.column * columns.stride);
        images[p] = static_cast<int>(pixel.image * from.image + group * channels * from.channel +
                                     first_row[p] * from.row + first_column[p] * from.column);
    }
    for (int first_c = 0; first_c < channels; first_c += at_once) {
        const int some = channels - first_c < at_once ? channels - first_c : at_once;
        const int padded = (some + THIN_CHANNELS - 1) / THIN_CHANNELS * THIN_CHANNELS;   // with zeros
        __syncthreads();
        for (int i = thread; i < padded * taps * THIN; i += THREADS) {
            const int o = i % THIN, c = i / THIN % padded, tap = i / THIN / padded;
            const long long t = rows.first_tap + tap / kw * rows.tap_step;
            const long long u = columns.first_tap + tap % kw * columns.tap_step;
            weights[i] = c < some && o < outputs
                             ? widen(weight[o * filters.output_step + (first_c + c) * filters.channel_step +
                                            t * filters.width + u])
                             : S(0);
        }
        __syncthreads();
        for (int c = 0; c < some; c += THIN_CHANNELS) {
            const S *line = weights + c * THIN;
            int t = 0, u = 0;
#pragma unroll 1
            for (int tap = 0; tap < taps; ++tap, line += padded * THIN) {
                const int down = t * down_step, right = u * right_step;
                const int step = static_cast<int>(down * from.row + right * from.column) + (first_c + c) * channel_step;
                S values[THIN_CHANNELS][THIN_PIXELS];
#pragma unroll
                for (int p = 0; p < THIN_PIXELS; ++p) {
                    const bool inside = static_cast<unsigned>(first_row[p] + down) < static_cast<unsigned>(height) &&
                                        static_cast<unsigned>(first_column[p] + right) < static_cast<unsigned>(width);
#pragma unroll
                    for (int k = 0; k < THIN_CHANNELS; ++k)
                        values[k][p] = inside && c + k < some ? widen(x[images[p] + step + k * channel_step]) : S(0);
                }
#pragma unroll
                for (int k = 0; k < THIN_CHANNELS; ++k)
#pragma unroll
                    for (int o = 0; o < THIN; o += LANE) {
                        const Pack<S, LANE> some_weights = load<LANE>(line + k * THIN + o);
#pragma unroll
                        for (int i = 0; i < LANE; ++i)
#pragma unroll
                            for (int p = 0; p < THIN_PIXELS; ++p) totals[p][o + i] += values[k][p] * some_weights.lane[i];
                    }
                if (++u == kw) {
                    u = 0;
                    ++t;
                }
            }
        }
    }
#pragma unroll
    for (int p = 0; p < THIN_PIXELS; ++p) {
        const long long number = first + p * THREADS;
        if (number >= pixels) break;
        const long long place = place_of(Pixel(number, rows.count, columns.count), rows, columns, to);
#pragma unroll 1
        for (int o = 0; o < outputs; ++o) {
            S total = totals[p][0];
#pragma unroll
            for (int other = 1; other < THIN; ++other) total = o == other ? totals[p][other] : total;
            const long long channel = group * outputs + o, own = place + channel * to.channel;
            y[own] = finish(total, channel, own);
        }
    }
}

}   // namespace tilewise
