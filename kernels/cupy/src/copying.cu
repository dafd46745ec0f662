// A copy between arrays of any strides, an element to a thread.
#include "element.cuh"

namespace tilewise {

constexpr int AXES = 6;

// The last axis first; strides in elements.
struct Axes {
    long long sizes[AXES], from[AXES], to[AXES];
};

template <class T>
__global__ void __launch_bounds__(THREADS, 1)
copy_elements(const T *source, T *target, long long count, const Axes axes) {
    long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= count) return;
    long long from = 0, to = 0;
#pragma unroll
    for (int axis = 0; axis < AXES; ++axis) {
        const long long place = axis < AXES - 1 ? take_axis(i, axes.sizes[axis]) : i;
        from += place * axes.from[axis];
        to += place * axes.to[axis];
    }
    target[to] = source[from];
}

}   // namespace tilewise
