// candidate_bits.cuh: candidates of a tile of S as bit masks; for sweep.cu and sweep_hopper.cu.
//
// A thread has 64 pairs, `Layout::rows` x `Layout::columns`, with a bit for each in two words: row by row, the columns of a row
// from the lowest bit up. Duplicates are candidates here; the selection removes them.
#ifndef DDTAS_CANDIDATE_BITS_CUH
#define DDTAS_CANDIDATE_BITS_CUH

#include "pairs/pairs.cuh"
#include "pairs/tile_order.cuh"
#include "tile/wgmma_tile.cuh"

// m+ of a row; +inf for padding and ignored rows, so that no similarity passes their bounds.
DEVICE float row_min_pos(const Pairs &pairs, uint32_t valid_anchors, uint32_t i) {
    return i < valid_anchors ? pairs.same[i].min_pos : INFINITE;
}

// The same of a column. In the rectangular form it may be an anchor of another part, whose probe counts its pairs.
DEVICE float column_min_pos(const Pairs &pairs, uint32_t valid_anchors, uint32_t valid_references, uint32_t j) {
    if (pairs.square) return row_min_pos(pairs, valid_anchors, j);
    return pairs.columns != nullptr && j < valid_references ? pairs.columns[j].min_pos : INFINITE;
}

// Rows of a thread whose bits are in one word.
template <class Layout>
constexpr int kRowsOfWord = 32 / Layout::columns;

// Pairs above their row's bound and pairs above their column's. Bits are shifted in: pairs are added from the last to the first.
struct AboveBits {
    uint32_t by_row[2]{}, by_column[2]{};

    DEVICE void add(int word, float s, float row_bound, float column_bound) {
        shift_in_sign(by_row[word], row_bound - s);
        shift_in_sign(by_column[word], column_bound - s);
    }
    // The number of pairs among `of` above their row's bound, plus, if `mirrored`, those above their column's.
    DEVICE uint32_t count(const uint32_t (&of)[2], bool mirrored) const {
        int number = popc(by_row[0] & of[0]) + popc(by_row[1] & of[1]);
        if (mirrored) number += popc(by_column[0] & of[0]) + popc(by_column[1] & of[1]);
        return static_cast<uint32_t>(number);
    }
};

// Which of a thread's pairs are negatives and which positives; pairs of padding or ignored rows are neither. `first_row` and
// `first_column` are the tile's.
template <class Layout>
DEVICE void classify(const Pairs &pairs, uint32_t first_row, uint32_t first_column, uint32_t valid_anchors, uint32_t valid_references,
                     uint32_t (&negative)[2], uint32_t (&positive)[2]) {
    Layout layout;
    auto before = [&](uint32_t j) { return layout.bits_before(j > first_column ? j - first_column : 0); };
#pragma unroll
    for (int word = 0; word < 2; ++word) {
        uint32_t of_two = 0, of_one = 0;
#pragma unroll 1  // unrolled, several rows would take registers at once
        for (int r = 0; r < kRowsOfWord<Layout>; ++r) {
            uint32_t i = first_row + layout.row_of(word * kRowsOfWord<Layout> + r);
            bool valid = i < valid_anchors;
            ClassRange range = valid ? pairs.classes[i] : ClassRange{1, 0};
            uint32_t counts = valid ? before(valid_references) : 0, same = before(range.end) & ~before(range.begin);
            if (pairs.square) counts &= ~before(i + 1);
            of_two |= (counts & ~same) << r * Layout::columns;
            of_one |= (counts & same) << r * Layout::columns;
        }
        negative[word] = of_two;
        positive[word] = of_one;
    }
}

#endif
