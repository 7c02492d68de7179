// gradient.cu: dE = M R, M = G + G^T, or one side's part in the rectangular form (SPEC 4).
// Truth: src/loss/reference.rs. Launcher: src/backend/device/loss.rs.
//
// Row tiles with few mined pairs are summed from lists (lists.cuh), the others on tensor cores; `weigh` has said which.
// The tile of M is rebuilt in shared memory, from the stored candidates or from a recomputed tile
// of S (matrix.cuh), and multiplied with the other side's rows, which stream through stages.
// One block owns 128 rows (f32: 64) and 256 columns of the result and walks the other side's tiles
// in order, or a split's range of them, so that every sum has one order: no atomics. The last split to come adds all.
// Numbers: 16-bit types hold M scaled by a power of two; sums are f32.

#include "lists.cuh"

// Shapes of the tile way. 8 warps, 2 x 4: a warp has half the rows and every fourth group of 16 columns.
template <class Numbers>
struct GradientShape {
    using Element = typename Numbers::Element;
    static constexpr int rows = kMatrixRows<Numbers>;
    static constexpr int row_tiles = rows / 32;                          // of 16 rows, of a warp
    static constexpr int groups = GRADIENT_COLUMNS / 64;                 // of a warp
    static constexpr int depth = 32 / sizeof(Element);                   // inner dimension of one mma
    static constexpr int row_bytes = GRADIENT_COLUMNS * sizeof(Element); // of a row of a stage
    static constexpr int stage_bytes = GRADIENT_DEPTH * row_bytes;
    static constexpr int stages = GRADIENT_STAGES_BYTES / stage_bytes;
};
static_assert(2 * (kRecomputedRows + TILE) * STAGE_BYTES <= GRADIENT_STAGES_BYTES,
              "it streams through the stages of the product");
static_assert(kRecomputedRows * kValuesStride * sizeof(float) <= GRADIENT_STAGES_BYTES,
              "and its values stand there afterwards");

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
        ldmatrix_transposed(raw, stage + stage_place<Numbers>(k + lane % 16, column / 8 + lane / 16));
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
            ldmatrix(raw, matrix + matrix_place<Numbers>(warp_row + tile * 16 + lane % 16, at));
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

// M of the block's rows and tile y from a recomputed tile of S, whose bits are those of the sweep.
template <class Numbers>
DEVICE void recompute_matrix(const GradientParams &p, unsigned char *matrix, unsigned char *stages, uint32_t x, uint32_t y,
                             uint32_t offset, PairTile tile) {
    const Pairs &pairs = p.pairs;
    const Side &own = p.of_references ? pairs.references : pairs.anchors;
    const Side &other = p.of_references ? pairs.anchors : pairs.references;
    auto rows = static_cast<const unsigned char *>(tile_rows<Numbers>(own, x, pairs.stride)) + offset * STAGE_BYTES;
    auto *values = reinterpret_cast<float *>(stages);  // [kRecomputedRows, kValuesStride]
    Place<2> place;
    for (uint32_t first = 0; first < kMatrixRows<Numbers>; first += kRecomputedRows) {
        // The sweep multiplied the row of the smaller index with the column of the larger. On the
        // diagonal both orders occur, and exact sums depend on it: there the product is taken twice.
        for (int turn = tile.transposed; turn <= (tile.transposed || tile.diagonal); ++turn) {
            Accumulators<2> acc;
            multiply_tile<Numbers, 2, 2>(acc, rows + first * STAGE_BYTES,
                                         tile_rows<Numbers>(other, y, pairs.stride), stride_bytes<Numbers>(pairs), stages,
                                         turn == 1);
#pragma unroll
            for (int r = 0; r < Place<2>::rows; ++r) {
#pragma unroll
                for (int c = 0; c < Place<2>::columns; ++c) {
                    values[place.row_of(r) * kValuesStride + place.column_of(c)] = Place<2>::value(acc, r, c);
                }
            }
            block_sync();
            weigh_values<Numbers>(p, matrix, values, x, y, offset, first, tile, turn == 1 ? Part::lower : Part::upper);
            block_sync();  // the stages are filled again
        }
    }
}

constexpr uint32_t kListsRows = 8;  // of a warp
static_assert(THREADS / 32 * kListsRows * LISTS_COLUMNS * 4 <= GRADIENT_STAGES_BYTES, "where the stages are");
static_assert(LISTS_COLUMNS == GRADIENT_COLUMNS, "one grid for both");

template <class Numbers>
DEVICE void gradient_tiles(const GradientParams &p, unsigned char *stages, uint32_t x, uint32_t offset) {
    using Shape = GradientShape<Numbers>;
    using Element = typename Numbers::Element;
    unsigned char *matrix = stages + GRADIENT_STAGES_BYTES;
    const Pairs &pairs = p.pairs;
    const Side &own = p.of_references ? pairs.references : pairs.anchors;
    const Side &other = p.of_references ? pairs.anchors : pairs.references;
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
                cp_async(stages + step % Shape::stages * Shape::stage_bytes + stage_place<Numbers>(k, granule),
                           rows + prepared_place(step * GRADIENT_DEPTH + k,
                                                 first_column * static_cast<uint32_t>(sizeof(Element)) + granule * 16,
                                                 stride_bytes<Numbers>(pairs)));
            }
            cp_async_commit();
        };
        auto copy_first = [&] {
            for (uint32_t step = 0; step < Shape::stages - 1; ++step) copy(step);
        };
        if (!is_stored(pairs, tile.index)) {
            recompute_matrix<Numbers>(p, matrix, stages, x, y, offset, tile);
            copy_first();
        } else {
            copy_first();  // lands while M is rebuilt
            rebuild_matrix<Numbers>(p, matrix, x, y, offset, tile, count);
        }
        for (uint32_t step = 0; step < kSteps; ++step) {
            cp_async_wait<Shape::stages - 2>();
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

    float unscale = 1.0f / p.weight_scale;
#pragma unroll
    for (int tile = 0; tile < Shape::row_tiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t row = (warp_index() / 4 * Shape::row_tiles + tile) * 16 + half * 8 + lane_index() / 4;
            ResultRow result = result_row(p, own, x * TILE + offset + row);
#pragma unroll
            for (int group = 0; group < Shape::groups; ++group) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    uint32_t column = (group * 4 + warp_index() % 4) * 16 + i / 2 * 8 + lane_index() % 4 * 2 + i % 2;
                    if (column >= columns || first_column + column >= result.columns) continue;
                    result.to[first_column + column] = sums[tile][group * 2 + i / 2][half * 2 + i % 2] * unscale;
                }
            }
        }
    }
}

template <class Numbers>
DEVICE void gradient_body(const GradientParams &p) {
    SHARED_MEMORY(bytes);
    constexpr uint32_t rows = kMatrixRows<Numbers>;
    uint32_t x = block_x() / (TILE / rows), offset = block_x() % (TILE / rows) * rows;
    if (p.ways[x]) {
        constexpr uint32_t part = THREADS / 32 * kListsRows;
        for (uint32_t first = 0; first < rows; first += part) {
            gradient_lists<Numbers, THREADS / 32, kListsRows>(p, bytes, x, offset + first);
        }
    } else {
        gradient_tiles<Numbers>(p, bytes, x, offset);
    }
    finish_splits(p, bytes, static_cast<uint64_t>(x) * TILE + offset, rows, THREADS);
}
KERNEL_IN_EVERY_PRECISION(gradient, GradientParams, 1)
