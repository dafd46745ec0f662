// Which of two elements a maximum takes: NaN wins, and of several the last; of equal ones the first.
#pragma once
#include "element.cuh"

namespace tilewise {

template <class T> __device__ __forceinline__ T lowest() {
    if constexpr (sizeof(T) == 8)
        return __longlong_as_double(0xfff0000000000000ll);
    else
        return narrow<T>(__int_as_float(0xff800000));
}

template <class T> __device__ __forceinline__ bool wins(T value, T best) {
    const Sum<T> a = widen(value), b = widen(best);
    return a > b || a != a;
}

}   // namespace tilewise
