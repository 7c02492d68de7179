// weight_tile.cuh: a tile of M = G + G^T in shared memory, for the gradient by tiles.
//
// Built from the stored candidates of its tile of S, or from a recomputed one. The layout is panels of
// 128 bytes a row, swizzled as a stage of mma_tile.cuh, which ldmatrix and wgmma both read.
// Precision: 16-bit types have M scaled by a power of two (weight_scale).
#ifndef DDTAS_WEIGHT_TILE_CUH
#define DDTAS_WEIGHT_TILE_CUH

#include "pairs/pair_weight.cuh"
#include "pairs/tile_order.cuh"
#include "tile/mma_tile.cuh"

// Rows of M of a block.
template <class Precision>
constexpr uint32_t kMatrixRows = sizeof(typename Precision::Element) == 2 ? GRADIENT_ROWS_16BIT : GRADIENT_ROWS_32BIT;
template <class Precision>
constexpr uint32_t kMatrixBytes = kMatrixRows<Precision> * TILE * sizeof(typename Precision::Element);
template <class Precision>
constexpr uint32_t kPanelBytes = kMatrixRows<Precision> * STAGE_BYTES;

// Byte offset of element (row, k) of M.
template <class Precision>
DEVICE uint32_t matrix_offset(uint32_t row, uint32_t k) {
    uint32_t byte = k * sizeof(typename Precision::Element);
    return byte / STAGE_BYTES * kPanelBytes<Precision> + swizzled(row, byte % STAGE_BYTES / 16) + byte % 16;
}

template <class Precision>
DEVICE void store_weight(unsigned char *matrix, uint32_t row, uint32_t k, float weight) {
    using Element = typename Precision::Element;
    *reinterpret_cast<Element *>(matrix + matrix_offset<Precision>(row, k)) = from_float<Element>(weight);
}

// An element of M. For 16-bit types the sigmoid is rounded as in the pair's word, so that a pair has the same weight
// stored or recomputed, in every kernel.
template <class Precision>
DEVICE float matrix_weight(const Pairs &pairs, uint32_t i, uint32_t j, float s) {
    if constexpr (sizeof(typename Precision::Element) == 4) {
        return pair_weight(pairs, i, j, s);
    } else {
        bool positive;
        float share = pair_share(pairs, i, j, s, positive);
        return share == 0.0f ? 0.0f : share * rounded_sigmoid(pair_sigmoid(pairs.settings, positive, s));
    }
}

// The power of two that brings M's largest element into [2^14, 2^15), and its inverse. The two f16 parts then have an error of
// 2^-22 of each element, or 2^-39 of the largest. `largest` is the bits of its absolute value.
struct TileScale {
    float up, down;
    explicit DEVICE TileScale(uint32_t largest) {
        uint32_t exponent = largest >> 23, most = 253;  // so that both are finite
        uint32_t scale = exponent < 268 - most ? most : 268 - exponent;
        up = float_of(scale << 23);
        down = float_of((254 - scale) << 23);
    }
};

// The place of a stored candidate in its tile, row * TILE + column, from its word as the gradient reads it.
template <class Precision>
DEVICE uint32_t stored_index(uint32_t word) {
    if constexpr (sizeof(typename Precision::Element) == 4) {
        return word_index(word);
    } else {
        uint32_t byte = word_byte(word), row = byte / STAGE_BYTES % TILE;
        uint32_t granule = (byte / 16 ^ row) % (STAGE_BYTES / 16) + byte / kPanelBytes<Precision> * (STAGE_BYTES / 16);
        return row * TILE + granule * 8 + byte % 16 / 2;
    }
}

// M of the block's rows (from row `offset` of tile x on) and tile y, from the stored candidates; `weigh(i, j, word, s)` is the
// element of anchor i and reference j. Four candidates a thread and batch, loaded while M is cleared or the previous batch is
// scattered; `values`: their similarities are loaded, too.
template <class Precision, bool values, class Weigh>
DEVICE void rebuild_matrix(const Pairs &pairs, unsigned char *matrix, uint32_t x, uint32_t y, uint32_t offset, PairTile tile,
                           uint32_t count, Weigh weigh) {
    struct Batch {
        Granule<uint32_t> words;
        Granule<float> similarities;
    };
    constexpr uint32_t kBatch = Granule<uint32_t>::count;
    uint64_t at = segment_of(pairs, tile.index);
    auto load = [&](uint32_t first) {
        Batch batch{};
        if (first >= count) return batch;
        batch.words = *reinterpret_cast<const Granule<uint32_t> *>(pairs.pool_words + at + first);
        if constexpr (values) batch.similarities = *reinterpret_cast<const Granule<float> *>(pairs.pool_values + at + first);
        return batch;
    };
    Batch next = load(thread_index() * kBatch);
    auto *zeros = reinterpret_cast<Granule<uint32_t> *>(matrix);
    for (uint32_t i = thread_index(); i < kMatrixBytes<Precision> / 16; i += THREADS) zeros[i] = Granule<uint32_t>{};
    block_sync();
    for (uint32_t first = thread_index() * kBatch; first < count; first += THREADS * kBatch) {
        Batch batch = next;
        next = load(first + THREADS * kBatch);
#pragma unroll
        for (uint32_t k = 0; k < kBatch; ++k) {
            uint32_t place = stored_index<Precision>(batch.words.values[k]);
            // `row` and `column` are those of S; `of_x` and `of_y` those of M's tile.
            uint32_t row = (tile.transposed ? y : x) * TILE + place / TILE;
            uint32_t column = (tile.transposed ? x : y) * TILE + place % TILE;
            uint32_t of_x = tile.transposed ? place % TILE : place / TILE;
            uint32_t of_y = tile.transposed ? place / TILE : place % TILE;
            constexpr uint32_t rows = kMatrixRows<Precision>;  // differences of other blocks' rows wrap around
            bool mine = of_x - offset < rows, second = tile.diagonal && of_y - offset < rows;
            if (first + k >= count || (!mine && !second)) continue;
            float weight = weigh(row, column, batch.words.values[k], batch.similarities.values[k]);
            if (mine) store_weight<Precision>(matrix, of_x - offset, of_y, weight);
            if (second) store_weight<Precision>(matrix, of_y - offset, of_x, weight);
        }
    }
}

// Rows of a recomputed tile of S that go through shared memory at a time: a loop over registers would have to be
// unrolled.
constexpr uint32_t kRecomputedRows = 64;

// M of kRecomputedRows rows from the block's row `first` on, from similarities `values` [kRecomputedRows, kValuesStride].
template <class Precision, class Weigh>
DEVICE void weigh_values(const Pairs &pairs, unsigned char *matrix, const float *values, uint32_t x, uint32_t y, uint32_t offset,
                         uint32_t first, PairTile tile, Weigh weigh) {
    for (uint32_t k = thread_index(); k < kRecomputedRows * TILE; k += THREADS) {
        uint32_t of_x = first + k / TILE, of_y = k % TILE;
        PairRows pair = pair_rows(tile, x * TILE + offset + of_x, y * TILE + of_y);
        float weight = 0.0f;
        if (is_pair(pairs, pair.anchor, pair.reference)) {
            weight = weigh(pair.anchor, pair.reference, values[k / TILE * kValuesStride + of_y]);
        }
        store_weight<Precision>(matrix, of_x, of_y, weight);
    }
}

#endif
