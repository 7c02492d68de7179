// weigh.cu: the loss, and the weights of the rows (SPEC 4).
// Truth: src/loss/gradient.rs. Launcher: src/backend/device/passes.rs.
//
// weigh: a block for each row tile computes per-row weights from the counts, per-anchor results in original order, and whether
//   the tile's gradient goes by lists; the last block to arrive adds the blocks' sums, in order, and writes the scalars. For
//   16-bit rows further blocks, one for each tile of S, finish its words (finish_words.cuh).

#include "selection/finish_words.cuh"

// The factors of an active row's positives and negatives; 0 for a row without pairs of both kinds.
struct SetShares {
    double pos, neg;
};
DEVICE SetShares set_shares(const Pairs &pairs, uint32_t count_pos, uint32_t count_neg) {
    if (count_pos == 0 || count_neg == 0) return SetShares{0.0, 0.0};
    return SetShares{set_share(pairs, count_pos), set_share(pairs, count_neg)};
}

// A row's bounds and factors. No similarity passes the bounds of an inactive row.
DEVICE RowWeights weights_of(SetShares shares, Tolerances tolerances, float min_pos, uint32_t max_neg) {
    if (shares.pos == 0.0) return RowWeights{-INFINITE, INFINITE, 0.0f, 0.0f};
    return RowWeights{positive_bound(max_neg, tolerances.pos), negative_bound(min_pos, tolerances.neg),
                      static_cast<float>(shares.pos), static_cast<float>(shares.neg)};
}

// Below this share of candidates (1 in kListsShare) a row tile's gradient is summed from lists. By lists a pair costs a read
// of 1 KB and 2 x 1 KB of shared memory traffic for 256 columns, some 32 cycles; a 64 x 128 tile of M costs the tensor cores
// about 1,000 cycles for as many columns, whatever is in it. 32 pairs of 8,192 are 0.4 %.
constexpr uint64_t kListsShare = 256;

// This thread's share of the candidates of row tile x of one side.
DEVICE double count_candidates(const Pairs &pairs, bool of_references, uint32_t x) {
    uint32_t others = of_references ? pairs.anchors.tiles : pairs.references.tiles;
    uint64_t candidates = 0;
#pragma unroll 2
    for (uint32_t y = thread_index(); y < others; y += THREADS) {
        candidates += pairs.tile_counts[pair_tile(pairs, of_references, x, y).index];
    }
    return static_cast<double>(candidates);  // an integer: the sum over the block is exact
}
// Whether a row tile's gradient goes by lists. These need every tile stored; if some are not, timing decides which ones. Since
// sums by lists and by tiles differ in the last bits, no row tile goes by lists if the candidates of all tiles need more than
// `pool` units, whatever the pool's size, and none in a smaller pool: all larger pools give the same bits. A sixteenth of the
// largest pool is enough where lists are worth while, except in small batches, which have nearly full tiles beside empty ones.
// 8 GiB are enough for every batch.
constexpr uint64_t kUnitsOfTile = TILE * TILE / 4, kFewestUnits = 1 << 16, kMostUnits = 1 << 28;
DEVICE bool goes_by_lists(const Pairs &pairs, bool of_references, double candidates) {
    uint64_t all = pairs.tiles * kUnitsOfTile, pool = all / 16 < kMostUnits ? all / 16 : kMostUnits;
    if (pool < kFewestUnits) pool = all < kFewestUnits ? all : kFewestUnits;
    if (pairs.pool < pool || pairs.counters->pool_units > pool) return false;
    uint32_t others = of_references ? pairs.anchors.tiles : pairs.references.tiles;
    return static_cast<uint64_t>(candidates) * kListsShare < static_cast<uint64_t>(others) * TILE * TILE;
}

// The sums that are added over the blocks.
enum WeighSum { kLoss, kLambdaPos, kLambdaNeg, kSumPos, kSumSame, kNegatives, kActive, kMinedPos, kMinedNeg, kSumAll };
static_assert(kSumAll + 1 == WEIGH_SUMS, "params.h");
// Sums of one block: the candidates of its row tiles.
enum WeighOwn { kCandidates = WEIGH_SUMS, kCandidatesOfReferences, kWeighAll };

constexpr uint32_t kWarps = THREADS / 32;
struct WeighShared {
    double of_warps[kWeighAll][kWarps];
    double totals[WEIGH_SUMS];
    double columns[2][kWarps][32];
    uint32_t last;
};
static_assert(sizeof(WeighShared) <= WEIGH_SHARED_BYTES && kWeighWordsBytes <= WEIGH_SHARED_BYTES, "the launch plan's shared memory");

// Adds a thread's part of sum k over its warp at once, so that no thread has all sums in registers.
DEVICE void add_to(WeighShared &shared, int k, double value) {
    value = warp_sum(value);
    if (lane_index() == 0) shared.of_warps[k][warp_index()] = value;
}

// The most that a row adds to the weight of a pair: among its positives that is the share of m+, among its negatives that of m-.
DEVICE float largest_weight(const Settings &settings, const RowWeights &weights, float min_pos, uint32_t max_neg) {
    if (weights.pos_scale == 0.0f) return 0.0f;
    return fmaxf(weights.pos_scale * pair_sigmoid(settings, true, min_pos),
                 weights.neg_scale * pair_sigmoid(settings, false, key_value(max_neg)));
}

// An anchor's mined pairs of one kind.
struct Mined {
    uint32_t count = 0;
    int64_t softplus = 0, sigmoid = 0;
};
DEVICE Mined mined_by(const MinedSums &sums, uint32_t i) { return Mined{sums.count[i], sums.softplus[i], sums.sigmoid[i]}; }

// Writes one anchor's results and weights and adds its terms to the sums (SPEC 4), by whole warps. Returns the largest of its
// weights. `i` may be padding, or NO_ROW.
DEVICE float weigh_anchor(const WeighParams &p, Tolerances tolerances, uint32_t i, WeighShared &shared) {
    const Pairs &pairs = p.pairs;
    const Settings &settings = pairs.settings;
    Mined pos, neg;
    RowSame same{INFINITE, 0, 0.0f, 0.0f};
    uint32_t key = 0;
    double negatives = 0.0;
    if (i < pairs.anchors.count) {
        pos = mined_by(pairs.positives, i);
        neg = mined_by(pairs.negatives, i);
        same = pairs.same[i];
        key = pairs.max_neg[i];
        ClassRange range = pairs.classes[i];
        uint32_t original = pairs.anchors.order[i];
        p.min_pos[original] = same.min_pos;
        p.max_neg[original] = key == 0 ? -INFINITE : key_value(key);
        p.count_pos[original] = pos.count;
        p.count_neg[original] = neg.count;
        if (i < pairs.counters->valid_anchors) {
            negatives = static_cast<double>(pairs.counters->valid_references - (range.end - range.begin));
        }
    }
    add_to(shared, kSumPos, static_cast<double>(same.sum_pos));
    add_to(shared, kSumSame, static_cast<double>(same.sum_same));
    add_to(shared, kNegatives, negatives);
    SetShares shares = set_shares(pairs, pos.count, neg.count);
    add_to(shared, kLoss, shares.pos / settings.beta * static_cast<double>(pos.softplus) / settings.sum_scale +
                              shares.neg / settings.alpha * static_cast<double>(neg.softplus) / settings.sum_scale);
    add_to(shared, kLambdaPos, shares.pos * static_cast<double>(pos.sigmoid) / settings.sum_scale);
    add_to(shared, kLambdaNeg, 0.0 - shares.neg * static_cast<double>(neg.sigmoid) / settings.sum_scale);
    bool active = shares.pos != 0.0;
    add_to(shared, kActive, active ? 1.0 : 0.0);
    add_to(shared, kMinedPos, active ? static_cast<double>(pos.count) : 0.0);
    add_to(shared, kMinedNeg, active ? static_cast<double>(neg.count) : 0.0);
    if (i == NO_ROW) return 0.0f;
    RowWeights weights = weights_of(shares, tolerances, same.min_pos, key);
    pairs.weights[i] = weights;
    return largest_weight(settings, weights, same.min_pos, key);
}

// The sum of all similarities is the dot product of the two sides' column sums. This is the block's part of it: every p.blocks-th
// group of 32 columns. With few blocks fewer warps share the tiles of a group.
DEVICE double sum_of_columns(const WeighParams &p, WeighShared &shared) {
    const Pairs &pairs = p.pairs;
    uint32_t groups = (pairs.stride + 31) / 32, sharing = kWarps;
    while (sharing > 1 && p.blocks * (kWarps / sharing) < groups) sharing /= 2;
    uint32_t at_once = kWarps / sharing, own = warp_index() / sharing, share = warp_index() % sharing;
    auto add = [&](const float *sums, uint32_t tiles, uint32_t d) {
        double total = 0.0;
#pragma unroll 4
        for (uint32_t tile = share; tile < tiles && d < pairs.stride; tile += sharing) {
            total += static_cast<double>(sums[static_cast<uint64_t>(tile) * pairs.stride + d]);
        }
        return total;
    };
    double sum = 0.0;
    for (uint32_t first = block_x() * at_once; first < groups; first += p.blocks * at_once) {
        uint32_t d = (first + own) * 32 + lane_index();
        double left = add(p.anchor_column_sums, pairs.anchors.tiles, d);
        double right = pairs.square ? left : add(p.reference_column_sums, pairs.references.tiles, d);
        if (sharing == 1) {
            sum += left * right;
            continue;
        }
        shared.columns[0][warp_index()][lane_index()] = left;
        shared.columns[1][warp_index()][lane_index()] = right;
        block_sync();
        if (share == 0) {
            for (uint32_t other = 1; other < sharing; ++other) {
                left += shared.columns[0][warp_index() + other][lane_index()];
                right += shared.columns[1][warp_index() + other][lane_index()];
            }
            sum += left * right;
        }
        block_sync();  // the sums have been read
    }
    return sum;
}

DEVICE void write_scalars(const WeighParams &p, Tolerances tolerances, const double *sums) {
    const Counters &counters = *p.pairs.counters;
    LossScalars &out = *p.scalars;
    // Callers that do not wait learn of a bad row by a NaN loss and derivatives.
    double one = has_bad_row(counters) ? static_cast<double>(NAN) : 1.0;
    double negatives = sums[kNegatives];
    out.loss = sums[kLoss] * one;
    if (p.loss != nullptr) *p.loss = static_cast<float>(sums[kLoss] * one);
    out.dloss_dlambda_pos = sums[kLambdaPos] * one;
    out.dloss_dlambda_neg = sums[kLambdaNeg] * one;
    out.mean_pos = sums[kSumPos] / static_cast<double>(counters.total_pos);  // NaN without positives, as intended
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

// Row tile x of both sides. The last block to arrive adds all sums.
DEVICE void weigh_rows(const WeighParams &p, uint32_t x, WeighShared &shared) {
    const Pairs &pairs = p.pairs;
    uint32_t row = x * TILE + thread_index() % TILE;
    bool anchors = p.by_lists[0] != nullptr && x < pairs.anchors.tiles;
    bool references = p.by_lists[1] != nullptr && x < pairs.references.tiles;
    add_to(shared, kSumAll, sum_of_columns(p, shared));
    add_to(shared, kCandidates, anchors ? count_candidates(pairs, false, x) : 0.0);
    add_to(shared, kCandidatesOfReferences, references ? count_candidates(pairs, true, x) : 0.0);
    Tolerances tolerances = adapt(pairs);
    float largest = weigh_anchor(p, tolerances, thread_index() < TILE && x < pairs.anchors.tiles ? row : NO_ROW, shared);
    if (thread_index() >= TILE && pairs.columns != nullptr && x < pairs.references.tiles) {
        RowNumbers numbers = row < pairs.references.count ? pairs.columns[row] : RowNumbers{INFINITE, 0, 0, 0};
        SetShares shares = set_shares(pairs, numbers.count_pos, numbers.count_neg);
        RowWeights weights = weights_of(shares, tolerances, numbers.min_pos, numbers.max_neg);
        pairs.column_weights[row] = weights;
        largest = largest_weight(pairs.settings, weights, numbers.min_pos, numbers.max_neg);
    }
    for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
    if (lane_index() == 0 && largest > 0.0f) atomic_max(&pairs.counters->largest_weight, bits_of(largest));
    block_sync();
    double total = 0.0;  // thread k has sum k
    if (thread_index() < kWeighAll) {
        for (double of_warp : shared.of_warps[thread_index()]) total += of_warp;
    }
    if (thread_index() < WEIGH_SUMS) p.parts[x * WEIGH_SUMS + thread_index()] = total;
    if (thread_index() == kCandidates && anchors) p.by_lists[0][x] = goes_by_lists(pairs, false, total);
    if (thread_index() == kCandidatesOfReferences && references) p.by_lists[1][x] = goes_by_lists(pairs, true, total);
    if (!is_last_block(p.arrived, p.blocks, &shared.last)) return;
    // The sums over all blocks, in order, a warp for each sum.
    for (uint32_t k = warp_index(); k < WEIGH_SUMS; k += kWarps) {
        double all = 0.0;
#pragma unroll 4
        for (uint32_t block = lane_index(); block < p.blocks; block += 32) all += p.parts[block * WEIGH_SUMS + k];
        all = warp_sum(all);
        if (lane_index() == 0) shared.totals[k] = all;
    }
    block_sync();
    if (thread_index() != 0) return;
    write_scalars(p, tolerances, shared.totals);
    *p.arrived = 0;
}

KERNEL(weigh, WeighParams, 5) {
    SHARED_MEMORY(bytes);
    if (block_x() < p.blocks) return weigh_rows(p, block_x(), *reinterpret_cast<WeighShared *>(bytes));
    uint32_t tile = block_x() - p.blocks;
    auto scales = reinterpret_cast<Scales *>(bytes);
    if (p.words == WEIGH_WORDS_F16) weigh_words<F16Rows>(p.pairs, tile, p.weight_scale, scales);
    if (p.words == WEIGH_WORDS_BF16) weigh_words<Bf16Rows>(p.pairs, tile, p.weight_scale, scales);
}
