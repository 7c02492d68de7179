// gradient_hopper.cu: gradient_tiles.cu on Hopper's warpgroup products (wgmma, sm_90a); 16-bit types.
// Truth: src/loss/reference.rs. Launcher: src/backend/device/loss.rs.
//
// dE += M R: M [128, 128] rebuilt in shared memory, where wgmma reads it as it reads a stage; R, a
// whole tile of the other side's rows, 256 columns, comes in one bulk copy, since prepared rows lie
// in memory as wgmma's transposed operand lies: lines of 64 columns, one for each row. No operand
// passes through registers; the 64 x 256 (or 64 x 128) sums of a warpgroup stay there.
// Two tiles of M and of R: while the tensor cores multiply one, threads rebuild the next.
// Rows, columns, splits and the order of every sum are those of gradient_tiles.cu.
// Sync: threads write M, one fence and one barrier hand it to wgmma; a barrier in shared memory
// announces R; both are filled again when both groups have waited for the product that read them.

#include "hopper.cuh"
#include "matrix.cuh"

#ifdef HAS_WARPGROUP_PRODUCTS

constexpr uint32_t kPanelColumns = STAGE_BYTES / 2;
static_assert(GRADIENT_ROWS_16BIT == TILE, "two warpgroups of 64 rows");

struct GradientHopperShared {
    unsigned char stages[2][TILE * GRADIENT_COLUMNS * 2];  // [columns / 64, TILE, STAGE_BYTES] of the other side
    unsigned char matrices[2][TILE * TILE * 2];
    Barrier landed[2];      // of the stages
    Barrier recomputing[2]; // of a recomputed tile's operands, which pass through a stage
};
static_assert(sizeof(GradientHopperShared) == GRADIENT_HOPPER_SHARED_BYTES, "the launch plan's shared memory");
static_assert(2 * 2 * TILE * STAGE_BYTES <= sizeof(GradientHopperShared::stages[0]), "two steps of a recomputed tile");
static_assert(kRecomputedRows * kValuesStride * sizeof(float) <= sizeof(GradientHopperShared::stages[0]),
              "and half of its values");

// M of tiles x and y from a recomputed tile of S, whose bits are those of the sweep: either order of
// the operands gives the same. Leaves the stage free for bulk copies.
template <class Numbers>
DEVICE void recompute_matrix_hopper(const GradientParams &p, unsigned char *matrix, GroupStages<2> &stages, uint32_t x,
                                    uint32_t y, PairTile tile) {
    const Pairs &pairs = p.pairs;
    const Side &own = p.of_references ? pairs.references : pairs.anchors;
    const Side &other = p.of_references ? pairs.anchors : pairs.references;
    GroupAccumulators acc;
    group_multiply_tile<Numbers>(acc, tile_rows<Numbers>(own, x, pairs.stride), tile_rows<Numbers>(other, y, pairs.stride),
                                 stride_bytes<Numbers>(pairs), stages);
    auto *values = reinterpret_cast<float *>(stages.bytes);  // [kRecomputedRows, kValuesStride]
    GroupPlace place;
    for (uint32_t group = 0; group < 2; ++group) {
        uint32_t first = group * kRecomputedRows;
        if (warp_index() / 4 == group) {
#pragma unroll
            for (int r = 0; r < GroupPlace::rows; ++r) {
#pragma unroll
                for (int c = 0; c < GroupPlace::columns; ++c) {
                    values[(place.row_of(r) - first) * kValuesStride + place.column_of(c)] = GroupPlace::value(acc, r, c);
                }
            }
        }
        block_sync();
        weigh_values<Numbers>(p, matrix, values, x, y, 0, first, tile, Part::all);
        async_proxy_fence();
        block_sync();  // the values are read, and bulk copies may fill the stage
    }
}

// The block's 128 rows and at most 8 n columns of the result.
template <class Numbers, int n>
DEVICE void gradient_hopper_columns(const GradientParams &p, uint32_t first_column, uint32_t columns) {
    SHARED_MEMORY(bytes);
    auto &shared = *reinterpret_cast<GradientHopperShared *>(bytes);
    const Pairs &pairs = p.pairs;
    const Side &own = p.of_references ? pairs.references : pairs.anchors;
    const Side &other = p.of_references ? pairs.anchors : pairs.references;
    uint32_t x = block_x();
    uint32_t group_rows = warp_index() / 4 * (TILE / 2) * STAGE_BYTES;
    uint32_t panels = columns / kPanelColumns;  // fewer than n / 8: the rest of the product is not used
    if (thread_index() == 0) {
        for (Barrier &barrier : shared.landed) barrier_begin(&barrier, 1);
        for (Barrier &barrier : shared.recomputing) barrier_begin(&barrier, 1);
    }

    float sums[n][4];
#pragma unroll
    for (int column = 0; column < n; ++column) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[column][i] = 0.0f;
    }
    group_settle(sums);
    uint32_t turn = 0, recomputed = 0;  // tiles multiplied; stages filled for recomputed ones
    Range range = split_range(other.tiles, block_z(), p.splits);
    for (uint32_t y = range.begin; y < range.end; ++y) {
        PairTile tile = pair_tile(pairs, p.of_references, x, y);
        uint32_t count = pairs.tile_counts[tile.index];
        if (count == 0) continue;  // the same for the whole block
        unsigned char *stage = shared.stages[turn % 2], *matrix = shared.matrices[turn % 2];
        Barrier *landed = &shared.landed[turn % 2];
        auto copy = [&] {
            if (thread_index() != 0) return;
            auto rows = static_cast<const unsigned char *>(tile_rows<Numbers>(other, y, pairs.stride));
            uint32_t stage_bytes = panels * TILE * STAGE_BYTES;
            barrier_expect(landed, stage_bytes);
            copy_bulk(stage, rows + static_cast<uint64_t>(first_column / kPanelColumns) * TILE * STAGE_BYTES, stage_bytes,
                      landed);
        };
        block_sync();  // the barriers have begun; both groups' products of the turn before the last are done
        if (count > pairs.tile_capacity) {
            group_wait<0>();
            GroupStages<2> operands{stage, shared.recomputing, recomputed};
            recompute_matrix_hopper<Numbers>(p, matrix, operands, x, y, tile);
            recomputed = operands.filled;
            copy();
        } else {
            copy();  // lands while M is rebuilt
            rebuild_matrix<Numbers>(p, matrix, x, y, 0, tile, count);
        }
        async_proxy_fence();
        block_sync();  // M is there
        barrier_wait(landed, turn / 2 % 2);
        warp_sync();
        Descriptor weights = stage_descriptor(matrix + group_rows);
        Descriptor rows = panels_descriptor(stage, TILE * STAGE_BYTES);
        group_fence();
#pragma unroll
        for (uint32_t k = 0; k < TILE; k += 16) {
            uint32_t at = k / kPanelColumns * kPanelBytes<Numbers> + k % kPanelColumns * 2;
            group_multiply<true>(Numbers{}, sums, advanced(weights, at), advanced(rows, k * STAGE_BYTES));
        }
        group_commit();
        group_wait<1>();  // this product goes on
        ++turn;
    }
    group_wait<0>();

    uint64_t padded_rows = static_cast<uint64_t>(own.tiles) * TILE;
    float *to = p.partial + (block_z() * padded_rows + x * TILE) * pairs.stride + first_column;
    float unscale = 1.0f / p.weight_scale;
    GroupPlace place;
#pragma unroll
    for (int column = 0; column < n; ++column) {
        if (column * 8 >= static_cast<int>(columns)) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            to[static_cast<uint64_t>(place.row_of(i / 2)) * pairs.stride + place.column_of(column * 2 + i % 2)] =
                sums[column][i] * unscale;
        }
    }
}
#endif

template <class Numbers>
DEVICE void gradient_tiles_hopper_body([[maybe_unused]] const GradientParams &p) {
#ifdef HAS_WARPGROUP_PRODUCTS
    if (p.ways[block_x()]) return;
    uint32_t first_column = block_y() * GRADIENT_COLUMNS;
    uint32_t left = p.pairs.stride - first_column;
    uint32_t columns = left < GRADIENT_COLUMNS ? left : GRADIENT_COLUMNS;
    // The narrow product for what it holds: it takes half the time.
    if (columns <= GRADIENT_COLUMNS / 2) {
        gradient_hopper_columns<Numbers, GRADIENT_COLUMNS / 16>(p, first_column, columns);
    } else {
        gradient_hopper_columns<Numbers, GRADIENT_COLUMNS / 8>(p, first_column, columns);
    }
#else
    trap();
#endif
}
KERNEL(gradient_tiles_hopper_f16, GradientParams, 1) { gradient_tiles_hopper_body<HalfF16>(p); }
KERNEL(gradient_tiles_hopper_bf16, GradientParams, 1) { gradient_tiles_hopper_body<HalfBf16>(p); }
