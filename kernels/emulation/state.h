// state.h: the emulated machine's state, shared by the files of this folder.
#ifndef DDTAS_EMULATION_STATE_H
#define DDTAS_EMULATION_STATE_H

#include <deque>
#include <map>
#include <string>
#include <vector>

#include "../params.h"
#include "fiber.h"
#include "machine.h"
#include "races.h"

namespace emulation {

constexpr uint32_t kMostThreads = 1024, kMostWarps = kMostThreads / 32;
// Where a block's shared memory begins in its own address space; the first KiB is the system's on Hopper.
constexpr uint32_t kSharedBase = 1024;

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
    bool landed;  // copied, but not waited for yet
};

// A bulk copy to shared memory.
struct Bulk {
    void *to;
    const void *from;
    uint32_t bytes;
    uint64_t *barrier;
    bool late;  // lands only when a thread waits for it and no other thread can run
};

// A bulk copy to global memory, in a group of the thread that issued it.
struct BulkStore {
    void *to;
    const void *from;
    uint32_t bytes;
    uint32_t thread;
    uint64_t group;
    bool late;  // read only when it is waited for
};

// Bytes that a bulk store has read but not written to global memory yet.
struct StoredBytes {
    void *to;
    std::vector<unsigned char> bytes;
};

// Memory as the async proxy (bulk copies and products) sees it: a thread's writes become visible at a fence. One random thread of
// each block is watched: its writes become visible only by its own fence, those of the others by any thread's.
struct AsyncView {
    unsigned char *memory = nullptr;
    std::vector<unsigned char> seen;
    std::vector<unsigned char> before;  // while the watched thread runs: the memory as it found it
    std::vector<size_t> unfenced;       // bytes it has written since its last fence

    void begin(unsigned char *first, size_t bytes) {
        memory = first;
        seen.assign(first, first + bytes);
        unfenced.clear();
    }
    size_t offset_of(const void *at) const { return static_cast<size_t>(static_cast<const unsigned char *>(at) - memory); }
    bool holds(const void *at, size_t bytes) const {
        size_t offset = offset_of(at);
        return offset <= seen.size() && bytes <= seen.size() - offset;
    }
    // Whether some of the bytes are not visible yet.
    bool differs(const void *at, size_t bytes) const { return std::memcmp(seen.data() + offset_of(at), at, bytes) != 0; }
    // Called before and after the watched thread runs.
    void start_watching() { before.assign(memory, memory + seen.size()); }
    void stop_watching();
    // A fence by the watched thread (`own`) or by another one.
    void publish(bool own);
    // Bytes that a bulk copy writes, to memory and to the proxy's view.
    void write(void *to, const void *from, size_t bytes);
    void poison(void *to, size_t bytes);

  private:
    void written_by_engine(void *to, size_t bytes);
};

struct SharedBarrier {
    uint32_t count, arrived = 0;
    int64_t bytes = 0;  // announced but not arrived; negative if copies arrive before they are announced
    uint32_t phase = 0;
    char tokens[2] = {};  // ThreadSanitizer's order of the arrivals of even and odd phases
};
// The content of a barrier's memory, which nothing else may write.
constexpr uint64_t kBarrierMark = 0x6261727269657221;

// A named barrier, for some warps of a block.
struct NamedBarrier {
    uint32_t threads = 0, arrived = 0;
    Meeting meeting;
};
constexpr uint32_t kNamedBarriers = 16;

enum class State { ready, at_barrier, at_named_barrier, at_collective, at_shared_barrier, done };

struct Thread {
    Fiber fiber, other_crew_s;
    State state = State::ready;
    const char *barrier_file = nullptr;
    int barrier_line = 0;
    uint64_t group = 0;  // cp.async groups committed so far
    std::vector<Copy> copies;
    uint64_t store_group = 0;  // groups of bulk stores committed so far
    uint64_t *shared_barrier = nullptr;  // the mbarrier it waits for, and the parity of the phase
    uint32_t parity = 0;
    uint32_t named_barrier = 0;  // the named barrier it waits for
    bool apart = false;          // may have diverged from its warp since the last warp_sync()
    bool delayed = false;        // looks at the phase only when no other thread can run, even if it is over earlier
};

// A warpgroup's product that is not computed yet: this warp's 16 rows.
struct Product {
    float *c[32];
    GroupMultiply operands;
    Precision numbers;
    uint64_t group;
};

struct Warp {
    std::deque<Product> products;
    uint64_t group = 0;  // groups of products committed so far
    bool fenced = false;  // wgmma_fence() was called since the last commit
    void *operands[32];
    int arrived = 0;
    const char *what = nullptr;
    Meeting meeting;
    uint32_t registers = 0;  // of each thread, after setmaxnreg
    bool late = false;       // notices the end of a phase only when no other warp can run
};

// The machine that this OS thread emulates.
struct Machine {
    Random random{0};
    Thread all_threads[kMostThreads];
    uint32_t thread_count = 0, warp_count = 0;  // of a block of this launch
    std::map<uint64_t *, SharedBarrier> barriers;
    NamedBarrier named[kNamedBarriers];
    std::vector<Bulk> bulks;
    std::vector<BulkStore> stores;
    std::vector<StoredBytes> stored;
    Warp warps[kMostWarps];
    Meeting meeting;                    // block_sync()
    char begun = 0, launched[2] = {};   // tokens of the block, and of this launch and the previous one
    unsigned launches = 0;
    uint64_t products = 0;              // of two elements, by tensor cores in this launch
    uint32_t current = 0;
    unsigned crew = 0;                  // which of two sets of fibers runs this block (races.h)
    Index block{}, grid{};
    unsigned char *shared = nullptr;
    AsyncView async_view;               // shared memory
    std::vector<AsyncView> global_views;  // memory that watch_global() names
    uint32_t watched = kMostThreads;    // the watched thread, if there is one
    Entry entry = nullptr;
    const void *params = nullptr;
    const char *name = "";
    bool preempted = false;             // the running warp, by preempt()
    bool fences = false;                // a thread of this launch has issued a proxy fence
    Fiber scheduler;
    ~Machine() {
        for (Thread &thread : all_threads) {
            end_fiber(thread.fiber);
            end_fiber(thread.other_crew_s);
        }
    }
    void change_crew() {
        crew = 1 - crew;
        for (Thread &thread : all_threads) std::swap(thread.fiber, thread.other_crew_s);
    }
    Thread &self() { return all_threads[current]; }
    Warp &warp() { return warps[current / 32]; }
    // The threads of a block.
    struct Threads {
        Thread *first;
        uint32_t count;
        Thread *begin() const { return first; }
        Thread *end() const { return first + count; }
        Thread &operator[](size_t index) const { return first[index]; }
    };
    Threads threads() { return Threads{all_threads, thread_count}; }
};
// __thread: without a constructor, and so without the call before each use that an extern thread_local has.
extern __thread Machine *machine;

// The value of a 16-bit element of an operand.
template <Precision numbers>
double number(uint16_t bits) {
    return static_cast<double>(numbers == Precision::f16 ? from_f16_bits(bits) : float_of(static_cast<uint32_t>(bits) << 16));
}

// Rounds towards 0, as a tensor core does when it adds.
inline float truncate(double value) {
    float nearest = static_cast<float>(value);
    // The next float towards 0 has the next smaller bits, of either sign.
    uint32_t beyond = std::fabs(static_cast<double>(nearest)) > std::fabs(value);
    return float_of(bits_of(nearest) - beyond);
}

// machine.cpp
[[noreturn]] void die(const char *message, const std::string &detail);
// Lets other threads run; copies in flight may land meanwhile.
void yield();
// At an arrival: now and then lets the other warps run before the rest of this one, so that one that comes too early shows.
void preempt();

// instructions.cpp
void land_some(Thread &thread);

// hopper.cpp
void land_bulk(bool late_too);
// One step of a random bulk store: reads its source, unless it is late, or writes to global memory what was read.
void land_store();
// Writes all that bulk stores have read.
void land_stored();
// Wakes threads whose phase is over, except late ones; true if there was one.
bool wake_at_shared_barriers();
// If no thread can run: lands copies until a thread's phase is over, and only then wakes late threads.
bool wake_last();

// roles.cpp
void begin_roles();
void end_roles();

}  // namespace emulation

#endif
