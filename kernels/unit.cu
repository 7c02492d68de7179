// unit.cu: the gradient by unit rows led back to the rows as they were given (any length).
// Truth: src/backend/cpu/unit.rs. Launcher: src/backend/device/loss.rs.
//
// With u = x / |x|: dL/dx = (g - (g . u) u) / |x| for g = dL/du. `prepare` has made u and left |x|. A warp a row, in place.
// Numbers: f32; f64 where the length is unusual.

#include "unit.cuh"

template <class Element>
DEVICE void lead_back_body(const LeadBackParams &p) {
    uint32_t row = block_x() * (THREADS / 32) + warp_index();
    if (row >= p.count) return;  // the whole warp
    auto from = static_cast<const Element *>(p.rows) + static_cast<uint64_t>(row) * p.dim;
    float *gradient = p.gradient + static_cast<uint64_t>(row) * p.dim;
    double length = p.lengths[row];
    if (is_usual(length)) {
        auto inverse = static_cast<float>(1.0 / length);
        float inward = 0.0f;
#pragma unroll 8
        for (uint32_t d = lane_index(); d < p.dim; d += 32) inward += gradient[d] * to_float(from[d]);
        inward = warp_sum(inward) * inverse;
#pragma unroll 8
        for (uint32_t d = lane_index(); d < p.dim; d += 32) {
            gradient[d] = (gradient[d] - inward * (to_float(from[d]) * inverse)) * inverse;
        }
        return;
    }
    // No direction, no derivative; a NaN stays one.
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
KERNEL(lead_back_f32, LeadBackParams, 4) { lead_back_body<float>(p); }
KERNEL(lead_back_f16, LeadBackParams, 4) { lead_back_body<F16>(p); }
KERNEL(lead_back_bf16, LeadBackParams, 4) { lead_back_body<Bf16>(p); }
