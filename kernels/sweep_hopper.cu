// sweep_hopper.cu: the sweep of similarity.cu on Hopper (sm_90a); 16-bit types and TF32.
// Truth: src/loss/similarity.rs. Launcher: src/backend/device/loss.rs.
//
// Persistent blocks: each takes contiguous runs of the tiles of S, and its warps have roles. The row tile
// stays in shared memory as long as the run stays in its row (up to 512 dimensions of 16 bits, 256 of TF32; wider ones stream both operands);
// one thread copies it and the column tiles, in stages of 16 KB. Two teams of 8 warps take turns: while one
// multiplies, the other looks at its products, so that the tensor cores do not wait for maxima and candidates. A
// team begins when the other has issued all its products (`turn`): it skips that one's stages, and the parity of a
// barrier alone would not tell a phase from the one two later.
// Candidates are bits, two words a thread; their values are put side by side in shared memory by stores with a
// predicate each, and written by one bulk store: how many there are costs next to nothing.
// Sync: barriers in shared memory, a named one for each team; integer atomics (max, add) whose order cannot change
//   the result.

#include "hopper.cuh"

#ifdef HAS_WARPGROUP_PRODUCTS

constexpr uint32_t kStageBytes = TILE * STAGE_BYTES;
constexpr uint32_t kTeams = 2, kTeamWarps = 8, kTeamThreads = kTeamWarps * 32;
static_assert((kTeams * kTeamWarps + 4) * 32 == SWEEP_HOPPER_THREADS, "the launch plan's threads");

struct SweepHopperShared {
    unsigned char rows[SWEEP_HOPPER_RESIDENT][kStageBytes];  // the row tile, or its stages
    unsigned char columns[SWEEP_HOPPER_STAGES][kStageBytes];
    float staged[kTeams][SWEEP_HOPPER_STAGED];
    float candidate[kTeams][TILE], probe[kTeams][TILE];  // bounds of the columns
    uint32_t column_max[kTeams][TILE];                   // keys
    uint32_t warp_counts[kTeams][kTeamWarps];
    uint32_t segment[kTeams];  // of the tile's candidates
    Barrier full[SWEEP_HOPPER_STAGES], empty[SWEEP_HOPPER_STAGES];
    Barrier rows_full, rows_empty;
    Barrier turn[kTeams];  // the other team has issued its products
};
static_assert(sizeof(SweepHopperShared) == SWEEP_HOPPER_SHARED_BYTES, "the launch plan's shared memory");
static_assert(SWEEP_HOPPER_STAGES <= SWEEP_HOPPER_RESIDENT, "stages of rows where the row tile is");

// The block's tiles of S in order; every role walks them by itself. All blocks go through S together, a run of each at
// a time: what they read stays in L2.
struct SweepWalk {
    const Pairs &pairs;
    uint32_t element;  // its bytes
    uint32_t waves, wave = 0;
    uint32_t position = 0, end = 0;  // of the run
    TileIndex tile{};
    uint32_t turn = NO_ROW;  // tiles with pairs before this one; nothing before the first

    DEVICE SweepWalk(const Pairs &of, uint32_t stored_bytes)
        : pairs(of), element(stored_bytes), waves(static_cast<uint32_t>((of.tiles - 1) / (static_cast<uint64_t>(grid_x()) * SWEEP_HOPPER_RUN)) + 1) {
        begin_run();
    }
    DEVICE uint64_t index() const { return index_of(pairs, tile.row, tile.column); }
    DEVICE uint32_t chunks() const { return pairs.stride * element / STAGE_BYTES; }
    // Stages filled before those of this tile.
    DEVICE uint32_t filled() const { return turn * chunks(); }
    DEVICE bool resident() const { return chunks() <= SWEEP_HOPPER_RESIDENT; }
    // Tiles of ignored rows or columns alone have no pairs, and are left out.
    DEVICE bool has_pairs() const {
        return tile.row * TILE < pairs.counters->valid_anchors && tile.column * TILE < pairs.counters->valid_references;
    }
    // Steps on to the next tile with pairs; false at the end. `leave_out(index)` is called for those between.
    template <class LeaveOut>
    DEVICE bool next(LeaveOut leave_out) {
        if (turn++ != NO_ROW) step();
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
    // The block's share of a wave, and of the next one where it has none.
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

// The thread that copies.
template <class Numbers>
DEVICE void copy_operands(const Pairs &pairs, SweepHopperShared &shared, SweepWalk walk) {
    uint32_t have = NO_ROW, changes = 0;
    bool resident = walk.resident();
    while (walk.next([&](uint64_t index) { pairs.tile_counts[index] = 0; })) {
        auto rows = static_cast<const unsigned char *>(tile_rows<Numbers>(pairs.anchors, walk.tile.row, pairs.stride));
        auto columns =
            static_cast<const unsigned char *>(tile_rows<Numbers>(pairs.references, walk.tile.column, pairs.stride));
        if (resident && walk.tile.row != have) {
            if (have != NO_ROW) mbarrier_wait(&shared.rows_empty, (changes - 1) % 2);
            ++changes;
            mbarrier_arrive_expect_tx(&shared.rows_full, walk.chunks() * kStageBytes);
            for (uint32_t k = 0; k < walk.chunks(); ++k) {
                cp_async_bulk(shared.rows[k], rows + k * kStageBytes, kStageBytes, &shared.rows_full);
            }
            have = walk.tile.row;
        }
        for (uint32_t k = 0; k < walk.chunks(); ++k) {
            uint32_t fill = walk.filled() + k, stage = fill % SWEEP_HOPPER_STAGES, round = fill / SWEEP_HOPPER_STAGES;
            if (round > 0) mbarrier_wait(&shared.empty[stage], (round - 1) % 2);
            mbarrier_arrive_expect_tx(&shared.full[stage], resident ? kStageBytes : 2 * kStageBytes);
            cp_async_bulk(shared.columns[stage], columns + k * kStageBytes, kStageBytes, &shared.full[stage]);
            if (!resident) cp_async_bulk(shared.rows[stage], rows + k * kStageBytes, kStageBytes, &shared.full[stage]);
        }
    }
}

// m+ of a row; padding and ignored rows have none, and nothing passes a bound that is made of it.
DEVICE float valid_min_pos(const Pairs &pairs, uint32_t i) {
    return i < pairs.counters->valid_anchors ? pairs.same[i].min_pos : INFINITE;
}

// The same of a column, which in the rectangular form may be an anchor elsewhere.
DEVICE float column_min_pos(const Pairs &pairs, uint32_t j) {
    if (pairs.square) return valid_min_pos(pairs, j);
    return pairs.columns != nullptr && j < pairs.counters->valid_references ? pairs.columns[j].min_pos : INFINITE;
}

// What a thread knows of its two rows.
struct SweepRows {
    uint32_t first;  // of the tile
    float candidate[2], largest[2];
};

DEVICE void arrive_as_warp(Barrier *barrier) {
    if (lane_index() == 0) mbarrier_arrive(barrier);
    warp_sync();
}

// One step of the columns' maxima over the lanes that share them: each lane gives half of its columns away and keeps the
// other. The bounds are known to the compiler, for a loop over the steps would put the array into local memory.
template <int n>
DEVICE void exchange(float (&largest)[8], bool upper, int mask) {
#pragma unroll
    for (int k = 0; k < n; ++k) {
        float given = upper ? largest[k] : largest[k + n], kept = upper ? largest[k + n] : largest[k];
        largest[k] = fmaxf(kept, shuffle_xor(given, mask));
    }
}

// Maxima, candidates (bit column of the word of each row) and those that pass the probe. `plain`: every pair counts and
// none is of one class, as in most tiles; `apart`: the probe has a bound of its own.
template <bool plain, bool apart>
DEVICE void look_at(const Pairs &pairs, SweepHopperShared &shared, uint32_t team, TileIndex tile,
                    const GroupAccumulators &acc, SweepRows &rows, uint32_t (&candidates)[2], uint32_t &probe) {
    GroupPlace place;
    bool mirrored = pairs.square != 0;
    const float none = -INFINITE;
    uint32_t negative[2] = {~0u, ~0u}, positive[2] = {0, 0}, by_row[2] = {0, 0}, by_column[2] = {0, 0};
    [[maybe_unused]] float row_probe[2];
    if constexpr (apart) {
        for (int r = 0; r < 2; ++r) row_probe[r] = negative_bound(valid_min_pos(pairs, rows.first + place.row_of(r)), pairs.settings.probe);
    }
    if constexpr (!plain) {
        negative[0] = negative[1] = 0;
        for (int r = 0; r < 2; ++r) {
            uint32_t i = rows.first + place.row_of(r);
            ClassRange range = i < pairs.counters->valid_anchors ? pairs.classes[i] : ClassRange{1, 0};
#pragma unroll 1
            for (int c = 0; c < 32; ++c) {
                uint32_t j = tile.column * TILE + place.column_of(c);
                if (!is_pair(pairs, i, j)) continue;
                bool same = same_class(range, j);
                // A duplicate among them is the selection's to find.
                negative[r] |= static_cast<uint32_t>(!same) << c;
                positive[r] |= static_cast<uint32_t>(same) << c;
            }
        }
    }
#pragma unroll
    for (int part = 0; part < 4; ++part) {
        float largest[8];
#pragma unroll
        for (int m = 0; m < 8; ++m) {
            int c = part * 8 + m;
            float bound = shared.candidate[team][place.column_of(c)];
            largest[m] = none;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float s = GroupPlace::value(acc, r, c);
                if (!plain && !(negative[r] >> c & 1u)) s = none;
                rows.largest[r] = fmaxf(rows.largest[r], s);
                largest[m] = fmaxf(largest[m], s);
                if (s > rows.candidate[r]) by_row[r] |= 1u << c;
                if (s > bound) by_column[r] |= 1u << c;
                if constexpr (apart) {
                    probe += s > row_probe[r];
                    probe += s > shared.probe[team][place.column_of(c)];
                }
            }
        }
        if (!mirrored) continue;
        uint32_t lane = lane_index();
        exchange<4>(largest, lane & 16, 16);
        exchange<2>(largest, lane & 8, 8);
        exchange<1>(largest, lane & 4, 4);
        uint32_t column = place.column_of(part * 8 + static_cast<int>(lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2));
        if (largest[0] > none) atomic_max(&shared.column_max[team][column], ordered_key(largest[0]));
    }
    warp_sync();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if constexpr (!apart) probe += static_cast<uint32_t>(popc(by_row[r]) + (mirrored ? popc(by_column[r]) : 0));
        candidates[r] = by_row[r] | by_column[r] | positive[r];
    }
}

// The warps of a team: their tiles' products, and what becomes of them.
template <class Numbers>
struct SweepTeam {
    const Pairs &pairs;
    SweepHopperShared &shared;
    uint32_t team;
    uint32_t warp = shuffle(warp_index(), 0) % kTeamWarps;
    uint32_t thread = thread_index() % kTeamThreads;

    DEVICE void sync() const { named_sync(1 + team, kTeamThreads); }

    // Maxima of the rows, which change.
    DEVICE void flush(SweepRows &rows) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float largest = rows.largest[r];
            largest = fmaxf(largest, shuffle_xor(largest, 1));
            largest = fmaxf(largest, shuffle_xor(largest, 2));
            if (lane_index() % 4 == 0 && largest > -INFINITE) {
                atomic_max(&pairs.max_neg[rows.first + GroupPlace{}.row_of(r)], ordered_key(largest));
            }
        }
        warp_sync();
    }

    DEVICE void multiply(GroupAccumulators &acc, const SweepWalk &walk) const {
#pragma unroll
        for (int n = 0; n < 16; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;
        }
        settle(acc);
        // The other team's products are issued: its stages are all there, and this team's are next.
        uint32_t own = walk.turn / kTeams;
        if (walk.turn > 0) mbarrier_wait(&shared.turn[team], team == 0 ? (own - 1) % 2 : own % 2);
        warp_sync();
        bool resident = walk.resident();
        uint32_t group_rows = warp / 4 * (TILE / 2) * STAGE_BYTES;
        for (uint32_t k = 0; k < walk.chunks(); ++k) {
            uint32_t fill = walk.filled() + k, stage = fill % SWEEP_HOPPER_STAGES;
            mbarrier_wait(&shared.full[stage], fill / SWEEP_HOPPER_STAGES % 2);
            warp_sync();
            Descriptor rows = stage_descriptor(shared.rows[resident ? k : stage] + group_rows);
            Descriptor columns = stage_descriptor(shared.columns[stage]);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kGranules / 2; ++step) {
                wgmma<false>(Numbers{}, acc, advanced(rows, step * 32), advanced(columns, step * 32));
            }
            wgmma_commit();
            if (k > 0) {
                wgmma_wait<1>();  // this product goes on, that before it is done
                arrive_as_warp(&shared.empty[(fill - 1) % SWEEP_HOPPER_STAGES]);
            }
        }
        arrive_as_warp(&shared.turn[team ^ 1]);
        wgmma_wait<0>();
        settle(acc);
        arrive_as_warp(&shared.empty[(walk.filled() + walk.chunks() - 1) % SWEEP_HOPPER_STAGES]);
    }

    // One tile, with the team's own barrier before what the whole team has written.
    DEVICE void tile(const SweepWalk &walk, SweepRows &rows, uint32_t &probe) const {
        // On its way while the team multiplies.
        float min_pos = thread < TILE ? column_min_pos(pairs, walk.tile.column * TILE + thread) : INFINITE;
        GroupAccumulators acc;
        multiply(acc, walk);
        // The last tile's have been read: its candidates are counted.
        if (thread < TILE) {
            shared.candidate[team][thread] = negative_bound(min_pos, pairs.settings.candidate);
            // A reference that is an anchor elsewhere is counted there.
            shared.probe[team][thread] = pairs.square ? negative_bound(min_pos, pairs.settings.probe) : INFINITE;
        }
        warp_sync();
        sync();

        uint32_t candidates[2];
        // Ranges ascend: the tile is free of positives if its columns end before the first range or begin after the last.
        uint32_t begin = walk.tile.column * TILE, end = begin + TILE, last = rows.first + TILE;
        bool complete = last <= pairs.counters->valid_anchors && end <= pairs.counters->valid_references;
        if (!complete || !(end <= pairs.classes[rows.first].begin || begin >= pairs.classes[last - 1].end)) {
            look_at<false, true>(pairs, shared, team, walk.tile, acc, rows, candidates, probe);
        } else if (pairs.settings.probe != pairs.settings.candidate) {
            look_at<true, true>(pairs, shared, team, walk.tile, acc, rows, candidates, probe);
        } else {
            look_at<true, false>(pairs, shared, team, walk.tile, acc, rows, candidates, probe);
        }

        // Every thread's place in the segment: a scan over the warp, then over the warps.
        uint32_t own = static_cast<uint32_t>(popc(candidates[0]) + popc(candidates[1])), before = warp_scan(own), total = 0;
        if (lane_index() == 31) shared.warp_counts[team][warp] = before;
        before -= own;
        if (thread == 0) bulk_store_wait_read();  // of the last tile's values
        warp_sync();
        sync();
        for (uint32_t w = 0; w < kTeamWarps; ++w) {
            if (w == warp) before += total;
            total += shared.warp_counts[team][w];
        }
        if (thread < TILE) {
            uint32_t key = shared.column_max[team][thread];
            shared.column_max[team][thread] = 0;
            if (key != 0) atomic_max(&pairs.max_neg[walk.tile.column * TILE + thread], key);
        }
        if (thread == 0) {
            pairs.tile_counts[walk.index()] = total;
            // Known to the others from the barrier on that follows their staging.
            if (total != 0) shared.segment[team] = pairs.tile_segments[walk.index()] = reserve(pairs, total);
        }
        warp_sync();
        if (total != 0) store(candidates, acc, before, total);
    }

    // Masks and values of a tile's candidates: by windows, if there are too many for one.
    DEVICE void store(const uint32_t (&candidates)[2], const GroupAccumulators &acc, uint32_t before, uint32_t total) const {
        uint32_t staged = shared_address(shared.staged[team]);
        for (uint32_t window = 0; window < total; window += SWEEP_HOPPER_STAGED) {
            if (window != 0) {
                if (thread == 0) bulk_store_wait_read();
                warp_sync();
                sync();
            }
            uint32_t at = staged + (before - window) * 4;  // wraps around where the place is of an earlier window
            if (total <= SWEEP_HOPPER_STAGED) {
#pragma unroll
                for (int bit = 0; bit < 64; ++bit) {
                    append_if(at, candidates[bit / 32], 1u << bit % 32, GroupPlace::value(acc, bit / 32, bit % 32));
                }
            } else {
#pragma unroll
                for (int bit = 0; bit < 64; ++bit) {
                    append_within(at, candidates[bit / 32], 1u << bit % 32, GroupPlace::value(acc, bit / 32, bit % 32),
                                  staged, SWEEP_HOPPER_STAGED * 4);
                }
            }
            fence_proxy_async();
            warp_sync();
            sync();
            uint32_t unit = shared.segment[team];
            if (unit == NO_ROW) return;  // there is no room: the same for the whole team
            uint64_t segment = static_cast<uint64_t>(unit) * 4;
            if (window == 0) {
                uint32_t *masks = pairs.pool_words + segment + thread * 2;
                masks[0] = candidates[0];
                masks[1] = candidates[1];
            }
            if (thread == 0) {
                uint32_t left = total - window, count = left < SWEEP_HOPPER_STAGED ? left : SWEEP_HOPPER_STAGED;
                bulk_store(pairs.pool_values + segment + window, shared.staged[team], (count + 3) / 4 * 16);
                bulk_store_commit();
            }
            warp_sync();
        }
    }

    DEVICE void run(SweepWalk walk) const {
        SweepRows rows{NO_ROW, {}, {}};
        uint32_t changes = 0, probe = 0;
        GroupPlace place;
        while (walk.next()) {
            if (walk.tile.row * TILE != rows.first) {
                if (rows.first != NO_ROW) {
                    flush(rows);
                    if (walk.resident()) arrive_as_warp(&shared.rows_empty);
                }
                rows.first = walk.tile.row * TILE;
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    rows.candidate[r] = negative_bound(valid_min_pos(pairs, rows.first + place.row_of(r)), pairs.settings.candidate);
                    rows.largest[r] = -INFINITE;
                }
                if (walk.resident()) mbarrier_wait(&shared.rows_full, changes % 2);
                warp_sync();
                ++changes;
            }
            if (walk.turn % kTeams == team) tile(walk, rows, probe);
        }
        if (rows.first != NO_ROW) flush(rows);
        uint64_t passed = warp_sum(static_cast<uint64_t>(probe));
        if (lane_index() == 0 && passed != 0) atomic_add(&pairs.counters->probe_neg, passed);
        if (thread == 0) bulk_store_wait_read();
    }
};
#endif

template <class Numbers>
DEVICE void sweep_hopper_body([[maybe_unused]] const PairsParams &p) {
#ifdef HAS_WARPGROUP_PRODUCTS
    SHARED_MEMORY(bytes);
    auto &shared = *reinterpret_cast<SweepHopperShared *>(bytes);
    const Pairs &pairs = p.pairs;
    if (thread_index() == 0) {
        for (Barrier &barrier : shared.full) mbarrier_init(&barrier, 1);
        for (Barrier &barrier : shared.empty) mbarrier_init(&barrier, kTeamWarps);
        mbarrier_init(&shared.rows_full, 1);
        mbarrier_init(&shared.rows_empty, kTeams * kTeamWarps);
        for (Barrier &barrier : shared.turn) mbarrier_init(&barrier, kTeamWarps);
    }
    if (thread_index() < kTeams * TILE) shared.column_max[thread_index() / TILE][thread_index() % TILE] = 0;
    block_sync();  // barriers and maxima are there
    SweepWalk walk(pairs, Numbers::stored_bytes);
    uint32_t warp = shuffle(warp_index(), 0);
    if (warp >= kTeams * kTeamWarps) {
        setmaxnreg_dec<24>();
        if (thread_index() == kTeams * kTeamThreads) copy_operands<Numbers>(pairs, shared, walk);
    } else {
        setmaxnreg_inc<112>();
        SweepTeam<Numbers>{pairs, shared, warp / kTeamWarps}.run(walk);
    }
#else
    trap();
#endif
}
ROLE_KERNEL(sweep_hopper_tf32, PairsParams, SWEEP_HOPPER_THREADS) { sweep_hopper_body<FastF32>(p); }
ROLE_KERNEL(sweep_hopper_f16, PairsParams, SWEEP_HOPPER_THREADS) { sweep_hopper_body<HalfF16>(p); }
ROLE_KERNEL(sweep_hopper_bf16, PairsParams, SWEEP_HOPPER_THREADS) { sweep_hopper_body<HalfBf16>(p); }
