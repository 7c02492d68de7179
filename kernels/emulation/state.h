// state.h: what the files of this folder know of the machine between them.
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
    bool landed;  // and not waited for yet
};

// A copy of the copy engine.
struct Bulk {
    void *to;
    const void *from;
    uint32_t bytes;
    uint64_t *barrier;
    bool late;  // not before somebody waits and nobody else can run
};

// A copy the other way, in a group of the thread that issued it.
struct BulkStore {
    void *to;
    const void *from;
    uint32_t bytes;
    uint32_t thread;
    uint64_t group;
    bool late;  // not read before it is waited for
};

// What has been read of one, and is not in global memory yet.
struct StoredBytes {
    void *to;
    std::vector<unsigned char> bytes;
};

// Memory as bulk copies and products see it: what threads write is there from a fence of theirs on. The writes of one thread of
// each block, drawn by chance, are told from the others': a fence of somebody else's does not bring them there.
struct AsyncView {
    unsigned char *memory = nullptr;
    std::vector<unsigned char> seen;
    std::vector<unsigned char> before;  // while that thread runs: the memory as it found it
    std::vector<size_t> unfenced;       // the bytes it has written since its last fence

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
    // Whether there are bytes that are not there yet.
    bool differs(const void *at, size_t bytes) const { return std::memcmp(seen.data() + offset_of(at), at, bytes) != 0; }
    // Around what that thread does until others run.
    void start_watching() { before.assign(memory, memory + seen.size()); }
    void stop_watching();
    // By that thread, or by another one.
    void publish(bool own);
    // Bytes that the copy engine writes, in both views of them.
    void write(void *to, const void *from, size_t bytes);
    void poison(void *to, size_t bytes);

  private:
    void written_by_engine(void *to, size_t bytes);
};

struct SharedBarrier {
    uint32_t count, arrived = 0;
    int64_t bytes = 0;  // announced and not there yet; copies may come before they are announced
    uint32_t phase = 0;
    char tokens[2] = {};  // what arrivals of a phase order, the even ones and the odd
};
// What stands where a barrier is: nobody else may write there.
constexpr uint64_t kBarrierMark = 0x6261727269657221;

// A barrier of some warps of a block, by number.
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
    uint64_t *shared_barrier = nullptr;  // waited for, and the parity of the phase
    uint32_t parity = 0;
    uint32_t named_barrier = 0;  // waited for
    bool apart = false;          // has done what a lane does alone, and not met the others of its warp since
    bool delayed = false;        // looks at the phase when nobody else can go on, whether it is over by then or not
};

// A product of a warpgroup, this warp's 16 rows of it, not yet computed.
struct Product {
    float *c[32];
    GroupMultiply operands;
    Precision numbers;
    uint64_t group;
};

struct Warp {
    std::deque<Product> products;
    uint64_t group = 0;  // groups of products committed so far
    bool fenced = false;  // a wgmma_fence() since the last of them
    void *operands[32];
    int arrived = 0;
    const char *what = nullptr;
    Meeting meeting;
    uint32_t registers = 0;  // of each thread, as setmaxnreg has left them
    bool late = false;       // notices the end of a phase when nobody else can go on
};

// The machine that this OS thread emulates.
struct Machine {
    Random random{0};
    Thread all_threads[kMostThreads];
    uint32_t thread_count = 0, warp_count = 0;  // of this launch
    std::map<uint64_t *, SharedBarrier> barriers;
    NamedBarrier named[kNamedBarriers];
    std::vector<Bulk> bulks;
    std::vector<BulkStore> stores;
    std::vector<StoredBytes> stored;
    Warp warps[kMostWarps];
    Meeting meeting;                    // of all threads of a block
    char begun = 0, launched[2] = {};   // tokens: of a block, of this launch and the one before
    unsigned launches = 0;
    uint32_t current = 0;
    unsigned crew = 0;                  // of the threads of this block
    Index block{}, grid{};
    unsigned char *shared = nullptr;
    AsyncView async_view;               // of shared memory
    std::vector<AsyncView> global_views;  // of what watch_global() names
    uint32_t watched = kMostThreads;    // the thread whose writes are told from the others', if there is one
    Entry entry = nullptr;
    const void *params = nullptr;
    const char *name = "";
    bool fences = false;                // a thread of this launch has put a proxy fence
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
    // Those of a block.
    struct Threads {
        Thread *first;
        uint32_t count;
        Thread *begin() const { return first; }
        Thread *end() const { return first + count; }
        Thread &operator[](size_t index) const { return first[index]; }
    };
    Threads threads() { return Threads{all_threads, thread_count}; }
};
// __thread: a pointer that needs no constructor, and so no call before each use, as an extern thread_local has.
extern __thread Machine *machine;

// What an operand's element of 16 bits stands for.
template <Precision numbers>
double number(uint16_t bits) {
    return static_cast<double>(numbers == Precision::f16 ? from_f16_bits(bits) : float_of(static_cast<uint32_t>(bits) << 16));
}

// As a tensor core adds: towards 0.
inline float truncate(double value) {
    float nearest = static_cast<float>(value);
    // The next float towards 0 has the next smaller bits, of either sign.
    uint32_t beyond = std::fabs(static_cast<double>(nearest)) > std::fabs(value);
    return float_of(bits_of(nearest) - beyond);
}

// machine.cpp
[[noreturn]] void die(const char *message, const std::string &detail);
// Lets the others run; copies under way may land meanwhile.
void yield();

// instructions.cpp
void land_some(Thread &thread);

// hopper.cpp
void land_bulk(bool late_too);
// Reads what one bulk store stores, any of them that need not be late, or brings to global memory what was read.
void land_store();
// The same of all that was read.
void land_stored();
// Wakes whoever's phase is over, but nobody that is late; true if there was somebody.
bool wake_at_shared_barriers();
// When nobody can go on: lands copies until somebody's phase is over, and only then looks at those that are late.
bool wake_last();

// roles.cpp
void begin_roles();
void end_roles();

}  // namespace emulation

#endif
