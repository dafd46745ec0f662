// 3x3 convolution of stride 1 by Winograd's F(4x4, 3x3): 16 results of a tile from 36 products, not 144.
//
//     U[xi, c, o]    = G g G^T     of the 3 x 3 weights g                                       conv_winograd_weight
//     V[xi, c, tile] = B^T d B     of the 6 x 6 pixels d around a tile of 4 x 4 results         conv_winograd_input
//     M[xi, o, tile] = sum over c of U V: 36 matrix products for each group                     gemm.py
//     y              = A^T m A, then bias, summand and activation                               conv_winograd_output
//
// A group's 36 matrices follow each other, U as channels x outputs, V and M in the order of the images: neighbouring threads
// read and write neighbouring numbers. What lies side by side is padded, so that a product's rows are whole vectors:
//
//     NCHW   V: channels x tiles, M: outputs x tiles         lanes run along tiles
//     NHWC   V: tiles x channels, M: tiles x outputs         lanes run along channels, or outputs
//
// A NaN or an infinity spreads over its tile: the thread that ends up with one computes its tile by the definition.
#include "conv_winograd.cuh"

namespace tilewise {

// B^T times six numbers, in place.
template <class S> __device__ __forceinline__ void forth(S *v, int step) {
    const S x0 = v[0], x1 = v[step], x2 = v[2 * step], x3 = v[3 * step], x4 = v[4 * step], x5 = v[5 * step];
    v[0] = 4 * x0 - 5 * x2 + x4;
    v[step] = (x3 + x4) - 4 * (x1 + x2);
    v[2 * step] = (x4 - x3) + 4 * (x1 - x2);
    v[3 * step] = (x4 - x2) + 2 * (x3 - x1);
    v[4 * step] = (x4 - x2) - 2 * (x3 - x1);
    v[5 * step] = 4 * x1 - 5 * x3 + x5;
}

// G times three numbers.
template <class S> __device__ __forceinline__ void spread(S *to, int step, S g0, S g1, S g2) {
    const S sixth = S(1) / 6, even = S(0.25) * g0 + g2, odd = S(0.5) * g1;
    to[0] = S(0.25) * g0;
    to[step] = -sixth * (g0 + g1 + g2);
    to[2 * step] = -sixth * (g0 - g1 + g2);
    to[3 * step] = sixth * (even + odd);
    to[4 * step] = sixth * (even - odd);
    to[5 * step] = g2;
}

// A^T times six numbers; four are left, in the first places.
template <class S> __device__ __forceinline__ void back(S *v, int step) {
    const S m0 = v[0], m5 = v[5 * step];
    const S s = v[step] + v[2 * step], d = v[step] - v[2 * step];
    const S t = v[3 * step] + v[4 * step], e = v[3 * step] - v[4 * step];
    v[0] = m0 + s + t;
    v[step] = d + 2 * e;
    v[2 * step] = s + 4 * t;
    v[3 * step] = d + 8 * e + m5;
}

// U of one channel and output to a thread, and zeros in the padding. channels, outputs: of a group in U.
template <class T>
__global__ void __launch_bounds__(WINOGRAD_THREADS, 1)
conv_winograd_weight(const T *__restrict__ weight, T *packed, const Axis rows, const Axis columns, const Filters filters,
                     long long channels, long long outputs) {
    long long number = static_cast<long long>(blockIdx.x) * WINOGRAD_THREADS + threadIdx.x;
    if (number >= filters.groups * channels * outputs) return;
    const long long o = take_axis(number, outputs), c = take_axis(number, channels), group = number;
    const bool there = c < filters.channels && o < filters.outputs;
    const T *const own =
        weight + group * filters.group_step + o * filters.output_step + c * filters.channel_step;
    T half[18], whole[POINTS];
#pragma unroll
    for (int u = 0; u < 3; ++u) {
        T taps[3];
#pragma unroll
        for (int t = 0; t < 3; ++t) taps[t] = there ? own[place_of_tap(rows, columns, filters, t, u)] : T(0);
        spread(half + u, 3, taps[0], taps[1], taps[2]);
    }
#pragma unroll
    for (int i = 0; i < 6; ++i) spread(whole + 6 * i, 1, half[3 * i], half[3 * i + 1], half[3 * i + 2]);
    T *const target = packed + (group * POINTS * channels + c) * outputs + o;
#pragma unroll
    for (int xi = 0; xi < POINTS; ++xi) target[xi * channels * outputs] = whole[xi];
}

// V of one tile and channel to a thread, and zeros in the padding.
template <class T>
__global__ void __launch_bounds__(WINOGRAD_THREADS, 4)
conv_winograd_input(const T *__restrict__ x, T *values, const Axis rows, const Axis columns, const Steps from,
                    const Filters filters, const Tiles tiles) {
    const long long number = static_cast<long long>(blockIdx.x) * WINOGRAD_THREADS + threadIdx.x;
    if (number >= filters.groups * tiles.channels * tiles.padded) return;
    const TileOfChannel mine(number, tiles, filters.groups, tiles.channels);
    const bool there = mine.tile < tiles.count && mine.channel < filters.channels;
    const Pixel tile(tiles.first + mine.tile, tiles.down, tiles.across);
    const T *const image =
        x + tile.image * from.image + (mine.group * filters.channels + mine.channel) * from.channel;
    T v[POINTS];
#pragma unroll
    for (int i = 0; i < 6; ++i) {
        const long long row = rows.origin + tile.row * TILE + i;
#pragma unroll
        for (int j = 0; j < 6; ++j) {
            const long long column = columns.origin + tile.column * TILE + j;
            const bool inside = there && within(row, rows.size) && within(column, columns.size);
            v[6 * i + j] = inside ? image[row * from.row + column * from.column] : T(0);
        }
    }
#pragma unroll
    for (int i = 0; i < 6; ++i) forth(v + 6 * i, 1);
#pragma unroll
    for (int j = 0; j < 6; ++j) forth(v + j, 6);
    T *const target = values + mine.place(tiles, tiles.channels);
#pragma unroll
    for (int xi = 0; xi < POINTS; ++xi) target[xi * tiles.padded * tiles.channels] = v[xi];
}

// One result by the definition. image, own: the first channels of the group and of the filter; row, column: the window's.
template <class T>
__device__ __forceinline__ T defined(const T *image, const T *own, const Axis &rows, const Axis &columns,
                                     const Steps &from, const Filters &filters, long long row, long long column) {
    T total = 0;
    for (int t = 0; t < 3; ++t)
        for (int u = 0; u < 3; ++u) {
            const bool inside = within(row + t, rows.size) && within(column + u, columns.size);
            const T *const pixel = image + (row + t) * from.row + (column + u) * from.column;
            const T *const tap = own + place_of_tap(rows, columns, filters, t, u);
            for (long long c = 0; c < filters.channels; ++c)
                total += (inside ? pixel[c * from.channel] : T(0)) * tap[c * filters.channel_step];
        }
    return total;
}

// The 4 x 4 results of one tile and output to a thread.
template <class T>
__global__ void __launch_bounds__(WINOGRAD_THREADS, 4)
conv_winograd_output(const T *__restrict__ products, const T *__restrict__ x, const T *__restrict__ weight, T *y,
                     const Epilogue<T> finish, const Axis rows, const Axis columns, const Steps from, const Steps to,
                     const Filters filters, const Tiles tiles) {
    const long long number = static_cast<long long>(blockIdx.x) * WINOGRAD_THREADS + threadIdx.x;
    if (number >= filters.groups * tiles.outputs * tiles.padded) return;
    const TileOfChannel mine(number, tiles, filters.groups, tiles.outputs);
    if (mine.tile >= tiles.count || mine.channel >= filters.outputs) return;
    const Pixel tile(tiles.first + mine.tile, tiles.down, tiles.across);
    const T *const source = products + mine.place(tiles, tiles.outputs);
    T v[POINTS];
#pragma unroll
    for (int xi = 0; xi < POINTS; ++xi) v[xi] = source[xi * tiles.padded * tiles.outputs];
#pragma unroll
    for (int i = 0; i < 6; ++i) back(v + 6 * i, 1);
    T check = 0;
#pragma unroll
    for (int j = 0; j < TILE; ++j) {
        back(v + j, 6);
#pragma unroll
        for (int i = 0; i < TILE; ++i) check += v[6 * i + j] * 0;
    }
    const bool finite = check == 0;
    const long long o = mine.group * filters.outputs + mine.channel;
    const T *const first = x + tile.image * from.image + mine.group * filters.channels * from.channel;
    const T *const own = weight + mine.group * filters.group_step + mine.channel * filters.output_step;
    if (finite && !finish.extra && (finish.code == NONE || finish.code == RELU)) {
        const T bias = finish.bias ? finish.bias[o] : T(0);
        const long long left = columns.count - tile.column * TILE;
        T *const corner = y + tile.image * to.image + o * to.channel +
                          (tile.row * to.row + tile.column * to.column) * TILE;
#pragma unroll
        for (int i = 0; i < TILE; ++i) {
            if (tile.row * TILE + i >= rows.count) break;
            Pack<T, TILE> line;
#pragma unroll
            for (int j = 0; j < TILE; ++j) {
                const T total = finish.bias ? v[6 * i + j] + bias : v[6 * i + j];
                line.lane[j] = finish.code == RELU && total <= 0 ? T(0) : total;
            }
            T *const target = corner + i * to.row;
            if (to.column == 1 && left >= TILE && (target - y) % TILE == 0) {
                store(target, line);
            } else {
#pragma unroll
                for (int j = 0; j < TILE; ++j)
                    if (j < left) target[j * to.column] = line.lane[j];
            }
        }
        return;
    }
#pragma unroll 1
    for (int k = 0; k < TILE * TILE; ++k) {   // as a loop, or the epilogue would be there sixteen times
        const long long row = tile.row * TILE + k / TILE, column = tile.column * TILE + k % TILE;
        if (row >= rows.count || column >= columns.count) continue;
        T total = v[0];
#pragma unroll
        for (int other = 1; other < TILE * TILE; ++other)
            total = k == other ? v[6 * (other / TILE) + other % TILE] : total;
        if (!finite)
            total = defined(first, own, rows, columns, from, filters, rows.origin + row, columns.origin + column);
        const long long place = tile.image * to.image + o * to.channel + row * to.row + column * to.column;
        y[place] = finish(total, o, place);
    }
}

}   // namespace tilewise
