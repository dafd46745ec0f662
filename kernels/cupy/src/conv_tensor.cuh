// Where the taps of a convolution find an image whose channels lie last, each group's in whole vectors of 16 bytes
// (conv_packing.cu): how the found vectors come to shared memory is the kernels'.
//
// A sum runs over k = (tap, channel), a step at a time. A thread brings the same place of every step, one vector, for
// several pixels: the tap that it belongs to is counted once, and looked for in each pixel's window.
//
//     TapCounter<STEP> tap(columns, channels, first_k);                      // the thread's k in the first step
//     const auto window = PixelWindow<E>::of(image, number, rows, columns, from);   // for each of its pixels
//     for each step:  const TapPlace place = tap.next(rows, columns, from);
//                     window.sees(place, rows, columns) ? window.origin + place.offset : zeros
#pragma once
#include "conv.cuh"

namespace tilewise {

// Rows and columns from a window's first one, elements from its origin; there: not beyond the last tap.
struct TapPlace {
    int down, across;
    long long offset;
    bool there;
};

template <int STEP> struct TapCounter {
    int channels, taps_across, t = 0, u = 0, c;   // which fit 32 bits

    __device__ __forceinline__ TapCounter(const Axis &columns, long long channels_, int first_k)
        : channels(static_cast<int>(channels_)), taps_across(static_cast<int>(columns.taps)), c(first_k) {}

    // Of this step; the steps come in their order.
    __device__ __forceinline__ TapPlace next(const Axis &rows, const Axis &columns, const Steps &from) {
        while (c >= channels) {
            c -= channels;
            if (++u == taps_across) {
                u = 0;
                ++t;
            }
        }
        const int down = t * static_cast<int>(rows.spacing), across = u * static_cast<int>(columns.spacing);
        const TapPlace place{down, across, down * from.row + across * from.column + c, t < rows.taps};
        c += STEP;
        return place;
    }
};

// What a pixel of the result sees. image: the first channel of the group in the first image.
template <class E> struct PixelWindow {
    const E *origin;   // of the window: it may be outside of the image
    int row, column;

    // Not a constructor, so that windows may lie in shared memory.
    static __device__ __forceinline__ PixelWindow of(const E *image, long long number, const Axis &rows,
                                                     const Axis &columns, const Steps &from) {
        const Pixel pixel(number, rows.count, columns.count);
        const int row = static_cast<int>(rows.origin + pixel.row * rows.stride);
        const int column = static_cast<int>(columns.origin + pixel.column * columns.stride);
        return {image + pixel.image * from.image + row * from.row + column * from.column, row, column};
    }
    __device__ __forceinline__ bool sees(const TapPlace &tap, const Axis &rows, const Axis &columns) const {
        const unsigned i = row + tap.down, j = column + tap.across;   // before the image they are large
        return tap.there && i < static_cast<unsigned>(rows.size) && j < static_cast<unsigned>(columns.size);
    }
};

}   // namespace tilewise
