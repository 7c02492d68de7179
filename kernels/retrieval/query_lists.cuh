// query_lists.cuh: top-k candidate lists of queries, one for each warp and row that it multiplies.
//
// A list belongs to one warp, which has the same rows of every tile: bounds and lengths are in registers, and no warp waits for
// another. A tile is compared with the bounds, and only what is above them is appended. Then one of the lists that have become
// long is shortened, or all lists without room for another tile: a threshold that k keys or a few more pass is found by halving,
// and becomes the bound. So about k ln(N / k) keys are ever appended, and most tiles cost only a subtraction and a shift for each
// pair. Keys order by similarity, descending, then by index, ascending. They are unique: the lists together have one set of k
// best, however the references are divided.
#ifndef DDTAS_QUERY_LISTS_CUH
#define DDTAS_QUERY_LISTS_CUH

#include "tile/wgmma_tile.cuh"

constexpr uint64_t kNothing = ~static_cast<uint64_t>(0);
// Below every similarity except -INFINITE, which marks pairs that do not count.
constexpr float kNoBound = -3.402823466e38f;

// Ascending keys are descending similarities. -0 and 0 are the same similarity.
DEVICE uint64_t retrieval_key(float similarity, uint32_t index) {
    return static_cast<uint64_t>(~ordered_key(similarity + 0.0f)) << 32 | index;
}
DEVICE float key_similarity(uint64_t key) { return key_value(~static_cast<uint32_t>(key >> 32)); }

// The range of the references' tiles that a block searches.
struct SearchedTiles {
    uint32_t first, end;
    explicit DEVICE SearchedTiles(const RetrievalParams &p) {
        uint64_t tiles = (static_cast<uint64_t>(p.reference_count) + TILE - 1) / TILE;
        first = static_cast<uint32_t>(tiles * block_y() / p.splits);
        end = static_cast<uint32_t>(tiles * (block_y() + 1) / p.splits);
    }
};
DEVICE const unsigned char *searched_rows(const void *rows, uint32_t tile, uint64_t row_bytes) {
    return static_cast<const unsigned char *>(rows) + static_cast<uint64_t>(tile) * TILE * row_bytes;
}

// Calls `use` for each key of a list, by one lane each, and for kNothing after them; a lane loads four at once.
template <class Use>
DEVICE void each_key(const uint64_t *keys, uint32_t count, Use use) {
    constexpr uint32_t at_once = 4;
#pragma unroll 1
    for (uint32_t first = lane_index(); first < count + lane_index(); first += 32 * at_once) {
        uint64_t some[at_once];
        const uint64_t *from = keys + first;
#pragma unroll
        for (uint32_t n = 0; n < at_once; ++n) some[n] = first + 32 * n < count ? from[32 * n] : kNothing;
        compiler_barrier();
#pragma unroll
        for (uint32_t n = 0; n < at_once; ++n) use(some[n]);
    }
}

// Halves [low, high], which includes the least-th key of a list, until at least `least` and at most `most` keys are not above
// `middle`; false if one number is left and more keys than that are equal to it. Compares keys without their lowest `bits_less`
// bits. Called by a warp.
template <int bits_less, class Part>
DEVICE bool halve(const uint64_t *keys, uint32_t count, Part low, Part high, uint32_t least, uint32_t most, Part &middle) {
    for (;;) {
        middle = low + (high - low) / 2;
        uint32_t within = 0;
        each_key(keys, count, [&](uint64_t key) { within += static_cast<Part>(key >> bits_less) <= middle; });
        within = warp_sum(within);
        if (within >= least && within <= most) return true;
        if (low == high) return false;
        if (within < least) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
}

// A threshold that at least `least` and at most `most` of a list's keys are not above: by similarities alone, unless many are
// equal.
DEVICE uint64_t threshold_of(const uint64_t *keys, uint32_t count, uint32_t least, uint32_t most) {
    uint32_t low = ~0u, high = 0, similarity;
    each_key(keys, count, [&](uint64_t key) {
        uint32_t upper = static_cast<uint32_t>(key >> 32);
        low = upper < low ? upper : low;
        high = upper > high && key != kNothing ? upper : high;
    });
    for (int mask = 16; mask > 0; mask /= 2) {
        uint32_t lower = shuffle_xor(low, mask), higher = shuffle_xor(high, mask);
        low = lower < low ? lower : low;
        high = higher > high ? higher : high;
    }
    bool found = halve<32>(keys, count, low, high, least, most, similarity);
    uint64_t first = static_cast<uint64_t>(similarity) << 32, last = first | ~0u, threshold;
    if (found) return last;
    halve<0>(keys, count, first, last, least, most, threshold);
    return threshold;
}

// Keeps the keys of a list that are not above a threshold, and returns their number. Called by a warp.
DEVICE uint32_t keep_within(uint64_t *keys, uint32_t count, uint64_t threshold) {
    uint32_t kept = 0;
    for (uint32_t first = 0; first < count; first += 32) {
        uint32_t i = first + lane_index();
        uint64_t key = i < count ? keys[i] : kNothing;
        bool keep = key <= threshold;
        uint32_t kept_by = ballot_sync(keep);  // all lanes have read their keys
        if (keep) keys[kept + static_cast<uint32_t>(popc(kept_by & ((1u << lane_index()) - 1)))] = key;
        kept += static_cast<uint32_t>(popc(kept_by));
    }
    warp_sync();
    return kept;
}

// The lists of a warp's rows. `Layout` is that of its accumulators: four lanes share a row.
template <class Layout>
struct QueryLists {
    static constexpr int rows = Layout::rows, columns = Layout::columns;
    static_assert(rows <= 4 && columns <= 32, "a bit a row for four lanes, a word a row");
    static constexpr uint32_t appended = columns * 4;  // most keys that a tile appends to a list
    static_assert(appended <= RETRIEVAL_SLACK, "a list has room for a tile after shortening");

    const RetrievalParams &p;
    uint32_t first_query, list;
    Layout layout{};
    bool begun = false;
    float bound[rows];
    uint32_t count[rows];

    // `own`: index of this warp's list among the block's lists of a row.
    DEVICE QueryLists(const RetrievalParams &of, uint32_t own)
        : p(of), first_query((of.first_tile + block_x()) * TILE), list(block_y() * (of.lists / of.splits) + own) {
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            bound[r] = first_query + layout.row_of(r) < p.query_count ? kNoBound : INFINITE;
            count[r] = 0;
        }
    }

    // Adds what may be among the k best of a tile. Tiles come in ascending order, so that an equal similarity comes after the
    // kept ones.
    template <class Sums>
    DEVICE void add_tile(Sums &acc, uint32_t tile) {
        uint32_t first = tile * TILE;
        bool with_self = p.leave_self_out != 0 && first == first_query;
        if (with_self || p.reference_count - first < TILE) leave_out(acc, first, with_self);
        if (!begun && p.k <= appended / 2) raise(acc);
        begun = true;
        uint32_t above[rows], any = 0;
        pairs_above(acc, bound, above);
#pragma unroll
        for (int r = 0; r < rows; ++r) any |= above[r];
        if (ballot_sync(any != 0) == 0) return;
        append(acc, above, any, first);
        // One list at a time, while other warps multiply: if all shortened their lists at once, the tensor cores would wait.
        bool is_full = false;
#pragma unroll
        for (int r = 0; r < rows; ++r) is_full |= count[r] > p.capacity - appended;
        bool full = ballot_sync(is_full) != 0;
        cut(full ? p.capacity - appended : p.kept + RETRIEVAL_SPARE, full);
    }

    // Shortens all lists for the merge and writes their lengths.
    DEVICE void finish() {
        cut(p.kept, true);
        if (lane_index() % 4 != 0) return;
#pragma unroll
        for (int r = 0; r < rows; ++r) p.counts[index_of_list(layout.row_of(r))] = count[r];
    }

  private:
    DEVICE uint64_t index_of_list(uint32_t row) const {
        return static_cast<uint64_t>(block_x() * TILE + row) * p.lists + list;
    }
    DEVICE uint64_t *keys_of(uint32_t row) const { return p.keys + index_of_list(row) * p.capacity; }

    // The sum over the four lanes of a row; `before`: over those before this one.
    static DEVICE uint32_t row_sum(uint32_t value, uint32_t &before) {
        uint32_t next = shuffle_xor(value, 1), two = value + next, others = shuffle_xor(two, 2);
        before = (lane_index() % 2 != 0 ? next : 0) + (lane_index() % 4 >= 2 ? others : 0);
        return two + others;
    }

    // Bit c of a row's word: the pair of column c is above the bound. Bits are shifted in, the last column first.
    template <class Sums>
    static DEVICE void pairs_above(Sums &acc, const float (&bounds)[rows], uint32_t (&above)[rows]) {
#pragma unroll
        for (int r = 0; r < rows; ++r) above[r] = 0;
#pragma unroll
        for (int c = columns - 1; c >= 0; --c) {
#pragma unroll
            for (int r = 0; r < rows; ++r) shift_in_sign(above[r], bounds[r] - Layout::value(acc, r, c));
        }
    }

    // Sets the pairs with padding and, if `with_self`, with the query itself to -INFINITE.
    template <class Sums>
    DEVICE void leave_out(Sums &acc, uint32_t first, bool with_self) const {
#pragma unroll
        for (int c = 0; c < columns; ++c) {
            uint32_t column = layout.column_of(c);
#pragma unroll
            for (int r = 0; r < rows; ++r) {
                bool self = with_self && column == layout.row_of(r);
                if (self || first + column >= p.reference_count) Layout::value(acc, r, c) = -INFINITE;
            }
        }
    }

    // Raises the bounds before the first tile, to numbers that at least k of its own pairs are above: the others need no listing.
    template <class Sums>
    DEVICE void raise(Sums &acc) {
        float low[rows], high[rows], middle[rows];
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            low[r] = -1.0f;
            high[r] = low[r];
#pragma unroll
            for (int c = 0; c < columns; ++c) high[r] = fmaxf(high[r], Layout::value(acc, r, c));
            high[r] = fmaxf(high[r], shuffle_xor(high[r], 1));
            high[r] = fmaxf(high[r], shuffle_xor(high[r], 2));
        }
#pragma unroll 1
        for (int step = 0; step < 10; ++step) {
            uint32_t above[rows];
#pragma unroll
            for (int r = 0; r < rows; ++r) middle[r] = 0.5f * (low[r] + high[r]);
            pairs_above(acc, middle, above);
#pragma unroll
            for (int r = 0; r < rows; ++r) {
                uint32_t before;
                if (row_sum(static_cast<uint32_t>(popc(above[r])), before) < p.k) {
                    high[r] = middle[r];
                } else {
                    low[r] = middle[r];
                    bound[r] = fmaxf(bound[r], middle[r]);
                }
            }
        }
    }

    template <class Sums>
    DEVICE void append(Sums &acc, const uint32_t (&above)[rows], uint32_t any, uint32_t first) {
        uint64_t *at[rows];
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            uint32_t before, total = row_sum(static_cast<uint32_t>(popc(above[r])), before);
            at[r] = keys_of(layout.row_of(r)) + count[r] + before;
            count[r] += total;
        }
#pragma unroll
        for (int part = 0; part < columns; part += 8) {
            if (ballot_sync((any >> part & 0xffu) != 0) == 0) continue;
#pragma unroll
            for (int c = part; c < part + 8; ++c) {
#pragma unroll
                for (int r = 0; r < rows; ++r) {
                    if (above[r] >> c & 1u) *at[r]++ = retrieval_key(Layout::value(acc, r, c), first + layout.column_of(c));
                }
            }
        }
        warp_sync();  // other lanes read the lists
    }

    // Shortens lists of more than `most` keys, one or all of them. Row r of quad q is bit 4 q + r.
    DEVICE void cut(uint32_t most, bool all) {
        uint32_t long_ones = 0;
#pragma unroll
        for (int r = 0; r < rows; ++r) long_ones |= (ballot_sync(count[r] > most) & 0x11111111u) << r;
        for (; long_ones != 0; long_ones = all ? long_ones & (long_ones - 1) : 0) {
            int bit = lowest_bit(long_ones), row = bit % 4;
            uint32_t own_count = count[0], own_row = layout.row_of(0);
#pragma unroll
            for (int r = 1; r < rows; ++r) {
                own_count = row == r ? count[r] : own_count;
                own_row = row == r ? layout.row_of(r) : own_row;
            }
            uint64_t *keys = keys_of(shuffle(own_row, bit));
            uint32_t length = shuffle(own_count, bit);
            uint64_t threshold = threshold_of(keys, length, p.k, p.kept);
            length = keep_within(keys, length, threshold);
#pragma unroll
            for (int r = 0; r < rows; ++r) {
                if (row != r || static_cast<int>(lane_index() / 4) != bit / 4) continue;
                count[r] = length;
                bound[r] = key_similarity(threshold);
            }
        }
    }
};

#endif
