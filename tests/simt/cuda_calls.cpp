// What kernels compiled by g++ call (cuda_shim.h): the thread's place in the grid, a warp's and an atomic's work, and the
// functions that -fsanitize=thread puts before every access to memory that is not a local variable.

#include "runtime.h"

#include <cstring>

extern "C" {

Dim3 cuda_thread_index() { return simt_tid; }
Dim3 cuda_block_index() { return simt_ctaid; }
Dim3 cuda_grid_size() { return simt_nctaid; }

void cuda_shuffle_xor(unsigned mask, void *value, size_t bytes, int lanes) {
    static const char *const name = "__shfl_xor_sync";
    const unsigned lane = simt_thread() % 32, source = lane ^ static_cast<unsigned>(lanes);
    const unsigned char *deposits = simt_warp_exchange(mask, value, bytes, name);
    if (!(simt_participants() >> source & 1)) simt_fault("__shfl_xor_sync from a lane that takes no part");
    memcpy(value, deposits + 128 * source, bytes);
}

float cuda_half_to_float(unsigned short bits) {
    _Float16 value;
    memcpy(&value, &bits, sizeof value);
    return static_cast<float>(value);
}

unsigned short cuda_float_to_half(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    unsigned short bits;
    memcpy(&bits, &half, sizeof bits);
    return bits;
}

int cuda_atomic_max(int *place, int value) {
    unsigned char *const address = reinterpret_cast<unsigned char *>(place);
    emu_check_load(address, sizeof value, sizeof value);
    emu_check_store(address, sizeof value, sizeof value);
    const int before = *place;
    if (value > before) *place = value;
    return before;
}

// The sanitizer's interface, as g++ emits it.
#define ACCESS(bytes)                                                                                              \
    void __tsan_read##bytes(unsigned char *address) { emu_check_load(address, bytes, bytes); }                    \
    void __tsan_write##bytes(unsigned char *address) { emu_check_store(address, bytes, bytes); }                  \
    void __tsan_unaligned_read##bytes(unsigned char *address) { emu_check_load(address, bytes, 1); }              \
    void __tsan_unaligned_write##bytes(unsigned char *address) { emu_check_store(address, bytes, 1); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(unsigned char *address, size_t bytes) { emu_check_load(address, bytes, 1); }
void __tsan_write_range(unsigned char *address, size_t bytes) { emu_check_store(address, bytes, 1); }
void __tsan_init() {}
}
