// Hopper's matrix instructions, which read both operands from shared memory, and what a pipeline needs around them:
// barriers in shared memory, and the fence between ordinary writes and those reads. Compute capability 9.0 alone, compiled
// for sm_90a. The tests execute kernels on the CPU with others of the same names (tests/simt/wgmma_shim.h).
//
// NVIDIA, "PTX ISA": wgmma, mbarrier, fence.proxy, setmaxnreg.
#ifndef TILEWISE_WGMMA
#define TILEWISE_WGMMA
#include "instructions.cuh"

namespace tilewise {

// ---- barriers in shared memory, of eight bytes: `count` arrivals end a phase, of which parity tells odd and even ones

__device__ __forceinline__ void make_barrier(unsigned long long *barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(unsigned long long *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_address(barrier)) : "memory");
}
// An arrival as soon as the copies that the thread has begun (copy_16_bytes) are there; nobody waits for them here.
__device__ __forceinline__ void arrive_with_copies(unsigned long long *barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" : : "r"(shared_address(barrier)) : "memory");
}
// Until the phase of this parity has ended; the first one is even. Of parity 1 it returns at once before that.
__device__ __forceinline__ void wait_phase(unsigned long long *barrier, int parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}"
                 :
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
}
// Of COUNT threads; number: 1 to 15.
template <int COUNT> __device__ __forceinline__ void meet(int number) {
    asm volatile("bar.sync %0, %1;" : : "r"(number), "n"(COUNT) : "memory");
}

// What is in shared memory, by the thread or by others before a barrier, is there for products that begin after it. Where
// copies of the thread are under way, it waits for them all: so those do it who multiply, not those who bring.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers: a warpgroup gives some up, another takes them

template <int REGISTERS> __device__ __forceinline__ void give_registers_up() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(REGISTERS));
}
template <int REGISTERS> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(REGISTERS));
}

// ---- products of a warpgroup, four warps

// Before the first one, and where a register of d was used otherwise.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(PENDING) : "memory");
}

// The registers of 64 x N sums by their numbers in an instruction, and as its operands.
#define TILEWISE_NUMBERS_64                                                                                          \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                         \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                               \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                               \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TILEWISE_NUMBERS_128                                                                                         \
    TILEWISE_NUMBERS_64 ", "                                                                                         \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                               \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                               \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                   \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TILEWISE_SUMS_64(HOW)                                                                                        \
    HOW(d[0]), HOW(d[1]), HOW(d[2]), HOW(d[3]), HOW(d[4]), HOW(d[5]), HOW(d[6]), HOW(d[7]),                          \
    HOW(d[8]), HOW(d[9]), HOW(d[10]), HOW(d[11]), HOW(d[12]), HOW(d[13]), HOW(d[14]), HOW(d[15]),                    \
    HOW(d[16]), HOW(d[17]), HOW(d[18]), HOW(d[19]), HOW(d[20]), HOW(d[21]), HOW(d[22]), HOW(d[23]),                  \
    HOW(d[24]), HOW(d[25]), HOW(d[26]), HOW(d[27]), HOW(d[28]), HOW(d[29]), HOW(d[30]), HOW(d[31]),                  \
    HOW(d[32]), HOW(d[33]), HOW(d[34]), HOW(d[35]), HOW(d[36]), HOW(d[37]), HOW(d[38]), HOW(d[39]),                  \
    HOW(d[40]), HOW(d[41]), HOW(d[42]), HOW(d[43]), HOW(d[44]), HOW(d[45]), HOW(d[46]), HOW(d[47]),                  \
    HOW(d[48]), HOW(d[49]), HOW(d[50]), HOW(d[51]), HOW(d[52]), HOW(d[53]), HOW(d[54]), HOW(d[55]),                  \
    HOW(d[56]), HOW(d[57]), HOW(d[58]), HOW(d[59]), HOW(d[60]), HOW(d[61]), HOW(d[62]), HOW(d[63])
#define TILEWISE_SUMS_128(HOW)                                                                                       \
    TILEWISE_SUMS_64(HOW),                                                                                           \
    HOW(d[64]), HOW(d[65]), HOW(d[66]), HOW(d[67]), HOW(d[68]), HOW(d[69]), HOW(d[70]), HOW(d[71]),                  \
    HOW(d[72]), HOW(d[73]), HOW(d[74]), HOW(d[75]), HOW(d[76]), HOW(d[77]), HOW(d[78]), HOW(d[79]),                  \
    HOW(d[80]), HOW(d[81]), HOW(d[82]), HOW(d[83]), HOW(d[84]), HOW(d[85]), HOW(d[86]), HOW(d[87]),                  \
    HOW(d[88]), HOW(d[89]), HOW(d[90]), HOW(d[91]), HOW(d[92]), HOW(d[93]), HOW(d[94]), HOW(d[95]),                  \
    HOW(d[96]), HOW(d[97]), HOW(d[98]), HOW(d[99]), HOW(d[100]), HOW(d[101]), HOW(d[102]), HOW(d[103]),              \
    HOW(d[104]), HOW(d[105]), HOW(d[106]), HOW(d[107]), HOW(d[108]), HOW(d[109]), HOW(d[110]), HOW(d[111]),          \
    HOW(d[112]), HOW(d[113]), HOW(d[114]), HOW(d[115]), HOW(d[116]), HOW(d[117]), HOW(d[118]), HOW(d[119]),          \
    HOW(d[120]), HOW(d[121]), HOW(d[122]), HOW(d[123]), HOW(d[124]), HOW(d[125]), HOW(d[126]), HOW(d[127])
#define TILEWISE_ADDED(sum) "+f"(sum)
#define TILEWISE_SET(sum) "=f"(sum)

#define TILEWISE_WGMMA_128(TYPE)                                                                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" TILEWISE_NUMBERS_64 "}, "         \
                 "%64, %65, 1, 1, 1, %66, %67;"                                                                      \
                 : TILEWISE_SUMS_64(TILEWISE_ADDED)                                                                  \
                 : "l"(a), "l"(b), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B))
#define TILEWISE_WGMMA_256(TYPE)                                                                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" TILEWISE_NUMBERS_128 "}, "        \
                 "%128, %129, 1, 1, 1, %130, %131;"                                                                  \
                 : TILEWISE_SUMS_128(TILEWISE_ADDED)                                                                 \
                 : "l"(a), "l"(b), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B))

// d += A B, 64 x N, 16 deep, of matrices that descriptors tell (wgmma_product.cuh). TRANSPOSE_A, TRANSPOSE_B: 0 where k is
// contiguous. Warp w of the four, with g = lane / 4, t = lane % 4: d[4 j + e] is at row 16 w + g + e / 2 * 8, column
// 8 j + 2 t + e % 2.
template <int TRANSPOSE_A, int TRANSPOSE_B>
__device__ __forceinline__ void start_product(float (&d)[64], unsigned long long a, unsigned long long b, Half) {
    TILEWISE_WGMMA_128("f16");
}
template <int TRANSPOSE_A, int TRANSPOSE_B>
__device__ __forceinline__ void start_product(float (&d)[64], unsigned long long a, unsigned long long b, Bfloat) {
    TILEWISE_WGMMA_128("bf16");
}
template <int TRANSPOSE_A, int TRANSPOSE_B>
__device__ __forceinline__ void start_product(float (&d)[128], unsigned long long a, unsigned long long b, Half) {
    TILEWISE_WGMMA_256("f16");
}
template <int TRANSPOSE_A, int TRANSPOSE_B>
__device__ __forceinline__ void start_product(float (&d)[128], unsigned long long a, unsigned long long b, Bfloat) {
    TILEWISE_WGMMA_256("bf16");
}

// The same of TF32, 8 deep, with the left operand in registers: a has (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4) of the
// warp's 16 rows. In the right one k is contiguous: TF32 has no other. Bits beyond TF32's are cut off. ADD: whether d is
// added to, or set. Neither d nor a may be written, nor d be read, before the product was waited for: hold_registers.
template <bool ADD>
__device__ __forceinline__ void start_product(float (&d)[64], const unsigned (&a)[4], unsigned long long b) {
    if constexpr (ADD)
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32 {" TILEWISE_NUMBERS_64 "}, "
                     "{%64, %65, %66, %67}, %68, 1, 1, 1;"
                     : TILEWISE_SUMS_64(TILEWISE_ADDED)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32 {" TILEWISE_NUMBERS_64 "}, "
                     "{%64, %65, %66, %67}, %68, 0, 1, 1;"
                     : TILEWISE_SUMS_64(TILEWISE_SET)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <bool ADD>
__device__ __forceinline__ void start_product(float (&d)[128], const unsigned (&a)[4], unsigned long long b) {
    static_assert(ADD, "sums of 256 columns have no second set of registers");
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k8.f32.tf32.tf32 {" TILEWISE_NUMBERS_128 "}, "
                 "{%128, %129, %130, %131}, %132, 1, 1, 1;"
                 : TILEWISE_SUMS_128(TILEWISE_ADDED)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Registers that products had, after the wait: to the compiler, which sees no connection between the two, they are read
// and written here, so that it neither reads sums before, nor gives an operand's registers away. No instructions.
template <int COUNT> __device__ __forceinline__ void hold_registers(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i]) : : "memory");
}
template <int COUNT> __device__ __forceinline__ void hold_registers(unsigned (&a)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(a[i]) : : "memory");
}

}   // namespace tilewise
#endif
