// Convolution on Hopper's tensor cores (wgmma_product.cuh) as an implicit matrix product, pixels x outputs, summed over taps
// and channels:
//
//     y[pixel, o] = sum over k = (tap, c) of  x[the tap's place of the pixel, c] * packed[k, o]
//
// Both are packed as for conv_tensor.cu. A step is 64 of k, a line of 128 bytes for each pixel, in eight units of 16 bytes:
//
//     unit      0    1    2    3    4    5    6    7      t0, t1, ...: the threads that bring, each the same unit of
//     pixel  0  t0   t1   t2   t3   t4   t5   t6   t7     eight pixels. So a thread finds its tap and channel once a
//     pixel  1  t8   t9   ...                             step, by counting; and its swizzle, which depends on the
//     ...                                                 pixel modulo 8, is the same in every step.
//     pixel 16  t0   t1   ...
//
// A step of 128 x 256 in the machine code for sm_90a: 257 instructions of each warp that brings, 24 of them LDGSTS; 94 of
// each that multiplies, 4 of them HGMMA. Of 128 x 128: 231 with 16, and 90 with 4.
#include "conv_result.cuh"
#include "conv_wgmma.cuh"

namespace tilewise {

// The left operand: pixels, as `windows` has them.
template <class E> struct PixelLines {
    using Shape = SwizzledTile<WGMMA_ROWS, true>;
    static constexpr int APART = WARPGROUP / LINES;   // of a thread's pixels

    const E *image;
    const Axis &rows, &columns;
    const Steps &from;
    TapCounter<WGMMA_STEP> tap;
    PixelWindow<E> mine[Shape::VECTORS];
    int place;

    __device__ __forceinline__ PixelLines(const E *image_, const Axis &rows_, const Axis &columns_, const Steps &from_,
                                          long long channels, const PixelWindow<E> *windows)
        : image(image_), rows(rows_), columns(columns_), from(from_),
          tap(columns_, channels, static_cast<int>(threadIdx.x) % LINES * LANES<E>) {
        const int first = threadIdx.x % WARPGROUP / LINES;
        place = Shape::place(first, threadIdx.x % LINES);
#pragma unroll
        for (int i = 0; i < Shape::VECTORS; ++i) mine[i] = windows[first + i * APART];
    }

    __device__ __forceinline__ void copy(char *tile, int, long long, long long) {
        const TapPlace found = tap.next(rows, columns, from);
#pragma unroll
        for (int i = 0; i < Shape::VECTORS; ++i) {
            const bool inside = mine[i].sees(found, rows, columns);
            copy_16_bytes(tile + place + i * APART * LINE_BYTES, inside ? mine[i].origin + found.offset : image, inside);
        }
    }
};

// Block (tile of pixels, tile of outputs, group). filters.channels, padded_outputs: of packed.
template <class E, int N, bool LAST>
__global__ void __launch_bounds__(WGMMA_THREADS, 1)
conv_wgmma(const E *__restrict__ x, const E *__restrict__ packed, E *y, const Epilogue<E> finish, const Axis rows,
           const Axis columns, const Steps from, const Steps to, const Filters filters, long long pixels,
           long long padded_outputs) {
    using Room = WgmmaRoom<E, N, true, false>;
    __shared__ unsigned long long filled[FILLING], emptied[FILLING];
    __shared__ PixelWindow<E> windows[WGMMA_ROWS];
    __shared__ long long places[WGMMA_ROWS];   // of the pixels in y, -1 beyond the last
    const long long first_output = static_cast<long long>(blockIdx.y) * N, group = blockIdx.z;
    const long long depth = rows.taps * columns.taps * filters.channels;
    const E *const image = x + group * filters.channels;
    const Stages stages{filled, emptied};
    if (threadIdx.x == 0) stages.make();
    if (threadIdx.x < WGMMA_ROWS) {
        const long long number = static_cast<long long>(blockIdx.x) * WGMMA_ROWS + threadIdx.x;
        const bool there = number < pixels;
        // what is found beyond the last pixel meets only sums that belong to none
        windows[threadIdx.x] = PixelWindow<E>::of(image, there ? number : pixels - 1, rows, columns, from);
        places[threadIdx.x] = there ? place_of(Pixel(number, rows.count, columns.count), rows, columns, to) : -1;
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        give_registers_up<88>();
        PixelLines<E> left(image, rows, columns, from, filters.channels, windows);
        RowLines<E, N> right(packed + group * depth * padded_outputs + first_output, padded_outputs - first_output,
                             padded_outputs);
        bring<Room>(left, right, stages, 0, depth);
    } else {
        take_registers<208>();
        float sums[N / 2];
        multiply_filled<Room>(sums, stages, 0, depth);
        const ImageResult<E, LAST> result{y,       finish,  places, first_output, filters.outputs,
                                          group * filters.outputs + first_output, to.channel};
        store_multiplied<Room, !LAST>(sums, result);
    }
}

}   // namespace tilewise
