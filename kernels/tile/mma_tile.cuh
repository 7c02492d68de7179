// mma_tile.cuh: one tile of S = A B^T by mma.sync, for every type.
//
// A block of 8 warps, 2 x 4, computes (32 row_tiles) x 128 products, a warp 16 row_tiles x 32. As 4 x 2 warps, each has 64
// columns.
// Both operands stream through shared memory in stages of 128 bytes a row, copied asynchronously; granules of 16 bytes are
// swizzled (granule ^ row % 8), so that neither the copies nor ldmatrix have bank conflicts.
//
// Precision: tensor cores truncate when they add. For exact f32 each stage is therefore summed from 0 and added to the total in
// f32 arithmetic, which rounds. Exact f32 has two f16 for each entry: a stage has 32 dimensions, 64 bytes of high parts and 64 of
// low parts.
#ifndef DDTAS_MMA_TILE_CUH
#define DDTAS_MMA_TILE_CUH

#include "tile/prepared_rows.cuh"

constexpr int kStages = 3;
// If two blocks share a multiprocessor, one multiplies while the other waits or runs its epilogue: a stage less is enough. Exact
// f32 has no registers for a second block.
template <class Precision>
constexpr int kSharingStages = Precision::exact ? kStages : 2;
constexpr int kColumnTiles = 4;  // tiles of 8 columns in a warp
// Floats from row to row of a tile that is written to shared memory: rows are 4 banks apart, so that the 8 rows that a warp
// writes at a time have no bank conflicts.
constexpr uint32_t kValuesStride = TILE + 4;
static_assert(SIMILARITY_STAGES_BYTES == kStages * 2 * TILE * STAGE_BYTES, "the launch plan's shared memory");
static_assert(SHARING_STAGES_BYTES == 2 * 2 * TILE * STAGE_BYTES, "the launch plan's shared memory");

// A word has a bit for each of a thread's columns, which come in pairs 8 apart from `first` on. The bits of the columns before
// column `end` of the tile.
template <int columns>
DEVICE uint32_t column_bits_before(uint32_t first, uint32_t end) {
    uint32_t left = end > first ? end - first : 0;
    uint32_t count = left / 8 * 2 + (left % 8 < 2 ? left % 8 : 2);
    return count < columns ? (1u << count) - 1 : ~0u >> (32 - columns);
}

// Which elements of the tile this thread's accumulators are.
template <int row_tiles, int column_tiles = kColumnTiles>
struct MmaLayout {
    static constexpr uint32_t across = TILE / 8 / column_tiles;  // warps in a row of warps
    uint32_t warp_row = warp_index() / across * 16 * row_tiles;
    uint32_t warp_column = warp_index() % across * 8 * column_tiles;
    DEVICE uint32_t row(int tile, int half) const { return warp_row + tile * 16 + half * 8 + lane_index() / 4; }
    DEVICE uint32_t column(int tile, int odd) const { return warp_column + tile * 8 + lane_index() % 4 * 2 + odd; }

    // The thread's accumulators as a matrix of `rows` x `columns` values.
    static constexpr int rows = 2 * row_tiles, columns = 2 * column_tiles;
    // How many quarters of the tile's columns these values are in, and the first of these quarters.
    static constexpr int quarters = 1;
    DEVICE uint32_t first_quarter() const { return warp_index() % 4; }
    DEVICE uint32_t row_of(int r) const { return row(r / 2, r % 2); }
    DEVICE uint32_t column_of(int c) const { return column(c / 2, c % 2); }
    DEVICE uint32_t bits_before(uint32_t end) const { return column_bits_before<columns>(column_of(0), end); }
    template <class Sums>
    static DEVICE auto &value(Sums &acc, int r, int c) {
        return acc[r / 2][c / 2][r % 2 * 2 + c % 2];
    }
};

template <int row_tiles, int column_tiles = kColumnTiles>
using Accumulators = float[row_tiles][column_tiles][4];

// Copies stage `index` of `rows` rows of a tile to shared memory; for split rows both parts of half of their 64 dimensions.
template <class Precision>
DEVICE void copy_stage(unsigned char *to, const unsigned char *from, uint32_t index, int rows) {
    constexpr int kCopyBytes = THREADS * 16;  // bytes, whole 8 rows
    uint32_t first = thread_index() * 16;
    to += first;
    if constexpr (Precision::exact) {
        // Products find the low parts, a stage further on in memory, in the upper half of the granules.
        uint32_t low = (thread_index() % kGranules ^ thread_index() / kGranules % 8) / (kGranules / 2);
        from += static_cast<uint64_t>(index / 2 * 2 + low) * TILE * STAGE_BYTES + (first ^ (low ^ index % 2) * (STAGE_BYTES / 2));
    } else {
        from += static_cast<uint64_t>(index) * TILE * STAGE_BYTES + first;
    }
#pragma unroll
    for (int i = 0; i < rows * STAGE_BYTES / kCopyBytes; ++i) cp_async(to + i * kCopyBytes, from + i * kCopyBytes);
}

template <int row_tiles, int column_tiles>
DEVICE void clear(float (&acc)[row_tiles][column_tiles][4]) {
#pragma unroll
    for (int tile = 0; tile < row_tiles; ++tile) {
#pragma unroll
        for (int column = 0; column < column_tiles; ++column) {
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[tile][column][i] = 0.0f;
        }
    }
}

// Loads two granules of 16 rows from `row` on: load_columns as operand b of two products, load_rows as operand a of one.
DEVICE void load_columns(uint32_t (&raw)[4], const unsigned char *stage, uint32_t row, uint32_t granule) {
    uint32_t lane = lane_index();
    ldmatrix(raw, stage + swizzled(row + lane % 8 + lane / 16 * 8, granule + lane / 8 % 2));
}
DEVICE void load_rows(uint32_t (&raw)[4], const unsigned char *stage, uint32_t row, uint32_t granule) {
    uint32_t lane = lane_index();
    ldmatrix(raw, stage + swizzled(row + lane % 16, granule + lane / 16));
}

// Adds the products of a stage to `acc`: rows of `a` from `a_row` on with rows of `b` from `b_row` on.
template <class Precision, int row_tiles, int column_tiles>
DEVICE void multiply_stage(float (&acc)[row_tiles][column_tiles][4], const unsigned char *a, const unsigned char *b,
                           uint32_t a_row, uint32_t b_row) {
#pragma unroll
    for (int step = 0; step < kGranules / 2; ++step) {
        uint32_t columns[column_tiles / 2][4];
#pragma unroll
        for (int pair = 0; pair < column_tiles / 2; ++pair) load_columns(columns[pair], b, b_row + pair * 16, step * 2);
#pragma unroll
        for (int tile = 0; tile < row_tiles; ++tile) {
            uint32_t raw[4];
            load_rows(raw, a, a_row + tile * 16, step * 2);
            typename Precision::template Fragment<4> rows;
            Precision::prepare(rows, raw);
#pragma unroll
            for (int column = 0; column < column_tiles; ++column) {
                typename Precision::template Fragment<2> fragment;
                Precision::prepare(fragment, columns[column / 2] + column % 2 * 2);
                Precision::multiply(acc[tile][column], rows, fragment);
            }
        }
    }
}

// The same for split rows. Each kind of product has sums of its own, from 0, which are then added in f32 arithmetic: with a and b
// exchanged the two mixed sums change places, and the total has the same bits.
template <int row_tiles, int column_tiles>
DEVICE void multiply_split_stage(float (*acc)[column_tiles][4], const unsigned char *a, const unsigned char *b, uint32_t a_row,
                                 uint32_t b_row) {
    Accumulators<row_tiles, column_tiles> low_high, high_low, high;
    clear(low_high);
    clear(high_low);
    clear(high);
#pragma unroll 1
    for (int step = 0; step < kGranules / 4; ++step) {
        ExactF32::Fragment<4> columns[column_tiles / 2];  // each for two products
#pragma unroll
        for (int pair = 0; pair < column_tiles / 2; ++pair) {
            load_columns(columns[pair].high, b, b_row + pair * 16, step * 2);
            load_columns(columns[pair].low, b, b_row + pair * 16, step * 2 + kGranules / 2);
        }
#pragma unroll
        for (int tile = 0; tile < row_tiles; ++tile) {
            ExactF32::Fragment<4> rows;
            load_rows(rows.high, a, a_row + tile * 16, step * 2);
            load_rows(rows.low, a, a_row + tile * 16, step * 2 + kGranules / 2);
#pragma unroll
            for (int column = 0; column < column_tiles; ++column) {
                const auto &two = columns[column / 2];
                const uint32_t b_high[2] = {two.high[column % 2 * 2], two.high[column % 2 * 2 + 1]};
                const uint32_t b_low[2] = {two.low[column % 2 * 2], two.low[column % 2 * 2 + 1]};
                mma_f16(low_high[tile][column], rows.low, b_high);
                mma_f16(high_low[tile][column], rows.high, b_low);
                mma_f16(high[tile][column], rows.high, b_high);
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < row_tiles; ++tile) {
#pragma unroll
        for (int column = 0; column < column_tiles; ++column) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float sum = high[tile][column][i] + (low_high[tile][column][i] + high_low[tile][column][i]);
                acc[tile][column][i] = fmaf(sum, 1.0f / (kRowScale * kRowScale), acc[tile][column][i]);
            }
        }
    }
}

// acc = the products of 32 row_tiles rows (twice as many if a warp has 64 columns) from `a` on with the TILE rows from `b` on.
// `b` is the first row of a tile of prepared rows, `a` any row of one.
// `stages` has stage_count * (those rows + TILE) * STAGE_BYTES bytes, free on entry and on return.
// Split rows: `together` row tiles at a time, which bounds the registers of the mixed sums.
template <class Precision, int row_tiles, int stage_count = kStages, int together = 2, int column_tiles>
DEVICE void multiply_tile(float (&acc)[row_tiles][column_tiles][4], const void *a, const void *b, uint64_t stride_bytes,
                          unsigned char *stages) {
    constexpr int rows = 8 * row_tiles * column_tiles;
    constexpr uint32_t stage_bytes = (rows + TILE) * STAGE_BYTES;
    auto a_bytes = static_cast<const unsigned char *>(a);
    auto b_bytes = static_cast<const unsigned char *>(b);
    uint32_t count = static_cast<uint32_t>(stride_bytes / STAGE_BYTES);
    MmaLayout<row_tiles, column_tiles> layout;
    auto copy = [&](uint32_t index) {
        unsigned char *stage = stages + index % stage_count * stage_bytes;
        copy_stage<Precision>(stage, a_bytes, index, rows);
        copy_stage<Precision>(stage + rows * STAGE_BYTES, b_bytes, index, TILE);
    };
    clear(acc);
    for (uint32_t index = 0; index < stage_count - 1; ++index) {
        if (index < count) copy(index);
        cp_async_commit();  // a group for each stage, even an empty one: the waits below count groups
    }
    for (uint32_t index = 0; index < count; ++index) {
        cp_async_wait<stage_count - 2>();
        block_sync();  // all threads' copies of this stage are complete, and the previous stage has been read
        if (index + stage_count - 1 < count) copy(index + stage_count - 1);
        cp_async_commit();
        const unsigned char *stage = stages + index % stage_count * stage_bytes;
        const unsigned char *other = stage + rows * STAGE_BYTES;
        if constexpr (Precision::exact) {
#pragma unroll
            for (int first = 0; first < row_tiles; first += together) {
                multiply_split_stage<together, column_tiles>(acc + first, stage, other, layout.warp_row + first * 16, layout.warp_column);
            }
        } else {
            multiply_stage<Precision>(acc, stage, other, layout.warp_row, layout.warp_column);
        }
    }
    cp_async_wait<0>();
    block_sync();
}

#endif
