// sweep.cpp: checks the order of tiles, then Hopper's sweep in a copy of kernels/, under many schedules, against a double loop; of
// the sweep of other GPUs, if it is compiled too, only how much it multiplies.
// tests/emulation plants faults in the copy. Prints the first difference and exits 1.
// Two blocks walk five row tiles, the last of ignored rows only, so that both teams' stages, the row tile and the staged values
// are filled many times; one tile has more candidates than are staged at once, and in half of the runs the pool is too small.
// All numbers are small integers, so every sum is exact. With split rows, low parts are such integers / 256; the product of two
// low parts, which no kernel computes, is left out.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "pairs/tile_order.cuh"
#include "tile/mma_tile.cuh"

namespace {

constexpr uint32_t kRows = 5 * TILE - 40, kValid = 4 * TILE - 30, kTiles = 5, kClass = 5;
constexpr uint32_t kAll = kTiles * (kTiles + 1) / 2, kCapacity = TILE * TILE, kBand = 2;

uint32_t stride = 0, parts = 1;  // of the rows that are checked now; 2 parts: high and low

// Place of an element of a prepared row of 16-bit numbers: [tile, stage of 128 bytes, row, swizzled granule of 16].
size_t place(size_t row, size_t d, uint32_t part) {
    size_t granule = (d % 64 / 8) ^ (row % 8);
    return row / TILE * TILE * stride * parts + (d / 64 * parts + part) * TILE * 64 + row % TILE * 64 + granule * 8 + d % 8;
}

struct Want {
    std::vector<uint32_t> counts, masks, max_neg;
    std::vector<float> values;
    uint64_t probe = 0;
};

// The expected result: candidates in the order of threads, and of bits within a thread.
Want expect(const std::vector<float> &s, const Pairs &pairs) {
    Want want;
    want.max_neg.assign(kRows, 0);
    want.masks.assign(kAll * TILE_MASK_WORDS, 0);
    want.values.assign(size_t{kAll} * kCapacity, 0.0f);
    auto bound = [&](uint32_t i, double tolerance) { return static_cast<float>(static_cast<double>(pairs.same[i].min_pos) - tolerance); };
    for (uint32_t x = 0; x < kTiles; ++x) {
        for (uint32_t y = x; y < kTiles; ++y) {
            uint32_t tile = static_cast<uint32_t>(want.counts.size()), count = 0;
            for (uint32_t thread = 0; thread < THREADS; ++thread) {
                for (uint32_t bit = 0; bit < 64; ++bit) {
                    uint32_t c = bit % 32;
                    uint32_t i = x * TILE + thread / 32 * 16 + bit / 32 * 8 + thread % 32 / 4;
                    uint32_t j = y * TILE + c / 2 * 8 + thread % 4 * 2 + c % 2;
                    if (i >= j || j >= kValid) continue;
                    float value = s[size_t{i} * kRows + j];
                    bool candidate = true;
                    if (i / kClass != j / kClass) {
                        for (uint32_t row : {i, j}) want.max_neg[row] = std::max(want.max_neg[row], ordered_key(value));
                        want.probe += (value > bound(i, pairs.settings.probe)) + (value > bound(j, pairs.settings.probe));
                        candidate = value > bound(i, pairs.settings.candidate) || value > bound(j, pairs.settings.candidate);
                    }
                    if (!candidate) continue;
                    want.masks[tile * TILE_MASK_WORDS + thread * 2 + bit / 32] |= 1u << c;
                    if (count < kCapacity) want.values[size_t{tile} * kCapacity + count] = value;
                    ++count;
                }
            }
            want.counts.push_back(count);
        }
    }
    return want;
}

int differ(const char *what, size_t at, double got, double want, uint64_t seed) {
    std::printf("stride %u, seed %llu, %s %zu: got %g, want %g\n", stride, static_cast<unsigned long long>(seed), what, at, got, want);
    return 1;
}

// Products of the tiles that have pairs, and no others: the last row tile has only ignored rows.
int multiplied(uint64_t products, uint64_t seed) {
    uint64_t tiles = (kTiles - 1) * kTiles / 2, of_parts = parts == 1 ? 1 : 3, want = tiles * TILE * TILE * stride * of_parts;
    return products == want ? 0 : differ("products", 0, static_cast<double>(products), static_cast<double>(want), seed);
}

int check(uint64_t seeds) {
    std::vector<uint16_t> prepared(size_t{kTiles} * TILE * stride * parts);
    std::vector<float> rows[2];
    uint32_t random = 1;
    for (uint32_t part = 0; part < 2; ++part) {
        rows[part].assign(size_t{kRows} * stride, 0.0f);
        if (part == parts) break;  // there are no low parts
        for (size_t i = 0; i < rows[part].size(); ++i) {
            random = random * 1664525u + 1013904223u;
            float value = static_cast<float>(static_cast<int>(random >> 29) - 4);  // -4 to 3
            if (part == 1) value /= 256.0f;
            rows[part][i] = value;
            prepared[place(i / stride, i % stride, part)] = parts == 1 ? to_bf16_bits(value) : to_f16_bits(value * kRowScale);
        }
    }
    std::vector<float> s(size_t{kRows} * kRows, 0.0f);
    for (size_t i = 0; i < kRows; ++i) {
        for (size_t j = i; j < kRows; ++j) {
            float sum = 0.0f;
            for (size_t d = 0; d < stride; ++d) {
                size_t a = i * stride + d, b = j * stride + d;
                sum += rows[0][a] * rows[0][b] + (rows[0][a] * rows[1][b] + rows[1][a] * rows[0][b]);
            }
            s[i * kRows + j] = sum;
        }
    }
    std::vector<ClassRange> classes(kRows, ClassRange{1, 0});
    std::vector<RowSame> same(kRows, RowSame{INFINITE, 0, 0.0f, 0.0f});
    for (uint32_t i = 0; i < kValid; ++i) {
        uint32_t begin = i / kClass * kClass;
        classes[i] = ClassRange{begin, std::min(begin + kClass, kValid)};
        // Few candidates, except in the second row tile.
        same[i].min_pos = static_cast<float>(i / TILE == 1 ? stride / 4 : stride + i % 50);
    }
    for (uint64_t seed = 0; seed < seeds; ++seed) {
        std::vector<uint32_t> counts(kAll, 77), segments(kAll, 77), max_neg(kRows, 0);
        Counters counters{};
        counters.valid_anchors = counters.valid_references = kValid;
        PairsParams params{};
        Pairs &pairs = params.pairs;
        pairs.anchors = pairs.references = Side{prepared.data(), nullptr, nullptr, kRows, kTiles};
        pairs.square = 1;
        pairs.stride = pairs.dim = stride;
        pairs.band = kBand;
        pairs.tiles = kAll;
        pairs.classes = classes.data();
        pairs.same = same.data();
        pairs.max_neg = max_neg.data();
        pairs.counters = &counters;
        pairs.tile_counts = counts.data();
        pairs.tile_segments = segments.data();
        // The probe's bound equals the candidates' in every other run.
        pairs.settings.candidate = 0.5;
        pairs.settings.probe = seed % 2 ? 0.5 : -4.5;
        Want want = expect(s, pairs);
        uint64_t asked = 0;
        for (uint32_t count : want.counts) asked += count == 0 ? 0 : (std::max<uint32_t>(count, TILE_MASK_WORDS) + 3) / 4;
        // Room for all candidates, or for half of them.
        pairs.pool = static_cast<uint32_t>(seed % 4 < 2 ? asked : asked / 2);
        std::vector<uint32_t> words(size_t{pairs.pool} * 4, 77);
        std::vector<float> values(words.size(), -1.0f);
        pairs.pool_words = words.data();
        pairs.pool_values = values.data();
        const uint32_t grid[3] = {2, 1, 1};
        int failed = parts == 1 ? emulation::launch("sweep_hopper_bf16", grid, SWEEP_HOPPER_THREADS, SWEEP_HOPPER_SHARED_BYTES, &params,
                                                    sizeof params, seed)
                                : emulation::launch("sweep_hopper_f32", grid, SWEEP_HOPPER_EXACT_THREADS, SWEEP_HOPPER_EXACT_SHARED_BYTES, &params,
                                                    sizeof params, seed);
        if (failed) return 2;
        if (int wrong = multiplied(emulation::products(), seed)) return wrong;
        bool windows = false;
        uint64_t stored = 0;
        if (counters.pool_units != asked) return differ("units", 0, static_cast<double>(counters.pool_units), static_cast<double>(asked), seed);
        for (uint32_t tile = 0; tile < kAll; ++tile) {
            uint32_t count = want.counts[tile];
            windows |= count > SWEEP_HOPPER_STAGED;
            if (counts[tile] != count) return differ("count", tile, counts[tile], count, seed);
            if (count == 0 && segments[tile] != NO_ROW) return differ("segment", tile, segments[tile], NO_ROW, seed);
            if (segments[tile] == NO_ROW) continue;
            ++stored;
            size_t segment = size_t{segments[tile]} * 4;
            for (uint32_t word = 0; word < TILE_MASK_WORDS; ++word) {
                uint32_t got = words[segment + word], mask = want.masks[tile * TILE_MASK_WORDS + word];
                if (got != mask) return differ("mask", tile * TILE_MASK_WORDS + word, got, mask, seed);
            }
            for (uint32_t k = 0; k < count; ++k) {
                size_t at = size_t{tile} * kCapacity + k;
                if (values[segment + k] != want.values[at]) return differ("value", at, values[segment + k], want.values[at], seed);
            }
        }
        auto with_any = static_cast<uint64_t>(kAll - std::count(counts.begin(), counts.end(), 0u));
        if (!windows || stored == 0 || (stored == with_any) != (pairs.pool == asked)) return 3;
        for (uint32_t i = 0; i < kRows; ++i) {
            if (max_neg[i] != want.max_neg[i]) return differ("m-", i, key_value(max_neg[i]), key_value(want.max_neg[i]), seed);
        }
        if (counters.probe_neg != want.probe) {
            return differ("probe", 0, static_cast<double>(counters.probe_neg), static_cast<double>(want.probe), seed);
        }
        if (seed != 0) continue;
        const uint32_t all[3] = {kAll, 1, 1};
        bool other = parts == 1 ? emulation::launch("sweep_bf16", all, THREADS, SWEEP_SHARED_BYTES, &params, sizeof params, seed) == 0
                                : emulation::launch("sweep_f32", all, THREADS, SWEEP_EXACT_SHARED_BYTES, &params, sizeof params, seed) == 0;
        if (int wrong = other ? multiplied(emulation::products(), seed) : 0) return wrong;
    }
    return 0;
}

// tile_at() and next_tile() must visit every tile once, in the same order, whatever the band.
int check_order() {
    for (uint32_t square : {0u, 1u}) {
        for (uint32_t band : {1u, 2u, 4u, 8u, 16u}) {
            for (uint32_t columns : {1u, 5u, 8u, 13u}) {
                Pairs pairs{};
                pairs.square = square;
                pairs.band = band;
                pairs.references.tiles = columns;
                pairs.anchors.tiles = square ? columns : 3;
                uint32_t all = square ? columns * (columns + 1) / 2 : 3 * columns;
                std::vector<uint32_t> seen(all, 0);
                TileIndex tile = tile_at(pairs, 0);
                for (uint32_t position = 0; position < all; ++position) {
                    TileIndex here = tile_at(pairs, position);
                    bool there = here.row < pairs.anchors.tiles && here.column < columns && (!square || here.row <= here.column);
                    if (!there || here.row != tile.row || here.column != tile.column || seen[index_of(pairs, here.row, here.column)]++) {
                        std::printf("square %u, band %u, %u columns, place %u: got another tile than want\n", square, band, columns, position);
                        return 1;
                    }
                    tile = next_tile(pairs, tile);
                }
            }
        }
    }
    return 0;
}

}  // namespace

int main(int argc, char **argv) {
    uint64_t seeds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
    if (int failed = check_order()) return failed;
    // Row tiles that stay in shared memory, of fewer and of more stages than the ring has; then one that does not fit.
    for (uint32_t width : {192u, 320u, 576u}) {
        stride = width;
        if (int failed = check(width > 512 ? (seeds + 3) / 4 : seeds)) return failed;
    }
    // Split rows of one k block, which takes fewer stages than the ring has; of more; and too wide to stay.
    parts = 2;
    for (uint32_t width : {64u, 192u, 576u}) {
        stride = width;
        if (int failed = check((seeds + 3) / 4)) return failed;
    }
    return 0;
}
