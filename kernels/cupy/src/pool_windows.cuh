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

// The windows that may have a tap at pixel p. reach: from a window's first tap to its last.
template <class Index>
__device__ __forceinline__ Range<Index> covering(Index p, Index n, Index count, int stride, int low, int reach) {
    Index first, end;
    if (stride == 0) {
        first = divide(p * count, n);
        end = divide((p + 1) * count + n - 1, n);
    } else {
        const Index before = p + low - reach + stride - 1;
        first = divide(before > 0 ? before : Index(0), Index(stride));
        end = divide(p + low, Index(stride)) + 1;
    }
    return {first, end < count ? end : count};
}

// `covering` of pixel p from that of the pixel before it, without a division.
template <class Index>
__device__ __forceinline__ Range<Index> covering_next(Range<Index> before, Index p, Index n, Index count, int stride,
                                                      int low, int reach) {
    if (stride == 0) return covering(p, n, count, stride, low, reach);
    if (before.end < count && before.end * stride <= p + low) ++before.end;
    if (before.first * stride + reach < p + low) ++before.first;
    return before;
}

// ---- of a structure's rows and columns

template <class Index> __device__ __forceinline__ Range<Index> window_of_row(Index o, const Windows &w) {
    return window(o, Index(w.height), Index(w.rows), w.kernel_h, w.stride_h, w.top, w.dilation_h);
}
template <class Index> __device__ __forceinline__ Range<Index> window_of_column(Index o, const Windows &w) {
    return window(o, Index(w.width), Index(w.columns), w.kernel_w, w.stride_w, w.left, w.dilation_w);
}
template <class Index> __device__ __forceinline__ Index extent_of_row(Index o, const Windows &w) {
    return extent(o, Index(w.height), Index(w.rows), w.kernel_h, w.stride_h, w.top, w.bottom, w.include_pad);
}
template <class Index> __device__ __forceinline__ Index extent_of_column(Index o, const Windows &w) {
    return extent(o, Index(w.width), Index(w.columns), w.kernel_w, w.stride_w, w.left, w.right, w.include_pad);
}
template <class Index> __device__ __forceinline__ Range<Index> rows_covering(Index p, const Windows &w) {
    return covering(p, Index(w.height), Index(w.rows), w.stride_h, w.top, w.dilation_h * (w.kernel_h - 1));
}
template <class Index> __device__ __forceinline__ Range<Index> columns_covering(Index p, const Windows &w) {
    return covering(p, Index(w.width), Index(w.columns), w.stride_w, w.left, w.dilation_w * (w.kernel_w - 1));
}
template <class Index>
__device__ __forceinline__ Range<Index> columns_covering_next(Range<Index> before, Index p, const Windows &w) {
    return covering_next(before, p, Index(w.width), Index(w.columns), w.stride_w, w.left,
                         w.dilation_w * (w.kernel_w - 1));
}

}   // namespace tilewise
