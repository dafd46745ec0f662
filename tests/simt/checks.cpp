// Watches every load and store of a kernel (checks.py puts the calls there).
//
// Outside of arrays. The host names the memory that a launch may use: arrays, static and dynamic shared memory, constants.
// An access elsewhere ends the launch, and so does one at an address that is not the multiple that its instruction needs.
//
// Races in shared memory. Each piece of it (`granularity` bytes) remembers who wrote and who read it last, and when. Time
// is a counter that a barrier or a __syncwarp() advances. Two accesses of different threads, one of them a write, need
// a barrier between them, or within a warp a __syncwarp(); if there is none, some order of the threads gives another
// result, whether or not the order at hand does. A piece that cp.async is filling may not be touched before the wait.

#include "runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

extern "C" const char *const SYNCWARP = "__syncwarp";

namespace {

constexpr uint32_t NOBODY = 0xffffffffu, SEVERAL = 0x80000000u, ALL_WARPS = 0xfffffffeu;
constexpr unsigned WARP = 32;

struct Range {
    unsigned char *begin;
    size_t bytes;
    int kind;
    size_t first_piece;   // of shared memory
    unsigned char *end() const { return begin + bytes; }
};

// Readers: a thread, SEVERAL | a warp where they are of one warp, or ALL_WARPS.
struct Piece {
    uint32_t writer = NOBODY, write_time = 0, reader = NOBODY, read_time = 0, copying = 0;
};

std::vector<Range> given;    // by the host, in any order
std::vector<Range> ranges;   // of this launch, by address
std::vector<Piece> pieces;
std::vector<uint32_t> warp_time;
size_t last_range;
unsigned shift;
uint32_t now, barrier_time;

const Range *find(const unsigned char *address, uint64_t bytes) {
    const auto holds = [&](const Range &r) { return address >= r.begin && address + bytes <= r.end(); };
    if (last_range < ranges.size() && holds(ranges[last_range])) return &ranges[last_range];
    const auto after = std::upper_bound(ranges.begin(), ranges.end(), address,
                                        [](const unsigned char *a, const Range &r) { return a < r.begin; });
    if (after == ranges.begin() || !holds(*(after - 1))) return nullptr;
    last_range = static_cast<size_t>(after - 1 - ranges.begin());
    return &ranges[last_range];
}

[[gnu::cold]] void outside(const char *what, const unsigned char *address, uint64_t bytes) {
    const Range *nearest = nullptr;
    long distance = 0;
    for (const Range &r : ranges) {
        if (r.kind == CONSTANT) continue;
        const long far = address < r.begin ? address - r.begin : address + bytes - r.end();
        if (!nearest || std::abs(far) < std::abs(distance)) nearest = &r, distance = far;
    }
    char text[160];
    snprintf(text, sizeof text, "%s outside of an array: %ld bytes %s %s of %zu bytes", what, std::abs(distance),
             distance < 0 ? "before" : "beyond", nearest && nearest->kind == SHARED ? "shared memory" : "an array",
             nearest ? nearest->bytes : 0);
    simt_fault(text);
}

// A GPU refuses what the kernel's code promises and does not keep; this machine's processor would not.
void aligned(const char *what, const unsigned char *address, uint64_t bytes, uint64_t alignment) {
    if (reinterpret_cast<uintptr_t>(address) % alignment == 0) return;
    char text[120];
    snprintf(text, sizeof text, "%s %zu bytes from an address that is not a multiple of %zu", what, static_cast<size_t>(bytes),
             static_cast<size_t>(alignment));
    simt_fault(text);
}

[[gnu::cold]] void race(const char *what, uint32_t other, const Range &range, const unsigned char *address) {
    char text[200], who[40];
    if (other == ALL_WARPS)
        snprintf(who, sizeof who, "threads of several warps");
    else if (other & SEVERAL)
        snprintf(who, sizeof who, "threads of warp %u", other & ~SEVERAL);
    else
        snprintf(who, sizeof who, "thread %u", other);
    snprintf(text, sizeof text, "race in shared memory, byte %zd of %zu: it %s %s, without a barrier between",
             address - range.begin, range.bytes, what, who);
    simt_fault(text);
}

// Whether an access of `who` at `time` and one of `thread` now can happen in either order.
bool unordered(uint32_t who, uint32_t time, uint32_t thread) {
    if (who == NOBODY || time < barrier_time || who == thread) return false;
    const bool same_warp = who != ALL_WARPS && (who & SEVERAL ? who & ~SEVERAL : who / WARP) == thread / WARP;
    return !(same_warp && time < warp_time[thread / WARP]);
}

template <typename F> void each_piece(const Range &range, const unsigned char *address, uint64_t bytes, F use) {
    const size_t offset = static_cast<size_t>(address - range.begin);
    const size_t first = range.first_piece + (offset >> shift), last = range.first_piece + ((offset + bytes - 1) >> shift);
    for (size_t p = first; p <= last; ++p) use(pieces[p]);
}

void shared_load(const Range &range, const unsigned char *address, uint64_t bytes) {
    const uint32_t me = simt_thread();
    each_piece(range, address, bytes, [&](Piece &piece) {
        if (piece.copying) simt_fault("reads shared memory that a cp.async is still filling");
        if (unordered(piece.writer, piece.write_time, me)) race("reads what was written by", piece.writer, range, address);
        const bool earlier = piece.reader == NOBODY || piece.read_time < barrier_time;
        if (earlier)
            piece.reader = me;
        else if (piece.reader != me && piece.reader != ALL_WARPS) {
            const uint32_t warp = piece.reader & SEVERAL ? piece.reader & ~SEVERAL : piece.reader / WARP;
            piece.reader = warp == me / WARP ? SEVERAL | warp : ALL_WARPS;
        }
        piece.read_time = now;
    });
}

void written(const Range &range, const unsigned char *address, Piece &piece) {
    const uint32_t me = simt_thread();
    if (unordered(piece.writer, piece.write_time, me)) race("writes what was written by", piece.writer, range, address);
    if (unordered(piece.reader, piece.read_time, me)) race("writes what was read by", piece.reader, range, address);
    piece.writer = me;
    piece.write_time = now;
    piece.reader = NOBODY;
}

const Range &shared_range(const unsigned char *address, uint64_t bytes) {
    const Range *range = find(address, bytes);
    if (!range || range->kind != SHARED) outside("cp.async into memory", address, bytes);
    return *range;
}

}   // namespace

extern "C" {

void simt_no_ranges() { given.clear(); }
void simt_range(unsigned char *begin, size_t bytes, int kind) { given.push_back({begin, bytes, kind, 0}); }

unsigned char *simt_shared(uint32_t address, size_t bytes) {
    for (const Range &range : ranges) {
        const uint32_t offset = address - static_cast<uint32_t>(reinterpret_cast<uintptr_t>(range.begin));
        if (range.kind == SHARED && offset < range.bytes && offset + bytes <= range.bytes) return range.begin + offset;
    }
    simt_fault("an address outside of the kernel's shared memory");
    return nullptr;
}

void check_launch_begins(unsigned granularity) {
    shift = static_cast<unsigned>(__builtin_ctz(granularity));
    ranges = given;
    if (simt_dynamic_bytes()) ranges.push_back({simt_dynamic_shared(), simt_dynamic_bytes(), SHARED, 0});
    ranges.push_back({reinterpret_cast<unsigned char *>(emu_results()), 8 * sizeof(uint32_t), CONSTANT, 0});
    std::sort(ranges.begin(), ranges.end(), [](const Range &a, const Range &b) { return a.begin < b.begin; });
    size_t count = 0;
    for (Range &range : ranges)
        if (range.kind == SHARED) {
            range.first_piece = count;
            count += (range.bytes >> shift) + 1;
        }
    pieces.assign(count, {});
    last_range = ~size_t{0};
}

void check_block_begins(unsigned threads) {
    for (const Range &range : ranges)
        if (range.kind == SHARED) memset(range.begin, 0xFF, range.bytes);
    std::fill(pieces.begin(), pieces.end(), Piece{});
    warp_time.assign((threads + WARP - 1) / WARP, 0);
    now = 1;
    barrier_time = 0;
}

void check_barrier_opens() { barrier_time = ++now; }

void check_warp_meets(unsigned warp, const char *operation) {
    if (operation == SYNCWARP) warp_time[warp] = ++now;
}

void emu_check_load(const unsigned char *address, uint64_t bytes, uint64_t alignment) {
    const unsigned char *stack;
    size_t stack_bytes;
    simt_stack(&stack, &stack_bytes);
    if (address >= stack && address < stack + stack_bytes) return;
    const Range *range = find(address, bytes);
    if (!range) outside("reads", address, bytes);
    if (range->kind != CONSTANT) aligned("reads", address, bytes, alignment);
    if (range->kind == SHARED) shared_load(*range, address, bytes);
}

void emu_check_store(unsigned char *address, uint64_t bytes, uint64_t alignment) {
    const unsigned char *stack;
    size_t stack_bytes;
    simt_stack(&stack, &stack_bytes);
    if (address >= stack && address < stack + stack_bytes) return;
    const Range *range = find(address, bytes);
    if (!range || range->kind == CONSTANT) outside("writes", address, bytes);
    aligned("writes", address, bytes, alignment);
    if (range->kind != SHARED) return;
    each_piece(*range, address, bytes, [&](Piece &piece) {
        if (piece.copying) simt_fault("writes shared memory that a cp.async is still filling");
        written(*range, address, piece);
    });
}

void check_not_copying(const unsigned char *address, size_t bytes) {
    each_piece(shared_range(address, bytes), address, bytes, [&](Piece &piece) {
        if (piece.copying) simt_fault("a product reads shared memory that a cp.async is still filling");
    });
}

// From here to its wait, a copy owns its target: it must not begin while others may still read or write there.
void check_copy_begins(unsigned char *target, size_t bytes) {
    const Range &range = shared_range(target, bytes);
    each_piece(range, target, bytes, [&](Piece &piece) {
        if (piece.copying) simt_fault("cp.async into shared memory that another one is still filling");
        written(range, target, piece);
        piece.copying = 1;
    });
}

// Now it is there for its own thread; for others after the next barrier.
void check_copy_ends(unsigned char *target, size_t bytes) {
    each_piece(shared_range(target, bytes), target, bytes, [&](Piece &piece) {
        piece.copying = 0;
        piece.writer = simt_thread();
        piece.write_time = now;
    });
}
}
