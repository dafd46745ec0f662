// The scheduler of fibres: a block is run by sweeping over its threads. A fibre that reaches a barrier or a warp
// operation switches back to the scheduler, which resumes it when those it waits for have arrived.
//
//     scheduler ---> thread 0 ... barrier -+
//        ^ ^-------- (saved stack) <-------+
//        +---------> thread 1 ... barrier, and so on; when all wait, the barrier opens
//
// Shared memory is filled with 0xFF (NaN, -1) when a block begins, so that reading what nobody wrote shows. Accesses are
// checked in checks.cpp.

#include "runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
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
constexpr size_t SPARE_BYTES = 64 * 1024;   // below the stack, so that an overflow reaches the mark and nothing else
constexpr uint64_t MARK = 0x7469'6c65'7769'7365;
constexpr size_t DEPOSIT_BYTES = 128;
constexpr unsigned WARP = 32;

enum State : uint8_t { RUNNABLE, AT_BARRIER, IN_WARP, DONE };   // IN_WARP: waits for other threads otherwise

struct Fibre {
    void *stack_pointer;
    Dim3 tid;
    State state;
    std::vector<unsigned> exchanges;   // warp operations begun with each mask: they alternate between two buffers
    int value;                         // given to simt_barrier_reduce
    void *barrier;                     // where it waits
};

// The warp operations of one mask. Lanes with different masks do not wait for each other.
struct Exchange {
    unsigned mask;
    alignas(64) unsigned char deposits[2][WARP * DEPOSIT_BYTES];
    unsigned arrived[2], released[2], lanes[2];
    const char *operation[2];
};

std::vector<Fibre> fibres;
std::vector<std::deque<Exchange>> warps;
std::vector<char *> stacks;
unsigned char *dynamic_shared;
size_t dynamic_bytes;
unsigned participants;
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

uint64_t *stack_mark(unsigned thread) { return reinterpret_cast<uint64_t *>(stacks[thread] + SPARE_BYTES); }

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
    *stack_mark(i) = MARK;
    void **top = reinterpret_cast<void **>(stacks[i] + SPARE_BYTES + STACK_BYTES - 64);
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
        if (*stack_mark(current) != MARK && !broken) {
            snprintf(message, sizeof message, "thread %u of block (%u, %u, %u): its local arrays overflow the stack of %zu KB",
                     current, simt_ctaid.x, simt_ctaid.y, simt_ctaid.z, STACK_BYTES >> 10);
            broken = true;
        }
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

// Lets all go on; false where they do not wait at the same barrier.
bool open_barrier() {
    int count = 0;
    const void *where = nullptr;
    for (Fibre &fibre : fibres)
        if (fibre.state == AT_BARRIER) {
            if (where && where != fibre.barrier) {
                snprintf(message, sizeof message, "threads of block (%u, %u, %u) wait at different barriers",
                         simt_ctaid.x, simt_ctaid.y, simt_ctaid.z);
                return false;
            }
            where = fibre.barrier;
            count += fibre.value != 0;
            fibre.state = RUNNABLE;
        }
    check_barrier_opens();
    reduced[0] = count;
    reduced[1] = count == static_cast<int>(live);
    reduced[2] = count > 0;
    return true;
}

int run_block(std::vector<unsigned> &order, int schedule, unsigned &seed) {
    while (live > 0) {
        const bool moved = run_round(order, schedule, seed);
        if (broken) return DIVERGED;
        unsigned waiting = 0;
        for (const Fibre &fibre : fibres) waiting += fibre.state == AT_BARRIER;
        if (waiting > 0 && waiting == live) {
            if (!open_barrier()) return DIVERGED;
        } else if (!moved && live > 0) {
            snprintf(message, sizeof message,
                     "block (%u, %u, %u) is stuck: of %u running threads %u wait at a barrier, the others in a warp "
                     "operation, or at a barrier in shared memory, for threads that never come",
                     simt_ctaid.x, simt_ctaid.y, simt_ctaid.z, live, waiting);
            return DEADLOCK;
        }
    }
    if (simt_copies_pending() > 0) {
        snprintf(message, sizeof message, "block (%u, %u, %u) ended with %d cp.async that nobody waited for",
                 simt_ctaid.x, simt_ctaid.y, simt_ctaid.z, simt_copies_pending());
        return DIVERGED;
    }
    if (simt_products_pending() > 0) {
        snprintf(message, sizeof message, "block (%u, %u, %u) ended with products that nobody waited for", simt_ctaid.x,
                 simt_ctaid.y, simt_ctaid.z);
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

static void wait_at_barrier(int value, void *where) {
    fibres[current].value = value;
    fibres[current].barrier = where;
    fibres[current].state = AT_BARRIER;
    give_up_processor();
}

void simt_barrier() { wait_at_barrier(0, __builtin_return_address(0)); }

int simt_barrier_reduce(int value, int operation, void *where) {
    wait_at_barrier(value, where);
    return reduced[operation];
}

static unsigned exchange_of(std::deque<Exchange> &warp, unsigned mask) {
    for (unsigned k = 0; k < warp.size(); ++k)
        if (warp[k].mask == mask) return k;
    warp.emplace_back();
    warp.back().mask = mask;
    return static_cast<unsigned>(warp.size()) - 1;
}

const unsigned char *simt_warp_exchange(unsigned mask, const void *deposit, size_t bytes, const char *operation) {
    const unsigned me = current, lane = me % WARP, bit = 1u << lane;
    if (!(mask & bit)) simt_fault("a warp operation whose mask leaves out the calling lane");
    if (bytes > DEPOSIT_BYTES) simt_fault("a warp operation deposits more than 128 bytes");
    auto &begun = fibres[me].exchanges;
    const unsigned which = exchange_of(warps[me / WARP], mask);
    if (begun.size() <= which) begun.resize(which + 1);
    Exchange &exchange = warps[me / WARP][which];
    // Two buffers: a lane can be one operation ahead of another, never two.
    const unsigned turn = begun[which]++ & 1;
    if (exchange.arrived[turn] && exchange.operation[turn] != operation)
        simt_fault("lanes of a warp meet in different operations");
    exchange.operation[turn] = operation;
    memcpy(exchange.deposits[turn] + lane * DEPOSIT_BYTES, deposit, bytes);
    exchange.arrived[turn] |= bit;
    for (;;) {
        const unsigned needed = mask & running_lanes(me / WARP);
        if ((exchange.arrived[turn] & needed) == needed) {
            exchange.lanes[turn] = exchange.arrived[turn];
            exchange.released[turn] |= exchange.arrived[turn];
            exchange.arrived[turn] = 0;
            check_warp_meets(me / WARP, operation);
        }
        if (exchange.released[turn] & bit) {
            exchange.released[turn] &= ~bit;
            ++exchanges_done;
            participants = exchange.lanes[turn];
            return exchange.deposits[turn];
        }
        fibres[me].state = IN_WARP;
        give_up_processor();
    }
}

void simt_wait_until(bool (*ready)(const void *, int), const void *object, int number) {
    while (!ready(object, number)) {
        fibres[current].state = IN_WARP;
        give_up_processor();
    }
    ++exchanges_done;
}

unsigned simt_participants() { return participants; }

void simt_stack(const unsigned char **begin, size_t *bytes) {
    *begin = reinterpret_cast<const unsigned char *>(stacks[current]);
    *bytes = SPARE_BYTES + STACK_BYTES;
}

static int run_one(std::vector<unsigned> &order, const Dim3 &block, int schedule, unsigned &seed) {
    const unsigned threads = static_cast<unsigned>(order.size());
    warps.assign((threads + WARP - 1) / WARP, {});
    memset(dynamic_shared, 0xFF, dynamic_bytes);
    check_block_begins(threads);
    simt_copies_begin(threads);
    simt_pipeline_begins(threads);
    for (unsigned i = 0; i < threads; ++i) {
        const bool backward = schedule == REVERSE || schedule == WARPS_REVERSED;
        order[i] = backward ? threads - 1 - i : i;
        prepare_fibre(i, block);
    }
    live = threads;
    return run_block(order, schedule, seed);
}

int simt_launch(void (*entry)(void *), void *arguments, const Dim3 *grid, const Dim3 *block, size_t shared_bytes,
                int schedule, int eager_copies, unsigned granularity, const Dim3 *most) {
    entry_point = entry;
    entry_arguments = arguments;
    eager = eager_copies != 0;
    broken = false;
    message[0] = 0;
    simt_ntid = *block;
    simt_nctaid = *grid;
    const unsigned threads = block->x * block->y * block->z;
    while (stacks.size() < threads)
        stacks.push_back(static_cast<char *>(aligned_alloc(64, SPARE_BYTES + STACK_BYTES)));
    fibres.resize(threads);
    free(dynamic_shared);
    dynamic_bytes = shared_bytes;
    dynamic_shared = static_cast<unsigned char *>(aligned_alloc(1024, (shared_bytes / 1024 + 1) * 1024));
    check_launch_begins(granularity);
    std::vector<unsigned> order(threads);
    unsigned seed = 12345;
    const Dim3 count{std::min(grid->x, most->x), std::min(grid->y, most->y), std::min(grid->z, most->z)};
    const unsigned long blocks = 1ul * count.x * count.y * count.z;
    for (unsigned long k = 0; k < blocks; ++k) {
        // a grid's blocks run in any order
        const unsigned long b = schedule == REVERSE || schedule == WARPS_REVERSED ? blocks - 1 - k : k;
        simt_ctaid = {grid->x - count.x + static_cast<unsigned>(b % count.x),
                      grid->y - count.y + static_cast<unsigned>(b / count.x % count.y),
                      grid->z - count.z + static_cast<unsigned>(b / count.x / count.y)};
        const int outcome = run_one(order, *block, schedule, seed);
        if (outcome != FINISHED) return outcome;
    }
    return FINISHED;
}
}
