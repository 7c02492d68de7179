// gradient_hopper.cu: gradient.cu on Hopper's warpgroup products (wgmma, sm_90a); 16-bit types.
// Truth: src/loss/gradient.rs, src/loss/reference.rs. Launcher: src/backend/device/passes.rs.
//
// dE += M R, a block 128 rows and 256 columns of dE. Its warps have roles: two warpgroups multiply, 64 rows each; three warps
// build the next tiles of M in shared memory, a store for every word that `weigh` left of a candidate; one warp copies zeros
// to where they will stand, and R, the other side's rows, half a tile at a time (64 rows, 256 columns), in four stages.
// Prepared rows lie in memory as wgmma's transposed operand lies: no operand passes through registers. M lies as its tile of S
// does; where that is the other way round the product transposes it. A tile of S that was not stored is recomputed by the
// warps that multiply, 64 columns at a time, since the sums of dE leave no registers for more: its operands come through the
// stages, its values go back to one, and half of M is built from these.
// Rows, columns, splits and the order of every sum are those of gradient.cu; all warps alike sum what goes by lists.
// Sync: barriers in shared memory alone (full, empty, zeroed, built, valued); all roles walk the same tiles.

#include "gradient/hopper_roles.cuh"

#ifdef HAS_WARPGROUP_PRODUCTS

constexpr uint32_t kDepth = TILE / 2;                             // rows of R in a stage
constexpr uint32_t kStagePanel = kDepth * STAGE_BYTES;            // of them, 64 columns
constexpr uint32_t kStageBytes = kDepth * GRADIENT_COLUMNS * 2;
constexpr uint32_t kOperandBytes = TILE * STAGE_BYTES;            // a tile's rows, 64 of the inner dimension
constexpr uint32_t kHalf = TILE / 2;                              // columns of S that are recomputed at a time
// Tiles of M: one more than the stages hold tiles of R, so that a stage that is given back says that a matrix is.
constexpr uint32_t kMatrices = GRADIENT_HOPPER_STAGES / 2 + 1, kTileBytes = TILE * TILE * 2;
static_assert((TILE + kHalf) * STAGE_BYTES <= kStageBytes, "a step of half a recomputed tile");
static_assert(TILE * kHalf * sizeof(float) == kStageBytes, "and its values");

struct NarrowRoles {
    static constexpr uint32_t matrices = kMatrices, parts = 2, step_fills = 1;
};
using Turn = RolesTurn<NarrowRoles>;
template <bool words>
using Walk = RolesWalk<NarrowRoles, words>;

struct GradientHopperShared {
    unsigned char stages[GRADIENT_HOPPER_STAGES][kStageBytes];  // [columns / 64, kDepth, STAGE_BYTES]
    unsigned char matrices[kMatrices][kTileBytes];
    Barrier full[GRADIENT_HOPPER_STAGES], empty[GRADIENT_HOPPER_STAGES];
    Barrier zeroed[kMatrices], built[kMatrices];
    Barrier valued[2];      // a half of a recomputed tile's S is in its stage
    uint32_t last, unused;  // whether this block is the last of its splits
};
static_assert(sizeof(GradientHopperShared) == GRADIENT_HOPPER_SHARED_BYTES, "the launch plan's shared memory");
static_assert(kHopperListsBytes <= sizeof(GradientHopperShared), "where the stages are");

// The warp that copies: R of every tile, before it zeros for its M or, of a recomputed one, the operands of S.
template <class Numbers>
DEVICE void copy_rows(const GradientParams &p, GradientHopperShared &shared, Walk<false> walk, ColumnBlock columns) {
    const Pairs &pairs = p.pairs;
    uint32_t panels = columns.count / kPanelColumns;
    auto own_rows = static_cast<const unsigned char *>(tile_rows<Numbers>(own_side(p), walk.x, pairs.stride));
    auto begin_stage = [&](uint32_t fill) {
        if (fill >= GRADIENT_HOPPER_STAGES) mbarrier_wait(empty_of(shared, fill), parity_of(shared, fill - GRADIENT_HOPPER_STAGES));
        warp_sync();
    };
    // Recomputed tiles too: their matrix is written all over, and waited for alike.
    auto clear = [&](uint32_t matrix) {
        if (lane_index() == 0) {
            mbarrier_arrive_expect_tx(&shared.zeroed[matrix], kTileBytes);
            cp_async_bulk(shared.matrices[matrix], p.zeros, kTileBytes, &shared.zeroed[matrix]);
        }
        warp_sync();
    };
    bool there = walk.next();
    if (there) clear(walk.turn.matrix());
    while (there) {
        Turn turn = walk.turn;
        there = walk.next();
        auto rows = static_cast<const unsigned char *>(tile_rows<Numbers>(other_side(p), turn.y, pairs.stride));
        uint32_t fill = turn.fill;
        if (!turn.stored) {
            for (uint32_t half = 0; half < 2; ++half) {
                for (uint32_t step = 0; step < walk.steps; ++step, ++fill) {
                    begin_stage(fill);
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
                // One for its values, which nobody copies.
                begin_stage(fill);
                arrive_as_warp(full_of(shared, fill++));
            }
        }
        for (uint32_t half = 0; half < 2; ++half, ++fill) {
            begin_stage(fill);
            // The product that gave this stage back was the last to read the matrix that the next tile gets.
            if (half == 1 && there) clear(walk.turn.matrix());
            if (lane_index() == 0) mbarrier_arrive_expect_tx(full_of(shared, fill), panels * kStagePanel);
            warp_sync();
            if (lane_index() < panels) {
                uint64_t from = static_cast<uint64_t>(columns.first / kPanelColumns + lane_index()) * kOperandBytes;
                cp_async_bulk(stage_of(shared, fill) + lane_index() * kStagePanel, rows + from + half * kStagePanel,
                              kStagePanel, full_of(shared, fill));
            }
            warp_sync();
        }
    }
}

// Granules of 4 words of candidates that a thread has under way: those of the next tile while this one is waited for.
constexpr uint32_t kAhead = 8;
using Words = Granule<uint32_t>;

// What the warps that build know of their block.
struct Building {
    const GradientParams &p;
    GradientHopperShared &shared;
    uint32_t thread;  // of theirs
};

// This thread's granules of a tile's words, kBuilderThreads apart: none of a tile that is not stored.
struct Source {
    const Words *first = nullptr;
    uint32_t count = 0;
    DEVICE Source() {}
    DEVICE Source(const Building &my, const Turn &turn) {
        if (!turn.stored) return;
        first = reinterpret_cast<const Words *>(my.p.pairs.pool_words + static_cast<uint64_t>(turn.segment) * 4) + my.thread;
        count = ((turn.count + Words::count - 1) / Words::count + kBuilderThreads - 1 - my.thread) / kBuilderThreads;
    }
    // Of kAhead from the first on; zeros where there are fewer.
    DEVICE Words at(uint32_t index) const { return index < count ? first[index * kBuilderThreads] : Words{}; }
    // What is left behind kAhead.
    DEVICE Source rest() const {
        Source rest;
        if (count > kAhead) {
            rest.first = first + kAhead * kBuilderThreads;
            rest.count = count - kAhead;
        }
        return rest;
    }
};

// The other triangle of a tile of the diagonal, which holds each of its pairs once.
template <class Numbers>
DEVICE void mirror(const GradientParams &p, unsigned char *matrix, const Turn &turn, uint32_t thread) {
    const uint32_t *words = p.pairs.pool_words + static_cast<uint64_t>(turn.segment) * 4;
#pragma unroll 1
    for (uint32_t k = thread; k < turn.count; k += kBuilderThreads) {
        uint32_t word = words[k], place = stored_place<Numbers>(word);
        *reinterpret_cast<uint16_t *>(matrix + matrix_place<Numbers>(place % TILE, place / TILE)) = word_element(word);
    }
}

template <class Numbers>
DEVICE void build_matrices(const GradientParams &p, GradientHopperShared &shared, Walk<true> walk) {
    Building my{p, shared, thread_index() - kMultipliers * 32};
    Words ahead[kAhead];
    bool there = walk.next();
    Source source = there ? Source(my, walk.turn) : Source();
#pragma unroll
    for (uint32_t a = 0; a < kAhead; ++a) ahead[a] = source.at(a);
    while (there) {
        Turn turn = walk.turn;
        there = walk.next();  // its words are loaded where this tile's are used up
        Source next = there ? Source(my, walk.turn) : Source();
        mbarrier_wait(&shared.zeroed[turn.matrix()], turn.matrix_parity());  // and nobody reads the matrix any more
        warp_sync();
        unsigned char *matrix = shared.matrices[turn.matrix()];
        if (!turn.stored) {
            auto weight = [&](uint32_t anchor, uint32_t reference, float s) {
                return matrix_weight<Numbers>(p.pairs, anchor, reference, s) * p.weight_scale;
            };
            auto store = [&](uint32_t row, uint32_t column, float value) { store_weight<Numbers>(matrix, row, column, value); };
            build_recomputed<kHalf>(my, turn, walk.x, walk.steps, weight, store);
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
        if (turn.stored && turn.tile.diagonal) mirror<Numbers>(p, matrix, turn, my.thread);
        fence_proxy_async();
        warp_sync();
        arrive_as_warp(&shared.built[turn.matrix()]);
    }
}

// Half of S of a tile that was not stored, its values left in the stage behind its operands. The bits are those
// of the sweep: either order of the operands gives the same.
template <class Numbers>
DEVICE void recompute_values(GradientHopperShared &shared, Barrier *valued, uint32_t fill, uint32_t steps, uint32_t group) {
    float acc[kHalf / 8][4];
    clear(acc);
    for (uint32_t step = 0; step < steps; ++step, ++fill) {
        mbarrier_wait(full_of(shared, fill), parity_of(shared, fill));
        warp_sync();
        unsigned char *stage = stage_of(shared, fill);
        Descriptor rows = stage_descriptor(stage + group * kDepth * STAGE_BYTES), columns = stage_descriptor(stage + kOperandBytes);
        wgmma_fence();
        multiply_k_block<Numbers>(acc, rows, columns);
        wgmma_commit();
        wgmma_wait<0>();
        arrive_as_warp(empty_of(shared, fill));
    }
    settle(acc);
    publish_values<kHalf>(shared, acc, fill, valued);
}

// The product with one stage; `weights` are 64 rows of M's tile, or 64 columns.
template <class Numbers, bool transposed, int n>
DEVICE void multiply_half(float (&sums)[n][4], const unsigned char *weights, Descriptor rows) {
    Descriptor m = transposed ? panels_descriptor(weights, kPanelBytes<Numbers>) : stage_descriptor(weights);
    wgmma_fence();
#pragma unroll
    for (uint32_t k = 0; k < kDepth; k += 16) {
        wgmma<true, transposed>(Numbers{}, sums, advanced(m, k * (transposed ? STAGE_BYTES : 2)), advanced(rows, k * STAGE_BYTES));
    }
    wgmma_commit();
    wgmma_wait<1>();  // this product goes on, that before it is done
}

// The two warpgroups that multiply: 64 rows each and at most 8 n columns.
template <class Numbers, int n>
DEVICE void multiply_matrices(const GradientParams &p, GradientHopperShared &shared, Walk<false> walk, ColumnBlock columns) {
    uint32_t group = shuffle(warp_index(), 0) / 4;  // which the compiler then knows to be the warp's
    float sums[n][4];
    clear(sums);
    bool open = false;  // the last product is still under way: its stage is not given back yet
    while (walk.next()) {
        const Turn &turn = walk.turn;
        uint32_t fill = turn.fill + turn.before_rows(walk.steps);
        if (!turn.stored) {
            wgmma_wait<0>();
            if (open) {
                arrive_as_warp(empty_of(shared, turn.fill - 1));
                open = false;
            }
            for (uint32_t part = 0; part < 2; ++part) {
                recompute_values<Numbers>(shared, &shared.valued[part], turn.fill + part * (walk.steps + 1), walk.steps, group);
            }
        }
        mbarrier_wait(&shared.built[turn.matrix()], turn.matrix_parity());
        warp_sync();
        for (uint32_t half = 0; half < 2; ++half, ++fill) {
            mbarrier_wait(full_of(shared, fill), parity_of(shared, fill));
            warp_sync();
            unsigned char *matrix = shared.matrices[turn.matrix()];
            Descriptor rows = panels_descriptor(stage_of(shared, fill), kStagePanel);
            if (turn.transposed()) {
                multiply_half<Numbers, true>(sums, matrix + group * kPanelBytes<Numbers> + half * kDepth * STAGE_BYTES, rows);
            } else {
                multiply_half<Numbers, false>(sums, matrix + half * kPanelBytes<Numbers> + group * kDepth * STAGE_BYTES, rows);
            }
            if (open) arrive_as_warp(empty_of(shared, fill - 1));
            open = true;
        }
    }
    wgmma_wait<0>();
    settle(sums);

    float unscale = one_or_nan(p.pairs) / p.weight_scale;
    write_rows<2 * n>(p, walk.x, columns, [&](int r, int c) { return GroupPlace::value(sums, r, c) * unscale; });
}

template <class Of>
struct GradientHopper {
    using Numbers = Of;
    using Roles = NarrowRoles;
    using Shared = GradientHopperShared;
    static constexpr int producer_registers = 104, mma_registers = 200;
    static DEVICE uint32_t fills(uint32_t) { return TILE / kDepth; }
    static DEVICE void copy(const GradientParams &p, Shared &shared, Walk<false> walk, ColumnBlock columns) { copy_rows<Numbers>(p, shared, walk, columns); }
    static DEVICE void build(const GradientParams &p, Shared &shared, Walk<true> walk) { build_matrices<Numbers>(p, shared, walk); }
    static DEVICE void multiply(const GradientParams &p, Shared &shared, Walk<false> walk, ColumnBlock columns) {
        // The narrow product for what it holds: it takes half the time.
        if (columns.count <= GRADIENT_COLUMNS / 2) {
            multiply_matrices<Numbers, GRADIENT_COLUMNS / 16>(p, shared, walk, columns);
        } else {
            multiply_matrices<Numbers, GRADIENT_COLUMNS / 8>(p, shared, walk, columns);
        }
    }
};

#endif

ROLE_KERNEL(gradient_hopper_f16, GradientParams, GRADIENT_HOPPER_THREADS) { HOPPER_ONLY(run_roles<GradientHopper<HalfF16>>(p)); }
ROLE_KERNEL(gradient_hopper_bf16, GradientParams, GRADIENT_HOPPER_THREADS) { HOPPER_ONLY(run_roles<GradientHopper<HalfBf16>>(p)); }
