// The scheduler of fibres: a block is run by sweeping over its threads. A fibre that reaches a barrier or a warp
// operation switches back to the scheduler, which resumes it when those it waits for have arrived.
//
//     scheduler ---> thread 0 ... barrier -+
//        ^ ^-------- (saved stack) <-------+
//        +---------> thread 1 ... barrier, and so on; when all wait, the barrier opens
//
// Shared memory is filled with 0xFF (NaN, -1) when a block begins, so that reading what nobody wrote shows.

#include "runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" {
Dim3 simt_tid, simt_ctaid, simt_ntid, simt_nctaid;
}

// simt_switch(&saved, next): saves the callee-saved registers and the stack pointer, and goes on with another stack.
#if defined(__x86_64__)
asm(R"(
.text
.globl simt_switch
simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
constexpr int SAVED_REGISTERS = 6;
#else
#error "simt_switch is written for x86-64 only"
#endif
extern "C" void simt_switch(void **saved, void *next);

namespace {

constexpr size_t STACK_BYTES = 256 * 1024;
constexpr size_t DEPOSIT_BYTES = 128;
constexpr unsigned WARP = 32;

enum State : uint8_t { RUNNABLE, AT_BARRIER, IN_WARP, DONE };

struct Fibre {
    void *stack_pointer;
    Dim3 tid;
    State state;
    unsigned exchanges;   // warp operations begun: they alternate between two buffers
    int value;            // given to simt_barrier_reduce
};

struct WarpState {
    alignas(64) unsigned char deposits[2][WARP * DEPOSIT_BYTES];
    unsigned arrived[2], released[2];
};

struct Range {
    unsigned char *begin;
    size_t bytes;
};

std::vector<Fibre> fibres;
std::vector<WarpState> warps;
std::vector<char *> stacks;
std::vector<Range> static_shared;
unsigned char *dynamic_shared;
size_t dynamic_bytes;
void *scheduler_stack;
unsigned current;
unsigned live;
unsigned long exchanges_done;
int reduced[3];
bool eager, broken;
char message[256];

void (*entry_point)(void *);
void *entry_arguments;

void give_up_processor() { simt_switch(&fibres[current].stack_pointer, scheduler_stack); }

extern "C" void simt_fibre_main() {
    entry_point(entry_arguments);
    fibres[current].state = DONE;
    give_up_processor();
    abort();
}

unsigned running_lanes(unsigned warp) {
    unsigned lanes = 0;
    for (unsigned lane = 0; lane < WARP && warp * WARP + lane < fibres.size(); ++lane)
        if (fibres[warp * WARP + lane].state != DONE) lanes |= 1u << lane;
    return lanes;
}

void prepare_fibre(unsigned i, const Dim3 &block) {
    fibres[i] = Fibre{};
    fibres[i].tid = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    void **top = reinterpret_cast<void **>(stacks[i] + STACK_BYTES - 64);
    *--top = nullptr;   // so that the stack is aligned as after a call
    *--top = reinterpret_cast<void *>(simt_fibre_main);
    for (int k = 0; k < SAVED_REGISTERS; ++k) *--top = nullptr;
    fibres[i].stack_pointer = top;
}

// Resumes the threads order[first..last) that can run; true if any of them got further than a warp operation.
bool sweep(const std::vector<unsigned> &order, size_t first, size_t last) {
    bool moved = false;
    for (size_t k = first; k < last && !broken; ++k) {
        Fibre &fibre = fibres[order[k]];
        if (fibre.state != RUNNABLE && fibre.state != IN_WARP) continue;
        current = order[k];
        simt_tid = fibre.tid;
        fibre.state = RUNNABLE;
        simt_switch(&scheduler_stack, fibre.stack_pointer);
        moved |= fibre.state != IN_WARP;
        live -= fibre.state == DONE;
    }
    return moved;
}

bool run_round(std::vector<unsigned> &order, int schedule, unsigned &seed) {
    const unsigned long before = exchanges_done;
    bool moved = false;
    if (schedule == SHUFFLED)
        for (size_t i = order.size() - 1; i > 0; --i) {
            seed = seed * 1664525u + 1013904223u;
            std::swap(order[i], order[(seed >> 8) % (i + 1)]);
        }
    if (schedule < WARP_BY_WARP) {
        moved = sweep(order, 0, order.size());
    } else {
        for (size_t warp = 0; warp < order.size(); warp += WARP)
            for (;;) {
                const unsigned long done = exchanges_done;
                const bool any = sweep(order, warp, std::min(order.size(), warp + WARP));
                moved |= any;
                if (broken || (!any && exchanges_done == done)) break;
            }
    }
    return moved || exchanges_done != before;
}

void open_barrier() {
    int count = 0;
    for (Fibre &fibre : fibres)
        if (fibre.state == AT_BARRIER) {
            count += fibre.value != 0;
            fibre.state = RUNNABLE;
        }
    reduced[0] = count;
    reduced[1] = count == static_cast<int>(live);
    reduced[2] = count > 0;
}

int run_block(std::vector<unsigned> &order, int schedule, unsigned &seed) {
    while (live > 0) {
        const bool moved = run_round(order, schedule, seed);
        if (broken) return DIVERGED;
        unsigned waiting = 0;
        for (const Fibre &fibre : fibres) waiting += fibre.state == AT_BARRIER;
        if (waiting > 0 && waiting == live) {
            open_barrier();
        } else if (!moved && live > 0) {
            snprintf(message, sizeof message,
                     "block (%u, %u, %u) is stuck: of %u running threads %u wait at a barrier, the others in a warp "
                     "operation for lanes that never come",
                     simt_ctaid.x, simt_ctaid.y, simt_ctaid.z, live, waiting);
            return DEADLOCK;
        }
    }
    if (simt_copies_pending() > 0) {
        snprintf(message, sizeof message, "block (%u, %u, %u) ended with %d cp.async that nobody waited for",
                 simt_ctaid.x, simt_ctaid.y, simt_ctaid.z, simt_copies_pending());
        return DIVERGED;
    }
    return FINISHED;
}

}   // namespace

extern "C" {

unsigned simt_thread() { return current; }
unsigned char *simt_dynamic_shared() { return dynamic_shared; }
size_t simt_dynamic_bytes() { return dynamic_bytes; }
int simt_eager_copies() { return eager; }
const char *simt_message() { return message; }

void simt_fault(const char *text) {
    snprintf(message, sizeof message, "thread %u of block (%u, %u, %u): %s", current, simt_ctaid.x, simt_ctaid.y,
             simt_ctaid.z, text);
    broken = true;
    give_up_processor();   // never resumed: the launch ends
}

void simt_barrier() {
    fibres[current].value = 0;
    fibres[current].state = AT_BARRIER;
    give_up_processor();
}

int simt_barrier_reduce(int value, int operation) {
    fibres[current].value = value;
    fibres[current].state = AT_BARRIER;
    give_up_processor();
    return reduced[operation];
}

const unsigned char *simt_warp_exchange(unsigned mask, const void *deposit, size_t bytes) {
    const unsigned me = current, lane = me % WARP, bit = 1u << lane;
    WarpState &warp = warps[me / WARP];
    if (!(mask & bit)) simt_fault("a warp operation whose mask leaves out the calling lane");
    if (bytes > DEPOSIT_BYTES) simt_fault("a warp operation deposits more than 128 bytes");
    // Two buffers: a lane can be one operation ahead of another, never two.
    const unsigned turn = fibres[me].exchanges++ & 1;
    memcpy(warp.deposits[turn] + lane * DEPOSIT_BYTES, deposit, bytes);
    warp.arrived[turn] |= bit;
    for (;;) {
        const unsigned needed = mask & running_lanes(me / WARP);
        if ((warp.arrived[turn] & needed) == needed) {
            warp.released[turn] |= needed;
            warp.arrived[turn] &= ~needed;
        }
        if (warp.released[turn] & bit) {
            warp.released[turn] &= ~bit;
            ++exchanges_done;
            return warp.deposits[turn];
        }
        fibres[me].state = IN_WARP;
        give_up_processor();
    }
}

void simt_no_static_shared() { static_shared.clear(); }
void simt_static_shared(unsigned char *begin, size_t bytes) { static_shared.push_back({begin, bytes}); }

unsigned char *simt_shared(uint32_t address, size_t bytes) {
    for (const Range &range : static_shared) {
        const uint32_t offset = address - static_cast<uint32_t>(reinterpret_cast<uintptr_t>(range.begin));
        if (offset < range.bytes && offset + bytes <= range.bytes) return range.begin + offset;
    }
    const uint32_t offset = address - static_cast<uint32_t>(reinterpret_cast<uintptr_t>(simt_dynamic_shared()));
    if (offset + bytes > simt_dynamic_bytes()) simt_fault("an address outside of the kernel's shared memory");
    return simt_dynamic_shared() + offset;
}

int simt_launch(void (*entry)(void *), void *arguments, const Dim3 *grid, const Dim3 *block, size_t shared_bytes,
                int schedule, int eager_copies) {
    entry_point = entry;
    entry_arguments = arguments;
    eager = eager_copies != 0;
    broken = false;
    message[0] = 0;
    simt_ntid = *block;
    simt_nctaid = *grid;
    const unsigned threads = block->x * block->y * block->z;
    while (stacks.size() < threads) stacks.push_back(static_cast<char *>(aligned_alloc(64, STACK_BYTES)));
    fibres.resize(threads);
    free(dynamic_shared);
    dynamic_bytes = shared_bytes;
    dynamic_shared = static_cast<unsigned char *>(aligned_alloc(128, (shared_bytes / 128 + 1) * 128));
    std::vector<unsigned> order(threads);
    unsigned seed = 12345;
    for (unsigned z = 0; z < grid->z; ++z)
        for (unsigned y = 0; y < grid->y; ++y)
            for (unsigned x = 0; x < grid->x; ++x) {
                simt_ctaid = {x, y, z};
                warps.assign((threads + WARP - 1) / WARP, WarpState{});
                memset(dynamic_shared, 0xFF, dynamic_bytes);
                for (const Range &range : static_shared) memset(range.begin, 0xFF, range.bytes);
                simt_copies_begin(threads);
                for (unsigned i = 0; i < threads; ++i) {
                    const bool backward = schedule == REVERSE || schedule == WARPS_REVERSED;
                    order[i] = backward ? threads - 1 - i : i;
                    prepare_fibre(i, *block);
                }
                live = threads;
                const int outcome = run_block(order, schedule, seed);
                if (outcome != FINISHED) return outcome;
            }
    return FINISHED;
}
}
