// unit_length.cuh: normalising rows of any length, as src/backend/cpu/unit.rs.
#ifndef DDTAS_UNIT_LENGTH_CUH
#define DDTAS_UNIT_LENGTH_CUH

#include "ptx/device.cuh"

// Whether f32 represents the inverse of this length and the squares of the row's entries without underflow or overflow.
DEVICE bool is_usual(double length) { return length >= 1e-15 && length < 1e15; }
// Whether rows of this length have a direction; false for a NaN.
DEVICE bool has_direction(double length) { return length > 0.0 && length < static_cast<double>(INFINITE); }
// An entry of the unit row if the length is unusual. A row of zeros stays one, and the check reports it.
DEVICE float unit_entry(float value, double length) {
    if (length == 0.0) return value;
    return has_direction(length) ? static_cast<float>(static_cast<double>(value) / length) : NAN;
}

#endif
