// The weight gradient on tensor cores as an implicit matrix product (tensor.cuh): outputs x (tap, channel), summed over
// the pixels of all images.
//
//     grad_weight[o, (t, u, c)] = sum over pixels of  grad[pixel, o] * x[the tap's place of the pixel, c]
//
// in two stages (conv_sums.cu): blocks sum parts of the pixels, which are then added in order. Both operands have their
// channels last, in whole vectors (conv_packing.cu), so that a pixel of a step is a row of both tiles: of grad as it lies,
// of x gathered, one vector of one tap at a time.
#include "conv.cuh"
#include "matrix_result.cuh"
#include "tensor_loader.cuh"

namespace tilewise {

// Few outputs: 64 by 128 columns; and the same with more registers.
using Flat = TensorTile<1, 4, 4, 3>;
using FlatPair = TensorTile<1, 4, 4, 2>;

// tensor.cuh's loader for columns (t, u, c) of x. A thread keeps to one vector of one tap, and goes from pixel to pixel.
template <class E, class Tile> struct TapVectors {
    static constexpr int WIDTH = LANES<E>, STEP = 4 * WIDTH, PITCH = Tile::COLUMNS + GAP;
    static constexpr int LINE = Tile::COLUMNS / WIDTH, APART = Tile::THREADS / LINE, COUNT = STEP / APART;
    static_assert(APART * COUNT == STEP, "threads share a tile evenly");

    const E *image;
    const Axis &rows, &columns;
    const Steps &from;
    PixelCounter pixel;
    int down, across, c;

    // image: the first channel of the group in the first image; begin: the block's first pixel.
    __device__ __forceinline__ TapVectors(const E *image_, const Axis &rows_, const Axis &columns_, const Steps &from_,
                                          long long channels, long long first_column, long long begin)
        : image(image_), rows(rows_), columns(columns_), from(from_),
          pixel(begin + threadIdx.x / LINE, rows_.count, columns_.count) {
        // what a thread finds beyond the last column meets only sums that belong to none
        long long t = first_column + threadIdx.x % LINE * WIDTH;
        c = static_cast<int>(take_axis(t, channels));
        const long long u = take_axis(t, columns.taps);
        down = static_cast<int>(rows.origin + t * rows.spacing);
        across = static_cast<int>(columns.origin + u * columns.spacing);
    }

    __device__ __forceinline__ void copy(E *tile, long long k, long long end) {
        const int own = threadIdx.x / LINE;
        E *const mine = tile + own * PITCH + threadIdx.x % LINE * WIDTH;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int row = pixel.row * static_cast<int>(rows.stride) + down;
            const int column = pixel.column * static_cast<int>(columns.stride) + across;
            const bool inside = k + own + i * APART < end && within(row, rows.size) && within(column, columns.size);
            const long long offset = pixel.image * from.image + row * from.row + column * from.column + c;
            copy_16_bytes(mine + i * APART * PITCH, image + (inside ? offset : 0), inside);
            pixel.advance(APART, rows.count, columns.count);
        }
    }
};

// parts[part, group, o, column]; block (tile of outputs and of columns, group, part). filters.channels: of x as it lies.
template <class Math, class Tile, class E = typename Math::Element>
__global__ void __launch_bounds__(Tile::THREADS, Tile::RESIDENT)
conv_tensor_weight(const E *__restrict__ grad, const E *__restrict__ x, float *__restrict__ parts, const Axis rows,
                   const Axis columns, const Steps from, const Steps to, const Filters filters, long long pixels,
                   long long per_part, long long padded_outputs) {
    using Room = TensorRoom<Math, Tile, false, false>;
    float sums[Tile::HIGH][4][4];
    const long long width = filters.channels * rows.taps * columns.taps;
    const unsigned column_tiles = static_cast<unsigned>((width + Tile::COLUMNS - 1) / Tile::COLUMNS);
    const long long group = blockIdx.y, part = blockIdx.z;
    const long long first_output = static_cast<long long>(blockIdx.x / column_tiles) * Tile::ROWS;
    const long long first_column = static_cast<long long>(blockIdx.x % column_tiles) * Tile::COLUMNS;
    const long long begin = part * per_part, end = begin + per_part < pixels ? begin + per_part : pixels;
    const TensorLoader<E, Tile, Tile::ROWS, false> left{grad + group * padded_outputs, padded_outputs, to.column,
                                                        first_output};
    TapVectors<E, Tile> right(x + group * filters.channels, rows, columns, from, filters.channels, first_column, begin);
    multiply_tensor_tile<Room>(sums, left, right, begin, end);
    const MatrixResult<E, float, Finish<E>> result{
        nullptr, parts + (part * filters.groups + group) * filters.outputs * width, filters.outputs, width, first_output,
        first_column, 1, {nullptr, 0, NONE}};
    store_tensor_tile<Room>(sums, result);
}

}   // namespace tilewise
