// threshold.cu: the two sums of the threshold generator's hyper-gradient (SPEC 5).
// Truth: src/loss/threshold.rs. Launcher: src/backend/device/threshold.rs.
//
// sum_ij W_ij (edot_i . e_j + e_i . edot_j) with W = dG/dlambda is <(W + W^T) E, edot>: the gradient's product with slopes for
// weights, then a dot product with the tangents (in the rectangular form each side with its own). S is that of the loss: stored,
// or recomputed as in the sweep.
// threshold: blocks as in gradient.cu, for the positives' lambda or the negatives'. A tile without pairs of that kind, as most
//   are for positives, is not multiplied.
// threshold_sum: the sum over blocks. One block.
// Precision: W has two parts of a 16-bit type, whose errors are below 2^-17 of a slope and average out over many pairs; sums of up
//   to 8 tiles are f32, all else f64, in a fixed order.

#include "gradient/tile_product.cuh"

// A number rounded to the type of M's elements.
template <class Precision>
DEVICE float rounded(float value) {
    return to_float(from_float<typename Precision::Element>(value));
}

constexpr uint32_t kTilesAtOnce = 8;  // tiles whose sums are added in f32 before the product with the tangent

// dM/dlambda for the positives' or the negatives' lambda, as the job of walk_tiles().
template <class Precision>
struct Slopes {
    // Two of 8 or 11 bits; the products of exact f32 split numbers themselves.
    static constexpr uint32_t parts = Precision::exact ? 1 : 2;
    static constexpr bool may_be_nothing = true, from_words = false;
    const ThresholdParams &p;
    const TileBlock &block;
    bool positives;
    uint32_t tiles = 0;
    double dot = 0.0;

    // The derivative of a pair's weight: share * sharpness * slope of the sigmoid.
    DEVICE float slope(uint32_t i, uint32_t j, float s) const {
        const Pairs &pairs = p.walk.pairs;
        bool positive;
        float share = pair_share(pairs, i, j, s, positive);
        if (share == 0.0f || positive != positives) return 0.0f;
        // The share of positives is negative, so both derivatives are below 0 (SPEC 5).
        auto sharpness = static_cast<float>(positive ? pairs.settings.beta : -pairs.settings.alpha);
        return share * sharpness * pair_slope(pairs.settings, positive, s);
    }
    DEVICE float weigh(uint32_t i, uint32_t j, float s, uint32_t part) const {
        float left = slope(i, j, s) * p.walk.weight_scale;
        for (uint32_t before = 0; before < part; ++before) left -= rounded<Precision>(left);
        return left;
    }
    // The tangent of row `row` of the result's side, null beyond the last row; and its entry in a column, 0 where there is none.
    DEVICE const float *tangent_of(uint64_t row) const {
        const Side &own = own_side(p.walk);
        return row < own.count ? p.tangent + static_cast<uint64_t>(own.order[row]) * p.walk.pairs.dim : nullptr;
    }
    DEVICE float moving(const float *tangent, uint32_t column) const {
        return tangent != nullptr && column < p.walk.pairs.dim ? tangent[column] : 0.0f;
    }
    DEVICE void flush(GradientSums<Precision> &sums) {
        double total = 0.0;
        each_sum<Precision>(sums, [&](uint32_t row) {
            compiler_barrier();  // this row's loads stay behind the previous row's
            const float *tangent = tangent_of(static_cast<uint64_t>(block.x) * TILE + block.offset + row);
            return [this, tangent, &total](uint32_t column, float &sum) {
                if (column < block.columns.count) total += static_cast<double>(sum * moving(tangent, block.columns.first + column));
                sum = 0.0f;
            };
        });
        dot += total / static_cast<double>(p.walk.weight_scale);
    }
    DEVICE void after(GradientSums<Precision> &sums) {
        if (++tiles % kTilesAtOnce == 0) flush(sums);
    }
};

template <class Precision, bool group>
DEVICE void threshold_walk(const ThresholdParams &p) {
    SHARED_MEMORY(bytes);
    const GradientParams &walk = p.walk;
    uint32_t split = block_z() % walk.splits, of_negatives = block_z() / walk.splits;
    TileBlock block = tile_block<Precision>(walk);
    Slopes<Precision> job{p, block, of_negatives == 0};
    Range range = split_range(other_side(walk).tiles, split, walk.splits);
    if (walk.by_lists != nullptr && walk.by_lists[block.x]) {
        for (uint32_t first = 0; first < kMatrixRows<Precision>; first += kListsPart) {
            sum_lists<Precision, THREADS / 32, kListsRows>(
                walk, bytes, block.x, block.offset + first, range, [&](uint32_t i, uint32_t j, float s) { return job.slope(i, j, s); },
                [&](uint32_t row, uint32_t column, float sum) {
                    const float *tangent = job.tangent_of(static_cast<uint64_t>(block.x) * TILE + row);
                    job.dot += static_cast<double>(sum) * static_cast<double>(job.moving(tangent, block.columns.first + column));
                });
        }
    } else {
        TileMemory<Precision> memory(bytes);
#ifdef HAS_WGMMA
        if constexpr (group) memory.group.begin();
#endif
        GradientSums<Precision> sums;
        clear_sums<Precision>(sums);
        walk_tiles<Precision, group>(walk, memory, block, range, job, sums);
        job.flush(sums);
    }
    block_sync();  // the stages are no longer used
    double dot = block_sum(job.dot, reinterpret_cast<double *>(bytes));
    if (thread_index() == 0) {
        uint32_t columns = (walk.pairs.stride + GRADIENT_COLUMNS - 1) / GRADIENT_COLUMNS;
        p.partial[static_cast<uint64_t>(of_negatives) * p.blocks + p.first +
                  (static_cast<uint64_t>(split) * columns + block_y()) * grid_x() + block_x()] = dot;
    }
}
template <class Precision>
DEVICE void threshold_body(const ThresholdParams &p) {
    threshold_walk<Precision, false>(p);
}
KERNEL_IN_EVERY_PRECISION(threshold, ThresholdParams)

#ifdef HAS_WGMMA
template <class Precision>
DEVICE void threshold_hopper_body(const ThresholdParams &p) {
    threshold_walk<Precision, true>(p);
}
#endif
HOPPER_KERNEL_IN_EVERY_PRECISION(threshold_hopper, ThresholdParams)

KERNEL(threshold_sum, ThresholdSumParams, 1) {
    SHARED_MEMORY(bytes);
    auto *scratch = reinterpret_cast<double *>(bytes);
    for (uint32_t kind = 0; kind < 2; ++kind) {
        double sum = 0.0;
        for (uint64_t block = thread_index(); block < p.blocks; block += THREADS) sum += p.partial[kind * p.blocks + block];
        sum = block_sum(sum, scratch);
        if (thread_index() == 0) p.sums[kind] = sum;
    }
}
