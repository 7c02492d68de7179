// matrix.cuh: a tile of M = G + G^T in shared memory, for the tile ways of the gradient.
//
// Rebuilt from the stored candidates of its tile of S, or made from a recomputed one. It lies in
// panels of 128 bytes a row, swizzled as a stage of tile.cuh: ldmatrix and wgmma both read it.
// Numbers: 16-bit types hold M scaled by a power of two (weight_scale).
#ifndef DDTAS_MATRIX_CUH
#define DDTAS_MATRIX_CUH

#include "weight.cuh"

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

// Rows of M that a block has.
template <class Numbers>
constexpr uint32_t kMatrixRows = sizeof(typename Numbers::Element) == 2 ? GRADIENT_ROWS_16BIT : GRADIENT_ROWS_32BIT;
template <class Numbers>
constexpr uint32_t kMatrixBytes = kMatrixRows<Numbers> * TILE * sizeof(typename Numbers::Element);
template <class Numbers>
constexpr uint32_t kPanelBytes = kMatrixRows<Numbers> * STAGE_BYTES;

// Byte of element (row, k) of M.
template <class Numbers>
DEVICE uint32_t matrix_place(uint32_t row, uint32_t k) {
    uint32_t byte = k * sizeof(typename Numbers::Element);
    return byte / STAGE_BYTES * kPanelBytes<Numbers> + swizzled(row, byte % STAGE_BYTES / 16) + byte % 16;
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
    for (uint32_t i = thread_index(); i < kMatrixBytes<Numbers> / 16; i += THREADS) words[i] = Granule<uint32_t>{};
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
        constexpr uint32_t rows = kMatrixRows<Numbers>;  // rows of other blocks wrap around
        bool first = of_x - offset < rows, second = tile.diagonal && of_y - offset < rows;
        if (!first && !second) continue;
        float weight = pair_weight(pairs, row, column, s) * p.weight_scale;
        if (first) store_weight<Numbers>(matrix, of_x - offset, of_y, weight);
        if (second) store_weight<Numbers>(matrix, of_y - offset, of_x, weight);
    }
}

// A recomputed tile of S comes this many rows at a time, through shared memory: from registers
// the loop below would have to be unrolled.
constexpr uint32_t kRecomputedRows = 64;
// Which elements of a tile on the diagonal: those below it, those above it, or all.
enum class Part { upper, lower, all };

// M of kRecomputedRows rows from the block's row `first` on, from `values` [kRecomputedRows, kValuesStride] of S.
template <class Numbers>
DEVICE void weigh_values(const GradientParams &p, unsigned char *matrix, const float *values, uint32_t x, uint32_t y,
                         uint32_t offset, uint32_t first, PairTile tile, Part part) {
    const Pairs &pairs = p.pairs;
    for (uint32_t k = thread_index(); k < kRecomputedRows * TILE; k += THREADS) {
        uint32_t of_x = first + k / TILE, of_y = k % TILE;
        uint32_t i = x * TILE + offset + of_x, j = y * TILE + of_y;
        bool swapped = tile.diagonal ? i > j : tile.transposed;
        if (part != Part::all && swapped != (part == Part::lower)) continue;
        uint32_t anchor = swapped ? j : i, reference = swapped ? i : j;
        float s = values[k / TILE * kValuesStride + of_y];
        float weight = is_pair(pairs, anchor, reference) ? pair_weight(pairs, anchor, reference, s) : 0.0f;
        store_weight<Numbers>(matrix, of_x, of_y, weight * p.weight_scale);
    }
}

#endif
