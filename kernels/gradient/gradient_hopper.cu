// gradient_hopper.cu: gradient.cu on Hopper (wgmma, sm_90a), for 16-bit types.
// Truth: src/loss/gradient.rs, src/loss/reference.rs. Launcher: src/backend/device/passes.rs.
//
// dE += M R, a block 128 rows and 256 columns of dE, warp-specialised (hopper_roles.cuh). Two warpgroups multiply, 64 rows each.
// Three warps build the next tiles of M in shared memory, by a store for each candidate's word that `weigh` finished. One warp
// copies R, the other side's rows, half a tile at a time (64 rows, 256 columns), through four stages, and zeros the next M.
// Prepared rows have the layout of wgmma's transposed operand, so that no operand passes through registers. M has the orientation
// of its tile of S; if that is transposed, so is the product's operand. A tile of S that was not stored is recomputed by the MMA
// warps, 64 columns at a time, since the sums of dE leave no registers for more: its operands come through the stages, its
// similarities go to a stage, and half of M is built from these. Rows, columns, splits and the order of every sum are those of
// gradient.cu. Sync: mbarriers (full, empty, zeroed, built, values_ready).

#include "gradient/hopper_roles.cuh"

#ifdef HAS_WGMMA

constexpr uint32_t kDepth = TILE / 2;                             // rows of R in a stage
constexpr uint32_t kStagePanel = kDepth * STAGE_BYTES;            // 64 columns of these rows
constexpr uint32_t kStageBytes = kDepth * GRADIENT_COLUMNS * 2;
constexpr uint32_t kOperandBytes = TILE * STAGE_BYTES;            // a tile's rows, 64 of the inner dimension
constexpr uint32_t kHalf = TILE / 2;                              // columns of S that are recomputed at a time
// Tiles of M: one more than the stages have tiles of R, so that an empty stage implies a matrix that is no longer read.
constexpr uint32_t kMatrices = GRADIENT_HOPPER_STAGES / 2 + 1;
static_assert((TILE + kHalf) * STAGE_BYTES <= kStageBytes, "a k block of half a recomputed tile");
static_assert(TILE * kHalf * sizeof(float) == kStageBytes, "and its similarities");

struct Roles16Bit {
    static constexpr uint32_t matrices = kMatrices, parts = 2, k_block_fills = 1;
};
using Work = RolesWork<Roles16Bit>;
template <bool words>
using Walk = RolesWalk<Roles16Bit, words>;

struct GradientHopperShared {
    unsigned char stages[GRADIENT_HOPPER_STAGES][kStageBytes];  // [columns / 64, kDepth, STAGE_BYTES]
    unsigned char matrices[kMatrices][kMatrixPart];
    Barrier full[GRADIENT_HOPPER_STAGES], empty[GRADIENT_HOPPER_STAGES];
    Barrier zeroed[kMatrices], built[kMatrices];
    Barrier values_ready[2];      // the similarities of a half of a recomputed tile are in their stage
    uint32_t last, unused;  // whether this block is the last of its splits
};
static_assert(sizeof(GradientHopperShared) == GRADIENT_HOPPER_SHARED_BYTES, "the launch plan's shared memory");
static_assert(kHopperListsBytes <= sizeof(GradientHopperShared), "in the place of the stages");

// The copying warp: for every tile the operands of S if it is recomputed, then R; zeros for its M.
template <class Precision>
DEVICE void copy_rows(const GradientParams &p, GradientHopperShared &shared, Walk<false> walk, ColumnBlock columns) {
    const Pairs &pairs = p.pairs;
    uint32_t panels = columns.count / kPanelColumns;
    auto own_rows = static_cast<const unsigned char *>(tile_rows<Precision>(own_side(p), walk.x, pairs.stride));
    bool there = walk.next();
    if (there) zero_matrix(shared, walk.work.matrix());
    while (there) {
        Work work = walk.work;
        there = walk.next();
        auto rows = static_cast<const unsigned char *>(tile_rows<Precision>(other_side(p), work.y, pairs.stride));
        uint32_t fill = work.fill;
        if (!work.stored) {
            for (uint32_t half = 0; half < 2; ++half) {
                for (uint32_t step = 0; step < walk.k_blocks; ++step, ++fill) {
                    acquire_stage(shared, fill);
                    if (lane_index() == 0) {
                        constexpr uint32_t half_bytes = kHalf * STAGE_BYTES;
                        uint64_t from = static_cast<uint64_t>(step) * kOperandBytes;
                        unsigned char *stage = stage_of(shared, fill);
                        mbarrier_arrive_expect_tx(full_of(shared, fill), kOperandBytes + half_bytes);
                        cp_async_bulk(stage, own_rows + from, kOperandBytes, full_of(shared, fill));
                        cp_async_bulk(stage + kOperandBytes, rows + from + half * half_bytes, half_bytes, full_of(shared, fill));
                    }
                    warp_sync();
                }
                // A stage for its similarities, which the MMA warps write.
                acquire_stage(shared, fill);
                arrive_as_warp(full_of(shared, fill++));
            }
        }
        for (uint32_t half = 0; half < 2; ++half, ++fill) {
            acquire_stage(shared, fill);
            if (lane_index() == 0) mbarrier_arrive_expect_tx(full_of(shared, fill), panels * kStagePanel);
            warp_sync();
            if (lane_index() < panels) {
                uint64_t from = static_cast<uint64_t>(columns.first / kPanelColumns + lane_index()) * kOperandBytes;
                cp_async_bulk(stage_of(shared, fill) + lane_index() * kStagePanel, rows + from + half * kStagePanel,
                              kStagePanel, full_of(shared, fill));
            }
            warp_sync();
            // The product that emptied this stage was the last to read the next tile's matrix.
            if (half == 1 && there) zero_matrix(shared, walk.work.matrix());
        }
    }
}

// Granules of 4 candidates' words that a thread loads ahead, from the next tile while it waits for this one. Beyond 4,608 words a
// tile's words are waited for.
constexpr uint32_t kAhead = 12;
using Words = Granule<uint32_t>;

// Arguments of the building warps.
struct Building {
    const GradientParams &p;
    GradientHopperShared &shared;
    uint32_t thread;  // among the building threads
};

// This thread's granules of a tile's words, kBuildThreads apart; none if the tile is not stored.
struct Source {
    const Words *first = nullptr;
    uint32_t count = 0;
    DEVICE Source() {}
    DEVICE Source(const Building &my, const Work &work) {
        if (!work.stored) return;
        first = reinterpret_cast<const Words *>(my.p.pairs.pool_words + segment_at(work.segment)) + my.thread;
        count = ((work.count + Words::count - 1) / Words::count + kBuildThreads - 1 - my.thread) / kBuildThreads;
    }
    // Granule `index`, which is below kAhead; zeros if there are fewer.
    DEVICE Words at(uint32_t index) const { return index < count ? first[index * kBuildThreads] : Words{}; }
    // The granules after the first kAhead.
    DEVICE Source rest() const {
        Source rest;
        if (count > kAhead) {
            rest.first = first + kAhead * kBuildThreads;
            rest.count = count - kAhead;
        }
        return rest;
    }
};

// Writes the other triangle of a tile on the diagonal, which has each pair once.
template <class Precision>
DEVICE void mirror(const GradientParams &p, unsigned char *matrix, const Work &work, uint32_t thread) {
    const uint32_t *words = p.pairs.pool_words + segment_at(work.segment);
#pragma unroll 1
    for (uint32_t k = thread; k < work.count; k += kBuildThreads) {
        uint32_t word = words[k], place = stored_index<Precision>(word);
        *reinterpret_cast<uint16_t *>(matrix + matrix_offset<Precision>(place % TILE, place / TILE)) = word_element(word);
    }
}

template <class Precision>
DEVICE void build_matrices(const GradientParams &p, GradientHopperShared &shared, Walk<true> walk) {
    Building my{p, shared, thread_index() - kMmaWarps * 32};
    Words ahead[kAhead];
    bool there = walk.next();
    Source source = there ? Source(my, walk.work) : Source();
#pragma unroll
    for (uint32_t a = 0; a < kAhead; ++a) ahead[a] = source.at(a);
    while (there) {
        Work work = walk.work;
        there = walk.next();  // its words are loaded as this tile's are used
        Source next = there ? Source(my, walk.work) : Source();
        mbarrier_wait(&shared.zeroed[work.matrix()], work.matrix_parity());  // zeroed, and no longer read
        warp_sync();
        unsigned char *matrix = shared.matrices[work.matrix()];
        if (!work.stored) {
            auto weight = [&](uint32_t anchor, uint32_t reference, float s) {
                return matrix_weight<Precision>(p.pairs, anchor, reference, s) * p.weight_scale;
            };
            auto store = [&](uint32_t row, uint32_t column, float value) { store_weight<Precision>(matrix, row, column, value); };
            build_recomputed<kHalf>(my, work, walk.x, walk.k_blocks, weight, store);
        }
        uint32_t address = shared_address(matrix);
        for (bool last = false; !last;) {
            source = source.rest();
            last = source.count == 0;
            if (last) source = next;
#pragma unroll
            for (uint32_t a = 0; a < kAhead; ++a) {
#pragma unroll
                for (uint32_t word : ahead[a].values) store_element(address, word);
                ahead[a] = source.at(a);
            }
        }
        if (work.stored && work.tile.diagonal) mirror<Precision>(p, matrix, work, my.thread);
        fence_proxy_async();
        warp_sync();
        arrive_as_warp(&shared.built[work.matrix()]);
    }
}

// Recomputes half of a tile of S and writes the similarities to the stage after its operands. They have the bits of the sweep:
// either order of the operands gives the same.
template <class Precision>
DEVICE void recompute_values(GradientHopperShared &shared, Barrier *values_ready, uint32_t fill, uint32_t k_blocks, uint32_t group) {
    float acc[kHalf / 8][4];
    clear(acc);
    for (uint32_t step = 0; step < k_blocks; ++step, ++fill) {
        mbarrier_wait(full_of(shared, fill), parity_of(shared, fill));
        warp_sync();
        unsigned char *stage = stage_of(shared, fill);
        Descriptor rows = k_major_descriptor(stage + group * kDepth * STAGE_BYTES), columns = k_major_descriptor(stage + kOperandBytes);
        wgmma_fence();
        multiply_k_block<Precision>(acc, rows, columns);
        wgmma_commit();
        wgmma_wait<0>();
        arrive_as_warp(empty_of(shared, fill));
    }
    fence_accumulators(acc);
    publish_values<kHalf>(shared, acc, fill, values_ready);
}

// Adds the product with one stage; `weights` is 64 rows of M's tile, or 64 columns if `transposed`.
template <class Precision, bool transposed, int n>
DEVICE void multiply_half(float (&sums)[n][4], const unsigned char *weights, Descriptor rows) {
    Descriptor m = transposed ? mn_major_descriptor(weights, kPanelBytes<Precision>) : k_major_descriptor(weights);
    wgmma_fence();
#pragma unroll
    for (uint32_t k = 0; k < kDepth; k += 16) {
        wgmma<true, transposed>(Precision{}, sums, advance(m, k * (transposed ? STAGE_BYTES : 2)), advance(rows, k * STAGE_BYTES));
    }
    wgmma_commit();
    wgmma_wait<1>();  // the previous product is done, this one is running
}

// The two MMA warpgroups: 64 rows each, and at most 8 n columns.
template <class Precision, int n>
DEVICE void multiply_matrices(const GradientParams &p, GradientHopperShared &shared, Walk<false> walk, ColumnBlock columns) {
    uint32_t group = shuffle(warp_index(), 0) / 4;  // by a shuffle, so that the compiler knows it to be uniform
    float sums[n][4];
    clear(sums);
    bool open = false;  // the last product is still running, and its stage not released
    while (walk.next()) {
        const Work &work = walk.work;
        uint32_t fill = work.fill + work.before_rows(walk.k_blocks);
        if (!work.stored) {
            wgmma_wait<0>();
            if (open) {
                arrive_as_warp(empty_of(shared, work.fill - 1));
                open = false;
            }
            for (uint32_t part = 0; part < 2; ++part) {
                recompute_values<Precision>(shared, &shared.values_ready[part], work.fill + part * (walk.k_blocks + 1), walk.k_blocks, group);
            }
        }
        mbarrier_wait(&shared.built[work.matrix()], work.matrix_parity());
        warp_sync();
        for (uint32_t half = 0; half < 2; ++half, ++fill) {
            mbarrier_wait(full_of(shared, fill), parity_of(shared, fill));
            warp_sync();
            unsigned char *matrix = shared.matrices[work.matrix()];
            Descriptor rows = mn_major_descriptor(stage_of(shared, fill), kStagePanel);
            if (work.transposed()) {
                multiply_half<Precision, true>(sums, matrix + group * kPanelBytes<Precision> + half * kDepth * STAGE_BYTES, rows);
            } else {
                multiply_half<Precision, false>(sums, matrix + half * kPanelBytes<Precision> + group * kDepth * STAGE_BYTES, rows);
            }
            if (open) arrive_as_warp(empty_of(shared, fill - 1));
            open = true;
        }
    }
    wgmma_wait<0>();
    fence_accumulators(sums);

    float unscale = one_or_nan(p.pairs) / p.weight_scale;
    write_rows<2 * n>(p, walk.x, columns, [&](int r, int c) { return WgmmaLayout::value(sums, r, c) * unscale; });
}

template <class Of>
struct GradientHopper {
    using Precision = Of;
    using Roles = Roles16Bit;
    using Shared = GradientHopperShared;
    static constexpr int producer_registers = 104, mma_registers = 200;
    static DEVICE uint32_t fills(uint32_t) { return TILE / kDepth; }
    static DEVICE void copy(const GradientParams &p, Shared &shared, Walk<false> walk, ColumnBlock columns) {
        copy_rows<Precision>(p, shared, walk, columns);
    }
    static DEVICE void build(const GradientParams &p, Shared &shared, Walk<true> walk) { build_matrices<Precision>(p, shared, walk); }
    static DEVICE void multiply(const GradientParams &p, Shared &shared, Walk<false> walk, ColumnBlock columns) {
        // The narrow product takes half the time.
        if (columns.count <= GRADIENT_COLUMNS / 2) {
            multiply_matrices<Precision, GRADIENT_COLUMNS / 16>(p, shared, walk, columns);
        } else {
            multiply_matrices<Precision, GRADIENT_COLUMNS / 8>(p, shared, walk, columns);
        }
    }
};

#endif

ROLE_KERNEL(gradient_hopper_f16, GradientParams, GRADIENT_HOPPER_THREADS) { HOPPER_ONLY(run_roles<GradientHopper<F16Rows>>(p)); }
ROLE_KERNEL(gradient_hopper_bf16, GradientParams, GRADIENT_HOPPER_THREADS) { HOPPER_ONLY(run_roles<GradientHopper<Bf16Rows>>(p)); }
