// order.cpp: the class order of a copy of kernels/ under many schedules, against a stable sort.
// tests/emulation.rs plants a fault in the copy: blocks that count without an atomic instruction,
// which the emulation's blocks, one after the other, get right. Prints what differs and exits 1.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "emulation/machine.h"
#include "params.h"

int main(int argc, char **argv) {
    uint64_t seeds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
    const uint32_t count = 2100, tiles = (count + ORDER_TILE - 1) / ORDER_TILE;
    std::vector<int64_t> labels(count);
    for (uint32_t i = 0; i < count; ++i) labels[i] = static_cast<int64_t>(i * 7919 % 41) - 3;
    std::vector<uint32_t> want(count);
    for (uint32_t i = 0; i < count; ++i) want[i] = i;
    // Ignored labels, which are negative, come last: as unsigned numbers they are the largest.
    auto key = [&](uint32_t i) { return labels[i] < 0 ? UINT64_MAX : static_cast<uint64_t>(labels[i]); };
    std::stable_sort(want.begin(), want.end(), [&](uint32_t a, uint32_t b) { return key(a) < key(b); });
    auto valid_rows = static_cast<uint32_t>(std::count_if(labels.begin(), labels.end(), [](int64_t label) { return label >= 0; }));
    for (uint64_t seed = 0; seed < seeds; ++seed) {
        std::vector<uint64_t> sorted_labels(tiles * ORDER_TILE), keys(count);
        std::vector<uint32_t> sorted_indices(tiles * ORDER_TILE), order(count);
        uint32_t valid = 0;
        OrderParams params{};
        params.labels = labels.data();
        params.count = count;
        params.tiles = tiles;
        params.sorted_labels = sorted_labels.data();
        params.sorted_indices = sorted_indices.data();
        params.keys = keys.data();
        params.order = order.data();
        params.valid = &valid;
        const uint32_t grid[3] = {tiles, 1, 1};
        for (const char *kernel : {"order_tiles", "order_merge"}) {
            if (emulation::launch(kernel, grid, THREADS, ORDER_SHARED_BYTES, &params, sizeof params, seed)) return 2;
        }
        if (order == want && valid == valid_rows) continue;
        std::printf("seed %llu: another order than want, or %u valid rows, want %u\n", static_cast<unsigned long long>(seed), valid,
                    valid_rows);
        return 1;
    }
    return 0;
}
