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

// 16 bytes at once; the address must be a multiple of 16.
__device__ __forceinline__ uint4 load_16_bytes(const void *from) { return *static_cast<const uint4 *>(from); }
// An instruction by its name: of `if (whole) *vector = bits; else ...` the compiler made stores of single elements.
__device__ __forceinline__ void store_16_bytes(void *to, uint4 bits) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
}
__device__ __forceinline__ void store_16_bytes_shared(void *to, uint4 bits) { *static_cast<uint4 *>(to) = bits; }

// ---- asynchronous copies (compute capability 8.0)

// The address in shared memory, as its instructions take it.
__device__ __forceinline__ unsigned shared_address(const void *pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Begins to copy 16 bytes from global to shared memory, or zeros where there is nothing to copy. Both addresses must be
// multiples of 16. They are there for the thread itself after wait_copies, for others after a barrier as well.
__device__ __forceinline__ void copy_16_bytes(void *to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}
// The copies begun since the last one are a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of the thread's groups are under way.
template <int PENDING> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

}   // namespace tilewise
#endif
