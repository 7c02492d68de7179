// instructions.cpp: checks the host path of the tensor-core wrappers of device.cuh against plain products.
// The fragment layouts are written down here independently, from the figures of the PTX manual.

#include <cstdio>
#include <vector>

#include "tile/mma_tile.cuh"

struct GroupCheckParams {
    const float *a;  // [128, 64]
    const float *b;  // [256, 64]: columns, inner dimension
    float *c;        // [2, 128, 128]: bf16, f16; products with the first 128 columns
    float *wide;     // [2, 128, 256]: products with all columns, from transposed operands
};

struct CheckParams {
    const float *a;  // [16, 16]
    const float *b;  // [16, 8]
    float *c;        // [2, 16, 8]: bf16, f16
    uint32_t *rows;  // [2, 32, 4]: ldmatrix, transposed
};

namespace {

uint32_t pair(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }

}  // namespace

KERNEL(check_instructions, CheckParams, 1) {
    SHARED_MEMORY(bytes);
    auto *matrices = reinterpret_cast<uint16_t *>(bytes);  // [4, 8, 8], each element is its own index
    matrices[thread_index()] = static_cast<uint16_t>(thread_index());
    block_sync();
    if (warp_index() != 0) return;
    uint32_t lane = lane_index(), group = lane >> 2, member = lane & 3;
    auto a = [&](uint32_t row, uint32_t k) { return p.a[row * 16 + k]; };
    auto b = [&](uint32_t k, uint32_t column) { return p.b[k * 8 + column]; };
    // Registers of A: rows `group` and `group` + 8, then both again for the second half of k; a register holds two k.
    uint32_t wide_a[2][4], wide_b[2][2];
    for (uint32_t r = 0; r < 4; ++r) {
        uint32_t row = group + (r & 1 ? 8 : 0), k = member * 2 + (r & 2 ? 8 : 0);
        wide_a[0][r] = pair(to_bf16_bits(a(row, k)), to_bf16_bits(a(row, k + 1)));
        wide_a[1][r] = pair(to_f16_bits(a(row, k)), to_f16_bits(a(row, k + 1)));
    }
    for (uint32_t r = 0; r < 2; ++r) {
        uint32_t k = member * 2 + r * 8;
        wide_b[0][r] = pair(to_bf16_bits(b(k, group)), to_bf16_bits(b(k + 1, group)));
        wide_b[1][r] = pair(to_f16_bits(b(k, group)), to_f16_bits(b(k + 1, group)));
    }
    float c[2][4] = {{1, 1, 1, 1}, {1, 1, 1, 1}};
    mma_bf16(c[0], wide_a[0], wide_b[0]);
    mma_f16(c[1], wide_a[1], wide_b[1]);
    for (uint32_t kind = 0; kind < 2; ++kind) {
        for (uint32_t i = 0; i < 4; ++i) {
            p.c[kind * 128 + (group + (i & 2 ? 8 : 0)) * 8 + member * 2 + (i & 1)] = c[kind][i];
        }
    }
    uint32_t loaded[4];
    ldmatrix(loaded, matrices + lane * 8);
    for (uint32_t i = 0; i < 4; ++i) p.rows[lane * 4 + i] = loaded[i];
    ldmatrix_transposed(loaded, matrices + lane * 8);
    for (uint32_t i = 0; i < 4; ++i) p.rows[128 + lane * 4 + i] = loaded[i];
}

// Stores the sums of this thread to their places in [128, columns].
template <int n>
DEVICE void store_sums(float *c, const float (&sums)[n][4]) {
    for (uint32_t i = 0; i < n * 4; ++i) {
        uint32_t row = warp_index() * 16 + i % 4 / 2 * 8 + lane_index() / 4;
        uint32_t column = i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
        c[row * n * 8 + column] = sums[i / 4][i % 4];
    }
}

// Checks descriptors, swizzle and deferred products: two warpgroups, 64 rows each, over the whole depth of a stage. Both operands
// are stored twice: as rows of 64 inner dimensions, and transposed as panels of 64 columns.
KERNEL(check_group_products, GroupCheckParams, 1) {
    SHARED_MEMORY(bytes);
    constexpr uint32_t columns = 2 * TILE, inner = 64, panel_bytes = inner * STAGE_BYTES;
    unsigned char *rows = bytes + TILE * STAGE_BYTES, *panels = rows + TILE * STAGE_BYTES;
    unsigned char *turned_rows = panels + columns / 64 * panel_bytes;
    for (int kind = 0; kind < 2; ++kind) {
        auto store = [&](unsigned char *to, float value) {
            *reinterpret_cast<uint16_t *>(to) = kind == 0 ? to_bf16_bits(value) : to_f16_bits(value);
        };
        for (uint32_t i = thread_index(); i < TILE * inner; i += THREADS) {
            uint32_t row = i / inner, k = i % inner, at = swizzled(row, k / 8) + k % 8 * 2;
            store(bytes + at, p.a[i]);
            store(turned_rows + row / 64 * panel_bytes + swizzled(k, row % 64 / 8) + row % 8 * 2, p.a[i]);
            store(rows + at, p.b[i]);
        }
        for (uint32_t i = thread_index(); i < columns * inner; i += THREADS) {
            uint32_t column = i / inner, k = i % inner;
            store(panels + column / 64 * panel_bytes + swizzled(k, column % 64 / 8) + column % 8 * 2, p.b[i]);
        }
        fence_proxy_async();
        block_sync();
        float sums[16][4], wide[32][4];
        for (int i = 0; i < 64; ++i) sums[i / 4][i % 4] = 1.0f;
        for (int i = 0; i < 128; ++i) wide[i / 4][i % 4] = 1.0f;
        Descriptor a = k_major_descriptor(bytes + warp_index() / 4 * (TILE / 2) * STAGE_BYTES);
        Descriptor b = k_major_descriptor(rows), turned = mn_major_descriptor(panels, panel_bytes);
        Descriptor turned_a = mn_major_descriptor(turned_rows + warp_index() / 4 * panel_bytes, panel_bytes);
        wgmma_fence();
        for (uint32_t step = 0; step < inner / 16; ++step) {
            Descriptor left = advance(a, step * 32), right = advance(b, step * 32);
            Descriptor above = advance(turned_a, step * 16 * STAGE_BYTES), below = advance(turned, step * 16 * STAGE_BYTES);
            if (kind == 0) {
                wgmma_bf16<false, false>(sums, left, right);
                wgmma_bf16<true, true>(wide, above, below);
            } else {
                wgmma_f16<false, false>(sums, left, right);
                wgmma_f16<true, true>(wide, above, below);
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
        store_sums(p.c + kind * TILE * TILE, sums);
        store_sums(p.wide + kind * TILE * columns, wide);
        block_sync();
    }
}

// Number of warpgroup products that differ from plain ones.
int check_group_products() {
    std::vector<float> a(TILE * 64), b(2 * TILE * 64), c(2 * TILE * TILE, -1.0f), wide(2 * TILE * 2 * TILE, -1.0f);
    for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(static_cast<int>(i * 7 % 13) - 6);
    for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(static_cast<int>(i * 5 % 11) - 5);
    GroupCheckParams params{a.data(), b.data(), c.data(), wide.data()};
    const uint32_t grid[3] = {1, 1, 1};
    uint32_t bytes = 2 * TILE * STAGE_BYTES + (4 + 2) * 64 * STAGE_BYTES;
    if (emulation::launch("check_group_products", grid, THREADS, bytes, &params, sizeof params, 1)) return 1;
    int wrong = 0;
    auto check = [&](const char *name, const std::vector<float> &got, size_t columns) {
        for (size_t i = 0; i < got.size(); ++i) {
            size_t row = i / columns % TILE, column = i % columns;
            float want = 1.0f;
            for (size_t k = 0; k < 64; ++k) want += a[row * 64 + k] * b[column * 64 + k];
            if (got[i] == want) continue;
            if (++wrong < 5) std::printf("%s (%zu, %zu): got %g, want %g\n", name, row, column, static_cast<double>(got[i]), static_cast<double>(want));
        }
    };
    check("group product", c, TILE);
    check("transposed group product", wide, 2 * TILE);
    return wrong;
}

int main() {
    // Small integers are exact in every type, and so is every sum.
    std::vector<float> a(16 * 16), b(16 * 8), c(2 * 128, -1.0f);
    std::vector<uint32_t> rows(256);
    for (int i = 0; i < 256; ++i) a[i] = static_cast<float>(i * 7 % 13 - 6);
    for (int i = 0; i < 128; ++i) b[i] = static_cast<float>(i * 5 % 11 - 5);
    CheckParams params{a.data(), b.data(), c.data(), rows.data()};
    const uint32_t grid[3] = {1, 1, 1};
    if (emulation::launch("check_instructions", grid, THREADS, 512, &params, sizeof params, 1)) return 2;
    int wrong = check_group_products();
    for (int kind = 0; kind < 2; ++kind) {
        for (int row = 0; row < 16; ++row) {
            for (int column = 0; column < 8; ++column) {
                float want = 1.0f;
                for (int k = 0; k < 16; ++k) want += a[row * 16 + k] * b[k * 8 + column];
                float got = c[kind * 128 + row * 8 + column];
                if (got == want) continue;
                std::printf("product %d (%d, %d): got %g, want %g\n", kind, row, column, static_cast<double>(got), static_cast<double>(want));
                ++wrong;
            }
        }
    }
    for (uint32_t lane = 0; lane < 32; ++lane) {
        for (uint32_t m = 0; m < 4; ++m) {
            // Lane l holds the horizontal pair from (l / 4, 2 (l % 4)); transposed, the vertical pair from (2 (l % 4), l / 4).
            uint32_t row = lane / 4, column = lane % 4 * 2;
            uint32_t straight = pair(static_cast<uint16_t>(m * 64 + row * 8 + column), static_cast<uint16_t>(m * 64 + row * 8 + column + 1));
            uint32_t turned = pair(static_cast<uint16_t>(m * 64 + column * 8 + row), static_cast<uint16_t>(m * 64 + (column + 1) * 8 + row));
            if (rows[lane * 4 + m] == straight && rows[128 + lane * 4 + m] == turned) continue;
            std::printf("ldmatrix, lane %u, matrix %u\n", lane, m);
            ++wrong;
        }
    }
    return wrong != 0;
}
