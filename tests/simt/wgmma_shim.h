// In the place of kernels/cupy/src/wgmma.cuh, for g++: see pipeline.cpp.
#pragma once
#define TILEWISE_WGMMA

extern "C" {
void emu_make_barrier(uint32_t address, unsigned count);
void emu_arrive(uint32_t address);
void emu_arrive_with_copies(uint32_t address);
void emu_wait_phase(uint32_t address, int parity);
void emu_meet(int number, unsigned count);
void emu_show_to_products();
void emu_begin_products();
void emu_start_product(float *d, unsigned n, uint64_t a, uint64_t b, int transposed_a, int transposed_b,
                       float (*widen)(unsigned short));
void emu_start_product_tf32(float *d, unsigned n, const unsigned *a, uint64_t b, int add);
void emu_commit_products();
void emu_wait_products(unsigned pending);
}

namespace tilewise {

inline void make_barrier(unsigned long long *barrier, int count) { emu_make_barrier(shared_address(barrier), count); }
inline void arrive(unsigned long long *barrier) { emu_arrive(shared_address(barrier)); }
inline void arrive_with_copies(unsigned long long *barrier) { emu_arrive_with_copies(shared_address(barrier)); }
inline void wait_phase(unsigned long long *barrier, int parity) { emu_wait_phase(shared_address(barrier), parity); }
template <int COUNT> void meet(int number) { emu_meet(number, COUNT); }
inline void show_to_products() { emu_show_to_products(); }
template <int REGISTERS> void give_registers_up() {}
template <int REGISTERS> void take_registers() {}
inline void begin_products() { emu_begin_products(); }
inline void commit_products() { emu_commit_products(); }
template <int PENDING> void wait_products() { emu_wait_products(PENDING); }

inline float bfloat_to_float(unsigned short bits) { return __int_as_float(static_cast<int>(unsigned{bits} << 16)); }

template <int TRANSPOSE_A, int TRANSPOSE_B, int N>
void start_product(float (&d)[N], unsigned long long a, unsigned long long b, Half) {
    emu_start_product(d, 2 * N, a, b, TRANSPOSE_A, TRANSPOSE_B, cuda_half_to_float);
}
template <int TRANSPOSE_A, int TRANSPOSE_B, int N>
void start_product(float (&d)[N], unsigned long long a, unsigned long long b, Bfloat) {
    emu_start_product(d, 2 * N, a, b, TRANSPOSE_A, TRANSPOSE_B, bfloat_to_float);
}
template <bool ADD, int N> void start_product(float (&d)[N], const unsigned (&a)[4], unsigned long long b) {
    emu_start_product_tf32(d, 2 * N, a, b, ADD);
}
template <class T> void hold_registers(T &) {}

}   // namespace tilewise
