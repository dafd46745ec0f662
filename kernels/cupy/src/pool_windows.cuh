// Windows and bins of pooling. All kernels see (images, H, W, units) with the channels in units of N elements: NHWC as it
// lies, NCHW as N * C images of one channel. A stride of 0 stands for an adaptive pool's bins: bin o of an axis of n
// pixels goes from floor(o n / count) to ceil((o + 1) n / count) - 1.
//
// Index is int where every number of a call fits 32 bits, else long long: divisions of 64 bits take several times as long.
#pragma once
#include "element.cuh"

namespace tilewise {

// pool_plan.py's Pool, as pool.py packs it.
struct Windows {
    long long height, width, rows, columns, units;
    int kernel_h, kernel_w, stride_h, stride_w, top, left, bottom, right, dilation_h, dilation_w, include_pad;
};

template <class Index> struct Range {
    Index first, end;
    __device__ __forceinline__ Index size() const { return end - first; }
};

// The taps of window o inside the image: first, first + dilation, ... before end.
template <class Index>
__device__ __forceinline__ Range<Index> window(Index o, Index n, Index count, int kernel, int stride, int low,
                                               int dilation) {
    if (stride == 0) return {divide(o * n, count), divide((o + 1) * n + count - 1, count)};
    Index first = o * stride - low;
    const Index beyond = first + Index(kernel - 1) * dilation + 1;
    if (first < 0) first += divide(Index(dilation - 1) - first, Index(dilation)) * dilation;
    return {first, beyond < n ? beyond : n};
}

// What a window's average counts along an axis: its taps in the padded image, or those in the image.
template <class Index>
__device__ __forceinline__ Index extent(Index o, Index n, Index count, int kernel, int stride, int low, int high,
                                        int include_pad) {
    if (include_pad && stride > 0) {
        const Index first = o * stride - low, end = first + kernel;
        return (end < n + high ? end : n + high) - first;
    }
    return window(o, n, count, kernel, stride, low, 1).size();
}

}   // namespace tilewise
