// Instructions that CUDA C++ has no words for without its headers, which NVRTC would have to find, and read each time.
// The tests execute kernels on the CPU with others of the same names (tests/simt/cuda_shim.h).
#ifndef TILEWISE_INSTRUCTIONS
#define TILEWISE_INSTRUCTIONS

namespace tilewise {

struct Half {
    unsigned short bits;
};

__device__ __forceinline__ float to_float(Half h) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(h.bits));
    return result;
}

__device__ __forceinline__ Half to_half(float value) {
    Half result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

#if __CUDA_ARCH__ >= 800
// The bits of the nearest bfloat16.
__device__ __forceinline__ unsigned short nearest_bfloat(float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

// 16 bytes at once; the address must be a multiple of 16.
__device__ __forceinline__ uint4 load_16_bytes(const void *from) { return *static_cast<const uint4 *>(from); }
// An instruction by its name: of `if (whole) *vector = bits; else ...` the compiler made stores of single elements.
__device__ __forceinline__ void store_16_bytes(void *to, uint4 bits) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
}

}   // namespace tilewise
#endif
