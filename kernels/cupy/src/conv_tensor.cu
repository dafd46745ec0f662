// Convolution on tensor cores as an implicit matrix product (tensor.cuh): pixels x outputs in NHWC, outputs x pixels in
// NCHW, summed over taps and channels.
//
//     y[pixel, o] = sum over k = (tap, c) of  x[the tap's place of the pixel, c] * packed[k, o]
//
// x has its channels last, in whole vectors, so that each comes by one cp.async, or zeros where the tap is outside; the
// weights are packed: (group, k, outputs), both in whole vectors, zeros beyond (conv_packing.cu makes both). Both layouts
// multiply the same numbers. The result is written in the layout of y, from shared memory, 16 bytes at a time: along the
// outputs or along the pixels, which are the columns of the product.
#include "conv_result.cuh"
#include "conv_tensor.cuh"
#include "tensor_loader.cuh"

namespace tilewise {

// Few outputs, 64 of them by 128 pixels, in either order; and the same with more registers.
using Upright = TensorTile<2, 2, 4, 3>;
using Flat = TensorTile<1, 4, 4, 3>;
using UprightPair = TensorTile<2, 2, 4, 2>;
using FlatPair = TensorTile<1, 4, 4, 2>;

// tensor.cuh's loader for SIZE pixels, k contiguous.
template <class E, class Tile, int SIZE> struct PixelVectors {
    static constexpr int WIDTH = LANES<E>, STEP = 4 * WIDTH, PITCH = STEP + WIDTH, LINE = STEP / WIDTH;
    static constexpr int APART = Tile::THREADS / LINE, COUNT = SIZE / APART;   // of a thread's pixels
    static_assert(COUNT * APART == SIZE, "threads share a tile evenly");

    const E *image;
    const Axis &rows, &columns;
    const Steps &from;
    TapCounter<STEP> tap;
    PixelWindow<E> windows[COUNT];

    __device__ __forceinline__ PixelVectors(const E *image_, const Axis &rows_, const Axis &columns_, const Steps &from_,
                                            long long channels, long long first_pixel, long long pixels)
        : image(image_), rows(rows_), columns(columns_), from(from_),
          tap(columns_, channels, static_cast<int>(threadIdx.x) % LINE * WIDTH) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            // what a thread finds beyond the last pixel meets only sums that belong to none
            const long long number = first_pixel + threadIdx.x / LINE + i * APART;
            windows[i] = PixelWindow<E>::of(image, number < pixels ? number : pixels - 1, rows, columns, from);
        }
    }

    __device__ __forceinline__ void copy(E *tile, long long, long long) {
        E *const mine = tile + threadIdx.x / LINE * PITCH + threadIdx.x % LINE * WIDTH;
        const TapPlace place = tap.next(rows, columns, from);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const bool inside = windows[i].sees(place, rows, columns);
            copy_16_bytes(mine + i * APART * PITCH, inside ? windows[i].origin + place.offset : image, inside);
        }
    }
};

// Block (tile of pixels, tile of outputs, group). filters.channels, padded_outputs: of packed.
template <class Math, class Tile, bool LAST, class E = typename Math::Element>
__global__ void __launch_bounds__(Tile::THREADS, Tile::RESIDENT)
conv_tensor(const E *__restrict__ x, const E *__restrict__ packed, E *y, const Epilogue<E> finish, const Axis rows,
            const Axis columns, const Steps from, const Steps to, const Filters filters, long long pixels,
            long long padded_outputs) {
    using Room = TensorRoom<Math, Tile, LAST, !LAST>;
    constexpr int OUTPUTS = LAST ? Tile::COLUMNS : Tile::ROWS, PIXELS = LAST ? Tile::ROWS : Tile::COLUMNS;
    __shared__ long long places[PIXELS];
    const long long first_pixel = static_cast<long long>(blockIdx.x) * PIXELS, group = blockIdx.z;
    const long long first_output = static_cast<long long>(blockIdx.y) * OUTPUTS;
    const long long depth = rows.taps * columns.taps * filters.channels;
    for (int p = threadIdx.x; p < PIXELS; p += Tile::THREADS)
        places[p] = first_pixel + p < pixels
                        ? place_of(Pixel(first_pixel + p, rows.count, columns.count), rows, columns, to)
                        : -1;
    float sums[Tile::HIGH][4][4];
    const TensorLoader<E, Tile, OUTPUTS, false> weights{packed + group * depth * padded_outputs, padded_outputs,
                                                        padded_outputs, first_output};
    PixelVectors<E, Tile, PIXELS> values(x + group * filters.channels, rows, columns, from, filters.channels, first_pixel,
                                         pixels);
    if constexpr (LAST)
        multiply_tensor_tile<Room>(sums, values, weights, 0, depth);
    else
        multiply_tensor_tile<Room>(sums, weights, values, 0, depth);
    const ImageResult<E, LAST> result{y,       finish,  places, first_output, filters.outputs,
                                      group * filters.outputs + first_output, to.channel};
    store_tensor_tile<Room>(sums, result);
}

// One tap, where x's pixels are y's, in NCHW: outputs x pixels of each image, and x needs no other order. Block (tile of
// pixels, tile of outputs, image and group). pixels: of an image, whole vectors.
template <class Math, class Tile, class E = typename Math::Element>
__global__ void __launch_bounds__(Tile::THREADS, Tile::RESIDENT)
conv_pointwise(const E *__restrict__ x, const E *__restrict__ packed, E *y, const Epilogue<E> finish, long long pixels,
               long long groups, long long outputs, long long channels, long long padded_outputs) {
    using Room = TensorRoom<Math, Tile, false, false>;
    __shared__ long long places[Tile::COLUMNS], first_channel;   // not in registers while there are products
    const unsigned many = static_cast<unsigned>(groups), image = blockIdx.z / many, group = blockIdx.z - image * many;
    const long long first_pixel = static_cast<long long>(blockIdx.x) * Tile::COLUMNS;
    const long long first_output = static_cast<long long>(blockIdx.y) * Tile::ROWS;
    for (int p = threadIdx.x; p < Tile::COLUMNS; p += Tile::THREADS)
        places[p] = first_pixel + p < pixels ? image * groups * outputs * pixels + first_pixel + p : -1;
    if (threadIdx.x == 0) first_channel = group * outputs + first_output;
    float sums[Tile::HIGH][4][4];
    const TensorLoader<E, Tile, Tile::ROWS, false> weights{packed + group * channels * padded_outputs, padded_outputs,
                                                           padded_outputs, first_output};
    const TensorLoader<E, Tile, Tile::COLUMNS, false> values{x + blockIdx.z * channels * pixels, pixels, pixels,
                                                             first_pixel};
    multiply_tensor_tile<Room>(sums, weights, values, 0, channels);
    const ImageResult<E, false> result{y, finish, places, first_output, outputs, first_channel, pixels};
    store_tensor_tile<Room>(sums, result);
}

}   // namespace tilewise
