// hopper.cpp: barriers in shared memory, bulk copies, products of a warpgroup.

#include <algorithm>

#include "state.h"

namespace emulation {
namespace {

unsigned char *async_view_of(const void *shared, size_t bytes) {
    auto offset = static_cast<size_t>(static_cast<const unsigned char *>(shared) - machine->shared);
    size_t all = machine->async_view.size();
    if (offset > all || bytes > all - offset) die("a bulk copy leaves shared memory", "");
    return machine->async_view.data() + offset;
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

void arrive(SharedBarrier &barrier) {
    lanes_apart();
    if (++barrier.arrived > barrier.count) die("more arrivals at a barrier than it counts", "");
    release(&barrier.tokens[barrier.phase % 2]);
}

// An operand in shared memory, as the PTX manual has the fields of its descriptor.
struct Operand {
    uint32_t start, leading, stride;
    explicit Operand(uint64_t descriptor)
        : start(field(descriptor)), leading(field(descriptor >> 16)), stride(field(descriptor >> 32)) {
        if (descriptor >> 62 != 1) die("a descriptor of another swizzle than that of 128 bytes", "");
        if (descriptor >> 49 & 7) die("a descriptor with a base offset", "");
    }
    static uint32_t field(uint64_t bits) { return static_cast<uint32_t>(bits & 0x3fff) << 4; }

    // Lines of 128 bytes, `line` of them on and `byte` into it; 8 lines are one block.
    uint16_t at(uint32_t block, uint32_t line, uint32_t byte) const {
        uint32_t address = start + block + line * 128 + byte;
        address ^= (address >> 7 & 7) << 4;  // the swizzle is of address bits
        size_t offset = address - kSharedBase;
        if (address < kSharedBase || offset + sizeof(uint16_t) > machine->async_view.size()) die("a product reads outside of shared memory", "");
        uint16_t bits;
        std::memcpy(&bits, machine->async_view.data() + offset, sizeof bits);
        return bits;
    }
    // Row (of A, or column of B) and k; or both exchanged, for an operand that lies [k, columns].
    uint32_t straight(uint32_t row, uint32_t k) const { return at(row / 8 * stride, row % 8, k * 2); }
    uint32_t transposed(uint32_t column, uint32_t k) const {
        return at(column / 64 * leading + k / 8 * stride, k % 8, column % 64 * 2);
    }
};

void run_product(const Product &product, int warp) {
    constexpr int kMostColumns = 256;
    static thread_local double b[16][kMostColumns];  // too large for a fiber
    const int columns = product.operands.columns;
    Operand left(product.operands.a), right(product.operands.b);
    constexpr int depth = 16;
    auto value = [&](uint32_t bits) { return static_cast<double>(element(product.numbers, bits, 0)); };
    double a[16][depth];
    for (int k = 0; k < depth; ++k) {
        for (int i = 0; i < 16; ++i) {
            uint32_t row = static_cast<uint32_t>(warp % 4 * 16 + i);
            a[i][k] = value(product.operands.transposed_a ? left.transposed(row, k) : left.straight(row, k));
        }
        for (int column = 0; column < columns; ++column) {
            b[k][column] = value(product.operands.transposed ? right.transposed(column, k) : right.straight(column, k));
        }
    }
    for (int row = 0; row < 16; ++row) {
        double sums[kMostColumns] = {};
        for (int k = 0; k < depth; ++k) {
            for (int column = 0; column < columns; ++column) sums[column] += a[row][k] * b[k][column];
        }
        for (int column = 0; column < columns; ++column) {
            float &c = product.c[row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row / 8 * 2 + column % 2];
            c = truncate((product.operands.fresh ? 0.0 : static_cast<double>(c)) + sums[column]);
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
        Unwatched bookkeeping;
        warp.products.pop_front();
    }
}

}  // namespace

// Lands one bulk copy, any of them.
void land_bulk(bool late_too) {
    Unwatched whole_call;
    size_t index = machine->random.below(static_cast<uint32_t>(machine->bulks.size()));
    Bulk bulk = machine->bulks[index];
    if (bulk.late && !late_too) return;
    machine->bulks.erase(machine->bulks.begin() + static_cast<ptrdiff_t>(index));
    std::memcpy(bulk.to, bulk.from, bulk.bytes);
    std::memcpy(async_view_of(bulk.to, bulk.bytes), bulk.from, bulk.bytes);
    SharedBarrier &barrier = barrier_at(bulk.barrier);
    barrier.bytes -= bulk.bytes;
    finish_phase(barrier);
}

namespace {
bool wake(bool late_too) {
    bool woken = false;
    for (uint32_t i = 0; i < machine->thread_count; ++i) {
        Thread &thread = machine->all_threads[i];
        if (thread.state != State::at_shared_barrier || (machine->warps[i / 32].late && !late_too)) continue;
        if (barrier_at(thread.shared_barrier).phase % 2 == thread.parity) continue;
        thread.state = State::ready;
        woken = true;
    }
    return woken;
}
}  // namespace

bool wake_at_shared_barriers() { return wake(false); }

bool wake_last() {
    auto waits = [](const Thread &thread) { return thread.state == State::at_shared_barrier; };
    auto threads = machine->threads();
    const Thread *waiter = std::find_if(threads.begin(), threads.end(), waits);
    if (waiter == threads.end()) return false;
    for (;;) {
        if (wake(false)) return true;
        if (machine->bulks.empty()) break;
        land_bulk(true);
    }
    if (wake(true)) return true;
    machine->current = static_cast<uint32_t>(waiter - threads.begin());
    die("waits for a phase that nobody ends", "");
}

void mbarrier_init(Barrier *barrier, uint32_t count) { machine->barriers[barrier] = SharedBarrier{count}; }

void mbarrier_arrive_expect_tx(Barrier *barrier, uint32_t bytes) {
    SharedBarrier &one = barrier_at(barrier);
    arrive(one);
    one.bytes += bytes;
    finish_phase(one);
}

void mbarrier_arrive(Barrier *barrier) {
    SharedBarrier &one = barrier_at(barrier);
    arrive(one);
    finish_phase(one);
}

void mbarrier_wait(Barrier *barrier, uint32_t parity) {
    Thread &self = machine->self();
    lanes_apart();
    while (barrier_at(barrier).phase % 2 == parity) {
        self.state = State::at_shared_barrier;
        self.shared_barrier = barrier;
        self.parity = parity;
        yield();
    }
    acquire(&barrier_at(barrier).tokens[parity]);
}

void cp_async_bulk(void *to, const void *from, uint32_t bytes, Barrier *barrier) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16) die("cp_async_bulk is not aligned", "");
    lanes_apart();
    Unwatched whole_call;
    std::memset(to, 0xff, bytes);
    std::memset(async_view_of(to, bytes), 0xff, bytes);
    machine->bulks.push_back(Bulk{to, from, bytes, barrier, machine->random.below(2) == 0});
}

namespace {
void carry_out(const BulkStore &store) {
    std::memcpy(store.to, async_view_of(store.from, store.bytes), store.bytes);
}
}  // namespace

void land_store() {
    Unwatched whole_call;
    size_t index = machine->random.below(static_cast<uint32_t>(machine->stores.size()));
    if (machine->stores[index].late) return;
    carry_out(machine->stores[index]);
    machine->stores.erase(machine->stores.begin() + static_cast<ptrdiff_t>(index));
}

void bulk_store(void *to, const void *from, uint32_t bytes) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16) die("bulk_store is not aligned", "");
    lanes_apart();
    async_view_of(from, bytes);  // within shared memory
    reads(from, bytes);
    Unwatched rest_of_call;
    uint64_t group = machine->self().store_group;
    machine->stores.push_back(BulkStore{to, from, bytes, machine->current, group, machine->random.below(2) == 0});
}

void bulk_store_commit() { ++machine->self().store_group; }

void bulk_store_wait_read() {
    lanes_apart();
    auto waited_for = [](const BulkStore &store) {
        return store.thread == machine->current && store.group < machine->self().store_group;
    };
    for (const BulkStore &store : machine->stores) {
        if (waited_for(store)) reads(store.from, store.bytes);  // at any time up to now
    }
    Unwatched rest_of_call;
    auto first = std::stable_partition(machine->stores.begin(), machine->stores.end(),
                                       [&](const BulkStore &store) { return !waited_for(store); });
    std::for_each(first, machine->stores.end(), carry_out);
    machine->stores.erase(first, machine->stores.end());
}

void *shared_at(uint32_t address, uint32_t bytes) {
    size_t offset = address - kSharedBase;
    if (address < kSharedBase || offset + bytes > machine->async_view.size()) die("a store outside of shared memory", "");
    return machine->shared + offset;
}

template <Numbers numbers>
void wgmma(void **lanes) {
    const auto &first = *static_cast<GroupMultiply *>(lanes[0]);
    Warp &warp = machine->warp();
    Product product{{}, first, numbers, warp.group};
    for (int lane = 0; lane < 32; ++lane) {
        const auto &one = *static_cast<GroupMultiply *>(lanes[lane]);
        if (one.a != first.a || one.b != first.b) die("descriptors differ within a warp", "");
        product.c[lane] = one.c;
    }
    Unwatched bookkeeping;
    warp.products.push_back(product);
}
template void wgmma<Numbers::f16>(void **);
template void wgmma<Numbers::bf16>(void **);

void wgmma_commit(void **) {
    ++machine->warp().group;
    run_products(machine->warp().group);
}

void wgmma_wait(void **lanes) { run_products(static_cast<uint64_t>(*static_cast<int *>(lanes[0]))); }

// Publishes everybody's writes, not this thread's alone: a fence that is missing shows, one that is
// some threads' only may not.
void fence_proxy_async() {
    Unwatched whole_call;
    std::memcpy(machine->async_view.data(), machine->shared, machine->async_view.size());
}

uint32_t shared_address(const void *pointer) {
    return kSharedBase + static_cast<uint32_t>(static_cast<const unsigned char *>(pointer) - machine->shared);
}

}  // namespace emulation
