// gradient_hopper_f32.cu: gradient_hopper.cu for exact f32, M and R as two f16 each.
// Truth: src/loss/gradient.rs, src/loss/reference.rs. Launcher: src/backend/device/passes.rs.
//
// The roles are the same. There are six stages of 16 KB: 32 of the other side's rows, 128 columns, both parts. A matrix is M's
// high parts and its low parts; there are two, one being built while the other is multiplied. The building warps compute weights
// from similarities and words, since a weight in a word would be too short. M's elements are scaled by a power of two, from the
// largest weight of the whole loss.
// For each tile and 128 columns the three products (m64n128k16) have sums of their own, which are then added in f32 arithmetic to
// those of the row tile: 64 and 128 registers a thread. S is recomputed 32 columns at a time.
// Sync: mbarriers (full, empty, zeroed, built, values_ready); all roles walk the same tiles.

#include "gradient/hopper_roles.cuh"

#ifdef HAS_WGMMA
namespace {

constexpr uint32_t kColumns = 128;                              // columns of R in a stage
constexpr uint32_t kDepth = 32;                                 // its rows
constexpr uint32_t kStagePanel = kDepth * STAGE_BYTES;          // 64 columns of these rows, high or low parts
constexpr uint32_t kStageBytes = kColumns / kPanelColumns * 2 * kStagePanel;
constexpr uint32_t kLineBytes = TILE * STAGE_BYTES;             // a tile's rows, 64 of the inner dimension, high or low parts
constexpr uint32_t kPartColumns = 32;                           // columns of S that are recomputed at a time
using MatrixPrecision = F16Rows;                                // the layout of M's high parts, and of its low parts
static_assert(kLineBytes <= kStageBytes && 2 * kPartColumns * STAGE_BYTES <= kStageBytes, "operands of S");
static_assert(TILE * kPartColumns * sizeof(float) == kStageBytes, "and its similarities");

struct RolesF32 {
    static constexpr uint32_t stages = GRADIENT_HOPPER_EXACT_STAGES, matrices = 2, parts = TILE / kPartColumns, k_block_fills = 3;
};
using Work = RolesWork<RolesF32>;
template <bool words>
using Walk = RolesWalk<RolesF32, words>;

struct GradientHopperExactShared {
    unsigned char stages[RolesF32::stages][kStageBytes];  // [columns / 64, high and low, kDepth, STAGE_BYTES]
    unsigned char matrices[RolesF32::matrices][2][kMatrixPart];
    Barrier full[RolesF32::stages], empty[RolesF32::stages];
    Barrier zeroed[RolesF32::matrices], built[RolesF32::matrices];
    Barrier values_ready[RolesF32::parts];  // the similarities of a part of a recomputed tile are in their stage
    uint32_t last, unused;            // whether this block is the last of its splits
};
static_assert(sizeof(GradientHopperExactShared) == GRADIENT_HOPPER_EXACT_SHARED_BYTES, "the launch plan's shared memory");
static_assert(kHopperListsBytes <= sizeof(GradientHopperExactShared), "in the place of the stages");

// The weight of a pair has a share of two rows, so it is at most twice the largest share.
DEVICE TileScale weight_scale(const Pairs &pairs) { return TileScale(pairs.counters->largest_weight + (1u << 23)); }

// The copying warp: for every tile the operands of S if it is recomputed, then R; zeros for the next tile's M.
DEVICE void copy_rows(const GradientParams &p, GradientHopperExactShared &shared, Walk<false> walk, ColumnBlock columns) {
    const Pairs &pairs = p.pairs;
    auto own_rows = static_cast<const unsigned char *>(tile_rows<ExactF32>(own_side(p), walk.x, pairs.stride));
    uint32_t fill = 0;
    auto begin_stage = [&](uint32_t bytes) {
        acquire_stage(shared, fill);
        if (lane_index() == 0) mbarrier_arrive_expect_tx(full_of(shared, fill), bytes);
        warp_sync();
    };
    // Fills a stage: each of the first `lanes` lanes copies `bytes` bytes from `from(lane)`.
    auto copy = [&](uint32_t lanes, uint32_t bytes, auto from) {
        begin_stage(lanes * bytes);
        if (lane_index() < lanes) {
            cp_async_bulk(stage_of(shared, fill) + lane_index() * bytes, from(lane_index()), bytes, full_of(shared, fill));
        }
        warp_sync();
        ++fill;
    };
    bool there = walk.next();
    if (there) zero_matrix(shared, walk.work.matrix());
    while (there) {
        Work work = walk.work;
        there = walk.next();
        auto rows = static_cast<const unsigned char *>(tile_rows<ExactF32>(other_side(p), work.y, pairs.stride));
        if (!work.stored) {
            for (uint32_t part = 0; part < RolesF32::parts; ++part) {
                constexpr uint32_t part_bytes = kPartColumns * STAGE_BYTES;
                for (uint32_t step = 0; step < walk.k_blocks; ++step) {
                    uint64_t high = static_cast<uint64_t>(step) * 2 * kLineBytes;
                    for (uint32_t low = 0; low < 2; ++low) {
                        copy(1, kLineBytes, [&](uint32_t) { return own_rows + high + low * kLineBytes; });
                    }
                    copy(2, part_bytes, [&](uint32_t lane) { return rows + high + lane * kLineBytes + part * part_bytes; });
                }
                begin_stage(0);  // for the similarities, which the MMA warps write
                ++fill;
            }
        }
        // The last product of the previous tile empties the stage before R's, and was the last to read the next tile's matrix.
        // When the ring has come round, acquiring a stage has waited for it; if R takes fewer stages, this waits below.
        uint32_t first = fill, at = walk.rows_fills < RolesF32::stages ? walk.rows_fills - 1 : RolesF32::stages - 1;
        for (uint32_t k = 0; k < walk.rows_fills; ++k) {
            uint32_t half = k / (TILE / kDepth), depth = k % (TILE / kDepth), left = columns.count - half * kColumns;
            uint32_t panels = left < kColumns ? left / kPanelColumns : kColumns / kPanelColumns;
            uint64_t line = (columns.first + half * kColumns) / kPanelColumns * 2;
            copy(panels * 2, kStagePanel, [&](uint32_t lane) { return rows + (line + lane) * kLineBytes + depth * kStagePanel; });
            if (k == at && there) {
                if (first > 0) mbarrier_wait(empty_of(shared, first - 1), parity_of(shared, first - 1));
                warp_sync();
                zero_matrix(shared, walk.work.matrix());
            }
        }
    }
}

// Arguments of the building warps.
struct Building {
    const GradientParams &p;
    GradientHopperExactShared &shared;
    uint32_t thread;  // among the building threads
    float scale;
    Argument positive, negative;

    DEVICE Building(const GradientParams &params, GradientHopperExactShared &memory)
        : p(params), shared(memory), thread(thread_index() - kMmaWarps * 32), scale(weight_scale(params.pairs).up),
          positive(argument_of(params.pairs.settings, true)), negative(argument_of(params.pairs.settings, false)) {}

    // Stores element (row, column) of a matrix, in the orientation of its tile of S.
    DEVICE void store(uint32_t matrix, uint32_t row, uint32_t column, float weight) const {
        Halves halves = split(weight * scale, 0.0f);
        uint32_t place = matrix_offset<MatrixPrecision>(row, column);
        *reinterpret_cast<uint16_t *>(shared.matrices[matrix][0] + place) = static_cast<uint16_t>(halves.high);
        *reinterpret_cast<uint16_t *>(shared.matrices[matrix][1] + place) = static_cast<uint16_t>(halves.low);
    }
    // As pair_weight(), for a candidate whose word has the anchors that keep it.
    DEVICE float weight(uint32_t row, uint32_t column, uint32_t word, float s) const {
        const Pairs &pairs = p.pairs;
        bool is_positive = word >> kPositive & 1;
        auto of = [&](const RowWeights &weights) { return is_positive ? -weights.pos_scale : weights.neg_scale; };
        float share = word >> kKeptByRow & 1 ? of(pairs.weights[row]) : 0.0f;
        if (word >> kKeptByColumn & 1) share += of(pairs.column_weights[column]);
        return share == 0.0f ? 0.0f : share * Logistic((is_positive ? positive : negative).at(s)).sigmoid();
    }
};

DEVICE void build_matrices(const GradientParams &p, GradientHopperExactShared &shared, Walk<true> walk) {
    constexpr uint32_t kAhead = 4;  // granules that a thread loads ahead
    Building my(p, shared);
    const Pairs &pairs = p.pairs;
    while (walk.next()) {
        const Work &work = walk.work;
        // Loaded while the matrix is waited for.
        Granule<uint32_t> words[kAhead];
        Granule<float> values[kAhead];
        uint64_t segment = segment_at(work.segment);
        uint32_t count = work.stored ? work.count : 0;
        auto load = [&](uint32_t a, uint32_t first) {
            if (first >= count) return;
            words[a] = *reinterpret_cast<const Granule<uint32_t> *>(pairs.pool_words + segment + first);
            values[a] = *reinterpret_cast<const Granule<float> *>(pairs.pool_values + segment + first);
        };
        constexpr uint32_t kApart = kBuildThreads * 4;
#pragma unroll
        for (uint32_t a = 0; a < kAhead; ++a) load(a, my.thread * 4 + a * kApart);
        mbarrier_wait(&shared.zeroed[work.matrix()], work.matrix_parity());  // zeroed, and no longer read
        warp_sync();
        if (!work.stored) {
            auto weight = [&](uint32_t anchor, uint32_t reference, float s) { return pair_weight(pairs, anchor, reference, s); };
            auto store = [&](uint32_t row, uint32_t column, float value) { my.store(work.matrix(), row, column, value); };
            build_recomputed<kPartColumns>(my, work, walk.x, walk.k_blocks, weight, store);
        }
        uint32_t first_row = (work.tile.transposed ? work.y : walk.x) * TILE,
                 first_column = (work.tile.transposed ? walk.x : work.y) * TILE;
#pragma unroll 1
        for (uint32_t begin = my.thread * 4; begin < count; begin += kAhead * kApart) {
#pragma unroll
            for (uint32_t a = 0; a < kAhead; ++a) {
                uint32_t first = begin + a * kApart;
#pragma unroll
                for (uint32_t k = 0; k < 4; ++k) {
                    if (first + k >= count) continue;
                    uint32_t word = words[a].values[k], row = word_index(word) / TILE, column = word_index(word) % TILE;
                    float weight = my.weight(first_row + row, first_column + column, word, values[a].values[k]);
                    my.store(work.matrix(), row, column, weight);
                    if (work.tile.diagonal) my.store(work.matrix(), column, row, weight);  // its tile of S has each pair once
                }
                load(a, first + kAhead * kApart);
            }
        }
        fence_proxy_async();
        warp_sync();
        arrive_as_warp(&shared.built[work.matrix()]);
    }
}

// Recomputes a part of a tile of S and writes the similarities to the stage after its operands. They have the bits of the sweep:
// either order of the operands gives the same.
DEVICE void recompute_values(GradientHopperExactShared &shared, Barrier *values_ready, uint32_t fill, uint32_t k_blocks, uint32_t group) {
    float acc[kPartColumns / 8][4];
    clear(acc);
#pragma unroll 1
    for (uint32_t step = 0; step < k_blocks; ++step, fill += RolesF32::k_block_fills) {
#pragma unroll 1
        for (uint32_t k = 0; k < RolesF32::k_block_fills; ++k) mbarrier_wait(full_of(shared, fill + k), parity_of(shared, fill + k));
        warp_sync();
        auto rows = [&](uint32_t k) { return k_major_descriptor(stage_of(shared, fill + k) + group * (TILE / 2) * STAGE_BYTES); };
        Descriptor columns = k_major_descriptor(stage_of(shared, fill + 2));
        add_split_products(acc, rows(0), rows(1), columns, advance(columns, kPartColumns * STAGE_BYTES), [] {});
#pragma unroll 1
        for (uint32_t k = 0; k < RolesF32::k_block_fills; ++k) arrive_as_warp(empty_of(shared, fill + k));
    }
    publish_values<kPartColumns>(shared, acc, fill, values_ready);
}

// The mixed products and the product of the high parts, for 16 of the other side's rows. `from_zero`: sums begin at 0.
template <bool transposed, bool from_zero>
DEVICE void multiply_parts(WgmmaAccumulators &sums, Descriptor m, Descriptor rows) {
    wgmma_f16<true, transposed, from_zero>(sums, advance(m, kMatrixPart), rows);
    wgmma_f16<true, transposed>(sums, m, advance(rows, kStagePanel));
    wgmma_f16<true, transposed>(sums, m, rows);
}

// A tile's product with 128 columns, whose stages begin at `fill`; `m` is the group's 64 rows of M's tile, or 64 columns if
// `transposed`.
template <bool transposed>
DEVICE void multiply_tile_columns(GradientHopperExactShared &shared, WgmmaAccumulators &sums, Descriptor m, uint32_t fill) {
#pragma unroll
    for (uint32_t k = 0; k < TILE; k += kDepth, ++fill) {
        mbarrier_wait(full_of(shared, fill), parity_of(shared, fill));
        warp_sync();
        Descriptor rows = mn_major_descriptor(stage_of(shared, fill), 2 * kStagePanel);
        // If M is not transposed, a panel has 64 of the inner dimension.
        auto at = [&](uint32_t inner) {
            return advance(m, transposed ? inner * STAGE_BYTES
                                         : inner / kPanelColumns * kPanelBytes<MatrixPrecision> + inner % kPanelColumns * 2);
        };
        wgmma_fence();
        if (k == 0) {
            multiply_parts<transposed, true>(sums, at(k), rows);
        } else {
            multiply_parts<transposed, false>(sums, at(k), rows);
        }
        multiply_parts<transposed, false>(sums, at(k + 16), advance(rows, 16 * STAGE_BYTES));
        wgmma_commit();
        if (k > 0) {
            wgmma_wait<1>();  // the previous product is done, this one is running
            arrive_as_warp(empty_of(shared, fill - 1));
        }
    }
    wgmma_wait<0>();
    fence_accumulators(sums);
    arrive_as_warp(empty_of(shared, fill - 1));
}

// The two MMA warpgroups: 64 rows each.
DEVICE void multiply_matrices(const GradientParams &p, GradientHopperExactShared &shared, Walk<false> walk, ColumnBlock columns) {
    constexpr int kHalves = GRADIENT_COLUMNS / kColumns;
    uint32_t group = shuffle(warp_index(), 0) / 4;  // by a shuffle, so that the compiler knows it to be uniform
    float down = weight_scale(p.pairs).down / kRowScale;
    WgmmaAccumulators totals[kHalves];
    auto each = [](auto use) {
#pragma unroll
        for (int column = 0; column < 16; ++column) {
#pragma unroll
            for (int i = 0; i < 4; ++i) use(column, i);
        }
    };
#pragma unroll
    for (auto &total : totals) each([&](int column, int i) { total[column][i] = 0.0f; });
    while (walk.next()) {
        const Work &work = walk.work;
        uint32_t fill = work.fill + work.before_rows(walk.k_blocks);
        if (!work.stored) {
#pragma unroll 1
            for (uint32_t part = 0; part < RolesF32::parts; ++part) {
                recompute_values(shared, &shared.values_ready[part], work.fill + part * Work::part_fills(walk.k_blocks), walk.k_blocks, group);
            }
        }
        mbarrier_wait(&shared.built[work.matrix()], work.matrix_parity());
        warp_sync();
        const unsigned char *matrix = shared.matrices[work.matrix()][0];
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            if (half * kColumns >= columns.count) continue;
            WgmmaAccumulators sums;
            if (work.transposed()) {
                Descriptor m = mn_major_descriptor(matrix + group * kPanelBytes<MatrixPrecision>, kPanelBytes<MatrixPrecision>);
                multiply_tile_columns<true>(shared, sums, m, fill);
            } else {
                multiply_tile_columns<false>(shared, sums, k_major_descriptor(matrix + group * (TILE / 2) * STAGE_BYTES), fill);
            }
            each([&](int column, int i) { totals[half][column][i] = fmaf(sums[column][i], down, totals[half][column][i]); });
            fill += TILE / kDepth;
        }
    }

    float one = one_or_nan(p.pairs);
    write_rows<kHalves * 32>(p, walk.x, columns, [&](int r, int c) { return WgmmaLayout::value(totals[c / 32], r, c % 32) * one; });
}

struct GradientHopperF32 {
    using Precision = ExactF32;
    using Roles = RolesF32;
    using Shared = GradientHopperExactShared;
    static constexpr int producer_registers = 72, mma_registers = 216;
    static DEVICE uint32_t fills(uint32_t columns) { return (columns + kColumns - 1) / kColumns * (TILE / kDepth); }
    static DEVICE void copy(const GradientParams &p, Shared &shared, Walk<false> walk, ColumnBlock columns) {
        copy_rows(p, shared, walk, columns);
    }
    static DEVICE void build(const GradientParams &p, Shared &shared, Walk<true> walk) { build_matrices(p, shared, walk); }
    static DEVICE void multiply(const GradientParams &p, Shared &shared, Walk<false> walk, ColumnBlock columns) {
        multiply_matrices(p, shared, walk, columns);
    }
};

}  // namespace
#endif

ROLE_KERNEL(gradient_hopper_f32, GradientParams, GRADIENT_HOPPER_THREADS) { HOPPER_ONLY(run_roles<GradientHopperF32>(p)); }
