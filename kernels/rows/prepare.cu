// prepare.cu: rows in class order, padded to whole tiles, and checked (SPEC 1).
// Launcher: src/backend/device/order.rs.
//
// prepare: gathers the rows, normalises them if asked, zeros the padding, checks norms, sums columns, and computes each row's
//   duplicate bound, from the product of the tile with itself: by the same instructions as S, so that a row's similarity with
//   itself has the bits of its bound. On Hopper 16-bit rows are multiplied while they are gathered. Fast f32 is rounded to f16,
//   and all later passes are those of f16. One block a row tile; further blocks find the class ranges of the anchors.
// Precision: norms in f32, and again in f64 where f32 cannot decide, and for bad rows. Column sums in f32, of 16
//   rows by a warp, then of the warps in order.

#include "tile/wgmma_tile.cuh"
#include "pairs/pairs.cuh"
#include "rows/unit_length.cuh"

// The range of keys equal to `key`. Both binary searches go together, since each step waits for memory.
DEVICE ClassRange range_of(const uint64_t *keys, uint32_t count, uint64_t key) {
    if (key == ~static_cast<uint64_t>(0)) return ClassRange{1, 0};  // ignored
    uint32_t step = 1;
    while (step <= count / 2) step *= 2;
    ClassRange range{0, 0};
    for (; step > 0; step /= 2) {
        uint32_t begin = range.begin + step, end = range.end + step;
        if (begin <= count && keys[begin - 1] < key) range.begin = begin;
        if (end <= count && keys[end - 1] <= key) range.end = end;
    }
    return range;
}

// Eight lanes share a row: a thread has one granule of a stage in each of its rows, which are kRowsApart apart.
constexpr uint32_t kRowsApart = THREADS / kGranules;
constexpr uint32_t kOwnRows = TILE / kRowsApart;
constexpr uint32_t kWarpRows = 32 / kGranules * kOwnRows;
// The caller's rows go through a ring of stages of 128 bytes a row. A stage is filled again two products after its own.
constexpr uint32_t kStageCount = 5, kAhead = kStageCount - 2;
constexpr uint32_t kRingStage = TILE * STAGE_BYTES;

// A granule's elements as f32, and the reverse.
template <class Element>
DEVICE void unpack(float (&to)[Granule<Element>::count], const Granule<Element> &from) {
#pragma unroll
    for (int i = 0; i < Granule<Element>::count; ++i) to[i] = to_float(from.values[i]);
}
template <>
DEVICE void unpack(float (&to)[8], const Granule<Bf16> &from) {
    uint32_t words[4];
    memcpy(words, &from, sizeof(words));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to[2 * i] = float_of(words[i] << 16);
        to[2 * i + 1] = float_of(words[i] & 0xffff0000u);
    }
}
template <class Element>
DEVICE Granule<Element> packed(const float (&from)[Granule<Element>::count]) {
    Granule<Element> to;
#pragma unroll
    for (int i = 0; i < Granule<Element>::count; ++i) to.values[i] = from_float<Element>(from[i]);
    return to;
}

// The original index of the row at `place` in class order; NO_ROW for padding.
DEVICE uint32_t index_at(const PrepareParams &p, uint32_t place) {
    return place >= p.count ? NO_ROW : p.order == nullptr ? place : p.order[place];
}

// The caller's rows of this thread, read a granule of each at a time; step() advances by a stage.
template <class Element>
struct Source {
    using Vector = Granule<Element>;
    const Element *rows[kOwnRows];
    bool there[kOwnRows];
    uint32_t element = thread_index() % kGranules * Vector::count, dim;
    bool aligned;                   // granules can be read by one load

    explicit DEVICE Source(const PrepareParams &p)
        : dim(p.dim),
          aligned((reinterpret_cast<uintptr_t>(p.input) | static_cast<uint64_t>(p.dim) * sizeof(Element)) % 16 == 0) {
#pragma unroll
        for (uint32_t i = 0; i < kOwnRows; ++i) {
            uint32_t index = index_at(p, block_x() * TILE + thread_index() / kGranules + i * kRowsApart);
            there[i] = index != NO_ROW;
            rows[i] = static_cast<const Element *>(p.input) + static_cast<uint64_t>(there[i] ? index : 0) * dim + element;
        }
    }
    DEVICE void step() {
        element += kGranules * Vector::count;
#pragma unroll
        for (const Element *&row : rows) row += kGranules * Vector::count;
    }
    // A granule of row i, element by element; zeros beyond the row's end.
    DEVICE Vector pieces(uint32_t i) const {
        Vector value{};
#pragma unroll
        for (uint32_t k = 0; k < Vector::count; ++k) {
            if (there[i] && element + k < dim) value.values[k] = rows[i][k];
        }
        return value;
    }
    // Loads a granule of each row.
    DEVICE void load(Vector (&to)[kOwnRows]) const {
        if (aligned) {
#pragma unroll
            for (uint32_t i = 0; i < kOwnRows; ++i) {
                to[i] = there[i] && element < dim ? *reinterpret_cast<const Vector *>(rows[i]) : Vector{};
            }
        } else {
#pragma unroll
            for (uint32_t i = 0; i < kOwnRows; ++i) to[i] = pieces(i);
        }
    }
    // Copies a granule of each row to shared memory, kRowsApart rows apart; complete after the cp_async_wait() that covers it.
    DEVICE void copy(unsigned char *to) const {
        if (aligned) {
#pragma unroll
            for (uint32_t i = 0; i < kOwnRows; ++i) {
                cp_async_if(there[i] && element < dim, to + i * kRowsApart * STAGE_BYTES, rows[i]);
            }
        } else {
#pragma unroll
            for (uint32_t i = 0; i < kOwnRows; ++i) {
                *reinterpret_cast<Vector *>(to + i * kRowsApart * STAGE_BYTES) = pieces(i);
            }
        }
    }
};

// The row's square sum in f64, in a fixed order, for messages and where f32 cannot decide.
template <class Element>
DEVICE double exact_square_sum(const PrepareParams &p, uint32_t index) {
    auto from = static_cast<const Element *>(p.input) + static_cast<uint64_t>(index) * p.dim;
    double sum = 0.0;
#pragma unroll 1
    for (uint32_t d = lane_index(); d < p.dim; d += 32) {
        auto value = static_cast<double>(to_float(from[d]));
        sum += value * value;
    }
    return warp_sum(sum);
}

// The row of a lane, if each of a warp's first kWarpRows lanes has one of the warp's rows.
DEVICE uint32_t lane_row() { return warp_index() * (32 / kGranules) + lane_index() % 4 + lane_index() / 4 * kRowsApart; }
// The sum of lane_row()'s row over the eight lanes that share it.
DEVICE float lane_sum(const float (&own)[kOwnRows]) {
    float of_lane = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < kOwnRows; ++i) {
        float sum = own[i];
        for (int mask = 1; mask < kGranules; mask *= 2) sum += shuffle_xor(sum, mask);
        sum = shuffle(sum, static_cast<int>(lane_index() % 4 * kGranules));
        if (lane_index() / 4 == i) of_lane = sum;
    }
    return of_lane;
}
static_assert(kGranules == 8 && kOwnRows == 4, "the lanes of lane_row()");

// Calls `use(lane, square sum in f64)`, by the whole warp, for each lane whose `doubtful` is set.
template <class Element, class Use>
DEVICE void each_exact(const PrepareParams &p, bool doubtful, uint32_t index, Use use) {
#pragma unroll 1
    for (uint32_t left = ballot_sync(doubtful); left != 0; left &= left - 1) {
        int lane = lowest_bit(left);
        use(static_cast<uint32_t>(lane), exact_square_sum<Element>(p, shuffle(index, lane)));
    }
}

// The inverse length of each of a thread's rows, and a bit for rows of unusual length, which are divided by p.lengths in f64.
struct Inverses {
    float of_row[kOwnRows];
    uint32_t unusual;
};

// Computes the lengths of a warp's rows.
template <class Element>
DEVICE Inverses find_lengths(const PrepareParams &p, Source<Element> source) {
    using Vector = Granule<Element>;
    float squares[kOwnRows] = {};
#pragma unroll 2
    for (uint32_t begin = 0; begin < p.dim; begin += kGranules * Vector::count, source.step()) {
        Vector values[kOwnRows];
        source.load(values);
#pragma unroll
        for (uint32_t i = 0; i < kOwnRows; ++i) {
            float numbers[Vector::count];
            unpack(numbers, values[i]);
#pragma unroll
            for (float number : numbers) squares[i] += number * number;
        }
    }
    uint32_t index = lane_index() < kWarpRows ? index_at(p, block_x() * TILE + lane_row()) : NO_ROW;
    double length = sqrt(static_cast<double>(lane_sum(squares)));
    each_exact<Element>(p, index != NO_ROW && !is_usual(length), index, [&](uint32_t lane, double exact) {
        if (lane == lane_index()) length = sqrt(exact);
    });
    bool unusual = index != NO_ROW && !is_usual(length);
    if (index != NO_ROW) p.lengths[index] = length;
    // Padding has no length and remains zero.
    auto inverse = static_cast<float>(index == NO_ROW || unusual ? 1.0 : 1.0 / length);
    uint32_t all_unusual = ballot_sync(unusual);
    warp_sync();  // the lengths are written
    Inverses inverses{};
#pragma unroll
    for (uint32_t i = 0; i < kOwnRows; ++i) {
        uint32_t lane = i * 4 + lane_index() / kGranules;
        inverses.of_row[i] = shuffle(inverse, static_cast<int>(lane));
        inverses.unusual |= (all_unusual >> lane & 1) << i;
    }
    return inverses;
}

// Normalises this thread's granules of a stage in place.
template <class Element>
DEVICE void bring_to_unit_length(const PrepareParams &p, const Inverses &inverses, unsigned char *to) {
    using Vector = Granule<Element>;
    auto place = [&](uint32_t i) { return reinterpret_cast<Vector *>(to + i * kRowsApart * STAGE_BYTES); };
#pragma unroll
    for (uint32_t i = 0; i < kOwnRows; ++i) {
        if (inverses.unusual >> i & 1) continue;
        float numbers[Vector::count];
        unpack(numbers, *place(i));
#pragma unroll
        for (float &number : numbers) number *= inverses.of_row[i];
        *place(i) = packed<Element>(numbers);
    }
#pragma unroll 1
    for (uint32_t left = inverses.unusual; left != 0; left &= left - 1) {
        auto i = static_cast<uint32_t>(lowest_bit(left));
        double length = p.lengths[index_at(p, block_x() * TILE + thread_index() / kGranules + i * kRowsApart)];
#pragma unroll 1
        for (Element &value : place(i)->values) value = from_float<Element>(unit_entry(to_float(value), length));
    }
}

// Adds the sums of the four lanes that have the same granule: each lane gets a quarter of the elements, from first_of_quarter()
// on.
template <int count>
DEVICE void add_lanes(float (&quarter)[count / 4], const float (&sums)[count]) {
    constexpr int half = count / 2;
    bool upper = lane_index() & kGranules, odd = lane_index() & 2 * kGranules;
    float halves[half];
#pragma unroll
    for (int k = 0; k < half; ++k) {
        float given = upper ? sums[k] : sums[half + k];
        halves[k] = (upper ? sums[half + k] : sums[k]) + shuffle_xor(given, kGranules);
    }
#pragma unroll
    for (int k = 0; k < half / 2; ++k) {
        float given = odd ? halves[k] : halves[half / 2 + k];
        quarter[k] = (odd ? halves[half / 2 + k] : halves[k]) + shuffle_xor(given, 2 * kGranules);
    }
}
template <int count>
DEVICE uint32_t first_of_quarter() {
    return (lane_index() / kGranules % 2 * 2 + lane_index() / kGranules / 2) * (count / 4);
}

// Checks the norms (or the lengths) of a warp's rows, and reports bad rows.
template <class Element>
DEVICE void check_rows(const PrepareParams &p, const float (&squares)[kOwnRows]) {
    uint32_t index = lane_index() < kWarpRows ? index_at(p, block_x() * TILE + lane_row()) : NO_ROW;
    float square = lane_sum(squares);
    auto tell = [&](uint32_t bad, double exact) {
        p.square_sums[bad] = exact;
        // Written so that a NaN is bad, too.
        bool unit = fabs(sqrt(exact) - 1.0) <= p.norm_tolerance;
        if (p.check && !unit) atomic_min(p.bad, bad);
    };
    if (p.lengths != nullptr) {
        // A normalised row is good if it had a direction.
        double length = index == NO_ROW ? 1.0 : p.lengths[index];
        if (has_direction(length)) return;
        p.square_sums[index] = length * length;
        if (p.check) atomic_min(p.bad, index);
        return;
    }
    // The error of f32 sums is below half the tolerance, up to 2^19 dimensions. A NaN is not near.
    bool near = static_cast<double>(fabsf(sqrtf(square) - 1.0f)) <= p.norm_tolerance / 2.0 && p.stride <= 1u << 19;
    each_exact<Element>(p, index != NO_ROW && !near, index, [&](uint32_t lane, double exact) {
        if (lane == lane_index()) tell(index, exact);
    });
}

// f32 rows that are rounded to f16: norms and lengths are those of the caller's rows, column sums those of the rounded rows.
template <class Precision, class Given>
constexpr bool kRounded = !Precision::exact && sizeof(Given) != sizeof(typename Precision::Element);
// Half a granule of rounded elements, from a granule of the caller's.
struct alignas(8) RoundedGranule {
    F16 values[4];
};

// Prepares the rows of a tile. `products.add(stage)` is called with each prepared stage in shared memory. `shared` has room for
// the ring, and for two floats for each warp and element of a stage.
template <class Precision, class Given, class Products>
DEVICE void prepare_rows(const PrepareParams &p, unsigned char *shared, Products products) {
    using Vector = Granule<Given>;
    constexpr bool rounded = kRounded<Precision, Given>;
    constexpr uint32_t kColumns = kGranules * Vector::count;  // elements of a row in a stage of the ring
    constexpr uint32_t kParts = THREADS / 32 * kColumns;
    static_assert(kStageCount * kRingStage + 2 * kParts * sizeof(float) <= SIMILARITY_STAGES_BYTES);
    uint64_t stride_bytes = static_cast<uint64_t>(p.stride) * Precision::stored_bytes;
    auto rows = static_cast<unsigned char *>(p.rows) + static_cast<uint64_t>(block_x()) * TILE * stride_bytes;
    auto *parts = reinterpret_cast<float *>(shared + kStageCount * kRingStage);  // [2, warps, kColumns]
    uint32_t row = thread_index() / kGranules, element = thread_index() % kGranules * Vector::count;
    uint32_t own_place = swizzled(row, thread_index() % kGranules);
    uint32_t rounded_place = swizzled(row, thread_index() % kGranules / 2) + thread_index() % 2 * sizeof(RoundedGranule);
    uint32_t valid = p.column_sums == nullptr ? 0 : *p.valid, before = block_x() * TILE + row;
    bool counts[kOwnRows];
#pragma unroll
    for (uint32_t i = 0; i < kOwnRows; ++i) counts[i] = before + i * kRowsApart < valid;
    Source<Given> source(p);
    Inverses inverses{};
    if (p.lengths != nullptr) inverses = find_lengths(p, source);
    uint32_t stages = (p.stride + kColumns - 1) / kColumns;
    auto copy = [&](uint32_t stage) {
        if (stage < stages) source.copy(shared + stage % kStageCount * kRingStage + own_place);
        source.step();
        cp_async_commit();  // a group for each stage, even an empty one: the waits below count groups
    };
#pragma unroll 1
    for (uint32_t stage = 0; stage < kAhead; ++stage) copy(stage);
    float squares[kOwnRows] = {};
#pragma unroll 1
    for (uint32_t stage = 0; stage < stages; ++stage) {
        unsigned char *ring = shared + stage % kStageCount * kRingStage;
        auto place = [&](uint32_t i) { return reinterpret_cast<Vector *>(ring + own_place + i * kRowsApart * STAGE_BYTES); };
        cp_async_wait<kAhead - 1>();  // no barrier: each thread reads what it copied itself
        if (p.lengths != nullptr) bring_to_unit_length<Given>(p, inverses, ring + own_place);
        float sums[Vector::count] = {};
        [[maybe_unused]] RoundedGranule halves[kOwnRows];
#pragma unroll
        for (uint32_t i = 0; i < kOwnRows; ++i) {
            Vector values = *place(i);
            float numbers[Vector::count];
            unpack(numbers, values);
#pragma unroll
            for (int k = 0; k < Vector::count; ++k) {
                squares[i] += numbers[k] * numbers[k];
                if constexpr (rounded) {
                    halves[i].values[k] = from_float<F16>(numbers[k]);
                    numbers[k] = to_float(halves[i].values[k]);
                }
                if (counts[i]) sums[k] += numbers[k];
            }
            if constexpr (Precision::exact) {
                // Two stages of the ring become two of prepared rows, the high parts and the low parts.
                SplitGranule split(values);
                unsigned char *to =
                    rows + prepared_offset(row + i * kRowsApart, stored_byte<Precision>(stage * kColumns + element), stride_bytes);
                *reinterpret_cast<SplitGranule::Part *>(to) = split.high;
                *reinterpret_cast<SplitGranule::Part *>(to + TILE * STAGE_BYTES) = split.low;
            } else if constexpr (!rounded) {
                *reinterpret_cast<Vector *>(rows + own_place + i * kRowsApart * STAGE_BYTES) = values;
            }
        }
        // Two stages of the ring become one of rounded rows, for products in the place of the first.
        bool complete = !rounded || stage % 2 == 1;
        unsigned char *prepared = rounded && complete ? shared + (stage - 1) % kStageCount * kRingStage : ring;
        if constexpr (rounded) {
            if constexpr (Products::any) warp_sync();  // the eight lanes that read a row overwrite it
#pragma unroll
            for (uint32_t i = 0; i < kOwnRows; ++i) {
                uint32_t at = (rounded_place ^ stage % 2 * (STAGE_BYTES / 2)) + i * kRowsApart * STAGE_BYTES;
                if constexpr (Products::any) *reinterpret_cast<RoundedGranule *>(prepared + at) = halves[i];
                *reinterpret_cast<RoundedGranule *>(rows + at) = halves[i];
            }
        }
        if (p.column_sums != nullptr) {
            float quarter[Vector::count / 4];
            add_lanes(quarter, sums);
            float *part = parts + stage % 2 * kParts + warp_index() * kColumns + element + first_of_quarter<Vector::count>();
#pragma unroll
            for (int k = 0; k < Vector::count / 4; ++k) part[k] = quarter[k];
        }
        if (!Precision::exact && complete) rows += kRingStage;
        products.publish();
        block_sync();  // the stage and the parts are complete, and the products of two stages before are done
        copy(stage + kAhead);
        if (complete) products.add(prepared);
        uint32_t column = stage * kColumns + thread_index();
        if (p.column_sums != nullptr && thread_index() < kColumns && column < p.stride) {
            const float *of_stage = parts + stage % 2 * kParts + thread_index();
            float sum = of_stage[0];
#pragma unroll
            for (uint32_t warp = 1; warp < THREADS / 32; ++warp) sum += of_stage[warp * kColumns];
            p.column_sums[static_cast<uint64_t>(block_x()) * p.stride + column] = sum;
        }
    }
    check_rows<Given>(p, squares);
}

// Blocks after those of the row tiles find class ranges: the searches mostly wait for memory, here many at once.
DEVICE bool prepare_classes(const PrepareParams &p) {
    uint32_t tiles = (p.count + TILE - 1) / TILE;
    if (block_x() < tiles) return false;
    uint32_t i = (block_x() - tiles) * THREADS + thread_index();
    if (p.keys != nullptr && i < p.count) p.classes[i] = range_of(p.reference_keys, p.references, p.keys[i]);
    return true;
}

// Writes the duplicate bounds, from the diagonal of the tile's product with itself.
template <class Layout, class Sums>
DEVICE void write_duplicate_bounds(const PrepareParams &p, const Sums &acc) {
    Layout layout;
#pragma unroll
    for (int row = 0; row < Layout::rows; ++row) {
        float square = 0.0f;
        bool found = false;
#pragma unroll
        for (int column = 0; column < Layout::columns; ++column) {
            if (layout.row_of(row) != layout.column_of(column)) continue;
            square = Layout::value(acc, row, column);
            found = true;
        }
        if (!found) continue;
        p.duplicate[block_x() * TILE + layout.row_of(row)] = static_cast<float>(kDuplicate * static_cast<double>(square));
    }
}

struct NoProducts {
    static constexpr bool any = false;
    DEVICE void publish() const {}
    DEVICE void add(const unsigned char *) const {}
};

template <class Precision, class Given = typename Precision::Element>
DEVICE void prepare_body(const PrepareParams &p) {
    SHARED_MEMORY(stages);
    if (prepare_classes(p)) return;
    prepare_rows<Precision, Given>(p, stages, NoProducts{});
    if (p.duplicate == nullptr) return;
    block_sync();  // the rows are written
    uint64_t stride_bytes = static_cast<uint64_t>(p.stride) * Precision::stored_bytes;
    auto rows = static_cast<const unsigned char *>(p.rows) + block_x() * TILE * stride_bytes;
    Accumulators<4> acc;
    multiply_tile<Precision, 4>(acc, rows, rows, stride_bytes, stages);
    write_duplicate_bounds<MmaLayout<4>>(p, acc);
}

#ifdef HAS_WGMMA
// Products of each warpgroup's 64 rows with themselves, from the ring. The diagonal has the bits of wider products.
using DiagonalSums = float[8][4];
struct DiagonalLayout : WgmmaLayout {
    static constexpr int columns = 16;
    DEVICE uint32_t column_of(int c) const { return warp_index() / 4 * (TILE / 2) + WgmmaLayout::column_of(c); }
    static DEVICE float value(const DiagonalSums &acc, int r, int c) { return acc[c / 2][r * 2 + c % 2]; }
};

template <class Precision, bool rounded>
struct DiagonalProducts {
    static constexpr bool any = true;
    DiagonalSums &acc;

    DEVICE void publish() const {
        if constexpr (rounded) wgmma_wait<0>();  // the ring's stage that holds the product's operand is filled again at once
        fence_proxy_async();
    }
    DEVICE void add(const unsigned char *stage) const {
        Descriptor rows = k_major_descriptor(stage + warp_index() / 4 * (TILE / 2) * STAGE_BYTES);
        warp_sync();  // the lanes' branches in copies end here
        wgmma_fence();
        multiply_k_block<Precision>(acc, rows, rows);
        wgmma_commit();
        wgmma_wait<1>();  // the previous product is done, this one is running
    }
};

template <class Precision, class Given = typename Precision::Element>
DEVICE void prepare_hopper_body(const PrepareParams &p) {
    SHARED_MEMORY(ring);
    if (prepare_classes(p)) return;
    DiagonalSums acc;
    clear(acc);
    prepare_rows<Precision, Given>(p, ring, DiagonalProducts<Precision, kRounded<Precision, Given>>{acc});
    warp_sync();  // the lanes' branches in `check_rows` end here
    wgmma_wait<0>();
    fence_accumulators(acc);
    if (p.duplicate != nullptr) write_duplicate_bounds<DiagonalLayout>(p, acc);
}

// The same for split rows: the ring has them as f32, so the prepared rows are read back for the product.
DEVICE void prepare_split_hopper_body(const PrepareParams &p) {
    using Precision = ExactF32;
    SHARED_MEMORY(bytes);
    if (prepare_classes(p)) return;
    prepare_rows<Precision, float>(p, bytes, NoProducts{});
    if (p.duplicate == nullptr) return;
    constexpr uint32_t stage_bytes = 2 * kLines<Precision> * TILE * STAGE_BYTES;
    static_assert(stage_bytes + sizeof(Barrier) <= SIMILARITY_STAGES_BYTES);
    WgmmaStages<1, kLines<Precision>> stages{bytes, reinterpret_cast<Barrier *>(bytes + stage_bytes)};
    fence_proxy_async_all();
    block_sync();  // the rows are written, and the ring has been read
    stages.begin();
    uint64_t stride_bytes = static_cast<uint64_t>(p.stride) * Precision::stored_bytes;
    auto rows = static_cast<const unsigned char *>(p.rows) + block_x() * TILE * stride_bytes;
    WgmmaAccumulators acc;
    wgmma_multiply_tile<Precision>(acc, rows, rows, stride_bytes, stages);
    write_duplicate_bounds<WgmmaLayout>(p, acc);
}
#endif

KERNEL_IN_EVERY_PRECISION(prepare, PrepareParams)
KERNEL(prepare_hopper_f32, PrepareParams, 1) { HOPPER_ONLY(prepare_split_hopper_body(p)); }
KERNEL(prepare_rounded_f32, PrepareParams, 1) { prepare_body<F16Rows, float>(p); }
KERNEL(prepare_hopper_rounded_f32, PrepareParams, 1) { HOPPER_ONLY(prepare_hopper_body<F16Rows, float>(p)); }
KERNEL(prepare_hopper_f16, PrepareParams, 1) { HOPPER_ONLY(prepare_hopper_body<F16Rows>(p)); }
KERNEL(prepare_hopper_bf16, PrepareParams, 1) { HOPPER_ONLY(prepare_hopper_body<Bf16Rows>(p)); }
