// What softmax, log_softmax and their gradients share: how a short row lies in the registers of a few lanes, and the
// running sum of a long one.
#pragma once
#include "reduction.cuh"

namespace tilewise {

template <class S> __device__ __forceinline__ S minus_infinity() {
    if constexpr (sizeof(S) == 8)
        return __longlong_as_double(0xfff0000000000000ll);
    else
        return __int_as_float(0xff800000);
}

// The largest number and the sum of exp(x - that), of numbers that come one after the other; the sum is scaled where a
// larger one comes (Milakov and Gimelshein 2018). NaN stays.
template <class S> struct RunningSum {
    S largest = minus_infinity<S>(), total = 0;

    __device__ __forceinline__ void rise_to(S top) {
        if (largest != top) total *= exp(largest - top);
        largest = top;
    }
    template <int COUNT, class Get> __device__ __forceinline__ void add(Get get) {
        S top = largest;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) top = maximum(top, get(i));
        rise_to(top);
        if (top == minus_infinity<S>()) return;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) total += exp(get(i) - top);
    }
};

// A lane's place in a short row: `group` lanes for each row, which have its units k * group + lane.
template <int N> struct ShortRow {
    long long first;
    int lane, group, units;
    __device__ __forceinline__ ShortRow(long long rows, int n, int group_) : group(group_) {
        const int thread = threadIdx.x;
        const long long row = static_cast<long long>(blockIdx.x) * (THREADS / group) + thread / group;
        lane = thread & (group - 1);
        first = row * n;
        units = row < rows ? n / N : 0;
    }
    __device__ __forceinline__ bool has(int k) const { return lane + k * group < units; }
    __device__ __forceinline__ long long place(int k) const { return first + static_cast<long long>(lane + k * group) * N; }
};

// A thread's place among columns of n elements that are `inner` apart: a block takes `columns` of them, THREADS / columns
// threads each; block b those from (b % tiles) * columns on, of the (n, inner) matrix b / tiles.
struct ColumnShare {
    long long first, member, end;
    int group, slot, columns;
    __device__ __forceinline__ ColumnShare(long long n, long long inner, int tiles, int columns_) : columns(columns_) {
        const int thread = threadIdx.x;
        group = THREADS / columns;
        member = thread / columns;
        slot = thread & (columns - 1);
        const long long column = static_cast<long long>(blockIdx.x % tiles) * columns + slot;
        first = static_cast<long long>(blockIdx.x / tiles) * n * inner + column;
        end = column < inner ? n : 0;
    }
};

}   // namespace tilewise
