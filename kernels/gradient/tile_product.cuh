// tile_product.cuh: the gradient by tiles: M R of a block's rows, in a walk over the tiles of the other side (SPEC 4, 5).
//
// M is built in shared memory, from the stored candidates or from a recomputed tile of S (weight_tile.cuh), and multiplied with
// the other side's rows, which stream through stages. A job gives its elements: the gradient's weights, or their derivatives by
// lambda, which need several parts in a narrow type.
#ifndef DDTAS_TILE_PRODUCT_CUH
#define DDTAS_TILE_PRODUCT_CUH

#include "tile/wgmma_tile.cuh"
#include "gradient/row_lists.cuh"

// 8 warps, 2 x 4: a warp has half the rows and every fourth group of 16 columns.
template <class Precision>
struct GradientShape {
    static constexpr int rows = kMatrixRows<Precision>;
    static constexpr int row_tiles = rows / 32;                          // tiles of 16 rows in a warp
    static constexpr int groups = GRADIENT_COLUMNS / 64;                 // groups of 16 columns in a warp
    static constexpr int row_bytes = GRADIENT_COLUMNS * Precision::stored_bytes;  // a row in a stage
    static constexpr int stage_bytes = GRADIENT_DEPTH * row_bytes;
    static constexpr int stages = GRADIENT_STAGES_BYTES / stage_bytes;
};
static_assert(2 * (kRecomputedRows + TILE) * STAGE_BYTES <= GRADIENT_STAGES_BYTES,
              "a recomputed tile streams through the stages");
static_assert(kRecomputedRows * kValuesStride * sizeof(float) <= GRADIENT_STAGES_BYTES,
              "and its similarities are in their place afterwards");

// Byte offset of granule `granule` of row k of a stage. ldmatrix reads 8 rows of one granule at a time, without bank conflicts.
template <class Precision>
DEVICE uint32_t stage_offset(uint32_t k, uint32_t granule) {
    return k * GradientShape<Precision>::row_bytes + ((granule ^ k % 8) << 4);
}

// The inner index of place k (of 16) of a product of exact f32: adjacent places of an operand are elements of M that are 4 apart,
// since ldmatrix distributes 32-bit elements like that.
DEVICE uint32_t inner_index(uint32_t k) { return k / 8 * 8 + k % 8 / 2 + k % 2 * 4; }

// Loads the two column fragments of the 16 columns from `column` on, inner dimension from k on.
template <class Precision>
DEVICE void load_stage(typename Precision::template Fragment<2> (&to)[2], const unsigned char *stage, uint32_t k, uint32_t column) {
    uint32_t lane = lane_index();
    if constexpr (Precision::exact) {
        uint32_t row = k + inner_index(lane % 16), granule = stored_byte<Precision>(column) / 16 + lane / 16;
        uint32_t high[4], low[4];
        ldmatrix_transposed(high, stage + stage_offset<Precision>(row, granule));
        ldmatrix_transposed(low, stage + stage_offset<Precision>(row, granule + kLowBytes / 16));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            to[i / 2].high[i % 2] = high[i];
            to[i / 2].low[i % 2] = low[i];
        }
    } else {
        uint32_t raw[4];
        ldmatrix_transposed(raw, stage + stage_offset<Precision>(k + lane % 16, column / 8 + lane / 16));
        Precision::prepare(to[0], raw);
        Precision::prepare(to[1], raw + 2);
    }
}

// Loads the row fragment of M's 16 rows from `row` on, inner dimension from k on. Exact f32 is multiplied by `scale`, then split.
template <class Precision>
DEVICE void load_weights(typename Precision::template Fragment<4> &to, const unsigned char *matrix, uint32_t row, uint32_t k,
                         float scale) {
    uint32_t lane = lane_index();
    uint32_t raw[4];
    if constexpr (Precision::exact) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            ldmatrix(raw, matrix + matrix_offset<Precision>(row + lane % 16, k + half * 8 + lane / 16 * 4));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                Halves halves = split(float_of(raw[i]) * scale, float_of(raw[i + 2]) * scale);
                to.high[half * 2 + i] = halves.high;
                to.low[half * 2 + i] = halves.low;
            }
        }
    } else {
        ldmatrix(raw, matrix + matrix_offset<Precision>(row + lane % 16, k + lane / 16 * 8));
        Precision::prepare(to, raw);
    }
}

template <class Precision>
using GradientSums = float[GradientShape<Precision>::row_tiles][GradientShape<Precision>::groups * 2][4];

// sums += M[:, the stage's rows] times the stage; for exact f32 M is multiplied by `scale`. `columns` may be fewer than the shape
// has.
template <class Precision>
DEVICE void multiply_gradient_stage(GradientSums<Precision> &sums, const unsigned char *matrix, const unsigned char *stage,
                                    uint32_t first_k, uint32_t columns, float scale) {
    using Shape = GradientShape<Precision>;
    uint32_t warp_row = warp_index() / 4 * 16 * Shape::row_tiles;
#pragma unroll 2  // more do not fit in registers
    for (int k = 0; k < GRADIENT_DEPTH; k += 16) {
        typename Precision::template Fragment<4> rows[Shape::row_tiles];
#pragma unroll
        for (int tile = 0; tile < Shape::row_tiles; ++tile) {
            load_weights<Precision>(rows[tile], matrix, warp_row + tile * 16, first_k + k, scale);
        }
#pragma unroll
        for (int group = 0; group < Shape::groups; ++group) {
            uint32_t column = (group * 4 + warp_index() % 4) * 16;
            if (column >= columns) break;  // the same for the whole warp
            typename Precision::template Fragment<2> fragments[2];
            load_stage<Precision>(fragments, stage, k, column);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int tile = 0; tile < Shape::row_tiles; ++tile) {
                    Precision::multiply(sums[tile][group * 2 + half], rows[tile], fragments[half]);
                }
            }
        }
    }
}

// Shared memory of a block: the stages, then M, then its largest element and two barriers.
template <class Precision>
struct TileMemory {
    unsigned char *stages;
#ifdef HAS_WGMMA
    // The ring of wgmma's products, in the same stages.
    WgmmaStages<2 / kLines<Precision>, kLines<Precision>> group{stages, reinterpret_cast<Barrier *>(largest()) + 1};
#endif

    DEVICE unsigned char *matrix() const { return stages + GRADIENT_STAGES_BYTES; }
    DEVICE uint32_t *largest() const { return reinterpret_cast<uint32_t *>(matrix() + kMatrixBytes<Precision>); }
    explicit DEVICE TileMemory(unsigned char *bytes) : stages(bytes) {}
};
static_assert(GRADIENT_STAGES_BYTES == 2 * 2 * TILE * STAGE_BYTES, "two stages of two tiles");
static_assert(GRADIENT_EXTRA_BYTES == 3 * sizeof(uint64_t), "an element's bits and two barriers");

// M of the block's rows and tile y from a recomputed tile of S with the bits of the sweep: by wgmma (`group`) where the sweep
// uses it.
template <class Precision, bool group, class Weigh>
DEVICE void recompute_matrix(const GradientParams &p, TileMemory<Precision> &memory, uint32_t x, uint32_t y, uint32_t offset,
                             PairTile tile, Weigh weigh) {
    const Pairs &pairs = p.pairs;
    auto rows = static_cast<const unsigned char *>(tile_rows<Precision>(own_side(p), x, pairs.stride)) + offset * STAGE_BYTES;
    auto columns = tile_rows<Precision>(other_side(p), y, pairs.stride);
    auto *values = reinterpret_cast<float *>(memory.stages);  // [kRecomputedRows, kValuesStride]
    if constexpr (group) {
#ifdef HAS_WGMMA
        fence_proxy_async();  // bulk copies write to what threads wrote
        block_sync();
        // A group has all columns of its own 64 rows, or half of the columns if the block has only 64 rows (`shared`).
        constexpr bool shared = kMatrixRows<Precision> == kRecomputedRows;
        constexpr int n = shared ? 8 : 16;
        float acc[n][4];
        wgmma_multiply_tile<Precision>(acc, rows, columns, stride_bytes<Precision>(pairs), memory.group);
        WgmmaLayout layout;
        uint32_t half = warp_index() / 4 * kRecomputedRows;
        for (uint32_t first = 0; first < kMatrixRows<Precision>; first += kRecomputedRows) {
            if (shared || half == first) {
#pragma unroll
                for (int r = 0; r < WgmmaLayout::rows; ++r) {
#pragma unroll
                    for (int c = 0; c < 2 * n; ++c) {
                        uint32_t column = layout.column_of(c) + (shared ? half : 0);
                        values[(layout.row_of(r) - half) * kValuesStride + column] = acc[c / 2][r * 2 + c % 2];
                    }
                }
            }
            block_sync();
            weigh_values<Precision>(pairs, memory.matrix(), values, x, y, offset, first, tile, weigh);
            block_sync();
        }
#endif
    } else {
        MmaLayout<2> layout;
        for (uint32_t first = 0; first < kMatrixRows<Precision>; first += kRecomputedRows) {
            Accumulators<2> acc;
            multiply_tile<Precision, 2, 2>(acc, rows + first * STAGE_BYTES, columns, stride_bytes<Precision>(pairs), memory.stages);
#pragma unroll
            for (int r = 0; r < MmaLayout<2>::rows; ++r) {
#pragma unroll
                for (int c = 0; c < MmaLayout<2>::columns; ++c) {
                    values[layout.row_of(r) * kValuesStride + layout.column_of(c)] = MmaLayout<2>::value(acc, r, c);
                }
            }
            block_sync();
            weigh_values<Precision>(pairs, memory.matrix(), values, x, y, offset, first, tile, weigh);
            block_sync();  // the stages are filled again
        }
    }
}

// Rows and columns of the result that a block has.
struct TileBlock {
    uint32_t x, offset;              // row tile, and first row in it
    ColumnBlock columns;
};
template <class Precision>
DEVICE TileBlock tile_block(const GradientParams &p) {
    constexpr uint32_t rows = kMatrixRows<Precision>;
    return TileBlock{block_x() / (TILE / rows), block_x() % (TILE / rows) * rows, column_block(p.pairs)};
}

template <class Precision>
DEVICE void clear_sums(GradientSums<Precision> &sums) {
#pragma unroll
    for (int tile = 0; tile < GradientShape<Precision>::row_tiles; ++tile) {
#pragma unroll
        for (int column = 0; column < GradientShape<Precision>::groups * 2; ++column) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[tile][column][i] = 0.0f;
        }
    }
}

// sums += M R over the tiles of a range. M's element is the sum of `job.weigh(i, j, s, part)` over `Job::parts` parts;
// `job.after(sums)` is called after each tile. `Job::from_words`: the elements of stored tiles are `job.of_word(word)`.
// `Job::may_be_nothing`: a tile whose elements are all 0 is not multiplied.
template <class Precision, bool group, class Job>
DEVICE void walk_tiles(const GradientParams &p, TileMemory<Precision> &memory, const TileBlock &block, Range range, Job &job,
                       GradientSums<Precision> &sums) {
    using Shape = GradientShape<Precision>;
    const Pairs &pairs = p.pairs;
    for (uint32_t y = range.begin; y < range.end; ++y) {
        PairTile tile = pair_tile(pairs, p.of_references, block.x, y);
        uint32_t count = pairs.tile_counts[tile.index];
        if (count == 0) continue;  // the same for the whole block
        auto rows = static_cast<const unsigned char *>(tile_rows<Precision>(other_side(p), y, pairs.stride));
        constexpr uint32_t kSteps = TILE / GRADIENT_DEPTH;
        // Commits a group for each step, even an empty one: the waits below count groups.
        auto copy = [&](uint32_t step) {
            uint32_t granules = block.columns.count * Precision::stored_bytes / 16;
            for (uint32_t i = thread_index(); step < kSteps && i < GRADIENT_DEPTH * granules; i += THREADS) {
                uint32_t k = i / granules, granule = i % granules;
                cp_async(memory.stages + step % Shape::stages * Shape::stage_bytes + stage_offset<Precision>(k, granule),
                         rows + prepared_offset(step * GRADIENT_DEPTH + k,
                                               block.columns.first * Precision::stored_bytes + granule * 16,
                                               stride_bytes<Precision>(pairs)));
            }
            cp_async_commit();
        };
        auto copy_first = [&] {
            for (uint32_t step = 0; step < Shape::stages - 1; ++step) copy(step);
        };
        bool stored = is_stored(pairs, tile.index);
#pragma unroll 1
        for (uint32_t part = 0; part < Job::parts; ++part) {
            // The largest element, if it is needed, by its bits, of which a NaN's are the largest.
            constexpr bool asked = Job::may_be_nothing || Precision::exact;
            uint32_t largest = 0;
            auto weigh = [&](uint32_t i, uint32_t j, float s) {
                float weight = job.weigh(i, j, s, part);
                if constexpr (asked) {
                    uint32_t bits = bits_of(fabsf(weight));
                    largest = bits > largest ? bits : largest;
                }
                return weight;
            };
            if constexpr (asked) {
                if (thread_index() == 0) *memory.largest() = 0;
                block_sync();
            }
            if (!stored) {
                recompute_matrix<Precision, group>(p, memory, block.x, y, block.offset, tile, weigh);
            } else {
                if constexpr (!Job::may_be_nothing) copy_first();  // while M is rebuilt
                rebuild_matrix<Precision, !Job::from_words>(
                    pairs, memory.matrix(), block.x, y, block.offset, tile, count,
                    [&](uint32_t i, uint32_t j, [[maybe_unused]] uint32_t word, [[maybe_unused]] float s) {
                        if constexpr (Job::from_words) return job.of_word(word);
                        return weigh(i, j, s);
                    });
            }
            if constexpr (asked) {
                for (int mask = 16; mask > 0; mask /= 2) {
                    uint32_t other = shuffle_xor(largest, mask);
                    largest = other > largest ? other : largest;
                }
                if (lane_index() == 0) atomic_max(memory.largest(), largest);
            }
            if constexpr (Job::may_be_nothing) {
                block_sync();
                bool nothing = *memory.largest() == 0;
                block_sync();  // the largest element has been read
                if (nothing) continue;
                copy_first();
            } else if (!stored) {
                copy_first();
            }
            for (uint32_t step = 0; step < kSteps; ++step) {
                cp_async_wait<Shape::stages - 2>();
                block_sync();  // M and this stage are complete, the previous stage has been read
                copy(step + Shape::stages - 1);
                const unsigned char *stage = memory.stages + step % Shape::stages * Shape::stage_bytes;
                if constexpr (Precision::exact) {
                    TileScale scale(*memory.largest());
                    GradientSums<Precision> once = {};
                    multiply_gradient_stage<Precision>(once, memory.matrix(), stage, step * GRADIENT_DEPTH, block.columns.count,
                                                       scale.up);
                    float down = scale.down / kRowScale;
#pragma unroll
                    for (int r = 0; r < Shape::row_tiles; ++r) {
#pragma unroll
                        for (int column = 0; column < Shape::groups * 2; ++column) {
#pragma unroll
                            for (int i = 0; i < 4; ++i) sums[r][column][i] = fmaf(once[r][column][i], down, sums[r][column][i]);
                        }
                    }
                } else {
                    multiply_gradient_stage<Precision>(sums, memory.matrix(), stage, step * GRADIENT_DEPTH, block.columns.count, 1.0f);
                }
            }
            cp_async_wait<0>();
            block_sync();  // M and the stages have been read
        }
        job.after(sums);
    }
}

// Visits this thread's sums: `use(row of the block)` returns a function that is called with a column of the block and the sum.
template <class Precision, class Use>
DEVICE void each_sum(GradientSums<Precision> &sums, Use use) {
    using Shape = GradientShape<Precision>;
#pragma unroll
    for (int tile = 0; tile < Shape::row_tiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t row = (warp_index() / 4 * Shape::row_tiles + tile) * 16 + half * 8 + lane_index() / 4;
            auto use_of_row = use(row);
#pragma unroll
            for (int group = 0; group < Shape::groups; ++group) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    uint32_t column = (group * 4 + warp_index() % 4) * 16 + i / 2 * 8 + lane_index() % 4 * 2 + i % 2;
                    use_of_row(column, sums[tile][group * 2 + i / 2][half * 2 + i % 2]);
                }
            }
        }
    }
}

constexpr uint32_t kListsRows = 8;  // rows of a warp
constexpr uint32_t kListsPart = THREADS / 32 * kListsRows;
static_assert(kListsPart * LISTS_COLUMNS * 4 <= GRADIENT_STAGES_BYTES, "in the place of the stages");
static_assert(LISTS_COLUMNS == GRADIENT_COLUMNS, "one grid for both");

#endif
