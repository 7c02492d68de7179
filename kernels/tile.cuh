// tile.cuh: one tile of S = A B^T on tensor cores, for every type, and the pairs in it.
//
// A block of 8 warps, 2 x 4, computes (32 row_tiles) x 128 products; a warp 16 row_tiles x 32. Or they are 4 x 2, and a warp
// has 64 columns.
// Both operands stream through shared memory in stages of 128 bytes a row, copied
// asynchronously; granules of 16 bytes are swizzled (granule ^ row % 8), so that neither the
// copies nor ldmatrix meet a bank twice. Prepared rows lie in global memory as they lie in a
// stage, 16 KB for each tile and stage: copies are contiguous, and Hopper's bulk copies take a
// stage at once. The inner dimension is padded to whole stages.
//
// Numbers: tensor cores truncate when they add. In the exact f32 mode each stage is
// therefore summed from 0 and added to the total by the f32 adder, which rounds.
// Exact f32 takes two f16 an entry: a stage has 32 dimensions, 64 bytes of high parts and 64 of low ones.
#ifndef DDTAS_TILE_CUH
#define DDTAS_TILE_CUH

#include "cuda.cuh"

constexpr int kStages = 3;
// Where two blocks share a multiprocessor, one looks at its products while the other multiplies, and hides what one stage ahead
// does not. Exact f32 has no registers for a second block.
template <class Numbers>
constexpr int kSharingStages = Numbers::exact ? kStages : 2;
constexpr int kGranules = STAGE_BYTES / 16;
constexpr int kColumnTiles = 4;  // of 8 columns, in a warp
// Floats between rows of a tile that is written to shared memory: 4 banks apart, the 8 rows
// that a warp writes at a time do not meet.
constexpr uint32_t kValuesStride = TILE + 4;
static_assert(SIMILARITY_STAGES_BYTES == kStages * 2 * TILE * STAGE_BYTES, "the launch plan's shared memory");
static_assert(SHARING_STAGES_BYTES == 2 * 2 * TILE * STAGE_BYTES, "the launch plan's shared memory");

// Share of the longer row's square sum from which a positive is an exact duplicate (SPEC 1).
constexpr double kDuplicate = 1.0 - 1e-6;

// The three ways to multiply. `Fragment` is an operand as its `multiply` wants it, `stored_bytes` what an element of a
// prepared row takes. S_ij and S_ji have the same bits in every one: products commute, and so does what adds them.

// f32 as three products of f16: kRowScale x = high + low, the product of the low parts is below f32's last bit. Prepared rows
// hold both, split once: of 64 elements first the high parts, then the low ones.
struct ExactF32 {
    using Element = float;
    static constexpr bool exact = true;
    static constexpr uint32_t stored_bytes = 4;
    template <int n>
    struct Fragment {
        uint32_t high[n], low[n];
    };
    static DEVICE void multiply(float (&c)[4], const Fragment<4> &a, const Fragment<2> &b) {
        mma_f16(c, a.low, b.high);
        mma_f16(c, a.high, b.low);
        mma_f16(c, a.high, b.high);
    }
};
// Both parts together err by 2^-22 of an entry, or by 2^-30 where that is more: f16 has no numbers between multiples of 2^-24.
// Entries up to 2,000 stay finite, should rows that nobody checks be longer than 1.
constexpr float kRowScale = 32.0f;

// Two numbers as high and low parts, the first in the lower halves.
struct Halves {
    uint32_t high, low;
};
DEVICE Halves split(float first, float second) {
    uint32_t high = to_f16_pair(first, second);
    return Halves{high, to_f16_pair(first - from_f16_bits(static_cast<uint16_t>(high)),
                                    second - from_f16_bits(static_cast<uint16_t>(high >> 16)))};
}

// 16-bit rows, and f32 rows that `prepare` has rounded to f16.
template <class T>
struct Narrow {
    using Element = T;
    static constexpr bool exact = false;
    static constexpr uint32_t stored_bytes = 2;
    template <int n>
    struct Fragment {
        uint32_t value[n];
    };
    template <int n>
    static DEVICE void prepare(Fragment<n> &to, const uint32_t *from) {
        for (int i = 0; i < n; ++i) to.value[i] = from[i];
    }
    static DEVICE void multiply(float (&c)[4], const Fragment<4> &a, const Fragment<2> &b);
};
template <>
DEVICE void Narrow<F16>::multiply(float (&c)[4], const Fragment<4> &a, const Fragment<2> &b) {
    mma_f16(c, a.value, b.value);
}
template <>
DEVICE void Narrow<Bf16>::multiply(float (&c)[4], const Fragment<4> &a, const Fragment<2> &b) {
    mma_bf16(c, a.value, b.value);
}
using HalfF16 = Narrow<F16>;
using HalfBf16 = Narrow<Bf16>;

// Defines one kernel in every precision from a device function `template <class Numbers> name_body(p)`.
#define KERNEL_IN_EVERY_PRECISION(name, Params) KERNEL_OF_NARROW_BLOCKS(name, Params, 1)
// So many blocks a multiprocessor, of exact f32 one.
#define KERNEL_OF_NARROW_BLOCKS(name, Params, blocks)                 \
    KERNEL(name##_f32, Params, 1) { name##_body<ExactF32>(p); }       \
    KERNEL(name##_f16, Params, blocks) { name##_body<HalfF16>(p); }   \
    KERNEL(name##_bf16, Params, blocks) { name##_body<HalfBf16>(p); }

// 16 bytes of a row.
template <class Element>
struct alignas(16) Granule {
    static constexpr int count = 16 / sizeof(Element);
    Element values[count];
};

// The place of granule `granule` of row `row` in a stage.
DEVICE uint32_t swizzled(uint32_t row, uint32_t granule) {
    return row * STAGE_BYTES + ((granule ^ (row % 8)) << 4);
}

// Byte `byte` of prepared row `row`, of `stride_bytes` bytes a row: [tile, stage, row, granule].
DEVICE uint64_t prepared_place(uint64_t row, uint32_t byte, uint64_t stride_bytes) {
    return row / TILE * TILE * stride_bytes + static_cast<uint64_t>(byte / STAGE_BYTES) * TILE * STAGE_BYTES +
           swizzled(static_cast<uint32_t>(row % TILE), byte % STAGE_BYTES / 16) + byte % 16;
}

// Byte of element `d` of a prepared row; of f32 split into two that of the high part, whose low one is a fixed way off.
template <class Numbers>
DEVICE uint32_t stored_byte(uint32_t d) {
    constexpr uint32_t together = STAGE_BYTES / 2;  // elements
    if constexpr (Numbers::exact) return d / together * 2 * STAGE_BYTES + d % together * 2;
    return d * Numbers::stored_bytes;
}
constexpr uint32_t kLowBytes = STAGE_BYTES;  // from a high part to its low one

// A granule of f32 split into high and low parts: half a granule of each.
struct SplitGranule {
    struct alignas(8) Part {
        uint32_t pairs[2];
    };
    Part high, low;

    SplitGranule() = default;
    explicit DEVICE SplitGranule(const Granule<float> &values) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            Halves halves = split(values.values[2 * i] * kRowScale, values.values[2 * i + 1] * kRowScale);
            high.pairs[i] = halves.high;
            low.pairs[i] = halves.low;
        }
    }
    // All but an f32's last bits.
    DEVICE Granule<float> joined() const {
        Granule<float> values;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            auto part = [&](const Part &of) { return from_f16_bits(static_cast<uint16_t>(of.pairs[i / 2] >> i % 2 * 16)); };
            values.values[i] = (part(high) + part(low)) / kRowScale;
        }
        return values;
    }
};

// The elements of a prepared row from `first` on, a granule of the caller's.
template <class Numbers>
DEVICE Granule<typename Numbers::Element> load_prepared(const unsigned char *rows, uint64_t row, uint32_t first, uint64_t stride_bytes) {
    const unsigned char *at = rows + prepared_place(row, stored_byte<Numbers>(first), stride_bytes);
    if constexpr (Numbers::exact) {
        // The low parts are a stage further on.
        SplitGranule split;
        split.high = *reinterpret_cast<const SplitGranule::Part *>(at);
        split.low = *reinterpret_cast<const SplitGranule::Part *>(at + TILE * STAGE_BYTES);
        return split.joined();
    } else {
        return *reinterpret_cast<const Granule<typename Numbers::Element> *>(at);
    }
}

// Of a word with a bit for each of a thread's columns, pairs 8 apart from `first` on: those before column `end` of the tile.
template <int columns>
DEVICE uint32_t column_bits_before(uint32_t first, uint32_t end) {
    uint32_t left = end > first ? end - first : 0;
    uint32_t count = left / 8 * 2 + (left % 8 < 2 ? left % 8 : 2);
    return count < columns ? (1u << count) - 1 : ~0u >> (32 - columns);
}

// Where this thread's accumulators stand in the tile.
template <int row_tiles, int column_tiles = kColumnTiles>
struct Place {
    static constexpr uint32_t across = TILE / 8 / column_tiles;  // warps side by side
    uint32_t warp_row = warp_index() / across * 16 * row_tiles;
    uint32_t warp_column = warp_index() % across * 8 * column_tiles;
    DEVICE uint32_t row(int tile, int half) const { return warp_row + tile * 16 + half * 8 + lane_index() / 4; }
    DEVICE uint32_t column(int tile, int odd) const { return warp_column + tile * 8 + lane_index() % 4 * 2 + odd; }

    // The same as a matrix of this thread's own: `rows` x `columns` values.
    static constexpr int rows = 2 * row_tiles, columns = 2 * column_tiles;
    // Quarters of the tile's columns: how many these are of, and the first of them.
    static constexpr int quarters = 1;
    DEVICE uint32_t first_quarter() const { return warp_index() % 4; }
    DEVICE uint32_t row_of(int r) const { return row(r / 2, r % 2); }
    DEVICE uint32_t column_of(int c) const { return column(c / 2, c % 2); }
    DEVICE uint32_t bits_before(uint32_t end) const { return column_bits_before<columns>(column_of(0), end); }
    template <class Sums>
    static DEVICE auto &value(Sums &acc, int r, int c) {
        return acc[r / 2][c / 2][r % 2 * 2 + c % 2];
    }
};

template <int row_tiles, int column_tiles = kColumnTiles>
using Accumulators = float[row_tiles][column_tiles][4];

// Copies stage `index` of `rows` rows of a tile to shared memory: of split ones a half of both parts' 64 dimensions.
template <class Numbers>
DEVICE void copy_stage(unsigned char *to, const unsigned char *from, uint32_t index, int rows) {
    constexpr int kTurn = THREADS * 16;  // bytes, whole 8 rows
    uint32_t first = thread_index() * 16;
    to += first;
    if constexpr (Numbers::exact) {
        // Upper half of the granules, as products see them: the low parts, a stage further on.
        uint32_t low = (thread_index() % kGranules ^ thread_index() / kGranules % 8) / (kGranules / 2);
        from += static_cast<uint64_t>(index / 2 * 2 + low) * TILE * STAGE_BYTES + (first ^ (low ^ index % 2) * (STAGE_BYTES / 2));
    } else {
        from += static_cast<uint64_t>(index) * TILE * STAGE_BYTES + first;
    }
#pragma unroll
    for (int i = 0; i < rows * STAGE_BYTES / kTurn; ++i) cp_async(to + i * kTurn, from + i * kTurn);
}

template <int row_tiles, int column_tiles>
DEVICE void clear(float (&acc)[row_tiles][column_tiles][4]) {
#pragma unroll
    for (int tile = 0; tile < row_tiles; ++tile) {
#pragma unroll
        for (int column = 0; column < column_tiles; ++column) {
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[tile][column][i] = 0.0f;
        }
    }
}

// Granules of the rows of 16 from `row` on, as operand b of two products wants them, and of those as operand a.
DEVICE void load_columns(uint32_t (&raw)[4], const unsigned char *stage, uint32_t row, uint32_t granule) {
    uint32_t lane = lane_index();
    ldmatrix(raw, stage + swizzled(row + lane % 8 + lane / 16 * 8, granule + lane / 8 % 2));
}
DEVICE void load_rows(uint32_t (&raw)[4], const unsigned char *stage, uint32_t row, uint32_t granule) {
    uint32_t lane = lane_index();
    ldmatrix(raw, stage + swizzled(row + lane % 16, granule + lane / 16));
}

// Adds a stage's products to `acc`: its rows from `a_row` on.
template <class Numbers, int row_tiles, int column_tiles>
DEVICE void multiply_stage(float (&acc)[row_tiles][column_tiles][4], const unsigned char *a, const unsigned char *b,
                           uint32_t a_row, uint32_t b_row) {
#pragma unroll
    for (int step = 0; step < kGranules / 2; ++step) {
        uint32_t columns[column_tiles / 2][4];
#pragma unroll
        for (int pair = 0; pair < column_tiles / 2; ++pair) load_columns(columns[pair], b, b_row + pair * 16, step * 2);
#pragma unroll
        for (int tile = 0; tile < row_tiles; ++tile) {
            uint32_t raw[4];
            load_rows(raw, a, a_row + tile * 16, step * 2);
            typename Numbers::template Fragment<4> rows;
            Numbers::prepare(rows, raw);
#pragma unroll
            for (int column = 0; column < column_tiles; ++column) {
                typename Numbers::template Fragment<2> fragment;
                Numbers::prepare(fragment, columns[column / 2] + column % 2 * 2);
                Numbers::multiply(acc[tile][column], rows, fragment);
            }
        }
    }
}

// The same of rows split into high and low parts. Each kind of product has sums of its own, from 0, and the adder that
// rounds adds them: with a and b exchanged two of them change places, and their sum has the same bits.
template <int row_tiles, int column_tiles>
DEVICE void multiply_split_stage(float (*acc)[column_tiles][4], const unsigned char *a, const unsigned char *b, uint32_t a_row,
                                 uint32_t b_row) {
    Accumulators<row_tiles, column_tiles> low_high, high_low, high;
    clear(low_high);
    clear(high_low);
    clear(high);
#pragma unroll 1
    for (int step = 0; step < kGranules / 4; ++step) {
        ExactF32::Fragment<4> columns[column_tiles / 2];  // of two products each
#pragma unroll
        for (int pair = 0; pair < column_tiles / 2; ++pair) {
            load_columns(columns[pair].high, b, b_row + pair * 16, step * 2);
            load_columns(columns[pair].low, b, b_row + pair * 16, step * 2 + kGranules / 2);
        }
#pragma unroll
        for (int tile = 0; tile < row_tiles; ++tile) {
            ExactF32::Fragment<4> rows;
            load_rows(rows.high, a, a_row + tile * 16, step * 2);
            load_rows(rows.low, a, a_row + tile * 16, step * 2 + kGranules / 2);
#pragma unroll
            for (int column = 0; column < column_tiles; ++column) {
                const auto &two = columns[column / 2];
                const uint32_t b_high[2] = {two.high[column % 2 * 2], two.high[column % 2 * 2 + 1]};
                const uint32_t b_low[2] = {two.low[column % 2 * 2], two.low[column % 2 * 2 + 1]};
                mma_f16(low_high[tile][column], rows.low, b_high);
                mma_f16(high_low[tile][column], rows.high, b_low);
                mma_f16(high[tile][column], rows.high, b_high);
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < row_tiles; ++tile) {
#pragma unroll
        for (int column = 0; column < column_tiles; ++column) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float sum = high[tile][column][i] + (low_high[tile][column][i] + high_low[tile][column][i]);
                acc[tile][column][i] = fmaf(sum, 1.0f / (kRowScale * kRowScale), acc[tile][column][i]);
            }
        }
    }
}

// acc = the products of 32 row_tiles rows (twice as many, if a warp has 64 columns) from `a` on with the TILE rows from `b` on:
// `b` begins a tile of prepared rows, `a` one or, STAGE_BYTES a row later, a part of it.
// `stages` holds kStages * (those rows + TILE) * STAGE_BYTES bytes, free on entry and on return.
// Of split rows `together` row tiles at a time, which bounds the registers of the further sums.
template <class Numbers, int row_tiles, int stage_count = kStages, int together = 2, int column_tiles>
DEVICE void multiply_tile(float (&acc)[row_tiles][column_tiles][4], const void *a, const void *b, uint64_t stride_bytes,
                          unsigned char *stages) {
    constexpr int rows = 8 * row_tiles * column_tiles;
    constexpr uint32_t stage_bytes = (rows + TILE) * STAGE_BYTES;
    auto a_bytes = static_cast<const unsigned char *>(a);
    auto b_bytes = static_cast<const unsigned char *>(b);
    uint32_t count = static_cast<uint32_t>(stride_bytes / STAGE_BYTES);
    Place<row_tiles, column_tiles> place;
    auto copy = [&](uint32_t index) {
        unsigned char *stage = stages + index % stage_count * stage_bytes;
        copy_stage<Numbers>(stage, a_bytes, index, rows);
        copy_stage<Numbers>(stage + rows * STAGE_BYTES, b_bytes, index, TILE);
    };
    clear(acc);
    for (uint32_t index = 0; index < stage_count - 1; ++index) {
        if (index < count) copy(index);
        cp_async_commit();  // a group a stage, empty or not: the waits below count them
    }
    for (uint32_t index = 0; index < count; ++index) {
        cp_async_wait<stage_count - 2>();
        block_sync();  // everybody's copies of this stage are there, and the stage before is read
        if (index + stage_count - 1 < count) copy(index + stage_count - 1);
        cp_async_commit();
        const unsigned char *stage = stages + index % stage_count * stage_bytes;
        const unsigned char *other = stage + rows * STAGE_BYTES;
        if constexpr (Numbers::exact) {
#pragma unroll
            for (int first = 0; first < row_tiles; first += together) {
                multiply_split_stage<together, column_tiles>(acc + first, stage, other, place.warp_row + first * 16, place.warp_column);
            }
        } else {
            multiply_stage<Numbers>(acc, stage, other, place.warp_row, place.warp_column);
        }
    }
    cp_async_wait<0>();
    block_sync();
}

// Which tile of S a block works on: the upper triangle row by row, or all of them.
struct TileIndex {
    uint32_t row;
    uint32_t column;
};
DEVICE uint64_t triangle_before(uint64_t row, uint64_t tiles) { return row * (2 * tiles - row + 1) / 2; }
DEVICE TileIndex triangle_at(uint64_t index, uint64_t tiles) {
    // The root of the quadratic is off by rounding at most: then one step mends it.
    double side = 2.0 * static_cast<double>(tiles) + 1.0;
    auto row = static_cast<uint64_t>((side - sqrt(side * side - 8.0 * static_cast<double>(index))) / 2.0);
    while (row > 0 && triangle_before(row, tiles) > index) --row;
    while (triangle_before(row + 1, tiles) <= index) ++row;
    return TileIndex{static_cast<uint32_t>(row), static_cast<uint32_t>(index - triangle_before(row, tiles) + row)};
}
DEVICE TileIndex tile_of(const Pairs &pairs, uint64_t index) {
    uint64_t tiles = pairs.references.tiles;
    if (pairs.square) return triangle_at(index, tiles);
    return TileIndex{static_cast<uint32_t>(index / tiles), static_cast<uint32_t>(index % tiles)};
}

// The tiles in the order of the sweep: by bands of columns whose rows stay in L2, in a band row by row. The rows of a
// triangle come in pairs, the longest with the shortest and so on: where rows begin, and pairs of one class are, is then spread
// evenly over the blocks that have a run each.
DEVICE TileIndex tile_at(const Pairs &pairs, uint64_t position) {
    uint64_t tiles = pairs.references.tiles, first = 0;
    auto before = [&](uint64_t column) { return pairs.square ? column * (column + 1) / 2 : column * pairs.anchors.tiles; };
    while (first + pairs.band < tiles && before(first + pairs.band) <= position) first += pairs.band;
    uint64_t width = tiles - first < pairs.band ? tiles - first : pairs.band, left = position - before(first);
    if (!pairs.square || left < first * width) {
        return TileIndex{static_cast<uint32_t>(left / width), static_cast<uint32_t>(first + left % width)};
    }
    // A band's triangle has fewer tiles than 2^32: its rows fit L2.
    auto side = static_cast<uint32_t>(width), in_triangle = static_cast<uint32_t>(left - first * width);
    uint32_t pair = in_triangle / (side + 1), at = in_triangle % (side + 1), longer = side - pair;
    uint32_t row = static_cast<uint32_t>(first) + (at < longer ? pair : longer - 1);
    return TileIndex{row, row + (at < longer ? at : at - longer)};
}
// The tile that follows.
DEVICE TileIndex next_tile(const Pairs &pairs, TileIndex tile) {
    uint32_t end = ++tile.column;
    if (end != pairs.references.tiles && (end & (pairs.band - 1)) != 0) return tile;  // a power of two
    uint32_t first = (end - 1) & ~(pairs.band - 1), row = tile.row + 1;
    bool over = row == pairs.anchors.tiles;
    if (pairs.square && tile.row >= first) {
        uint32_t partner = first + end - 1 - tile.row;
        row = tile.row < partner ? partner : partner + 1;
        over = tile.row >= partner && 2 * row > first + end - 1;
    }
    return over ? TileIndex{0, end} : TileIndex{row, pairs.square && row > first ? row : first};
}

// Room for a tile's candidates, and for the bits that say which they are: where it begins, or NO_ROW. Which tiles get room
// is by chance where there is not enough for all; a tile has the same bits stored or not, and whatever else depends on it
// asks stores_all(), which is by no chance: the sum of what was asked for.
DEVICE uint32_t reserve(const Pairs &pairs, uint32_t count) {
    uint32_t units = ((count < TILE_MASK_WORDS ? TILE_MASK_WORDS : count) + 3) / 4;
    uint64_t first = atomic_take(&pairs.counters->reserved, static_cast<uint64_t>(units));
    return first + units <= pairs.pool ? static_cast<uint32_t>(first) : NO_ROW;
}
DEVICE bool stores_all(const Pairs &pairs) { return pairs.counters->reserved <= pairs.pool; }
DEVICE bool has_bad_row(const Counters &counters) { return counters.bad_anchor != NO_ROW || counters.bad_reference != NO_ROW; }
DEVICE bool is_stored(const Pairs &pairs, uint64_t tile) { return pairs.tile_segments[tile] != NO_ROW; }
// The first candidate of a tile that is stored.
DEVICE uint64_t segment_of(const Pairs &pairs, uint64_t tile) { return static_cast<uint64_t>(pairs.tile_segments[tile]) * 4; }

DEVICE uint64_t index_of(const Pairs &pairs, uint32_t row, uint32_t column) {
    uint64_t tiles = pairs.references.tiles;
    if (!pairs.square) return row * tiles + column;
    return triangle_before(row, tiles) + column - row;
}

template <class Numbers>
DEVICE const void *tile_rows(const Side &side, uint32_t tile, uint32_t stride) {
    return static_cast<const unsigned char *>(side.rows) + static_cast<uint64_t>(tile) * TILE * stride * Numbers::stored_bytes;
}
template <class Numbers>
DEVICE uint64_t stride_bytes(const Pairs &pairs) {
    return static_cast<uint64_t>(pairs.stride) * Numbers::stored_bytes;
}

// Whether anchor i and reference j form a pair; in the square form each pair once, i < j.
DEVICE bool is_pair(const Pairs &pairs, uint32_t i, uint32_t j) {
    return i < pairs.counters->valid_anchors && j < pairs.counters->valid_references && (!pairs.square || i < j);
}
DEVICE bool same_class(ClassRange range, uint32_t j) { return range.begin <= j && j < range.end; }

// Whether a pair of one class carries no signal: the rows are the same, or one is the other's copy (SPEC 1).
DEVICE bool is_duplicate(const Pairs &pairs, uint32_t i, uint32_t j, float s) {
    if (pairs.identity != nullptr && pairs.identity[i] == j) return true;
    return s >= fmaxf(pairs.anchors.duplicate[i], pairs.references.duplicate[j]);
}

// m+ less a tolerance; without a positive nothing is above it.
DEVICE float negative_bound(float min_pos, double tolerance) {
    return min_pos == INFINITE ? min_pos : static_cast<float>(static_cast<double>(min_pos) - tolerance);
}
// m- plus a tolerance; without a negative (key 0) nothing is below it.
DEVICE float positive_bound(uint32_t max_neg_key, double tolerance) {
    return max_neg_key == 0 ? -INFINITE : static_cast<float>(static_cast<double>(key_value(max_neg_key)) + tolerance);
}

#endif
