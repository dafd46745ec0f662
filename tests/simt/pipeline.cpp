// What kernels/cupy/src/wgmma.cuh needs: barriers in shared memory, barriers of a part of a block, and Hopper's matrix
// instruction, whose operands lie where its descriptors say.
//
// Written from NVIDIA, "PTX ISA": mbarrier, bar.sync, fence.proxy.async, wgmma (matrix descriptor, shared memory layouts,
// register fragments). Products happen when they are waited for, so that a missing wait, or a stage given up too early,
// shows; launched with eager copies they happen at once, so that a stage that is not there yet shows.

#include "runtime.h"

#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

namespace {

constexpr unsigned ALL_LANES = 0xffffffffu, WARP = 32;

struct Barrier {
    unsigned count = 0, arrived = 0, phase = 0;
    bool unshown = false;   // whether one arrived with copies that no fence followed
};
std::map<uint32_t, Barrier> barriers;    // by their address
std::map<int, Barrier> meetings;         // by their number
std::vector<uint8_t> unshown;            // whether copies have come, by a barrier or its own, since a thread's last fence

// Of TF32 (widen is null) the left operand is in registers: rows as they were at the start, and the thread's own words,
// which it may not change before the product has been waited for.
struct Product {
    float *d;
    unsigned n;
    uint64_t a, b;
    bool transposed_a, transposed_b;
    float (*widen)(unsigned short);
    unsigned group;
    bool add = true;
    const unsigned *registers = nullptr;
    unsigned words[4] = {};
    float rows[2][8] = {};
};
std::vector<std::vector<Product>> products;   // of each thread, begun and not done
std::vector<unsigned> groups;

// Of each thread: whether it has come to a wgmma.fence, and its sums as the products left them, or that fence found them.
struct Fenced {
    bool any = false;
    std::map<float *, std::vector<float>> sums;
};
std::vector<Fenced> fenced;

Barrier &find(uint32_t address) {
    const auto found = barriers.find(address);
    if (found == barriers.end()) simt_fault("a barrier in shared memory that nobody has made");
    return found->second;
}

void end_phase_if_full(Barrier &barrier) {
    if (++barrier.arrived < barrier.count) return;
    barrier.arrived = 0;
    ++barrier.phase;
    check_barrier_opens();
}

// An operand's element, of `bytes`: row (or column) i, depth k, of a matrix with a swizzle of 128 bytes.
//
// k contiguous: eight lines of 128 bytes are eight rows, the next eight `stride` bytes on. Rows contiguous (of 16 bits): a
// line is 64 rows, the next 64 `leading` bytes on; eight lines are eight k, the next eight `stride` bytes on. Of the address, bits 4
// to 6 are changed by bits 7 to 9.
const unsigned char *element(uint64_t descriptor, bool transposed, unsigned i, unsigned k, unsigned bytes) {
    const auto field = [&](unsigned shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4; };
    if (descriptor >> 62 != 1) simt_fault("a descriptor without the swizzle of 128 bytes");
    if (descriptor >> 46 & 0xffff) simt_fault("a descriptor with an offset of its base, or with bits that must be 0");
    const uint32_t start = field(0), leading = field(16), stride = field(32);
    uint32_t address = transposed ? start + i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128
                                  : start + i / 8 * stride + i % 8 * 128 + k * bytes;
    address ^= (address >> 7 & 7) << 4;
    // a descriptor has 18 bits of an address
    const uint32_t base = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(simt_dynamic_shared()));
    return simt_shared((base & ~0x3ffffu) + address + (address < (base & 0x3ffffu) ? 0x40000u : 0u), bytes);
}

// A tensor core reads 19 bits of a float: 1 sign, 8 exponent, 10 mantissa.
float tf32(uint32_t word) {
    word &= 0xffffe000u;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

float value(uint64_t descriptor, bool transposed, unsigned i, unsigned k, float (*widen)(unsigned short)) {
    const unsigned bytes = widen ? 2 : 4;
    const unsigned char *place = element(descriptor, transposed, i, k, bytes);
    check_not_copying(place, bytes);
    uint32_t bits = 0;
    memcpy(&bits, place, bytes);
    return widen ? widen(static_cast<unsigned short>(bits)) : tf32(bits);
}

// Registers of sums belong to the products: the thread itself may write them only before a fence.
void check_fenced(float *d, unsigned n) {
    if (unshown[simt_thread()]) simt_fault("a product before a fence showed it the copies");
    Fenced &mine = fenced[simt_thread()];
    if (!mine.any) simt_fault("a product before the first wgmma.fence");
    const auto found = mine.sums.find(d);
    if (found != mine.sums.end() && memcmp(d, found->second.data(), n / 2 * sizeof(float)))
        simt_fault("a product of sums that were written since wgmma.fence");
    mine.sums[d].assign(d, d + n / 2);
}

// What this lane gets: of its warp's 16 rows, g and g + 8; of every 8 columns, 2t and the next. 16 bytes of the depth are
// one sum of a tensor core.
void multiply(const Product &p) {
    const unsigned thread = simt_thread(), lane = thread % WARP, row = thread / WARP % 4 * 16 + lane / 4;
    const unsigned depth = p.widen ? 16 : 8, at_once = depth / 2;
    float rows[2][16];
    for (unsigned r = 0; r < 2; ++r)
        for (unsigned k = 0; k < depth; ++k)
            rows[r][k] = p.registers ? p.rows[r][k] : value(p.a, p.transposed_a, row + 8 * r, k, p.widen);
    for (unsigned j = 0; j < p.n / 8; ++j)
        for (unsigned c = 0; c < 2; ++c) {
            float column[16];
            for (unsigned k = 0; k < depth; ++k)
                column[k] = value(p.b, p.transposed_b, 8 * j + lane % 4 * 2 + c, k, p.widen);
            for (unsigned r = 0; r < 2; ++r) {
                float &d = p.d[4 * j + 2 * r + c];
                if (!p.add) d = 0;
                for (unsigned k = 0; k < depth; k += at_once) {
                    double terms[9];
                    for (unsigned i = 0; i < at_once; ++i) terms[i] = double{rows[r][k + i]} * column[k + i];
                    terms[at_once] = d;
                    d = cut_off_sum(terms, at_once + 1);
                }
            }
        }
    fenced[thread].sums[p.d].assign(p.d, p.d + p.n / 2);
}

void start(const Product &product) {
    if (simt_eager_copies()) multiply(product);
    products[simt_thread()].push_back(product);
}

}   // namespace

extern "C" {

void emu_cp_async_commit();   // ptx.cpp
void emu_cp_async_wait(int pending);

void simt_pipeline_begins(unsigned threads) {
    barriers.clear();
    meetings.clear();
    unshown.assign(threads, 0);
    products.assign(threads, {});
    groups.assign(threads, 0);
    fenced.assign(threads, {});
}

void simt_copies_arrived() { unshown[simt_thread()] = 1; }

void emu_make_barrier(uint32_t address, unsigned count) {
    if (address % 8) simt_fault("a barrier that is not aligned to eight bytes");
    simt_shared(address, 8);
    barriers[address] = {count, 0, 0};
}

void emu_arrive(uint32_t address) {
    Barrier &barrier = find(address);
    if (unshown[simt_thread()]) barrier.unshown = true;
    end_phase_if_full(barrier);
}

// The copies happen here, and the arrival with them: that is one of the moments when they may.
void emu_arrive_with_copies(uint32_t address) {
    emu_cp_async_commit();
    emu_cp_async_wait(0);
    emu_arrive(address);
}

void emu_wait_phase(uint32_t address, int parity) {
    const Barrier &barrier = find(address);
    simt_wait_until([](const void *b, int p) { return static_cast<int>(static_cast<const Barrier *>(b)->phase & 1) != p; },
                    &barrier, parity);
    if (barrier.unshown) unshown[simt_thread()] = 1;
}

void emu_meet(int number, unsigned count) {
    Barrier &barrier = meetings[number];
    barrier.count = count;
    const int phase = static_cast<int>(barrier.phase);
    end_phase_if_full(barrier);
    simt_wait_until([](const void *b, int p) { return static_cast<int>(static_cast<const Barrier *>(b)->phase) != p; },
                    &barrier, phase);
}

void emu_show_to_products() { unshown[simt_thread()] = 0; }

void emu_begin_products() {
    Fenced &mine = fenced[simt_thread()];
    mine.any = true;
    for (auto &[d, seen] : mine.sums) seen.assign(d, d + seen.size());
}

void emu_start_product(float *d, unsigned n, uint64_t a, uint64_t b, int transposed_a, int transposed_b,
                       float (*widen)(unsigned short)) {
    check_fenced(d, n);
    start({d, n, a, b, transposed_a != 0, transposed_b != 0, widen, groups[simt_thread()]});
}

// Of the warp's 16 rows, lane 4g + t has in word r + 2s: row g + 8r, k = t + 4s.
void emu_start_product_tf32(float *d, unsigned n, const unsigned *a, uint64_t b, int add) {
    check_fenced(d, n);
    Product product{d, n, 0, b, false, false, nullptr, groups[simt_thread()], add != 0, a};
    memcpy(product.words, a, sizeof product.words);
    const unsigned char *all = simt_warp_exchange(ALL_LANES, a, sizeof product.words, "wgmma");
    if (simt_participants() != ALL_LANES) simt_fault("wgmma by a part of a warp");
    for (unsigned r = 0; r < 2; ++r)
        for (unsigned k = 0; k < 8; ++k) {
            uint32_t word;
            memcpy(&word, all + 128 * (simt_thread() % WARP / 4 * 4 + k % 4) + 4 * (r + k / 4 * 2), sizeof word);
            product.rows[r][k] = tf32(word);
        }
    start(product);
}

void emu_commit_products() { ++groups[simt_thread()]; }

// All lanes of the warp have done theirs when it returns.
void emu_wait_products(unsigned pending) {
    const unsigned me = simt_thread();
    auto &queue = products[me];
    size_t done = 0;
    for (; done < queue.size() && queue[done].group + pending < groups[me]; ++done) {
        const Product &product = queue[done];
        if (product.registers && memcmp(product.registers, product.words, sizeof product.words))
            simt_fault("registers of a product's left operand were written before it was waited for");
        if (!simt_eager_copies()) multiply(product);
    }
    queue.erase(queue.begin(), queue.begin() + static_cast<long>(done));
    simt_warp_exchange(ALL_LANES, &pending, sizeof pending, "wgmma.wait_group");
}

int simt_products_pending() {
    size_t pending = 0;
    for (const auto &queue : products) pending += queue.size();
    return static_cast<int>(pending);
}
}
