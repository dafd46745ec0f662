// The weight gradient as an implicit matrix product (product.cuh): outputs x (channel, tap), summed over the pixels of all
// images.
//
//     grad_weight[o, (c, t, u)] = sum over pixels of  grad[o, pixel] * x[c, the tap's place of the pixel]
//
// in two stages (conv_sums.cu): blocks sum parts of the pixels, which are then added in order. What lies side by side in
// memory is shared out along the lanes of a warp:
//
//     NCHW   pixels: a thread has one pixel of a step, of several outputs or columns (c, t, u)
//     NHWC   channels: a thread has one output or one column (t, u, c), and neighbouring pixels
#include "conv.cuh"
#include "matrix_result.cuh"

namespace tilewise {

using Narrow = Tile<2, 2, 4, 4, 16, 2>;   // 32 x 64, for double

// One side: rows are channels of an image of `filters`, or if TAPPED (channel, tap) of the image that they see.
template <class T, class Tile, int SIZE, bool LAST, bool TAPPED> struct PixelSums {
    static constexpr bool COPIES = false;
    static constexpr int THREADS = Tile::THREADS, STEP = Tile::STEP, PITCH = SIZE + PAD;
    static constexpr int COUNT = STEP * SIZE / THREADS, APART = THREADS / STEP;   // APART: rows loaded together
    static constexpr int OWN = LAST ? 1 : COUNT;                                  // rows of a thread
    static_assert(COUNT * THREADS == STEP * SIZE && APART * STEP == THREADS, "threads share a tile evenly");

    T kept[COUNT];
    const T *image;
    const Axis &rows, &columns;
    const Steps &steps;
    int offsets[OWN], down[OWN], across[OWN];   // in an image, of less than 2^31 elements
    long long k;
    PixelCounter pixel;
    int place;

    // first: the group's first channel in the first image; begin: the block's first pixel.
    __device__ __forceinline__ PixelSums(const T *first, const Axis &rows_, const Axis &columns_, const Steps &steps_,
                                         long long channels, long long first_row, long long all_rows, long long begin)
        : image(first), rows(rows_), columns(columns_), steps(steps_) {
        const int thread = threadIdx.x, own = LAST ? thread % SIZE : thread / STEP;
        const int own_k = LAST ? thread / SIZE * COUNT : thread % STEP;
#pragma unroll
        for (int e = 0; e < OWN; ++e) {
            // what a thread finds beyond the last row meets only sums that belong to none
            long long c = first_row + own + e * APART;
            if (c >= all_rows) c = all_rows - 1;
            down[e] = across[e] = 0;
            if (TAPPED) {
                long long tap = c;
                if (LAST) {
                    c = take_axis(tap, channels);
                } else {
                    c = divide(tap, rows.taps * columns.taps);
                    tap -= c * rows.taps * columns.taps;
                }
                const long long t = divide(tap, columns.taps);
                down[e] = static_cast<int>(rows.origin + t * rows.spacing);
                across[e] = static_cast<int>(columns.origin + (tap - t * columns.taps) * columns.spacing);
            }
            offsets[e] = static_cast<int>(c * steps.channel);
        }
        place = own_k * PITCH + own;
        k = begin + own_k;
        pixel = PixelCounter(k, rows.count, columns.count);
    }

    template <class S> __device__ __forceinline__ void fetch(S *, long long, long long end) {
#pragma unroll
        for (int e = 0; e < COUNT; ++e) {
            const int own = LAST ? 0 : e;
            const int row = TAPPED ? pixel.row * static_cast<int>(rows.stride) + down[own] : pixel.row;
            const int column =
                TAPPED ? pixel.column * static_cast<int>(columns.stride) + across[own] : pixel.column;
            const bool inside = k < end && (!TAPPED || (within(row, rows.size) && within(column, columns.size)));
            const int offset = offsets[own] + row * static_cast<int>(steps.row) + column * static_cast<int>(steps.column);
            kept[e] = inside ? image[pixel.image * steps.image + offset] : T{};
            if (LAST) advance(1);
        }
        advance(LAST ? STEP - COUNT : STEP);
    }

    template <class S> __device__ __forceinline__ void keep(S *tile) {
#pragma unroll
        for (int e = 0; e < COUNT; ++e) tile[place + (LAST ? e * PITCH : e * APART)] = widen(kept[e]);
    }

private:
    __device__ __forceinline__ void advance(int pixels) {
        k += pixels;
        pixel.advance(pixels, rows.count, columns.count);
    }
};

// parts[part, o, column]; block (tile of outputs and of columns, group, part).
template <class T, class Tile, bool LAST>
__global__ void __launch_bounds__(Tile::THREADS, 2)
conv_product_weight(const T *__restrict__ grad, const T *__restrict__ x, Sum<T> *__restrict__ parts, const Axis rows,
                const Axis columns, const Steps from, const Steps to, const Filters filters, long long pixels,
                long long per_part) {
    using S = Sum<T>;
    __shared__ TileRoom<S, Tile> room;
    S sums[Tile::DOWN][Tile::ACROSS];
    const long long width = filters.channels * rows.taps * columns.taps;
    const unsigned column_tiles = static_cast<unsigned>((width + Tile::COLUMNS - 1) / Tile::COLUMNS);
    const long long group = blockIdx.y, part = blockIdx.z;
    const long long first_output = static_cast<long long>(blockIdx.x / column_tiles) * Tile::ROWS;
    const long long first_column = static_cast<long long>(blockIdx.x % column_tiles) * Tile::COLUMNS;
    const long long begin = part * per_part, end = begin + per_part < pixels ? begin + per_part : pixels;
    PixelSums<T, Tile, Tile::ROWS, LAST, false> left(grad + group * filters.outputs * to.channel, rows, columns, to,
                                                     filters.outputs, first_output, filters.outputs, begin);
    PixelSums<T, Tile, Tile::COLUMNS, LAST, true> right(x + group * filters.channels * from.channel, rows, columns, from,
                                                        filters.channels, first_column, width, begin);
    multiply_tile<Tile>(sums, room, left, right, begin, end);
    const MatrixResult<T, S, Finish<T>> result{
        nullptr, parts + (part * filters.groups + group) * filters.outputs * width, filters.outputs, width, first_output,
        first_column, width % BLOCK == 0, {nullptr, 0, NONE}};
    store_tile<Tile>(sums, room, result);
}

}   // namespace tilewise
