// A CUDA block executed on one operating-system thread: every CUDA thread is a fibre with a stack of its own, and gives
// up the processor only where CUDA lets threads wait for each other. See runtime.cpp.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {

struct Dim3 {
    unsigned x, y, z;
};

// Of the fibre that runs now, and of its launch.
extern Dim3 simt_tid, simt_ctaid, simt_ntid, simt_nctaid;

// In which order the fibres of a block run between two barriers. A kernel without races gives the same result in all.
enum Schedule {
    FORWARD = 0,
    REVERSE = 1,
    SHUFFLED = 2,       // another order in each round
    WARP_BY_WARP = 3,   // one warp as far as it gets before the next one starts
    WARPS_REVERSED = 4,
};

enum Outcome { FINISHED = 0, DEADLOCK = -1, DIVERGED = -2 };

// The memory that the kernel which is launched next may use. Shared arrays are static ones.
enum Kind { ARRAY = 0, SHARED = 1, CONSTANT = 2 };
void simt_no_ranges();
void simt_range(unsigned char *begin, size_t bytes, int kind);

// Runs the blocks of a grid, one after the other: the last `most` along each axis. `entry(arguments)` is one thread's
// work. granularity: bytes of shared memory that are watched as one.
int simt_launch(void (*entry)(void *), void *arguments, const Dim3 *grid, const Dim3 *block, size_t shared_bytes,
                int schedule, int eager_copies, unsigned granularity, const Dim3 *most);

// Waits for all threads of the block that still run.
void simt_barrier();
// The same; returns how many gave a nonzero value (operation 0), whether all did (1), whether any did (2).
// where: the place in the kernel.
int simt_barrier_reduce(int value, int operation, void *where);

// Waits for the lanes of `mask` that still run; returns what each lane deposited: lane l at 128 * l. operation: a name,
// the same string for all.
const unsigned char *simt_warp_exchange(unsigned mask, const void *deposit, size_t bytes, const char *operation);
// Lets other threads run until ready(object, number).
void simt_wait_until(bool (*ready)(const void *, int), const void *object, int number);
unsigned simt_participants();   // the lanes that took part in the exchange that has just returned

unsigned simt_thread();        // the thread's number in its block
unsigned char *simt_dynamic_shared();   // the block's dynamic shared memory
size_t simt_dynamic_bytes();
// The host address of `bytes` of shared memory whose 32-bit address is given; faults outside of what the kernel has.
unsigned char *simt_shared(uint32_t address, size_t bytes);
void simt_fault(const char *message);   // ends the launch with DIVERGED
int simt_eager_copies();
void simt_stack(const unsigned char **begin, size_t *bytes);   // of the thread that runs

// checks.cpp: every access of a kernel is inside of what it was given, and no two threads use the same shared memory, one
// of them writing, without a barrier between.
void emu_check_load(const unsigned char *address, uint64_t bytes, uint64_t alignment);
void emu_check_store(unsigned char *address, uint64_t bytes, uint64_t alignment);
void check_launch_begins(unsigned granularity);
void check_block_begins(unsigned threads);
void check_barrier_opens();
void check_warp_meets(unsigned warp, const char *operation);
void check_copy_begins(unsigned char *target, size_t bytes);   // by cp.async
void check_copy_ends(unsigned char *target, size_t bytes);
extern const char *const SYNCWARP;   // the one warp operation that orders accesses to memory

// The copies that a thread has begun with cp.async (ptx.cpp): dropped when a block begins, checked when it ends.
void simt_copies_begin(unsigned threads);
int simt_copies_pending();
void simt_pipeline_begins(unsigned threads);   // pipeline.cpp: the same of its barriers and products
int simt_products_pending();
void simt_copies_arrived();                    // the thread's
void check_not_copying(const unsigned char *address, size_t bytes);
float cut_off_sum(const double *terms, unsigned count);   // as tensor cores add
const char *simt_message();
uint32_t *emu_results();   // of an instruction with several, eight words
}
