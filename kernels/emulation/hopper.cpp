// hopper.cpp: mbarriers, bulk copies, products of a warpgroup.

#include <algorithm>

#include "state.h"

namespace emulation {
namespace {

void within_shared(const void *at, size_t bytes) {
    if (!machine->async_view.holds(at, bytes)) die("a bulk copy leaves shared memory", "");
}

// Global memory as bulk copies see it.
const unsigned char *global_view_of(const void *from, size_t bytes) {
    for (const AsyncView &view : machine->global_views) {
        if (view.holds(from, bytes)) return view.seen.data() + view.offset_of(from);
    }
    return static_cast<const unsigned char *>(from);
}

SharedBarrier &barrier_at(uint64_t *barrier) {
    auto found = machine->barriers.find(barrier);
    if (found == machine->barriers.end()) die("a barrier that nobody began", "");
    uint64_t mark;
    std::memcpy(&mark, barrier, sizeof mark);
    if (mark != kBarrierMark) die("somebody has written over a barrier", "");
    return found->second;
}

void finish_phase(SharedBarrier &barrier) {
    if (barrier.arrived < barrier.count || barrier.bytes != 0) return;
    barrier.arrived = 0;
    ++barrier.phase;
}

// An operand in shared memory, from the fields of its descriptor (PTX ISA, "Matrix Descriptor Format").
struct Operand {
    uint32_t start, leading, stride;
    explicit Operand(uint64_t descriptor)
        : start(field(descriptor)), leading(field(descriptor >> 16)), stride(field(descriptor >> 32)) {
        if (descriptor >> 62 != 1) die("a descriptor of another swizzle than that of 128 bytes", "");
        if (descriptor >> 49 & 7) die("a descriptor with a base offset", "");
        if (start >> 7 & 7) die("a descriptor that begins in the middle of a swizzled block", "");
    }
    static uint32_t field(uint64_t bits) { return static_cast<uint32_t>(bits & 0x3fff) << 4; }

    // Eight elements: byte `byte` of line `line` (128 bytes each, 8 lines a block) from offset `block` on.
    const unsigned char *granule(uint32_t block, uint32_t line, uint32_t byte) const {
        uint32_t address = start + block + line * 128 + byte;
        address ^= (address >> 7 & 7) << 4;  // the swizzle is of address bits
        size_t offset = address - kSharedBase;
        const AsyncView &view = machine->async_view;
        if (address < kSharedBase || offset + 16 > view.seen.size()) die("a product reads outside of shared memory", "");
        // Written without a fence, or while the product may be reading.
        if (view.differs(view.memory + offset, 16)) die("a product reads what a thread has written without a fence", "");
        return view.seen.data() + offset;
    }
    // K-major: a row of A (or column of B) from `k` on. Transposed, [k, columns]: index `k` from a column on.
    const unsigned char *straight(uint32_t row, uint32_t k) const { return granule(row / 8 * stride, row % 8, k * 2); }
    const unsigned char *transposed(uint32_t column, uint32_t k) const {
        return granule(column / 64 * leading + k / 8 * stride, k % 8, column % 64 * 2);
    }
};

constexpr uint32_t kDepth = 16, kMostColumns = 256;

// Loads `count` rows (or columns) of an operand from `first` on, as [k, count].
template <Precision numbers>
void load(double (*to)[kMostColumns], const Operand &operand, bool transposed, uint32_t first, uint32_t count) {
    for (uint32_t i = 0; i < (transposed ? kDepth : count); ++i) {
        for (uint32_t j = 0; j < (transposed ? count : kDepth); j += 8) {
            uint16_t bits[8];
            std::memcpy(bits, transposed ? operand.transposed(first + j, i) : operand.straight(first + i, j), sizeof bits);
            for (uint32_t element = 0; element < 8; ++element) {
                (transposed ? to[i][j + element] : to[j + element][i]) = number<numbers>(bits[element]);
            }
        }
    }
}

template <Precision numbers>
void run_product(const Product &product, int warp) {
    static thread_local double a[kDepth][kMostColumns], b[kDepth][kMostColumns];  // too large for a fiber
    const auto columns = static_cast<uint32_t>(product.operands.columns);
    load<numbers>(a, Operand(product.operands.a), product.operands.transposed_a, static_cast<uint32_t>(warp % 4 * 16), 16);
    load<numbers>(b, Operand(product.operands.b), product.operands.transposed, 0, columns);
    for (uint32_t row = 0; row < 16; ++row) {
        double sums[kMostColumns] = {};
        for (uint32_t k = 0; k < kDepth; ++k) {
            for (uint32_t column = 0; column < columns; ++column) sums[column] += a[k][row] * b[k][column];
        }
        for (uint32_t column = 0; column < columns; ++column) {
            float &c = product.c[row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row / 8 * 2 + column % 2];
            c = truncate((product.operands.from_zero ? 0.0 : static_cast<double>(c)) + sums[column]);
        }
    }
}

// Runs the oldest products: those of all but the last `pending` groups, and randomly a few more.
void run_products(uint64_t pending) {
    int index = static_cast<int>(machine->current / 32);
    Warp &warp = machine->warps[index];
    while (!warp.products.empty()) {
        bool due = warp.products.front().group + pending < warp.group;
        if (!due && machine->random.below(4) != 0) break;
        const Product &product = warp.products.front();
        (product.numbers == Precision::f16 ? run_product<Precision::f16> : run_product<Precision::bf16>)(product, index);
        Unwatched bookkeeping;
        warp.products.pop_front();
    }
}

}  // namespace

// Lands a random bulk copy.
void land_bulk(bool late_too) {
    Unwatched whole_call;
    size_t index = machine->random.below(static_cast<uint32_t>(machine->bulks.size()));
    Bulk bulk = machine->bulks[index];
    if (bulk.late && !late_too) return;
    machine->bulks.erase(machine->bulks.begin() + static_cast<ptrdiff_t>(index));
    machine->async_view.write(bulk.to, global_view_of(bulk.from, bulk.bytes), bulk.bytes);
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
        if (!thread.delayed && barrier_at(thread.shared_barrier).phase % 2 == thread.parity) continue;
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

void mbarrier_init(Barrier *barrier, uint32_t count) {
    within_shared(barrier, sizeof *barrier);
    if (reinterpret_cast<uintptr_t>(barrier) % sizeof *barrier) die("a barrier is not aligned", "");
    if (!machine->barriers.emplace(barrier, SharedBarrier{count}).second) die("a barrier is begun again", "");
    std::memcpy(barrier, &kBarrierMark, sizeof kBarrierMark);
}

void mbarrier_arrive_expect_tx(Barrier *barrier, uint32_t bytes) {
    SharedBarrier &one = barrier_at(barrier);
    lanes_apart();
    if (++one.arrived > one.count) die("more arrivals at a barrier than it counts", "");
    release(&one.tokens[one.phase % 2]);
    one.bytes += bytes;
    if (one.bytes >= 1 << 20) die("more bytes than a barrier counts", "");
    finish_phase(one);
    preempt();
}

void mbarrier_arrive(Barrier *barrier) { mbarrier_arrive_expect_tx(barrier, 0); }

void mbarrier_wait(Barrier *barrier, uint32_t parity) {
    Thread &self = machine->self();
    lanes_apart();
    // A thread may be late: by then two phases may be over, if the kernel does not prevent it.
    self.delayed = machine->warp().late && machine->random.below(8) == 0;
    while (self.delayed || barrier_at(barrier).phase % 2 == parity) {
        self.state = State::at_shared_barrier;
        self.shared_barrier = barrier;
        self.parity = parity;
        yield();
        self.delayed = false;
    }
    acquire(&barrier_at(barrier).tokens[parity]);
}

void cp_async_bulk(void *to, const void *from, uint32_t bytes, Barrier *barrier) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16) die("cp_async_bulk is not aligned", "");
    lanes_apart();
    Unwatched whole_call;
    within_shared(to, bytes);
    if (machine->async_view.differs(to, bytes)) die("a bulk copy over what a thread has written without a fence", "");
    machine->async_view.poison(to, bytes);
    machine->bulks.push_back(Bulk{to, from, bytes, barrier, machine->random.below(2) == 0});
}

namespace {
void read_store(const BulkStore &store) {
    const AsyncView &view = machine->async_view;
    if (view.differs(store.from, store.bytes)) die("a bulk store reads what a thread has written without a fence", "");
    const unsigned char *seen = view.seen.data() + view.offset_of(store.from);
    machine->stored.push_back(StoredBytes{store.to, std::vector<unsigned char>(seen, seen + store.bytes)});
}
void write_stored(size_t index) {
    StoredBytes &stored = machine->stored[index];
    auto view = std::find_if(machine->global_views.begin(), machine->global_views.end(),
                             [&](const AsyncView &one) { return one.holds(stored.to, stored.bytes.size()); });
    if (view != machine->global_views.end()) {
        view->write(stored.to, stored.bytes.data(), stored.bytes.size());
    } else {
        std::memcpy(stored.to, stored.bytes.data(), stored.bytes.size());
    }
    machine->stored.erase(machine->stored.begin() + static_cast<ptrdiff_t>(index));
}
}  // namespace

void land_store() {
    Unwatched whole_call;
    auto count = static_cast<uint32_t>(machine->stores.size());
    uint32_t index = machine->random.below(count + static_cast<uint32_t>(machine->stored.size()));
    if (index >= count) return write_stored(index - count);
    if (machine->stores[index].late) return;
    read_store(machine->stores[index]);
    machine->stores.erase(machine->stores.begin() + static_cast<ptrdiff_t>(index));
}

void land_stored() {
    while (!machine->stored.empty()) write_stored(machine->random.below(static_cast<uint32_t>(machine->stored.size())));
}

void bulk_store(void *to, const void *from, uint32_t bytes) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16) die("bulk_store is not aligned", "");
    lanes_apart();
    within_shared(from, bytes);
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
    std::for_each(first, machine->stores.end(), read_store);
    machine->stores.erase(first, machine->stores.end());
}

void *shared_at(uint32_t address, uint32_t bytes) {
    size_t offset = address - kSharedBase;
    if (address < kSharedBase || offset + bytes > machine->async_view.seen.size()) die("a store outside of shared memory", "");
    return machine->shared + offset;
}

template <Precision numbers>
void wgmma(void **lanes) {
    const auto &first = *static_cast<GroupMultiply *>(lanes[0]);
    Warp &warp = machine->warp();
    if (!warp.fenced) die("a group of products without a wgmma_fence() before it", "");
    Product product{{}, first, numbers, warp.group};
    for (int lane = 0; lane < 32; ++lane) {
        const auto &one = *static_cast<GroupMultiply *>(lanes[lane]);
        if (one.a != first.a || one.b != first.b) die("descriptors differ within a warp", "");
        product.c[lane] = one.c;
    }
    Unwatched bookkeeping;
    warp.products.push_back(product);
    machine->products += 16 * static_cast<uint64_t>(first.columns) * kDepth;
}
template void wgmma<Precision::f16>(void **);
template void wgmma<Precision::bf16>(void **);

void wgmma_fence() {
    aligned("wgmma_fence");
    machine->warp().fenced = true;
}

void wgmma_commit(void **) {
    ++machine->warp().group;
    machine->warp().fenced = false;
    run_products(machine->warp().group);
}

void wgmma_wait(void **lanes) { run_products(static_cast<uint64_t>(*static_cast<int *>(lanes[0]))); }

void AsyncView::stop_watching() {
    constexpr size_t kPiece = 1024;
    for (size_t at = 0; at < seen.size(); at += kPiece) {
        size_t end = std::min(at + kPiece, seen.size());
        if (std::memcmp(before.data() + at, memory + at, end - at) == 0) continue;
        for (size_t byte = at; byte < end; ++byte) {
            if (before[byte] != memory[byte]) unfenced.push_back(byte);
        }
    }
}

void AsyncView::publish(bool own) {
    std::vector<unsigned char> kept;
    if (own) {
        unfenced.clear();
        before.assign(memory, memory + seen.size());
    } else {
        for (size_t byte : unfenced) kept.push_back(seen[byte]);
    }
    std::memcpy(seen.data(), memory, seen.size());
    for (size_t i = 0; i < unfenced.size(); ++i) seen[unfenced[i]] = kept[i];
}

// Bulk copies replace what the watched thread wrote there.
void AsyncView::written_by_engine(void *to, size_t bytes) {
    size_t first = offset_of(to);
    if (before.size() == seen.size()) std::memcpy(before.data() + first, memory + first, bytes);
    unfenced.erase(std::remove_if(unfenced.begin(), unfenced.end(), [&](size_t byte) { return byte - first < bytes; }), unfenced.end());
}

void AsyncView::write(void *to, const void *from, size_t bytes) {
    std::memcpy(to, from, bytes);
    std::memcpy(seen.data() + offset_of(to), from, bytes);
    written_by_engine(to, bytes);
}

void AsyncView::poison(void *to, size_t bytes) {
    std::memset(to, 0xff, bytes);
    std::memset(seen.data() + offset_of(to), 0xff, bytes);
    written_by_engine(to, bytes);
}

// Makes the writes of all threads visible, except those of the watched thread, which needs a fence of its own: over the blocks
// and schedules of a test, a fence that only some threads execute shows.
void fence_proxy_async() {
    Unwatched whole_call;
    machine->fences = true;
    machine->async_view.publish(machine->current == machine->watched);
}

void fence_proxy_async_all() {
    fence_proxy_async();
    Unwatched rest_of_call;
    for (AsyncView &view : machine->global_views) view.publish(machine->current == machine->watched);
}

uint32_t shared_address(const void *pointer) {
    return kSharedBase + static_cast<uint32_t>(static_cast<const unsigned char *>(pointer) - machine->shared);
}

}  // namespace emulation
