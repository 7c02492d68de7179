// gradient.cpp: checks Hopper's gradient product in a copy of kernels/, under many schedules, against a double loop;
// tests/emulation plants faults in the copy. Prints the first difference and exits 1.
// There are nine tiles of references, so that every buffer is filled again; two tiles are recomputed and one has no candidates.
// Every other seed uses two splits, of which the later adds both; rows are written in the caller's order, here the reverse.
// All numbers are small integers, so every sum is exact. With split rows, low parts are such integers / 256 and weights have low
// parts of 2^-12; the product of two low parts, which no kernel computes, is left out.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "gradient/weight_tile.cuh"

namespace {

constexpr uint32_t kAnchors = 100, kTiles = 9, kReferences = kTiles * TILE - 40, kCapacity = TILE * TILE / 2;
constexpr uint32_t kRecomputed[] = {4, 6}, kEmpty = 3;  // tiles of references

#ifndef PARTS
#define PARTS 1
#endif
constexpr uint32_t parts = PARTS;  // 2: rows are split into high and low parts (gradient_split.cpp)
uint32_t stride = 0;               // of the rows that are checked now

// Place of an element of a prepared row of 16-bit numbers: [tile, stage of 128 bytes, row, swizzled granule of 16].
size_t place(size_t row, size_t d, uint32_t part) {
    size_t granule = (d % 64 / 8) ^ (row % 8);
    return row / TILE * TILE * stride * parts + (d / 64 * parts + part) * TILE * 64 + row % TILE * 64 + granule * 8 + d % 8;
}

// A number in two parts; its product leaves out low * low.
struct Number {
    float high = 0.0f, low = 0.0f;
    float operator*(const Number &other) const { return high * other.high + (high * other.low + low * other.high); }
};

struct Rows {
    std::vector<uint16_t> prepared;
    std::vector<Number> values;
    Rows(uint32_t count, uint32_t seed)
        : prepared(static_cast<size_t>((count + TILE - 1) / TILE) * TILE * stride * parts), values(static_cast<size_t>(count) * stride) {
        auto next = [&] {
            seed = seed * 1664525u + 1013904223u;
            return static_cast<float>(static_cast<int>(seed >> 29) - 4);  // -4 to 3
        };
        for (size_t i = 0; i < values.size(); ++i) {
            Number &value = values[i];
            value.high = next();
            if (parts == 2) value.low = next() / 256.0f;
            size_t row = i / stride, d = i % stride;
            prepared[place(row, d, 0)] = parts == 1 ? to_bf16_bits(value.high) : to_f16_bits(value.high * kRowScale);
            if (parts == 2) prepared[place(row, d, 1)] = to_f16_bits(value.low * kRowScale);
        }
    }
    float product(const Rows &other, size_t i, size_t j) const {
        float sum = 0.0f;
        for (size_t d = 0; d < stride; ++d) sum += values[i * stride + d] * other.values[j * stride + d];
        return sum;
    }
};

// Weight of each mined pair of anchor i.
float weight_of(uint32_t i) {
    auto whole = static_cast<float>(i % 3 + 1);
    return parts == 1 ? whole : whole * (1.0f + 1.0f / 4096.0f);
}

int check(uint64_t seeds) {
    Rows anchors(kAnchors, 1), references(kReferences, 2);
    // Every pair is negative and mined above `bound`; alpha 0 makes every sigmoid 1/2.
    const float bound = 40.5f;
    std::vector<ClassRange> classes(kAnchors, ClassRange{1, 0});
    std::vector<RowWeights> weights(TILE);
    for (uint32_t i = 0; i < TILE; ++i) weights[i] = RowWeights{-INFINITE, bound, 0.0f, 2.0f * weight_of(i)};
    std::vector<uint32_t> counts(kTiles, 0);
    std::vector<uint32_t> words(kTiles * kCapacity), segments(kTiles);
    std::vector<float> similarities(words.size());
    std::vector<float> want(static_cast<size_t>(kAnchors) * stride, 0.0f);
    for (uint32_t i = 0; i < kAnchors; ++i) {
        for (uint32_t j = 0; j < kReferences; ++j) {
            float s = anchors.product(references, i, j);
            uint32_t tile = j / TILE;
            if (s <= bound || tile == kEmpty) continue;
            if (counts[tile] == kCapacity) return 3;
            Number weight{weight_of(i)};
            uint32_t at = tile * kCapacity + counts[tile]++;
            similarities[at] = s;
            if (parts == 1) {
                words[at] = matrix_offset<Bf16Rows>(i, j % TILE) << 16 | to_bf16_bits(weight.high);
            } else {
                words[at] = (i * TILE + j % TILE) | 1u << kKeptByRow;
                Halves halves = split(weight.high, 0.0f);
                weight = Number{from_f16_bits(static_cast<uint16_t>(halves.high)), from_f16_bits(static_cast<uint16_t>(halves.low))};
            }
            for (uint32_t d = 0; d < stride; ++d) want[i * stride + d] += weight * references.values[j * stride + d];
        }
    }
    for (uint32_t tile = 0; tile < kTiles; ++tile) segments[tile] = tile * kCapacity / 4;
    for (uint32_t tile : kRecomputed) segments[tile] = NO_ROW;
    std::vector<uint32_t> order(kAnchors);
    for (uint32_t i = 0; i < kAnchors; ++i) order[i] = kAnchors - 1 - i;

    Counters counters{};
    counters.valid_anchors = kAnchors;
    counters.valid_references = kReferences;
    counters.bad_anchor = counters.bad_reference = NO_ROW;
    counters.largest_weight = bits_of(weight_of(2));
    GradientParams params{};
    params.pairs.anchors = Side{anchors.prepared.data(), order.data(), nullptr, kAnchors, 1};
    params.pairs.references = Side{references.prepared.data(), nullptr, nullptr, kReferences, kTiles};
    params.pairs.stride = stride;
    params.pairs.dim = stride;
    params.pairs.tiles = kTiles;
    params.pairs.classes = classes.data();
    params.pairs.counters = &counters;
    params.pairs.weights = weights.data();
    params.pairs.tile_counts = counts.data();
    params.pairs.tile_segments = segments.data();
    params.pairs.pool_words = words.data();
    params.pairs.pool_values = similarities.data();
    params.weight_scale = 1.0f;
    const uint8_t by_lists[1] = {0};
    params.by_lists = by_lists;
    for (uint64_t seed = 0; seed < seeds; ++seed) {
        std::vector<float> gradient(want.size(), -1.0f), partial(2 * static_cast<size_t>(TILE) * stride, -1.0f);
        params.gradient = gradient.data();
        params.partial = partial.data();
        uint32_t arrived = 0;
        params.arrived = &arrived;
        params.splits = 1 + static_cast<uint32_t>(seed % 2);
        const uint32_t grid[3] = {1, 1, params.splits};
        const char *name = parts == 1 ? "gradient_hopper_bf16" : "gradient_hopper_f32";
        uint32_t bytes = parts == 1 ? GRADIENT_HOPPER_SHARED_BYTES : GRADIENT_HOPPER_EXACT_SHARED_BYTES;
        if (emulation::launch(name, grid, GRADIENT_HOPPER_THREADS, bytes, &params, sizeof params, seed)) return 2;
        for (size_t i = 0; i < want.size(); ++i) {
            size_t row = i / stride, column = i % stride;
            float got = gradient[order[row] * stride + column];
            if (got == want[i]) continue;
            std::printf("seed %llu, row %zu, column %zu: got %g, want %g\n", static_cast<unsigned long long>(seed), row, column,
                        static_cast<double>(got), static_cast<double>(want[i]));
            return 1;
        }
    }
    return 0;
}

}  // namespace

int main(int argc, char **argv) {
    uint64_t seeds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
    // The wide product, and the narrow one, with recomputed tiles that do not fill all stages.
    for (uint32_t width : {192u, 128u}) {
        stride = width;
        if (int failed = check(seeds)) return failed;
    }
    return 0;
}
