// retrieval.cpp: checks the retrieval kernels of a copy of kernels/, under many schedules, against a double loop.
// tests/emulation plants faults in the copy, also in mma_tile.cuh's pipeline, which all passes share. Prints the first difference
// and exits 1.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "emulation/machine.h"
#include "params.h"

namespace {

constexpr uint32_t kQueries = 130, kReferences = 200, kStride = 320, kCount = 5;

uint32_t tiles(uint32_t rows) { return (rows + TILE - 1) / TILE; }

// Place of an element of a prepared row: [tile, stage of 128 bytes, row, swizzled granule of 16].
size_t place(size_t row, size_t d) {
    size_t granule = (d % 64 / 8) ^ (row % 8);
    return row / TILE * TILE * kStride + d / 64 * TILE * 64 + row % TILE * 64 + granule * 8 + d % 8;
}

// Rows of small integers: exact in f16, and every sum is exact in any order.
std::vector<float> rows(uint32_t count, uint32_t seed) {
    std::vector<float> values(static_cast<size_t>(tiles(count)) * TILE * kStride, 0.0f);
    for (size_t i = 0; i < static_cast<size_t>(count) * kStride; ++i) {
        seed = seed * 1664525u + 1013904223u;
        values[place(i / kStride, i % kStride)] = static_cast<float>(seed >> 24) - 128.0f;
    }
    return values;
}

std::vector<uint16_t> in_f16(const std::vector<float> &values) {
    std::vector<uint16_t> narrow(values.size());
    std::transform(values.begin(), values.end(), narrow.begin(), to_f16_bits);
    return narrow;
}

struct Search {
    const char *name;
    uint32_t threads, shared_bytes, splits, k, kept, leave_self_out;
};

// Whether a double loop finds the same neighbours.
bool agrees(const Search &search, uint64_t seed, const std::vector<float> &queries, const std::vector<float> &references,
            const std::vector<uint32_t> &indices, const std::vector<float> &similarities) {
    for (uint32_t q = 0; q < kQueries; ++q) {
        std::vector<std::pair<double, uint32_t>> all;
        for (uint32_t r = 0; r < kReferences; ++r) {
            double sum = 0.0;
            for (uint32_t d = 0; d < kStride; ++d) {
                sum += static_cast<double>(queries[place(q, d)]) * static_cast<double>(references[place(r, d)]);
            }
            if (!search.leave_self_out || q != r) all.emplace_back(-sum, r);
        }
        std::sort(all.begin(), all.end());
        for (uint32_t i = 0; i < search.k; ++i) {
            uint32_t at = q * search.k + i;
            if (indices[at] == all[i].second && similarities[at] == static_cast<float>(-all[i].first)) continue;
            std::printf("%s, seed %llu, query %u, place %u: got %u (%g), want %u (%g)\n", search.name,
                        static_cast<unsigned long long>(seed), q, i, indices[at], static_cast<double>(similarities[at]),
                        all[i].second, -all[i].first);
            return false;
        }
    }
    return true;
}

}  // namespace

int main(int argc, char **argv) {
    uint64_t seeds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
    const uint32_t capacity = 512;
    std::vector<float> queries = rows(kQueries, 1), references = rows(kReferences, 2);
    std::vector<uint16_t> narrow_queries = in_f16(queries), narrow_references = in_f16(references);
    // Lists that a bound keeps short (k = 5), and lists that are cut (k = 70).
    const Search searches[] = {
        {"retrieval_f16", THREADS, SHARING_STAGES_BYTES, 1, 5, 10, 0},
        {"retrieval_f16", THREADS, SHARING_STAGES_BYTES, 2, 70, 91, 1},
        {"retrieval_hopper_f16", SWEEP_HOPPER_THREADS, RETRIEVAL_HOPPER_SHARED_BYTES, 2, 5, 10, 0},
        {"retrieval_hopper_f16", SWEEP_HOPPER_THREADS, RETRIEVAL_HOPPER_SHARED_BYTES, 1, 70, 91, 1},
    };
    for (uint64_t seed = 0; seed < seeds; ++seed) {
        const Search &search = searches[seed % 4];
        const uint32_t lists = 2 * search.splits;
        std::vector<uint64_t> keys(static_cast<size_t>(tiles(kQueries)) * TILE * lists * capacity);
        std::vector<uint32_t> counts(static_cast<size_t>(tiles(kQueries)) * TILE * lists);
        std::vector<uint32_t> indices(kQueries * search.k);
        std::vector<float> similarities(kQueries * search.k);
        RetrievalParams params{};
        params.queries = narrow_queries.data();
        params.references = narrow_references.data();
        params.query_count = kQueries;
        params.reference_count = kReferences;
        params.stride = kStride;
        params.k = search.k;
        params.kept = search.kept;
        params.capacity = capacity;
        params.leave_self_out = search.leave_self_out;
        params.splits = search.splits;
        params.lists = lists;
        params.keys = keys.data();
        params.counts = counts.data();
        params.indices = indices.data();
        params.similarities = similarities.data();
        const uint32_t grid[3] = {tiles(kQueries), search.splits, 1}, merge_grid[3] = {kQueries, 1, 1};
        int launched = emulation::launch(search.name, grid, search.threads, search.shared_bytes, &params, sizeof params, seed);
        if (launched < 0 && search.threads != THREADS) continue;  // a program without that file
        if (launched != 0) return 2;
        const uint32_t merge_bytes = RETRIEVAL_MERGE_EXTRA_BYTES + capacity * 8;
        if (emulation::launch("retrieval_merge", merge_grid, THREADS, merge_bytes, &params, sizeof params, seed)) return 2;
        if (!agrees(search, seed, queries, references, indices, similarities)) return 1;
    }
    return 0;
}
