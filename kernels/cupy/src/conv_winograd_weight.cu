// The weight gradient of a 3x3 convolution of stride 1 by Winograd: F(4x4, 3x3) transposed, 36 products for 144.
//
//     V[xi, c, tile]  = B^T d B     of the 6 x 6 pixels d of x                                  conv_winograd.cu
//     W[xi, o, tile]  = A g A^T     of a tile g of 4 x 4 pixels of grad                         conv_winograd_grad
//     M[xi, o, c]     = sum over tiles of W V: 36 matrix products for each group                gemm.py
//     grad_weight     = G^T m G                                                                 conv_winograd_taps
//
// W lies as V does. A NaN or an infinity would spread to nine taps: where one comes out, a block sums by the definition.
#include "conv_winograd.cuh"
#include "reduction.cuh"

namespace tilewise {

// A times four numbers.
template <class S> __device__ __forceinline__ void widen_tile(S *to, int step, S g0, S g1, S g2, S g3) {
    const S even = g0 + g2, odd = g1 + g3, far_even = g0 + 4 * g2, far_odd = 2 * (g1 + 4 * g3);
    to[0] = g0;
    to[step] = even + odd;
    to[2 * step] = even - odd;
    to[3 * step] = far_even + far_odd;
    to[4 * step] = far_even - far_odd;
    to[5 * step] = g3;
}

// G^T times six numbers; three are left, in the first places.
template <class S> __device__ __forceinline__ void narrow_tile(S *v, int step) {
    const S near = v[step] + v[2 * step], less = v[2 * step] - v[step];
    const S far = v[3 * step] + v[4 * step], more = v[3 * step] - v[4 * step], last = v[5 * step];
    v[0] = S(0.25) * v[0] - near * (S(1) / 6) + far * (S(1) / 24);
    v[step] = less * (S(1) / 6) + more * (S(1) / 12);
    v[2 * step] = (far - near) * (S(1) / 6) + last;
}

// W of one tile and output to a thread, and zeros in the padding. to: steps of grad.
template <class T>
__global__ void __launch_bounds__(WINOGRAD_THREADS, 4)
conv_winograd_grad(const T *__restrict__ grad, T *values, const Axis rows, const Axis columns, const Steps to,
                   const Filters filters, const Tiles tiles) {
    const long long number = static_cast<long long>(blockIdx.x) * WINOGRAD_THREADS + threadIdx.x;
    if (number >= filters.groups * tiles.outputs * tiles.padded) return;
    const TileOfChannel mine(number, tiles, filters.groups, tiles.outputs);
    const bool there = mine.tile < tiles.count && mine.channel < filters.outputs;
    const Pixel tile(tiles.first + mine.tile, tiles.down, tiles.across);
    const T *const image = grad + tile.image * to.image + (mine.group * filters.outputs + mine.channel) * to.channel;
    T half[24], whole[POINTS];
#pragma unroll
    for (int j = 0; j < TILE; ++j) {
        const long long column = tile.column * TILE + j;
        T g[TILE];
#pragma unroll
        for (int i = 0; i < TILE; ++i) {
            const long long row = tile.row * TILE + i;
            const bool inside = there && row < rows.count && column < columns.count;
            g[i] = inside ? image[row * to.row + column * to.column] : T(0);
        }
        widen_tile(half + j, TILE, g[0], g[1], g[2], g[3]);
    }
#pragma unroll
    for (int i = 0; i < 6; ++i)
        widen_tile(whole + 6 * i, 1, half[4 * i], half[4 * i + 1], half[4 * i + 2], half[4 * i + 3]);
    T *const target = values + mine.place(tiles, tiles.outputs);
#pragma unroll
    for (int xi = 0; xi < POINTS; ++xi) target[xi * tiles.padded * tiles.outputs] = whole[xi];
}

// The nine taps of one output and channel to a thread. channels, outputs: of a group in M, of which there are `parts`, one
// of some tiles each.
template <class T>
__global__ void __launch_bounds__(WINOGRAD_THREADS, 4)
conv_winograd_taps(const T *__restrict__ products, const T *__restrict__ grad, const T *__restrict__ x, T *result,
                   const Axis rows, const Axis columns, const Steps from, const Steps to, const Filters filters,
                   long long images, long long channels, long long outputs, long long parts) {
    __shared__ int broken[WINOGRAD_THREADS / 32];   // of each warp: whether any
    __shared__ int is_broken[WINOGRAD_THREADS];
    __shared__ T room[WINOGRAD_THREADS];
    const int thread = threadIdx.x;
    const long long first = static_cast<long long>(blockIdx.x) * WINOGRAD_THREADS;
    long long number = first + thread;
    const long long c = take_axis(number, channels), o = take_axis(number, outputs), group = number;
    bool finite = true;
    if (group < filters.groups && c < filters.channels && o < filters.outputs) {
        const T *source = products + (group * POINTS * outputs + o) * channels + c;
        T *const own = result + group * filters.group_step + o * filters.output_step + c * filters.channel_step;
        T v[POINTS] = {}, check = 0;
        for (long long part = 0; part < parts; ++part, source += filters.groups * POINTS * outputs * channels)
#pragma unroll
            for (int xi = 0; xi < POINTS; ++xi) v[xi] += source[xi * outputs * channels];
#pragma unroll
        for (int i = 0; i < 6; ++i) narrow_tile(v + 6 * i, 1);
#pragma unroll
        for (int u = 0; u < 3; ++u) {
            narrow_tile(v + u, 6);
#pragma unroll
            for (int t = 0; t < 3; ++t) {
                check += v[6 * t + u] * 0;
                own[place_of_tap(rows, columns, filters, t, u)] = v[6 * t + u];
            }
        }
        finite = check == 0;
    }
    is_broken[thread] = !finite;
    const int any = group_max<int>(!finite, 32);
    if (thread % 32 == 0) broken[thread / 32] = any;
    __syncthreads();
    for (int k = 0; k < WINOGRAD_THREADS; ++k) {
        if (!broken[k / 32]) k |= 31;   // on to the next warp's
        if (!is_broken[k]) continue;
        long long other = first + k;
        const long long channel = take_axis(other, channels), output = take_axis(other, outputs);
        const T *const image = x + (other * filters.channels + channel) * from.channel;
        const T *const grads = grad + (other * filters.outputs + output) * to.channel;
        T *const own = result + other * filters.group_step + output * filters.output_step + channel * filters.channel_step;
        for (int tap = 0; tap < 9; ++tap) {
            T total = 0;
            for (long long i = thread; i < images * rows.count * columns.count; i += WINOGRAD_THREADS) {
                const Pixel pixel(i, rows.count, columns.count);
                const long long row = rows.origin + pixel.row + tap / 3, column = columns.origin + pixel.column + tap % 3;
                const bool inside = within(row, rows.size) && within(column, columns.size);
                const T value = inside ? image[pixel.image * from.image + row * from.row + column * from.column] : T(0);
                total += value * grads[pixel.image * to.image + pixel.row * to.row + pixel.column * to.column];
            }
            room[thread] = total;
            __syncthreads();
            if (thread == 0) {
                for (int other_thread = 1; other_thread < WINOGRAD_THREADS; ++other_thread) total += room[other_thread];
                own[place_of_tap(rows, columns, filters, tap / 3, tap % 3)] = total;
            }
            __syncthreads();
        }
    }
}

}   // namespace tilewise
