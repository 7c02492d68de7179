// prepare.cu: rows in class order, padded for the tiles, and what is known of each by itself (SPEC 1).
// Launcher: src/backend/device/order.rs.
//
// prepare: gathers the rows, brings them to unit length where that is wanted, zeros the padding, checks norms, sums columns,
//   and finds what a positive of a row must stay below, from the product of the tile with itself. On Hopper
//   16-bit rows are multiplied with wgmma there too, while they are gathered: a row must meet itself with the bits of its own
//   bound. One block a row tile; further blocks find the range of references that have an anchor's label.
// Numbers: norms by chains of f32; where that leaves a doubt, and for bad rows, in f64. Column sums in f32, 16 rows
//   of a warp, then the warps in order.

#include "hopper.cuh"
#include "unit.cuh"

// Keys below `key`, and up to it: both searches at once, since each step waits for memory.
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

// A thread has one granule of a stage's width in each of its rows, which stand kRowsApart apart: eight lanes share a row.
constexpr uint32_t kRowsApart = THREADS / kGranules;
constexpr uint32_t kOwnRows = TILE / kRowsApart;
constexpr uint32_t kWarpRows = 32 / kGranules * kOwnRows;
// The caller's rows come through a ring of stages of 128 bytes a row. One is filled when the product of that two before is done.
constexpr uint32_t kRing = 5, kAhead = kRing - 2;
constexpr uint32_t kRingStage = TILE * STAGE_BYTES;

// The elements of a granule as f32, and back.
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

// The original index of the row that stands at `place`.
DEVICE uint32_t index_at(const PrepareParams &p, uint32_t place) {
    return place >= p.count ? NO_ROW : p.order == nullptr ? place : p.order[place];
}

// Where rows are read: whole granules, or element by element where they are not aligned to these.
template <class Element>
struct Source {
    using Vector = Granule<Element>;
    const Element *rows;
    uint32_t dim;
    bool aligned;

    explicit DEVICE Source(const PrepareParams &p)
        : rows(static_cast<const Element *>(p.input)),
          dim(p.dim),
          aligned((reinterpret_cast<uintptr_t>(p.input) | static_cast<uint64_t>(p.dim) * sizeof(Element)) % 16 == 0) {}
    DEVICE bool has(uint32_t index, uint32_t granule) const { return index != NO_ROW && granule * Vector::count < dim; }
    DEVICE const Element *at(uint32_t index, uint32_t granule) const {
        return rows + static_cast<uint64_t>(index) * dim + granule * Vector::count;
    }
    // Zeros beyond the row's end.
    DEVICE Vector pieces(uint32_t index, uint32_t granule) const {
        Vector value{};
        const Element *from = at(index, granule);
#pragma unroll
        for (int i = 0; i < Vector::count; ++i) {
            if (has(index, granule) && granule * Vector::count + i < dim) value.values[i] = from[i];
        }
        return value;
    }
    // One granule of each of a thread's rows.
    DEVICE void load(Vector (&to)[kOwnRows], const uint32_t (&own)[kOwnRows], uint32_t granule) const {
        if (aligned) {
#pragma unroll
            for (uint32_t i = 0; i < kOwnRows; ++i) {
                to[i] = has(own[i], granule) ? *reinterpret_cast<const Vector *>(at(own[i], granule)) : Vector{};
            }
        } else {
#pragma unroll
            for (uint32_t i = 0; i < kOwnRows; ++i) to[i] = pieces(own[i], granule);
        }
    }
    // The same to shared memory, kRowsApart rows apart; done by the next wait for asynchronous copies that covers it.
    DEVICE void copy(unsigned char *to, const uint32_t (&own)[kOwnRows], uint32_t granule) const {
        auto place = [&](uint32_t i) { return to + i * kRowsApart * STAGE_BYTES; };
        if (aligned) {
#pragma unroll
            for (uint32_t i = 0; i < kOwnRows; ++i) {
                if (has(own[i], granule)) {
                    cp_async(place(i), at(own[i], granule));
                } else {
                    *reinterpret_cast<Vector *>(place(i)) = Vector{};
                }
            }
        } else {
#pragma unroll
            for (uint32_t i = 0; i < kOwnRows; ++i) *reinterpret_cast<Vector *>(place(i)) = pieces(own[i], granule);
        }
    }
};

// The row's square sum in f64, in one order, for messages and for what f32 cannot tell.
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

// The rows of a warp as its first kWarpRows lanes have them, one each.
DEVICE uint32_t lane_row() { return warp_index() * (32 / kGranules) + lane_index() % 4 + lane_index() / 4 * kRowsApart; }
// What the lane's row sums up to over the eight lanes that share it.
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

// Shows the lanes one after the other whose `doubtful` is set to the whole warp, with the exact square sum of their rows.
template <class Element, class Use>
DEVICE void each_exact(const PrepareParams &p, bool doubtful, uint32_t index, Use use) {
#pragma unroll 1
    for (uint32_t left = ballot_sync(doubtful); left != 0; left &= left - 1) {
        int lane = lowest_bit(left);
        use(static_cast<uint32_t>(lane), exact_square_sum<Element>(p, shuffle(index, lane)));
    }
}

// What brings a thread's rows to unit length: an inverse each, or a bit for those of unusual lengths, which the lengths say.
struct Inverses {
    float of_row[kOwnRows];
    uint32_t unusual;
};

// The lengths of a warp's rows.
template <class Element>
DEVICE Inverses find_lengths(const PrepareParams &p, const uint32_t (&own)[kOwnRows]) {
    using Vector = Granule<Element>;
    Source<Element> source(p);
    float squares[kOwnRows] = {};
#pragma unroll 2
    for (uint32_t granule = lane_index() % kGranules; granule < p.stride / Vector::count; granule += kGranules) {
        Vector values[kOwnRows];
        source.load(values, own, granule);
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
    bool unusual = !is_usual(length);
    if (index != NO_ROW) p.lengths[index] = length;
    auto inverse = static_cast<float>(unusual ? 1.0 : 1.0 / length);
    warp_sync();  // the lengths are there
    Inverses inverses{};
#pragma unroll
    for (uint32_t i = 0; i < kOwnRows; ++i) {
        int lane = static_cast<int>(i * 4 + lane_index() / kGranules);
        inverses.of_row[i] = shuffle(inverse, lane);
        inverses.unusual |= static_cast<uint32_t>(own[i] != NO_ROW && shuffle(static_cast<uint32_t>(unusual), lane) != 0) << i;
    }
    return inverses;
}

// Norms, or lengths, of the rows of a warp's lanes: what is no unit row is told.
template <class Element>
DEVICE void check_rows(const PrepareParams &p, const float (&squares)[kOwnRows]) {
    uint32_t index = lane_index() < kWarpRows ? index_at(p, block_x() * TILE + lane_row()) : NO_ROW;
    float square = lane_sum(squares);
    auto tell = [&](uint32_t bad, double exact) {
        p.square_sums[bad] = exact;
        // Written so that a NaN is bad too.
        bool unit = fabs(sqrt(exact) - 1.0) <= p.norm_tolerance;
        if (p.check && !unit) atomic_min(p.bad, bad);
    };
    if (p.lengths != nullptr) {
        // What was brought to unit length has it, if it had a direction.
        double length = index == NO_ROW ? 1.0 : p.lengths[index];
        if (has_direction(length)) return;
        p.square_sums[index] = length * length;
        if (p.check) atomic_min(p.bad, index);
        return;
    }
    // Half the tolerance is more than chains of f32 err by, up to 2^19 dimensions. A NaN is not near.
    bool near = static_cast<double>(fabsf(sqrtf(square) - 1.0f)) <= p.norm_tolerance / 2.0 && p.stride <= 1u << 19;
    each_exact<Element>(p, index != NO_ROW && !near, index, [&](uint32_t lane, double exact) {
        if (lane == lane_index()) tell(index, exact);
    });
}

// A tile's rows, prepared. `products.add(stage)` sees each stage of them as it lies in shared memory, if it asks for them;
// `shared` has room for the ring, and for a float for each warp, lane and element of a granule.
template <class Numbers, class Products>
DEVICE void prepare_rows(const PrepareParams &p, unsigned char *shared, Products products) {
    using Element = typename Numbers::Element;
    using Vector = Granule<Element>;
    constexpr uint32_t kColumns = kGranules * Vector::count;  // of a stage
    static_assert(kRing * kRingStage + 2 * THREADS / 32 * kColumns * sizeof(float) <= SIMILARITY_STAGES_BYTES);
    uint64_t stride_bytes = static_cast<uint64_t>(p.stride) * Numbers::stored_bytes;
    auto rows = static_cast<unsigned char *>(p.rows) + static_cast<uint64_t>(block_x()) * TILE * stride_bytes;
    auto *parts = reinterpret_cast<float *>(shared + kRing * kRingStage);  // [2, warps, kColumns]
    uint32_t first = block_x() * TILE, row = thread_index() / kGranules, own_granule = thread_index() % kGranules;
    uint32_t own[kOwnRows];
#pragma unroll
    for (uint32_t i = 0; i < kOwnRows; ++i) own[i] = index_at(p, first + row + i * kRowsApart);
    uint32_t valid = p.column_sums == nullptr ? 0 : *p.valid, granules = p.stride / Vector::count;
    Inverses inverses{};
    if (p.lengths != nullptr) inverses = find_lengths<Element>(p, own);
    Source<Element> source(p);
    uint32_t own_place = swizzled(row, own_granule);
    auto copy = [&](uint32_t stage) {
        uint32_t granule = stage * kGranules + own_granule;
        if (granule < granules) source.copy(shared + stage % kRing * kRingStage + own_place, own, granule);
        cp_async_commit();  // a group a stage, empty or not: the waits below count them
    };
    for (uint32_t stage = 0; stage < kAhead; ++stage) copy(stage);
    float squares[kOwnRows] = {};
#pragma unroll 1
    for (uint32_t stage = 0; stage * kGranules < granules; ++stage) {
        cp_async_wait<kAhead - 1>();  // each reads what it has copied itself
        unsigned char *at = shared + stage % kRing * kRingStage;
        auto place = [&](uint32_t i) { return reinterpret_cast<Vector *>(at + own_place + i * kRowsApart * STAGE_BYTES); };
        uint32_t granule = stage * kGranules + own_granule;
        bool there = granule < granules;
#pragma unroll 1
        for (uint32_t left = there ? inverses.unusual : 0; left != 0; left &= left - 1) {
            auto i = static_cast<uint32_t>(lowest_bit(left));
            double length = p.lengths[index_at(p, first + row + i * kRowsApart)];
#pragma unroll 1
            for (Element &value : place(i)->values) value = from_float<Element>(unit_entry(to_float(value), length));
        }
        float sums[Vector::count] = {};
#pragma unroll
        for (uint32_t i = 0; i < kOwnRows; ++i) {
            Vector values = there ? *place(i) : Vector{};
            float numbers[Vector::count];
            unpack(numbers, values);
            if (p.lengths != nullptr) {
#pragma unroll
                for (float &number : numbers) number *= inverses.of_row[i];
                values = packed<Element>(numbers);
                unpack(numbers, values);
            }
            bool counts = first + row + i * kRowsApart < valid;
#pragma unroll
            for (int k = 0; k < Vector::count; ++k) {
                squares[i] += numbers[k] * numbers[k];
                if (counts) sums[k] += numbers[k];
            }
            if (there) store_prepared<Numbers>(rows, row + i * kRowsApart, granule * Vector::count, values, stride_bytes);
            products.put(place(i), values, p.lengths != nullptr);
        }
        if (p.column_sums == nullptr && !Products::any) {
            copy(stage + kAhead);
            continue;
        }
        float *part = parts + (stage % 2 * (THREADS / 32) + warp_index()) * kColumns;
#pragma unroll
        for (int k = 0; k < Vector::count; ++k) {
            for (int mask = kGranules; mask < 32; mask *= 2) sums[k] += shuffle_xor(sums[k], mask);
            if (lane_index() < kGranules) part[own_granule * Vector::count + k] = sums[k];
        }
        if constexpr (Products::any) fence_proxy_async();
        block_sync();  // the stage and the parts are there, and what read those two before is through
        copy(stage + kAhead);
        products.add(at);
        uint32_t column = stage * kColumns + thread_index();
        if (p.column_sums != nullptr && thread_index() < kColumns && column < p.stride) {
            const float *of_stage = parts + stage % 2 * (THREADS / 32) * kColumns + thread_index();
            float sum = of_stage[0];
#pragma unroll
            for (uint32_t warp = 1; warp < THREADS / 32; ++warp) sum += of_stage[warp * kColumns];
            p.column_sums[static_cast<uint64_t>(block_x()) * p.stride + column] = sum;
        }
        warp_sync();
    }
    check_rows<Element>(p, squares);
}

// The blocks behind those of the row tiles find classes: searches wait for memory, and would wait alone in each of those.
DEVICE bool prepare_classes(const PrepareParams &p) {
    uint32_t tiles = (p.count + TILE - 1) / TILE;
    if (block_x() < tiles) return false;
    uint32_t i = (block_x() - tiles) * THREADS + thread_index();
    if (p.keys != nullptr && i < p.count) p.classes[i] = range_of(p.reference_keys, p.references, p.keys[i]);
    return true;
}

// From the products of the tile with itself, those on its diagonal.
template <class Where, class Sums>
DEVICE void write_duplicate_bounds(const PrepareParams &p, const Sums &acc) {
    Where place;
#pragma unroll
    for (int row = 0; row < Where::rows; ++row) {
        float square = 0.0f;
        bool found = false;
#pragma unroll
        for (int column = 0; column < Where::columns; ++column) {
            if (place.row_of(row) != place.column_of(column)) continue;
            square = Where::value(acc, row, column);
            found = true;
        }
        if (!found) continue;
        p.duplicate[block_x() * TILE + place.row_of(row)] = static_cast<float>(kDuplicate * static_cast<double>(square));
    }
}

struct NoProducts {
    static constexpr bool any = false;
    template <class Vector>
    DEVICE void put(Vector *, const Vector &, bool) const {}
    DEVICE void add(const unsigned char *) const {}
};

template <class Numbers>
DEVICE void prepare_body(const PrepareParams &p) {
    SHARED_MEMORY(stages);
    if (prepare_classes(p)) return;
    prepare_rows<Numbers>(p, stages, NoProducts{});
    if (p.duplicate == nullptr) return;
    block_sync();  // the rows are there
    uint64_t stride_bytes = static_cast<uint64_t>(p.stride) * Numbers::stored_bytes;
    auto rows = static_cast<const unsigned char *>(p.rows) + block_x() * TILE * stride_bytes;
    Accumulators<4> acc;
    multiply_tile<Numbers, 4>(acc, rows, rows, stride_bytes, stages);
    write_duplicate_bounds<Place<4>>(p, acc);
}

#ifdef HAS_WARPGROUP_PRODUCTS
// Each warpgroup's 64 rows with themselves, straight from the ring: the diagonal has the bits of wider products.
using DiagonalSums = float[8][4];
struct DiagonalPlace : GroupPlace {
    static constexpr int columns = 16;
    DEVICE uint32_t column_of(int c) const { return warp_index() / 4 * (TILE / 2) + GroupPlace::column_of(c); }
    static DEVICE float value(const DiagonalSums &acc, int r, int c) { return acc[c / 2][r * 2 + c % 2]; }
};

template <class Numbers>
struct DiagonalProducts {
    static constexpr bool any = true;
    DiagonalSums &acc;

    // What stands in the ring as products want it, if that is not how it was copied.
    template <class Vector>
    DEVICE void put(Vector *to, const Vector &values, bool changed) const {
        if constexpr (sizeof(typename Numbers::Element) == 2) {
            if (changed) *to = values;
        } else {
            *to = rounded_to_tf32(values);
        }
    }
    DEVICE void add(const unsigned char *stage) const {
        Descriptor rows = stage_descriptor(stage + warp_index() / 4 * (TILE / 2) * STAGE_BYTES);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kGranules / 2; ++step) {
            wgmma<false>(Numbers{}, acc, advanced(rows, step * 32), advanced(rows, step * 32));
        }
        wgmma_commit();
        wgmma_wait<1>();  // this product goes on, that before it is done
    }
};
#endif

template <class Numbers>
DEVICE void prepare_hopper_body([[maybe_unused]] const PrepareParams &p) {
#ifdef HAS_WARPGROUP_PRODUCTS
    SHARED_MEMORY(ring);
    if (prepare_classes(p)) return;
    DiagonalSums acc;
#pragma unroll
    for (auto &four : acc) {
#pragma unroll
        for (float &sum : four) sum = 0.0f;
    }
    settle(acc);
    prepare_rows<Numbers>(p, ring, DiagonalProducts<Numbers>{acc});
    wgmma_wait<0>();
    if (p.duplicate != nullptr) write_duplicate_bounds<DiagonalPlace>(p, acc);
#else
    trap();
#endif
}

KERNEL_IN_EVERY_PRECISION(prepare, PrepareParams, 1)
KERNEL(prepare_hopper_tf32, PrepareParams, 1) { prepare_hopper_body<FastF32>(p); }
KERNEL(prepare_hopper_f16, PrepareParams, 1) { prepare_hopper_body<HalfF16>(p); }
KERNEL(prepare_hopper_bf16, PrepareParams, 1) { prepare_hopper_body<HalfBf16>(p); }
