// prepared_rows.cuh: the layout of the rows that `prepare` writes to global memory, as in a product's stages: K-major, swizzled.
//
// 16 KB for each tile and stage (128 bytes a row), so that a stage is one contiguous copy, on Hopper one bulk copy. The inner
// dimension is padded to whole stages.
#ifndef DDTAS_PREPARED_ROWS_CUH
#define DDTAS_PREPARED_ROWS_CUH

#include "tile/precision.cuh"

constexpr int kGranules = STAGE_BYTES / 16;
// 16 bytes of a row, the unit of swizzling and copies.
template <class Element>
struct alignas(16) Granule {
    static constexpr int count = 16 / sizeof(Element);
    Element values[count];
};

// Byte offset of granule `granule` of row `row` in a stage.
DEVICE uint32_t swizzled(uint32_t row, uint32_t granule) {
    return row * STAGE_BYTES + ((granule ^ (row % 8)) << 4);
}

// Byte offset of byte `byte` of prepared row `row`, `stride_bytes` bytes a row: [tile, stage, row, granule].
DEVICE uint64_t prepared_offset(uint64_t row, uint32_t byte, uint64_t stride_bytes) {
    return row / TILE * TILE * stride_bytes + static_cast<uint64_t>(byte / STAGE_BYTES) * TILE * STAGE_BYTES +
           swizzled(static_cast<uint32_t>(row % TILE), byte % STAGE_BYTES / 16) + byte % 16;
}

// Byte of element `d` within a prepared row; for split f32 that of the high part, kLowBytes before the low one.
template <class Precision>
DEVICE uint32_t stored_byte(uint32_t d) {
    constexpr uint32_t together = STAGE_BYTES / 2;  // elements
    if constexpr (Precision::exact) return d / together * 2 * STAGE_BYTES + d % together * 2;
    return d * Precision::stored_bytes;
}
constexpr uint32_t kLowBytes = STAGE_BYTES;  // from a high part to its low one

// A granule of f32 as half a granule of high parts and half a granule of low parts.
struct SplitGranule {
    struct alignas(8) Part {
        uint32_t pairs[2];
    };
    Part high, low;

    SplitGranule() = default;
    explicit DEVICE SplitGranule(const Granule<float> &values) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            Halves halves = split(values.values[2 * i] * kRowScale, values.values[2 * i + 1] * kRowScale);
            high.pairs[i] = halves.high;
            low.pairs[i] = halves.low;
        }
    }
    // The f32 numbers, without their last bits.
    DEVICE Granule<float> joined() const {
        Granule<float> values;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            auto part = [&](const Part &of) { return from_f16_bits(static_cast<uint16_t>(of.pairs[i / 2] >> i % 2 * 16)); };
            values.values[i] = (part(high) + part(low)) / kRowScale;
        }
        return values;
    }
};

// Elements of a prepared row from `first` on, a granule in the type of the caller's rows.
template <class Precision>
DEVICE Granule<typename Precision::Element> load_prepared(const unsigned char *rows, uint64_t row, uint32_t first,
                                                          uint64_t stride_bytes) {
    const unsigned char *at = rows + prepared_offset(row, stored_byte<Precision>(first), stride_bytes);
    if constexpr (Precision::exact) {
        // The low parts are a stage further on.
        SplitGranule split;
        split.high = *reinterpret_cast<const SplitGranule::Part *>(at);
        split.low = *reinterpret_cast<const SplitGranule::Part *>(at + TILE * STAGE_BYTES);
        return split.joined();
    } else {
        return *reinterpret_cast<const Granule<typename Precision::Element> *>(at);
    }
}

template <class Precision>
DEVICE const void *tile_rows(const Side &side, uint32_t tile, uint32_t stride) {
    return static_cast<const unsigned char *>(side.rows) + static_cast<uint64_t>(tile) * TILE * stride * Precision::stored_bytes;
}
template <class Precision>
DEVICE uint64_t stride_bytes(const Pairs &pairs) {
    return static_cast<uint64_t>(pairs.stride) * Precision::stored_bytes;
}

#endif
