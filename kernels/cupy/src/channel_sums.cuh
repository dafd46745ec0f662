// Sums over a channel: which parts a block takes, and how its threads' sums become one. A part's sums are in double.
//
// NCHW: a channel is `images` planes of `units` units, N elements each; block b takes part b % parts of channel
// b / parts. NHWC: block (part, tile) takes `span` units of channels and `rows` pixels at a time; a thread keeps to one
// unit of channels. sums: (2, channels, parts).
#pragma once
#include "reduction.cuh"

namespace tilewise {

// A thread's way along a channel, THREADS units at a time.
struct PlaneWalk {
    long long at, end, image, offset, units, channel, channels, images_on, units_on;

    __device__ __forceinline__ PlaneWalk(long long images, long long channels_, long long units_, int parts)
        : units(units_), channel(blockIdx.x / parts), channels(channels_) {
        const long long share = (images * units + parts - 1) / parts, begin = blockIdx.x % parts * share;
        const long long all = images * units;
        at = begin + threadIdx.x;
        end = begin + share < all ? begin + share : all;
        image = divide(at, units);
        offset = at - image * units;
        images_on = divide(static_cast<long long>(THREADS), units);
        units_on = THREADS - images_on * units;
    }
    // Whether `count` units, THREADS apart, are left.
    __device__ __forceinline__ bool has(int count) const { return at + (count - 1) * THREADS < end; }
    // The unit's place in memory, in units.
    __device__ __forceinline__ long long next() {
        const long long place = (image * channels + channel) * units + offset;
        at += THREADS;
        image += images_on;
        offset += units_on;
        if (offset >= units) {
            offset -= units;
            ++image;
        }
        return place;
    }
};

// A thread's way down the pixels, with its unit of channels.
template <int N> struct RowWalk {
    long long pixel, end, first, channel, channels;   // first: the block's first channel
    int span, rows;

    __device__ __forceinline__ RowWalk(long long pixels, long long channels_, int span_, int rows_, int parts)
        : channels(channels_), span(span_), rows(rows_) {
        const long long share = (pixels + parts - 1) / parts, begin = blockIdx.x * share;
        const int row = threadIdx.x / span;
        first = static_cast<long long>(blockIdx.y) * span * N;
        channel = first + threadIdx.x % span * N;
        pixel = begin + row;
        end = begin + share < pixels ? begin + share : pixels;
        if (row >= rows || channel >= channels) end = 0;
    }
    __device__ __forceinline__ bool has(int count) const {
        return pixel + static_cast<long long>(count - 1) * rows < end;
    }
    __device__ __forceinline__ long long next() {
        const long long place = pixel * channels + channel;
        pixel += rows;
        return place;
    }
    // One of the thread's channels; the first one of all for a thread that has none.
    __device__ __forceinline__ long long channel_or_first(int k) const {
        return channel < channels ? channel + k : 0;
    }
};

__device__ __forceinline__ void store_plane_sums(double first, double second, double *sums, const PlaneWalk &walk,
                                                 int parts, double *scratch) {
    first = block_sum(first, scratch);
    second = block_sum(second, scratch);
    if (threadIdx.x == 0) {
        const int part = blockIdx.x % parts;
        sums[walk.channel * parts + part] = first;
        sums[(walk.channels + walk.channel) * parts + part] = second;
    }
}

// sums[channel, part] = the sum over the block's rows of N numbers of each thread; ends with a barrier.
// scratch: THREADS * N numbers.
template <int N>
__device__ __forceinline__ void store_row_sums(const double (&values)[N], double *sums, const RowWalk<N> &walk,
                                               int parts, double *scratch) {
    const int thread = threadIdx.x;
#pragma unroll
    for (int k = 0; k < N; ++k) scratch[thread * N + k] = values[k];
    __syncthreads();
    for (int c = thread; c < walk.span * N && walk.first + c < walk.channels; c += THREADS) {
        double total = scratch[c];
        for (int row = 1; row < walk.rows; ++row) total += scratch[row * walk.span * N + c];
        sums[(walk.first + c) * parts + blockIdx.x] = total;
    }
    __syncthreads();
}

// The sum of a channel's parts by a warp, in every lane.
__device__ __forceinline__ double sum_of_parts(const double *parts_of_channel, int parts) {
    double total = 0;
    if (parts_of_channel)
        for (int part = threadIdx.x % 32; part < parts; part += 32) total += parts_of_channel[part];
    return group_sum(total, 32);
}

}   // namespace tilewise
