// The gradients of softmax and log_softmax; rows and columns as in activation_softmax.cu.
//
// softmax: grad_x = y * (grad - sum(grad * y));  log_softmax: grad_x = grad - exp(y) * sum(grad)
#include "softmax.cuh"

namespace tilewise {

constexpr int SHORT = 4;   // units of a row that a lane has in its registers, of both operands

template <bool LOG, class S> __device__ __forceinline__ S term(S grad, S y) { return LOG ? grad : grad * y; }
template <bool LOG, class S> __device__ __forceinline__ S slope(S grad, S y, S total) {
    return LOG ? grad - exp(y) * total : y * (grad - total);
}

template <class T, int N, bool LOG>
__global__ void __launch_bounds__(THREADS, 1)
softmax_backward_short_rows(const T *__restrict__ grad, const T *__restrict__ y, T *__restrict__ result,
                            long long rows, int n, int group) {
    const ShortRow<N> row(rows, n, group);
    Pack<T, N> grads[SHORT], outputs[SHORT];
    Sum<T> total = 0;
#pragma unroll
    for (int k = 0; k < SHORT; ++k)
        if (row.has(k)) {
            grads[k] = load<N>(grad + row.place(k));
            outputs[k] = load<N>(y + row.place(k));
#pragma unroll
            for (int i = 0; i < N; ++i) total += term<LOG>(widen(grads[k].lane[i]), widen(outputs[k].lane[i]));
        }
    total = group_sum(total, group);
#pragma unroll
    for (int k = 0; k < SHORT; ++k)
        if (row.has(k)) {
#pragma unroll
            for (int i = 0; i < N; ++i)
                grads[k].lane[i] = narrow<T>(slope<LOG>(widen(grads[k].lane[i]), widen(outputs[k].lane[i]), total));
            store(result + row.place(k), grads[k]);
        }
}

template <class T, bool LOG>
__global__ void __launch_bounds__(THREADS, 1)
softmax_backward_long_rows(const T *__restrict__ grad, const T *__restrict__ y, T *__restrict__ result, long long n,
                           long long vectors) {
    constexpr int N = LANES<T>;
    __shared__ Sum<T> scratch[WARPS];
    const long long first = blockIdx.x * n;
    Sum<T> total = 0;
    for (long long v = threadIdx.x; v < vectors; v += THREADS) {
        const Pack<T, N> grads = load<N>(grad + first + v * N), outputs = load<N>(y + first + v * N);
#pragma unroll
        for (int i = 0; i < N; ++i) total += term<LOG>(widen(grads.lane[i]), widen(outputs.lane[i]));
    }
    for (long long i = first + vectors * N + threadIdx.x; i < first + n; i += THREADS)
        total += term<LOG>(widen(grad[i]), widen(y[i]));
    total = block_sum(total, scratch);
    for (long long v = threadIdx.x; v < vectors; v += THREADS) {
        Pack<T, N> grads = load<N>(grad + first + v * N);
        const Pack<T, N> outputs = load<N>(y + first + v * N);
#pragma unroll
        for (int i = 0; i < N; ++i)
            grads.lane[i] = narrow<T>(slope<LOG>(widen(grads.lane[i]), widen(outputs.lane[i]), total));
        store(result + first + v * N, grads);
    }
    for (long long i = first + vectors * N + threadIdx.x; i < first + n; i += THREADS)
        result[i] = narrow<T>(slope<LOG>(widen(grad[i]), widen(y[i]), total));
}

template <class T, bool LOG>
__global__ void __launch_bounds__(THREADS, 1)
softmax_backward_columns(const T *__restrict__ grad, const T *__restrict__ y, T *__restrict__ result, long long n,
                         long long inner, int tiles, int columns) {
    __shared__ Sum<T> sums[THREADS];
    const ColumnShare share(n, inner, tiles, columns);
    Sum<T> total = 0;
    for (long long k = share.member; k < share.end; k += share.group) {
        const long long place = share.first + k * inner;
        total += term<LOG>(widen(grad[place]), widen(y[place]));
    }
    sums[threadIdx.x] = total;
    __syncthreads();
    total = 0;
    for (int k = share.slot; k < THREADS; k += columns) total += sums[k];
    for (long long k = share.member; k < share.end; k += share.group) {
        const long long place = share.first + k * inner;
        result[place] = narrow<T>(slope<LOG>(widen(grad[place]), widen(y[place]), total));
    }
}

}   // namespace tilewise
