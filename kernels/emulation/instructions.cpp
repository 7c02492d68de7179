// instructions.cpp: asynchronous copies of 16 bytes, tensor-core products of a warp, 16-bit numbers.

#include "state.h"

namespace emulation {
namespace {

void land(Copy &copy) {
    if (!copy.landed) std::memcpy(copy.to, copy.from, 16);
    copy.landed = true;
}

}  // namespace

// Lands each copy in flight with some probability.
void land_some(Thread &thread) {
    for (Copy &copy : thread.copies) {
        if (!copy.landed && machine->random.below(4) == 0) land(copy);
    }
}

void cp_async(void *to, const void *from) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) die("cp_async is not aligned", "");
    Thread &self = machine->self();
    Called called(__builtin_return_address(0));
    // A read of the old bytes, or of the new ones too early, gets NaN.
    std::memset(to, 0xff, 16);
    writes(to, 16);
    Unwatched bookkeeping;
    self.copies.push_back(Copy{to, from, self.group, false});
}

void cp_async_commit() { ++machine->self().group; }

void cp_async_wait(int pending) {
    Called called(__builtin_return_address(0));
    Thread &self = machine->self();
    std::vector<Copy> later;
    for (Copy &copy : self.copies) {
        if (copy.group + static_cast<uint64_t>(pending) < self.group) {
            land(copy);
            writes(copy.to, 16);  // at any time up to now
        } else {
            Unwatched bookkeeping;
            later.push_back(copy);
        }
    }
    Unwatched bookkeeping;
    self.copies = std::move(later);
}

void reads_matrix(const void *row) {
    Called called(__builtin_return_address(0));
    reads(row, 16);
}

template <Precision numbers>
void multiply(void **lanes) {
    machine->products += 16 * 8 * 16;
    double a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto &one = *static_cast<Multiply *>(lanes[lane]);
        int group = lane / 4, in_group = lane % 4;
        for (int r = 0; r < 4; ++r) {
            int row = group + (r % 2) * 8;
            for (int half = 0; half < 2; ++half) {
                a[row][r / 2 * 8 + in_group * 2 + half] = number<numbers>(static_cast<uint16_t>(one.a[r] >> half * 16));
            }
        }
        for (int r = 0; r < 2; ++r) {
            for (int half = 0; half < 2; ++half) {
                b[r * 8 + in_group * 2 + half][group] = number<numbers>(static_cast<uint16_t>(one.b[r] >> half * 16));
            }
        }
    }
    double sums[16][8] = {};
    for (int row = 0; row < 16; ++row) {
        for (int i = 0; i < 16; ++i) {
            for (int column = 0; column < 8; ++column) sums[row][column] += a[row][i] * b[i][column];
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        float *c = static_cast<Multiply *>(lanes[lane])->c;
        for (int i = 0; i < 4; ++i) {
            c[i] = truncate(static_cast<double>(c[i]) + sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
        }
    }
}
template void multiply<Precision::f16>(void **);
template void multiply<Precision::bf16>(void **);

template <bool transposed>
void ldmatrix(void **lanes) {
    uint16_t matrices[4][8][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto &one = *static_cast<LdMatrix *>(lanes[lane]);
        if (reinterpret_cast<uintptr_t>(one.row) % 16) die("ldmatrix is not aligned", "");
        std::memcpy(matrices[lane / 8][lane % 8], one.row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
        uint32_t *r = static_cast<LdMatrix *>(lanes[lane])->r;
        for (int m = 0; m < 4; ++m) {
            int row = lane / 4, column = lane % 4 * 2;
            uint32_t low = transposed ? matrices[m][column][row] : matrices[m][row][column];
            uint32_t high = transposed ? matrices[m][column + 1][row] : matrices[m][row][column + 1];
            r[m] = low | high << 16;
        }
    }
}
template void ldmatrix<false>(void **);
template void ldmatrix<true>(void **);

uint16_t f16_bits(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffu;
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    // Below 2^-14 numbers are multiples of 2^-24.
    if (magnitude < 0x38800000u) {
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::lrintf(float_of(magnitude) * 0x1p24f)));
    }
    magnitude += 0xfffu + (magnitude >> 13 & 1u);
    return static_cast<uint16_t>(sign | (magnitude - 0x38000000u) >> 13);
}

}  // namespace emulation
