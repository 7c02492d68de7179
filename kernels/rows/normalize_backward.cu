// normalize_backward.cu: the gradient by rows of any length, from the gradient by their unit rows.
// Truth: src/backend/cpu/unit.rs. Launcher: src/backend/device/passes.rs.
//
// With u = x / |x|: dL/dx = (g - (g . u) u) / |x| for g = dL/du. `prepare` computed u and |x|. A warp for each row, in place.
// Precision: f32; f64 where the length is unusual.

#include "rows/unit_length.cuh"

template <class Element>
DEVICE void normalize_backward_body(const NormalizeBackwardParams &p) {
    uint32_t row = block_x() * (THREADS / 32) + warp_index();
    if (row >= p.count) return;  // the whole warp
    auto from = static_cast<const Element *>(p.rows) + static_cast<uint64_t>(row) * p.dim;
    float *gradient = p.gradient + static_cast<uint64_t>(row) * p.dim;
    double length = p.lengths[row];
    if (is_usual(length)) {
        auto inverse = static_cast<float>(1.0 / length);
        // Several loads at once: with a test for the row's end before each, they would wait for one another.
        constexpr uint32_t kAtOnce = 8;
        auto each = [&](auto use) {
            for (uint32_t begin = lane_index(); begin - lane_index() < p.dim; begin += 32 * kAtOnce) {
                float slopes[kAtOnce], entries[kAtOnce];
#pragma unroll
                for (uint32_t k = 0; k < kAtOnce; ++k) {
                    uint32_t d = begin + 32 * k;
                    slopes[k] = d < p.dim ? gradient[d] : 0.0f;
                    entries[k] = d < p.dim ? to_float(from[d]) : 0.0f;
                }
#pragma unroll
                for (uint32_t k = 0; k < kAtOnce; ++k) use(begin + 32 * k, slopes[k], entries[k]);
            }
        };
        float inward = 0.0f;
        each([&](uint32_t, float slope, float entry) { inward += slope * entry; });
        inward = warp_sum(inward) * inverse;
        each([&](uint32_t d, float slope, float entry) {
            if (d < p.dim) gradient[d] = (slope - inward * (entry * inverse)) * inverse;
        });
        return;
    }
    // A row of zeros has derivative 0, one that is not finite NaN.
    bool directed = has_direction(length);
    auto unit = [&](uint32_t d) { return static_cast<double>(to_float(from[d])) / length; };
    double inward = 0.0;
    for (uint32_t d = lane_index(); directed && d < p.dim; d += 32) inward += static_cast<double>(gradient[d]) * unit(d);
    inward = warp_sum(inward);
    for (uint32_t d = lane_index(); d < p.dim; d += 32) {
        gradient[d] = directed        ? static_cast<float>((static_cast<double>(gradient[d]) - inward * unit(d)) / length)
                      : length == 0.0 ? 0.0f
                                      : NAN;
    }
}
KERNEL(normalize_backward_f32, NormalizeBackwardParams, 4) { normalize_backward_body<float>(p); }
KERNEL(normalize_backward_f16, NormalizeBackwardParams, 4) { normalize_backward_body<F16>(p); }
KERNEL(normalize_backward_bf16, NormalizeBackwardParams, 4) { normalize_backward_body<Bf16>(p); }
