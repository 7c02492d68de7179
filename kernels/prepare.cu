// prepare.cu: rows in class order, padded for the tiles, and what is known of each by itself (SPEC 1).
// Launcher: src/backend/device/order.rs.
//
// prepare: gathers the rows, brings them to unit length where that is wanted, zeros the padding, checks norms, sums columns; then the range of references that have an
//   anchor's label, and what a positive of a row must stay below, from the product of the tile with itself. On Hopper
//   16-bit rows are multiplied with wgmma there too: a row must meet itself with the bits of its own bound.
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

constexpr uint32_t kWarpRows = TILE / (THREADS / 32);
constexpr uint32_t kRowsAtOnce = 8;  // of a warp, whose loads are under way together


// A granule of a row of the caller's, zeros beyond its end.
template <class Element>
DEVICE Granule<Element> input_granule(const PrepareParams &p, uint32_t index, uint32_t granule, bool aligned) {
    using Vector = Granule<Element>;
    Vector value{};
    uint32_t first = granule * Vector::count;
    if (index == NO_ROW || first >= p.dim) return value;
    auto from = static_cast<const Element *>(p.input) + static_cast<uint64_t>(index) * p.dim + first;
    if (aligned) return *reinterpret_cast<const Vector *>(from);
#pragma unroll
    for (int i = 0; i < Vector::count; ++i) {
        if (first + i < p.dim) value.values[i] = from[i];
    }
    return value;
}

// The row's square sum in f64, in one order, for messages and for what f32 cannot tell.
template <class Element>
DEVICE double exact_square_sum(const PrepareParams &p, uint32_t index) {
    auto from = static_cast<const Element *>(p.input) + static_cast<uint64_t>(index) * p.dim;
    double sum = 0.0;
    for (uint32_t d = lane_index(); d < p.dim; d += 32) {
        auto value = static_cast<double>(to_float(from[d]));
        sum += value * value;
    }
    return warp_sum(sum);
}

// What brings a warp's rows to unit length: an inverse each, and a bit for those of unusual lengths, which the lengths say.
struct Inverses {
    float of_row[kWarpRows];
    uint32_t unusual;
};

// The lengths of a warp's rows, whose original indices the lanes have in `own`.
template <class Element>
DEVICE Inverses find_lengths(const PrepareParams &p, uint32_t own, bool aligned) {
    using Vector = Granule<Element>;
    Inverses inverses{};
    float squares[kWarpRows];
#pragma unroll
    for (uint32_t r = 0; r < kWarpRows; ++r) squares[r] = 0.0f;
#pragma unroll 1
    for (uint32_t granule = lane_index(); granule - lane_index() < p.stride / Vector::count; granule += 32) {
#pragma unroll
        for (uint32_t half = 0; half < kWarpRows; half += kRowsAtOnce) {
            Vector values[kRowsAtOnce];
#pragma unroll
            for (uint32_t r = 0; r < kRowsAtOnce; ++r) {
                values[r] = input_granule<Element>(p, shuffle(own, static_cast<int>(half + r)), granule, aligned);
            }
#pragma unroll
            for (uint32_t r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
                for (int i = 0; i < Vector::count; ++i) {
                    float value = to_float(values[r].values[i]);
                    squares[half + r] += value * value;
                }
            }
        }
    }
#pragma unroll
    for (uint32_t r = 0; r < kWarpRows; ++r) {
        uint32_t index = shuffle(own, static_cast<int>(r));
        double length = sqrt(static_cast<double>(warp_sum(squares[r])));
        if (index == NO_ROW) continue;  // the same for the whole warp
        if (!is_usual(length)) {
            length = sqrt(exact_square_sum<Element>(p, index));
            if (!is_usual(length)) inverses.unusual |= 1u << r;
        }
        inverses.of_row[r] = static_cast<float>(1.0 / length);
        if (lane_index() == 0) p.lengths[index] = length;
    }
    warp_sync();  // the lengths are there
    return inverses;
}

// `scratch` holds a float for each warp, lane and element of a granule.
template <class Numbers>
DEVICE void prepare_rows(const PrepareParams &p, unsigned char *scratch) {
    using Element = typename Numbers::Element;
    using Vector = Granule<Element>;
    constexpr uint32_t kColumns = 32 * Vector::count;
    uint64_t stride_bytes = static_cast<uint64_t>(p.stride) * Numbers::stored_bytes;
    auto rows = static_cast<unsigned char *>(p.rows) + static_cast<uint64_t>(block_x()) * TILE * stride_bytes;
    auto *parts = reinterpret_cast<float *>(scratch);  // [warps, kColumns]
    uint32_t lane = lane_index(), first_row = warp_index() * kWarpRows, first = block_x() * TILE + first_row;
    bool real = lane < kWarpRows && first + lane < p.count;
    uint32_t own = !real ? NO_ROW : p.order == nullptr ? first + lane : p.order[first + lane];
    bool aligned = (reinterpret_cast<uintptr_t>(p.input) | static_cast<uint64_t>(p.dim) * sizeof(Element)) % 16 == 0;
    uint32_t valid = p.column_sums == nullptr ? 0 : *p.valid, granules = p.stride / Vector::count;
    Inverses inverses{};
    if (p.lengths != nullptr) inverses = find_lengths<Element>(p, own, aligned);
    float squares[kWarpRows];
#pragma unroll
    for (uint32_t r = 0; r < kWarpRows; ++r) squares[r] = 0.0f;
#pragma unroll 1
    for (uint32_t begin = 0; begin < granules; begin += 32) {
        uint32_t granule = begin + lane;
        bool there = granule < granules;
        float sums[Vector::count];
#pragma unroll
        for (int i = 0; i < Vector::count; ++i) sums[i] = 0.0f;
#pragma unroll
        for (uint32_t half = 0; half < kWarpRows; half += kRowsAtOnce) {
            Vector values[kRowsAtOnce];
#pragma unroll
            for (uint32_t r = 0; r < kRowsAtOnce; ++r) {
                uint32_t index = shuffle(own, static_cast<int>(half + r));
                values[r] = input_granule<Element>(p, there ? index : NO_ROW, granule, aligned);
                if (p.lengths == nullptr) continue;
                bool usual = index == NO_ROW || !(inverses.unusual >> (half + r) & 1);
                double length = usual ? 1.0 : p.lengths[index];
#pragma unroll
                for (int i = 0; i < Vector::count; ++i) {
                    float value = to_float(values[r].values[i]);
                    value = usual ? value * inverses.of_row[half + r] : unit_entry(value, length);
                    values[r].values[i] = from_float<Element>(value);
                }
            }
#pragma unroll
            for (uint32_t r = 0; r < kRowsAtOnce; ++r) {
                if (there) store_prepared<Numbers>(rows, first_row + half + r, granule * Vector::count, values[r], stride_bytes);
                bool counts = first + half + r < valid;
#pragma unroll
                for (int i = 0; i < Vector::count; ++i) {
                    float value = to_float(values[r].values[i]);
                    squares[half + r] += value * value;
                    sums[i] += counts ? value : 0.0f;
                }
            }
        }
        if (p.column_sums == nullptr) continue;
#pragma unroll
        for (int i = 0; i < Vector::count; ++i) parts[warp_index() * kColumns + lane * Vector::count + i] = sums[i];
        block_sync();
        uint32_t column = begin * Vector::count + thread_index();
        if (thread_index() < kColumns && column < p.stride) {
            float sum = parts[thread_index()];
            for (uint32_t warp = 1; warp < THREADS / 32; ++warp) sum += parts[warp * kColumns + thread_index()];
            p.column_sums[static_cast<uint64_t>(block_x()) * p.stride + column] = sum;
        }
        block_sync();  // the parts are read
    }
#pragma unroll
    for (uint32_t r = 0; r < kWarpRows; ++r) {
        uint32_t index = shuffle(own, static_cast<int>(r));
        float square = warp_sum(squares[r]);
        // Half the tolerance is more than chains of f32 err by, up to 2^19 dimensions. A NaN is not near.
        bool near = static_cast<double>(fabsf(sqrtf(square) - 1.0f)) <= p.norm_tolerance / 2.0 && p.stride <= 1u << 19;
        if (index == NO_ROW) continue;  // the same for the whole warp
        if (p.lengths != nullptr) {
            // What was brought to unit length has it, if it had a direction.
            double length = p.lengths[index];
            if (has_direction(length) || lane != 0) continue;
            p.square_sums[index] = length * length;
            if (p.check) atomic_min(p.bad, index);
            continue;
        }
        if (near) continue;
        double exact = exact_square_sum<Element>(p, index);
        if (lane != 0) continue;
        p.square_sums[index] = exact;
        // Written so that a NaN is bad too.
        bool unit = fabs(sqrt(exact) - 1.0) <= p.norm_tolerance;
        if (p.check && !unit) atomic_min(p.bad, index);
    }
}
static_assert(THREADS >= 32 * 8, "a thread for every column");

DEVICE void prepare_classes(const PrepareParams &p) {
    uint32_t i = block_x() * TILE + thread_index();
    if (p.keys == nullptr || thread_index() >= TILE || i >= p.count) return;
    p.classes[i] = range_of(p.reference_keys, p.references, p.keys[i]);
}

template <class Where, class Sums>
DEVICE void write_duplicate_bounds(const PrepareParams &p, const Sums &acc) {
    Where place;
#pragma unroll
    for (int row = 0; row < Where::rows; ++row) {
#pragma unroll
        for (int column = 0; column < Where::columns; ++column) {
            uint32_t r = place.row_of(row);
            if (r != place.column_of(column)) continue;
            double square = static_cast<double>(Where::value(acc, row, column));
            p.duplicate[block_x() * TILE + r] = static_cast<float>(kDuplicate * square);
        }
    }
}

template <class Numbers>
DEVICE void prepare_body(const PrepareParams &p) {
    SHARED_MEMORY(stages);
    prepare_classes(p);
    prepare_rows<Numbers>(p, stages);
    if (p.duplicate == nullptr) return;
    block_sync();  // the rows are there
    uint64_t stride_bytes = static_cast<uint64_t>(p.stride) * Numbers::stored_bytes;
    auto rows = static_cast<const unsigned char *>(p.rows) + block_x() * TILE * stride_bytes;
    Accumulators<4> acc;
    multiply_tile<Numbers, 4>(acc, rows, rows, stride_bytes, stages);
    write_duplicate_bounds<Place<4>>(p, acc);
}

template <class Numbers>
DEVICE void prepare_hopper_body([[maybe_unused]] const PrepareParams &p) {
#ifdef HAS_WARPGROUP_PRODUCTS
    SHARED_MEMORY(bytes);
    prepare_classes(p);
    prepare_rows<Numbers>(p, bytes);
    if (p.duplicate == nullptr) return;
    fence_proxy_async_global();  // bulk copies read the rows,
    fence_proxy_async();         // and write where the column sums were added
    block_sync();
    GroupStages<kHopperStages> stages = hopper_stages(bytes);
    uint64_t stride_bytes = static_cast<uint64_t>(p.stride) * Numbers::stored_bytes;
    auto rows = static_cast<const unsigned char *>(p.rows) + block_x() * TILE * stride_bytes;
    GroupAccumulators acc;
    group_multiply_tile<Numbers>(acc, rows, rows, stride_bytes, stages);
    write_duplicate_bounds<GroupPlace>(p, acc);
#else
    trap();
#endif
}

KERNEL_IN_EVERY_PRECISION(prepare, PrepareParams, 1)
KERNEL(prepare_hopper_tf32, PrepareParams, 1) { prepare_hopper_body<FastF32>(p); }
KERNEL(prepare_hopper_f16, PrepareParams, 1) { prepare_hopper_body<HalfF16>(p); }
KERNEL(prepare_hopper_bf16, PrepareParams, 1) { prepare_hopper_body<HalfBf16>(p); }
