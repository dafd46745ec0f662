// Where the sums of an implicit product go: the epilogue of product.cuh and of tensor.cuh for an image.
#pragma once
#include "conv.cuh"

namespace tilewise {

// places: of the tile's pixels in y, -1 beyond the last; channel: the tile's first output.
template <class T, bool LAST> struct ImageResult {
    T *y;
    const Epilogue<T> &finish;
    const long long *places;
    long long first_output, outputs, channel, channel_step;

    // NHWC: the pixel's place; NCHW: the output.
    __device__ __forceinline__ long long row(int i) const {
        return LAST ? places[i] : first_output + i < outputs ? i : -1;
    }
    template <int N>
    __device__ __forceinline__ void put(long long row, int column, const Sum<T> (&values)[N]) const {
        constexpr int WIDTH = LANES<T>;
        if (row < 0) return;
        const long long o = channel + (LAST ? column : row);
        if constexpr (WIDTH <= N) {
            const long long place = LAST ? row + o : places[column] + o * channel_step;
            const bool whole = LAST ? first_output + column + N <= outputs
                                    : places[column + N - 1] == places[column] + N - 1 && places[column] >= 0;
            if (whole && place % WIDTH == 0) {
#pragma unroll
                for (int i = 0; i < N; i += WIDTH) {
                    Pack<T, WIDTH> pack;
#pragma unroll
                    for (int j = 0; j < WIDTH; ++j)
                        pack.lane[j] = finish(values[i + j], LAST ? o + i + j : o, place + i + j);
                    store(y + place + i, pack);
                }
                return;
            }
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const bool there = LAST ? first_output + column + i < outputs : places[column + i] >= 0;
            const long long own = LAST ? o + i : o, place = LAST ? row + own : places[column + i] + own * channel_step;
            if (there) y[place] = finish(values[i], own, place);
        }
    }
};

}   // namespace tilewise
