// hopper.cuh: the tile product of tile.cuh on Hopper's warpgroup instructions (wgmma, sm_90a).
//
// Same operands, same stages, same swizzle, which is the 128-byte swizzle of wgmma's shared-memory
// descriptors: both operands are read straight from the stages, without ldmatrix. A stage of a
// prepared tile is 16 KB in a row, so one thread starts one bulk copy for each operand, and a
// barrier in shared memory tells when both are there. Two warpgroups take 64 rows of the tile
// each. Four stages, since a stage is read until the product after the next is issued.
// 16-bit types only: splitting f32 needs registers.
#ifndef DDTAS_HOPPER_CUH
#define DDTAS_HOPPER_CUH

#include "tile.cuh"

#ifdef HAS_WARPGROUP_PRODUCTS

constexpr int kHopperStages = 4;
static_assert(HOPPER_STAGES_BYTES == kHopperStages * 2 * TILE * STAGE_BYTES, "the launch plan's shared memory");

using GroupAccumulators = float[16][4];  // [columns / 8, ...] of m64n128

// Where a thread's accumulators stand in the tile, as Place has it.
struct GroupPlace {
    static constexpr int rows = 2, columns = 32;
    DEVICE uint32_t row_of(int r) const { return warp_index() * 16 + r * 8 + lane_index() / 4; }
    DEVICE uint32_t column_of(int c) const { return c / 2 * 8 + lane_index() % 4 * 2 + c % 2; }
    static DEVICE float value(const GroupAccumulators &acc, int r, int c) { return acc[c / 2][r * 2 + c % 2]; }
};

template <class Numbers>
DEVICE void group_multiply(GroupAccumulators &acc, Descriptor a, Descriptor b);
template <>
DEVICE void group_multiply<HalfF16>(GroupAccumulators &acc, Descriptor a, Descriptor b) {
    group_mma_f16(acc, a, b);
}
template <>
DEVICE void group_multiply<HalfBf16>(GroupAccumulators &acc, Descriptor a, Descriptor b) {
    group_mma_bf16(acc, a, b);
}

// acc = the products of the TILE rows from `a` on with those from `b` on, as multiply_tile.
// `barriers` are used once: a block computes one tile.
template <class Numbers>
DEVICE void group_multiply_tile(GroupAccumulators &acc, const void *a, const void *b, uint64_t stride_bytes,
                                unsigned char *stages, Barrier (&barriers)[kHopperStages]) {
    constexpr uint32_t half_bytes = TILE * STAGE_BYTES;
    auto a_bytes = static_cast<const unsigned char *>(a);
    auto b_bytes = static_cast<const unsigned char *>(b);
    uint32_t count = static_cast<uint32_t>(stride_bytes / STAGE_BYTES);
    uint32_t group_rows = warp_index() / 4 * (TILE / 2) * STAGE_BYTES;
    auto copy = [&](uint32_t index) {
        if (index >= count || thread_index() != 0) return;
        unsigned char *stage = stages + index % kHopperStages * 2 * half_bytes;
        Barrier *barrier = &barriers[index % kHopperStages];
        barrier_expect(barrier, 2 * half_bytes);
        copy_bulk(stage, a_bytes + static_cast<uint64_t>(index) * half_bytes, half_bytes, barrier);
        copy_bulk(stage + half_bytes, b_bytes + static_cast<uint64_t>(index) * half_bytes, half_bytes, barrier);
    };
    if (thread_index() == 0) {
        for (Barrier &barrier : barriers) barrier_begin(&barrier, 1);
    }
#pragma unroll
    for (int n = 0; n < 16; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;
    }
    block_sync();  // the barriers have begun
    copy(0);
    copy(1);
    for (uint32_t index = 0; index < count; ++index) {
        block_sync();  // both groups are done with the stage before the last
        copy(index + 2);
        barrier_wait(&barriers[index % kHopperStages], index / kHopperStages % 2);
        warp_sync();
        const unsigned char *stage = stages + index % kHopperStages * 2 * half_bytes;
        Descriptor rows = stage_descriptor(stage + group_rows), columns = stage_descriptor(stage + half_bytes);
        group_fence();
#pragma unroll
        for (int step = 0; step < kGranules / 2; ++step) {
            group_multiply<Numbers>(acc, advanced(rows, step * 32), advanced(columns, step * 32));
        }
        group_commit();
        group_wait<1>();
    }
    group_wait<0>();
    block_sync();
}

#endif
#endif
