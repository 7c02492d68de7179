// wgmma_tile.cuh: the tile product of mma_tile.cuh on Hopper's warpgroup instructions (wgmma, sm_90a).
//
// The operands, stages and swizzle are the same; the swizzle is the 128-byte swizzle of wgmma's shared-memory descriptors, so
// that wgmma reads both operands straight from the stages, without ldmatrix. A stage of a prepared tile is 16 contiguous KB: one
// thread starts one bulk copy for each operand, and an mbarrier signals when both have arrived. Two warpgroups have 64 rows of
// the tile each. A stage of exact f32 has the high and the low parts of 64 dimensions; each kind of product has sums of its own,
// which are added in f32 arithmetic every 64 dimensions.
//
// On Hopper every similarity that mining uses is computed here or by the same instructions in the same order (ping_pong.cuh,
// gradient_hopper.cu), so that stored and recomputed tiles agree bit for bit.
#ifndef DDTAS_WGMMA_TILE_CUH
#define DDTAS_WGMMA_TILE_CUH

#include "tile/mma_tile.cuh"

using WgmmaAccumulators = float[16][4];  // [columns / 8, ...] of m64n128

// Which elements of the tile a thread's accumulators are, as MmaLayout; for any width. 8 warps share a tile.
struct WgmmaLayout {
    static constexpr int rows = 2, columns = 32, quarters = 4;
    DEVICE uint32_t first_quarter() const { return 0; }
    DEVICE uint32_t row_of(int r) const { return warp_index() % 8 * 16 + r * 8 + lane_index() / 4; }
    DEVICE uint32_t column_of(int c) const { return c / 2 * 8 + lane_index() % 4 * 2 + c % 2; }
    DEVICE uint32_t bits_before(uint32_t end) const { return column_bits_before<columns>(column_of(0), end); }
    template <class Sums>
    static DEVICE auto &value(Sums &acc, int r, int c) {
        return acc[c / 2][r * 2 + c % 2];
    }
};

#ifdef HAS_WGMMA

constexpr int kHopperStages = 4;
static_assert(HOPPER_STAGES_BYTES == kHopperStages * 2 * TILE * STAGE_BYTES, "the launch plan's shared memory");

// One lane arrives for its warp.
DEVICE void arrive_as_warp(Barrier *barrier) {
    if (lane_index() == 0) mbarrier_arrive(barrier);
    warp_sync();
}

// c += a b in the type of the rows, asynchronously.
template <bool transposed, bool transposed_a = false, int n>
DEVICE void wgmma(F16Rows, float (&c)[n][4], Descriptor a, Descriptor b) {
    wgmma_f16<transposed, transposed_a>(c, a, b);
}
template <bool transposed, bool transposed_a = false, int n>
DEVICE void wgmma(Bf16Rows, float (&c)[n][4], Descriptor a, Descriptor b) {
    wgmma_bf16<transposed, transposed_a>(c, a, b);
}

// c += a b over a k block (64 of the inner dimension), asynchronously.
template <class Precision, int n>
DEVICE void multiply_k_block(float (&c)[n][4], Descriptor a, Descriptor b) {
#pragma unroll
    for (int step = 0; step < kGranules / 2; ++step) wgmma<false>(Precision{}, c, advance(a, step * 32), advance(b, step * 32));
}

// sums = a b over a k block, asynchronously.
template <int n>
DEVICE void multiply_lines(float (&sums)[n][4], Descriptor a, Descriptor b) {
    wgmma_f16<false, false, true>(sums, a, b);
#pragma unroll
    for (int step = 1; step < kGranules / 2; ++step) wgmma_f16<false, false>(sums, advance(a, step * 32), advance(b, step * 32));
}
// acc += a b over a k block of split rows. `mixed()` is called once their low parts have been read. With a and b exchanged the
// mixed products change places, and their sum has the same bits.
template <int n, class Mixed>
DEVICE void add_split_products(float (&acc)[n][4], Descriptor a_high, Descriptor a_low, Descriptor b_high, Descriptor b_low,
                               Mixed mixed) {
    constexpr float down = 1.0f / (kRowScale * kRowScale);
    float sums[n][4], other[n][4];
    auto each = [](auto use) {
#pragma unroll
        for (int column = 0; column < n; ++column) {
#pragma unroll
            for (int i = 0; i < 4; ++i) use(column, i);
        }
    };
    wgmma_fence();
    multiply_lines(sums, a_high, b_low);
    multiply_lines(other, a_low, b_high);
    wgmma_commit();
    wgmma_wait<0>();
    fence_accumulators(sums);
    fence_accumulators(other);
    mixed();
    each([&](int column, int i) { sums[column][i] += other[column][i]; });
    fence_accumulators(sums);
    wgmma_fence();
    multiply_lines(other, a_high, b_high);
    wgmma_commit();
    each([&](int column, int i) { acc[column][i] = fmaf(sums[column][i], down, acc[column][i]); });
    wgmma_wait<0>();
    fence_accumulators(other);
    each([&](int column, int i) { acc[column][i] = fmaf(other[column][i], down, acc[column][i]); });
}

// Lines of STAGE_BYTES for each row of a k block: for exact f32 its high parts and its low parts.
template <class Precision>
constexpr int kLines = Precision::exact ? 2 : 1;

// A ring of stages, each with an mbarrier that counts one arrival.
template <int count, int lines = 1>
struct WgmmaStages {
    unsigned char *bytes;         // [count, 2 operands, lines, TILE, STAGE_BYTES]
    Barrier *barriers;            // [count]
    uint32_t filled = 0;          // fills so far, from which the phases of the barriers follow

    // Called by all threads; a block_sync() comes before the first wait.
    DEVICE void begin() const {
        if (thread_index() != 0) return;
        for (int stage = 0; stage < count; ++stage) mbarrier_init(&barriers[stage], 1);
    }
    DEVICE unsigned char *stage(uint32_t index) const { return bytes + index % count * 2 * lines * TILE * STAGE_BYTES; }
    DEVICE Barrier *barrier(uint32_t index) const { return &barriers[index % count]; }
    static DEVICE uint32_t parity(uint32_t index) { return index / count % 2; }
};

// The ring in the HOPPER_SHARED_BYTES from `bytes` on, its barriers initialised: the stages, then the barriers.
template <class Precision>
DEVICE auto hopper_stages(unsigned char *bytes) {
    WgmmaStages<kHopperStages / kLines<Precision>, kLines<Precision>> stages{
        bytes, reinterpret_cast<Barrier *>(bytes + HOPPER_STAGES_BYTES)};
    stages.begin();
    return stages;
}

// acc = the products of the TILE rows from `a` on with those from `b` on, as multiply_tile. With n = 16 a warpgroup has 64 rows
// and all 128 columns; with n = 8 there are 64 rows, and it has half of the columns. The stages are free on entry and on return;
// half of them are being filled while the others are read.
template <class Precision, int n, int stage_count>
DEVICE void wgmma_multiply_tile(float (&acc)[n][4], const void *a, const void *b, uint64_t stride_bytes,
                                WgmmaStages<stage_count, kLines<Precision>> &stages) {
    static_assert(n == 16 || n == 8, "a group has all columns of its rows, or half of those of all rows");
    // A stage is filled again after the product that read it: ahead + pending < stage_count.
    constexpr int ahead = stage_count / 2;
    constexpr int pending = stage_count / 2 - 1;
    static_assert(Precision::exact || pending >= 0, "a stage is read while another is filled");
    constexpr uint32_t line_bytes = TILE * STAGE_BYTES, operand_bytes = kLines<Precision> * line_bytes;
    constexpr uint32_t rows_bytes = n == 16 ? line_bytes : line_bytes / 2;
    auto a_bytes = static_cast<const unsigned char *>(a);
    auto b_bytes = static_cast<const unsigned char *>(b);
    uint32_t count = static_cast<uint32_t>(stride_bytes / STAGE_BYTES / kLines<Precision>);
    uint32_t own = warp_index() / 4 * (TILE / 2) * STAGE_BYTES;  // this group's rows, or columns
    auto copy = [&](uint32_t index) {
        if (index >= count || thread_index() != 0) return;
        uint64_t from = static_cast<uint64_t>(index) * operand_bytes;
        unsigned char *stage = stages.stage(stages.filled + index);
        Barrier *barrier = stages.barrier(stages.filled + index);
        mbarrier_arrive_expect_tx(barrier, kLines<Precision> * rows_bytes + operand_bytes);
        for (uint32_t line = 0; line < operand_bytes; line += line_bytes) {
            cp_async_bulk(stage + line, a_bytes + from + line, rows_bytes, barrier);
        }
        cp_async_bulk(stage + operand_bytes, b_bytes + from, operand_bytes, barrier);
    };
    clear(acc);
    for (int index = 0; index < ahead; ++index) copy(index);
    warp_sync();
    for (uint32_t index = 0; index < count; ++index) {
        block_sync();  // the barriers are initialised, and both groups have read the stage that is filled next
        copy(index + ahead);
        uint32_t fill = stages.filled + index;
        mbarrier_wait(stages.barrier(fill), stages.parity(fill));
        warp_sync();
        const unsigned char *stage = stages.stage(fill);
        Descriptor rows = k_major_descriptor(stage + (n == 16 ? own : 0));
        Descriptor columns = k_major_descriptor(stage + operand_bytes + (n == 16 ? 0 : own));
        if constexpr (Precision::exact) {
            add_split_products(acc, rows, advance(rows, line_bytes), columns, advance(columns, line_bytes), [] {});
        } else {
            wgmma_fence();
            multiply_k_block<Precision>(acc, rows, columns);
            wgmma_commit();
            wgmma_wait<pending>();
        }
    }
    wgmma_wait<0>();
    fence_accumulators(acc);
    block_sync();
    stages.filled += count;
}

#endif
#endif
