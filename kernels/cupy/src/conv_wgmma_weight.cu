// The weight gradient on Hopper's tensor cores (wgmma_product.cuh) as an implicit matrix product: outputs x (tap, channel),
// summed over the pixels of all images, in two stages, of operands that are packed: conv_tensor_weight.cu's.
//
//     grad_weight[o, (t, u, c)] = sum over pixels of  grad[pixel, o] * x[the tap's place of the pixel, c]
//
// A step is 64 pixels, each a line of both tiles. Of x a thread brings one vector of one tap, for 8 or 16 of the pixels,
// whose windows the warpgroup finds together: a thread for each, in shared memory, of two steps in turn.
//
// A step of 128 x 256 in the machine code for sm_90a: 511 instructions of each warp that brings, 24 of them LDGSTS; 93 of
// each that multiplies, 4 of them HGMMA. Of 128 x 128: 364 with 16, and 92 with 4.
#include "conv_wgmma.cuh"
#include "matrix_result.cuh"

namespace tilewise {

template <class E> using StepWindows = PixelWindow<E>[WGMMA_STEP];

// The right operand: columns (t, u, c) of x.
template <class E, int N> struct TapLines {
    using Shape = SwizzledTile<N, false>;
    static constexpr int LINE = N / LANES<E>, APART = WARPGROUP / LINE;   // of a thread's pixels
    static constexpr int NOWHERE = -2147483647 - 1;   // a row that no tap brings into an image

    const E *image;
    const Axis &rows, &columns;
    const Steps &from;
    StepWindows<E> *windows;   // two
    TapPlace tap;
    int k, unit, turn = 0;

    __device__ __forceinline__ TapLines(const E *image_, const Axis &rows_, const Axis &columns_, const Steps &from_,
                                        long long channels, long long first_column, StepWindows<E> *windows_)
        : image(image_), rows(rows_), columns(columns_), from(from_), windows(windows_) {
        const int thread = threadIdx.x % WARPGROUP;
        k = thread / LINE;
        unit = thread % LINE;
        const int column = static_cast<int>(first_column) + unit * LANES<E>;
        tap = TapCounter<WGMMA_STEP>(columns, channels, column).next(rows, columns, from);
    }

    __device__ __forceinline__ void copy(char *tile, int thread, long long begin, long long end) {
        PixelWindow<E> *const step = windows[turn];
        turn ^= 1;
        if (thread < WGMMA_STEP) {
            const bool there = begin + thread < end;
            PixelWindow<E> window = PixelWindow<E>::of(image, there ? begin + thread : end - 1, rows, columns, from);
            if (!there) window.row = NOWHERE;
            step[thread] = window;
        }
        meet<WARPGROUP>(2);   // before it all have read the windows of two steps ago
#pragma unroll
        for (int i = 0; i < Shape::VECTORS; ++i) {
            const PixelWindow<E> window = step[k + i * APART];
            const bool inside = window.sees(tap, rows, columns);
            copy_16_bytes(tile + Shape::place(k + i * APART, unit), inside ? window.origin + tap.offset : image, inside);
        }
    }
};

// parts[part, group, o, column]; block (tile of outputs and of columns, group, part). filters.channels: of x as it lies.
template <class E, int N>
__global__ void __launch_bounds__(WGMMA_THREADS, 1)
conv_wgmma_weight(const E *__restrict__ grad, const E *__restrict__ x, float *__restrict__ parts, const Axis rows,
                  const Axis columns, const Steps from, const Steps to, const Filters filters, long long pixels,
                  long long per_part, long long padded_outputs) {
    using Room = WgmmaRoom<E, N, false, false>;
    __shared__ unsigned long long filled[FILLING], emptied[FILLING];
    __shared__ StepWindows<E> windows[2];
    const long long width = filters.channels * rows.taps * columns.taps;
    const unsigned column_tiles = static_cast<unsigned>((width + N - 1) / N);
    const long long group = blockIdx.y, part = blockIdx.z;
    const long long first_output = static_cast<long long>(blockIdx.x / column_tiles) * WGMMA_ROWS;
    const long long first_column = static_cast<long long>(blockIdx.x % column_tiles) * N;
    const long long begin = part * per_part, end = begin + per_part < pixels ? begin + per_part : pixels;
    const Stages stages{filled, emptied};
    if (threadIdx.x == 0) stages.make();
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        give_registers_up<88>();
        RowLines<E, WGMMA_ROWS> left(grad + begin * to.column + group * padded_outputs + first_output,
                                     padded_outputs - first_output, to.column);
        TapLines<E, N> right(x + group * filters.channels, rows, columns, from, filters.channels, first_column, windows);
        bring<Room>(left, right, stages, begin, end);
    } else {
        take_registers<208>();
        float sums[N / 2];
        multiply_filled<Room>(sums, stages, begin, end);
        const MatrixResult<E, float, Finish<E>> result{
            nullptr, parts + (part * filters.groups + group) * filters.outputs * width, filters.outputs, width,
            first_output, first_column, 1, {nullptr, 0, NONE}};
        store_multiplied<Room>(sums, result);
    }
}

}   // namespace tilewise
