// weigh.cu: the loss, and what each row weighs (SPEC 4).
// Truth: src/loss/gradient.rs. Launcher: src/backend/device/passes.rs.
//
// weigh: per-row weights from the counts, the scalars, results in original order, and which way each row tile's gradient
//   goes, one block a row tile; the last to come adds their sums, in order. Of 16-bit rows further blocks, one for each tile of
//   S, finish its words (finish_words.cuh).

#include "selection/finish_words.cuh"

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

// This thread's share of the candidates of row tile x of one side.
DEVICE double count_candidates(const Pairs &pairs, bool of_references, uint32_t x) {
    uint32_t others = of_references ? pairs.anchors.tiles : pairs.references.tiles;
    uint64_t candidates = 0;
#pragma unroll 4
    for (uint32_t y = thread_index(); y < others; y += THREADS) {
        candidates += pairs.tile_counts[pair_tile(pairs, of_references, x, y).index];
    }
    return static_cast<double>(candidates);  // whole, and their sum is exact
}
// Lists or tiles. Lists want every tile stored: where some are not, which ones is by chance, and the sums of the two ways have
// other last bits, so that no row tile goes by lists there.
DEVICE bool goes_by_lists(const Pairs &pairs, bool of_references, double candidates) {
    uint32_t others = of_references ? pairs.anchors.tiles : pairs.references.tiles;
    return stores_all(pairs) && static_cast<uint64_t>(candidates) * kListsShare < static_cast<uint64_t>(others) * TILE * TILE;
}

// Where each of the sums stands that blocks add.
enum WeighSum { kLoss, kLambdaPos, kLambdaNeg, kSumPos, kSumSame, kNegatives, kActive, kMinedPos, kMinedNeg, kSumAll };
static_assert(kSumAll + 1 == WEIGH_SUMS, "params.h");
// And of a block alone: the candidates of its row tiles.
enum WeighOwn { kCandidates = WEIGH_SUMS, kCandidatesOfReferences, kWeighAll };

struct WeighShared {
    double scratch[kWeighAll][THREADS / 32];
    double columns[2][THREADS / 32][32];
    uint32_t last;
};
static_assert(sizeof(WeighShared) <= WEIGH_SHARED_BYTES && kWeighWordsBytes <= WEIGH_SHARED_BYTES, "the launch plan's shared memory");

// What a row adds to a pair's weight at most: of the positives it keeps to that of m+, of the negatives to that of m-.
DEVICE float largest_weight(const Settings &settings, const RowWeights &weights, const RowNumbers &row) {
    if (weights.pos_scale == 0.0f) return 0.0f;
    return fmaxf(weights.pos_scale * pair_sigmoid(settings, true, row.min_pos),
                 weights.neg_scale * pair_sigmoid(settings, false, key_value(row.max_neg)));
}

// One anchor's results, its weights and what it adds to the sums (SPEC 4); the largest of these weights. `i` may be padding.
DEVICE float weigh_anchor(const WeighParams &p, Tolerances tolerances, uint32_t i, double (&sums)[kWeighAll]) {
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
    return largest_weight(settings, pairs.weights[i], numbers);
}

// The sum of all similarities is the product of the column sums: that of every p.blocks-th 32 columns, by the first warp.
DEVICE double sum_of_columns(const WeighParams &p, WeighShared &shared) {
    const Pairs &pairs = p.pairs;
    double sum = 0.0;
    auto add = [&](const float *sums, uint32_t tiles, uint32_t d) {
        double total = 0.0;
#pragma unroll 4
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
    // A caller that does not wait sees it by the loss, and by its derivatives.
    double one = has_bad_row(counters) ? static_cast<double>(NAN) : 1.0;
    double negatives = sums[kNegatives];
    out.loss = sums[kLoss] * one;
    if (p.loss != nullptr) *p.loss = static_cast<float>(sums[kLoss] * one);
    out.dloss_dlambda_pos = sums[kLambdaPos] * one;
    out.dloss_dlambda_neg = sums[kLambdaNeg] * one;
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

// Sums over the block, each in the order of block_sum(): thread k gets that of value k. `scratch` may not be written again
// before a barrier.
template <int count>
DEVICE double block_sums(double (&values)[count], double (*scratch)[THREADS / 32]) {
#pragma unroll
    for (int k = 0; k < count; ++k) {
        values[k] = warp_sum(values[k]);
        if (lane_index() == 0) scratch[k][warp_index()] = values[k];
    }
    block_sync();
    if (thread_index() >= count) return 0.0;
    double total = scratch[thread_index()][0];
    for (uint32_t warp = 1; warp < THREADS / 32; ++warp) total += scratch[thread_index()][warp];
    return total;
}

// Row tile x of both sides; the last block to come here adds all.
DEVICE void weigh_rows(const WeighParams &p, uint32_t x, WeighShared &shared) {
    const Pairs &pairs = p.pairs;
    uint32_t row = x * TILE + thread_index() % TILE;
    double sums[kWeighAll] = {};
    bool anchors = p.ways[0] != nullptr && x < pairs.anchors.tiles, references = p.ways[1] != nullptr && x < pairs.references.tiles;
    if (anchors) sums[kCandidates] = count_candidates(pairs, false, x);
    if (references) sums[kCandidatesOfReferences] = count_candidates(pairs, true, x);
    Tolerances tolerances = adapt(pairs);
    float largest = 0.0f;
    if (thread_index() < TILE) {
        if (x < pairs.anchors.tiles) largest = weigh_anchor(p, tolerances, row, sums);
    } else if (pairs.columns != nullptr && x < pairs.references.tiles) {
        RowNumbers numbers = row < pairs.references.count ? pairs.columns[row] : RowNumbers{INFINITE, 0, 0, 0};
        pairs.column_weights[row] = weights_of(pairs, tolerances, numbers);
        largest = largest_weight(pairs.settings, pairs.column_weights[row], numbers);
    }
    for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
    if (lane_index() == 0 && largest > 0.0f) atomic_max(&pairs.counters->largest_weight, bits_of(largest));
    sums[kSumAll] = sum_of_columns(p, shared);
    double total = block_sums(sums, shared.scratch);
    if (thread_index() < WEIGH_SUMS) p.parts[x * WEIGH_SUMS + thread_index()] = total;
    if (thread_index() == kCandidates && anchors) p.ways[0][x] = goes_by_lists(pairs, false, total);
    if (thread_index() == kCandidatesOfReferences && references) p.ways[1][x] = goes_by_lists(pairs, true, total);
    if (!is_last_block(p.arrived, p.blocks, &shared.last)) return;
    // The blocks' sums, in order.
    double all[WEIGH_SUMS] = {};
    for (uint32_t block = thread_index(); block < p.blocks; block += THREADS) {
#pragma unroll
        for (int k = 0; k < WEIGH_SUMS; ++k) all[k] += p.parts[block * WEIGH_SUMS + k];
    }
    total = block_sums(all, shared.scratch);
    if (warp_index() != 0) return;
#pragma unroll
    for (int k = 0; k < WEIGH_SUMS; ++k) all[k] = shuffle(total, k);
    if (lane_index() != 0) return;
    write_scalars(p, tolerances, all);
    *p.arrived = 0;
}

KERNEL(weigh, WeighParams, 1) {
    SHARED_MEMORY(bytes);
    if (block_x() < p.blocks) return weigh_rows(p, block_x(), *reinterpret_cast<WeighShared *>(bytes));
    uint32_t tile = block_x() - p.blocks;
    auto scales = reinterpret_cast<Scales *>(bytes);
    if (p.words == WEIGH_WORDS_F16) weigh_words<F16Rows>(p.pairs, tile, p.weight_scale, scales);
    if (p.words == WEIGH_WORDS_BF16) weigh_words<Bf16Rows>(p.pairs, tile, p.weight_scale, scales);
}
