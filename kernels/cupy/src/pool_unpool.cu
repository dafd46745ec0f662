// Unpooling, and its gradient.
//
// Of several elements for one pixel the last one stays, as in the reference: first every element writes its position to
// its pixel's `owner` (the largest wins, whoever comes first), then every pixel fetches its owner's element. Elements are
// moved as words of their size, whatever they mean. An index outside of the plane gives nothing.
#include "element.cuh"

namespace tilewise {

__device__ __forceinline__ long long thread_of_grid() {
    return static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
}

// owners[...] = -1, nobody.
template <class T> __global__ void __launch_bounds__(THREADS, 1) unpool_forget(T *owners, long long count) {
    const long long i = thread_of_grid();
    if (i < count) owners[i] = -1;
}

// owners[image, index, channel] = the last position whose index it is; indices: (images, pooled, channels).
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
unpool_claim(const T *__restrict__ indices, int *owners, long long count, long long pooled, long long pixels,
             long long channels) {
    const long long i = thread_of_grid();
    if (i >= count) return;
    long long image = i;
    const long long channel = take_axis(image, channels), position = take_axis(image, pooled), index = indices[i];
    if (index >= 0 && index < pixels)
        atomicMax(owners + (image * pixels + index) * channels + channel, static_cast<int>(position));
}

// y[image, pixel, channel] = x[image, owner, channel], 0 where there is none.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
unpool_fetch(const T *__restrict__ x, const int *__restrict__ owners, T *__restrict__ y, long long count,
             long long pooled, long long pixels, long long channels) {
    const long long i = thread_of_grid();
    if (i >= count) return;
    long long image = i;
    const long long channel = take_axis(image, channels);
    take_axis(image, pixels);
    const int owner = owners[i];
    y[i] = owner >= 0 ? x[(image * pooled + owner) * channels + channel] : T(0);
}

// result[image, position, channel] = grad[image, index, channel].
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
unpool_backward(const T *__restrict__ grad, const long long *__restrict__ indices, T *__restrict__ result,
                long long count, long long pooled, long long pixels, long long channels) {
    const long long i = thread_of_grid();
    if (i >= count) return;
    long long image = i;
    const long long channel = take_axis(image, channels);
    take_axis(image, pooled);
    const long long index = indices[i];
    result[i] = index >= 0 && index < pixels ? grad[(image * pixels + index) * channels + channel] : T(0);
}

}   // namespace tilewise
