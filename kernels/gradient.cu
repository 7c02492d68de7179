// gradient.cu: dE = M R, M = G + G^T, or one side's part in the rectangular form (SPEC 4).
// Truth: src/loss/reference.rs. Launcher: src/backend/device/loss.rs.
//
// gradient_ways: lists or tiles, for each row tile, by the density of its candidates.
// gradient_lists: few mined pairs. A warp owns 8 rows and adds r_j for every pair of theirs.
// gradient_tiles: the tile of M is rebuilt in shared memory, from the stored candidates or
//   from a recomputed tile of S, and multiplied on tensor cores.
// gradient_sum: adds the splits and undoes the class order.
// One block owns some rows of the result and walks the other side's tiles in order, so that
// every sum has one order: no atomics. Small batches share a row block among `splits`.
// Numbers: 16-bit types hold M scaled by a power of two; sums are f32.

#include "weight.cuh"

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

// Tiles of the other side that a split walks.
struct Range {
    uint32_t begin;
    uint32_t end;
};
DEVICE Range split_range(uint32_t tiles, uint32_t split, uint32_t splits) {
    return Range{static_cast<uint32_t>(static_cast<uint64_t>(tiles) * split / splits),
                 static_cast<uint32_t>(static_cast<uint64_t>(tiles) * (split + 1) / splits)};
}

// 16 bytes of a row.
template <class Element>
struct alignas(16) Granule {
    static constexpr int count = 16 / sizeof(Element);
    Element values[count];
};

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
            uint32_t place = there ? pairs.tile_places[at + base + lane_index()] : 0;
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
                for (uint32_t left = vote_mask(weight != 0.0f); left != 0; left &= left - 1) {
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
    uint64_t padded_rows = static_cast<uint64_t>(own.tiles) * TILE;
    uint64_t row = block_z() * padded_rows + x * TILE + offset + warp_index() * kWarpRows;
    float *to = p.partial + row * pairs.stride + first_column;
    for (uint32_t r = 0; r < kWarpRows; ++r) {
        for (uint32_t column = lane_index(); column < columns; column += 32) {
            to[static_cast<uint64_t>(r) * pairs.stride + column] = warp_sums[r * LISTS_COLUMNS + column];
        }
    }
}
KERNEL(gradient_lists_f32, GradientParams, 1) { gradient_lists_body<ExactF32>(p); }
KERNEL(gradient_lists_tf32, GradientParams, 1) { gradient_lists_body<FastF32>(p); }
KERNEL(gradient_lists_f16, GradientParams, 1) { gradient_lists_body<HalfF16>(p); }
KERNEL(gradient_lists_bf16, GradientParams, 1) { gradient_lists_body<HalfBf16>(p); }

// Shapes of the tile way. 8 warps, 2 x 4: a warp has half the rows and every fourth group of 16 columns.
template <class Numbers>
struct GradientShape {
    using Element = typename Numbers::Element;
    static constexpr int rows = sizeof(Element) == 2 ? GRADIENT_ROWS_16BIT : GRADIENT_ROWS_32BIT;
    static constexpr int row_tiles = rows / 32;                          // of 16 rows, of a warp
    static constexpr int groups = GRADIENT_COLUMNS / 64;                 // of a warp
    static constexpr int depth = 32 / sizeof(Element);                   // inner dimension of one mma
    static constexpr int matrix_bytes = TILE * sizeof(Element);          // of a row of M
    static constexpr int row_bytes = GRADIENT_COLUMNS * sizeof(Element); // of a row of a stage
    static constexpr int stage_bytes = GRADIENT_DEPTH * row_bytes;
    static constexpr int stages = GRADIENT_STAGES_BYTES / stage_bytes;
};
// A recomputed tile of S comes this many rows at a time.
constexpr int kRecomputedRows = 64;
static_assert(2 * (kRecomputedRows + TILE) * STAGE_BYTES <= GRADIENT_STAGES_BYTES,
              "it streams through the stages of the product");
static_assert(kRecomputedRows * kValuesStride * sizeof(float) <= GRADIENT_STAGES_BYTES,
              "and its values stand there afterwards");

// Byte of element (row, k) of M, swizzled as a stage of tile.cuh.
template <class Numbers>
DEVICE uint32_t matrix_place(uint32_t row, uint32_t k) {
    uint32_t byte = k * sizeof(typename Numbers::Element);
    return row * GradientShape<Numbers>::matrix_bytes + (((byte / 16) ^ (row % 8)) << 4) + byte % 16;
}

// Byte of granule `granule` of row k of a stage. 16-bit types read 8 rows of one granule at a
// time (ldmatrix), f32 reads 2 granules of 4 rows: either way all 32 banks once.
template <class Numbers>
DEVICE uint32_t stage_place(uint32_t k, uint32_t granule) {
    uint32_t twist = sizeof(typename Numbers::Element) == 2 ? k % 8 : k % 4 * 2;
    return k * GradientShape<Numbers>::row_bytes + ((granule ^ twist) << 4);
}

// The two column fragments of the 16 columns from `column` on, inner dimension from k on.
template <class Numbers>
DEVICE void load_columns(uint32_t (&raw)[4], const unsigned char *stage, uint32_t k, uint32_t column) {
    uint32_t lane = lane_index();
    if constexpr (sizeof(typename Numbers::Element) == 2) {
        load_matrices_transposed(raw, stage + stage_place<Numbers>(k + lane % 16, column / 8 + lane / 16));
    } else {
        // There is no transposing load of 32-bit elements.
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t row = k + lane % 4 + i % 2 * 4, at = column + i / 2 * 8 + lane / 4;
            raw[i] = *reinterpret_cast<const uint32_t *>(stage + stage_place<Numbers>(row, at / 4) + at % 4 * 4);
        }
    }
}

template <class Numbers>
using GradientSums = float[GradientShape<Numbers>::row_tiles][GradientShape<Numbers>::groups * 2][4];

// sums += M[:, the stage's rows] times the stage. `columns` that there are may be fewer than the shape's.
template <class Numbers>
DEVICE void multiply_gradient_stage(GradientSums<Numbers> &sums, const unsigned char *matrix, const unsigned char *stage,
                                    uint32_t first_k, uint32_t columns) {
    using Shape = GradientShape<Numbers>;
    uint32_t lane = lane_index(), warp_row = warp_index() / 4 * 16 * Shape::row_tiles;
#pragma unroll
    for (int k = 0; k < GRADIENT_DEPTH; k += Shape::depth) {
        typename Numbers::template Fragment<4> rows[Shape::row_tiles];
#pragma unroll
        for (int tile = 0; tile < Shape::row_tiles; ++tile) {
            uint32_t raw[4];
            uint32_t at = first_k + k + lane / 16 * (Shape::depth / 2);
            load_matrices(raw, matrix + matrix_place<Numbers>(warp_row + tile * 16 + lane % 16, at));
            Numbers::prepare(rows[tile], raw);
        }
#pragma unroll
        for (int group = 0; group < Shape::groups; ++group) {
            uint32_t column = (group * 4 + warp_index() % 4) * 16;
            if (column >= columns) break;  // the same for the whole warp
            uint32_t raw[4];
            load_columns<Numbers>(raw, stage, k, column);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                typename Numbers::template Fragment<2> fragment;
                Numbers::prepare(fragment, raw + half * 2);
#pragma unroll
                for (int tile = 0; tile < Shape::row_tiles; ++tile) {
                    Numbers::multiply(sums[tile][group * 2 + half], rows[tile], fragment, false);
                }
            }
        }
    }
}

template <class Numbers>
DEVICE void store_weight(unsigned char *matrix, uint32_t row, uint32_t k, float weight) {
    using Element = typename Numbers::Element;
    *reinterpret_cast<Element *>(matrix + matrix_place<Numbers>(row, k)) = from_float<Element>(weight);
}

// M of the block's rows (`offset` in tile x) and tile y, from the stored candidates.
template <class Numbers>
DEVICE void rebuild_matrix(const GradientParams &p, unsigned char *matrix, uint32_t x, uint32_t y, uint32_t offset,
                           PairTile tile, uint32_t count) {
    const Pairs &pairs = p.pairs;
    auto *words = reinterpret_cast<Granule<uint32_t> *>(matrix);
    for (uint32_t i = thread_index(); i < GradientShape<Numbers>::rows * GradientShape<Numbers>::matrix_bytes / 16; i += THREADS) {
        words[i] = Granule<uint32_t>{};
    }
    block_sync();
    uint64_t at = tile.index * pairs.tile_capacity;
    for (uint32_t k = thread_index(); k < count; k += THREADS) {
        uint32_t place = pairs.tile_places[at + k];
        float s = pairs.tile_values[at + k];
        // Row and column of the stored tile; x and y in the order of M.
        uint32_t row = (tile.transposed ? y : x) * TILE + place / TILE;
        uint32_t column = (tile.transposed ? x : y) * TILE + place % TILE;
        uint32_t of_x = tile.transposed ? place % TILE : place / TILE;
        uint32_t of_y = tile.transposed ? place / TILE : place % TILE;
        constexpr uint32_t rows = GradientShape<Numbers>::rows;  // rows of other blocks wrap around
        bool first = of_x - offset < rows, second = tile.diagonal && of_y - offset < rows;
        if (!first && !second) continue;
        float weight = pair_weight(pairs, row, column, s) * p.weight_scale;
        if (first) store_weight<Numbers>(matrix, of_x - offset, of_y, weight);
        if (second) store_weight<Numbers>(matrix, of_y - offset, of_x, weight);
    }
}

// The same from a recomputed tile of S, whose bits are those of the sweep.
template <class Numbers>
DEVICE void recompute_matrix(const GradientParams &p, unsigned char *matrix, unsigned char *stages, uint32_t x, uint32_t y,
                             uint32_t offset, PairTile tile) {
    const Pairs &pairs = p.pairs;
    const Side &own = p.of_references ? pairs.references : pairs.anchors;
    const Side &other = p.of_references ? pairs.anchors : pairs.references;
    auto rows = static_cast<const unsigned char *>(tile_rows<Numbers>(own, x, pairs.stride)) + offset * STAGE_BYTES;
    auto *values = reinterpret_cast<float *>(stages);  // [kRecomputedRows, kValuesStride]
    Place<2> place;
    for (uint32_t first = 0; first < GradientShape<Numbers>::rows; first += kRecomputedRows) {
        // The sweep multiplied the row of the smaller index with the column of the larger. On the
        // diagonal both orders occur, and exact sums depend on it: there the product is taken twice.
        for (int turn = tile.transposed; turn <= (tile.transposed || tile.diagonal); ++turn) {
            Accumulators<2> acc;
            multiply_tile<Numbers, 2, 2>(acc, rows + first * STAGE_BYTES,
                                         tile_rows<Numbers>(other, y, pairs.stride), stride_bytes<Numbers>(pairs), stages,
                                         turn == 1);
            // Through the stages, which are free now: from registers the loop below would have to be unrolled.
#pragma unroll
            for (int r = 0; r < 4; ++r) {
#pragma unroll
                for (int c = 0; c < 8; ++c) {
                    values[place.row(r / 2, r % 2) * kValuesStride + place.column(c / 2, c % 2)] =
                        acc[r / 2][c / 2][r % 2 * 2 + c % 2];
                }
            }
            block_sync();
            for (uint32_t k = thread_index(); k < kRecomputedRows * TILE; k += THREADS) {
                uint32_t of_x = first + k / TILE, of_y = k % TILE;
                uint32_t i = x * TILE + offset + of_x, j = y * TILE + of_y;
                if (tile.diagonal && (i > j) != (turn == 1)) continue;
                uint32_t anchor = turn == 1 ? j : i, reference = turn == 1 ? i : j;
                float s = values[k / TILE * kValuesStride + of_y];
                float weight = is_pair(pairs, anchor, reference) ? pair_weight(pairs, anchor, reference, s) : 0.0f;
                store_weight<Numbers>(matrix, of_x, of_y, weight * p.weight_scale);
            }
            block_sync();  // the stages are filled again
        }
    }
}

template <class Numbers>
DEVICE void gradient_tiles_body(const GradientParams &p) {
    using Shape = GradientShape<Numbers>;
    using Element = typename Numbers::Element;
    SHARED_MEMORY(stages);
    unsigned char *matrix = stages + GRADIENT_STAGES_BYTES;
    const Pairs &pairs = p.pairs;
    const Side &own = p.of_references ? pairs.references : pairs.anchors;
    const Side &other = p.of_references ? pairs.anchors : pairs.references;
    uint32_t x = block_x() / (TILE / Shape::rows), offset = block_x() % (TILE / Shape::rows) * Shape::rows;
    if (p.ways[x]) return;
    uint32_t first_column = block_y() * GRADIENT_COLUMNS;
    uint32_t columns = pairs.stride - first_column < GRADIENT_COLUMNS ? pairs.stride - first_column : GRADIENT_COLUMNS;

    GradientSums<Numbers> sums;
#pragma unroll
    for (int tile = 0; tile < Shape::row_tiles; ++tile) {
#pragma unroll
        for (int column = 0; column < Shape::groups * 2; ++column) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[tile][column][i] = 0.0f;
        }
    }
    Range range = split_range(other.tiles, block_z(), p.splits);
    for (uint32_t y = range.begin; y < range.end; ++y) {
        PairTile tile = pair_tile(pairs, p.of_references, x, y);
        uint32_t count = pairs.tile_counts[tile.index];
        if (count == 0) continue;  // the same for the whole block
        auto rows = static_cast<const unsigned char *>(tile_rows<Numbers>(other, y, pairs.stride));
        constexpr uint32_t kSteps = TILE / GRADIENT_DEPTH;
        // A group a step, empty or not: the waits below count them.
        auto copy = [&](uint32_t step) {
            uint32_t granules = columns * sizeof(Element) / 16;
            for (uint32_t i = thread_index(); step < kSteps && i < GRADIENT_DEPTH * granules; i += THREADS) {
                uint32_t k = i / granules, granule = i % granules;
                copy_async(stages + step % Shape::stages * Shape::stage_bytes + stage_place<Numbers>(k, granule),
                           rows + prepared_place(step * GRADIENT_DEPTH + k,
                                                 first_column * static_cast<uint32_t>(sizeof(Element)) + granule * 16,
                                                 stride_bytes<Numbers>(pairs)));
            }
            copy_commit();
        };
        auto copy_first = [&] {
            for (uint32_t step = 0; step < Shape::stages - 1; ++step) copy(step);
        };
        if (count > pairs.tile_capacity) {
            recompute_matrix<Numbers>(p, matrix, stages, x, y, offset, tile);
            copy_first();
        } else {
            copy_first();  // lands while M is rebuilt
            rebuild_matrix<Numbers>(p, matrix, x, y, offset, tile, count);
        }
        for (uint32_t step = 0; step < kSteps; ++step) {
            copy_wait<Shape::stages - 2>();
            block_sync();  // M and this stage are there, the stage before is read
            copy(step + Shape::stages - 1);
            const unsigned char *stage = stages + step % Shape::stages * Shape::stage_bytes;
            if constexpr (Numbers::exact) {
                GradientSums<Numbers> part = {};
                multiply_gradient_stage<Numbers>(part, matrix, stage, step * GRADIENT_DEPTH, columns);
#pragma unroll
                for (int r = 0; r < Shape::row_tiles; ++r) {
#pragma unroll
                    for (int column = 0; column < Shape::groups * 2; ++column) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) sums[r][column][i] += part[r][column][i];
                    }
                }
            } else {
                multiply_gradient_stage<Numbers>(sums, matrix, stage, step * GRADIENT_DEPTH, columns);
            }
        }
        block_sync();  // M and the stages are read
    }

    uint64_t padded_rows = static_cast<uint64_t>(own.tiles) * TILE;
    float *to = p.partial + (block_z() * padded_rows + x * TILE + offset) * pairs.stride + first_column;
    float unscale = 1.0f / p.weight_scale;
#pragma unroll
    for (int tile = 0; tile < Shape::row_tiles; ++tile) {
#pragma unroll
        for (int group = 0; group < Shape::groups; ++group) {
            uint32_t column = (group * 4 + warp_index() % 4) * 16;
            if (column >= columns) break;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                uint32_t row = (warp_index() / 4 * Shape::row_tiles + tile) * 16 + i % 4 / 2 * 8 + lane_index() / 4;
                uint32_t at = column + i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
                to[static_cast<uint64_t>(row) * pairs.stride + at] = sums[tile][group * 2 + i / 4][i % 4] * unscale;
            }
        }
    }
}
KERNEL_IN_EVERY_PRECISION(gradient_tiles, GradientParams, 1)

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
