// Activations and their gradients.
//
// Each thread takes 16 bytes at a time, neighbouring threads neighbouring ones, so that a warp moves 512 bytes with an
// instruction; bound by memory, one read and one write of each number.
#include "activation.cuh"

namespace tilewise {

// y[i] = activation(x[i]), i < count; the first `vectors` of 16 bytes as such, the rest one by one.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
activate_all(const T *__restrict__ x, T *__restrict__ y, Sum<T> slope, long long count, long long vectors, int code) {
    constexpr int N = LANES<T>;
    const long long step = static_cast<long long>(gridDim.x) * THREADS;
    const long long first = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    for (long long v = first; v < vectors; v += step) {
        Pack<T, N> values = load<N>(x + v * N);
#pragma unroll
        for (int k = 0; k < N; ++k) values.lane[k] = narrow<T>(activate(widen(values.lane[k]), code, slope));
        store(y + v * N, values);
    }
    for (long long i = vectors * N + first; i < count; i += step) y[i] = narrow<T>(activate(widen(x[i]), code, slope));
}

// result[i] = grad[i] * activation'(x[i]) from y[i] = activation(x[i]), i < count.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
gradient_all(const T *__restrict__ grad, const T *__restrict__ y, T *__restrict__ result, Sum<T> slope,
             long long count, long long vectors, int code) {
    constexpr int N = LANES<T>;
    const long long step = static_cast<long long>(gridDim.x) * THREADS;
    const long long first = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    for (long long v = first; v < vectors; v += step) {
        Pack<T, N> grads = load<N>(grad + v * N);
        const Pack<T, N> outputs = load<N>(y + v * N);
#pragma unroll
        for (int k = 0; k < N; ++k)
            grads.lane[k] = narrow<T>(gradient(widen(grads.lane[k]), widen(outputs.lane[k]), code, slope));
        store(result + v * N, grads);
    }
    for (long long i = vectors * N + first; i < count; i += step)
        result[i] = narrow<T>(gradient(widen(grad[i]), widen(y[i]), code, slope));
}

}   // namespace tilewise
