// select.cu: which pairs each anchor keeps, and the sums of its loss (SPEC 2-4).
// Truth: src/loss/select.rs, src/loss/gradient.rs. Launcher: src/backend/device/passes.rs.
//
// Every block computes the AT-ASMS tolerances from the sweep's counters (no round trip to the host) and compares each candidate
// with the final bounds of its row and its column.
// select_stored: tiles whose candidates are in the pool; persistent blocks; writes each candidate's word, with the place of the
//   pair and which anchors keep it. select_stored_hopper: the same for the thread layout of Hopper's sweep.
// select_recomputed: tiles whose candidates did not fit; one block a tile; on Hopper with wgmma.
// Sync: integer atomics. The sums of the loss are 64-bit fixed point, so that neither the order of blocks nor whether a tile was
//   stored changes a bit.

#include "pairs/pair_weight.cuh"
#include "pairs/tile_order.cuh"
#include "tile/wgmma_tile.cuh"

// Sums of positives or of negatives over a tile's rows and columns. A sum is fixed point in two words, one for the low bits of
// every term and one for the rest: neither overflows with TILE terms, and an addition is one native instruction. Softplus is kept
// as its difference from the sigmoid (`more`), whose high word is 0 for most pairs. The bits of the low words, and the bit of
// more_low from which on it counts pairs:
constexpr uint32_t kSigmoidBits = 25, kMoreBits = 17, kCountBit = 24;
// Adjacent lanes often have pairs of the same row: a row has kReplicas copies of its sums, and lane l adds to l % kReplicas.
constexpr uint32_t kReplicas = 4;
struct SelectSums {
    uint32_t sigmoid_low[(kReplicas + 1) * TILE], sigmoid_high[(kReplicas + 1) * TILE], more_low[(kReplicas + 1) * TILE];
    uint32_t more_high[2 * TILE];
};

// A number below 2^50 as fixed point: adding 2^33 leaves 19 bits behind the point, and the five exponent bits that high_of()
// includes are 0.
constexpr double kFixedBase = 8589934592.0, kFixedUnit = 1.0 / 524288.0;
DEVICE uint64_t fixed_of(float term, double scale) {
    return bits_of(static_cast<double>(term) * scale + kFixedBase);
}
DEVICE uint32_t low_of(uint64_t fixed, uint32_t bits) { return static_cast<uint32_t>(fixed) & ((1u << bits) - 1); }
DEVICE uint32_t high_of(uint64_t fixed, uint32_t bits) { return static_cast<uint32_t>(fixed >> bits); }
DEVICE int64_t joined(uint32_t low, uint32_t high, uint32_t bits) {
    return static_cast<int64_t>((static_cast<uint64_t>(high) << bits) + low);
}

// Constants of the loss.
struct SelectConstants {
    Argument positive, negative;
    double sigmoid_scale, more_scale;  // scales for fixed_of()
    int64_t more_unit;                 // a unit of `more` in units of the sums
    float limit;                       // largest argument; only rows that are not of unit length and were not checked reach it
    uint32_t pair;                     // 1 << kCountBit; opaque to the compiler, so that one instruction sets the bit
    Tolerances tolerances;
};
DEVICE SelectConstants constants_of(const Pairs &pairs) {
    const Settings &settings = pairs.settings;
    return SelectConstants{argument_of(settings, true),
                           argument_of(settings, false),
                           settings.sum_scale * kFixedUnit,
                           settings.more_scale * kFixedUnit,
                           static_cast<int64_t>(settings.sum_scale / settings.more_scale),
                           static_cast<float>(kLog2E * (1ull << 41) / settings.more_scale),
                           1u << kCountBit,
                           adapt(pairs)};
}

// Entries of the lists are the tile's rows, then its columns.
struct SelectShared {
    float pos_bound[2 * TILE];
    float neg_bound[2 * TILE];
    ClassRange range[TILE];
    SelectSums sums[2];  // positives, negatives
    SelectConstants constants;
};
static_assert(sizeof(SelectShared) == SELECT_SHARED_BYTES, "the launch plan's shared memory");

// Returns the sum of entry `entry` and sets it to 0.
DEVICE uint32_t take_sum(uint32_t (&sums)[(kReplicas + 1) * TILE], uint32_t entry) {
    if (entry >= TILE) {
        uint32_t &column = sums[(kReplicas - 1) * TILE + entry], sum = column;
        column = 0;
        return sum;
    }
    auto &replicas = *reinterpret_cast<Granule<uint32_t> *>(sums + entry * kReplicas);
    static_assert(Granule<uint32_t>::count == kReplicas, "one load");
    Granule<uint32_t> values = replicas;
    replicas = Granule<uint32_t>{};
    return values.values[0] + values.values[1] + values.values[2] + values.values[3];
}

// At the start of a block: one thread computes the constants, all clear the sums.
DEVICE void select_open(const Pairs &pairs, SelectShared &shared) {
    if (thread_index() == 0) shared.constants = constants_of(pairs);
    for (uint32_t k = thread_index(); k < sizeof(shared.sums) / 4; k += THREADS) reinterpret_cast<uint32_t *>(shared.sums)[k] = 0;
    block_sync();
}

// m-, m+ and class range of this thread's entry.
struct SelectEntry {
    uint32_t max_neg;
    float min_pos;
    ClassRange range;
};
DEVICE SelectEntry select_entry(const Pairs &pairs, TileIndex tile) {
    uint32_t entry = thread_index();
    bool row = entry < TILE;
    uint32_t i = entry_index(tile, entry);
    bool anchor = (row || pairs.square) && i < pairs.counters->valid_anchors;
    bool elsewhere = !row && pairs.columns != nullptr && i < pairs.counters->valid_references;
    return SelectEntry{anchor      ? pairs.max_neg[i]
                       : elsewhere ? pairs.columns[i].max_neg
                                   : 0,
                       anchor      ? pairs.same[i].min_pos
                       : elsewhere ? pairs.columns[i].min_pos
                                   : INFINITE,
                       anchor && row ? pairs.classes[i] : ClassRange{1, 0}};
}
// Writes this thread's bounds to shared memory; the caller's barrier publishes them.
DEVICE void select_begin(const SelectEntry &known, SelectShared &shared) {
    uint32_t entry = thread_index();
    Tolerances tolerances = shared.constants.tolerances;
    shared.pos_bound[entry] = positive_bound(known.max_neg, tolerances.pos);
    shared.neg_bound[entry] = negative_bound(known.min_pos, tolerances.neg);
    if (entry < TILE) shared.range[entry] = known.range;
}

// Adds the pair to the sums of the row and of the column that keep it, for the row in `replica`, and returns its bits for the
// candidate's word. `plain`: the tile has no pair of one class.
template <bool plain>
DEVICE uint32_t select_pair(const Pairs &pairs, SelectShared &shared, const SelectConstants &constants, TileIndex tile,
                            uint32_t row, uint32_t column, float s, uint32_t replica) {
    bool positive = false;
    if constexpr (!plain) {
        uint32_t i = tile.row * TILE + row, j = tile.column * TILE + column;
        positive = same_class(shared.range[row], j);
        if (positive && is_duplicate(pairs, i, j, s)) return 0;
    }
    bool kept[2];
    for (int side = 0; side < 2; ++side) {
        uint32_t entry = side == 0 ? row : TILE + column;
        kept[side] = positive ? s < shared.pos_bound[entry] : s > shared.neg_bound[entry];
    }
    Logistic logistic(fminf((positive ? constants.positive : constants.negative).at(s), constants.limit));
    float sigmoid = logistic.sigmoid();
    uint64_t share = fixed_of(sigmoid, constants.sigmoid_scale);
    uint64_t more = fixed_of(logistic.softplus_less_sigmoid(), constants.more_scale);
    uint32_t sigmoid_low = low_of(share, kSigmoidBits), sigmoid_high = high_of(share, kSigmoidBits);
    uint32_t more_low = low_of(more, kMoreBits) | constants.pair, more_high = high_of(more, kMoreBits);
    opaque(sigmoid_low);
    opaque(sigmoid_high);
    opaque(more_low);
    SelectSums &sums = shared.sums[positive ? 0 : 1];
    auto add = [&](bool wanted, uint32_t entry) {
        if (!wanted) return;
        atomic_add(&sums.sigmoid_low[entry], sigmoid_low);
        atomic_add(&sums.sigmoid_high[entry], sigmoid_high);
        atomic_add(&sums.more_low[entry], more_low);
    };
    add(kept[0], row * kReplicas + replica);
    add(kept[1], kReplicas * TILE + column);
    if (more_high != 0) {
        if (kept[0]) atomic_add(&sums.more_high[row], more_high);
        if (kept[1]) atomic_add(&sums.more_high[TILE + column], more_high);
    }
    return pack_word(kept[0], kept[1], positive, sigmoid);
}

// After a barrier: adds the tile's sums of this thread's entry to those of the anchor and clears them. Sums of references are
// dropped in the rectangular form: another part computes them.
DEVICE void select_end(const Pairs &pairs, TileIndex tile, SelectShared &shared, bool plain) {
    uint32_t entry = thread_index();
    uint32_t i = entry_index(tile, entry);
    for (int kind = plain ? 1 : 0; kind < 2; ++kind) {
        SelectSums &sums = shared.sums[kind];
        uint32_t low = take_sum(sums.more_low, entry), count = low >> kCountBit;
        if (count == 0) continue;
        uint32_t sigmoid_low = take_sum(sums.sigmoid_low, entry), sigmoid_high = take_sum(sums.sigmoid_high, entry);
        int64_t sigmoid = joined(sigmoid_low, sigmoid_high, kSigmoidBits);
        int64_t more = joined(low & ((1u << kCountBit) - 1), sums.more_high[entry], kMoreBits);
        int64_t softplus = sigmoid + more * shared.constants.more_unit;
        sums.more_high[entry] = 0;
        if (entry >= TILE && !pairs.square) continue;
        const MinedSums &of = kind == 0 ? pairs.positives : pairs.negatives;
        atomic_add(of.count + i, count);
        atomic_add(of.softplus + i, softplus);
        atomic_add(of.sigmoid + i, sigmoid);
    }
}

// Whether the tile has no pair of one class. Ranges ascend: its columns end before the first one or begin after the last.
DEVICE bool is_plain(const SelectShared &shared, TileIndex tile) {
    ClassRange first = shared.range[0], last = shared.range[TILE - 1];
    if (first.begin > first.end || last.begin > last.end) return false;  // some rows have no class
    return (tile.column + 1) * TILE <= first.begin || tile.column * TILE >= last.end;
}

// Candidates of a tile, in the pool from unit `segment` on; segment NO_ROW: not stored.
struct StoredTile {
    uint32_t count, segment;
};

struct SelectStoredShared : SelectShared {
    alignas(16) uint32_t words[SELECT_PLACES];  // similarities, replaced by words
    uint16_t places[SELECT_PLACES];
    alignas(16) uint32_t masks[THREADS][2];  // each thread's mask
    uint32_t before[THREADS];                // candidates of the threads before
    uint32_t warp_counts[THREADS / 32];
    StoredTile tiles[32];
    uint32_t end;  // end of the block's tiles
};
static_assert(sizeof(SelectStoredShared) == SELECT_STORED_SHARED_BYTES, "the launch plan's shared memory");

// Writes the places of this thread's candidates in the window, from the last one to the first.
template <class Layout, bool one_window>
DEVICE void expand(SelectStoredShared &shared, uint32_t window) {
    Layout layout;
    uint32_t first = layout.row_of(0) * TILE + layout.column_of(0), before = shared.before[thread_index()], at = before;
    for (uint32_t mask : shared.masks[thread_index()]) at += static_cast<uint32_t>(popc(mask));
    if (!one_window && (at <= window || before >= window + SELECT_PLACES)) return;
    at -= window;
    uint16_t *to = shared.places + (one_window ? at : 0);
#pragma unroll
    for (int word = 1; word >= 0; --word) {
#pragma unroll 1
        for (uint32_t left = shared.masks[thread_index()][word]; left != 0;) {
            // A thread's rows are 8 apart; its columns come in pairs, 8 apart.
            uint32_t bit = highest_bit(left), column = bit % Layout::columns;
            uint32_t row = (static_cast<uint32_t>(word) * (32 / Layout::columns) + bit % 32 / Layout::columns) * 8;
            auto place = static_cast<uint16_t>(first + row * TILE + column + column / 2 * 6);
            left ^= 1u << bit;
            if constexpr (one_window) {
                *--to = place;
            } else {
                if (--at < SELECT_PLACES) shared.places[at] = place;
            }
        }
    }
}

// Replaces similarities by words. A thread has an odd number of adjacent candidates: they are in few rows, which neighbouring
// threads mostly do not share, and lanes access different banks.
template <bool plain>
DEVICE void select_run(const Pairs &pairs, SelectStoredShared &shared, TileIndex tile, uint32_t count) {
    // In registers for plain tiles, which have most pairs.
    std::conditional_t<plain, const SelectConstants, const SelectConstants &> constants = shared.constants;
    uint32_t replica = thread_index() % kReplicas;
    opaque(replica);
    uint32_t run = ((count + THREADS - 1) / THREADS) | 1, k = thread_index() * run, end = k + run < count ? k + run : count;
#pragma unroll 1
    for (; k < end; ++k) {
        uint32_t place = shared.places[k];
        float s = float_of(shared.words[k]);
        shared.words[k] = place | select_pair<plain>(pairs, shared, constants, tile, place / TILE, place % TILE, s, replica);
    }
}

// Calls `job(k)` for every fourth k below `count`, by one thread each.
template <class Job>
DEVICE void each_granule(uint32_t count, Job job) {
#pragma unroll 1
    for (uint32_t k = thread_index() * 4; k < count; k += THREADS * 4) job(k);
}

// The tile after `tile` in the order of indices.
DEVICE TileIndex tile_after(const Pairs &pairs, TileIndex tile) {
    if (++tile.column == pairs.references.tiles) {
        ++tile.row;
        tile.column = pairs.square ? tile.row : 0;
    }
    return tile;
}

// Starts to copy the masks of a tile over those of the last one, which no thread reads any more; complete after the next wait,
// visible after a barrier.
DEVICE void copy_masks(const Pairs &pairs, SelectStoredShared &shared, uint32_t segment) {
    static_assert(TILE_MASK_WORDS == 2 * THREADS, "two words a thread");
    each_granule(TILE_MASK_WORDS, [&](uint32_t k) {
        cp_async(&shared.masks[0][0] + k, pairs.pool_words + segment_at(segment) + k);
    });
    cp_async_commit();
}

// Examines the candidates of a tile whose masks are in shared memory. `next`: the segment of the tile whose masks to copy next,
// or NO_ROW.
template <class Layout>
DEVICE void select_stored_tile(const Pairs &pairs, SelectStoredShared &shared, TileIndex tile, StoredTile stored, uint32_t next) {
    uint32_t count = stored.count;
    uint64_t segment = segment_at(stored.segment);
    SelectEntry known = select_entry(pairs, tile);  // loaded meanwhile
    uint32_t own = 0;
    for (uint32_t mask : shared.masks[thread_index()]) own += static_cast<uint32_t>(popc(mask));
    uint32_t before = warp_scan(own);
    if (lane_index() == 31) shared.warp_counts[warp_index()] = before;
    before -= own;
    select_begin(known, shared);
    block_sync();  // counts and bounds are written, the last tile's words and sums have been read
#pragma unroll
    for (uint32_t warp = 0; warp < THREADS / 32; ++warp) before += warp < warp_index() ? shared.warp_counts[warp] : 0;
    shared.before[thread_index()] = before;
    bool plain = is_plain(shared, tile);
    for (uint32_t window = 0; window < count; window += SELECT_PLACES) {
        uint32_t left = count - window < SELECT_PLACES ? count - window : SELECT_PLACES;
        if (window != 0) block_sync();  // the previous window's words have been read
        each_granule(left, [&](uint32_t k) { cp_async(shared.words + k, pairs.pool_values + segment + window + k); });
        cp_async_commit();
        if (count <= SELECT_PLACES) {
            expand<Layout, true>(shared, window);
        } else {
            expand<Layout, false>(shared, window);
        }
        cp_async_wait<0>();
        block_sync();
        if (left == count - window && next != NO_ROW) copy_masks(pairs, shared, next);
        if (plain) {
            select_run<true>(pairs, shared, tile, left);
        } else {
            select_run<false>(pairs, shared, tile, left);
        }
        cp_async_wait<0>();
        block_sync();  // all words and sums are written
        each_granule(left, [&](uint32_t k) {
            using Words = Granule<uint32_t>;
            *reinterpret_cast<Words *>(pairs.pool_words + segment + window + k) = *reinterpret_cast<const Words *>(shared.words + k);
        });
    }
    select_end(pairs, tile, shared, plain);
}

// Persistent blocks, each with consecutive tiles, of which it looks up 32 at once; while one is examined, the next one's masks
// are copied. Places come from the masks that the sweep wrote; similarities and words go through shared memory. `Layout` is the
// layout of the sweep's accumulators.
template <class Layout>
DEVICE void select_stored_body(const PairsParams &p) {
    SHARED_MEMORY(bytes);
    auto &shared = *reinterpret_cast<SelectStoredShared *>(bytes);
    const Pairs &pairs = p.pairs;
    auto index = static_cast<uint32_t>(pairs.tiles * block_x() / grid_x());
    if (thread_index() == 0) shared.end = static_cast<uint32_t>(pairs.tiles * (block_x() + 1) / grid_x());
    select_open(pairs, shared);
    TileIndex tile = tile_of(pairs, index);
    for (; index < shared.end; index += 32) {
        if (warp_index() == 0) {
            uint32_t own = index + lane_index();
            bool there = own < shared.end;
            shared.tiles[lane_index()] = there ? StoredTile{pairs.tile_counts[own], pairs.tile_segments[own]} : StoredTile{0, NO_ROW};
        }
        block_sync();
        StoredTile own = shared.tiles[lane_index()];
        uint32_t stored = ballot_sync(own.count != 0 && own.segment != NO_ROW);
        if (stored != 0) {
            copy_masks(pairs, shared, shared.tiles[lowest_bit(stored)].segment);
            cp_async_wait<0>();
        }
        block_sync();
#pragma unroll 1
        for (uint32_t k = 0; k < 32; ++k, tile = tile_after(pairs, tile)) {
            if ((stored >> k & 1) == 0) continue;
            uint32_t others = stored >> k >> 1;
            uint32_t next = others == 0 ? NO_ROW : shared.tiles[k + 1 + static_cast<uint32_t>(lowest_bit(others))].segment;
            select_stored_tile<Layout>(pairs, shared, tile, shared.tiles[k], next);
        }
        block_sync();  // shared.tiles may be written again
    }
}
KERNEL(select_stored, PairsParams, SELECT_BLOCKS) { select_stored_body<MmaLayout<4>>(p); }
KERNEL(select_stored_hopper, PairsParams, SELECT_BLOCKS) { select_stored_body<WgmmaLayout>(p); }

static_assert(SELECT_SHARED_BYTES + TILE * kValuesStride * sizeof(float) <= SIMILARITY_STAGES_BYTES,
              "the values of a tile fit into the stages of its product");

// Examines every pair of a recomputed tile. Its accumulators `acc` go through shared memory, in the place of the stages: a loop
// over registers would have to be unrolled, 64 times the code below.
template <class Layout, class Sums>
DEVICE void select_tile(const Pairs &pairs, TileIndex tile, unsigned char *bytes, const Sums &acc) {
    auto &shared = *reinterpret_cast<SelectShared *>(bytes);
    auto *values = reinterpret_cast<float *>(bytes + SELECT_SHARED_BYTES);  // [TILE, kValuesStride]
    Layout layout;
#pragma unroll
    for (int row = 0; row < Layout::rows; ++row) {
#pragma unroll
        for (int column = 0; column < Layout::columns; ++column) {
            values[layout.row_of(row) * kValuesStride + layout.column_of(column)] = Layout::value(acc, row, column);
        }
    }
    select_open(pairs, shared);
    select_begin(select_entry(pairs, tile), shared);
    const SelectConstants constants = shared.constants;
    block_sync();
    for (uint32_t k = thread_index(); k < TILE * TILE; k += THREADS) {
        uint32_t r = k / TILE, c = k % TILE;
        if (!is_pair(pairs, tile.row * TILE + r, tile.column * TILE + c)) continue;
        select_pair<false>(pairs, shared, constants, tile, r, c, values[r * kValuesStride + c], thread_index() % kReplicas);
    }
    block_sync();
    select_end(pairs, tile, shared, false);
}

// The block's tile, if it has candidates that were not stored; `multiply(acc, rows, columns, bytes)` recomputes S. Tiles come in
// the order of the sweep, whose rows stay in L2.
template <class Precision, class Layout, class Sums, class Multiply>
DEVICE void select_again(const PairsParams &p, Multiply multiply) {
    SHARED_MEMORY(bytes);
    const Pairs &pairs = p.pairs;
    TileIndex tile = tile_at(pairs, block_x());
    uint64_t index = index_of(pairs, tile.row, tile.column);
    if (pairs.tile_counts[index] == 0 || is_stored(pairs, index)) return;
    Sums acc;
    multiply(acc, tile_rows<Precision>(pairs.anchors, tile.row, pairs.stride),
             tile_rows<Precision>(pairs.references, tile.column, pairs.stride), bytes);
    select_tile<Layout>(pairs, tile, bytes, acc);
}

template <class Precision>
DEVICE void select_recomputed_body(const PairsParams &p) {
    using Sums = Accumulators<4>;
    select_again<Precision, MmaLayout<4>, Sums>(p, [&](Sums &acc, const void *rows, const void *columns, unsigned char *bytes) {
        multiply_tile<Precision, 4>(acc, rows, columns, stride_bytes<Precision>(p.pairs), bytes);
    });
}

// The same by wgmma, with the bits of sweep_hopper.
#ifdef HAS_WGMMA
template <class Precision>
DEVICE void select_recomputed_hopper_body(const PairsParams &p) {
    using Sums = WgmmaAccumulators;
    select_again<Precision, WgmmaLayout, Sums>(p, [&](Sums &acc, const void *rows, const void *columns, unsigned char *bytes) {
        auto stages = hopper_stages<Precision>(bytes);
        wgmma_multiply_tile<Precision>(acc, rows, columns, stride_bytes<Precision>(p.pairs), stages);
    });
}
#endif

KERNEL_IN_EVERY_PRECISION(select_recomputed, PairsParams)
HOPPER_KERNEL_IN_EVERY_PRECISION(select_recomputed_hopper, PairsParams)
