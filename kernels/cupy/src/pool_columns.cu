// Pooling of NCHW by the common windows, 3 x 3 (one pixel of padding before) and 2 x 2 (none), two apart.
//
// A thread takes 16 bytes of a result's row: of each input row these are two vectors of 16 bytes, and for 3 x 3 windows
// one element before them, where nine loads of one element each per result would be needed otherwise:
//
//     e | v v v v | v v v v
//     [e  v v]              the first window
//          [v v   v]        the second
#include "pool_maximum.cuh"
#include "pool_windows.cuh"

namespace tilewise {

// The input rows of a thread's windows: line[s][c] is the pixel (first_row + s, base - LEFT + c), `fill` outside.
template <class T, int SIDE, int LEFT> struct Lines {
    static constexpr int N = LANES<T>, LENGTH = 2 * N + SIDE - 2;
    T line[SIDE][LENGTH];

    __device__ __forceinline__ void load_from(const T *plane, long long first_row, long long base, long long height,
                                              long long width, T fill) {
#pragma unroll
        for (int s = 0; s < SIDE; ++s) {
            const long long h = first_row + s;
            const bool inside = h >= 0 && h < height;
            const T *const row = plane + h * width + base;
            if (LEFT > 0) line[s][0] = inside && base > 0 ? row[-1] : fill;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Pack<T, N> values;
                if (inside && base + half * N < width) {
                    values = load<N>(row + half * N);
                } else {
#pragma unroll
                    for (int k = 0; k < N; ++k) values.lane[k] = fill;
                }
#pragma unroll
                for (int k = 0; k < N; ++k)
                    if (LEFT + half * N + k < LENGTH) line[s][LEFT + half * N + k] = values.lane[k];
            }
        }
    }
};

// A thread's place: `group` of 16 bytes in a row of a plane of the result. across: groups of a row.
struct Group {
    long long plane, row, group;
    __device__ __forceinline__ Group(long long i, long long across, long long rows) {
        group = take_axis(i, across);
        row = take_axis(i, rows);
        plane = i;
    }
};

template <class T, int N>
__device__ __forceinline__ void store_row(T *to, const Pack<T, N> &values, long long left, bool whole) {
    if (whole) {
        store(to, values);
    } else {
#pragma unroll
        for (int k = 0; k < N; ++k)
            if (k < left) to[k] = values.lane[k];
    }
}

// groups: of 16 bytes of the result, all of them. whole: rows of the result are made of whole ones.
template <class T, int SIDE, int LEFT, bool INDEXED>
__global__ void __launch_bounds__(THREADS, 1)
max_pool_columns(const T *__restrict__ x, T *__restrict__ y, long long *__restrict__ indices, long long groups,
                 long long across, int whole, const Windows windows) {
    const long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= groups) return;
    constexpr int N = LANES<T>;
    const long long height = windows.height, width = windows.width;
    const Group at(i, across, windows.rows);
    const long long first_row = at.row * 2 - windows.top, base = at.group * 2 * N, first = at.group * N;
    Lines<T, SIDE, LEFT> lines;
    lines.load_from(x + at.plane * height * width, first_row, base, height, width, lowest<T>());

    Pack<T, N> best;
    long long where[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
        // what stays where no tap is more than -inf: the first one inside the image
        const long long h = first_row > 0 ? first_row : 0, w = base + 2 * j - LEFT;
        best.lane[j] = lowest<T>();
        where[j] = h * width + (w > 0 ? w : 0);
#pragma unroll
        for (int t = 0; t < SIDE * SIDE; ++t) {
            const T value = lines.line[t / SIDE][2 * j + t % SIDE];
            if (wins(value, best.lane[j])) {
                best.lane[j] = value;
                where[j] = (first_row + t / SIDE) * width + w + t % SIDE;
            }
        }
    }
    const long long out = (at.plane * windows.rows + at.row) * windows.columns + first;
    store_row(y + out, best, windows.columns - first, whole);
    if (!INDEXED) return;
    if (whole) {
#pragma unroll
        for (int j = 0; j < N; j += 2) store(indices + out + j, Pack<long long, 2>{{where[j], where[j + 1]}});
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (first + j < windows.columns) indices[out + j] = where[j];
    }
}

// As max_pool_columns. divisor: 0 where it depends on the window.
template <class T, int SIDE, int LEFT>
__global__ void __launch_bounds__(THREADS, 1)
avg_pool_columns(const T *__restrict__ x, T *__restrict__ y, Sum<T> divisor, long long groups, long long across,
                 int whole, const Windows windows) {
    const long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= groups) return;
    constexpr int N = LANES<T>;
    const Group at(i, across, windows.rows);
    const long long first = at.group * N;
    Lines<T, SIDE, LEFT> lines;
    lines.load_from(x + at.plane * windows.height * windows.width, at.row * 2 - windows.top, at.group * 2 * N,
                    windows.height, windows.width, narrow<T>(0));
    const long long high = extent_of_row(at.row, windows);
    Pack<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        Sum<T> total = 0;
#pragma unroll
        for (int t = 0; t < SIDE * SIDE; ++t) total += widen(lines.line[t / SIDE][2 * j + t % SIDE]);
        const Sum<T> by =
            divisor == 0 ? static_cast<Sum<T>>(high * extent_of_column(first + j, windows)) : divisor;
        result.lane[j] = narrow<T>(total / by);
    }
    const long long out = (at.plane * windows.rows + at.row) * windows.columns + first;
    store_row(y + out, result, windows.columns - first, whole);
}

}   // namespace tilewise
