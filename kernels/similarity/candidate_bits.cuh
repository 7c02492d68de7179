// candidate_bits.cuh: which pairs of a tile of S are candidates, as bits; for sweep.cu and sweep_hopper.cu.
//
// A thread has 64 pairs, `Layout::rows` x `Layout::columns`, and a bit for each in two words: row by row, the columns of a row in
// order from the lowest bit on. A duplicate is a candidate here: it is the selection's to find.
#ifndef DDTAS_CANDIDATE_BITS_CUH
#define DDTAS_CANDIDATE_BITS_CUH

#include "pairs/pairs.cuh"
#include "pairs/tile_order.cuh"
#include "tile/wgmma_tile.cuh"

// m+ of a row; padding and ignored rows have none, and nothing passes a bound that is made of it.
DEVICE float row_min_pos(const Pairs &pairs, uint32_t valid_anchors, uint32_t i) {
    return i < valid_anchors ? pairs.same[i].min_pos : INFINITE;
}

// The same of a column, which in the rectangular form may be an anchor elsewhere: the probe counts it there.
DEVICE float column_min_pos(const Pairs &pairs, uint32_t valid_anchors, uint32_t valid_references, uint32_t j) {
    if (pairs.square) return row_min_pos(pairs, valid_anchors, j);
    return pairs.columns != nullptr && j < valid_references ? pairs.columns[j].min_pos : INFINITE;
}

// Rows of a thread that share a word.
template <class Layout>
constexpr int kRowsOfWord = 32 / Layout::columns;

// What is above its row's bound, what above its column's. From the last pair on: the bits are shifted in.
struct AboveBits {
    uint32_t by_row[2]{}, by_column[2]{};

    DEVICE void add(int word, float s, float row_bound, float column_bound) {
        shift_in_sign(by_row[word], row_bound - s);
        shift_in_sign(by_column[word], column_bound - s);
    }
    // Of those that count; a column that nobody asks for has nothing above its bound.
    DEVICE uint32_t count(const uint32_t (&of)[2], bool mirrored) const {
        int number = popc(by_row[0] & of[0]) + popc(by_row[1] & of[1]);
        if (mirrored) number += popc(by_column[0] & of[0]) + popc(by_column[1] & of[1]);
        return static_cast<uint32_t>(number);
    }
};

// Which pairs of a thread are of two classes, and which of one; the others do not count. The tile's first row and column.
template <class Layout>
DEVICE void classify(const Pairs &pairs, uint32_t first_row, uint32_t first_column, uint32_t valid_anchors, uint32_t valid_references,
                     uint32_t (&negative)[2], uint32_t (&positive)[2]) {
    Layout layout;
    auto before = [&](uint32_t j) { return layout.bits_before(j > first_column ? j - first_column : 0); };
#pragma unroll
    for (int word = 0; word < 2; ++word) {
        uint32_t of_two = 0, of_one = 0;
#pragma unroll 1  // rows side by side take registers
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
