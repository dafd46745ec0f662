// The weight gradient of a depthwise convolution: TAPS^2 sums a channel over all pixels, in two stages (conv_sums.cu).
//
// A thread keeps the sums of ROWS rows of taps of one channel in registers: a number of grad, once loaded, meets as many
// of x, which L1 has. NCHW: a block has one channel, and its threads every WEIGHT_THREADS-th pixel. NHWC: a block has 32
// channels, one a lane, and its warps take turns at the pixels.
#include "conv.cuh"
#include "reduction.cuh"

namespace tilewise {

constexpr int WEIGHT_THREADS = 128, WEIGHT_WARPS = WEIGHT_THREADS / 32;

// parts[part, o, p, q]; block (o or 32 of them, part, rows of taps).
template <class T, int TAPS, int ROWS, bool LAST>
__global__ void __launch_bounds__(WEIGHT_THREADS, 1)
conv_depthwise_weight(const T *__restrict__ grad, const T *__restrict__ x, Sum<T> *__restrict__ parts, const Axis rows,
                 const Axis columns, const Steps from, const Steps to, const Filters filters, long long pixels,
                 long long per_part) {
    __shared__ Sum<T> joined[WEIGHT_THREADS];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, first_tap = blockIdx.z * ROWS;
    const long long outputs = filters.groups * filters.outputs;
    const long long o = LAST ? static_cast<long long>(blockIdx.x) * 32 + lane : blockIdx.x;
    const bool any = o < outputs;
    const T *const plane = x + (any ? divide(o, filters.outputs) * from.channel : 0);
    const T *const own = grad + (any ? o * to.channel : 0);
    const long long begin = blockIdx.y * per_part, end = begin + per_part < pixels ? begin + per_part : pixels;
    Sum<T> sums[ROWS][TAPS] = {};
    for (long long k = begin + (LAST ? warp : thread); any && k < end; k += LAST ? WEIGHT_WARPS : WEIGHT_THREADS) {
        const Pixel pixel(k, rows.count, columns.count);
        const Sum<T> value = widen(own[pixel.image * to.image + pixel.row * to.row + pixel.column * to.column]);
        const T *const image = plane + pixel.image * from.image;
#pragma unroll
        for (int p = 0; p < ROWS; ++p) {
            const long long row = rows.origin + pixel.row * rows.stride + (first_tap + p) * rows.spacing;
#pragma unroll
            for (int q = 0; q < TAPS; ++q) {
                const long long column = columns.origin + pixel.column * columns.stride + q * columns.spacing;
                const bool inside = within(row, rows.size) && within(column, columns.size);
                sums[p][q] += value * (inside ? widen(image[row * from.row + column * from.column]) : Sum<T>(0));
            }
        }
    }
#pragma unroll
    for (int t = 0; t < ROWS * TAPS; ++t) {
        Sum<T> total = sums[t / TAPS][t % TAPS];
        if (!LAST) total = group_sum(total, 32);
        joined[thread] = total;
        __syncthreads();
        if ((LAST ? warp == 0 : thread == 0) && any) {
#pragma unroll
            for (int other = 1; other < WEIGHT_WARPS; ++other) total += joined[other * 32 + (LAST ? lane : 0)];
            parts[((blockIdx.y * outputs + o) * TAPS + first_tap) * TAPS + t] = total;
        }
        __syncthreads();
    }
}

}   // namespace tilewise
