// ping_pong.cuh: warp-specialised products of a walk over tiles on Hopper (sm_90a); for sweep_hopper.cu and retrieval_hopper.cu.
//
// The row tile stays in shared memory while the walk is in its row (up to 512 dimensions; for wider rows both operands are
// streamed). One producer thread copies it and the column tiles, in stages of 16 KB. The consumers are two teams of two
// warpgroups in ping-pong: one team runs its mainloop while the other runs its epilogue, so that the tensor cores do not wait for
// epilogues. A team begins when the other has issued all its products (barrier `order`). It skips the other team's stages, and by
// the parity of `full` alone it could mistake a phase for the one two later.
// Exact f32 has registers for one team only; one of its warpgroups multiplies while the other adds products. The high parts of
// the row tile stay; its low parts and the columns' parts have stages of their own, three for every 64 dimensions.
//
// A block's shared memory has `rows`, the row tile or stages for it, then `columns`, and the barriers `full`, `empty` and
// `order`. A walk has its tile's rows and columns, the number of tiles before it, and the number of k blocks (64 dimensions) of a
// tile.
#ifndef DDTAS_PING_PONG_CUH
#define DDTAS_PING_PONG_CUH

#include "tile/wgmma_tile.cuh"

#ifdef HAS_WGMMA

constexpr uint32_t kStageBytes = TILE * STAGE_BYTES;
constexpr uint32_t kTeamWarps = 8, kTeamThreads = kTeamWarps * 32;
template <class Precision>
constexpr uint32_t kTeams = Precision::exact ? 1 : 2;
template <class Precision>
constexpr uint32_t kTeamStages = Precision::exact ? SWEEP_HOPPER_EXACT_STAGES : SWEEP_HOPPER_STAGES;
// For split rows that do not fit, all of `rows` and `columns` are stages.
template <class Precision>
constexpr uint32_t kTeamBarriers = kTeamStages<Precision> + (Precision::exact ? SWEEP_HOPPER_RESIDENT : 0);
static_assert(SWEEP_HOPPER_STAGES <= SWEEP_HOPPER_RESIDENT, "stages of rows are in the place of the row tile");

// Initialises the barriers; called by one thread.
template <class Shared>
DEVICE void begin_teams(Shared &shared) {
    for (Barrier &barrier : shared.full) mbarrier_init(&barrier, 1);
    for (Barrier &barrier : shared.empty) mbarrier_init(&barrier, kTeamWarps);
    for (Barrier &barrier : shared.order) mbarrier_init(&barrier, kTeamWarps);
}

// The ring of stages of split rows: behind the resident row tile, or in all of the memory.
struct SplitStages {
    bool resident;
    uint32_t count, fill = 0, stage = 0, parity = 0;

    explicit DEVICE SplitStages(bool rows_stay)
        : resident(rows_stay), count(SWEEP_HOPPER_EXACT_STAGES + (rows_stay ? 0 : SWEEP_HOPPER_RESIDENT)) {}
    // Stages of a k block: the columns' low parts, their high parts, the rows' low parts; before these the rows' high parts, if
    // they are not resident.
    DEVICE uint32_t parts() const { return resident ? 3 : 4; }
    // Moves to the first stage after `filled` k blocks.
    DEVICE void begin(uint32_t filled) {
        fill = filled * parts();
        stage = fill % count;
        parity = fill / count % 2;
    }
    // Byte offset of stage `at` from the beginning of `rows`.
    DEVICE uint32_t offset(uint32_t at) const { return (at + (resident ? SWEEP_HOPPER_RESIDENT : 0)) * kStageBytes; }
    DEVICE void step() {
        ++fill;
        if (++stage == count) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// The producer thread for split rows. For the first tile of a row it copies the row tile's high parts with the columns' low
// parts.
template <class Shared, class Walk, class Next>
DEVICE void copy_split_operands(Shared &shared, Walk walk, Next next) {
    uint32_t have = NO_ROW;
    SplitStages stages(walk.resident());
    auto wait_until_empty = [&](uint32_t fill) { mbarrier_wait(&shared.empty[fill % stages.count], fill / stages.count % 2); };
    auto copy = [&](const unsigned char *from, uint32_t more) {
        if (stages.fill >= stages.count) wait_until_empty(stages.fill - stages.count);
        Barrier *full = &shared.full[stages.stage];
        mbarrier_arrive_expect_tx(full, kStageBytes + more);
        cp_async_bulk(shared.rows[0] + stages.offset(stages.stage), from, kStageBytes, full);
        stages.step();
        return full;
    };
    while (next(walk)) {
        const unsigned char *rows = walk.template rows<ExactF32>(), *columns = walk.template columns<ExactF32>();
        bool with_rows = stages.resident && walk.tile.row != have;
        have = walk.tile.row;
        // As in copy_operands(): if a tile has no more stages than the ring, all of them are waited for.
        if (with_rows && walk.k_blocks() * stages.parts() <= stages.count) {
            for (uint32_t back = 1; back <= stages.count && back <= stages.fill; ++back) wait_until_empty(stages.fill - back);
        }
        for (uint32_t k = 0; k < walk.k_blocks(); ++k) {
            const unsigned char *high_rows = rows + 2 * k * kStageBytes, *high_columns = columns + 2 * k * kStageBytes;
            if (!stages.resident) copy(high_rows, 0);
            Barrier *full = copy(high_columns + kStageBytes, with_rows ? kStageBytes : 0);
            if (with_rows) cp_async_bulk(shared.rows[k], high_rows, kStageBytes, full);
            copy(high_columns, 0);
            copy(high_rows + kStageBytes, 0);
        }
    }
}

// The producer thread. With the stages of the first tile of a row it copies the row tile, which then stays for the others.
// `next(walk)` steps to the next tile and returns whether there is one.
template <class Precision, class Shared, class Walk, class Next>
DEVICE void copy_operands(Shared &shared, Walk walk, Next next) {
    if constexpr (Precision::exact) return copy_split_operands(shared, walk, next);
    uint32_t have = NO_ROW;
    bool resident = walk.resident();
    auto wait_until_empty = [&](uint32_t fill) {
        mbarrier_wait(&shared.empty[fill % SWEEP_HOPPER_STAGES], fill / SWEEP_HOPPER_STAGES % 2);
    };
    while (next(walk)) {
        const unsigned char *rows = walk.template rows<Precision>(), *columns = walk.template columns<Precision>();
        bool both = !resident || walk.tile.row != have;
        have = walk.tile.row;
        // A part of the row tile is overwritten after the products that read it. These are done if the stage of this k block is
        // empty, since the previous tile has then come at least as far; unless a tile has fewer k blocks than there are stages.
        if (resident && both && walk.k_blocks() < SWEEP_HOPPER_STAGES) {
            uint32_t filled = walk.filled();
            for (uint32_t back = 1; back <= SWEEP_HOPPER_STAGES && back <= filled; ++back) wait_until_empty(filled - back);
        }
        for (uint32_t k = 0; k < walk.k_blocks(); ++k) {
            uint32_t fill = walk.filled() + k, stage = fill % SWEEP_HOPPER_STAGES;
            if (fill >= SWEEP_HOPPER_STAGES) wait_until_empty(fill - SWEEP_HOPPER_STAGES);
            mbarrier_arrive_expect_tx(&shared.full[stage], both ? 2 * kStageBytes : kStageBytes);
            cp_async_bulk(shared.columns[stage], columns + k * kStageBytes, kStageBytes, &shared.full[stage]);
            if (both) {
                cp_async_bulk(shared.rows[resident ? k : stage], rows + k * kStageBytes, kStageBytes, &shared.full[stage]);
            }
        }
    }
}

// The operand that begins `granules` granules of 16 bytes further on. Only the lower half of the descriptor changes: the address
// field does not overflow.
DEVICE Descriptor advance_granules(Descriptor descriptor, uint32_t granules) {
    return descriptor >> 32 << 32 | static_cast<uint32_t>(static_cast<uint32_t>(descriptor) + granules);
}

// Runs each warp's role: the teams' warps call `run(team)` and take registers from the others, of which one thread each calls
// `serve(warp)`.
template <class Precision, class Serve, class Run>
DEVICE void divide_roles(Serve serve, Run run) {
    constexpr uint32_t team_warps = kTeams<Precision> * kTeamWarps;
    uint32_t warp = shuffle(warp_index(), 0);
    if (warp >= team_warps) {
        setmaxnreg_dec<Precision::exact ? 40 : 32>();
        if (lane_index() == 0) serve(warp - team_warps);
    } else {
        setmaxnreg_inc<Precision::exact ? 232 : 112>();
        run(warp / kTeamWarps);
    }
}

// A warp of a team.
struct TeamWarp {
    uint32_t team;
    uint32_t warp = shuffle(warp_index(), 0) % kTeamWarps;

    // acc = the products of the walk's tile. `meanwhile()` is called while the last ones are running; exact f32 after them.
    template <class Precision, class Shared, class Walk, class Meanwhile>
    DEVICE void multiply(WgmmaAccumulators &acc, Shared &shared, const Walk &walk, Meanwhile meanwhile) const {
        clear(acc);
        if constexpr (Precision::exact) {
            multiply_split(acc, shared, walk);
            return meanwhile();
        } else {
            multiply_in_turn<Precision>(acc, shared, walk, meanwhile);
        }
    }

  private:
    template <class Shared, class Walk>
    DEVICE void multiply_split(WgmmaAccumulators &acc, Shared &shared, const Walk &walk) const {
        SplitStages stages(walk.resident());
        stages.begin(walk.filled());
        uint32_t own = warp / 4 * (TILE / 2) * STAGE_BYTES;
        Descriptor first = k_major_descriptor(shared.rows[0]);
        auto at = [&](uint32_t bytes) { return advance_granules(first, bytes / 16); };
        auto take = [&] {
            mbarrier_wait(&shared.full[stages.stage], stages.parity);
            warp_sync();
            uint32_t taken = stages.stage;
            stages.step();
            return taken;
        };
#pragma unroll 1
        for (uint32_t k = 0; k < walk.k_blocks(); ++k) {
            uint32_t high_rows = stages.resident ? k : take(), low_columns = take(), high_columns = take(), low_rows = take();
            Descriptor a_high = at((stages.resident ? k * kStageBytes : stages.offset(high_rows)) + own);
            add_split_products(acc, a_high, at(stages.offset(low_rows) + own), at(stages.offset(high_columns)),
                               at(stages.offset(low_columns)), [&] {
                                   arrive_as_warp(&shared.empty[low_columns]);
                                   arrive_as_warp(&shared.empty[low_rows]);
                               });
            arrive_as_warp(&shared.empty[high_columns]);
            if (!stages.resident) arrive_as_warp(&shared.empty[high_rows]);
        }
    }

    template <class Precision, class Shared, class Walk, class Meanwhile>
    DEVICE void multiply_in_turn(WgmmaAccumulators &acc, Shared &shared, const Walk &walk, Meanwhile meanwhile) const {
        // Once the other team has issued its products, all its stages have been filled, and this team's are next.
        uint32_t own = walk.tiles_before / kTeams<Precision>;
        if (walk.tiles_before > 0) mbarrier_wait(&shared.order[team], team == 0 ? (own - 1) % 2 : own % 2);
        warp_sync();
        bool resident = walk.resident();
        Descriptor first_rows = k_major_descriptor(shared.rows[0] + warp / 4 * (TILE / 2) * STAGE_BYTES);
        Descriptor first_columns = k_major_descriptor(shared.columns[0]);
        uint32_t stage = walk.filled() % SWEEP_HOPPER_STAGES, parity = walk.filled() / SWEEP_HOPPER_STAGES % 2;
#pragma unroll 8
        for (uint32_t k = 0; k < walk.k_blocks(); ++k) {
            mbarrier_wait(&shared.full[stage], parity);
            warp_sync();
            Descriptor rows = advance_granules(first_rows, (resident ? k : stage) * (kStageBytes / 16));
            Descriptor columns = advance_granules(first_columns, stage * (kStageBytes / 16));
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kGranules / 2; ++step) {
                wgmma<false>(Precision{}, acc, advance_granules(rows, step * 2), advance_granules(columns, step * 2));
            }
            wgmma_commit();
            if (k > 0) {
                wgmma_wait<1>();  // the previous product is done, this one is running
                arrive_as_warp(&shared.empty[(stage + SWEEP_HOPPER_STAGES - 1) % SWEEP_HOPPER_STAGES]);
            }
            if (++stage == SWEEP_HOPPER_STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
        arrive_as_warp(&shared.order[team ^ 1]);
        meanwhile();
        wgmma_wait<0>();
        fence_accumulators(acc);
        arrive_as_warp(&shared.empty[(stage + SWEEP_HOPPER_STAGES - 1) % SWEEP_HOPPER_STAGES]);
    }
};

#endif
#endif
