// gradient.cu: dE = M R, M = G + G^T, or one side's part in the rectangular form (SPEC 4).
// Truth: src/loss/reference.rs. Launcher: src/backend/device/loss.rs.
//
// gradient_ways: lists or tiles, for each row tile, by the density of its candidates.
// gradient_lists: few mined pairs. A warp owns 8 rows and adds r_j for every pair of theirs.
// gradient_tiles: gradient_tiles.cu, on Hopper gradient_hopper.cu.
// gradient_sum: adds the splits and undoes the class order; with one split the kernels above do that.
// One block owns some rows of the result and walks the other side's tiles in order, so that
// every sum has one order: no atomics. Small batches share a row block among `splits`.
// Numbers: sums are f32.

#include "matrix.cuh"

// Below this share of candidates a row tile's gradient is summed from lists. A pair costs
// the list way 1 KB read and 2 x 1 KB of shared memory for 256 columns, some 32 cycles; a
// 64 x 128 tile of M costs the tensor cores about 1,000 for as many, whatever is in it.
// 32 pairs of 8,192 are 0.4 %.
constexpr uint64_t kListsShare = 256;

KERNEL(gradient_ways, WaysParams, 2) {
    SHARED_MEMORY(bytes);
    auto *scratch = reinterpret_cast<uint64_t *>(bytes);
    const Pairs &pairs = p.pairs;
    uint32_t others = p.of_references ? pairs.anchors.tiles : pairs.references.tiles;
    uint64_t candidates = 0, missing = 0;
    for (uint32_t y = thread_index(); y < others; y += THREADS) {
        uint32_t count = pairs.tile_counts[pair_tile(pairs, p.of_references, block_x(), y).index];
        candidates += count;
        missing += count > pairs.tile_capacity;
    }
    candidates = block_sum(candidates, scratch);
    missing = block_sum(missing, scratch);
    if (thread_index() == 0) {
        p.ways[block_x()] = missing == 0 && candidates * kListsShare < static_cast<uint64_t>(others) * TILE * TILE;
    }
}

template <class Numbers>
DEVICE void gradient_lists_body(const GradientParams &p) {
    using Element = typename Numbers::Element;
    using Vector = Granule<Element>;
    SHARED_MEMORY(bytes);
    auto *sums = reinterpret_cast<float *>(bytes);  // [LISTS_ROWS, LISTS_COLUMNS]
    const Pairs &pairs = p.pairs;
    const Side &own = p.of_references ? pairs.references : pairs.anchors;
    const Side &other = p.of_references ? pairs.anchors : pairs.references;
    uint32_t x = block_x() / (TILE / LISTS_ROWS), offset = block_x() % (TILE / LISTS_ROWS) * LISTS_ROWS;
    if (!p.ways[x]) return;
    uint32_t first_column = block_y() * LISTS_COLUMNS;
    uint32_t columns = pairs.stride - first_column < LISTS_COLUMNS ? pairs.stride - first_column : LISTS_COLUMNS;
    auto rows = static_cast<const unsigned char *>(other.rows);

    // A warp touches its own 8 rows only: no barrier, just its lanes.
    constexpr uint32_t kWarpRows = LISTS_ROWS / (THREADS / 32);
    float *warp_sums = sums + warp_index() * kWarpRows * LISTS_COLUMNS;
    for (uint32_t i = lane_index(); i < kWarpRows * LISTS_COLUMNS; i += 32) warp_sums[i] = 0.0f;
    warp_sync();
    Range range = split_range(other.tiles, block_z(), p.splits);
    for (uint32_t y = range.begin; y < range.end; ++y) {
        PairTile tile = pair_tile(pairs, p.of_references, x, y);
        uint32_t count = pairs.tile_counts[tile.index];
        uint64_t at = tile.index * pairs.tile_capacity;
        for (uint32_t base = 0; base < count; base += 32) {
            bool there = base + lane_index() < count;
            uint32_t place = there ? word_place(pairs.tile_words[at + base + lane_index()]) : 0;
            float s = there ? pairs.tile_values[at + base + lane_index()] : 0.0f;
            for (int turn = 0; turn < (tile.diagonal ? 2 : 1); ++turn) {
                bool transposed = tile.transposed || turn == 1;
                uint32_t of_x = transposed ? place % TILE : place / TILE, of_y = transposed ? place / TILE : place % TILE;
                uint32_t local = of_x - offset - warp_index() * kWarpRows;  // wraps around for rows of others
                float weight = 0.0f;
                if (there && local < kWarpRows) {
                    uint32_t row = x * TILE + of_x, column = y * TILE + of_y;
                    weight = transposed ? pair_weight(pairs, column, row, s) : pair_weight(pairs, row, column, s);
                }
                for (uint32_t left = ballot_sync(weight != 0.0f); left != 0; left &= left - 1) {
                    int lane = lowest_bit(left);
                    float pair = shuffle(weight, lane);
                    uint32_t to = shuffle(local, lane), from = y * TILE + shuffle(of_y, lane);
                    for (uint32_t column = lane_index() * Vector::count; column < columns; column += 32 * Vector::count) {
                        uint32_t byte = (first_column + column) * static_cast<uint32_t>(sizeof(Element));
                        Vector values = *reinterpret_cast<const Vector *>(
                            rows + prepared_place(from, byte, stride_bytes<Numbers>(pairs)));
                        float *target = warp_sums + to * LISTS_COLUMNS + column;
#pragma unroll
                        for (int i = 0; i < Vector::count; ++i) target[i] += pair * to_float(values.values[i]);
                    }
                }
            }
        }
    }
    warp_sync();
    for (uint32_t r = 0; r < kWarpRows; ++r) {
        ResultRow result = result_row(p, own, x * TILE + offset + warp_index() * kWarpRows + r);
        for (uint32_t column = lane_index(); column < columns && first_column + column < result.columns; column += 32) {
            result.to[first_column + column] = warp_sums[r * LISTS_COLUMNS + column];
        }
    }
}
KERNEL(gradient_lists_f32, GradientParams, 1) { gradient_lists_body<ExactF32>(p); }
KERNEL(gradient_lists_tf32, GradientParams, 1) { gradient_lists_body<FastF32>(p); }
KERNEL(gradient_lists_f16, GradientParams, 1) { gradient_lists_body<HalfF16>(p); }
KERNEL(gradient_lists_bf16, GradientParams, 1) { gradient_lists_body<HalfBf16>(p); }

// One block a row tile.
KERNEL(gradient_sum, GradientSumParams, 1) {
    for (uint32_t r = warp_index(); r < TILE; r += THREADS / 32) {
        uint32_t row = block_x() * TILE + r;
        if (row >= p.count) break;
        float *to = p.gradient + static_cast<uint64_t>(p.order[row]) * p.dim;
        for (uint32_t d = lane_index(); d < p.dim; d += 32) {
            float sum = 0.0f;
            for (uint32_t split = 0; split < p.splits; ++split) {
                sum += p.partial[(static_cast<uint64_t>(split) * p.padded_rows + row) * p.stride + d];
            }
            to[d] = sum;
        }
    }
}
