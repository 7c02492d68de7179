// threshold.cu: the two sums of the threshold generator's hyper-gradient (SPEC 5).
// Truth: src/loss/threshold.rs. Launcher: src/backend/device/threshold.rs.
//
// sum_ij (dG_ij/dlambda) tilt_ij, tilt_ij = edot_i . e_j + e_i . edot_j, over the mined pairs
// of the last loss. tilt is one product: the rows [edot | e] times the rows [e | edot].
// threshold_prepare: these rows, in f32 and class order. One block a row tile.
// threshold: a tile of tilt on tensor cores, then the tile's candidates, or its recomputed S.
//   One block a tile; tiles without candidates cost nothing.
// threshold_sum: the sum over tiles. One block.
// Numbers: tilt in three TF32 products whatever the type, since edot is f32; sums in f64, one order.

#include "weight.cuh"

template <class Element>
DEVICE void threshold_prepare_body(const ThresholdPrepareParams &p) {
    auto rows = static_cast<const unsigned char *>(p.rows);
    auto joined = reinterpret_cast<unsigned char *>(p.joined);
    uint64_t stride_bytes = static_cast<uint64_t>(p.stride) * sizeof(Element);
    uint64_t joined_bytes = 2 * static_cast<uint64_t>(p.joined_half) * sizeof(float);
    for (uint32_t r = warp_index(); r < TILE; r += THREADS / 32) {
        uint64_t row = static_cast<uint64_t>(block_x()) * TILE + r;
        uint32_t original = row < p.count ? p.order[row] : 0;
        auto to = [&](uint32_t d) {
            return reinterpret_cast<float *>(joined + prepared_place(row, d * sizeof(float), joined_bytes));
        };
        for (uint32_t d = lane_index(); d < p.joined_half; d += 32) {
            bool there = row < p.count && d < p.dim;
            float value = 0.0f;
            if (there) {
                value = to_float(*reinterpret_cast<const Element *>(rows + prepared_place(row, d * sizeof(Element), stride_bytes)));
            }
            float moving = there && p.tangent != nullptr ? p.tangent[static_cast<uint64_t>(original) * p.dim + d] : 0.0f;
            *to(d) = p.tangent_first ? moving : value;
            *to(p.joined_half + d) = p.tangent_first ? value : moving;
        }
    }
}
KERNEL(threshold_prepare_f32, ThresholdPrepareParams, 1) { threshold_prepare_body<float>(p); }
KERNEL(threshold_prepare_tf32, ThresholdPrepareParams, 1) { threshold_prepare_body<float>(p); }
KERNEL(threshold_prepare_f16, ThresholdPrepareParams, 1) { threshold_prepare_body<F16>(p); }
KERNEL(threshold_prepare_bf16, ThresholdPrepareParams, 1) { threshold_prepare_body<Bf16>(p); }

// Adds dM/dlambda * tilt of one pair: the derivative of its weight is its share times the sharpness and
// the slope of its sigmoid.
DEVICE void add_slope(const Pairs &pairs, uint32_t i, uint32_t j, float s, float tilt, double &pos, double &neg) {
    bool positive;
    float share = pair_share(pairs, i, j, s, positive);
    if (share == 0.0f) return;
    // The share is negative for positives: both derivatives are below 0 (SPEC 5).
    auto sharpness = static_cast<float>(positive ? pairs.settings.beta : -pairs.settings.alpha);
    double slope = static_cast<double>(share * sharpness * pair_slope(pairs.settings, positive, s));
    pos += positive ? slope * static_cast<double>(tilt) : 0.0;
    neg += positive ? 0.0 : slope * static_cast<double>(tilt);
}

template <class Numbers>
DEVICE void threshold_body(const ThresholdParams &p) {
    SHARED_MEMORY(bytes);
    const Pairs &pairs = p.pairs;
    uint64_t index = block_x();
    uint32_t count = pairs.tile_counts[index];
    double pos = 0.0, neg = 0.0;
    if (count != 0) {
        TileIndex tile = tile_of(pairs, index);
        // All or none: the two ways add the same terms in another order.
        bool stored = stores_all(pairs);
        uint64_t joined = 2 * static_cast<uint64_t>(p.joined_half);
        auto rows = static_cast<const unsigned char *>(tile_rows<Numbers>(pairs.anchors, tile.row, pairs.stride));
        auto left = reinterpret_cast<const unsigned char *>(p.left + static_cast<uint64_t>(tile.row) * TILE * joined);
        Place<2> place;
        // Half the rows at a time: tilt and S together are too many registers for all.
        for (uint32_t half = 0; half < TILE; half += TILE / 2) {
            Accumulators<2> similarity, tilt;
            if (!stored) {
                multiply_tile<Numbers, 2>(similarity, rows + half * STAGE_BYTES,
                                          tile_rows<Numbers>(pairs.references, tile.column, pairs.stride),
                                          stride_bytes<Numbers>(pairs), bytes, false);
            }
            multiply_tile<ExactF32, 2>(tilt, left + half * STAGE_BYTES,
                                       p.right + static_cast<uint64_t>(tile.column) * TILE * joined,
                                       joined * sizeof(float), bytes, false);
            if (!stored) {
#pragma unroll
                for (int row = 0; row < 4; ++row) {
#pragma unroll
                    for (int column = 0; column < 8; ++column) {
                        uint32_t i = tile.row * TILE + half + place.row(row / 2, row % 2);
                        uint32_t j = tile.column * TILE + place.column(column / 2, column % 2);
                        if (!is_pair(pairs, i, j)) continue;
                        int at = row % 2 * 2 + column % 2;
                        add_slope(pairs, i, j, similarity[row / 2][column / 2][at], tilt[row / 2][column / 2][at], pos, neg);
                    }
                }
                continue;
            }
            // Candidates may stand anywhere in the tile: through shared memory, over the stages.
            auto *tilts = reinterpret_cast<float *>(bytes);  // [TILE / 2, TILE]
#pragma unroll
            for (int row = 0; row < 4; ++row) {
#pragma unroll
                for (int column = 0; column < 8; ++column) {
                    tilts[place.row(row / 2, row % 2) * TILE + place.column(column / 2, column % 2)] =
                        tilt[row / 2][column / 2][row % 2 * 2 + column % 2];
                }
            }
            block_sync();
            uint64_t at = segment_of(pairs, index);
            for (uint32_t k = thread_index(); k < count; k += THREADS) {
                uint32_t place = word_place(pairs.pool_words[at + k]), row = place / TILE, column = place % TILE;
                if (row - half >= TILE / 2) continue;
                add_slope(pairs, tile.row * TILE + row, tile.column * TILE + column, pairs.pool_values[at + k],
                          tilts[(row - half) * TILE + column], pos, neg);
            }
            block_sync();  // the tilts are read
        }
    }
    block_sync();  // nobody is left in the stages
    auto *scratch = reinterpret_cast<double *>(bytes);
    pos = block_sum(pos, scratch);
    neg = block_sum(neg, scratch);
    if (thread_index() == 0) {
        p.partial[2 * index] = pos;
        p.partial[2 * index + 1] = neg;
    }
}
KERNEL_IN_EVERY_PRECISION(threshold, ThresholdParams, 1)

KERNEL(threshold_sum, ThresholdSumParams, 1) {
    SHARED_MEMORY(bytes);
    auto *scratch = reinterpret_cast<double *>(bytes);
    double pos = 0.0, neg = 0.0;
    for (uint64_t tile = thread_index(); tile < p.tiles; tile += THREADS) {
        pos += p.partial[2 * tile];
        neg += p.partial[2 * tile + 1];
    }
    pos = block_sum(pos, scratch);
    neg = block_sum(neg, scratch);
    if (thread_index() == 0) {
        p.sums[0] = pos;
        p.sums[1] = neg;
    }
}
