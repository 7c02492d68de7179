// machine.cpp: fibers, their schedule, and the warp-wide instructions.

#include "machine.h"

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "../params.h"
#include "fiber.h"

namespace emulation {
namespace {

constexpr int kWarps = THREADS / 32;

// xorshift64*: small, seeded, good enough to shuffle with.
struct Random {
    uint64_t state;
    explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull) {}
    uint32_t below(uint32_t bound) {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        return static_cast<uint32_t>((state * 0x2545f4914f6cdd1dull >> 32) % bound);
    }
    template <class T>
    void shuffle(T *items, uint32_t count) {
        for (uint32_t i = count; i > 1; --i) std::swap(items[i - 1], items[below(i)]);
    }
};

struct Copy {
    void *to;
    const void *from;
    uint64_t group;
};

// A copy of the copy engine.
struct Bulk {
    void *to;
    const void *from;
    uint32_t bytes;
    uint64_t *barrier;
};

struct SharedBarrier {
    uint32_t count, arrived = 0;
    int64_t bytes = 0;  // announced and not there yet; copies may come before they are announced
    uint32_t phase = 0;
};

enum class State { ready, at_barrier, at_collective, at_shared_barrier, done };

struct Thread {
    Fiber fiber;
    State state = State::ready;
    const char *barrier_file = nullptr;
    int barrier_line = 0;
    uint64_t group = 0;  // cp.async groups committed so far
    std::vector<Copy> copies;
    uint64_t *shared_barrier = nullptr;  // waited for, and the parity of the phase
    uint32_t parity = 0;
};

// A product of a warpgroup, this warp's 16 rows of it, not yet computed.
struct Product {
    float *c[32];
    const unsigned char *a, *b;
    Numbers numbers;
    uint64_t group;
};

struct Warp {
    std::deque<Product> products;
    uint64_t group = 0;  // groups of products committed so far
    void *operands[32];
    int arrived = 0;
    const char *what = nullptr;
};

struct Kernel {
    size_t params_bytes;
    Entry entry;
};

std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

// The machine that this OS thread emulates.
struct Machine {
    Random random{0};
    Thread threads[THREADS];
    std::map<uint64_t *, SharedBarrier> barriers;
    std::vector<Bulk> bulks;
    Warp warps[kWarps];
    uint32_t current = 0;
    Index block{}, grid{};
    unsigned char *shared = nullptr;
    Entry entry = nullptr;
    const void *params = nullptr;
    const char *name = "";
    Fiber scheduler;
};
thread_local Machine *machine = nullptr;

[[noreturn]] void die(const char *message, const std::string &detail) {
    std::fprintf(stderr, "emulation: kernel %s, block (%u, %u, %u), thread %u: %s%s\n", machine->name,
                 machine->block.x, machine->block.y, machine->block.z, machine->current, message, detail.c_str());
    std::abort();
}

void land(const Copy &copy) { std::memcpy(copy.to, copy.from, 16); }

// Each copy under way may land now.
void land_some(Thread &thread) {
    for (size_t i = 0; i < thread.copies.size();) {
        if (machine->random.below(4) == 0) {
            land(thread.copies[i]);
            thread.copies[i] = thread.copies.back();
            thread.copies.pop_back();
        } else {
            ++i;
        }
    }
}

SharedBarrier &barrier_at(uint64_t *barrier) {
    auto found = machine->barriers.find(barrier);
    if (found == machine->barriers.end()) die("a barrier that nobody began", "");
    return found->second;
}

void finish_phase(SharedBarrier &barrier) {
    if (barrier.arrived < barrier.count || barrier.bytes != 0) return;
    barrier.arrived = 0;
    ++barrier.phase;
}

// Lands one bulk copy, any of them.
void land_bulk() {
    size_t index = machine->random.below(static_cast<uint32_t>(machine->bulks.size()));
    Bulk bulk = machine->bulks[index];
    machine->bulks.erase(machine->bulks.begin() + static_cast<ptrdiff_t>(index));
    std::memcpy(bulk.to, bulk.from, bulk.bytes);
    SharedBarrier &barrier = barrier_at(bulk.barrier);
    barrier.bytes -= bulk.bytes;
    finish_phase(barrier);
}

// Wakes whoever's phase is over. With nobody else to run the copy engine must go on.
bool wake_at_shared_barriers() {
    bool waiting = false;
    for (;;) {
        bool woken = false;
        for (Thread &thread : machine->threads) {
            if (thread.state != State::at_shared_barrier) continue;
            waiting = true;
            if (barrier_at(thread.shared_barrier).phase % 2 == thread.parity) continue;
            thread.state = State::ready;
            woken = true;
        }
        if (woken || !waiting) return woken;
        if (machine->bulks.empty()) die("waits for a phase that nobody ends", "");
        land_bulk();
    }
}

void yield() {
    if (!machine->bulks.empty() && machine->random.below(16) == 0) land_bulk();
    Thread &self = machine->threads[machine->current];
    if (!self.copies.empty()) land_some(self);
    switch_fiber(self.fiber, machine->scheduler, false);
}

void fiber_main() {
    machine->entry(machine->params);
    Thread &self = machine->threads[machine->current];
    if (!self.copies.empty()) die("left with asynchronous copies nobody waited for", "");
    if (!machine->warps[machine->current / 32].products.empty()) die("left with products nobody waited for", "");
    self.state = State::done;
    switch_fiber(self.fiber, machine->scheduler, true);
    std::abort();
}

// Runs one warp until each lane waits at a block barrier or is done.
void run_warp(int warp) {
    uint32_t order[32];
    for (uint32_t lane = 0; lane < 32; ++lane) order[lane] = lane;
    machine->random.shuffle(order, 32);
    for (bool progress = true; progress;) {
        progress = false;
        for (uint32_t lane : order) {
            Thread &thread = machine->threads[warp * 32 + lane];
            if (thread.state != State::ready) continue;
            progress = true;
            machine->current = warp * 32 + lane;
            switch_fiber(machine->scheduler, thread.fiber, false);
        }
    }
    // Lanes at a shared barrier may still come to where the others are.
    for (int lane = 0; lane < 32; ++lane) {
        if (machine->threads[warp * 32 + lane].state == State::at_shared_barrier) return;
    }
    for (int lane = 0; lane < 32; ++lane) {
        Thread &thread = machine->threads[warp * 32 + lane];
        if (thread.state == State::at_collective) {
            machine->current = static_cast<uint32_t>(warp * 32 + lane);
            die("waits for lanes that never come in ", machine->warps[warp].what);
        }
    }
}

// All threads wait at one barrier, or all are done: anything else is divergence.
bool release_barrier() {
    Thread &first = machine->threads[0];
    for (uint32_t i = 0; i < THREADS; ++i) {
        Thread &thread = machine->threads[i];
        bool same = thread.state == first.state &&
                    (thread.state == State::done || (thread.barrier_line == first.barrier_line &&
                                                     !std::strcmp(thread.barrier_file, first.barrier_file)));
        if (same) continue;
        machine->current = i;
        auto place = [](const Thread &one) {
            return one.state == State::done ? std::string("the end")
                                            : std::string(one.barrier_file) + ":" + std::to_string(one.barrier_line);
        };
        die("divergent barrier: ", "at " + place(thread) + " while thread 0 is at " + place(first));
    }
    if (first.state == State::done) return false;
    for (Thread &thread : machine->threads) thread.state = State::ready;
    return true;
}

void run_block(uint32_t shared_bytes) {
    // Of the exact size, so that AddressSanitizer sees an overrun.
    void *bytes = nullptr;
    if (posix_memalign(&bytes, 1024, shared_bytes ? shared_bytes : 1)) die("no memory for ", "shared memory");
    std::unique_ptr<unsigned char, decltype(&std::free)> shared(static_cast<unsigned char *>(bytes), std::free);
    std::memset(shared.get(), 0xff, shared_bytes);
    machine->shared = shared.get();
    machine->barriers.clear();
    for (Warp &warp : machine->warps) {
        warp.products.clear();
        warp.group = 0;
    }
    for (Thread &thread : machine->threads) {
        thread.state = State::ready;
        thread.group = 0;
        start_fiber(thread.fiber, fiber_main);
    }
    do {
        int order[kWarps];
        for (int warp = 0; warp < kWarps; ++warp) order[warp] = warp;
        machine->random.shuffle(order, kWarps);
        for (int warp : order) run_warp(warp);
    } while (wake_at_shared_barriers() || release_barrier());
    if (!machine->bulks.empty()) die("left with bulk copies nobody waited for", "");
}

// Bits of a 16-bit element: 0 low half, 1 high half.
float element(Numbers numbers, uint32_t pair, int half) {
    uint16_t bits = static_cast<uint16_t>(half ? pair >> 16 : pair);
    return numbers == Numbers::f16 ? f16_value(bits) : float_of(static_cast<uint32_t>(bits) << 16);
}

float truncate(double value) {
    float nearest = static_cast<float>(value);
    return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? std::nextafterf(nearest, 0.0f) : nearest;
}

// Granule `granule` of row `row` as the tensor core finds it: the swizzle is of address bits.
const unsigned char *granule_of(const unsigned char *first, int row, int granule) {
    auto address = reinterpret_cast<uintptr_t>(first) + static_cast<uintptr_t>(row / 8 * 1024 + row % 8 * 128 + granule * 16);
    address ^= (address >> 7 & 7) << 4;
    return reinterpret_cast<const unsigned char *>(address);
}

void run_product(const Product &product, int warp) {
    auto value = [&](const unsigned char *first, int row, int k) {
        uint16_t bits;
        std::memcpy(&bits, granule_of(first, row, k / 8) + k % 8 * 2, 2);
        return static_cast<double>(element(product.numbers, bits, 0));
    };
    double a[16][16], b[16][128];
    for (int k = 0; k < 16; ++k) {
        for (int row = 0; row < 16; ++row) a[row][k] = value(product.a, warp % 4 * 16 + row, k);
        for (int column = 0; column < 128; ++column) b[k][column] = value(product.b, column, k);
    }
    for (int row = 0; row < 16; ++row) {
        double sums[128] = {};
        for (int k = 0; k < 16; ++k) {
            for (int column = 0; column < 128; ++column) sums[column] += a[row][k] * b[k][column];
        }
        for (int column = 0; column < 128; ++column) {
            float &c = product.c[row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row / 8 * 2 + column % 2];
            c = truncate(static_cast<double>(c) + sums[column]);
        }
    }
}

// Runs the oldest products: those of all but the last `pending` groups, and by chance a few more.
void run_products(uint64_t pending) {
    int index = static_cast<int>(machine->current / 32);
    Warp &warp = machine->warps[index];
    while (!warp.products.empty()) {
        bool due = warp.products.front().group + pending < warp.group;
        if (!due && machine->random.below(4) != 0) break;
        run_product(warp.products.front(), index);
        warp.products.pop_front();
    }
}

}  // namespace

void barrier_begin(Barrier *barrier, uint32_t count) { machine->barriers[barrier] = SharedBarrier{count}; }

void barrier_expect(Barrier *barrier, uint32_t bytes) {
    SharedBarrier &one = barrier_at(barrier);
    if (++one.arrived > one.count) die("more arrivals at a barrier than it counts", "");
    one.bytes += bytes;
    finish_phase(one);
}

void barrier_wait(Barrier *barrier, uint32_t parity) {
    Thread &self = machine->threads[machine->current];
    while (barrier_at(barrier).phase % 2 == parity) {
        self.state = State::at_shared_barrier;
        self.shared_barrier = barrier;
        self.parity = parity;
        yield();
    }
}

void copy_bulk(void *to, const void *from, uint32_t bytes, Barrier *barrier) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16) die("copy_bulk is not aligned", "");
    std::memset(to, 0xff, bytes);
    machine->bulks.push_back(Bulk{to, from, bytes, barrier});
}

void stop(const char *message) { die(message, ""); }

template <Numbers numbers>
void group_multiply(void **lanes) {
    const auto &first = *static_cast<GroupMultiply *>(lanes[0]);
    Warp &warp = machine->warps[machine->current / 32];
    Product product{{}, first.a.first, first.b.first, numbers, warp.group};
    for (int lane = 0; lane < 32; ++lane) {
        const auto &one = *static_cast<GroupMultiply *>(lanes[lane]);
        if (one.a.first != first.a.first || one.b.first != first.b.first) die("descriptors differ within a warp", "");
        product.c[lane] = one.c;
    }
    warp.products.push_back(product);
}
template void group_multiply<Numbers::f16>(void **);
template void group_multiply<Numbers::bf16>(void **);

void group_commit(void **) {
    ++machine->warps[machine->current / 32].group;
    run_products(machine->warps[machine->current / 32].group);
}

void group_wait(void **lanes) { run_products(static_cast<uint64_t>(*static_cast<int *>(lanes[0]))); }

Registration::Registration(const char *name, size_t params_bytes, Entry entry) {
    kernels()[name] = Kernel{params_bytes, entry};
}

uint32_t thread() { return machine->current; }
Index block() { return machine->block; }
Index grid() { return machine->grid; }
unsigned char *shared_memory() { return machine->shared; }

void block_barrier(const char *file, int line) {
    Thread &self = machine->threads[machine->current];
    self.state = State::at_barrier;
    self.barrier_file = file;
    self.barrier_line = line;
    yield();
}

void collective(const char *what, void *operands, Operation operation) {
    uint32_t index = machine->current;
    Warp &warp = machine->warps[index / 32];
    if (warp.arrived == 0) {
        warp.what = what;
    } else if (std::strcmp(warp.what, what) != 0) {
        die("divergent warp: ", std::string("in ") + what + " while other lanes are in " + warp.what);
    }
    warp.operands[index % 32] = operands;
    if (++warp.arrived < 32) {
        machine->threads[index].state = State::at_collective;
        yield();
        return;
    }
    operation(warp.operands);
    warp.arrived = 0;
    for (int lane = 0; lane < 32; ++lane) machine->threads[index / 32 * 32 + lane].state = State::ready;
}

void copy_async(void *to, const void *from) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) die("copy_async is not aligned", "");
    Thread &self = machine->threads[machine->current];
    // Whoever still reads the old bytes, or already the new ones, gets NaN.
    std::memset(to, 0xff, 16);
    self.copies.push_back(Copy{to, from, self.group});
}

void copy_commit() { ++machine->threads[machine->current].group; }

void copy_wait(int pending) {
    Thread &self = machine->threads[machine->current];
    std::vector<Copy> later;
    for (const Copy &copy : self.copies) {
        if (copy.group + static_cast<uint64_t>(pending) < self.group) {
            land(copy);
        } else {
            later.push_back(copy);
        }
    }
    self.copies = std::move(later);
}

template <Numbers numbers>
void multiply(void **lanes) {
    constexpr int k = numbers == Numbers::tf32 ? 8 : 16;
    double a[16][k], b[k][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto &one = *static_cast<Multiply *>(lanes[lane]);
        int group = lane / 4, in_group = lane % 4;
        for (int r = 0; r < 4; ++r) {
            int row = group + (r % 2) * 8;
            if constexpr (numbers == Numbers::tf32) {
                a[row][in_group + r / 2 * 4] = static_cast<double>(float_of(one.a[r] & 0xffffe000u));
            } else {
                for (int half = 0; half < 2; ++half) {
                    a[row][r / 2 * 8 + in_group * 2 + half] = static_cast<double>(element(numbers, one.a[r], half));
                }
            }
        }
        for (int r = 0; r < 2; ++r) {
            if constexpr (numbers == Numbers::tf32) {
                b[in_group + r * 4][group] = static_cast<double>(float_of(one.b[r] & 0xffffe000u));
            } else {
                for (int half = 0; half < 2; ++half) {
                    b[r * 8 + in_group * 2 + half][group] = static_cast<double>(element(numbers, one.b[r], half));
                }
            }
        }
    }
    double sums[16][8] = {};
    for (int row = 0; row < 16; ++row) {
        for (int i = 0; i < k; ++i) {
            for (int column = 0; column < 8; ++column) sums[row][column] += a[row][i] * b[i][column];
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        float *c = static_cast<Multiply *>(lanes[lane])->c;
        for (int i = 0; i < 4; ++i) {
            c[i] = truncate(static_cast<double>(c[i]) + sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
        }
    }
}
template void multiply<Numbers::f16>(void **);
template void multiply<Numbers::bf16>(void **);
template void multiply<Numbers::tf32>(void **);

template <bool transposed>
void load_matrices(void **lanes) {
    uint16_t matrices[4][8][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto &one = *static_cast<LoadMatrices *>(lanes[lane]);
        if (reinterpret_cast<uintptr_t>(one.row) % 16) die("load_matrices is not aligned", "");
        std::memcpy(matrices[lane / 8][lane % 8], one.row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
        uint32_t *r = static_cast<LoadMatrices *>(lanes[lane])->r;
        for (int m = 0; m < 4; ++m) {
            int row = lane / 4, column = lane % 4 * 2;
            uint32_t low = transposed ? matrices[m][column][row] : matrices[m][row][column];
            uint32_t high = transposed ? matrices[m][column + 1][row] : matrices[m][row][column + 1];
            r[m] = low | high << 16;
        }
    }
}
template void load_matrices<false>(void **);
template void load_matrices<true>(void **);

uint16_t f16_bits(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffu;
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    // Below 2^-14 numbers are multiples of 2^-24.
    if (magnitude < 0x38800000u) {
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::lrintf(std::ldexp(float_of(magnitude), 24))));
    }
    magnitude += 0xfffu + (magnitude >> 13 & 1u);
    return static_cast<uint16_t>(sign | (magnitude - 0x38000000u) >> 13);
}

float f16_value(uint16_t bits) {
    uint32_t exponent = bits >> 10 & 0x1fu, mantissa = bits & 0x3ffu;
    float value = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                  : exponent == 31 ? (mantissa ? std::nanf("") : INFINITE)
                                   : float_of((exponent + 112u) << 23 | mantissa << 13);
    return bits & 0x8000u ? -value : value;
}

int launch(const char *name, const uint32_t grid[3], uint32_t shared_bytes, const void *params, size_t params_bytes,
           uint64_t seed) {
    auto found = kernels().find(name);
    if (found == kernels().end() || found->second.params_bytes != params_bytes) return -1;
    if (machine == nullptr) machine = new Machine;  // kept for the OS thread's life: its stacks are large
    machine->random = Random(seed);
    machine->name = name;
    machine->entry = found->second.entry;
    machine->params = params;
    machine->grid = Index{grid[0], grid[1], grid[2]};
    uint64_t blocks = static_cast<uint64_t>(grid[0]) * grid[1] * grid[2];
    std::vector<uint64_t> order(blocks);
    for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
    machine->random.shuffle(order.data(), static_cast<uint32_t>(blocks));
    for (uint64_t index : order) {
        machine->block = Index{static_cast<uint32_t>(index % grid[0]), static_cast<uint32_t>(index / grid[0] % grid[1]),
                               static_cast<uint32_t>(index / grid[0] / grid[1])};
        run_block(shared_bytes);
    }
    return 0;
}

}  // namespace emulation

extern "C" int ddtas_emulated_launch(const char *name, const uint32_t *grid, uint32_t shared_bytes, const void *params,
                                     size_t params_bytes, uint64_t seed) {
    return emulation::launch(name, grid, shared_bytes, params, params_bytes, seed);
}

extern "C" void ddtas_emulated_forbid([[maybe_unused]] const void *first, [[maybe_unused]] size_t bytes,
                                      [[maybe_unused]] bool forbidden) {
#if defined(__SANITIZE_ADDRESS__)
    if (forbidden) {
        ASAN_POISON_MEMORY_REGION(first, bytes);
    } else {
        ASAN_UNPOISON_MEMORY_REGION(first, bytes);
    }
#endif
}
