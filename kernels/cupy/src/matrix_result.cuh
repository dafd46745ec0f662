// Where a product's sums go: product.cuh's epilogue for a matrix by rows.
#pragma once
#include "activation.cuh"
#include "product.cuh"

namespace tilewise {

// What happens to a number before it is stored: activation(sum + bias). bias: of the columns, or null.
template <class T> struct Finish {
    const T *bias;
    Sum<T> slope;   // leaky_relu's
    int code;

    __device__ __forceinline__ T operator()(Sum<T> sum, long long column) const {
        return narrow<T>(activate(bias ? sum + widen(bias[column]) : sum, code, slope));
    }
};

// Integers wrap: they are summed without a sign, in 32 bits where that is enough. Products of 8 bits become int, exact.
template <class T, int BYTES = sizeof(T)> struct Whole {
    using Sum = unsigned;
    using Result = T;
};
template <class T> struct Whole<T, 8> {
    using Sum = unsigned long long;
    using Result = T;
};
template <class T> struct Whole<T, 1> {
    using Sum = unsigned;
    using Result = int;
};
template <class T> using WholeSum = typename Whole<T>::Sum;
template <class T> using WholeResult = typename Whole<T>::Result;

// In the place of Finish: a sum's low bits.
template <class T> struct Cut {
    __device__ __forceinline__ WholeResult<T> operator()(WholeSum<T> sum, long long) const {
        return static_cast<WholeResult<T>>(sum);
    }
};

// A block's part of a matrix. sums: where the sums go as they are, if it is not null, else finish's go to result.
// vectors: whether four neighbours may be stored in 16-byte pieces.
template <class T, class S, class Last> struct MatrixResult {
    T *result;
    S *sums;
    long long rows, columns, first_row, first_column;
    int vectors;
    Last finish;

    // Where the row begins; -1 where there is none.
    __device__ __forceinline__ long long row(int i) const {
        return first_row + i < rows ? (first_row + i) * columns : -1;
    }
    __device__ __forceinline__ void put(long long place, int offset, const S (&values)[BLOCK]) const {
        const long long column = first_column + offset;
        if (place < 0 || column >= columns) return;
        if (sums) {
            write(sums + place + column, column, [&](int i) { return values[i]; });
        } else {
            T finished[BLOCK];
#pragma unroll
            for (int i = 0; i < BLOCK; ++i)
                if (column + i < columns) finished[i] = finish(values[i], column + i);
            write(result + place + column, column, [&](int i) { return finished[i]; });
        }
    }

private:
    template <class E, class Get> __device__ __forceinline__ void write(E *to, long long column, Get get) const {
        constexpr int WIDTH = LANES<E>;
        if constexpr (WIDTH <= BLOCK) {
            if (vectors) {
#pragma unroll
                for (int i = 0; i < BLOCK; i += WIDTH) {
                    Pack<E, WIDTH> pack;
#pragma unroll
                    for (int j = 0; j < WIDTH; ++j) pack.lane[j] = get(i + j);
                    store(to + i, pack);
                }
                return;
            }
        }
#pragma unroll
        for (int i = 0; i < BLOCK; ++i)
            if (column + i < columns) to[i] = get(i);
    }
};

}   // namespace tilewise
