// How the threads share planes (NCHW) and rows (NHWC) in the kernels of batch normalisation that write an image.
#pragma once
#include "element.cuh"

namespace tilewise {

// `group` threads of each of `chunks` blocks for a plane; a plane's vectors of 16 bytes from `start` on, `step` apart.
struct PlaneShare {
    long long plane, start, step;
    __device__ __forceinline__ PlaneShare(int group, int chunks) {
        const int thread = threadIdx.x;
        plane = static_cast<long long>(blockIdx.x / chunks) * (THREADS / group) + thread / group;
        start = static_cast<long long>(blockIdx.x % chunks) * group + (thread & (group - 1));
        step = static_cast<long long>(chunks) * group;
    }
};

// A thread has one unit of channels, and goes down the pixels from `pixel` on, `step` at a time.
template <int N> struct RowShare {
    long long channel, pixel, step;
    bool any;   // whether there is something for this thread
    __device__ __forceinline__ RowShare(long long channels, int span, int rows) {
        const int row = threadIdx.x / span;
        channel = (static_cast<long long>(blockIdx.y) * span + threadIdx.x % span) * N;
        pixel = static_cast<long long>(blockIdx.x) * rows + row;
        step = static_cast<long long>(gridDim.x) * rows;
        any = row < rows && channel < channels;
    }
};

}   // namespace tilewise
