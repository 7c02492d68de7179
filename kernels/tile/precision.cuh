// precision.cuh: how rows of each type are multiplied: f16 and bf16 as they are, exact f32 as two f16 an entry.
#ifndef DDTAS_PRECISION_CUH
#define DDTAS_PRECISION_CUH

#include "ptx/device.cuh"

// The three ways to multiply. `Fragment` is an operand as its `multiply` wants it, `stored_bytes` what an element of a
// prepared row takes. S_ij and S_ji have the same bits in every one: products commute, and so does what adds them.

// f32 as three products of f16: kRowScale x = high + low, the product of the low parts is below f32's last bit. Prepared rows
// hold both, split once: of 64 elements first the high parts, then the low ones.
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
// Both parts together err by 2^-22 of an entry, or by 2^-30 where that is more: f16 has no numbers between multiples of 2^-24.
// Entries up to 2,000 stay finite, should rows that nobody checks be longer than 1.
constexpr float kRowScale = 32.0f;

// Two numbers as high and low parts, the first in the lower halves.
struct Halves {
    uint32_t high, low;
};
DEVICE Halves split(float first, float second) {
    uint32_t high = to_f16_pair(first, second);
    return Halves{high, to_f16_pair(first - from_f16_bits(static_cast<uint16_t>(high)),
                                    second - from_f16_bits(static_cast<uint16_t>(high >> 16)))};
}

// 16-bit rows, and f32 rows that `prepare` has rounded to f16.
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

// Defines one kernel in every precision from a device function `template <class Precision> name_body(p)`.
#define KERNEL_IN_EVERY_PRECISION(name, Params) KERNEL_OF_16BIT_BLOCKS(name, Params, 1)
// The same of a kernel that only Hopper has; `name_body` is defined where there is wgmma.
#define HOPPER_KERNEL_IN_EVERY_PRECISION(name, Params)                             \
    KERNEL(name##_f32, Params, 1) { HOPPER_ONLY(name##_body<ExactF32>(p)); }       \
    KERNEL(name##_f16, Params, 1) { HOPPER_ONLY(name##_body<F16Rows>(p)); }        \
    KERNEL(name##_bf16, Params, 1) { HOPPER_ONLY(name##_body<Bf16Rows>(p)); }
// So many blocks a multiprocessor, of exact f32 one.
#define KERNEL_OF_16BIT_BLOCKS(name, Params, blocks)                 \
    KERNEL(name##_f32, Params, 1) { name##_body<ExactF32>(p); }       \
    KERNEL(name##_f16, Params, blocks) { name##_body<F16Rows>(p); }   \
    KERNEL(name##_bf16, Params, blocks) { name##_body<Bf16Rows>(p); }

#endif
