// machine.cpp: fibers, their schedule, barriers of a block, and launches.

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <set>

#include "state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulation {

__thread Machine *machine = nullptr;

void die(const char *message, const std::string &detail) {
    std::fprintf(stderr, "emulation: kernel %s, block (%u, %u, %u), thread %u: %s%s\n", machine->name,
                 machine->block.x, machine->block.y, machine->block.z, machine->current, message, detail.c_str());
    std::abort();
}

void yield() {
    if (!machine->bulks.empty() && machine->random.below(16) == 0) land_bulk(false);
    if (!(machine->stores.empty() && machine->stored.empty()) && machine->random.below(16) == 0) land_store();
    Thread &self = machine->self();
    if (!self.copies.empty()) land_some(self);
    switch_fiber(self.fiber, machine->scheduler, false);
}

void preempt() {
    if (machine->random.below(4) != 0) return;
    machine->preempted = true;
    yield();
}

namespace {

struct Kernel {
    uint32_t threads;
    size_t params_bytes;
    Entry entry;
};

// Global memory that this OS thread's launches watch.
std::vector<std::pair<unsigned char *, size_t>> &watched_memory() {
    static thread_local std::vector<std::pair<unsigned char *, size_t>> all;
    return all;
}

std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

void fiber_main() {
    acquire(&machine->begun);
    machine->entry(machine->params);
    release(&machine->launched[machine->launches % 2]);
    Thread &self = machine->self();
    if (!self.copies.empty()) die("left with asynchronous copies nobody waited for", "");
    if (!machine->warp().products.empty()) die("left with products nobody waited for", "");
    self.state = State::done;
    switch_fiber(self.fiber, machine->scheduler, true);
    std::abort();
}

void run_thread(uint32_t index) {
    machine->current = index;
    Thread &thread = machine->all_threads[index];
    if (index != machine->watched) return switch_fiber(machine->scheduler, thread.fiber, false);
    machine->async_view.start_watching();
    for (AsyncView &view : machine->global_views) view.start_watching();
    switch_fiber(machine->scheduler, thread.fiber, false);
    machine->async_view.stop_watching();
    for (AsyncView &view : machine->global_views) view.stop_watching();
}

// Runs one warp until each lane waits at a barrier or is done, or until one is preempted.
void run_warp(uint32_t warp) {
    uint32_t order[32];
    for (uint32_t lane = 0; lane < 32; ++lane) order[lane] = lane;
    machine->random.shuffle(order, 32);
    for (bool progress = true; progress;) {
        progress = false;
        for (uint32_t lane : order) {
            Thread &thread = machine->all_threads[warp * 32 + lane];
            if (thread.state != State::ready) continue;
            progress = true;
            run_thread(warp * 32 + lane);
            if (!machine->preempted) continue;
            machine->preempted = false;
            return;
        }
    }
    // Lanes that wait at an mbarrier may still join the others.
    for (uint32_t lane = 0; lane < 32; ++lane) {
        if (machine->all_threads[warp * 32 + lane].state == State::at_shared_barrier) return;
    }
    for (uint32_t lane = 0; lane < 32; ++lane) {
        Thread &thread = machine->all_threads[warp * 32 + lane];
        if (thread.state == State::at_collective) {
            machine->current = warp * 32 + lane;
            die("waits for lanes that never come in ", machine->warps[warp].what);
        }
    }
}

// Usually the same literal, and so the same pointer.
bool same_text(const char *a, const char *b) { return a == b || std::strcmp(a, b) == 0; }

// All threads wait at one barrier, or all are done: anything else is divergence.
bool release_barrier() {
    Thread &first = machine->all_threads[0];
    for (uint32_t i = 0; i < machine->thread_count; ++i) {
        Thread &thread = machine->all_threads[i];
        if (thread.state == State::at_named_barrier) {
            machine->current = i;
            die("waits at a named barrier for threads that never come: ", std::to_string(thread.named_barrier));
        }
        bool same = thread.state == first.state &&
                    (thread.state == State::done || (thread.barrier_line == first.barrier_line &&
                                                     same_text(thread.barrier_file, first.barrier_file)));
        if (same) continue;
        machine->current = i;
        auto place = [](const Thread &one) {
            return one.state == State::done ? std::string("the end")
                                            : std::string(one.barrier_file) + ":" + std::to_string(one.barrier_line);
        };
        die("divergent barrier: ", "at " + place(thread) + " while thread 0 is at " + place(first));
    }
    if (first.state == State::done) return false;
    ++machine->meeting.turn;
    for (Thread &thread : machine->threads()) thread.state = State::ready;
    return true;
}

bool anybody_ready() {
    for (const Thread &thread : machine->threads()) {
        if (thread.state == State::ready) return true;
    }
    return false;
}

void run_block(uint32_t shared_bytes) {
    Unwatched whole_call;
    // Exactly the size, so that AddressSanitizer finds an overrun.
    void *bytes = nullptr;
    if (posix_memalign(&bytes, 1024, shared_bytes ? shared_bytes : 1)) die("no memory for ", "shared memory");
    std::unique_ptr<unsigned char, decltype(&std::free)> shared(static_cast<unsigned char *>(bytes), std::free);
    std::memset(shared.get(), 0xff, shared_bytes);
    machine->shared = shared.get();
    machine->async_view.begin(shared.get(), shared_bytes);
    machine->watched = machine->fences ? machine->random.below(machine->thread_count) : kMostThreads;
    machine->barriers.clear();
    for (Warp &warp : machine->warps) {
        warp.products.clear();
        warp.group = 0;
        warp.fenced = false;
    }
    begin_roles();
    // Shuffled, since to ThreadSanitizer thread i of consecutive blocks would be one thread and so in order.
    for (uint32_t i = machine->thread_count; i > 1; --i) {
        std::swap(machine->all_threads[i - 1].fiber, machine->all_threads[machine->random.below(i)].fiber);
    }
#ifdef DDTAS_EMULATION_RACES
    if (machine->random.below(2) == 0) machine->change_crew();
#endif
    for (Thread &thread : machine->threads()) {
        thread.state = State::ready;
        thread.group = thread.store_group = 0;
        start_fiber(thread.fiber, fiber_main);
    }
    release(&machine->begun);
    do {
        uint32_t order[kMostWarps];
        for (uint32_t warp = 0; warp < machine->warp_count; ++warp) order[warp] = warp;
        machine->random.shuffle(order, machine->warp_count);
        for (uint32_t i = 0; i < machine->warp_count; ++i) {
            run_warp(order[i]);
            // The end of a phase is noticed at once, or when no warp can run.
            if (machine->random.below(2) == 0) wake_at_shared_barriers();
        }
    } while (anybody_ready() || wake_last() || release_barrier());
    end_roles();
    if (!machine->bulks.empty()) die("left with bulk copies nobody waited for", "");
    if (!machine->stores.empty()) die("left with bulk stores nobody waited for", "");
    land_stored();
}

}  // namespace

void stop(const char *message) { die(message, ""); }

void watch_global(void *first, size_t bytes) { watched_memory().emplace_back(static_cast<unsigned char *>(first), bytes); }

Registration::Registration(const char *name, uint32_t threads, size_t params_bytes, Entry entry) {
    kernels()[name] = Kernel{threads, params_bytes, entry};
}

uint32_t thread() { return machine->current; }
Index block() { return machine->block; }
Index grid() { return machine->grid; }
unsigned char *shared_memory() { return machine->shared; }
uint64_t products() { return machine->products; }

void block_barrier(const char *file, int line) {
    aligned("block_sync");
    Thread &self = machine->self();
    self.state = State::at_barrier;
    self.barrier_file = file;
    self.barrier_line = line;
    void *token = machine->meeting.token(machine->crew);
    release(token);
    yield();
    acquire(token);
    lanes_together();
}

uint32_t count_arrival(uint32_t *arrived) {
    acquire(arrived);
    uint32_t before = (*arrived)++;
    release(arrived);
    return before;
}

void collective(const char *what, void *operands, Operation operation) {
    uint32_t index = machine->current;
    Warp &warp = machine->warps[index / 32];
    if (warp.arrived == 0) {
        warp.what = what;
    } else if (!same_text(warp.what, what)) {
        die("divergent warp: ", std::string("in ") + what + " while other lanes are in " + warp.what);
    }
    warp.operands[index % 32] = operands;
    void *token = warp.meeting.token(machine->crew);
    release(token);
    if (++warp.arrived < 32) {
        machine->all_threads[index].state = State::at_collective;
        yield();
        acquire(token);
        return;
    }
    acquire(token);
    operation(warp.operands);
    release(token);  // for what the operation wrote
    warp.arrived = 0;
    ++warp.meeting.turn;
    for (int lane = 0; lane < 32; ++lane) machine->all_threads[index / 32 * 32 + lane].state = State::ready;
}

int launch(const char *name, const uint32_t grid[3], uint32_t threads, uint32_t shared_bytes, const void *params,
           size_t params_bytes, uint64_t seed) {
    auto found = kernels().find(name);
    if (found == kernels().end() || found->second.params_bytes != params_bytes) return -1;
    if (found->second.threads != threads || threads > kMostThreads || threads % 32) return -1;
    // Kept for the lifetime of the OS thread, since its stacks are large.
    static thread_local std::unique_ptr<Machine> own;
    if (own == nullptr) own = std::make_unique<Machine>();
    machine = own.get();
    machine->random = Random(seed);
    // Blocks of this launch are ordered after those of the last one and after the host, but not among themselves.
    ++machine->launches;
    machine->products = 0;
    acquire(&machine->launched[(machine->launches - 1) % 2]);
    machine->thread_count = threads;
    machine->warp_count = threads / 32;
    machine->name = name;
    machine->entry = found->second.entry;
    machine->params = params;
    machine->grid = Index{grid[0], grid[1], grid[2]};
    // Kernels that use proxy fences: only for these a thread is watched.
    static thread_local std::set<Entry> fencing;
    machine->fences = fencing.count(machine->entry) != 0;
    machine->global_views.resize(watched_memory().size());
    for (size_t i = 0; i < machine->global_views.size(); ++i) {
        machine->global_views[i].begin(watched_memory()[i].first, watched_memory()[i].second);
    }
    uint64_t blocks = static_cast<uint64_t>(grid[0]) * grid[1] * grid[2];
    std::vector<uint64_t> order(blocks);
    for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
    machine->random.shuffle(order.data(), static_cast<uint32_t>(blocks));
    for (uint64_t index : order) {
        machine->block = Index{static_cast<uint32_t>(index % grid[0]), static_cast<uint32_t>(index / grid[0] % grid[1]),
                               static_cast<uint32_t>(index / grid[0] / grid[1])};
        run_block(shared_bytes);
    }
    acquire(&machine->launched[machine->launches % 2]);
    if (machine->fences) fencing.insert(machine->entry);
    return 0;
}

}  // namespace emulation

extern "C" int ddtas_emulated_launch(const char *name, const uint32_t *grid, uint32_t threads, uint32_t shared_bytes,
                                     const void *params, size_t params_bytes, uint64_t seed) {
    return emulation::launch(name, grid, threads, shared_bytes, params, params_bytes, seed);
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
