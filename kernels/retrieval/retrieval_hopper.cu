// retrieval_hopper.cu: retrieval.cu on Hopper (sm_90a).
// Truth: a full sort (cases/src/run.rs). Launcher: src/backend/device/retrieval.rs.
//
// A block compares a query tile with its share of the references' tiles. One thread copies; one or two teams run mainloop and
// epilogue in ping-pong (ping_pong.cuh). A warp has 16 rows of its team's tiles, and a list for each row (query_lists.cuh).

#include "pairs/tile_order.cuh"
#include "retrieval/query_lists.cuh"
#include "tile/ping_pong.cuh"

#ifdef HAS_WGMMA

template <class Precision>
struct RetrievalHopperShared {
    unsigned char rows[SWEEP_HOPPER_RESIDENT][kStageBytes];  // the query tile, or stages for it
    unsigned char columns[kTeamStages<Precision>][kStageBytes];
    Barrier full[kTeamBarriers<Precision>], empty[kTeamBarriers<Precision>];
    Barrier order[kTeams<Precision>];
};
static_assert(sizeof(RetrievalHopperShared<F16Rows>) == RETRIEVAL_HOPPER_SHARED_BYTES, "the launch plan's shared memory");
static_assert(sizeof(RetrievalHopperShared<ExactF32>) == RETRIEVAL_HOPPER_EXACT_SHARED_BYTES, "the launch plan's shared memory");

// The block's tiles in order; every role has its own walk.
struct RetrievalWalk {
    const RetrievalParams &p;
    SearchedTiles tiles;
    TileIndex tile;
    uint32_t tiles_before = NO_ROW;  // number of tiles before this one; NO_ROW before the first next()

    explicit DEVICE RetrievalWalk(const RetrievalParams &of) : p(of), tiles(of), tile{of.first_tile + block_x(), tiles.first - 1} {}
    template <class Precision>
    DEVICE const unsigned char *rows() const {
        return searched_rows(p.queries, tile.row, static_cast<uint64_t>(p.stride) * Precision::stored_bytes);
    }
    template <class Precision>
    DEVICE const unsigned char *columns() const {
        return searched_rows(p.references, tile.column, static_cast<uint64_t>(p.stride) * Precision::stored_bytes);
    }
    DEVICE uint32_t k_blocks() const { return p.stride / (STAGE_BYTES / 2); }
    DEVICE uint32_t filled() const { return tiles_before * k_blocks(); }
    DEVICE bool resident() const { return k_blocks() <= SWEEP_HOPPER_RESIDENT; }
    DEVICE bool next() {
        ++tiles_before;
        return ++tile.column < tiles.end;
    }
};
template <class Precision>
DEVICE void retrieval_hopper_body(const RetrievalParams &p) {
    SHARED_MEMORY(bytes);
    auto &shared = *reinterpret_cast<RetrievalHopperShared<Precision> *>(bytes);
    if (thread_index() == 0) begin_teams(shared);
    block_sync();  // the barriers are initialised
    RetrievalWalk walk(p);
    divide_roles<Precision>(
        [&](uint32_t warp) {
            if (warp == 0) copy_operands<Precision>(shared, walk, [](RetrievalWalk &to) { return to.next(); });
        },
        [&](uint32_t index) {
            TeamWarp team{index};
            QueryLists<WgmmaLayout> lists(p, team.team);
            while (walk.next()) {
                if (walk.tiles_before % kTeams<Precision> != team.team) continue;
                WgmmaAccumulators acc;
                team.multiply<Precision>(acc, shared, walk, [] {});
                lists.add_tile(acc, walk.tile.column);
            }
            lists.finish();
        });
}
#endif

ROLE_KERNEL(retrieval_hopper_f32, RetrievalParams, SWEEP_HOPPER_EXACT_THREADS) { HOPPER_ONLY(retrieval_hopper_body<ExactF32>(p)); }
ROLE_KERNEL(retrieval_hopper_f16, RetrievalParams, SWEEP_HOPPER_THREADS) { HOPPER_ONLY(retrieval_hopper_body<F16Rows>(p)); }
ROLE_KERNEL(retrieval_hopper_bf16, RetrievalParams, SWEEP_HOPPER_THREADS) { HOPPER_ONLY(retrieval_hopper_body<Bf16Rows>(p)); }
