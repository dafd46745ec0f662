// Sums over the pixels of all images: the gradients of bias and weight, in two stages that always add alike.
//
//     1. a block sums one part of the pixels, whose number follows from the shapes alone: parts[part, element]
//     2. the parts are added in their order
#include "conv.cuh"
#include "reduction.cuh"

namespace tilewise {

// result[o, c, t] = parts[0, o, t, c] + ... + parts[many - 1, o, t, c]; `count` elements of the result, `size` of a part,
// which may have more channels: `padded`.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
conv_sum_parts(const Sum<T> *__restrict__ parts, T *__restrict__ result, long long count, long long many, long long size,
               long long taps, long long channels, long long padded) {
    const long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= count) return;
    long long o = i;
    const long long c = take_axis(o, channels), t = take_axis(o, taps);
    const long long place = (o * taps + t) * padded + c;
    Sum<T> total = 0;
    for (long long part = 0; part < many; ++part) total += parts[part * size + place];
    result[(o * channels + c) * taps + t] = narrow<T>(total);
}

// The pixels of a part.
struct Part {
    long long at, end;
    __device__ __forceinline__ Part(long long pixels, long long per_part) {
        const long long begin = blockIdx.y * per_part;
        at = begin + threadIdx.x;
        end = begin + per_part < pixels ? begin + per_part : pixels;
    }
};

// parts[part, c] = the sum of grad[n, c, p] over the part's pixels of all images; block (c, part). In units of N elements,
// 16 bytes where planes are made of them, of which a thread has several under way: area and per_part count units.
template <class T, int N>
__global__ void __launch_bounds__(THREADS, 1)
conv_sum_channel(const T *__restrict__ grad, Sum<T> *__restrict__ parts, long long images, long long channels, long long area,
            long long per_part) {
    constexpr int TOGETHER = 4;
    __shared__ Sum<T> scratch[WARPS];
    const long long c = blockIdx.x;
    Sum<T> totals[TOGETHER] = {};
    for (Part part(images * area, per_part); part.at < part.end; part.at += TOGETHER * THREADS) {
        Pack<T, N> packs[TOGETHER] = {};
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            const long long at = part.at + i * THREADS, n = divide(at, area);
            if (at < part.end) packs[i] = load<N>(grad + ((n * channels + c) * area + at - n * area) * N);
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i)
#pragma unroll
            for (int k = 0; k < N; ++k) totals[i] += widen(packs[i].lane[k]);
    }
    const Sum<T> total = block_sum((totals[0] + totals[1]) + (totals[2] + totals[3]), scratch);
    if (threadIdx.x == 0) parts[blockIdx.y * channels + c] = total;
}

// parts[part, e] for element e = (o, c, p, q) of the weight; block (e, part). The definition, for any options.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
conv_weight_sums(const T *__restrict__ grad, const T *__restrict__ x, Sum<T> *__restrict__ parts, const Axis rows,
            const Axis columns, const Steps from, const Steps to, const Filters filters, long long count,
            long long pixels, long long per_part) {
    __shared__ Sum<T> scratch[WARPS];
    long long o = blockIdx.x;
    const long long u = take_axis(o, columns.taps), t = take_axis(o, rows.taps), c = take_axis(o, filters.channels);
    const long long first_row = rows.origin + t * rows.spacing, first_column = columns.origin + u * columns.spacing;
    const T *const plane = x + (divide(o, filters.outputs) * filters.channels + c) * from.channel;
    const T *const own = grad + o * to.channel;
    Sum<T> total = 0;
    for (Part part(pixels, per_part); part.at < part.end; part.at += THREADS) {
        const Pixel pixel(part.at, rows.count, columns.count);
        const long long row = first_row + pixel.row * rows.stride, column = first_column + pixel.column * columns.stride;
        const bool inside = within(row, rows.size) && within(column, columns.size);
        const long long place = pixel.image * from.image + row * from.row + column * from.column;
        const Sum<T> value = inside ? widen(plane[place]) : Sum<T>(0);   // padding, too, meets an infinite grad
        total += value * widen(own[pixel.image * to.image + pixel.row * to.row + pixel.column * to.column]);
    }
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) parts[blockIdx.y * count + blockIdx.x] = total;
}

}   // namespace tilewise
