// sweep_hopper.cu: the sweep of sweep.cu on Hopper (sm_90a).
// Truth: src/loss/similarity.rs. Launcher: src/backend/device/passes.rs.
//
// Persistent, warp-specialised blocks, each with contiguous runs of the tiles of S. One thread copies the operands, one or two
// teams run mainloop and epilogue in ping-pong (ping_pong.cuh), and a thread for each team stores its candidates.
// Candidates are bits, two words a thread. Their values are packed in shared memory by predicated stores and written by one bulk
// store, so that their number costs next to nothing.
// Sync: mbarriers, and a named barrier for each team; integer atomics (max, add), whose order cannot change the result.

#include "similarity/candidate_bits.cuh"
#include "tile/ping_pong.cuh"

#ifdef HAS_WGMMA

static_assert((kTeams<F16Rows> * kTeamWarps + 4) * 32 == SWEEP_HOPPER_THREADS, "the launch plan's threads");
static_assert((kTeams<ExactF32> * kTeamWarps + 4) * 32 == SWEEP_HOPPER_EXACT_THREADS, "the launch plan's threads");

// Bounds of two columns: negatives above `candidate` are candidates, those above `max_neg` raise m-.
struct alignas(16) TwoColumns {
    float candidate[2], max_neg[2];
};

// The tile whose candidates are staged, and their number. Row NO_ROW ends the storing thread.
struct StagedTile {
    TileIndex tile;
    uint32_t total;
};

template <class Precision>
struct SweepHopperShared {
    static constexpr uint32_t teams = kTeams<Precision>;
    unsigned char rows[SWEEP_HOPPER_RESIDENT][kStageBytes];  // the row tile, or stages for it
    unsigned char columns[kTeamStages<Precision>][kStageBytes];
    float staged[teams][SWEEP_HOPPER_STAGED];  // values of candidates
    uint32_t masks[teams][TILE_MASK_WORDS];
    TwoColumns columns_of[teams][TILE / 2];
    float probe[teams][TILE];  // bounds of the columns
    uint32_t warp_counts[teams][kTeamWarps];
    StagedTile staged_tile[teams];
    Barrier filled[teams], stored[teams];  // staged candidates are complete, have been stored
    Barrier full[kTeamBarriers<Precision>], empty[kTeamBarriers<Precision>];
    Barrier order[teams];  // the other team has issued its products
};
static_assert(sizeof(SweepHopperShared<F16Rows>) == SWEEP_HOPPER_SHARED_BYTES, "the launch plan's shared memory");
static_assert(sizeof(SweepHopperShared<ExactF32>) == SWEEP_HOPPER_EXACT_SHARED_BYTES, "the launch plan's shared memory");

// The block's tiles of S in order; every role has its own walk. All blocks go through S together, a run each at a time, so that
// the rows they read stay in L2.
struct SweepWalk {
    const Pairs &pairs;
    uint32_t valid_anchors, valid_references;
    uint32_t waves, wave = 0;
    uint32_t position = 0, end = 0;  // in the run
    TileIndex tile{};
    uint32_t tiles_before = NO_ROW;  // number of tiles with pairs before this one; NO_ROW before the first next()

    explicit DEVICE SweepWalk(const Pairs &of)
        : pairs(of), valid_anchors(of.counters->valid_anchors), valid_references(of.counters->valid_references),
          waves(static_cast<uint32_t>((of.tiles - 1) / (static_cast<uint64_t>(grid_x()) * SWEEP_HOPPER_RUN)) + 1) {
        begin_run();
    }
    template <class Precision>
    DEVICE const unsigned char *rows() const {
        return static_cast<const unsigned char *>(tile_rows<Precision>(pairs.anchors, tile.row, pairs.stride));
    }
    template <class Precision>
    DEVICE const unsigned char *columns() const {
        return static_cast<const unsigned char *>(tile_rows<Precision>(pairs.references, tile.column, pairs.stride));
    }
    DEVICE uint64_t index() const { return index_of(pairs, tile.row, tile.column); }
    // K blocks of 64 dimensions of a tile.
    DEVICE uint32_t k_blocks() const { return pairs.stride / (STAGE_BYTES / 2); }
    // K blocks of all tiles before this one.
    DEVICE uint32_t filled() const { return tiles_before * k_blocks(); }
    DEVICE bool resident() const { return k_blocks() <= SWEEP_HOPPER_RESIDENT; }
    // Tiles whose rows or whose columns are all ignored have no pairs and are skipped.
    DEVICE bool has_pairs() const { return tile.row * TILE < valid_anchors && tile.column * TILE < valid_references; }
    // Steps on to the next tile with pairs; false at the end. `leave_out(index)` is called for every tile that is skipped.
    template <class LeaveOut>
    DEVICE bool next(LeaveOut leave_out) {
        if (tiles_before++ != NO_ROW) step();
        for (; position < end; step()) {
            if (has_pairs()) return true;
            leave_out(index());
        }
        return false;
    }
    DEVICE bool next() {
        return next([](uint64_t) {});
    }

  private:
    // Begins the block's run of this wave, or of the next wave in which it has one.
    DEVICE void begin_run() {
        for (; wave < waves; ++wave) {
            uint64_t first = pairs.tiles * wave / waves, count = pairs.tiles * (wave + 1) / waves - first;
            position = static_cast<uint32_t>(first + count * block_x() / grid_x());
            end = static_cast<uint32_t>(first + count * (block_x() + 1) / grid_x());
            if (position == end) continue;
            tile = tile_at(pairs, position);
            return;
        }
    }
    DEVICE void step() {
        if (++position == end) {
            ++wave;
            begin_run();
        } else {
            tile = next_tile(pairs, tile);
        }
    }
};

// The thread that stores the candidates that a team stages, so that the team waits neither for room in the pool nor for a store.
template <class Shared>
DEVICE void store_candidates(const Pairs &pairs, Shared &shared, uint32_t team) {
    uint32_t windows = 0, window = 0;  // windows so far, of all tiles; where this window begins in the tile's candidates
    uint64_t segment = 0;
    bool room = false;
    for (;; ++windows) {
        mbarrier_wait(&shared.filled[team], windows % 2);
        StagedTile staged = shared.staged_tile[team];
        if (staged.tile.row == NO_ROW) return;
        if (window == 0) {
            uint32_t unit = place_candidates(pairs, index_of(pairs, staged.tile.row, staged.tile.column), staged.total);
            room = unit != NO_ROW;
            segment = segment_at(unit);
        }
        if (room) {
            uint32_t left = staged.total - window, count = left < SWEEP_HOPPER_STAGED ? left : SWEEP_HOPPER_STAGED;
            if (window == 0) bulk_store(pairs.pool_words + segment, shared.masks[team], TILE_MASK_WORDS * 4);
            bulk_store(pairs.pool_values + segment + window, shared.staged[team], (count + 3) / 4 * 16);
            bulk_store_commit();
            bulk_store_wait_read();
        }
        mbarrier_arrive(&shared.stored[team]);
        window = window + SWEEP_HOPPER_STAGED < staged.total ? window + SWEEP_HOPPER_STAGED : 0;
    }
}

// The current key of a column's m-. It only grows, so that an outdated one is correct, too. The rectangular form does not need m-
// of columns: no similarity is above +inf.
DEVICE uint32_t column_max_neg(const Pairs &pairs, uint32_t j) {
    if (!pairs.square) return ordered_key(INFINITE);
    return j < pairs.anchors.count ? atomic_load(&pairs.max_neg[j]) : 0;
}

// The row tile and the two rows of a thread.
struct SweepRows {
    uint32_t first = NO_ROW;  // first row of the tile
    ClassRange classes{};     // range of all classes of the tile's rows; everything if the tile has padding or ignored rows
    float candidate[2]{}, largest[2]{};
};

// A step of the columns' maxima over the lanes that share them: each lane passes on half of its columns and keeps the other half.
// The bounds are compile-time constants, since a loop over the steps would put the array into local memory.
template <int n>
DEVICE void exchange(float (&largest)[8], bool upper, int mask) {
#pragma unroll
    for (int k = 0; k < n; ++k) {
        float given = upper ? largest[k] : largest[k + n], kept = upper ? largest[k + n] : largest[k];
        largest[k] = fmaxf(kept, shuffle_xor(given, mask));
    }
}

// Maxima, candidates and the count of the probe. `plain`: all pairs of the tile are negatives, as in most tiles; `apart`: the
// probe has bounds of its own.
template <bool plain, class Shared>
DEVICE void sweep_epilogue(const SweepWalk &walk, Shared &shared, uint32_t team, bool apart, const WgmmaAccumulators &acc,
                    SweepRows &rows, uint32_t (&candidates)[2], uint64_t &probe) {
    WgmmaLayout layout;
    const Pairs &pairs = walk.pairs;
    uint32_t lane = lane_index();
    uint32_t negative[2] = {~0u, ~0u}, positive[2] = {0, 0};
    if constexpr (!plain) {
        classify<WgmmaLayout>(pairs, rows.first, walk.tile.column * TILE, walk.valid_anchors, walk.valid_references, negative,
                              positive);
    }
    AboveBits above;
#pragma unroll
    for (int part = 3; part >= 0; --part) {
        float largest[8];
        bool over = false;
#pragma unroll
        for (int pair = 3; pair >= 0; --pair) {
            const TwoColumns two = shared.columns_of[team][layout.column_of(part * 8 + pair * 2) / 2];
#pragma unroll
            for (int m = pair * 2 + 1; m >= pair * 2; --m) {
                int c = part * 8 + m;
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float s = WgmmaLayout::value(acc, r, c);
                    above.add(r, s, rows.candidate[r], two.candidate[c % 2]);
                    if (!plain && !(negative[r] >> c & 1u)) s = -INFINITE;
                    rows.largest[r] = fmaxf(rows.largest[r], s);
                    largest[m] = r == 0 ? s : fmaxf(largest[m], s);
                }
                over |= largest[m] > two.max_neg[c % 2];
            }
        }
        // The more of a column has been seen, the rarer a pair above its m-.
        if (ballot_sync(over) == 0) continue;
        exchange<4>(largest, lane & 16, 16);
        exchange<2>(largest, lane & 8, 8);
        exchange<1>(largest, lane & 4, 4);
        uint32_t column = layout.column_of(part * 8 + static_cast<int>(lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2));
        if (some_lanes(largest[0] > shared.columns_of[team][column / 2].max_neg[column % 2])) {
            atomic_max(&pairs.max_neg[walk.tile.column * TILE + column], ordered_key(largest[0]));
        }
        warp_sync();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) candidates[r] = ((above.by_row[r] | above.by_column[r]) & negative[r]) | positive[r];
    if (apart) {  // the new bits shift the old ones out
        float bound[2];
        for (int r = 0; r < 2; ++r) {
            bound[r] =
                negative_bound(row_min_pos(pairs, walk.valid_anchors, rows.first + layout.row_of(r)), pairs.settings.probe);
        }
#pragma unroll
        for (int c = 31; c >= 0; --c) {
            float column_bound = shared.probe[team][layout.column_of(c)];
#pragma unroll
            for (int r = 0; r < 2; ++r) above.add(r, WgmmaLayout::value(acc, r, c), bound[r], column_bound);
        }
    }
    probe += above.count(negative, pairs.square != 0);
}

// The warps of a team: products and epilogues of their tiles.
template <class Precision>
struct SweepTeam : TeamWarp {
    const Pairs &pairs;
    SweepHopperShared<Precision> &shared;
    uint32_t thread = thread_index() % kTeamThreads;
    // By a shuffle, since the compiler would otherwise compare again for every tile.
    bool apart = shuffle(static_cast<uint32_t>(pairs.settings.probe != pairs.settings.candidate), 0) != 0;

    DEVICE SweepTeam(const Pairs &of, SweepHopperShared<Precision> &of_block, uint32_t of_warps)
        : TeamWarp{of_warps}, pairs(of), shared(of_block) {}

    DEVICE void sync() const { named_sync(1 + team, kTeamThreads); }

    // Adds the rows' maxima to m- in memory, before the team's row tile changes.
    DEVICE void flush(SweepRows &rows) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float largest = rows.largest[r];
            largest = fmaxf(largest, shuffle_xor(largest, 1));
            largest = fmaxf(largest, shuffle_xor(largest, 2));
            if (some_lanes(lane_index() % 4 == 0 && largest > -INFINITE)) {
                atomic_max(&pairs.max_neg[rows.first + WgmmaLayout{}.row_of(r)], ordered_key(largest));
            }
        }
        warp_sync();
    }

    // Begins the rows of the walk's tile, after those of the previous row tile are flushed.
    DEVICE void begin_rows(const SweepWalk &walk, SweepRows &rows) const {
        if (rows.first != NO_ROW) flush(rows);
        uint32_t first = walk.tile.row * TILE, end = first + TILE;
        rows.first = first;
        rows.classes = end <= walk.valid_anchors ? ClassRange{pairs.classes[first].begin, pairs.classes[end - 1].end}
                                                 : ClassRange{0, NO_ROW};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            rows.candidate[r] =
                negative_bound(row_min_pos(pairs, walk.valid_anchors, first + WgmmaLayout{}.row_of(r)), pairs.settings.candidate);
            rows.largest[r] = -INFINITE;
        }
    }

    // One tile. The team's named barrier is before reading what other warps of the team wrote.
    DEVICE void tile(const SweepWalk &walk, SweepRows &rows, uint64_t &probe, uint32_t &windows) const {
        // Loaded while the team multiplies.
        uint32_t begin = walk.tile.column * TILE, end = begin + TILE;
        float min_pos = thread < TILE ? column_min_pos(pairs, walk.valid_anchors, walk.valid_references, begin + thread) : INFINITE;
        uint32_t max_neg = thread < TILE ? column_max_neg(pairs, begin + thread) : 0;
        WgmmaAccumulators acc;
        multiply<Precision>(acc, shared, walk, [&] {
            if (walk.tile.row * TILE != rows.first) begin_rows(walk, rows);
            // The previous tile's bounds have been read, since its candidates are counted.
            if (thread < TILE) {
                TwoColumns &two = shared.columns_of[team][thread / 2];
                two.candidate[thread % 2] = negative_bound(min_pos, pairs.settings.candidate);
                two.max_neg[thread % 2] = max_neg == 0 ? -INFINITE : key_value(max_neg);
                // The probe of a reference that is an anchor of another part is counted there.
                shared.probe[team][thread] = pairs.square ? negative_bound(min_pos, pairs.settings.probe) : INFINITE;
            }
            warp_sync();
            sync();
        });

        uint32_t candidates[2];
        // Ranges ascend: the tile is free of positives if its columns end before the first range or begin after the last.
        if (end > walk.valid_references || (end > rows.classes.begin && begin < rows.classes.end)) {
            sweep_epilogue<false>(walk, shared, team, apart, acc, rows, candidates, probe);
        } else {
            sweep_epilogue<true>(walk, shared, team, apart, acc, rows, candidates, probe);
        }

        // This thread's place in the segment: a scan over the warp, then over the warps.
        uint32_t own = static_cast<uint32_t>(popc(candidates[0]) + popc(candidates[1])), before = warp_scan(own), total = 0;
        if (some_lanes(lane_index() == 31)) shared.warp_counts[team][warp] = before;
        before -= own;
        warp_sync();
        sync();
        for (uint32_t w = 0; w < kTeamWarps; ++w) {
            if (w == warp) before += total;
            total += shared.warp_counts[team][w];
        }
        stage(StagedTile{walk.tile, total}, candidates, acc, before, windows);
    }

    // Calls `use` for each pair of a thread, in eight interleaved chains.
    template <class Use>
    static DEVICE void each_pair(Use use) {
#pragma unroll
        for (int step = 0; step < 8; ++step) {
#pragma unroll
            for (int chain = 0; chain < 8; ++chain) use(chain, chain / 4, chain % 4 * 8 + step);
        }
    }

    // Waits until the previous window is stored, and begins one for `tile`.
    DEVICE void begin_window(StagedTile tile, uint32_t &windows) const {
        if (windows > 0) mbarrier_wait(&shared.stored[team], (windows - 1) % 2);
        warp_sync();
        ++windows;
        if (some_lanes(thread == 0)) shared.staged_tile[team] = tile;
    }

    // Stages masks and values of a tile's candidates for the storing thread, in several windows if there are too many for one;
    // counts `windows` up.
    DEVICE void stage(StagedTile tile, const uint32_t (&candidates)[2], const WgmmaAccumulators &acc, uint32_t before,
                      uint32_t &windows) const {
        uint32_t staged = shared_address(shared.staged[team]), total = tile.total, window = 0;
        do {
            begin_window(tile, windows);
            if (window == 0) {
                shared.masks[team][thread * 2] = candidates[0];
                shared.masks[team][thread * 2 + 1] = candidates[1];
            }
            // Eight chains of stores, of a quarter of a word each, since advancing an address waits until the store has read it.
            // Addresses of an earlier window wrap around.
            uint32_t at[8], next = staged + (before - window) * 4;
#pragma unroll
            for (int chain = 0; chain < 8; ++chain) {
                at[chain] = next;
                next += static_cast<uint32_t>(popc(candidates[chain / 4] >> chain % 4 * 8 & 0xffu)) * 4;
            }
            if (total <= SWEEP_HOPPER_STAGED) {
                each_pair([&](int chain, int r, int c) { append_if(at[chain], candidates[r], 1u << c, WgmmaLayout::value(acc, r, c)); });
            } else {
                each_pair([&](int chain, int r, int c) {
                    append_within(at[chain], candidates[r], 1u << c, WgmmaLayout::value(acc, r, c), staged, SWEEP_HOPPER_STAGED * 4);
                });
            }
            fence_proxy_async();
            warp_sync();
            arrive_as_warp(&shared.filled[team]);
            window += SWEEP_HOPPER_STAGED;
        } while (window < total);
    }

    DEVICE void run(SweepWalk walk) const {
        SweepRows rows;
        uint64_t probe = 0;
        uint32_t windows = 0;
        while (walk.next()) {
            if (walk.tiles_before % kTeams<Precision> == team) tile(walk, rows, probe, windows);
        }
        begin_window(StagedTile{{NO_ROW, NO_ROW}, 0}, windows);
        arrive_as_warp(&shared.filled[team]);
        if (rows.first != NO_ROW) flush(rows);
        uint64_t passed = warp_sum(probe);
        if (lane_index() == 0 && passed != 0) atomic_add(&pairs.counters->probe_neg, passed);
    }
};
template <class Precision>
DEVICE void sweep_hopper_body(const PairsParams &p) {
    SHARED_MEMORY(bytes);
    auto &shared = *reinterpret_cast<SweepHopperShared<Precision> *>(bytes);
    const Pairs &pairs = p.pairs;
    if (thread_index() == 0) {
        begin_teams(shared);
        for (Barrier &barrier : shared.filled) mbarrier_init(&barrier, kTeamWarps);
        for (Barrier &barrier : shared.stored) mbarrier_init(&barrier, 1);
    }
    block_sync();  // the barriers are initialised
    SweepWalk walk(pairs);
    divide_roles<Precision>(
        [&](uint32_t warp) {
            if (warp == 0) {
                copy_operands<Precision>(shared, walk, [&](SweepWalk &to) {
                    return to.next([&](uint64_t tile) { place_candidates(pairs, tile, 0); });
                });
            }
            if (warp - 1 < kTeams<Precision>) store_candidates(pairs, shared, warp - 1);
        },
        [&](uint32_t team) { SweepTeam<Precision>{pairs, shared, team}.run(walk); });
}
#endif

ROLE_KERNEL(sweep_hopper_f32, PairsParams, SWEEP_HOPPER_EXACT_THREADS) { HOPPER_ONLY(sweep_hopper_body<ExactF32>(p)); }
ROLE_KERNEL(sweep_hopper_f16, PairsParams, SWEEP_HOPPER_THREADS) { HOPPER_ONLY(sweep_hopper_body<F16Rows>(p)); }
ROLE_KERNEL(sweep_hopper_bf16, PairsParams, SWEEP_HOPPER_THREADS) { HOPPER_ONLY(sweep_hopper_body<Bf16Rows>(p)); }
