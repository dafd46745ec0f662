// Dropout: which elements are dropped is a function of a seed, a call's number and each element's place.
//
// Each thread takes 16 bytes at a time, whose four elements (float16: eight, float64: two) need one block of
// Philox4x32-10 (two; half of one): some 80 instructions beside 32 bytes of traffic. Bound by memory.
#include "element.cuh"

namespace tilewise {

struct Block {
    unsigned word[4];
};

// Philox4x32-10 (Salmon et al. 2011) at the counter (block, call) and the key `seed`, of 64 bits each.
__device__ __forceinline__ Block philox(unsigned long long block, unsigned long long seed, unsigned long long call) {
    unsigned a = static_cast<unsigned>(block), b = static_cast<unsigned>(block >> 32);
    unsigned c = static_cast<unsigned>(call), d = static_cast<unsigned>(call >> 32);
    unsigned k = static_cast<unsigned>(seed), m = static_cast<unsigned>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned long long first = 0xD2511F53ull * a, second = 0xCD9E8D57ull * c;
        a = static_cast<unsigned>(second >> 32) ^ b ^ k;
        b = static_cast<unsigned>(second);
        c = static_cast<unsigned>(first >> 32) ^ d ^ m;
        d = static_cast<unsigned>(first);
        k += 0x9E3779B9u;
        m += 0xBB67AE85u;
    }
    return {{a, b, c, d}};
}

// Word i % 4. An index of the array would move it to memory.
__device__ __forceinline__ unsigned word(const Block &block, long long i) {
    const unsigned low = i & 1 ? block.word[1] : block.word[0], high = i & 1 ? block.word[3] : block.word[2];
    return i & 2 ? high : low;
}

// y[i] = x[i] * (scale where number i is not below threshold, else 0), i < count; the first `vectors` of 16 bytes as
// such, the rest one by one.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
drop(const T *__restrict__ x, T *__restrict__ y, Sum<T> scale, long long threshold, long long seed, long long call,
     long long count, long long vectors) {
    constexpr int N = LANES<T>;
    const unsigned least = static_cast<unsigned>(threshold);
    const long long step = static_cast<long long>(gridDim.x) * THREADS;
    const long long first = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    for (long long v = first; v < vectors; v += step) {
        Pack<T, N> values = load<N>(x + v * N);
        Block block = philox(v * N / 4, seed, call);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            if (k == 4) block = philox(v * N / 4 + 1, seed, call);
            const Sum<T> factor = word(block, v * N + k) >= least ? scale : 0;
            values.lane[k] = narrow<T>(widen(values.lane[k]) * factor);
        }
        store(y + v * N, values);
    }
    for (long long i = vectors * N + first; i < count; i += step) {
        const Sum<T> factor = word(philox(i / 4, seed, call), i) >= least ? scale : 0;
        y[i] = narrow<T>(widen(x[i]) * factor);
    }
}

}   // namespace tilewise
