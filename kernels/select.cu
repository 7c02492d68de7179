// select.cu: which pairs each anchor keeps, and the loss (SPEC 2-4).
// Truth: src/loss/select.rs, src/loss/gradient.rs. Launcher: src/backend/device/loss.rs.
//
// select_stored, select_recomputed: the AT-ASMS decision is taken anew by every block from
//   the counters of the sweep (no round trip to the host); then each candidate is held
//   against the final thresholds of its row and its column. One block a tile, the one
//   kernel for tiles whose candidates were stored, and it leaves place and fate of each in its word (on Hopper the
//   sweep's threads stood otherwise); the other (on Hopper with wgmma) for those that did not fit.
// weigh: per-row weights from the counts, the scalars, results in original order, and which way each row tile's gradient
//   goes, one block a row tile; the last to come adds their sums, in order. Of 16-bit rows a block for each tile of S finishes
//   its words (weigh_words.cuh), and the first of these blocks do the rest.
// Sync: integer atomics alone. The sums of the loss are 64-bit fixed point, so that the
//   order of blocks and the way a tile took cannot change a bit.

#include "hopper.cuh"
#include "weigh_words.cuh"

struct Tolerances {
    double pos;
    double neg;
};

// SPEC 3; src/loss/select.rs adapt().
DEVICE Tolerances adapt(const Pairs &pairs) {
    const Settings &settings = pairs.settings;
    uint64_t probe = pairs.totals[0], total = pairs.totals[1];
    if (!settings.adaptive || total == 0 || probe <= total) return Tolerances{settings.gamma_pos, settings.gamma_neg};
    double rho = static_cast<double>(probe) / static_cast<double>(total);
    double t = settings.tolerance / (1.0 + exp(-rho));
    return Tolerances{settings.gamma_pos * (1.0 + t), settings.gamma_neg * (1.0 - t)};
}

// Rows of the tile first, then its columns.
struct SelectShared {
    float pos_bound[2 * TILE];
    float neg_bound[2 * TILE];
    ClassRange range[TILE];
    int64_t sums[4][2 * TILE];  // as in RowSums
    uint32_t counts[2][2 * TILE];
};
static_assert(sizeof(SelectShared) == SELECT_SHARED_BYTES, "the launch plan's shared memory");

// `i` is the row of the batch that entry thread_index() of the bounds belongs to.
DEVICE void select_begin(const Pairs &pairs, TileIndex tile, SelectShared &shared) {
    uint32_t entry = thread_index();
    bool row = entry < TILE;
    uint32_t i = row ? tile.row * TILE + entry : tile.column * TILE + entry - TILE;
    bool anchor = (row || pairs.square) && i < pairs.counters->valid_anchors;
    bool elsewhere = !row && pairs.columns != nullptr && i < pairs.counters->valid_references;
    uint32_t max_neg = anchor ? pairs.max_neg[i] : elsewhere ? pairs.columns[i].max_neg : 0;
    float min_pos = anchor ? pairs.same[i].min_pos : elsewhere ? pairs.columns[i].min_pos : INFINITE;
    Tolerances tolerances = adapt(pairs);
    shared.pos_bound[entry] = positive_bound(max_neg, tolerances.pos);
    shared.neg_bound[entry] = negative_bound(min_pos, tolerances.neg);
    if (row) shared.range[entry] = anchor ? pairs.classes[i] : ClassRange{1, 0};
    for (int kind = 0; kind < 4; ++kind) shared.sums[kind][entry] = 0;
    shared.counts[0][entry] = shared.counts[1][entry] = 0;
    block_sync();
}

// What one pair adds to an anchor's sums, in fixed point.
struct Terms {
    int64_t softplus;
    int64_t sigmoid;
};
DEVICE Terms terms_of(const Settings &settings, float x) {
    // Only rows that are not of unit length, and were not checked, come to the limit.
    auto units = [&](float term) {
        return round_to_integer(fmin(static_cast<double>(term) * settings.sum_scale, settings.term_limit));
    };
    return Terms{units(softplus(x)), units(sigmoid(x))};
}

// Adds the pair to the sums of whom it is kept by; its fate, as in a word.
DEVICE uint32_t select_pair(const Pairs &pairs, SelectShared &shared, TileIndex tile, uint32_t row, uint32_t column,
                            float s) {
    uint32_t i = tile.row * TILE + row, j = tile.column * TILE + column;
    bool positive = same_class(shared.range[row], j);
    if (positive && is_duplicate(pairs, i, j, s)) return 0;
    uint32_t entries[2] = {row, TILE + column};
    bool kept[2];
    for (int side = 0; side < 2; ++side) {
        kept[side] = positive ? s < shared.pos_bound[entries[side]] : s > shared.neg_bound[entries[side]];
    }
    if (!kept[0] && !kept[1]) return 0;
    float x = pair_argument(pairs.settings, positive, s);
    Terms terms = terms_of(pairs.settings, x);
    int kind = positive ? 0 : 1;
    for (int side = 0; side < 2; ++side) {
        if (!kept[side] || (side == 1 && !pairs.square)) continue;  // a reference's sums are another part's
        atomic_add(&shared.counts[kind][entries[side]], 1u);
        atomic_add_shared(&shared.sums[kind][entries[side]], terms.softplus);
        atomic_add_shared(&shared.sums[2 + kind][entries[side]], terms.sigmoid);
    }
    return word_fate(kept[0], kept[1], positive, sigmoid(x));
}

DEVICE void select_end(const Pairs &pairs, TileIndex tile, const SelectShared &shared) {
    block_sync();
    uint32_t entry = thread_index();
    uint32_t i = entry < TILE ? tile.row * TILE + entry : tile.column * TILE + entry - TILE;
    uint32_t pos = shared.counts[0][entry], neg = shared.counts[1][entry];
    if (pos + neg == 0) return;  // also all entries that are no anchor's
    RowSums &sums = pairs.sums[i];
    if (pos != 0) {
        atomic_add(&sums.count_pos, pos);
        atomic_add(&sums.softplus_pos, shared.sums[0][entry]);
        atomic_add(&sums.sigmoid_pos, shared.sums[2][entry]);
    }
    if (neg != 0) {
        atomic_add(&sums.count_neg, neg);
        atomic_add(&sums.softplus_neg, shared.sums[1][entry]);
        atomic_add(&sums.sigmoid_neg, shared.sums[3][entry]);
    }
}

// Candidates in one walk: their places from the bits that the sweep left, first into shared memory, so that values are
// read and words written side by side. `Where` is how the sweep's threads stood in the tile.
template <class Where>
DEVICE void select_stored_body(const PairsParams &p) {
    SHARED_MEMORY(bytes);
    struct Shared : SelectShared {
        uint16_t places[SELECT_PLACES];
        uint32_t warp_counts[THREADS / 32];
    };
    static_assert(sizeof(Shared) == SELECT_STORED_SHARED_BYTES, "the launch plan's shared memory");
    auto &shared = *reinterpret_cast<Shared *>(bytes);
    const Pairs &pairs = p.pairs;
    uint64_t index = block_x();
    uint32_t count = pairs.tile_counts[index];
    if (count == 0 || !is_stored(pairs, index)) return;
    TileIndex tile = tile_of(pairs, index);
    const float *values = pairs.pool_values + segment_of(pairs, index);
    uint32_t *words = pairs.pool_words + segment_of(pairs, index);
    const uint32_t masks[2] = {words[thread_index() * 2], words[thread_index() * 2 + 1]};
    uint32_t own = static_cast<uint32_t>(popc(masks[0]) + popc(masks[1]));
    uint32_t before = warp_scan(own);
    if (lane_index() == 31) shared.warp_counts[warp_index()] = before;
    before -= own;
    select_begin(pairs, tile, shared);  // its barrier: the counts are there, and every mask is read
    for (uint32_t warp = 0; warp < warp_index(); ++warp) before += shared.warp_counts[warp];
    Where place;
    for (uint32_t window = 0; window < count; window += SELECT_PLACES) {
        if (window != 0) block_sync();  // the places before are read
        uint32_t at = before - window;
        for (int word = 0; word < 2; ++word) {
            for (uint32_t left = masks[word]; left != 0; left &= left - 1, ++at) {
                int bit = word * 32 + lowest_bit(left);
                uint32_t row = place.row_of(bit / Where::columns), column = place.column_of(bit % Where::columns);
                if (at < SELECT_PLACES) shared.places[at] = static_cast<uint16_t>(row * TILE + column);
            }
        }
        block_sync();
        uint32_t end = count - window < SELECT_PLACES ? count : window + SELECT_PLACES;
        for (uint32_t k = window + thread_index(); k < end; k += THREADS) {
            uint32_t at_place = shared.places[k - window];
            words[k] = at_place | select_pair(pairs, shared, tile, at_place / TILE, at_place % TILE, values[k]);
        }
    }
    select_end(pairs, tile, shared);
}
KERNEL(select_stored, PairsParams, 2) { select_stored_body<Place<4>>(p); }
KERNEL(select_stored_hopper, PairsParams, 2) { select_stored_body<GroupPlace>(p); }

static_assert(SELECT_SHARED_BYTES + TILE * kValuesStride * sizeof(float) <= SIMILARITY_STAGES_BYTES,
              "the values of a tile fit where its rows were streamed through");

// Every pair of a tile of S, whose accumulators `acc` go through shared memory, over the stages that
// are free now: a loop over registers would have to be unrolled, 64 times the code below.
template <class Where, class Sums>
DEVICE void select_tile(const Pairs &pairs, TileIndex tile, unsigned char *bytes, const Sums &acc) {
    auto &shared = *reinterpret_cast<SelectShared *>(bytes);
    auto *values = reinterpret_cast<float *>(bytes + SELECT_SHARED_BYTES);  // [TILE, kValuesStride]
    Where place;
#pragma unroll
    for (int row = 0; row < Where::rows; ++row) {
#pragma unroll
        for (int column = 0; column < Where::columns; ++column) {
            values[place.row_of(row) * kValuesStride + place.column_of(column)] = Where::value(acc, row, column);
        }
    }
    select_begin(pairs, tile, shared);  // its barrier publishes the values too
    for (uint32_t k = thread_index(); k < TILE * TILE; k += THREADS) {
        uint32_t r = k / TILE, c = k % TILE;
        if (!is_pair(pairs, tile.row * TILE + r, tile.column * TILE + c)) continue;
        select_pair(pairs, shared, tile, r, c, values[r * kValuesStride + c]);
    }
    select_end(pairs, tile, shared);
}

template <class Numbers>
DEVICE void select_recomputed_body(const PairsParams &p) {
    SHARED_MEMORY(bytes);
    const Pairs &pairs = p.pairs;
    uint64_t index = block_x();
    if (pairs.tile_counts[index] == 0 || is_stored(pairs, index)) return;
    TileIndex tile = tile_of(pairs, index);
    Accumulators<4> acc;
    multiply_tile<Numbers, 4>(acc, tile_rows<Numbers>(pairs.anchors, tile.row, pairs.stride),
                              tile_rows<Numbers>(pairs.references, tile.column, pairs.stride),
                              stride_bytes<Numbers>(pairs), bytes);
    select_tile<Place<4>>(pairs, tile, bytes, acc);
}

// The same on Hopper's warpgroup products, with the bits of sweep_hopper.
template <class Numbers>
DEVICE void select_recomputed_hopper_body([[maybe_unused]] const PairsParams &p) {
#ifdef HAS_WARPGROUP_PRODUCTS
    SHARED_MEMORY(bytes);
    const Pairs &pairs = p.pairs;
    uint64_t index = block_x();
    if (pairs.tile_counts[index] == 0 || is_stored(pairs, index)) return;
    TileIndex tile = tile_of(pairs, index);
    GroupStages<kHopperStages> stages = hopper_stages(bytes);
    GroupAccumulators acc;
    group_multiply_tile<Numbers>(acc, tile_rows<Numbers>(pairs.anchors, tile.row, pairs.stride),
                                 tile_rows<Numbers>(pairs.references, tile.column, pairs.stride),
                                 stride_bytes<Numbers>(pairs), stages);
    select_tile<GroupPlace>(pairs, tile, bytes, acc);
#else
    trap();
#endif
}

KERNEL_IN_EVERY_PRECISION(select_recomputed, PairsParams, 1)
KERNEL(select_recomputed_hopper_f16, PairsParams, 1) { select_recomputed_hopper_body<HalfF16>(p); }
KERNEL(select_recomputed_hopper_bf16, PairsParams, 1) { select_recomputed_hopper_body<HalfBf16>(p); }

// 2 / (B |set|), and the bounds (SPEC 4); nothing for a row without pairs of both kinds.
DEVICE RowWeights weights_of(const Pairs &pairs, Tolerances tolerances, const RowNumbers &row) {
    if (row.count_pos == 0 || row.count_neg == 0) return RowWeights{-INFINITE, INFINITE, 0.0f, 0.0f};
    return RowWeights{positive_bound(row.max_neg, tolerances.pos), negative_bound(row.min_pos, tolerances.neg),
                      set_scale(pairs, row.count_pos), set_scale(pairs, row.count_neg)};
}

// Below this share of candidates a row tile's gradient is summed from lists. A pair costs
// the list way 1 KB read and 2 x 1 KB of shared memory for 256 columns, some 32 cycles; a
// 64 x 128 tile of M costs the tensor cores about 1,000 for as many, whatever is in it.
// 32 pairs of 8,192 are 0.4 %.
constexpr uint64_t kListsShare = 256;

// Lists or tiles, for row tile x of one side. Lists want every tile stored: where some are not, which ones is by chance, and
// the sums of the two ways have other last bits, so that no row tile goes by lists there.
DEVICE void find_way(const Pairs &pairs, bool of_references, uint32_t x, uint8_t *ways, uint64_t *scratch) {
    uint32_t others = of_references ? pairs.anchors.tiles : pairs.references.tiles;
    uint64_t candidates = 0;
    for (uint32_t y = thread_index(); y < others; y += THREADS) {
        candidates += pairs.tile_counts[pair_tile(pairs, of_references, x, y).index];
    }
    candidates = block_sum(candidates, scratch);
    if (thread_index() == 0) {
        ways[x] = stores_all(pairs) && candidates * kListsShare < static_cast<uint64_t>(others) * TILE * TILE;
    }
}

// Where each of the sums stands that blocks add.
enum WeighSum { kLoss, kLambdaPos, kLambdaNeg, kSumPos, kSumSame, kNegatives, kActive, kMinedPos, kMinedNeg, kSumAll };
static_assert(kSumAll + 1 == WEIGH_SUMS, "params.h");

struct WeighShared {
    double scratch[THREADS / 32];
    double columns[2][THREADS / 32][32];
    uint32_t last;
};
static_assert(sizeof(WeighShared) <= WEIGH_SHARED_BYTES && kWeighWordsBytes <= WEIGH_SHARED_BYTES, "the launch plan's shared memory");

// One anchor's results, its weights and what it adds to the sums (SPEC 4); `i` may be padding.
DEVICE void weigh_anchor(const WeighParams &p, Tolerances tolerances, uint32_t i, double (&sums)[WEIGH_SUMS]) {
    const Pairs &pairs = p.pairs;
    const Settings &settings = pairs.settings;
    RowNumbers numbers{INFINITE, 0, 0, 0};
    if (i < pairs.anchors.count) {
        RowSums row = pairs.sums[i];
        RowSame same = pairs.same[i];
        ClassRange range = pairs.classes[i];
        uint32_t key = pairs.max_neg[i], original = pairs.anchors.order[i];
        p.min_pos[original] = same.min_pos;
        p.max_neg[original] = key == 0 ? -INFINITE : key_value(key);
        p.count_pos[original] = row.count_pos;
        p.count_neg[original] = row.count_neg;
        sums[kSumPos] = static_cast<double>(same.sum_pos);
        sums[kSumSame] = static_cast<double>(same.sum_same);
        if (i < pairs.counters->valid_anchors) {
            sums[kNegatives] = static_cast<double>(pairs.counters->valid_references - (range.end - range.begin));
        }
        numbers = RowNumbers{same.min_pos, key, row.count_pos, row.count_neg};
        if (row.count_pos != 0 && row.count_neg != 0) {
            double pos = 2.0 / (static_cast<double>(pairs.total) * static_cast<double>(row.count_pos));
            double neg = 2.0 / (static_cast<double>(pairs.total) * static_cast<double>(row.count_neg));
            sums[kLoss] = pos / settings.beta * static_cast<double>(row.softplus_pos) / settings.sum_scale +
                          neg / settings.alpha * static_cast<double>(row.softplus_neg) / settings.sum_scale;
            sums[kLambdaPos] = pos * static_cast<double>(row.sigmoid_pos) / settings.sum_scale;
            sums[kLambdaNeg] = -neg * static_cast<double>(row.sigmoid_neg) / settings.sum_scale;
            sums[kActive] = 1.0;
            sums[kMinedPos] = static_cast<double>(row.count_pos);
            sums[kMinedNeg] = static_cast<double>(row.count_neg);
        }
    }
    pairs.weights[i] = weights_of(pairs, tolerances, numbers);
}

// The sum of all similarities is the product of the column sums: that of every p.blocks-th 32 columns, by the first warp.
DEVICE double sum_of_columns(const WeighParams &p, WeighShared &shared) {
    const Pairs &pairs = p.pairs;
    double sum = 0.0;
    auto add = [&](const float *sums, uint32_t tiles, uint32_t d) {
        double total = 0.0;
        for (uint32_t tile = warp_index(); tile < tiles && d < pairs.stride; tile += THREADS / 32) {
            total += static_cast<double>(sums[static_cast<uint64_t>(tile) * pairs.stride + d]);
        }
        return total;
    };
    for (uint32_t d = block_x() * 32 + lane_index(); d - lane_index() < pairs.stride; d += p.blocks * 32) {
        double left = add(p.anchor_column_sums, pairs.anchors.tiles, d);
        shared.columns[0][warp_index()][lane_index()] = left;
        shared.columns[1][warp_index()][lane_index()] =
            pairs.square ? left : add(p.reference_column_sums, pairs.references.tiles, d);
        block_sync();
        if (warp_index() == 0) {
            double both[2] = {0.0, 0.0};
            for (int side = 0; side < 2; ++side) {
                for (uint32_t warp = 0; warp < THREADS / 32; ++warp) both[side] += shared.columns[side][warp][lane_index()];
            }
            sum += both[0] * both[1];
        }
        block_sync();  // they are read
    }
    return sum;
}

DEVICE void write_scalars(const WeighParams &p, Tolerances tolerances, const double (&sums)[WEIGH_SUMS]) {
    const Counters &counters = *p.pairs.counters;
    LossScalars &out = *p.scalars;
    // A caller that does not wait sees it by the loss.
    bool bad = counters.bad_anchor != NO_ROW || counters.bad_reference != NO_ROW;
    double negatives = sums[kNegatives];
    out.loss = bad ? static_cast<double>(NAN) : sums[kLoss];
    out.dloss_dlambda_pos = sums[kLambdaPos];
    out.dloss_dlambda_neg = sums[kLambdaNeg];
    out.mean_pos = sums[kSumPos] / static_cast<double>(counters.total_pos);  // 0 / 0 is the NaN that is wanted
    out.mean_neg = negatives == 0.0 ? 0.0 / negatives : (sums[kSumAll] - sums[kSumSame]) / negatives;
    out.gamma_pos = tolerances.pos;
    out.gamma_neg = tolerances.neg;
    out.probe_neg = counters.probe_neg;
    out.total_pos = counters.total_pos;
    out.total_neg = static_cast<uint64_t>(negatives);
    out.active = static_cast<uint64_t>(sums[kActive]);
    out.bad_anchor = counters.bad_anchor;
    out.bad_reference = counters.bad_reference;
    out.bad_square_sum = counters.bad_anchor != NO_ROW      ? p.anchor_square_sums[counters.bad_anchor]
                         : counters.bad_reference != NO_ROW ? p.reference_square_sums[counters.bad_reference]
                                                            : 1.0;
    out.mined_pos = static_cast<uint64_t>(sums[kMinedPos]);
    out.mined_neg = static_cast<uint64_t>(sums[kMinedNeg]);
}

KERNEL(weigh, WeighParams, 1) {
    SHARED_MEMORY(bytes);
    auto &shared = *reinterpret_cast<WeighShared *>(bytes);
    const Pairs &pairs = p.pairs;
    uint32_t x = block_x(), row = x * TILE + thread_index() % TILE;
    if (p.words != WEIGH_NO_WORDS && x < pairs.tiles) {
        auto scales = reinterpret_cast<Scales *>(bytes);
        if (p.words == WEIGH_WORDS_F16) weigh_words<HalfF16>(pairs, x, p.weight_scale, scales);
        if (p.words == WEIGH_WORDS_BF16) weigh_words<HalfBf16>(pairs, x, p.weight_scale, scales);
    }
    if (x >= p.blocks) return;
    block_sync();  // the scales are read
    Tolerances tolerances = adapt(pairs);
    double sums[WEIGH_SUMS];
#pragma unroll
    for (double &sum : sums) sum = 0.0;
    if (thread_index() < TILE) {
        if (x < pairs.anchors.tiles) weigh_anchor(p, tolerances, row, sums);
    } else if (pairs.columns != nullptr && x < pairs.references.tiles) {
        RowNumbers numbers = row < pairs.references.count ? pairs.columns[row] : RowNumbers{INFINITE, 0, 0, 0};
        pairs.column_weights[row] = weights_of(pairs, tolerances, numbers);
    }
    auto *scratch = reinterpret_cast<uint64_t *>(shared.scratch);
    if (p.ways[0] != nullptr && x < pairs.anchors.tiles) find_way(pairs, false, x, p.ways[0], scratch);
    if (p.ways[1] != nullptr && x < pairs.references.tiles) find_way(pairs, true, x, p.ways[1], scratch);
    sums[kSumAll] = sum_of_columns(p, shared);
#pragma unroll
    for (int k = 0; k < WEIGH_SUMS; ++k) {
        double sum = block_sum(sums[k], shared.scratch);
        if (thread_index() == 0) p.parts[x * WEIGH_SUMS + k] = sum;
    }
    if (!is_last_block(p.arrived, p.blocks, &shared.last)) return;
    // The blocks' sums, in order.
#pragma unroll
    for (int k = 0; k < WEIGH_SUMS; ++k) {
        double sum = 0.0;
        for (uint32_t block = thread_index(); block < p.blocks; block += THREADS) sum += p.parts[block * WEIGH_SUMS + k];
        sums[k] = block_sum(sum, shared.scratch);
    }
    if (thread_index() != 0) return;
    write_scalars(p, tolerances, sums);
    *p.arrived = 0;
}
