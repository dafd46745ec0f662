// What the kernels of convolution share: a correlation (conv_geometry.py) in numbers, and what becomes of its sums.
#pragma once
#include "activation.cuh"

namespace tilewise {

// Rows or columns of a correlation, in the order of Axis.numbers.
struct Axis {
    long long size, first, step, count, origin, stride, spacing, taps, first_tap, tap_step;
};

// Elements from an image, a channel, a row, a column to the next.
struct Steps {
    long long image, channel, row, column;
};

// groups of `outputs` outputs, summed over `channels` channels each. group_step, output_step, channel_step: elements of
// the weight to the next; its taps follow each other, `width` a row.
struct Filters {
    long long groups, outputs, channels, group_step, output_step, channel_step, width;
};

// activation(total + bias[channel] + extra[place]); bias and extra may be null.
template <class T> struct Epilogue {
    const T *bias, *extra;
    int code;
    Sum<T> slope;

    __device__ __forceinline__ T operator()(Sum<T> total, long long channel, long long place) const {
        if (bias) total += widen(bias[channel]);
        if (extra) total += widen(extra[place]);
        return narrow<T>(activate(total, code, slope));
    }
};

// A result's row, column and image.
struct Pixel {
    long long image, row, column;

    __device__ __forceinline__ Pixel(long long number, long long rows, long long columns) {
        column = take_axis(number, columns);
        row = take_axis(number, rows);
        image = number;
    }
};

// The same for a thread that goes on by counting; in numbers that fit 32 bits.
struct PixelCounter {
    int image, row, column;

    __device__ __forceinline__ PixelCounter() {}
    __device__ __forceinline__ PixelCounter(long long number, long long rows, long long columns) {
        const Pixel pixel(number, rows, columns);
        image = static_cast<int>(pixel.image);
        row = static_cast<int>(pixel.row);
        column = static_cast<int>(pixel.column);
    }
    __device__ __forceinline__ void advance(int pixels, long long rows, long long columns) {
        column += pixels;
        while (column >= columns) {
            column -= static_cast<int>(columns);
            if (++row == rows) {
                row = 0;
                ++image;
            }
        }
    }
};

__device__ __forceinline__ long long place_of(const Pixel &p, const Axis &rows, const Axis &columns, const Steps &y) {
    return p.image * y.image + (rows.first + p.row * rows.step) * y.row +
           (columns.first + p.column * columns.step) * y.column;
}

__device__ __forceinline__ bool within(long long i, long long n) {
    return static_cast<unsigned long long>(i) < static_cast<unsigned long long>(n);
}

}   // namespace tilewise
