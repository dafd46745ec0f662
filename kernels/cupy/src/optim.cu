// Optimisers' updates, bound by memory: every array is read once and, but for the gradient, written once, 16 bytes at a
// time.
#include "element.cuh"

namespace tilewise {

// N elements of every array, from `at` on: update(values, grad) changes an element's param and state. A pointer may be
// null: then there is no such state.
template <int N, class T, int ARRAYS, class Update>
__device__ __forceinline__ void update_pack(T *const (&arrays)[ARRAYS], const T *grad, long long at, Update update) {
    const Pack<T, N> grads = load<N>(grad + at);
    Pack<T, N> packs[ARRAYS] = {};
#pragma unroll
    for (int a = 0; a < ARRAYS; ++a)
        if (arrays[a]) packs[a] = load<N>(arrays[a] + at);
#pragma unroll
    for (int k = 0; k < N; ++k) {
        Sum<T> values[ARRAYS];
#pragma unroll
        for (int a = 0; a < ARRAYS; ++a) values[a] = widen(packs[a].lane[k]);
        update(values, widen(grads.lane[k]));
#pragma unroll
        for (int a = 0; a < ARRAYS; ++a) packs[a].lane[k] = narrow<T>(values[a]);
    }
#pragma unroll
    for (int a = 0; a < ARRAYS; ++a)
        if (arrays[a]) store(arrays[a] + at, packs[a]);
}

// The first `vectors` of 16 bytes as such, the rest one by one.
template <class T, int ARRAYS, class Update>
__device__ __forceinline__ void update_all(T *const (&arrays)[ARRAYS], const T *grad, long long count,
                                           long long vectors, Update update) {
    constexpr int N = LANES<T>;
    const long long step = static_cast<long long>(gridDim.x) * THREADS;
    const long long first = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    for (long long v = first; v < vectors; v += step) update_pack<N>(arrays, grad, v * N, update);
    for (long long i = vectors * N + first; i < count; i += step) update_pack<1>(arrays, grad, i, update);
}

// What moves a parameter: the gradient, with the decay of weights.
template <class S> __device__ __forceinline__ S decayed(S grad, S param, S weight_decay) {
    return weight_decay != 0 ? grad + weight_decay * param : grad;
}

template <class T>
__global__ void __launch_bounds__(THREADS, 1)
sgd_update(T *param, const T *grad, T *velocity, long long count, long long vectors, int has_velocity, int nesterov,
           Sum<T> lr, Sum<T> momentum, Sum<T> weight_decay) {
    T *const arrays[] = {param, velocity};
    update_all(arrays, grad, count, vectors, [=](Sum<T>(&values)[2], Sum<T> g) {
        auto &[p, v] = values;
        g = decayed(g, p, weight_decay);
        if (has_velocity) {
            v = v * momentum + g;
            g = nesterov ? g + momentum * v : v;
        }
        p -= lr * g;
    });
}

// AdaGrad, where old and fresh are 1, and RMSProp: square = old * square + fresh * g^2.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
scaled_update(T *param, const T *grad, T *square, T *velocity, long long count, long long vectors, int has_velocity,
              Sum<T> lr, Sum<T> old, Sum<T> fresh, Sum<T> eps, Sum<T> momentum, Sum<T> weight_decay) {
    T *const arrays[] = {param, square, velocity};
    update_all(arrays, grad, count, vectors, [=](Sum<T>(&values)[3], Sum<T> g) {
        auto &[p, s, v] = values;
        g = decayed(g, p, weight_decay);
        s = s * old + fresh * g * g;
        g = g / (sqrt(s) + eps);
        if (has_velocity) g = v = v * momentum + g;
        p -= lr * g;
    });
}

// optim_plan.py's numbers, in their order.
template <class S> struct Adam {
    S first, fresh_first, second, fresh_second, eps, weight_decay, rate, scale, kept;
};

template <class T>
__global__ void __launch_bounds__(THREADS, 1)
adam_update(T *param, const T *grad, T *mean, T *square, long long count, long long vectors, const Adam<Sum<T>> adam) {
    T *const arrays[] = {param, mean, square};
    update_all(arrays, grad, count, vectors, [=](Sum<T>(&values)[3], Sum<T> g) {
        auto &[p, m, s] = values;
        g = decayed(g, p, adam.weight_decay);
        m = m * adam.first + adam.fresh_first * g;
        s = s * adam.second + adam.fresh_second * g * g;
        p = p * adam.kept - m / (sqrt(s) * adam.scale + adam.eps) * adam.rate;
    });
}

}   // namespace tilewise
