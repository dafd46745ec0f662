// CUDA C++ for g++: what kernels/cupy/src/*.cu need of the language and of its library, on the scheduler of runtime.cpp.
// Included before a source. g++ puts a call before every load and store (cuda_calls.cpp): -fsanitize=thread, with
// functions of our own instead of the sanitizer's.
#pragma once
#include "runtime.h"

#include <math.h>
#include <string.h>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static
#define __grid_constant__

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

extern "C" {
// Not read from simt_tid and its like directly: those are not a kernel's memory.
Dim3 cuda_thread_index();
Dim3 cuda_block_index();
Dim3 cuda_grid_size();
void cuda_shuffle_xor(unsigned mask, void *value, size_t bytes, int lanes);
int cuda_atomic_max(int *place, int value);
float cuda_half_to_float(unsigned short bits);
unsigned short cuda_float_to_half(float value);
// ptx.cpp
void emu_cp_async_16(uint32_t target, uint64_t source, uint32_t source_bytes);
void emu_cp_async_commit();
void emu_cp_async_wait(int pending);
void emu_ldmatrix_x4(uint32_t address);
void emu_ldmatrix_x4_trans(uint32_t address);
uint32_t emu_cvt_tf32(float value);
#define MMA(name)                                                                                                     \
    void emu_mma_##name(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0,       \
                        float c1, float c2, float c3);
MMA(f16) MMA(bf16) MMA(tf32)
}
#define threadIdx (cuda_thread_index())
#define blockIdx (cuda_block_index())
#define gridDim (cuda_grid_size())
// Named by where it stands in the source: g++ may make two calls of one.
#define SIMT_TEXT(number) #number
#define SIMT_LINE(number) SIMT_TEXT(number)
#define __syncthreads() simt_barrier_reduce(0, 0, const_cast<char *>(__FILE__ ":" SIMT_LINE(__LINE__)))

template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    cuda_shuffle_xor(mask, &value, sizeof value, lanes);
    return value;
}
inline int atomicMax(int *place, int value) { return cuda_atomic_max(place, value); }

inline float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline int __float_as_int(float value) {
    int bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline double __longlong_as_double(long long bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// ---- in the place of instructions.cuh
#define TILEWISE_INSTRUCTIONS
namespace tilewise {

struct Half {
    unsigned short bits;
};
struct Bfloat {
    unsigned short bits;
};
inline float to_float(Half h) { return cuda_half_to_float(h.bits); }
inline Half to_half(float value) { return {cuda_float_to_half(value)}; }

inline uint4 load_16_bytes(const void *from) {
    emu_check_load(static_cast<const unsigned char *>(from), 16, 16);
    uint4 bits;
    memcpy(&bits, from, 16);
    return bits;
}
inline void store_16_bytes(void *to, uint4 bits) {
    emu_check_store(static_cast<unsigned char *>(to), 16, 16);
    memcpy(to, &bits, 16);
}
inline void store_8_bytes(void *to, uint2 bits) {
    emu_check_store(static_cast<unsigned char *>(to), 8, 8);
    memcpy(to, &bits, 8);
}
inline void store_16_bytes_shared(void *to, uint4 bits) { store_16_bytes(to, bits); }

inline unsigned shared_address(const void *pointer) { return static_cast<unsigned>(reinterpret_cast<uintptr_t>(pointer)); }
inline void copy_16_bytes(void *to, const void *from, bool there) {
    emu_cp_async_16(shared_address(to), reinterpret_cast<uintptr_t>(from), there ? 16 : 0);
}
inline void commit_copies() { emu_cp_async_commit(); }
template <int PENDING> void wait_copies() { emu_cp_async_wait(PENDING); }
inline void *dynamic_shared() { return simt_dynamic_shared(); }

inline void load_matrices(unsigned (&words)[4], const void *row) {
    emu_ldmatrix_x4(shared_address(row));
    memcpy(words, emu_results(), sizeof words);
}
inline void load_matrices_transposed(unsigned (&words)[4], const void *row) {
    emu_ldmatrix_x4_trans(shared_address(row));
    memcpy(words, emu_results(), sizeof words);
}
inline unsigned to_tf32(float value) { return emu_cvt_tf32(value); }
inline void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Half) {
    emu_mma_f16(a[0], a[1], a[2], a[3], b0, b1, d[0], d[1], d[2], d[3]);
    memcpy(d, emu_results(), sizeof d);
}
inline void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Bfloat) {
    emu_mma_bf16(a[0], a[1], a[2], a[3], b0, b1, d[0], d[1], d[2], d[3]);
    memcpy(d, emu_results(), sizeof d);
}
inline void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, float) {
    emu_mma_tf32(a[0], a[1], a[2], a[3], b0, b1, d[0], d[1], d[2], d[3]);
    memcpy(d, emu_results(), sizeof d);
}

}   // namespace tilewise

#include "wgmma_shim.h"

// ---- from the buffer of a launch (launch.py's Slots) to a call of the kernel

template <class... A> struct CudaKernel {
    static constexpr size_t sizes[] = {sizeof(A)...};

    // Where the parameter `which` begins: every one at a multiple of eight bytes.
    static constexpr size_t offset(size_t which) {
        size_t bytes = 0;
        for (size_t i = 0; i < which; ++i) bytes += (sizes[i] + 7) / 8 * 8;
        return bytes;
    }

    template <size_t... I> static void call(void (*kernel)(A...), const char *slots, std::index_sequence<I...>) {
        kernel(*reinterpret_cast<const std::remove_const_t<A> *>(slots + offset(I))...);
    }
};

template <class... A> void cuda_call(void (*kernel)(A...), void *slots) {
    CudaKernel<A...>::call(kernel, static_cast<const char *>(slots), std::index_sequence_for<A...>{});
}

// Writes the bytes of each parameter to `sizes`; returns how many there are.
template <class... A> [[gnu::noinline, gnu::no_sanitize("thread")]] int cuda_parameters(void (*)(A...), unsigned *sizes) {
    for (size_t i = 0; i < sizeof...(A); ++i) sizes[i] = CudaKernel<A...>::sizes[i];
    return sizeof...(A);
}

template <class... A> void *address_of(void (*kernel)(A...)) { return reinterpret_cast<void *>(kernel); }
