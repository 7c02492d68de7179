// split_k.cuh: split-K: the inner dimension of M R divided among blocks: the tiles of a block, where its sums
// go, and how the last block to arrive adds the sums of all, in order.
#ifndef DDTAS_SPLIT_K_CUH
#define DDTAS_SPLIT_K_CUH

#include "pairs/pairs.cuh"
#include "tile/prepared_rows.cuh"

// The tiles of the other side that a split walks.
struct Range {
    uint32_t begin;
    uint32_t end;
};
DEVICE Range split_range(uint32_t tiles, uint32_t split, uint32_t splits) {
    return Range{static_cast<uint32_t>(static_cast<uint64_t>(tiles) * split / splits),
                 static_cast<uint32_t>(static_cast<uint64_t>(tiles) * (split + 1) / splits)};
}

// The side whose gradient is computed, and the other side, whose rows are summed.
DEVICE const Side &own_side(const GradientParams &p) { return p.of_references ? p.pairs.references : p.pairs.anchors; }
DEVICE const Side &other_side(const GradientParams &p) { return p.of_references ? p.pairs.anchors : p.pairs.references; }

// Where row `row` of the result goes: with one split to the caller's gradient, otherwise to the split's part.
struct ResultRow {
    float *to;
    uint32_t columns;  // 0 for padding
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

// 1, or NaN if a row is bad, so that callers that do not wait find it in the gradient.
DEVICE float one_or_nan(const Pairs &pairs) { return has_bad_row(*pairs.counters) ? NAN : 1.0f; }

// Rows of a part that a warp loads before it adds any: the last block has a multiprocessor's latency to itself.
constexpr uint32_t kRowsAtOnce = 8;

// Adds `count` parts, those of every `step`-th split from `first_split` on, in order, and writes the sum to the result or in
// place of the first part: `rows` rows from `first_row` on, by `warps` warps, a row by one warp.
DEVICE void add_parts(const GradientParams &p, uint64_t first_row, uint32_t rows, uint32_t warps, uint32_t first_split, uint32_t step,
                      uint32_t count, bool to_result) {
    using Vector = Granule<float>;
    const Side &own = own_side(p);
    uint64_t stride = p.pairs.stride, part = static_cast<uint64_t>(own.tiles) * TILE * stride;
    uint64_t left = first_row < own.count ? own.count - first_row : 0;
    if (left < rows) rows = static_cast<uint32_t>(left);
    ColumnBlock columns = column_block(p.pairs);
    float *parts = p.partial + first_split * part, *result = to_result ? p.gradient : parts;
    uint64_t width = to_result ? p.pairs.dim : stride;
    bool aligned = (reinterpret_cast<uintptr_t>(result) | width * sizeof(float)) % sizeof(Vector) == 0;
    for (uint32_t of_block = lane_index() * Vector::count; of_block < columns.count; of_block += 32 * Vector::count) {
        uint32_t column = columns.first + of_block;
#pragma unroll 1
        for (uint32_t first = warp_index(); first < rows; first += kRowsAtOnce * warps) {
            // Beyond the last row the first one is loaded again.
            auto there = [&](uint32_t r) { return first + r * warps < rows; };
            auto row = [&](uint32_t r) { return first_row + first + (there(r) ? r * warps : 0); };
            uint64_t target[kRowsAtOnce];
            Vector sums[kRowsAtOnce] = {};
#pragma unroll
            for (uint32_t r = 0; r < kRowsAtOnce; ++r) target[r] = to_result ? own.order[row(r)] : row(r);
#pragma unroll 2
            for (uint32_t k = 0; k < count; ++k) {
                const float *from = parts + k * step * part + column;
                Vector values[kRowsAtOnce];
#pragma unroll
                for (uint32_t r = 0; r < kRowsAtOnce; ++r) values[r] = *reinterpret_cast<const Vector *>(from + row(r) * stride);
#pragma unroll
                for (uint32_t r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
                    for (int i = 0; i < Vector::count; ++i) sums[r].values[i] += values[r].values[i];
                }
            }
#pragma unroll
            for (uint32_t r = 0; r < kRowsAtOnce; ++r) {
                if (!there(r)) break;
                float *to = result + target[r] * width + column;
                if (aligned && column < width) {
                    *reinterpret_cast<Vector *>(to) = sums[r];
                    continue;
                }
#pragma unroll
                for (int i = 0; i < Vector::count; ++i) {
                    if (column + i < width) to[i] = sums[r].values[i];
                }
            }
        }
    }
}

// Ends a block, or those of its warps that call it, after their part is written: the last block of every SPLITS_ADDED splits adds
// their parts; if there are several such groups, the last one adds the groups' sums. `is_last(counter, count)`: whether this is
// the last of `count` blocks to arrive.
template <class IsLast>
DEVICE void finish_splits(const GradientParams &p, uint64_t first_row, uint32_t rows, uint32_t warps, IsLast is_last) {
    if (p.splits == 1) return;
    uint32_t groups = (p.splits + SPLITS_ADDED - 1) / SPLITS_ADDED, group = block_z() / SPLITS_ADDED, first = group * SPLITS_ADDED;
    uint32_t count = p.splits - first < SPLITS_ADDED ? p.splits - first : SPLITS_ADDED;
    // Counters of the blocks with the same rows and columns: one for each group, and one for the groups.
    uint32_t column_blocks = (p.pairs.stride + GRADIENT_COLUMNS - 1) / GRADIENT_COLUMNS;
    uint32_t *arrived = p.arrived + (block_x() * column_blocks + block_y()) * (groups + 1);
    uint32_t step = 1;
#pragma unroll 1
    for (bool done = false; !done;) {
        if (!is_last(&arrived[group], count)) return;
        if (thread_index() == 0) arrived[group] = 0;
        done = groups == 1 || step != 1;
        add_parts(p, first_row, rows, warps, first, step, count, done);
        // Next the groups' sums, whose counter comes after those of the groups.
        group = count = groups;
        first = 0;
        step = SPLITS_ADDED;
    }
}

// The same for the whole block of `threads` threads. `bytes` is shared memory that is no longer used.
DEVICE void finish_splits(const GradientParams &p, unsigned char *bytes, uint64_t first_row, uint32_t rows, uint32_t threads) {
    finish_splits(p, first_row, rows, threads / 32, [&](uint32_t *arrived, uint32_t blocks) {
        return is_last_block(arrived, blocks, reinterpret_cast<uint32_t *>(bytes));
    });
}

#endif
