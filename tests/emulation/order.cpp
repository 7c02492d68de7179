// order.cpp: checks the class order of a copy of kernels/, under many schedules, against a stable sort: of one tile, of several,
// and of more than one launch merges. tests/emulation plants a race in the copy. Prints the difference and exits 1.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "emulation/machine.h"
#include "params.h"

int check_labels(const std::vector<int64_t> &labels, uint64_t seeds) {
    const auto count = static_cast<uint32_t>(labels.size());
    std::vector<uint32_t> want(count);
    for (uint32_t i = 0; i < count; ++i) want[i] = i;
    // Ignored labels, which are negative, come last: as unsigned numbers they are the largest.
    auto key = [&](uint32_t i) { return labels[i] < 0 ? UINT64_MAX : static_cast<uint64_t>(labels[i]); };
    std::stable_sort(want.begin(), want.end(), [&](uint32_t a, uint32_t b) { return key(a) < key(b); });
    auto valid_rows = static_cast<uint32_t>(std::count_if(labels.begin(), labels.end(), [](int64_t label) { return label >= 0; }));
    for (uint64_t seed = 0; seed < seeds; ++seed) {
        std::vector<uint64_t> keys(count), others(count);
        std::vector<uint32_t> order(count), other_order(count);
        uint32_t valid = 1, dirty[3] = {1, 2, 3};
        Counters counters{};
        OrderParams tiles{};
        tiles.labels = labels.data();
        tiles.count = count;
        tiles.keys = others.data();
        tiles.order = other_order.data();
        tiles.counters = &counters;
        tiles.zeroed[0] = Zeroed{dirty, 3};
        tiles.zeroed[1] = Zeroed{&valid, 1};
        if (count <= ORDER_TILE) tiles.valid = &valid;
        bool wide = count > ORDER_TILE * ORDER_RUNS;  // as order_tile() in plan.rs
        const uint32_t tile = wide ? ORDER_WIDE_TILE : ORDER_TILE;
        const uint32_t keys_of_block = wide ? ORDER_WIDE_TILE : ORDER_OWN;
        const uint32_t tile_grid[3] = {(count + keys_of_block - 1) / keys_of_block, 1, 1}, grid[3] = {(count + ORDER_MERGED - 1) / ORDER_MERGED, 1, 1};
        if (emulation::launch(wide ? "order_tiles_wide" : "order_tiles", tile_grid, wide ? ORDER_WIDE_THREADS : THREADS,
                              wide ? ORDER_WIDE_SHARED_BYTES : ORDER_SHARED_BYTES, &tiles, sizeof tiles, seed)) {
            return 2;
        }
        for (uint64_t run = tile; run < count; run *= ORDER_RUNS) {
            keys.swap(others);
            order.swap(other_order);
            MergeParams merge{keys.data(), order.data(), others.data(), other_order.data(), count, static_cast<uint32_t>(run), nullptr, nullptr};
            if (run * ORDER_RUNS >= count) merge.valid = &valid;
            if (emulation::launch("order_merge", grid, THREADS, ORDER_MERGE_SHARED_BYTES, &merge, sizeof merge, seed)) return 2;
        }
        bool begun = dirty[0] == 0 && dirty[2] == 0 && counters.bad_anchor == NO_ROW;
        bool sorted = true;
        for (uint32_t i = 0; i < count; ++i) sorted = sorted && others[i] == key(want[i]);
        if (other_order == want && sorted && valid == valid_rows && begun) continue;
        std::printf("%u rows, seed %llu: another order than want, or %u valid rows, want %u\n", count,
                    static_cast<unsigned long long>(seed), valid, valid_rows);
        return 1;
    }
    return 0;
}

// Labels in disorder: `classes` of them, up to `largest`, and three that are ignored.
int check(uint32_t count, uint64_t seeds, int64_t largest = 37, int64_t classes = 38) {
    std::vector<int64_t> labels(count);
    for (uint32_t i = 0; i < count; ++i) {
        labels[i] = static_cast<int64_t>(static_cast<uint64_t>(i) * 2654435761 % static_cast<uint64_t>(classes + 3)) - 3;
        if (labels[i] >= 0) labels[i] += largest - classes + 1;
    }
    return check_labels(labels, seeds);
}

int main(int argc, char **argv) {
    uint64_t seeds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
    for (uint32_t count : {1u, 130u, 2048u, 5000u}) {
        if (int failed = check(count, seeds)) return failed;
    }
    // The largest labels that are compared as f32, then larger ones, which f32 cannot tell apart.
    for (int64_t largest : {(int64_t{1} << 23) - 1, int64_t{1} << 23, int64_t{1} << 62}) {
        if (int failed = check(2000, 1, largest)) return failed;
    }
    // Few rows a class: the keys of a block are spread over the runs.
    if (int failed = check(20000, 1, 6999, 7000)) return failed;
    // A run with few labels of its own among others that have one: between its keys are whole runs.
    std::vector<int64_t> uneven(10000, 5);
    for (uint32_t i = 0; i < 10000; i += i < 2048 || i >= 8192 ? 16 : 1024) uneven[i] = i % 3 == 0 ? -1 : i % 11;
    if (int failed = check_labels(uneven, 1)) return failed;
    // Wide tiles: with one merge, then with two.
    if (int failed = check(ORDER_TILE * ORDER_RUNS + 3000, 1, 9999, 10000)) return failed;
    return check(ORDER_WIDE_TILE * ORDER_RUNS + 3000, 1);
}
