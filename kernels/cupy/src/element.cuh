// The types of elements: what they are computed in, and how they move.
#pragma once
#include "instructions.cuh"

namespace tilewise {

// Threads of a block. Kernels say __launch_bounds__(THREADS, 1): without the 1, ptxas spills registers of some for the sake
// of more blocks.
constexpr int THREADS = 256;

// What is computed and summed in: float for float16.
template <class T> struct SumType {
    using type = T;
};
template <> struct SumType<Half> {
    using type = float;
};
template <class T> using Sum = typename SumType<T>::type;

template <class T> __device__ __forceinline__ Sum<T> widen(T value) {
    if constexpr (sizeof(T) != sizeof(Sum<T>))
        return to_float(value);
    else
        return value;
}

template <class T> __device__ __forceinline__ T narrow(Sum<T> value) {
    if constexpr (sizeof(T) != sizeof(Sum<T>))
        return to_half(value);
    else
        return value;
}

// N elements that lie side by side, in registers: one, or as many as 16 bytes have. Indices must be known when the
// kernel is compiled, or they would have to move to memory.
template <class T, int N> struct Pack {
    T lane[N];
};

template <class T> constexpr int LANES = 16 / sizeof(T);   // elements of 16 bytes

template <int N, class T> __device__ __forceinline__ Pack<T, N> load(const T *from) {
    static_assert(N == 1 || N * sizeof(T) == 16, "one element or 16 bytes");
    Pack<T, N> pack;
    if constexpr (N == 1) {
        pack.lane[0] = *from;
    } else {
        const uint4 bits = load_16_bytes(from);
        memcpy(&pack, &bits, 16);
    }
    return pack;
}

template <int N, class T> __device__ __forceinline__ void store(T *to, const Pack<T, N> &pack) {
    static_assert(N == 1 || N * sizeof(T) == 16, "one element or 16 bytes");
    if constexpr (N == 1) {
        *to = pack.lane[0];
    } else {
        uint4 bits;
        memcpy(&bits, &pack, 16);
        store_16_bytes(to, bits);
    }
}

// 16 bytes to shared memory.
template <int N, class T> __device__ __forceinline__ void store_shared(T *to, const Pack<T, N> &pack) {
    static_assert(N * sizeof(T) == 16, "16 bytes");
    uint4 bits;
    memcpy(&bits, &pack, 16);
    store_16_bytes_shared(to, bits);
}

// Quotients of numbers that are not negative.
__device__ __forceinline__ int divide(int a, int b) { return static_cast<unsigned>(a) / static_cast<unsigned>(b); }
__device__ __forceinline__ long long divide(long long a, long long b) {
    return static_cast<unsigned long long>(a) / static_cast<unsigned long long>(b);
}

// Takes the last axis, of n places, off a position i: returns the place there.
template <class Index> __device__ __forceinline__ Index take_axis(Index &i, Index n) {
    const Index rest = divide(i, n), place = i - rest * n;
    i = rest;
    return place;
}

}   // namespace tilewise
