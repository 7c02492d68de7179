// gradient.cpp: Hopper's product of the gradient, of a copy of kernels/, under many schedules,
// against a double loop. tests/emulation.rs plants faults in the copy. Prints what differs and
// exits 1. Five tiles of references, so that both buffers are filled again; one of them is
// recomputed and one has no candidates. All numbers are small integers: every sum is exact.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "emulation/machine.h"
#include "params.h"

namespace {

constexpr uint32_t kAnchors = 100, kReferences = 5 * TILE - 40, kStride = 192, kCapacity = TILE * TILE / 2;
constexpr uint32_t kRecomputed = 2, kEmpty = 3;  // tiles of references

// Place of an element of a prepared row of 16-bit numbers: [tile, stage of 128 bytes, row, swizzled granule of 16].
size_t place(size_t row, size_t d) {
    size_t granule = (d % 64 / 8) ^ (row % 8);
    return row / TILE * TILE * kStride + d / 64 * TILE * 64 + row % TILE * 64 + granule * 8 + d % 8;
}

struct Rows {
    std::vector<uint16_t> prepared;
    std::vector<float> values;
    Rows(uint32_t count, uint32_t seed)
        : prepared(static_cast<size_t>((count + TILE - 1) / TILE) * TILE * kStride), values(static_cast<size_t>(count) * kStride) {
        for (size_t i = 0; i < values.size(); ++i) {
            seed = seed * 1664525u + 1013904223u;
            values[i] = static_cast<float>(seed >> 24) / 32.0f;
            values[i] = static_cast<float>(static_cast<int>(values[i]) - 4);  // -4 to 3
            prepared[place(i / kStride, i % kStride)] = to_bf16_bits(values[i]);
        }
    }
    float product(const Rows &other, size_t i, size_t j) const {
        float sum = 0.0f;
        for (size_t d = 0; d < kStride; ++d) sum += values[i * kStride + d] * other.values[j * kStride + d];
        return sum;
    }
};

}  // namespace

int main(int argc, char **argv) {
    uint64_t seeds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
    Rows anchors(kAnchors, 1), references(kReferences, 2);
    // No pair is of one class, alpha 0 makes every sigmoid 1/2, and a pair is mined above a bound.
    const float bound = 40.5f;
    std::vector<ClassRange> classes(kAnchors, ClassRange{1, 0});
    std::vector<RowWeights> weights(TILE);
    for (uint32_t i = 0; i < TILE; ++i) weights[i] = RowWeights{-INFINITE, bound, 0.0f, static_cast<float>(2 * (i % 3 + 1))};
    std::vector<uint32_t> counts(5, 0);
    std::vector<float> values(5 * kCapacity);
    std::vector<uint16_t> places(5 * kCapacity);
    std::vector<float> want(static_cast<size_t>(TILE) * kStride, 0.0f);
    for (uint32_t i = 0; i < kAnchors; ++i) {
        for (uint32_t j = 0; j < kReferences; ++j) {
            float s = anchors.product(references, i, j);
            uint32_t tile = j / TILE;
            if (s <= bound || tile == kEmpty) continue;
            if (counts[tile] == kCapacity) return 3;
            values[tile * kCapacity + counts[tile]] = s;
            places[tile * kCapacity + counts[tile]++] = static_cast<uint16_t>(i * TILE + j % TILE);
            float weight = static_cast<float>(i % 3 + 1);
            for (uint32_t d = 0; d < kStride; ++d) want[i * kStride + d] += weight * references.values[j * kStride + d];
        }
    }
    counts[kRecomputed] = kCapacity + 1;

    Counters counters{};
    counters.valid_anchors = kAnchors;
    counters.valid_references = kReferences;
    GradientParams params{};
    params.pairs.anchors = Side{anchors.prepared.data(), nullptr, nullptr, kAnchors, 1};
    params.pairs.references = Side{references.prepared.data(), nullptr, nullptr, kReferences, 5};
    params.pairs.stride = kStride;
    params.pairs.dim = kStride;
    params.pairs.tile_capacity = kCapacity;
    params.pairs.tiles = 5;
    params.pairs.classes = classes.data();
    params.pairs.counters = &counters;
    params.pairs.weights = weights.data();
    params.pairs.tile_counts = counts.data();
    params.pairs.tile_values = values.data();
    params.pairs.tile_places = places.data();
    params.splits = 1;
    params.weight_scale = 1.0f;
    const uint8_t ways[1] = {0};
    params.ways = ways;
    for (uint64_t seed = 0; seed < seeds; ++seed) {
        std::vector<float> got(static_cast<size_t>(TILE) * kStride, -1.0f);
        params.partial = got.data();
        const uint32_t grid[3] = {1, 1, 1};
        if (emulation::launch("gradient_tiles_hopper_bf16", grid, GRADIENT_HOPPER_SHARED_BYTES, &params, sizeof params, seed)) return 2;
        for (size_t i = 0; i < got.size(); ++i) {
            if (got[i] == want[i]) continue;
            std::printf("seed %llu, row %zu, column %zu: got %g, want %g\n", static_cast<unsigned long long>(seed), i / kStride,
                        i % kStride, static_cast<double>(got[i]), static_cast<double>(want[i]));
            return 1;
        }
    }
    return 0;
}
