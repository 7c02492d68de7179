// row_lists.cuh: the gradient by lists, for rows with few mined pairs: a warp adds weight * r_j for each pair of a row (SPEC 4).
#ifndef DDTAS_ROW_LISTS_CUH
#define DDTAS_ROW_LISTS_CUH

#include "gradient/split_k.cuh"
#include "gradient/weight_tile.cuh"

// Pairs whose rows are loaded together, to overlap latency, and then added one after the other.
constexpr uint32_t kPairsAtOnce = 4;

// A pair that the whole warp adds.
struct ListedPair {
    float weight;
    uint32_t to;    // row of the warp
    uint32_t from;  // row of the other side
};

// Rows from `offset` of tile x on, `kWarpRows` for each of `warps` warps, and 256 columns. `weigh(i, j, s)` is the weight of a
// pair; `finish(row of the tile, column of the block, sum)` receives the sums. `bytes` has LISTS_COLUMNS floats for each row.
template <class Precision, uint32_t warps, uint32_t kWarpRows, class Weigh, class Finish>
DEVICE void sum_lists(const GradientParams &p, unsigned char *bytes, uint32_t x, uint32_t offset, Range range, Weigh weigh,
                      Finish finish) {
    using Element = typename Precision::Element;
    using Vector = Granule<Element>;
    auto *sums = reinterpret_cast<float *>(bytes);  // [warps * kWarpRows, LISTS_COLUMNS]
    const Pairs &pairs = p.pairs;
    ColumnBlock columns = column_block(pairs);
    auto rows = static_cast<const unsigned char *>(other_side(p).rows);

    // A warp accesses its own rows only: no block barrier is needed.
    float *warp_sums = sums + warp_index() * kWarpRows * LISTS_COLUMNS;
    for (uint32_t i = lane_index(); i < kWarpRows * LISTS_COLUMNS; i += 32) warp_sums[i] = 0.0f;
    warp_sync();
    for (uint32_t y = range.begin; y < range.end; ++y) {
        PairTile tile = pair_tile(pairs, p.of_references, x, y);
        uint32_t count = pairs.tile_counts[tile.index];
        if (count == 0) continue;
        uint64_t at = segment_of(pairs, tile.index);
        for (uint32_t base = 0; base < count; base += 32) {
            bool there = base + lane_index() < count;
            uint32_t place = there ? stored_index<Precision>(pairs.pool_words[at + base + lane_index()]) : 0;
            float s = there ? pairs.pool_values[at + base + lane_index()] : 0.0f;
            for (int orientation = 0; orientation < (tile.diagonal ? 2 : 1); ++orientation) {
                bool transposed = tile.transposed || orientation == 1;
                uint32_t of_x = transposed ? place % TILE : place / TILE, of_y = transposed ? place / TILE : place % TILE;
                uint32_t local = of_x - offset - warp_index() * kWarpRows;  // wraps around for rows of other warps
                float weight = 0.0f;
                if (there && local < kWarpRows) {
                    uint32_t row = x * TILE + of_x, column = y * TILE + of_y;
                    weight = transposed ? weigh(column, row, s) : weigh(row, column, s);
                }
                uint32_t left = ballot_sync(weight != 0.0f);
                while (left != 0) {
                    ListedPair listed[kPairsAtOnce];
                    uint32_t found = 0;
#pragma unroll
                    for (uint32_t a = 0; a < kPairsAtOnce; ++a) {
                        int lane = left == 0 ? 0 : lowest_bit(left);
                        found += left != 0;
                        left &= left - 1;  // 0 stays 0
                        listed[a] = ListedPair{shuffle(weight, lane), shuffle(local, lane), y * TILE + shuffle(of_y, lane)};
                    }
                    for (uint32_t column = lane_index() * Vector::count; column < columns.count; column += 32 * Vector::count) {
                        Vector values[kPairsAtOnce];
#pragma unroll
                        for (uint32_t a = 0; a < kPairsAtOnce; ++a) {
                            // Beyond the pairs found it is a valid row, too, and is not used.
                            values[a] = load_prepared<Precision>(rows, listed[a].from, columns.first + column,
                                                                 stride_bytes<Precision>(pairs));
                        }
#pragma unroll
                        for (uint32_t a = 0; a < kPairsAtOnce; ++a) {
                            if (a >= found) continue;  // the same for the whole warp
                            float *target = warp_sums + listed[a].to * LISTS_COLUMNS + column;
#pragma unroll
                            for (int i = 0; i < Vector::count; ++i) target[i] += listed[a].weight * to_float(values[a].values[i]);
                        }
                    }
                }
            }
        }
    }
    warp_sync();
    for (uint32_t r = 0; r < kWarpRows; ++r) {
        uint32_t row = offset + warp_index() * kWarpRows + r;
        if (row >= TILE) break;
        for (uint32_t column = lane_index(); column < columns.count; column += 32) {
            finish(row, column, warp_sums[r * LISTS_COLUMNS + column]);
        }
    }
    warp_sync();
}

// The lists with the gradient's weights.
template <class Precision, uint32_t warps, uint32_t kWarpRows>
DEVICE void gradient_lists(const GradientParams &p, unsigned char *bytes, uint32_t x, uint32_t offset) {
    uint32_t first_column = column_block(p.pairs).first;
    float one = one_or_nan(p.pairs);
    sum_lists<Precision, warps, kWarpRows>(
        p, bytes, x, offset, split_range(other_side(p).tiles, block_z(), p.splits),
        [&](uint32_t i, uint32_t j, float s) { return pair_weight(p.pairs, i, j, s); },
        [&](uint32_t row, uint32_t column, float sum) {
            ResultRow result = result_row(p, x * TILE + row);
            if (first_column + column < result.columns) result.to[first_column + column] = sum * one;
        });
}

#endif
