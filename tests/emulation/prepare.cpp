// prepare.cpp: checks Hopper's preparation of split rows in a copy of kernels/, under many schedules. The kernel writes the rows
// to global memory and reads them back by bulk copies for the products of rows with themselves, which are checked.
// tests/emulation plants faults in the copy. Prints the first difference and exits 1. Small integers keep every sum exact.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "pairs/pairs.cuh"
#include "tile/mma_tile.cuh"

namespace {

constexpr uint32_t kRows = 200, kDim = 150, kStride = 192, kTiles = (kRows + TILE - 1) / TILE;

int check(uint64_t seed, std::vector<uint16_t> &prepared) {
    std::vector<float> rows(kRows * kDim), want(kTiles * TILE, 0.0f);
    auto next = static_cast<uint32_t>(seed) + 1;
    for (size_t i = 0; i < rows.size(); ++i) {
        next = next * 1664525u + 1013904223u;
        rows[i] = static_cast<float>(static_cast<int>(next >> 29) - 4);
        want[i / kDim] += rows[i] * rows[i];
    }
    std::vector<float> bounds(want.size(), -1.0f);
    std::vector<double> square_sums(kRows);
    uint32_t bad = NO_ROW;
    PrepareParams params{};
    params.input = rows.data();
    params.rows = prepared.data();
    params.count = kRows;
    params.dim = kDim;
    params.stride = kStride;
    params.square_sums = square_sums.data();
    params.bad = &bad;
    params.duplicate = bounds.data();
    const uint32_t grid[3] = {kTiles, 1, 1};
    if (emulation::launch("prepare_hopper_f32", grid, THREADS, SIMILARITY_STAGES_BYTES, &params, sizeof params, seed)) return 2;
    for (size_t i = 0; i < want.size(); ++i) {
        auto bound = static_cast<float>(kDuplicate * static_cast<double>(want[i]));
        if (bounds[i] == bound) continue;
        std::printf("seed %llu, row %zu: got %g, want %g\n", static_cast<unsigned long long>(seed), i, static_cast<double>(bounds[i]),
                    static_cast<double>(bound));
        return 1;
    }
    return 0;
}

}  // namespace

int main(int argc, char **argv) {
    uint64_t seeds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
    std::vector<uint16_t> prepared(static_cast<size_t>(kTiles) * TILE * kStride * 2, 0x7e00);
    emulation::watch_global(prepared.data(), prepared.size() * sizeof prepared[0]);
    for (uint64_t seed = 0; seed < seeds; ++seed) {
        if (int failed = check(seed, prepared)) return failed;
    }
    return 0;
}
