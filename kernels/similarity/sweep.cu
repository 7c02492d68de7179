// sweep.cu: S = E E^T, tile by tile, never stored (SPEC 1, 3).
// Truth: src/loss/similarity.rs. Launcher: src/backend/device/passes.rs.
//
// sweep: m-, the count of the probe, and the candidates, which include every pair that mining can keep. One block a
//   tile; the square form has only the upper triangle, each tile serving its rows and its columns. On Hopper:
//   sweep_hopper.cu.
// Sync: integer atomics (max, add), whose order cannot change the result; candidates go to the tile's segment in
//   thread order.
// Cost: B^2 D operations, O(B) memory and the candidates.

#include "similarity/candidate_bits.cuh"

// Bounds of a tile's rows or columns: negatives above `candidate` are candidates, those above `probe` are counted.
struct SweepBounds {
    float candidate[TILE], probe[TILE];
};
template <int stages_bytes>
struct SweepShared {
    unsigned char stages[stages_bytes];
    SweepBounds rows, columns;
};
template <class Precision>
using SweepStages = SweepShared<kSharingStages<Precision> * 2 * TILE * STAGE_BYTES>;
static_assert(sizeof(SweepStages<F16Rows>) == SWEEP_SHARED_BYTES, "the launch plan's shared memory");
static_assert(sizeof(SweepStages<ExactF32>) == SWEEP_EXACT_SHARED_BYTES, "the launch plan's shared memory");

// Values reduced over the block, in the place of the stages after the product.
struct SweepReduction {
    uint32_t row_max[TILE];
    uint32_t column_max[TILE];
    uint32_t warp_counts[THREADS / 32];
    uint32_t probe;
    uint32_t segment;
};

// This thread's pairs above the bounds of their rows and of their columns. `use(row, column, s)` is called for each, from the
// last to the first.
template <class Layout, class Sums, class Use>
DEVICE AboveBits above_bounds(const float (&rows)[TILE], const float (&columns)[TILE], const Sums &acc, Use use) {
    Layout layout;
    AboveBits above;
#pragma unroll
    for (int row = Layout::rows - 1; row >= 0; --row) {
        float bound = rows[layout.row_of(row)];
#pragma unroll
        for (int column = Layout::columns - 1; column >= 0; --column) {
            float s = Layout::value(acc, row, column);
            above.add(row / kRowsOfWord<Layout>, s, bound, columns[layout.column_of(column)]);
            use(row, column, s);
        }
    }
    return above;
}

// Examines the pairs of a tile. `plain`: all of them are negatives, as in most tiles.
template <bool plain, class Layout, class Shared, class Sums>
DEVICE void sweep_epilogue(const Pairs &pairs, TileIndex tile, Shared &shared, const Sums &acc) {
    auto &reduction = *reinterpret_cast<SweepReduction *>(shared.stages);
    Layout layout;
    bool mirrored = pairs.square != 0;
    if (thread_index() < TILE) {
        reduction.row_max[thread_index()] = 0;
        reduction.column_max[thread_index()] = 0;
    }
    if (thread_index() == 0) reduction.probe = 0;
    block_sync();

    uint32_t negative[2] = {~0u, ~0u}, positive[2] = {0, 0};
    if constexpr (!plain) {
        classify<Layout>(pairs, tile.row * TILE, tile.column * TILE, pairs.counters->valid_anchors, pairs.counters->valid_references,
                        negative, positive);
    }
    const float none = -INFINITE;
    float column_max[Layout::columns], row_max = none;
#pragma unroll
    for (int column = 0; column < Layout::columns; ++column) column_max[column] = none;
    AboveBits above = above_bounds<Layout>(shared.rows.candidate, shared.columns.candidate, acc, [&](int row, int column, float s) {
        int bit = row % kRowsOfWord<Layout> * Layout::columns + column;
        if (!plain && !(negative[row / kRowsOfWord<Layout>] >> bit & 1u)) s = none;
        row_max = fmaxf(row_max, s);
        column_max[column] = fmaxf(column_max[column], s);
        if (column != 0) return;
        row_max = fmaxf(row_max, shuffle_xor(row_max, 1));
        row_max = fmaxf(row_max, shuffle_xor(row_max, 2));
        if (lane_index() % 4 == 0 && row_max > none) atomic_max(&reduction.row_max[layout.row_of(row)], ordered_key(row_max));
        warp_sync();
        row_max = none;
    });
#pragma unroll
    for (int column = 0; column < Layout::columns; ++column) {
        float largest = column_max[column];
        for (int mask = 4; mask <= 16; mask *= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
        if (mirrored && lane_index() < 4 && largest > none) {
            atomic_max(&reduction.column_max[layout.column_of(column)], ordered_key(largest));
        }
    }
    uint32_t candidates[2];
#pragma unroll
    for (int word = 0; word < 2; ++word) {
        candidates[word] = ((above.by_row[word] | above.by_column[word]) & negative[word]) | positive[word];
    }
    if (pairs.settings.probe != pairs.settings.candidate) {
        above = above_bounds<Layout>(shared.rows.probe, shared.columns.probe, acc, [](int, int, float) {});
    }
    uint32_t probe = warp_sum(above.count(negative, mirrored));
    if (lane_index() == 0 && probe != 0) atomic_add(&reduction.probe, probe);

    // This thread's place in the segment: a scan over the warp, then over the warps.
    uint32_t count = static_cast<uint32_t>(popc(candidates[0]) + popc(candidates[1]));
    uint32_t before = warp_scan(count);
    if (lane_index() == 31) reduction.warp_counts[warp_index()] = before;
    before -= count;
    block_sync();
    uint32_t total = 0;
    for (uint32_t warp = 0; warp < THREADS / 32; ++warp) {
        if (warp == warp_index()) before += total;
        total += reduction.warp_counts[warp];
    }

    if (thread_index() < TILE) {
        uint32_t i = tile.row * TILE + thread_index(), j = tile.column * TILE + thread_index();
        uint32_t row_key = reduction.row_max[thread_index()], column_key = reduction.column_max[thread_index()];
        if (row_key != 0) atomic_max(&pairs.max_neg[i], row_key);
        if (column_key != 0) atomic_max(&pairs.max_neg[j], column_key);
    }
    if (thread_index() == 0) {
        if (reduction.probe != 0) atomic_add(&pairs.counters->probe_neg, static_cast<uint64_t>(reduction.probe));
        reduction.segment = place_candidates(pairs, index_of(pairs, tile.row, tile.column), total);
    }
    if (total == 0) return;
    block_sync();
    if (reduction.segment == NO_ROW) return;
    uint64_t segment = segment_at(reduction.segment);
    uint32_t *masks = pairs.pool_words + segment + thread_index() * 2;
    masks[0] = candidates[0];
    masks[1] = candidates[1];
    float *to = pairs.pool_values + segment + before;
#pragma unroll
    for (int row = 0; row < Layout::rows; ++row) {
#pragma unroll
        for (int column = 0; column < Layout::columns; ++column) {
            int bit = row % kRowsOfWord<Layout> * Layout::columns + column;
            if (candidates[row / kRowsOfWord<Layout>] >> bit & 1u) *to++ = Layout::value(acc, row, column);
        }
    }
    // Values are read four at a time.
    if (thread_index() == THREADS - 1) {
        for (; total % 4 != 0; ++total) *to++ = 0;
    }
}

// Writes the bounds of the tile's rows and columns to shared memory; the barriers of the product publish them.
template <class Shared>
DEVICE void sweep_begin(const Pairs &pairs, TileIndex tile, Shared &shared) {
    bool is_row = thread_index() < TILE;
    uint32_t at = thread_index() % TILE, valid_anchors = pairs.counters->valid_anchors;
    float min_pos = is_row ? row_min_pos(pairs, valid_anchors, tile.row * TILE + at)
                           : column_min_pos(pairs, valid_anchors, pairs.counters->valid_references, tile.column * TILE + at);
    SweepBounds &bounds = is_row ? shared.rows : shared.columns;
    bounds.candidate[at] = negative_bound(min_pos, pairs.settings.candidate);
    bounds.probe[at] = negative_bound(min_pos, pairs.settings.probe);
}

// A tile whose rows or whose columns are all ignored has no pairs and is not multiplied. The whole block gets the same answer.
DEVICE bool sweep_leaves_out(const Pairs &pairs, TileIndex tile) {
    if (tile.row * TILE < pairs.counters->valid_anchors && tile.column * TILE < pairs.counters->valid_references) return false;
    if (thread_index() == 0) place_candidates(pairs, index_of(pairs, tile.row, tile.column), 0);
    return true;
}

template <class Layout, class Shared, class Sums>
DEVICE void sweep_end(const Pairs &pairs, TileIndex tile, Shared &shared, const Sums &acc) {
    // Ranges ascend: the tile is free of positives if its columns end before the first range or begin after the last.
    uint32_t first = tile.column * TILE, end = first + TILE;
    bool complete = (tile.row + 1) * TILE <= pairs.counters->valid_anchors && end <= pairs.counters->valid_references;
    const ClassRange *classes = pairs.classes + tile.row * TILE;
    if (complete && (end <= classes[0].begin || first >= classes[TILE - 1].end)) {
        sweep_epilogue<true, Layout>(pairs, tile, shared, acc);
    } else {
        sweep_epilogue<false, Layout>(pairs, tile, shared, acc);
    }
}

template <class Precision>
DEVICE void sweep_body(const PairsParams &p) {
    SHARED_MEMORY(bytes);
    auto &shared = *reinterpret_cast<SweepStages<Precision> *>(bytes);
    const Pairs &pairs = p.pairs;
    TileIndex tile = tile_at(pairs, block_x());
    if (sweep_leaves_out(pairs, tile)) return;
    sweep_begin(pairs, tile, shared);
    Accumulators<4> acc;
    multiply_tile<Precision, 4, kSharingStages<Precision>>(acc, tile_rows<Precision>(pairs.anchors, tile.row, pairs.stride),
                                                       tile_rows<Precision>(pairs.references, tile.column, pairs.stride),
                                                       stride_bytes<Precision>(pairs), shared.stages);
    sweep_end<MmaLayout<4>>(pairs, tile, shared, acc);
}

KERNEL_OF_16BIT_BLOCKS(sweep, PairsParams, 2)
