// hopper_roles.cuh: what the warp-specialised gradient kernels on Hopper share: 8 MMA warps (two warpgroups), 3 warps that build
// M, one that copies; all roles walk the same tiles.
#ifndef DDTAS_HOPPER_ROLES_CUH
#define DDTAS_HOPPER_ROLES_CUH

#include "tile/wgmma_tile.cuh"
#include "gradient/row_lists.cuh"

#ifdef HAS_WGMMA

constexpr uint32_t kPanelColumns = STAGE_BYTES / 2;
constexpr uint32_t kMatrixPart = TILE * TILE * 2;  // bytes of a tile of M, or of its high or low parts
constexpr uint32_t kMmaWarps = 8, kBuildWarps = 3;  // the last warp of the block copies
constexpr uint32_t kBuildThreads = kBuildWarps * 32;
constexpr uint32_t kBuildBarrier = 1, kMmaBarrier = 2;
static_assert((kMmaWarps + kBuildWarps + 1) * 32 == GRADIENT_HOPPER_THREADS, "the launch plan's threads");
static_assert(GRADIENT_ROWS_16BIT == TILE, "two warpgroups of 64 rows");

// A tile of the walk below, from which every role knows the tile's stages and matrix. `Roles` has the number of matrices, of
// parts in which S is recomputed, and of stages filled for a k block of such a part.
template <class Roles>
struct RolesWork {
    PairTile tile;
    uint32_t y;           // tile of the other side
    uint32_t count;       // candidates
    uint32_t segment;     // unit of the pool where they begin
    uint32_t index;       // number of tiles before this one
    uint32_t recomputed;  // how many of these are recomputed
    uint32_t fill;        // stages filled for tiles before this one
    bool stored;

    // Stages filled for this tile before those of R: for each recomputed part of S its k blocks, then one for its similarities.
    static DEVICE uint32_t part_fills(uint32_t k_blocks) { return k_blocks * Roles::k_block_fills + 1; }
    DEVICE uint32_t before_rows(uint32_t k_blocks) const { return stored ? 0 : Roles::parts * part_fills(k_blocks); }
    DEVICE uint32_t values(uint32_t k_blocks, uint32_t part) const { return fill + (part + 1) * part_fills(k_blocks) - 1; }
    DEVICE uint32_t matrix() const { return index % Roles::matrices; }
    DEVICE uint32_t matrix_parity() const { return index / Roles::matrices % 2; }
    // Whether M is [other side, own side], as its stored tile of S. From a recomputed tile M is built as [own side, other side].
    DEVICE bool transposed() const { return stored && tile.transposed; }
};

// The tiles that have candidates of the block's rows, in order. A warp looks up 32 tiles at once. `words`: with their counts and
// segments, which only the building warps need and have registers for.
template <class Roles, bool words>
struct RolesWalk {
    const GradientParams &p;
    uint32_t x, k_blocks, rows_fills, group, end;
    uint32_t left = 0, stored = 0;       // a bit for each tile of the group: has candidates and is not walked yet; is stored
    uint32_t counts = 0, segments = 0;   // those of the lane's tile
    RolesWork<Roles> work{};

    // `fills`: stages filled with R for a tile.
    DEVICE RolesWalk(const GradientParams &params, uint32_t row_tile, Range range, uint32_t fills)
        : p(params),
          x(row_tile),
          k_blocks(params.pairs.stride / kPanelColumns),
          rows_fills(fills),
          group(range.begin - 32),
          end(range.end) {}

    // Steps to the next tile, by the whole warp; false at the end.
    DEVICE bool next() {
        if (work.count != 0) {
            ++work.index;
            work.recomputed += !work.stored;
            work.fill += work.before_rows(k_blocks) + rows_fills;
        }
        while (left == 0) {
            group += 32;  // wraps around from below 0 at first
            if (static_cast<int32_t>(end - group) <= 0) return false;
            uint32_t y = group + lane_index();
            uint64_t index = y < end ? pair_tile(p.pairs, p.of_references, x, y).index : 0;
            uint32_t count = y < end ? p.pairs.tile_counts[index] : 0, segment = y < end ? p.pairs.tile_segments[index] : NO_ROW;
            left = ballot_sync(count != 0);
            stored = ballot_sync(segment != NO_ROW);
            if constexpr (words) {
                counts = count;
                segments = segment;
            }
        }
        int lane = lowest_bit(left);
        left &= left - 1;
        work.y = group + static_cast<uint32_t>(lane);
        work.tile = pair_tile(p.pairs, p.of_references, x, work.y);
        work.stored = stored >> lane & 1;
        work.count = 1;
        if constexpr (words) {
            work.count = shuffle(counts, lane);
            work.segment = shuffle(segments, lane);
        }
        return true;
    }
};

// The ring of stages: the stage of a fill, its barriers, and the parity of its phase.
template <class Shared>
constexpr uint32_t kStageCount = sizeof(Shared::full) / sizeof(Barrier);
template <class Shared>
DEVICE Barrier *full_of(Shared &shared, uint32_t fill) { return &shared.full[fill % kStageCount<Shared>]; }
template <class Shared>
DEVICE Barrier *empty_of(Shared &shared, uint32_t fill) { return &shared.empty[fill % kStageCount<Shared>]; }
template <class Shared>
DEVICE unsigned char *stage_of(Shared &shared, uint32_t fill) { return shared.stages[fill % kStageCount<Shared>]; }
template <class Shared>
DEVICE uint32_t parity_of(const Shared &, uint32_t fill) { return fill / kStageCount<Shared> % 2; }

// Called by the copying warp: waits until the stage of this fill is empty.
template <class Shared>
DEVICE void acquire_stage(Shared &shared, uint32_t fill) {
    constexpr uint32_t stages = kStageCount<Shared>;
    if (fill >= stages) mbarrier_wait(empty_of(shared, fill), parity_of(shared, fill - stages));
    warp_sync();
}

// Called by the copying warp: sets a matrix, with all its parts, to zeros; also for recomputed tiles, which overwrite all of it,
// so that every tile waits for the same barrier. A bulk copy of zeros would queue behind the copies of R.
template <class Shared>
DEVICE void zero_matrix(Shared &shared, uint32_t matrix) {
    using Zeros = Granule<uint32_t>;
    auto *to = reinterpret_cast<Zeros *>(shared.matrices[matrix]);
#pragma unroll 8
    for (uint32_t k = lane_index(); k < sizeof(shared.matrices[0]) / sizeof(Zeros); k += 32) to[k] = Zeros{};
    fence_proxy_async();
    warp_sync();
    arrive_as_warp(&shared.zeroed[matrix]);
}

template <class Shared>
DEVICE void begin_barriers(Shared &shared) {
    if (thread_index() == 0) {
        for (Barrier &barrier : shared.full) mbarrier_init(&barrier, 1);
        for (Barrier &barrier : shared.empty) mbarrier_init(&barrier, kMmaWarps);
        for (Barrier &barrier : shared.zeroed) mbarrier_init(&barrier, 1);
        for (Barrier &barrier : shared.built) mbarrier_init(&barrier, kBuildWarps);
        for (Barrier &barrier : shared.values_ready) mbarrier_init(&barrier, kMmaWarps);
    }
    block_sync();  // the barriers are initialised
}

// Index of a recomputed similarity in the stage of its part, which is `columns` wide; without bank conflicts in the rows that
// half a warp stores.
template <uint32_t columns>
DEVICE uint32_t value_index(uint32_t row, uint32_t column) { return row * columns + (column ^ row % 4 * 8); }

// Called by the MMA warps: writes `acc`, their similarities of a part of S, to the stage of fill `fill`.
template <uint32_t columns, class Shared>
DEVICE void publish_values(Shared &shared, const float (&acc)[columns / 8][4], uint32_t fill, Barrier *values_ready) {
    mbarrier_wait(full_of(shared, fill), parity_of(shared, fill));
    warp_sync();
    auto values = reinterpret_cast<float *>(stage_of(shared, fill));
    WgmmaLayout layout;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (uint32_t c = 0; c < columns / 4; ++c) {
            values[value_index<columns>(layout.row_of(r), layout.column_of(c))] = WgmmaLayout::value(acc, r, c);
        }
    }
    fence_proxy_async();  // bulk copies fill the stage next
    warp_sync();
    arrive_as_warp(values_ready);
}

// Builds M from a recomputed tile, a part of `columns` columns at a time: store(row, column, weight(anchor, reference, s)), or 0
// if there is no pair.
template <uint32_t columns, class Building, class Work, class Weight, class Store>
DEVICE void build_recomputed(const Building &my, const Work &work, uint32_t x, uint32_t k_blocks, Weight weight, Store store) {
    for (uint32_t part = 0; part < TILE / columns; ++part) {
        uint32_t fill = work.values(k_blocks, part);
        auto values = reinterpret_cast<const float *>(stage_of(my.shared, fill));
        mbarrier_wait(&my.shared.values_ready[part], work.recomputed % 2);
        warp_sync();
#pragma unroll 1
        for (uint32_t k = my.thread; k < TILE * columns; k += kBuildThreads) {
            uint32_t own = k / columns, other = part * columns + k % columns;
            PairRows pair = pair_rows(work.tile, x * TILE + own, work.y * TILE + other);
            bool any = is_pair(my.p.pairs, pair.anchor, pair.reference);
            store(own, other, any ? weight(pair.anchor, pair.reference, values[value_index<columns>(own, k % columns)]) : 0.0f);
        }
        fence_proxy_async();  // bulk copies fill the stage next
        warp_sync();
        named_sync(kBuildBarrier, kBuildThreads);  // the similarities have been read
        // The builders arrive for the MMA warps, since only they know when the values have been read.
        if (my.thread < kMmaWarps) mbarrier_arrive(empty_of(my.shared, fill));
        warp_sync();
    }
}

// Two adjacent columns of a thread.
struct alignas(8) ColumnPair {
    float values[2];
};

// Called by the MMA warps: writes `count` columns of their rows of row tile x to the result; `value(r, c)` is the sum of the
// thread's row r and column c.
template <int count, class Value>
DEVICE void write_rows(const GradientParams &p, uint32_t x, ColumnBlock columns, Value value) {
    WgmmaLayout layout;
    bool aligned = p.splits != 1 || (reinterpret_cast<uintptr_t>(p.gradient) | uint64_t{p.pairs.dim} * sizeof(float)) % sizeof(ColumnPair) == 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        ResultRow result = result_row(p, x * TILE + layout.row_of(r));
#pragma unroll
        for (int c = 0; c < count; c += 2) {
            uint32_t of_block = layout.column_of(c), column = columns.first + of_block;
            if (of_block >= columns.count || column >= result.columns) continue;
            ColumnPair pair{{value(r, c), value(r, c + 1)}};
            if (aligned) {
                *reinterpret_cast<ColumnPair *>(result.to + column) = pair;
            } else {
                result.to[column] = pair.values[0];
                if (column + 1 < result.columns) result.to[column + 1] = pair.values[1];
            }
        }
    }
}

// finish_splits() by the MMA warps only. `last` is in shared memory.
DEVICE void finish_multiplied(const GradientParams &p, uint32_t *last, uint32_t x) {
    constexpr uint32_t threads = kMmaWarps * 32;
    finish_splits(p, static_cast<uint64_t>(x) * TILE, TILE, kMmaWarps, [&](uint32_t *arrived, uint32_t blocks) {
        warp_sync();
        named_sync(kMmaBarrier, threads);
        if (some_lanes(thread_index() == 0)) *last = count_arrival(arrived) == blocks - 1;
        warp_sync();
        named_sync(kMmaBarrier, threads);
        return *last != 0;
    });
}

constexpr uint32_t kListsWarps = GRADIENT_HOPPER_THREADS / 32, kHopperListsRows = (TILE + kListsWarps - 1) / kListsWarps;
static_assert(LISTS_COLUMNS == GRADIENT_COLUMNS, "one grid for both");
constexpr uint32_t kHopperListsBytes = kListsWarps * kHopperListsRows * LISTS_COLUMNS * 4;

// A row tile whose gradient goes by lists; all warps do the same.
template <class Precision>
DEVICE void sum_by_lists(const GradientParams &p, unsigned char *bytes, uint32_t x) {
    gradient_lists<Precision, kListsWarps, kHopperListsRows>(p, bytes, x, 0);
    finish_splits(p, bytes, static_cast<uint64_t>(x) * TILE, TILE, GRADIENT_HOPPER_THREADS);
}

// The body of the kernels: runs each warp's role. `Kernel` has the layout of shared memory, the functions of the roles, the
// number of stages that R of a tile takes (`fills`), and the registers of a thread of the MMA warps and of the others.
template <class Kernel>
DEVICE void run_roles(const GradientParams &p) {
    SHARED_MEMORY(bytes);
    auto &shared = *reinterpret_cast<typename Kernel::Shared *>(bytes);
    uint32_t x = block_x();
    if (p.by_lists[x]) return sum_by_lists<typename Kernel::Precision>(p, bytes, x);
    ColumnBlock columns = column_block(p.pairs);
    begin_barriers(shared);
    Range range = split_range(other_side(p).tiles, block_z(), p.splits);
    uint32_t fills = Kernel::fills(columns.count), warp = shuffle(warp_index(), 0);
    RolesWalk<typename Kernel::Roles, false> walk(p, x, range, fills);
    if (warp >= kMmaWarps) {
        setmaxnreg_dec<Kernel::producer_registers>();
        if (warp == kMmaWarps + kBuildWarps) {
            Kernel::copy(p, shared, walk, columns);
        } else {
            Kernel::build(p, shared, RolesWalk<typename Kernel::Roles, true>(p, x, range, fills));
        }
    } else {
        setmaxnreg_inc<Kernel::mma_registers>();
        Kernel::multiply(p, shared, walk, columns);
        finish_multiplied(p, &shared.last, x);
    }
}

#endif
#endif
