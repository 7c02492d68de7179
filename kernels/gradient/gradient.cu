// gradient.cu: dE = M R, with M = G + G^T, or G or G^T in the rectangular form (SPEC 4).
// Truth: src/loss/gradient.rs, src/loss/reference.rs. Launcher: src/backend/device/passes.rs.
//
// Row tiles with few mined pairs are summed from lists (row_lists.cuh), the others by tiles on tensor cores (tile_product.cuh);
// `weigh` chooses. A block has 128 rows (f32: 64) and 256 columns of the result and walks the other side's tiles, or a split's
// range of them, in order, so that every sum has a fixed order, without atomics. The last split to arrive adds all parts.
// Precision: 16-bit types have M scaled by a power of two; sums are f32.

#include "gradient/tile_product.cuh"

// The elements of M.
template <class Precision>
struct Weights {
    static constexpr uint32_t parts = 1;
    static constexpr bool may_be_nothing = false, from_words = sizeof(typename Precision::Element) == 2;
    const GradientParams &p;
    DEVICE float of_word(uint32_t word) const { return to_float(typename Precision::Element{word_element(word)}); }
    DEVICE float weigh(uint32_t i, uint32_t j, float s, uint32_t) const {
        return matrix_weight<Precision>(p.pairs, i, j, s) * p.weight_scale;
    }
    DEVICE void after(GradientSums<Precision> &) const {}
};

template <class Precision>
DEVICE void gradient_body(const GradientParams &p) {
    SHARED_MEMORY(bytes);
    TileBlock block = tile_block<Precision>(p);
    constexpr uint32_t rows = kMatrixRows<Precision>;
    if (p.by_lists[block.x]) {
        for (uint32_t first = 0; first < rows; first += kListsPart) {
            gradient_lists<Precision, THREADS / 32, kListsRows>(p, bytes, block.x, block.offset + first);
        }
    } else {
        TileMemory<Precision> memory(bytes);
        Weights<Precision> job{p};
        GradientSums<Precision> sums;
        clear_sums<Precision>(sums);
        walk_tiles<Precision, false>(p, memory, block, split_range(other_side(p).tiles, block_z(), p.splits), job, sums);
        float unscale = one_or_nan(p.pairs) / p.weight_scale;
        each_sum<Precision>(sums, [&](uint32_t row) {
            ResultRow result = result_row(p, block.x * TILE + block.offset + row);
            return [=](uint32_t column, float sum) {
                if (column >= block.columns.count || block.columns.first + column >= result.columns) return;
                result.to[block.columns.first + column] = sum * unscale;
            };
        });
    }
    finish_splits(p, bytes, static_cast<uint64_t>(block.x) * TILE + block.offset, rows, THREADS);
}
KERNEL_IN_EVERY_PRECISION(gradient, GradientParams)
