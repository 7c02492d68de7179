// order.cu: rows into class order (SPEC 1).
// Launcher: src/backend/device/order.rs.
//
// A sort by (label, index).
// order_tiles: sorts tiles of 2,048 keys. A key's place is the number of keys before it, counted by a block for every 64
//   keys, since barriers would bound a sort of a tile by one block. Also sets the counters of later passes to 0.
// order_tiles_wide: beyond 65,536 rows, a block sorts a tile of 8,192 keys in shared memory.
// order_merge: merges ORDER_RUNS sorted runs into one. A key's place is the sum of its places in all runs, found by binary
//   search: of a block's first and last key in whole runs, of the others between. 2,048 rows need no merge; 65,536 rows one, and
//   with wide tiles 262,144.
// Ignored labels get the largest key: their rows come last and are in no class range.

#include "tile/prepared_rows.cuh"

constexpr uint64_t kIgnored = ~static_cast<uint64_t>(0);
constexpr uint32_t kKeys = ORDER_WIDE_TILE / ORDER_WIDE_THREADS;  // keys of a thread of order_tiles_wide
static_assert(kKeys == 8, "the gaps below");

DEVICE void begin_loss(const OrderParams &p, uint32_t threads) {
#pragma unroll 1
    for (const Zeroed &zeroed : p.zeroed) {
        for (uint64_t i = block_x() * threads + thread_index(); i < zeroed.count; i += grid_x() * threads) zeroed.words[i] = 0;
    }
    if (p.counters != nullptr && block_x() == 0 && thread_index() == 0) *p.counters = Counters{0, 0, 0, 0, NO_ROW, NO_ROW, 0, 0, 0};
}

// Labels as they are compared: ignored labels are above all others, padding is above them, and 1 can be added to any label.
// 64-bit labels take five instructions a comparison, half of them at half rate; labels below 2^23 are exact in f32 and take two.
struct WideLabels {
    using Label = uint64_t;
    static constexpr Label kIgnoredLabel = uint64_t{1} << 63;
    static constexpr Label kPadding = kIgnored;
    static DEVICE uint32_t less(Label a, Label b) { return a < b; }
};
struct SmallLabels {
    using Label = float;
    static constexpr Label kIgnoredLabel = 1 << 23;
    static constexpr Label kPadding = 1 << 24;
    static DEVICE float less(Label a, Label b) { return saturated_difference(b, a); }  // labels are integers
};

constexpr uint32_t kLoads = ORDER_TILE / THREADS;
constexpr uint32_t kOwnKeys = ORDER_OWN / 32;  // the block's own keys in a lane; each warp counts in a part of the tile
struct CountShared {
    alignas(16) uint64_t wide[ORDER_TILE];
    alignas(16) float small[ORDER_TILE];
    uint32_t before[THREADS / 32][ORDER_OWN];
    uint32_t some_wide[THREADS / 32];
};
static_assert(sizeof(CountShared) == ORDER_SHARED_BYTES, "the launch plan's shared memory");
static_assert(ORDER_TILE % ORDER_OWN == 0 && ORDER_OWN % 32 == 0 && ORDER_OWN <= THREADS, "a thread an own key");

// For each of this lane's keys, from `own` on, counts the labels in the warp's part of the tile that come before it.
template <class Kind>
DEVICE void count_before(CountShared &shared, const typename Kind::Label *labels, uint32_t own, uint32_t count) {
    using Label = typename Kind::Label;
    using Count = decltype(Kind::less(Label{}, Label{}));
    using Labels = Granule<Label>;
    Label keys[kOwnKeys];
    Count before[kOwnKeys];
#pragma unroll
    for (uint32_t k = 0; k < kOwnKeys; ++k) {
        keys[k] = labels[own + k * 32 + lane_index()];
        before[k] = 0;
    }
    // Counts labels that are less than the keys; `or_equal`, for smaller indices: less or equal.
    auto compare = [&](uint32_t begin, uint32_t end, uint32_t or_equal) {
        Label bounds[kOwnKeys];
#pragma unroll
        for (uint32_t k = 0; k < kOwnKeys; ++k) bounds[k] = keys[k] + static_cast<Label>(or_equal);
#pragma unroll 4
        for (uint32_t i = begin; i < end; i += Labels::count) {
            Labels others = *reinterpret_cast<const Labels *>(labels + i);
#pragma unroll
            for (Label other : others.values) {
#pragma unroll
                for (uint32_t k = 0; k < kOwnKeys; ++k) before[k] += Kind::less(other, bounds[k]);
            }
        }
    };
    constexpr uint32_t kWarps = THREADS / 32;
    uint32_t part = (count + kWarps * 4 - 1) / (kWarps * 4) * 4, begin = warp_index() * part, end = begin + part;
    auto within = [&](uint32_t i) { return i < begin ? begin : i < end ? i : end; };
    compare(begin, within(own), 1);
    compare(within(own + ORDER_OWN), end, 0);
#pragma unroll 4
    for (uint32_t i = within(own); i < within(own + ORDER_OWN); ++i) {
#pragma unroll
        for (uint32_t k = 0; k < kOwnKeys; ++k) {
            before[k] += Kind::less(labels[i], keys[k] + static_cast<Label>(i < own + k * 32 + lane_index()));
        }
    }
#pragma unroll
    for (uint32_t k = 0; k < kOwnKeys; ++k) shared.before[warp_index()][k * 32 + lane_index()] = static_cast<uint32_t>(before[k]);
}

KERNEL(order_tiles, OrderParams, 4) {
    SHARED_MEMORY(bytes);
    auto &shared = *reinterpret_cast<CountShared *>(bytes);
    constexpr uint32_t kBlocks = ORDER_TILE / ORDER_OWN;
    uint32_t first = block_x() / kBlocks * ORDER_TILE, own = block_x() % kBlocks * ORDER_OWN;
    uint32_t count = p.count - first < ORDER_TILE ? p.count - first : ORDER_TILE;
    int64_t labels[kLoads];
#pragma unroll
    for (uint32_t k = 0; k < kLoads; ++k) {
        uint32_t i = k * THREADS + thread_index();
        labels[k] = i < count ? p.labels[first + i] : -1;
    }
    begin_loss(p, THREADS);  // while the labels are loaded
    uint32_t valid = 0;
    bool wide = false;
#pragma unroll
    for (uint32_t k = 0; k < kLoads; ++k) {
        uint32_t i = k * THREADS + thread_index();
        bool ignored = labels[k] < 0;
        shared.wide[i] = i >= count ? WideLabels::kPadding : ignored ? WideLabels::kIgnoredLabel : static_cast<uint64_t>(labels[k]);
        shared.small[i] = i >= count ? SmallLabels::kPadding : ignored ? SmallLabels::kIgnoredLabel : static_cast<float>(labels[k]);
        wide = wide || labels[k] >= 1 << 23;
        valid += !ignored;
    }
    bool some_wide = ballot_sync(wide) != 0;
    if (lane_index() == 0) shared.some_wide[warp_index()] = some_wide;
    block_sync();
    for (uint32_t one : shared.some_wide) some_wide = some_wide || one != 0;
    if (some_wide) {
        count_before<WideLabels>(shared, shared.wide, own, count);
    } else {
        count_before<SmallLabels>(shared, shared.small, own, count);
    }
    block_sync();
    if (thread_index() < ORDER_OWN && own + thread_index() < count) {
        uint32_t place = first;
#pragma unroll
        for (uint32_t warp = 0; warp < THREADS / 32; ++warp) place += shared.before[warp][thread_index()];
        uint64_t label = shared.wide[own + thread_index()];
        p.keys[place] = label == WideLabels::kIgnoredLabel ? kIgnored : label;
        p.order[place] = first + own + thread_index();
    }
    if (p.valid == nullptr || block_x() != 0) return;
    block_sync();  // the counts have been read
    valid = block_sum(valid, shared.before[0]);
    if (thread_index() != 0) return;
    *p.valid = valid;
    if (p.valid_too != nullptr) *p.valid_too = valid;
}

// (label, index) pairs are unique, so every sort gives the same order.
struct Key {
    uint64_t label;
    uint32_t index;
};
DEVICE bool is_before(const Key &a, const Key &b) { return a.label < b.label || (a.label == b.label && a.index < b.index); }

// A gap after every 8 keys avoids bank conflicts between threads that have 8 adjacent keys each. Indices are within the tile.
struct OrderShared {
    uint64_t labels[ORDER_WIDE_TILE + ORDER_WIDE_TILE / 8];
    uint16_t indices[ORDER_WIDE_TILE + ORDER_WIDE_TILE / 8];
    DEVICE Key get(uint32_t i) const { return Key{labels[i + i / 8], indices[i + i / 8]}; }
    DEVICE void set(uint32_t i, const Key &key) {
        labels[i + i / 8] = key.label;
        indices[i + i / 8] = static_cast<uint16_t>(key.index);
    }
};
static_assert(sizeof(OrderShared) == ORDER_WIDE_SHARED_BYTES, "the launch plan's shared memory");

ROLE_KERNEL(order_tiles_wide, OrderParams, ORDER_WIDE_THREADS) {
    constexpr uint32_t tile = ORDER_WIDE_TILE, threads = ORDER_WIDE_THREADS;
    SHARED_MEMORY(bytes);
    auto &shared = *reinterpret_cast<OrderShared *>(bytes);
    begin_loss(p, threads);
    uint32_t first = block_x() * tile;
    uint32_t count = p.count - first < tile ? p.count - first : tile;
    for (uint32_t i = thread_index(); i < tile; i += threads) {
        int64_t label = i < count ? p.labels[first + i] : -1;
        shared.set(i, Key{label < 0 ? kIgnored : static_cast<uint64_t>(label), i});
    }
    block_sync();
    uint32_t at = thread_index() * kKeys;
    Key own[kKeys];
#pragma unroll
    for (uint32_t k = 0; k < kKeys; ++k) own[k] = shared.get(at + k);
    // Sorts a thread's own keys by odd-even transposition.
#pragma unroll
    for (uint32_t round = 0; round < kKeys; ++round) {
#pragma unroll
        for (uint32_t k = round % 2; k + 1 < kKeys; k += 2) {
            if (!is_before(own[k + 1], own[k])) continue;
            Key larger = own[k];
            own[k] = own[k + 1];
            own[k + 1] = larger;
        }
    }
    auto publish = [&] {
        block_sync();  // the previous keys have been read
#pragma unroll
        for (uint32_t k = 0; k < kKeys; ++k) shared.set(at + k, own[k]);
        block_sync();
    };
    // Merges pairs of runs: every thread finds where its part of the result begins in both. Padding comes last.
#pragma unroll 1
    for (uint32_t run = kKeys; run < count; run *= 2) {
        publish();
        uint32_t left = at / (2 * run) * (2 * run), right = left + run, before = at - left;
        uint32_t low = before > run ? before - run : 0, high = before < run ? before : run;
        while (low < high) {
            uint32_t middle = (low + high) / 2;
            if (is_before(shared.get(right + before - 1 - middle), shared.get(left + middle))) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        uint32_t left_end = right, right_end = right + run;
        right += before - low;
        left += low;
#pragma unroll 1
        for (uint32_t k = 0; k < kKeys; ++k) {
            bool there = left < left_end, other = right < right_end;
            Key a = shared.get(there ? left : left_end - 1), b = shared.get(other ? right : right_end - 1);
            bool take = there && (!other || is_before(a, b));
            // Keys stay in registers, which cannot be indexed at run time.
#pragma unroll
            for (uint32_t to = 0; to < kKeys; ++to) {
                if (to == k) own[to] = take ? a : b;
            }
            left += take;
            right += !take;
        }
    }
    publish();
    for (uint32_t i = thread_index(); i < count; i += threads) {
        Key key = shared.get(i);
        p.keys[first + i] = key.label;
        p.order[first + i] = first + key.index;
    }
}

// How many of the `most` sorted keys of another run come before each of these: indices ascend over the runs, so equal keys of
// earlier runs do. Several searches at once hide the latency of each.
template <int n>
DEVICE void search_run(const uint64_t *others, uint32_t most, bool earlier, const uint64_t (&keys)[n], uint32_t (&before)[n]) {
#pragma unroll
    for (int k = 0; k < n; ++k) before[k] = 0;
    for (uint32_t step = most == 0 ? 0 : 1u << highest_bit(most); step > 0; step /= 2) {
#pragma unroll
        for (int k = 0; k < n; ++k) {
            if (before[k] + step > most) continue;
            uint64_t other = others[before[k] + step - 1];
            if (other < keys[k] || (earlier && other == keys[k])) before[k] += step;
        }
    }
}

// A block has adjacent keys of a run. Two warps find where its first and its last key belong in every other run, a run a lane;
// then each warp searches between these places for all keys in some of the runs: a few cache lines, unless labels are uneven.
constexpr uint32_t kAtOnce = ORDER_MERGED / 32;
static_assert(ORDER_MERGED % 32 == 0 && ORDER_MERGED <= THREADS && ORDER_TILE % ORDER_MERGED == 0, "a thread a key, all of one run");
static_assert(ORDER_RUNS == 32, "a lane a run");
struct MergeShared {
    uint32_t ends[2][ORDER_RUNS];
    uint32_t found[THREADS / 32][ORDER_MERGED];
};
static_assert(sizeof(MergeShared) == ORDER_MERGE_SHARED_BYTES, "the launch plan's shared memory");
KERNEL(order_merge, MergeParams, 4) {
    SHARED_MEMORY(bytes);
    auto &shared = *reinterpret_cast<MergeShared *>(bytes);
    uint32_t begin = block_x() * ORDER_MERGED;
    uint32_t own = begin / p.run, first = own / ORDER_RUNS * ORDER_RUNS, runs = (p.count - 1) / p.run + 1;
    uint32_t end = runs - first < ORDER_RUNS ? runs : first + ORDER_RUNS;
    auto length = [&](uint32_t run) { return p.count - run * p.run < p.run ? p.count - run * p.run : p.run; };
    auto keys_of = [&](uint32_t run) { return p.from_keys + static_cast<uint64_t>(run) * p.run; };
    if (warp_index() < 2) {
        uint32_t run = first + lane_index(), last = p.count - begin < ORDER_MERGED ? p.count - 1 : begin + ORDER_MERGED - 1;
        uint64_t key[1] = {p.from_keys[warp_index() == 0 ? begin : last]};
        uint32_t before[1];
        bool other = run < end && run != own;
        search_run(keys_of(other ? run : own), other ? length(run) : 0, run < own, key, before);
        shared.ends[warp_index()][lane_index()] = before[0];
    }
    uint64_t keys[kAtOnce];
    uint32_t place[kAtOnce];
#pragma unroll
    for (uint32_t k = 0; k < kAtOnce; ++k) {
        uint32_t i = begin + k * 32 + lane_index();
        keys[k] = i < p.count ? p.from_keys[i] : kIgnored;
        place[k] = 0;
    }
    block_sync();
    for (uint32_t run = first + warp_index(); run < end; run += THREADS / 32) {
        uint32_t from = shared.ends[0][run - first], before[kAtOnce];
        search_run(keys_of(run) + from, shared.ends[1][run - first] - from, run < own, keys, before);
#pragma unroll
        for (uint32_t k = 0; k < kAtOnce; ++k) place[k] += from + before[k];
    }
#pragma unroll
    for (uint32_t k = 0; k < kAtOnce; ++k) shared.found[warp_index()][k * 32 + lane_index()] = place[k];
    uint32_t i = begin + thread_index(), in_run = i % p.run + 1;
    bool there = thread_index() < ORDER_MERGED && i < p.count;
    uint64_t key = there ? p.from_keys[i] : kIgnored;
    uint32_t index = there ? p.from_order[i] : 0;
    // In each run with valid rows one thread adds their number.
    if (p.valid != nullptr && key != kIgnored && (in_run == length(own) || p.from_keys[i + 1] == kIgnored)) {
        atomic_add(p.valid, in_run);
        if (p.valid_too != nullptr) atomic_add(p.valid_too, in_run);
    }
    block_sync();
    if (!there) return;
    uint32_t at = first * p.run + i % p.run;
    for (uint32_t warp = 0; warp < THREADS / 32; ++warp) at += shared.found[warp][thread_index()];
    p.keys[at] = key;
    p.order[at] = index;
}
