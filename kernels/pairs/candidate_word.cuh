// candidate_word.cuh: the 32-bit word of a candidate.
//
// The selection writes:
//   bits 0 to 13   the place in the tile, row * TILE + column
//   bit 14         kept by the anchor of the row
//   bit 15         kept by the anchor of the column
//   bit 16         positive
//   bits 17 to 31  sigmoid of the pair's term of the loss: f16 of 2^15 times it, without the sign bit
// For 16-bit rows `weigh` replaces it (finish_words.cuh) by all that the gradient needs:
//   bits 0 to 15   the element of M in the rows' type, times the scale of M; a word of 0 is no candidate
//   bits 16 to 31  the byte offset of that element in M's tile in shared memory, which is ordered as the tile of S
//
// Precision: f16 of the scaled sigmoid has a relative error of 2^-12 down to 2e-9; the smallest number is 2e-12.
#ifndef DDTAS_CANDIDATE_WORD_CUH
#define DDTAS_CANDIDATE_WORD_CUH

#include "ptx/device.cuh"

constexpr uint32_t kIndexBits = TILE * TILE - 1;
constexpr uint32_t kKeptByRow = 14, kKeptByColumn = 15, kPositive = 16, kSigmoid = 17;
constexpr float kSigmoidScale = 32768.0f;

DEVICE uint32_t word_index(uint32_t word) { return word & kIndexBits; }
// Fields of a word that `weigh` has finished.
DEVICE uint32_t word_byte(uint32_t word) { return word >> 16; }
DEVICE uint16_t word_element(uint32_t word) { return static_cast<uint16_t>(word); }
DEVICE uint32_t pack_word(bool by_row, bool by_column, bool positive, float sigmoid) {
    return static_cast<uint32_t>(by_row) << kKeptByRow | static_cast<uint32_t>(by_column) << kKeptByColumn |
           static_cast<uint32_t>(positive) << kPositive |
           static_cast<uint32_t>(to_f16_bits(sigmoid * kSigmoidScale)) << kSigmoid;
}
// kSigmoidScale times the sigmoid.
DEVICE float word_sigmoid(uint32_t word) { return from_f16_bits(static_cast<uint16_t>(word >> kSigmoid)); }
// A sigmoid rounded as in a word.
DEVICE float rounded_sigmoid(float sigmoid) { return from_f16_bits(to_f16_bits(sigmoid * kSigmoidScale)) / kSigmoidScale; }

#endif
