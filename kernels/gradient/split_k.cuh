// split_k.cuh: the inner dimension of M R divided among blocks (split-K): which tiles a block has, where its
// sums go, and how the block that comes last adds those of all, in order.
#ifndef DDTAS_SPLIT_K_CUH
#define DDTAS_SPLIT_K_CUH

#include "pairs/pairs.cuh"
#include "tile/prepared_rows.cuh"

// Tiles of the other side that a split walks.
struct Range {
    uint32_t begin;
    uint32_t end;
};
DEVICE Range split_range(uint32_t tiles, uint32_t split, uint32_t splits) {
    return Range{static_cast<uint32_t>(static_cast<uint64_t>(tiles) * split / splits),
                 static_cast<uint32_t>(static_cast<uint64_t>(tiles) * (split + 1) / splits)};
}

// The side whose gradient it is, whose rows are M's, and the other one, whose rows are summed.
DEVICE const Side &own_side(const GradientParams &p) { return p.of_references ? p.pairs.references : p.pairs.anchors; }
DEVICE const Side &other_side(const GradientParams &p) { return p.of_references ? p.pairs.anchors : p.pairs.references; }

// Where row `row` of the result goes: with one split straight to the caller's rows, otherwise to the split's part.
struct ResultRow {
    float *to;
    uint32_t columns;  // 0: padding, which the caller does not have
};
DEVICE ResultRow result_row(const GradientParams &p, uint64_t row) {
    const Pairs &pairs = p.pairs;
    const Side &own = own_side(p);
    if (p.splits != 1) {
        uint64_t padded_rows = static_cast<uint64_t>(own.tiles) * TILE;
        return ResultRow{p.partial + (block_z() * padded_rows + row) * pairs.stride, pairs.stride};
    }
    if (row >= own.count) return ResultRow{nullptr, 0};
    return ResultRow{p.gradient + static_cast<uint64_t>(own.order[row]) * pairs.dim, pairs.dim};
}

// The block's columns of the gradient.
struct ColumnBlock {
    uint32_t first, count;
};
DEVICE ColumnBlock column_block(const Pairs &pairs) {
    uint32_t first = block_y() * GRADIENT_COLUMNS, left = pairs.stride - first;
    return ColumnBlock{first, left < GRADIENT_COLUMNS ? left : GRADIENT_COLUMNS};
}

// 1, or NaN if a row is bad, so that a caller who does not wait sees it in the gradient.
DEVICE float one_or_nan(const Pairs &pairs) { return has_bad_row(*pairs.counters) ? NAN : 1.0f; }

// The counter of the blocks that share this one's rows and columns.
DEVICE uint32_t *arrivals(const GradientParams &p) {
    return p.arrived + block_x() * ((p.pairs.stride + GRADIENT_COLUMNS - 1) / GRADIENT_COLUMNS) + block_y();
}

// Their parts of `rows` rows from `first_row` on, added in order, by `threads` threads of the block that came last.
DEVICE void add_splits(const GradientParams &p, uint64_t first_row, uint32_t rows, uint32_t thread, uint32_t threads) {
    using Vector = Granule<float>;
    const Side &own = own_side(p);
    uint64_t stride = p.pairs.stride, part = static_cast<uint64_t>(own.tiles) * TILE * stride;
    ColumnBlock columns = column_block(p.pairs);
    uint32_t vectors = columns.count / Vector::count;
    for (uint32_t i = thread; i < rows * vectors; i += threads) {
        uint64_t row = first_row + i / vectors;
        uint32_t column = columns.first + i % vectors * Vector::count;
        if (row >= own.count) break;
        auto from = p.partial + row * stride + column;
        Vector sum{};
        for (uint32_t split = 0; split < p.splits; ++split) {
            Vector value = *reinterpret_cast<const Vector *>(from + split * part);
#pragma unroll
            for (int k = 0; k < Vector::count; ++k) sum.values[k] += value.values[k];
        }
        float *to = p.gradient + static_cast<uint64_t>(own.order[row]) * p.pairs.dim;
#pragma unroll
        for (int k = 0; k < Vector::count; ++k) {
            if (column + k < p.pairs.dim) to[column + k] = sum.values[k];
        }
    }
    if (thread == 0) *arrivals(p) = 0;
}

// The end of a block whose threads have all written their part. `bytes` is shared memory that nobody uses any more.
DEVICE void finish_splits(const GradientParams &p, unsigned char *bytes, uint64_t first_row, uint32_t rows, uint32_t threads) {
    if (p.splits == 1) return;
    if (is_last_block(arrivals(p), p.splits, reinterpret_cast<uint32_t *>(bytes))) {
        add_splits(p, first_row, rows, thread_index(), threads);
    }
}

#endif
