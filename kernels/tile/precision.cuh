// precision.cuh: how rows of each type are multiplied: f16 and bf16 as they are, exact f32 as two f16 for each entry.
#ifndef DDTAS_PRECISION_CUH
#define DDTAS_PRECISION_CUH

#include "ptx/device.cuh"

// Three types that say how to multiply. `Fragment` is an operand of its `multiply`, `stored_bytes` the size of an element of a
// prepared row. S_ij and S_ji have the same bits for each: products commute, and so do the sums of mixed products.

// f32 by three products of f16: kRowScale x = high + low; the product of two low parts is below f32's last bit. Prepared rows
// have both parts, for every 64 elements first the high ones, then the low ones.
struct ExactF32 {
    using Element = float;
    static constexpr bool exact = true;
    static constexpr uint32_t stored_bytes = 4;
    template <int n>
    struct Fragment {
        uint32_t high[n], low[n];
    };
    static DEVICE void multiply(float (&c)[4], const Fragment<4> &a, const Fragment<2> &b) {
        mma_f16(c, a.low, b.high);
        mma_f16(c, a.high, b.low);
        mma_f16(c, a.high, b.high);
    }
};
// The two parts represent an entry to 2^-22 of itself, or to 2^-30 if that is more: f16's smallest step is 2^-24. Entries up to
// 2,000 stay finite, in case unchecked rows are longer than 1.
constexpr float kRowScale = 32.0f;

// High and low parts of two numbers, those of the first in the lower halves.
struct Halves {
    uint32_t high, low;
};
DEVICE Halves split(float first, float second) {
    uint32_t high = to_f16_pair(first, second);
    return Halves{high, to_f16_pair(first - from_f16_bits(static_cast<uint16_t>(high)),
                                    second - from_f16_bits(static_cast<uint16_t>(high >> 16)))};
}

// 16-bit rows, and f32 rows that `prepare` rounds to f16.
template <class T>
struct Rows16Bit {
    using Element = T;
    static constexpr bool exact = false;
    static constexpr uint32_t stored_bytes = 2;
    template <int n>
    struct Fragment {
        uint32_t value[n];
    };
    template <int n>
    static DEVICE void prepare(Fragment<n> &to, const uint32_t *from) {
        for (int i = 0; i < n; ++i) to.value[i] = from[i];
    }
    static DEVICE void multiply(float (&c)[4], const Fragment<4> &a, const Fragment<2> &b);
};
template <>
DEVICE void Rows16Bit<F16>::multiply(float (&c)[4], const Fragment<4> &a, const Fragment<2> &b) {
    mma_f16(c, a.value, b.value);
}
template <>
DEVICE void Rows16Bit<Bf16>::multiply(float (&c)[4], const Fragment<4> &a, const Fragment<2> &b) {
    mma_bf16(c, a.value, b.value);
}
using F16Rows = Rows16Bit<F16>;
using Bf16Rows = Rows16Bit<Bf16>;

// Defines a kernel for each precision from a device function `template <class Precision> name_body(p)`.
#define KERNEL_IN_EVERY_PRECISION(name, Params) KERNEL_OF_16BIT_BLOCKS(name, Params, 1)
// The same for a kernel that only Hopper has; `name_body` is defined where there is wgmma.
#define HOPPER_KERNEL_IN_EVERY_PRECISION(name, Params)                             \
    KERNEL(name##_f32, Params, 1) { HOPPER_ONLY(name##_body<ExactF32>(p)); }       \
    KERNEL(name##_f16, Params, 1) { HOPPER_ONLY(name##_body<F16Rows>(p)); }        \
    KERNEL(name##_bf16, Params, 1) { HOPPER_ONLY(name##_body<Bf16Rows>(p)); }
// `blocks` blocks a multiprocessor for 16-bit rows, one for exact f32.
#define KERNEL_OF_16BIT_BLOCKS(name, Params, blocks)                 \
    KERNEL(name##_f32, Params, 1) { name##_body<ExactF32>(p); }       \
    KERNEL(name##_f16, Params, blocks) { name##_body<F16Rows>(p); }   \
    KERNEL(name##_bf16, Params, blocks) { name##_body<Bf16Rows>(p); }

#endif
