// What translate.py puts in the place of special registers, PTX instructions and functions of libdevice. An instruction
// with several results leaves them in `results`, which the caller reads before anything else can run.
//
// Fragment layouts and semantics: NVIDIA, "PTX ISA", sections on mma.m16n8k16, mma.m16n8k8, ldmatrix, cp.async, shfl.sync.

#include "runtime.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

// The sum of numbers as a tensor core adds them: aligned to the largest exponent, cut off there behind 24 bits, added
// exactly, and the sum cut off to float32. Toward zero, both times: sums come out too small, and grow off in one direction.
//
// M. Fasi, N. J. Higham, M. Mikaitis, S. Pranesh: Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330,
// 2021. Without extra bits, as on the V100; later devices keep one or more, so that their sums are closer than these.
extern "C" float cut_off_sum(const double *terms, unsigned count) {
    double plain = 0, largest = std::numeric_limits<float>::min();
    for (unsigned i = 0; i < count; ++i) {
        plain += terms[i];
        largest = std::max(largest, std::fabs(terms[i]));
    }
    if (!std::isfinite(plain)) return static_cast<float>(plain);
    const double unit = std::ldexp(1.0, std::ilogb(largest) - 23);
    int64_t units = 0;
    for (unsigned i = 0; i < count; ++i) units += static_cast<int64_t>(terms[i] / unit);
    const double sum = static_cast<double>(units) * unit;
    const float nearest = static_cast<float>(sum);
    return std::isfinite(nearest) && std::fabs(nearest) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

namespace {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr unsigned DEPOSIT = 128;

unsigned lane() { return simt_thread() & 31; }

// What lane l gave to an exchange.
template <typename T> T deposit(const unsigned char *table, unsigned l) {
    T value;
    memcpy(&value, table + DEPOSIT * l, sizeof value);
    return value;
}

template <typename T> T bits(uint32_t word) {
    T value;
    memcpy(&value, &word, sizeof value);
    return value;
}

float half_to_float(uint32_t half) {
    const uint16_t low = static_cast<uint16_t>(half);
    _Float16 value;
    memcpy(&value, &low, sizeof value);
    return static_cast<float>(value);
}

// A tensor core reads 19 bits of a float: 1 sign, 8 exponent, 10 mantissa.
float tf32(uint32_t word) { return bits<float>(word & 0xffffe000u); }

uint32_t results[8];

// ---- mma: D = A B + C for a warp. With g = lane / 4 and t = lane % 4, C and D hold rows g and g + 8, columns 2t and
// 2t + 1 (16 x 8); A and B as commented below.

struct Fragments {
    uint32_t a[4], b[2];
    float c[4];
};

template <int DEPTH, typename Element>   // element: a product, exact
void mma(const Fragments &mine, Element element) {
    const unsigned char *all = simt_warp_exchange(ALL_LANES, &mine, sizeof mine, DEPTH == 16 ? "mma.f16" : "mma.tf32");
    if (simt_participants() != ALL_LANES) simt_fault("mma by a part of a warp");
    const unsigned g = lane() / 4, t = lane() % 4;
    constexpr unsigned AT_ONCE = DEPTH / 2;   // products of one such sum: 8 and 4 on the A100
    float sums[4];
    for (unsigned e = 0; e < 4; ++e) {
        const unsigned row = g + e / 2 * 8, column = t * 2 + e % 2;
        float sum = mine.c[e];
        for (unsigned k = 0; k < DEPTH; k += AT_ONCE) {
            double terms[AT_ONCE + 1];
            for (unsigned i = 0; i < AT_ONCE; ++i) terms[i] = element(all, row, column, k + i);
            terms[AT_ONCE] = sum;
            sum = cut_off_sum(terms, AT_ONCE + 1);
        }
        sums[e] = sum;
    }
    memcpy(results, sums, sizeof sums);
}

// A 16 x 16: word r + 2s of lane (g, t) holds row g + 8r, columns 8s + 2t and the next; B 16 x 8: word s holds rows
// 8s + 2t and the next, column g.
template <typename Widen> void mma_16_bits(const Fragments &mine, Widen widen) {
    mma<16>(mine, [&](const unsigned char *all, unsigned row, unsigned column, unsigned k) {
        const Fragments left = deposit<Fragments>(all, row % 8 * 4 + k % 8 / 2);
        const Fragments right = deposit<Fragments>(all, column * 4 + k % 8 / 2);
        const unsigned shift = 16 * (k % 2);
        return double{widen(left.a[row / 8 + 2 * (k / 8)] >> shift)} * widen(right.b[k / 8] >> shift);
    });
}

}   // namespace

extern "C" {

uint32_t *emu_results() { return results; }

#define REGISTER(name, value) int simt_sreg_##name() { return static_cast<int>(value); }
REGISTER(tid_x, simt_tid.x) REGISTER(tid_y, simt_tid.y) REGISTER(tid_z, simt_tid.z)
REGISTER(ctaid_x, simt_ctaid.x) REGISTER(ctaid_y, simt_ctaid.y) REGISTER(ctaid_z, simt_ctaid.z)
REGISTER(ntid_x, simt_ntid.x) REGISTER(ntid_y, simt_ntid.y) REGISTER(ntid_z, simt_ntid.z)
REGISTER(nctaid_x, simt_nctaid.x) REGISTER(nctaid_y, simt_nctaid.y) REGISTER(nctaid_z, simt_nctaid.z)
REGISTER(laneid, lane()) REGISTER(warpsize, 32)

// ---- cp.async: the copy happens when its group is waited for, so that a missing wait reads old data; launched with
// eager copies it happens at once, so that a copy into what others still read shows. Either way it ends when waited for.

struct Copy {
    unsigned char *target;
    const unsigned char *source;
    unsigned bytes, source_bytes;   // the rest of the target is filled with zeros
    int group;
};
static std::vector<std::vector<Copy>> copies;
static std::vector<int> groups;

void simt_copies_begin(unsigned threads) {
    copies.assign(threads, {});
    groups.assign(threads, 0);
}

int simt_copies_pending() {
    int pending = 0;
    for (const auto &queue : copies) pending += static_cast<int>(queue.size());
    return pending;
}

static void copy_bytes(const Copy &copy) {
    memcpy(copy.target, copy.source, copy.source_bytes);
    memset(copy.target + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

static void finish(const Copy &copy) {
    check_copy_ends(copy.target, copy.bytes);
    simt_copies_arrived();
    if (!simt_eager_copies()) copy_bytes(copy);
}

static void cp_async(uint32_t target, uint64_t source, unsigned bytes, unsigned source_bytes) {
    if (source_bytes > bytes) simt_fault("cp.async with more source bytes than bytes");
    if (target % bytes || (source_bytes && source % bytes)) simt_fault("cp.async with an unaligned address");
    const Copy copy{simt_shared(target, bytes), reinterpret_cast<const unsigned char *>(source), bytes, source_bytes,
                    groups[simt_thread()]};
    if (source_bytes) emu_check_load(copy.source, source_bytes, 1);
    check_copy_begins(copy.target, bytes);
    if (simt_eager_copies()) copy_bytes(copy);
    copies[simt_thread()].push_back(copy);
}

void emu_cp_async_4(uint32_t target, uint64_t source, uint32_t source_bytes) { cp_async(target, source, 4, source_bytes); }
void emu_cp_async_8(uint32_t target, uint64_t source, uint32_t source_bytes) { cp_async(target, source, 8, source_bytes); }
void emu_cp_async_16(uint32_t target, uint64_t source, uint32_t source_bytes) { cp_async(target, source, 16, source_bytes); }
void emu_cp_async_commit() { ++groups[simt_thread()]; }

void emu_cp_async_wait(int pending) {
    auto &queue = copies[simt_thread()];
    size_t done = 0;
    while (done < queue.size() && queue[done].group < groups[simt_thread()] - pending) finish(queue[done++]);
    queue.erase(queue.begin(), queue.begin() + static_cast<long>(done));
}

// ---- ldmatrix: lane l gives the address of row l % 8 of matrix l / 8, and gets two neighbouring elements of each of
// the matrices: (l / 4, 2 * (l % 4) ...), or of the transposed ones.

static void ldmatrix(uint32_t address, unsigned matrices, bool transposed) {
    const unsigned char *rows = simt_warp_exchange(ALL_LANES, &address, sizeof address, "ldmatrix");
    if (simt_participants() != ALL_LANES) simt_fault("ldmatrix by a part of a warp");
    const unsigned l = lane();
    for (unsigned m = 0; m < matrices; ++m) {
        uint16_t pair[2];
        for (unsigned e = 0; e < 2; ++e) {
            const unsigned row = transposed ? l % 4 * 2 + e : l / 4, column = transposed ? l / 4 : l % 4 * 2 + e;
            const uint32_t row_address = deposit<uint32_t>(rows, m * 8 + row);
            if (row_address % 16) simt_fault("ldmatrix with a row that is not aligned to 16 bytes");
            const unsigned char *element = simt_shared(row_address, 16) + column * 2;
            emu_check_load(element, 2, 2);
            memcpy(&pair[e], element, 2);
        }
        results[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
}

void emu_ldmatrix_x4(uint32_t address) { ldmatrix(address, 4, false); }
void emu_ldmatrix_x4_trans(uint32_t address) { ldmatrix(address, 4, true); }
void emu_ldmatrix_x2(uint32_t address) { ldmatrix(address, 2, false); }
void emu_ldmatrix_x2_trans(uint32_t address) { ldmatrix(address, 2, true); }

void emu_mma_f16(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1,
                 float c2, float c3) {
    mma_16_bits({{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}}, half_to_float);
}
void emu_mma_bf16(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1,
                  float c2, float c3) {
    mma_16_bits({{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}}, [](uint32_t word) { return bits<float>(word << 16); });
}

// A 16 x 8: word r + 2s of lane (g, t) holds row g + 8r, column t + 4s; B 8 x 8: word s holds row t + 4s, column g.
void emu_mma_tf32(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1,
                  float c2, float c3) {
    mma<8>({{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}},
           [](const unsigned char *all, unsigned row, unsigned column, unsigned k) {
               const Fragments left = deposit<Fragments>(all, row % 8 * 4 + k % 4);
               const Fragments right = deposit<Fragments>(all, column * 4 + k % 4);
               return double{tf32(left.a[row / 8 + 2 * (k / 4)])} * tf32(right.b[k / 4]);
           });
}

// Rounds to the nearest TF32 number, ties away from zero.
uint32_t emu_cvt_tf32(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    if (std::isnan(value)) return 0x7fffffffu;
    const bool finite = (word & 0x7f800000u) != 0x7f800000u;
    return finite ? (word + 0x1000u) & 0xffffe000u : word;
}

uint32_t emu_mov_32(uint32_t value) { return value; }
uint64_t emu_mov_64(uint64_t value) { return value; }

// ---- warp operations

// Modes as in NVVM: 0 idx, 1 up, 2 down, 3 xor. Returns the word, and above it whether the source lane was in range.
uint64_t emu_shfl(int mask, int mode, int value, int by, int control) {
    const unsigned l = lane(), segment = static_cast<unsigned>(control) >> 8 & 31, clamp = control & 31;
    const unsigned last = (l & segment) | (clamp & ~segment), first = l & segment;
    by &= 31;
    int source;
    bool in_range;
    switch (mode) {
    case 0: source = static_cast<int>(first | (by & ~segment)); in_range = source <= static_cast<int>(last); break;
    case 1: source = static_cast<int>(l) - by; in_range = source >= static_cast<int>(last); break;
    case 2: source = static_cast<int>(l) + by; in_range = source <= static_cast<int>(last); break;
    default: source = static_cast<int>(l) ^ by; in_range = source <= static_cast<int>(last); break;
    }
    const unsigned char *all = simt_warp_exchange(static_cast<unsigned>(mask), &value, sizeof value, "shfl");
    const unsigned from = in_range ? static_cast<unsigned>(source) : l;
    if (!(simt_participants() >> from & 1)) simt_fault("a shuffle reads a lane that does not take part");
    return deposit<uint32_t>(all, from) | static_cast<uint64_t>(in_range) << 32;
}

// Modes as in NVVM: 0 all, 1 any, 2 whether all agree, 3 ballot. Returns the ballot, and above it the verdict.
uint64_t emu_vote(int mask, int mode, bool predicate) {
    const unsigned char mine = predicate;
    const unsigned char *all = simt_warp_exchange(static_cast<unsigned>(mask), &mine, 1, "vote");
    const unsigned lanes = simt_participants();
    uint32_t ballot = 0;
    for (unsigned l = 0; l < 32; ++l)
        if (lanes >> l & 1 && all[DEPOSIT * l]) ballot |= 1u << l;
    const bool every = ballot == lanes;
    const bool verdict = mode == 0 ? every : mode == 1 ? ballot != 0 : every || ballot == 0;
    return ballot | static_cast<uint64_t>(verdict) << 32;
}

void emu_syncwarp(int mask) {
    const char nothing = 0;
    simt_warp_exchange(static_cast<unsigned>(mask), &nothing, 1, SYNCWARP);
}

int emu_barrier_popc(int value) { return simt_barrier_reduce(value, 0, __builtin_return_address(0)); }
int emu_barrier_and(int value) { return simt_barrier_reduce(value, 1, __builtin_return_address(0)); }
int emu_barrier_or(int value) { return simt_barrier_reduce(value, 2, __builtin_return_address(0)); }

// ---- libdevice, where the C library has no function of the name

float emu_nv_rsqrtf(float x) { return 1 / std::sqrt(x); }
double emu_nv_rsqrt(double x) { return 1 / std::sqrt(x); }
float emu_nv_fast_expf(float x) { return std::exp(x); }
float emu_nv_fast_logf(float x) { return std::log(x); }
float emu_nv_fast_fdividef(float x, float y) { return x / y; }
int emu_nv_isnanf(float x) { return std::isnan(x); }
int emu_nv_isnand(double x) { return std::isnan(x); }
int emu_nv_isinff(float x) { return std::isinf(x); }
int emu_nv_isinfd(double x) { return std::isinf(x); }
}
