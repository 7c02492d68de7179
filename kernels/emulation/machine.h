// machine.h: the host path of device.cuh. A block's threads are fibers of one OS thread.
//
// The schedule is drawn from a seed: blocks in random order; in a block one random warp
// runs alone as far as it can, then the next, in an order redrawn at every barrier, so that
// a missing barrier shows; lanes in random order. A warp may be preempted where it arrives at
// an mbarrier, or last at a named barrier. A block has up to kMostThreads threads,
// and may be warp-specialised (roles.cpp). Shared memory starts as NaN. An asynchronous copy
// makes its target NaN at once and lands at a random later point, at the latest at the wait
// that covers it. Tensor-core sums are exact, then truncated to f32, the least accurate
// rounding of the hardware.
#ifndef DDTAS_EMULATION_MACHINE_H
#define DDTAS_EMULATION_MACHINE_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

using std::exp;
using std::fabs;
using std::fmax;
using std::fmin;
using std::isfinite;
using std::sqrt;

#define DEVICE inline
#define SHARED_MEMORY(name) unsigned char *name = emulation::shared_memory()
#define INFINITE std::numeric_limits<float>::infinity()

namespace emulation {

using Entry = void (*)(const void *params);

struct Registration {
    Registration(const char *name, uint32_t threads, size_t params_bytes, Entry entry);
};

struct Index {
    uint32_t x, y, z;
};

uint32_t thread();
Index block();
Index grid();
unsigned char *shared_memory();

void block_barrier(const char *file, int line);
[[noreturn]] void stop(const char *message);
// Enters a warp-wide operation with this lane's operands; the last lane to arrive
// runs `operation` on the operands of all 32 lanes.
using Operation = void (*)(void **lanes);
void collective(const char *what, void *operands, Operation operation);

// Warp specialisation. Instructions that PTX calls aligned need converged warps: after a wait, an arrival, a copy or a branch of
// some_lanes(), where lanes may diverge, a warp_sync() must come first, which is checked.
void lanes_apart();
void lanes_together();
void aligned(const char *what);
void named_sync(uint32_t barrier, uint32_t threads);
void setmaxnreg(uint32_t registers, bool more);

void cp_async(void *to, const void *from);
void cp_async_commit();
void cp_async_wait(int pending);

enum class Precision { f16, bf16 };
struct Multiply {
    float *c;
    const uint32_t *a;
    const uint32_t *b;
};
template <Precision numbers>
void multiply(void **lanes);
struct LdMatrix {
    uint32_t *r;
    const void *row;
};
template <bool transposed>
void ldmatrix(void **lanes);
// Tells ThreadSanitizer that this lane's row is read.
void reads_matrix(const void *row);

// Hopper: products of a warpgroup run at a random point between issue and wait. Each warp's part is
// computed when the warp's lanes meet; the parts are independent. Operands are found by their
// descriptors, as sm90.cuh encodes them, in shared memory as the async proxy sees it: threads' writes
// are visible from a fence on.
struct GroupMultiply {
    float *c;
    uint64_t a, b;
    int columns;
    bool transposed, transposed_a, from_zero;
};
template <Precision numbers>
void wgmma(void **lanes);
void wgmma_commit(void **lanes);
void wgmma_wait(void **lanes);
void fence_proxy_async();
// The same, also for global memory that watch_global() names.
void fence_proxy_async_all();
// From the next launch of this OS thread on, bulk copies see these bytes of global memory as they were when the kernel began or
// at the last such fence. It lasts until the program ends.
void watch_global(void *first, size_t bytes);
void wgmma_fence();
// The address of a byte in the block's shared address space, which descriptors use.
uint32_t shared_address(const void *pointer);

// mbarriers and bulk copies. Copies land whole, in any order, at any time; half of them as late as possible,
// since otherwise a missing wait would hardly ever show.
using Barrier = uint64_t;
void mbarrier_init(Barrier *barrier, uint32_t count);
void mbarrier_arrive(Barrier *barrier);
void mbarrier_arrive_expect_tx(Barrier *barrier, uint32_t bytes);
void mbarrier_wait(Barrier *barrier, uint32_t parity);
void cp_async_bulk(void *to, const void *from, uint32_t bytes, Barrier *barrier);
// Bulk stores read shared memory, as the async proxy sees it, at any time up to the wait, half of them only then. They write to
// global memory at any time up to the end of the block: the wait is only for the read.
void bulk_store(void *to, const void *from, uint32_t bytes);
void bulk_store_commit();
void bulk_store_wait_read();
// Shared memory by its address in the block's shared address space.
void *shared_at(uint32_t address, uint32_t bytes);

// A block's arrival, ordered after those before.
uint32_t count_arrival(uint32_t *arrived);

uint16_t f16_bits(float value);

// Runs a kernel; 0, or -1 if there is no such kernel or its number of threads or size of parameters differs.
int launch(const char *name, const uint32_t grid[3], uint32_t threads, uint32_t shared_bytes, const void *params,
           size_t params_bytes, uint64_t seed);
// Products of two elements that tensor cores computed in this OS thread's last launch.
uint64_t products();

template <class T>
struct Shuffle {
    T value;
    T result;
    int argument;
};
template <class T, int kind>
void shuffle_lanes(void **lanes) {
    T values[32];
    for (int lane = 0; lane < 32; ++lane) values[lane] = static_cast<Shuffle<T> *>(lanes[lane])->value;
    for (int lane = 0; lane < 32; ++lane) {
        auto &one = *static_cast<Shuffle<T> *>(lanes[lane]);
        int from = kind == 0 ? lane ^ one.argument : kind == 1 ? lane - one.argument : one.argument;
        one.result = values[from < 0 ? lane : from % 32];
    }
}
struct Vote {
    bool vote;
    uint32_t result;
};
inline void vote_lanes(void **lanes) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= static_cast<uint32_t>(static_cast<Vote *>(lanes[lane])->vote) << lane;
    for (int lane = 0; lane < 32; ++lane) static_cast<Vote *>(lanes[lane])->result = bits;
}
inline void meet(void **) {}

}  // namespace emulation

#define ROLE_KERNEL(name, Params, threads)                                                          \
    static void name(const Params &p);                                                              \
    static const emulation::Registration register_##name(                                           \
        #name, threads, sizeof(Params), [](const void *params) { name(*static_cast<const Params *>(params)); }); \
    static void name(const Params &p)
#define KERNEL(name, Params, blocks) ROLE_KERNEL(name, Params, THREADS)

inline uint32_t thread_index() { return emulation::thread(); }
inline uint32_t block_x() { return emulation::block().x; }
inline uint32_t block_y() { return emulation::block().y; }
inline uint32_t block_z() { return emulation::block().z; }
inline uint32_t grid_x() { return emulation::grid().x; }

#define block_sync() emulation::block_barrier(__FILE__, __LINE__)
inline void warp_sync() {
    emulation::collective("warp_sync", nullptr, emulation::meet);
    emulation::lanes_together();
}
using emulation::named_sync;
template <int registers>
inline void setmaxnreg_inc() { emulation::setmaxnreg(registers, true); }
template <int registers>
inline void setmaxnreg_dec() { emulation::setmaxnreg(registers, false); }

template <class T>
inline T shuffle_xor(T value, int mask) {
    emulation::Shuffle<T> one{value, T{}, mask};
    emulation::collective("shuffle_xor", &one, emulation::shuffle_lanes<T, 0>);
    return one.result;
}
template <class T>
inline T shuffle_up(T value, int by) {
    emulation::Shuffle<T> one{value, T{}, by};
    emulation::collective("shuffle_up", &one, emulation::shuffle_lanes<T, 1>);
    return one.result;
}
template <class T>
inline T shuffle(T value, int lane) {
    emulation::Shuffle<T> one{value, T{}, lane};
    emulation::collective("shuffle", &one, emulation::shuffle_lanes<T, 2>);
    return one.result;
}
inline uint32_t ballot_sync(bool vote) {
    emulation::Vote one{vote, 0};
    emulation::collective("ballot_sync", &one, emulation::vote_lanes);
    return one.result;
}

// Blocks run one after the other and fibers switch only in calls of this file, so relaxed loads and stores suffice; they
// are atomic for ThreadSanitizer, which must distinguish them from plain accesses.
template <class T>
inline T atomic_load(const T *from) { return __atomic_load_n(from, __ATOMIC_RELAXED); }
template <class T>
inline void atomic_store(T *to, T value) { __atomic_store_n(to, value, __ATOMIC_RELAXED); }
template <class T>
inline void atomic_add(T *target, T value) {
    using Bits = std::make_unsigned_t<T>;  // unsigned, to wrap around
    atomic_store(target, static_cast<T>(static_cast<Bits>(atomic_load(target)) + static_cast<Bits>(value)));
}
inline uint64_t atomic_fetch_add(uint64_t *target, uint64_t value) {
    uint64_t before = atomic_load(target);
    atomic_store(target, before + value);
    return before;
}
inline uint32_t atomic_fetch_increment(uint32_t *target) {
    uint32_t before = atomic_load(target);
    atomic_store(target, before + 1);
    return before;
}
inline void atomic_max(uint32_t *target, uint32_t value) {
    if (value > atomic_load(target)) atomic_store(target, value);
}
inline void atomic_min(uint32_t *target, uint32_t value) {
    if (value < atomic_load(target)) atomic_store(target, value);
}

inline void cp_async(void *to, const void *from) { emulation::cp_async(to, from); }
inline void cp_async_if(bool there, void *to, const void *from) {
    alignas(16) static const unsigned char zeros[16] = {};
    emulation::cp_async(to, there ? from : zeros);
}
inline void cp_async_commit() { emulation::cp_async_commit(); }
template <int pending>
inline void cp_async_wait() { emulation::cp_async_wait(pending); }

inline void ldmatrix(uint32_t (&r)[4], const void *row) {
    emulation::LdMatrix one{r, row};
    emulation::reads_matrix(row);
    emulation::collective("ldmatrix", &one, emulation::ldmatrix<false>);
}
inline void ldmatrix_transposed(uint32_t (&r)[4], const void *row) {
    emulation::LdMatrix one{r, row};
    emulation::reads_matrix(row);
    emulation::collective("ldmatrix_transposed", &one, emulation::ldmatrix<true>);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulation::Multiply one{c, a, b};
    emulation::collective("mma_bf16", &one, emulation::multiply<emulation::Precision::bf16>);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulation::Multiply one{c, a, b};
    emulation::collective("mma_f16", &one, emulation::multiply<emulation::Precision::f16>);
}
using emulation::count_arrival;
using emulation::fence_proxy_async;
using emulation::fence_proxy_async_all;
using emulation::Barrier;
using emulation::mbarrier_arrive;
using emulation::mbarrier_init;
using emulation::mbarrier_arrive_expect_tx;
using emulation::mbarrier_wait;
using emulation::cp_async_bulk;
using emulation::bulk_store;
using emulation::bulk_store_commit;
using emulation::bulk_store_wait_read;
inline void append_within(uint32_t &at, uint32_t bits, uint32_t bit, float value, uint32_t first, uint32_t bytes) {
    if (!(bits & bit)) return;
    if (at - first < bytes) *static_cast<float *>(emulation::shared_at(at, 4)) = value;
    at += 4;
}
inline void append_if(uint32_t &at, uint32_t bits, uint32_t bit, float value) { append_within(at, bits, bit, value, at, 4); }
inline void store_element(uint32_t first, uint32_t word) {
    if (word != 0) *static_cast<uint16_t *>(emulation::shared_at(first + (word >> 16), 2)) = static_cast<uint16_t>(word);
}
using emulation::shared_address;
using emulation::wgmma_fence;
template <int n>
inline void fence_accumulators(float (&)[n][4]) {}
inline void wgmma_commit() {
    emulation::aligned("wgmma_commit");
    emulation::collective("wgmma_commit", nullptr, emulation::wgmma_commit);
}
template <int pending>
inline void wgmma_wait() {
    int operand = pending;
    emulation::aligned("wgmma_wait");
    emulation::collective("wgmma_wait", &operand, emulation::wgmma_wait);
}
template <bool transposed, bool transposed_a, bool from_zero = false, int n>
inline void wgmma_bf16(float (&c)[n][4], uint64_t a, uint64_t b) {
    emulation::GroupMultiply one{&c[0][0], a, b, n * 8, transposed, transposed_a, from_zero};
    emulation::aligned("wgmma_bf16");
    emulation::collective("wgmma_bf16", &one, emulation::wgmma<emulation::Precision::bf16>);
}
template <bool transposed, bool transposed_a, bool from_zero = false, int n>
inline void wgmma_f16(float (&c)[n][4], uint64_t a, uint64_t b) {
    emulation::GroupMultiply one{&c[0][0], a, b, n * 8, transposed, transposed_a, from_zero};
    emulation::aligned("wgmma_f16");
    emulation::collective("wgmma_f16", &one, emulation::wgmma<emulation::Precision::f16>);
}
inline bool some_lanes(bool condition) {
    emulation::lanes_apart();
    return condition;
}
inline void compiler_barrier() {}
inline void opaque(uint32_t &) {}
[[noreturn]] inline void trap() { emulation::stop("trap"); }

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
// A NaN that arithmetic makes has no sign on a GPU, and one on x86.
inline void shift_in_sign(uint32_t &bits, float value) { bits = bits << 1 | (value == value ? bits_of(value) >> 31 : 0); }
inline double multiply_rn(double a, double b) { return a * b; }
inline int popc(uint32_t bits) { return __builtin_popcount(bits); }
inline float saturated_difference(float a, float b) { return a - b < 0.0f ? 0.0f : a - b > 1.0f ? 1.0f : a - b; }
inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }
inline uint32_t highest_bit(uint32_t bits) { return 31u - static_cast<uint32_t>(__builtin_clz(bits)); }
inline uint16_t to_bf16_bits(float value) {
    uint32_t bits = bits_of(value);
    if (std::isnan(value)) return 0x7fffu;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline uint16_t to_f16_bits(float value) { return emulation::f16_bits(value); }
inline uint32_t to_f16_pair(float first, float second) {
    return emulation::f16_bits(first) | static_cast<uint32_t>(emulation::f16_bits(second)) << 16;
}
inline float from_f16_bits(uint16_t bits) {
    uint32_t exponent = bits >> 10 & 0x1fu, mantissa = bits & 0x3ffu;
    float value = exponent == 0    ? static_cast<float>(mantissa) * 0x1p-24f
                  : exponent == 31 ? (mantissa ? std::nanf("") : INFINITE)
                                   : float_of((exponent + 112u) << 23 | mantissa << 13);
    return bits & 0x8000u ? -value : value;
}
inline uint64_t bits_of(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float exp2_fast(float value) { return std::exp2(value); }
inline float reciprocal_fast(float value) { return 1.0f / value; }

#endif
