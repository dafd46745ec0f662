// Instructions that CUDA C++ has no words for without its headers, which NVRTC would have to find, and read each time.
// The tests execute kernels on the CPU with others of the same names (tests/simt/cuda_shim.h).
#ifndef TILEWISE_INSTRUCTIONS
#define TILEWISE_INSTRUCTIONS

namespace tilewise {

struct Half {
    unsigned short bits;
};

// bfloat16: the upper half of a float.
struct Bfloat {
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
__device__ __forceinline__ void store_8_bytes(void *to, uint2 bits) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" : : "l"(to), "r"(bits.x), "r"(bits.y) : "memory");
}
__device__ __forceinline__ void store_16_bytes_shared(void *to, uint4 bits) { *static_cast<uint4 *>(to) = bits; }

// The address in shared memory, as its instructions take it.
__device__ __forceinline__ unsigned shared_address(const void *pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// What a launch gives a block beside its static shared memory.
__device__ __forceinline__ void *dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
    return dynamic_shared_memory;
}

// ---- asynchronous copies; before compute capability 8.0 they wait

// Begins to copy 16 bytes from global to shared memory, or zeros where there is nothing to copy. Both addresses must be
// multiples of 16. They are there for the thread itself after wait_copies, for others after a barrier as well.
__device__ __forceinline__ void copy_16_bytes(void *to, const void *from, bool there) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
#else
    store_16_bytes_shared(to, there ? load_16_bytes(from) : uint4{});
#endif
}
// The copies begun since the last one are a group.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most PENDING of the thread's groups are under way.
template <int PENDING> __device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
#endif
}

// ---- tensor cores: layouts as in NVIDIA's "PTX ISA", ldmatrix and mma

// Four matrices of 8 x 8 numbers of 16 bits. Lane l gives the address, a multiple of 16, of row l % 8 of matrix l / 8, and
// gets in word m the numbers (l / 4, 2 * (l % 4)) and the next of matrix m.
__device__ __forceinline__ void load_matrices(unsigned (&words)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// The same of the transposed matrices.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&words)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Rounded to TF32's 10 bits, to nearest, ties away from 0.
__device__ __forceinline__ unsigned to_tf32(float value) {
    unsigned word;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
    return word;
}

// D = A B + D in float for a warp, 16 x 8. With g = lane / 4, t = lane % 4, d holds (g, 2t), (g, 2t + 1), (g + 8, 2t),
// (g + 8, 2t + 1). Words of two: a = (g, 2t ..), (g + 8, 2t ..), (g, 2t + 8 ..), (g + 8, 2t + 8 ..), b = (2t .., g),
// (2t + 8 .., g); of TF32: a = (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), b = (t, g), (t + 4, g).
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Half) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
// From compute capability 8.0 on.
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Bfloat) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, float) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}   // namespace tilewise
#endif
