// unit_length.cuh: rows of any length, compared at unit length. As src/backend/cpu/unit.rs has it.
#ifndef DDTAS_UNIT_LENGTH_CUH
#define DDTAS_UNIT_LENGTH_CUH

#include "ptx/device.cuh"

// Whether f32 holds the inverse of this length, and the squares of its entries, with all their digits.
DEVICE bool is_usual(double length) { return length >= 1e-15 && length < 1e15; }
// Whether rows of this length have a direction. A NaN has none.
DEVICE bool has_direction(double length) { return length > 0.0 && length < static_cast<double>(INFINITE); }
// An entry of the unit row where the length is unusual. A row of zeros stays one, for the check to name.
DEVICE float unit_entry(float value, double length) {
    if (length == 0.0) return value;
    return has_direction(length) ? static_cast<float>(static_cast<double>(value) / length) : NAN;
}

#endif
