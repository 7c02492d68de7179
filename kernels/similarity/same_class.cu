// same_class.cu: m+ and the sums over positives of every anchor (SPEC 1).
// Truth: src/loss/similarity.rs. Launcher: src/backend/device/passes.rs.
//
// Rows are in class order, so that an anchor's class is a range of references and only tiles near the diagonal
// are computed. One block a row tile; a class may be the whole batch.
// same_class_hopper multiplies with wgmma, as sweep_hopper does, so that S has the same bits in all passes.
// Sync: integer atomics.

#include "pairs/pairs.cuh"
#include "tile/wgmma_tile.cuh"

// m+ and the sums of a block's rows over their classes, from accumulators in `Layout`. There is a sum for each row and quarter of
// the columns, so that sums are added in the same order for every layout.
template <class Layout>
struct SameSums {
    static constexpr int kSums = Layout::rows * Layout::quarters;
    const Pairs &pairs;
    uint32_t first;                  // first row of the block
    Layout layout;
    ClassRange range[Layout::rows];   // empty for padding and ignored rows
    float duplicate[Layout::rows];
    uint32_t self[Layout::rows];      // the row's own reference, or NO_ROW
    uint32_t low = 0, high = 0;      // begin and end of the classes of the warp's rows, which ascend
    float min_pos[kSums], sum_pos[kSums], sum_same[kSums];
    uint32_t count[kSums];

    explicit DEVICE SameSums(const Pairs &all) : pairs(all), first(block_x() * TILE) {
        uint32_t valid = pairs.counters->valid_anchors;
#pragma unroll
        for (int row = 0; row < Layout::rows; ++row) {
            uint32_t i = first + layout.row_of(row);
            range[row] = i < valid ? pairs.classes[i] : ClassRange{1, 0};
            duplicate[row] = pairs.anchors.duplicate[i];
            self[row] = pairs.square ? i : i < valid && pairs.identity != nullptr ? pairs.identity[i] : NO_ROW;
        }
        uint32_t top = first + layout.row_of(0) - lane_index() / 4, bottom = top + Layout::rows * 8;
        bottom = bottom < valid ? bottom : valid;
        if (top < bottom) {
            low = pairs.classes[top].begin;
            high = pairs.classes[bottom - 1].end;
        }
#pragma unroll
        for (int at = 0; at < kSums; ++at) {
            min_pos[at] = INFINITE;
            sum_pos[at] = sum_same[at] = 0.0f;
            count[at] = 0;
        }
    }

    // Adds the pairs with the references from `begin` on, laid out as in `Columns`; `duplicates` are their duplicate bounds.
    template <class Columns, class Sums>
    DEVICE void add(const Sums &acc, uint32_t begin, const float *duplicates) {
        Columns columns;
#pragma unroll
        for (int column = 0; column < Columns::columns; column += 2) {
            uint32_t from = begin + columns.offset(column), group = from - lane_index() % 4 * 2;
            if (group + 8 <= low || group >= high) continue;  // the same for the whole warp
            struct alignas(8) Two {
                float of[2];
            };
            Two bounds = *reinterpret_cast<const Two *>(duplicates + columns.offset(column));
#pragma unroll
            for (int row = 0; row < Layout::rows; ++row) {
                int at = row * Layout::quarters + Columns::quarter_of(column);
#pragma unroll
                for (int odd = 0; odd < 2; ++odd) {
                    uint32_t j = from + odd;
                    float s = Columns::value(acc, row, column + odd);
                    if (!same_class(range[row], j)) continue;
                    sum_same[at] += s;
                    if (j == self[row] || s >= fmaxf(duplicate[row], bounds.of[odd])) {
                        continue;  // as is_duplicate()
                    }
                    min_pos[at] = fminf(min_pos[at], s);
                    sum_pos[at] += s;
                    ++count[at];
                }
            }
        }
    }

    // Adds over the 4 lanes that share a row, then over the 4 quarters, and writes the results. `scratch` is free shared memory.
    DEVICE void write(unsigned char *scratch) {
        auto *parts = reinterpret_cast<RowSame *>(scratch);  // [4, TILE]
#pragma unroll
        for (int at = 0; at < kSums; ++at) {
            for (int mask = 1; mask <= 2; mask *= 2) {
                min_pos[at] = fminf(min_pos[at], shuffle_xor(min_pos[at], mask));
                sum_pos[at] += shuffle_xor(sum_pos[at], mask);
                sum_same[at] += shuffle_xor(sum_same[at], mask);
                count[at] += shuffle_xor(count[at], mask);
            }
            if (lane_index() % 4 == 0) {
                uint32_t quarter = layout.first_quarter() + at % Layout::quarters;
                parts[quarter * TILE + layout.row_of(at / Layout::quarters)] =
                    RowSame{min_pos[at], count[at], sum_pos[at], sum_same[at]};
            }
        }
        block_sync();
        uint32_t i = first + thread_index();
        uint32_t total = 0;
        if (thread_index() < TILE && i < pairs.anchors.count) {
            RowSame sum = parts[thread_index()];
            for (int quarter = 1; quarter < 4; ++quarter) {
                RowSame part = parts[quarter * TILE + thread_index()];
                sum.min_pos = fminf(sum.min_pos, part.min_pos);
                sum.count += part.count;
                sum.sum_pos += part.sum_pos;
                sum.sum_same += part.sum_same;
            }
            pairs.same[i] = sum;
            total = sum.count;
        }
        uint64_t warp_total = warp_sum(static_cast<uint64_t>(total));
        if (lane_index() == 0 && warp_total != 0) atomic_add(&pairs.counters->total_pos, warp_total);
    }
};

// The columns of a whole tile in `Layout`.
template <class Layout>
struct TileColumns : Layout {
    DEVICE uint32_t offset(int c) const { return Layout::column_of(c); }
    static DEVICE int quarter_of(int c) { return c * Layout::quarters / Layout::columns; }
};

// The range of references that has all classes of the block's rows: class ranges ascend with the rows, so the first and the last
// valid row bound it.
DEVICE ClassRange same_class_span(const Pairs &pairs) {
    uint32_t first = block_x() * TILE, valid = pairs.counters->valid_anchors;
    if (first >= valid) return ClassRange{0, 0};
    uint32_t last = (first + TILE < valid ? first + TILE : valid) - 1;
    return ClassRange{pairs.classes[first].begin, pairs.classes[last].end};
}

// Adds every tile of `span`: `multiply(acc, tile)` computes S with one and ends with a barrier. `duplicates` has room for the
// bounds of a tile.
template <class Layout, class Sums, class Multiply>
DEVICE void same_class_tiles(SameSums<Layout> &sums, ClassRange span, float *duplicates, Multiply multiply) {
    for (uint32_t tile = span.begin / TILE; tile < (span.end + TILE - 1) / TILE; ++tile) {
        block_sync();  // the previous tile's bounds have been read
        if (thread_index() < TILE) duplicates[thread_index()] = sums.pairs.references.duplicate[tile * TILE + thread_index()];
        Sums acc;
        multiply(acc, tile);
        sums.template add<TileColumns<Layout>>(acc, tile * TILE, duplicates);
    }
}

template <class Precision>
DEVICE void same_class_body(const PairsParams &p) {
    SHARED_MEMORY(stages);
    const Pairs &pairs = p.pairs;
    const void *rows = tile_rows<Precision>(pairs.anchors, block_x(), pairs.stride);
    auto *duplicates = reinterpret_cast<float *>(stages + SIMILARITY_STAGES_BYTES);  // [TILE]
    SameSums<MmaLayout<4>> sums(pairs);
    same_class_tiles<MmaLayout<4>, Accumulators<4>>(sums, same_class_span(pairs), duplicates, [&](Accumulators<4> &acc, uint32_t tile) {
        // One row tile at a time: the sums of the rows leave few registers.
        multiply_tile<Precision, 4, kStages, 1>(acc, rows, tile_rows<Precision>(pairs.references, tile, pairs.stride),
                                              stride_bytes<Precision>(pairs), stages);
    });
    sums.write(stages);
}

#ifdef HAS_WGMMA
// In the square form most classes end a few rows beyond the tile. Its rows are multiplied with themselves and with kEdge rows on
// either side in one walk along the inner dimension, whose stages hold the tile, then its edges.
constexpr uint32_t kEdge = 32;
static_assert(HOPPER_SHARED_BYTES + (TILE + 2 * kEdge) * sizeof(float) == SAME_CLASS_HOPPER_SHARED_BYTES,
              "the launch plan's shared memory");
constexpr uint32_t kNearStage = (TILE + 2 * kEdge) * STAGE_BYTES;
constexpr uint32_t kNearStages = 5, kNearAhead = kNearStages - 2;  // a stage is filled again two products after its own
static_assert(kNearStages * (kNearStage + sizeof(Barrier)) <= HOPPER_STAGES_BYTES);
using EdgeSums = float[8][4];
// An edge is a quarter of a neighbouring tile: the last quarter of the previous one or the first of the next (`behind`).
template <bool behind>
struct EdgeColumns : WgmmaLayout {
    static constexpr int columns = WgmmaLayout::columns / quarters;
    DEVICE uint32_t offset(int c) const { return column_of(c); }
    static DEVICE int quarter_of(int) { return behind ? 0 : quarters - 1; }
    static DEVICE float value(const EdgeSums &acc, int r, int c) { return acc[behind * 4 + c / 2][r * 2 + c % 2]; }
};
static_assert(EdgeColumns<false>::columns * 4 == kEdge && kEdge * WgmmaLayout::quarters == TILE);

// Products with the block's own tile, and with the rows before and behind it that are in `span`.
template <class Precision>
DEVICE void multiply_near(WgmmaAccumulators &acc, EdgeSums &edges, const Pairs &pairs, ClassRange span, unsigned char *bytes) {
    uint32_t tile = block_x(), count = static_cast<uint32_t>(stride_bytes<Precision>(pairs) / STAGE_BYTES);
    auto *barriers = reinterpret_cast<Barrier *>(bytes + kNearStages * kNearStage);
    if (thread_index() == 0) {
        for (uint32_t stage = 0; stage < kNearStages; ++stage) mbarrier_init(&barriers[stage], 1);
    }
    auto rows_of = [&](uint32_t index) {
        return static_cast<const unsigned char *>(tile_rows<Precision>(pairs.anchors, index, pairs.stride));
    };
    const unsigned char *own = rows_of(tile);
    // Rows of the edges that are needed, in multiples of eight; the rest of an edge is not initialised and its products not used.
    uint32_t first = tile * TILE, end = first + TILE;
    uint32_t before = span.begin < first ? (first - span.begin + 7) / 8 * 8 : 0;
    uint32_t behind = span.end > end ? (span.end - end + 7) / 8 * 8 : 0;
    const unsigned char *rows_before = before != 0 ? rows_of(tile - 1) + (TILE - before) * STAGE_BYTES : own;
    const unsigned char *rows_behind = behind != 0 ? rows_of(tile + 1) : own;
    auto copy = [&](uint32_t index) {
        if (index >= count || thread_index() != 0) return;
        uint64_t from = static_cast<uint64_t>(index) * TILE * STAGE_BYTES;
        unsigned char *stage = bytes + index % kNearStages * kNearStage, *edges_at = stage + (TILE + kEdge) * STAGE_BYTES;
        Barrier *full = &barriers[index % kNearStages];
        mbarrier_arrive_expect_tx(full, (TILE + before + behind) * STAGE_BYTES);
        cp_async_bulk(stage, own + from, TILE * STAGE_BYTES, full);
        if (before != 0) cp_async_bulk(edges_at - before * STAGE_BYTES, rows_before + from, before * STAGE_BYTES, full);
        if (behind != 0) cp_async_bulk(edges_at, rows_behind + from, behind * STAGE_BYTES, full);
    };
    clear(acc);
    clear(edges);
#pragma unroll 1
    for (uint32_t index = 0; index < kNearAhead; ++index) copy(index);
    warp_sync();
#pragma unroll 1
    for (uint32_t index = 0; index < count; ++index) {
        block_sync();  // the barriers are initialised, and both groups have read the stage that is filled next
        copy(index + kNearAhead);
        mbarrier_wait(&barriers[index % kNearStages], index / kNearStages % 2);
        warp_sync();
        const unsigned char *stage = bytes + index % kNearStages * kNearStage;
        Descriptor columns = k_major_descriptor(stage), edge = advance(columns, TILE * STAGE_BYTES);
        Descriptor rows = advance(columns, warp_index() / 4 * (TILE / 2) * STAGE_BYTES);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kGranules / 2; ++step) {
            wgmma<false>(Precision{}, acc, advance(rows, step * 32), advance(columns, step * 32));
            wgmma<false>(Precision{}, edges, advance(rows, step * 32), advance(edge, step * 32));
        }
        wgmma_commit();
        wgmma_wait<1>();  // the previous product is done, this one is running
    }
    wgmma_wait<0>();
    fence_accumulators(acc);
    fence_accumulators(edges);
    block_sync();
}

// The same by wgmma.
template <class Precision>
DEVICE void same_class_hopper_body(const PairsParams &p) {
    SHARED_MEMORY(bytes);
    const Pairs &pairs = p.pairs;
    auto *duplicates = reinterpret_cast<float *>(bytes + HOPPER_SHARED_BYTES);  // [kEdge + TILE + kEdge]
    SameSums<WgmmaLayout> sums(pairs);
    ClassRange span = same_class_span(pairs);
    uint32_t first = sums.first, end = first + TILE;
    bool near = pairs.square && span.begin < span.end && span.begin + kEdge >= first && span.end <= end + kEdge;
    if (near && !Precision::exact) {  // exact f32 has no registers for the sums of the edges
        if constexpr (!Precision::exact) {
            // Bounds of the rows before the tile, of its own, and of those behind it.
            if (thread_index() < TILE + 2 * kEdge) {
                uint32_t i = first - kEdge + thread_index();
                duplicates[thread_index()] = i < pairs.anchors.tiles * TILE ? pairs.anchors.duplicate[i] : 0.0f;
            }
            WgmmaAccumulators acc;
            EdgeSums edges;
            multiply_near<Precision>(acc, edges, pairs, span, bytes);
            sums.template add<EdgeColumns<false>>(edges, first - kEdge, duplicates);
            sums.template add<TileColumns<WgmmaLayout>>(acc, first, duplicates + kEdge);
            sums.template add<EdgeColumns<true>>(edges, end, duplicates + kEdge + TILE);
        }
    } else {
        auto stages = hopper_stages<Precision>(bytes);
        const void *rows = tile_rows<Precision>(pairs.anchors, block_x(), pairs.stride);
        same_class_tiles<WgmmaLayout, WgmmaAccumulators>(sums, span, duplicates, [&](WgmmaAccumulators &acc, uint32_t tile) {
            wgmma_multiply_tile<Precision>(acc, rows, tile_rows<Precision>(pairs.references, tile, pairs.stride),
                                         stride_bytes<Precision>(pairs), stages);
        });
    }
    sums.write(bytes);
}
#endif

KERNEL_IN_EVERY_PRECISION(same_class, PairsParams)
HOPPER_KERNEL_IN_EVERY_PRECISION(same_class_hopper, PairsParams)
