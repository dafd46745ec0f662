// Padding, and its gradient as a gather: a thread for 16 bytes of the result's memory, also across the end of a row. Only
// the stores are of 16 bytes; the loads are one element each, of neighbouring addresses.
#include "element.cuh"

namespace tilewise {

// padding_plan.py numbers them.
enum Mode : int { CONSTANT, REFLECT, REPLICATE, CIRCULAR };

// An element's place among (planes, rows, columns).
struct Place {
    long long plane, row, column;

    __device__ __forceinline__ Place(long long number, long long rows, long long columns) {
        column = take_axis(number, columns);
        row = take_axis(number, rows);
        plane = number;
    }
    __device__ __forceinline__ void next(long long rows, long long columns) {
        if (++column == columns) {
            column = 0;
            if (++row == rows) {
                row = 0;
                ++plane;
            }
        }
    }
};

// to[begin ...] = the pack, as far as there are `count` elements.
template <class T, int N>
__device__ __forceinline__ void store_some(T *to, long long begin, long long count, int vector, const Pack<T, N> &pack) {
    if (vector && begin + N <= count) {
        store(to + begin, pack);
    } else {
#pragma unroll
        for (int k = 0; k < N; ++k)
            if (begin + k < count) to[begin + k] = pack.lane[k];
    }
}

// Which of an axis' n pixels the padded pixel at p, counted from the first of them, is a copy of; outside: none.
__device__ __forceinline__ long long source_of(long long p, long long n, int mode) {
    if (mode == CONSTANT || (p >= 0 && p < n)) return p;
    if (mode == REPLICATE) return p < 0 ? 0 : n - 1;
    if (mode == REFLECT) return p < 0 ? -p : 2 * (n - 1) - p;
    return p < 0 ? p + n : p - n;
}

// height and width: of a plane without padding; rows and columns: with it.
struct Padding {
    long long count, height, width, rows, columns, top, left;
    int mode, vector;
};

template <class T>
__global__ void __launch_bounds__(THREADS, 1)
pad_all(const T *__restrict__ x, T *__restrict__ y, Sum<T> value, const Padding pad) {
    constexpr int N = LANES<T>;
    const long long begin = (static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x) * N;
    if (begin >= pad.count) return;
    Place at(begin, pad.rows, pad.columns);
    Pack<T, N> pack;
#pragma unroll
    for (int k = 0; k < N; ++k) {
        const long long h = source_of(at.row - pad.top, pad.height, pad.mode);
        const long long w = source_of(at.column - pad.left, pad.width, pad.mode);
        const bool inside = begin + k < pad.count && h >= 0 && h < pad.height && w >= 0 && w < pad.width;
        pack.lane[k] = inside ? x[(at.plane * pad.height + h) * pad.width + w] : narrow<T>(value);
        at.next(pad.rows, pad.columns);
    }
    store_some(y, begin, pad.count, pad.vector, pack);
}

// The padded pixels that are copies of one pixel, in one of three places: before the axis, in it, after it.
struct Copies {
    long long first, last;
};

__device__ __forceinline__ Copies copies_of(long long p, long long n, long long low, long long high, int mode,
                                            int which) {
    const long long here = p + low;
    if (mode == REPLICATE && which == 1) return {p == 0 ? 0 : here, p == n - 1 ? here + high : here};
    long long at = here;
    if (which != 1) {
        at = -1;
        if (mode == REFLECT && which == 0 && p > 0) at = low - p;
        if (mode == CIRCULAR && which == 0) at = here - n;
        if (mode == REFLECT && which == 2 && p < n - 1) at = low + 2 * (n - 1) - p;
        if (mode == CIRCULAR && which == 2) at = here + n;
    }
    if (at < 0 || at >= n + low + high) return {0, -1};
    return {at, at};
}

struct PaddingGradient {
    long long count, height, width, top, bottom, left, right;
    int mode, vector;
};

// result: (planes, height, width), each number the sum of its copies in grad.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
pad_backward_all(const T *__restrict__ grad, T *__restrict__ result, const PaddingGradient pad) {
    constexpr int N = LANES<T>;
    const long long begin = (static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x) * N;
    if (begin >= pad.count) return;
    const long long rows = pad.height + pad.top + pad.bottom, columns = pad.width + pad.left + pad.right;
    const bool edges = pad.mode == REFLECT || pad.mode == CIRCULAR;   // else there is one place, of one or more copies
    const int first = edges ? 0 : 1, end = edges ? 3 : 2;
    Place at(begin, pad.height, pad.width);
    Pack<T, N> pack;
#pragma unroll
    for (int k = 0; k < N; ++k) {
        Sum<T> total = 0;
        if (begin + k < pad.count)
#pragma unroll 1
            for (int i = first; i < end; ++i) {
                const Copies down = copies_of(at.row, pad.height, pad.top, pad.bottom, pad.mode, i);
#pragma unroll 1
                for (long long row = down.first; row <= down.last; ++row)
#pragma unroll 1
                    for (int j = first; j < end; ++j) {
                        const Copies across = copies_of(at.column, pad.width, pad.left, pad.right, pad.mode, j);
#pragma unroll 1
                        for (long long column = across.first; column <= across.last; ++column)
                            total += widen(grad[(at.plane * rows + row) * columns + column]);
                    }
            }
        pack.lane[k] = narrow<T>(total);
        at.next(pad.height, pad.width);
    }
    store_some(result, begin, pad.count, pad.vector, pack);
}

}   // namespace tilewise
