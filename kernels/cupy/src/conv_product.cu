// Convolution as an implicit matrix product (product.cuh): outputs x pixels in NCHW, pixels x outputs in NHWC, summed over
// taps and channels; nothing is unfolded.
//
//     y[o, pixel] = sum over k = (tap, c) of  packed[k, o] * x[c, the tap's place of the pixel]
//
// The weights are packed first: (group, k, outputs padded to whole vectors). Of x, each thread loads neighbouring k of one
// pixel, and zeros outside of the image:
//
//     any channels    one by one; a thread counts channel, column, row of the tap on. Lanes run along pixels.
//     whole           a thread's k lie within one tap, whose place is found once a step.
//                     NCHW: lanes run along pixels. NHWC: neighbouring channels come 16 bytes at a time.
#include "conv_result.cuh"
#include "matrix_loader.cuh"

namespace tilewise {

// Few outputs: 32 of them by 128 pixels, in either order.
using Flat = Tile<1, 4, 8, 4, 16, 3>;
using Upright = Tile<4, 1, 8, 4, 16, 3>;

template <class T, class Tile, int SIZE, bool LAST, bool WHOLE> struct PixelLoader {
    static constexpr bool COPIES = false, VECTORS = LAST && WHOLE;
    static constexpr int COUNT = Tile::STEP * SIZE / Tile::THREADS, SHARERS = Tile::STEP / COUNT;
    static constexpr int PITCH = SIZE + PAD, N = VECTORS ? LANES<T> : 1;
    static_assert(COUNT * SHARERS == Tile::STEP && COUNT % N == 0, "a thread has neighbouring k of one pixel");

    T kept[COUNT];
    const T *image;
    const Axis &rows, &columns;
    const Steps &from;
    int first_row, first_column, channels, t = 0, u = 0, c, place;   // which fit 32 bits

    // image: the first channel of the group in the first image.
    __device__ __forceinline__ PixelLoader(const T *first, const Axis &rows_, const Axis &columns_, const Steps &from_,
                                           long long channels_, long long first_pixel, long long pixels)
        : rows(rows_), columns(columns_), from(from_), channels(static_cast<int>(channels_)) {
        const int thread = threadIdx.x;
        const int own = VECTORS ? thread / SHARERS : thread % SIZE;
        const int own_k = (VECTORS ? thread % SHARERS : thread / SIZE) * COUNT;
        // what a thread finds beyond the last pixel meets only sums that belong to none
        const long long number = first_pixel + own < pixels ? first_pixel + own : pixels - 1;
        const Pixel pixel(number, rows.count, columns.count);
        image = first + pixel.image * from.image;
        first_row = static_cast<int>(rows.origin + pixel.row * rows.stride);
        first_column = static_cast<int>(columns.origin + pixel.column * columns.stride);
        place = own_k * PITCH + own;
        c = own_k;
    }

    // The steps come in their order.
    template <class S> __device__ __forceinline__ void fetch(S *, long long, long long) {
        settle();
        if constexpr (WHOLE) {
            const T *const source = find();
#pragma unroll
            for (int k = 0; k < COUNT; k += N) {
                const Pack<T, N> pack = source ? load<N>(source + k * (LAST ? 1 : from.channel)) : Pack<T, N>{};
#pragma unroll
                for (int i = 0; i < N; ++i) kept[k + i] = pack.lane[i];
            }
            c += Tile::STEP;
        } else {
#pragma unroll
            for (int k = 0; k < COUNT; ++k) {
                const T *const source = find();
                kept[k] = source ? *source : T{};
                ++c;
                if (c == channels) next_tap();
            }
            c += Tile::STEP - COUNT;
        }
    }

    template <class S> __device__ __forceinline__ void keep(S *tile) {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) tile[place + k * PITCH] = widen(kept[k]);
    }

private:
    __device__ __forceinline__ void next_tap() {
        c -= channels;
        if (++u == columns.taps) {
            u = 0;
            ++t;
        }
    }
    __device__ __forceinline__ void settle() {
        while (c >= channels) next_tap();
    }
    // Where channel c of the tap is; null outside of the image, and after the last tap.
    __device__ __forceinline__ const T *find() const {
        const int row = first_row + t * static_cast<int>(rows.spacing);
        const int column = first_column + u * static_cast<int>(columns.spacing);
        if (t >= rows.taps || !within(row, rows.size) || !within(column, columns.size)) return nullptr;
        return image + row * from.row + column * from.column + c * from.channel;
    }
};

template <class T, class Tile, int SIZE, int N, bool COPIED> struct WeightLoaderOf {
    using type = MatrixLoader<Sum<T>, T, Tile, SIZE, N, BY_ROW>;
};
template <class Tile, int SIZE, int N> struct WeightLoaderOf<float, Tile, SIZE, N, true> {
    using type = CopyingLoader<Tile, SIZE>;
};
template <class T, class Tile, int SIZE, int N, bool COPIED>
using WeightLoader = typename WeightLoaderOf<T, Tile, SIZE, N, COPIED>::type;

// For __launch_bounds__: before 9.0 two large blocks beside each other have too few registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int ALONE = 128 * 128;   // sums of such a block
#else
constexpr int ALONE = 1 << 30;
#endif
template <class T, class Tile>
constexpr int PRODUCT_BLOCKS = Tile::ROWS * Tile::COLUMNS >= ALONE ? 1 : RESIDENT_BLOCKS<Tile, false, Sum<T>>;

// Block (tile of pixels, tile of outputs, group). padded_outputs: of packed.
// COPIED: the weights come by cp.async, without a register in between.
template <class T, class Tile, bool LAST, bool WHOLE, bool COPIED>
__global__ void __launch_bounds__(Tile::THREADS, PRODUCT_BLOCKS<T, Tile>)
conv_product(const T *__restrict__ x, const T *__restrict__ packed, T *y, const Epilogue<T> finish, const Axis rows,
         const Axis columns, const Steps from, const Steps to, const Filters filters, long long pixels,
         long long padded_outputs) {
    using S = Sum<T>;
    constexpr int OUTPUTS = LAST ? Tile::COLUMNS : Tile::ROWS, PIXELS = LAST ? Tile::ROWS : Tile::COLUMNS;
    __shared__ TileRoom<S, Tile> room;
    __shared__ long long places[PIXELS];
    const long long first_pixel = static_cast<long long>(blockIdx.x) * PIXELS, group = blockIdx.z;
    const long long first_output = static_cast<long long>(blockIdx.y) * OUTPUTS;
    const long long depth = rows.taps * columns.taps * filters.channels;
    for (int p = threadIdx.x; p < PIXELS; p += Tile::THREADS)
        places[p] = first_pixel + p < pixels
                        ? place_of(Pixel(first_pixel + p, rows.count, columns.count), rows, columns, to)
                        : -1;
    S sums[Tile::DOWN][Tile::ACROSS];
    constexpr int N = OUTPUTS * Tile::STEP >= Tile::THREADS * LANES<T> ? LANES<T> : 1;   // one by one, if too few to share
    WeightLoader<T, Tile, OUTPUTS, N, COPIED> weights(
        {packed + group * depth * padded_outputs, padded_outputs, 1, padded_outputs}, first_output);
    PixelLoader<T, Tile, PIXELS, LAST, WHOLE> values(x + group * filters.channels * from.channel, rows, columns, from,
                                                     filters.channels, first_pixel, pixels);
    if constexpr (LAST)
        multiply_tile<Tile>(sums, room, values, weights, 0, depth);
    else
        multiply_tile<Tile>(sums, room, weights, values, 0, depth);
    const ImageResult<T, LAST> result{y,       finish,  places, first_output, filters.outputs,
                                      group * filters.outputs + first_output, to.channel};
    store_tile<Tile>(sums, room, result);
}

}   // namespace tilewise
