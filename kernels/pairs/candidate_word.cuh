// candidate_word.cuh: a candidate's word of 32 bits.
//
// From the selection on:
//   bits 0 to 13   its place in the tile, row * TILE + column
//   bit 14, 15     kept by the anchor that is its row, by that which is its column
//   bit 16         positive
//   bits 17 to 31  sigmoid of its term of the loss: f16 of 2^15 times it, which has no sign
// From `weigh` on, of 16-bit rows (finish_words.cuh), all that the gradient wants to know of a pair:
//   bits 0 to 15   its element of M in the rows' type, times the scale of M; a word of 0 is no candidate
//   bits 16 to 31  the byte of that element where M's tile lies in shared memory, in the order of the tile of S
//
// Precision: scaled so, f16 holds a sigmoid to 2^-12 of itself down to 2e-9, and 2e-12 at all.
#ifndef DDTAS_CANDIDATE_WORD_CUH
#define DDTAS_CANDIDATE_WORD_CUH

#include "ptx/device.cuh"

constexpr uint32_t kIndexBits = TILE * TILE - 1;
constexpr uint32_t kKeptByRow = 14, kKeptByColumn = 15, kPositive = 16, kSigmoid = 17;
constexpr float kSigmoidScale = 32768.0f;

DEVICE uint32_t word_index(uint32_t word) { return word & kIndexBits; }
// Of a word that `weigh` has finished.
DEVICE uint32_t word_byte(uint32_t word) { return word >> 16; }
DEVICE uint16_t word_element(uint32_t word) { return static_cast<uint16_t>(word); }
DEVICE uint32_t pack_fate(bool by_row, bool by_column, bool positive, float sigmoid) {
    return static_cast<uint32_t>(by_row) << kKeptByRow | static_cast<uint32_t>(by_column) << kKeptByColumn |
           static_cast<uint32_t>(positive) << kPositive |
           static_cast<uint32_t>(to_f16_bits(sigmoid * kSigmoidScale)) << kSigmoid;
}
// kSigmoidScale times the sigmoid.
DEVICE float word_sigmoid(uint32_t word) { return from_f16_bits(static_cast<uint16_t>(word >> kSigmoid)); }
// A sigmoid as a word holds it.
DEVICE float rounded_sigmoid(float sigmoid) { return from_f16_bits(to_f16_bits(sigmoid * kSigmoidScale)) / kSigmoidScale; }

#endif
