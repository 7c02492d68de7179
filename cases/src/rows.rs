//! Rounding to the types that a backend takes.

use ddtas::loss::ElementType;
use half::{bf16, f16};

/// A value as rows of this type would store it.
pub(crate) fn round(dtype: ElementType, value: f64) -> f64 {
    match dtype {
        ElementType::F32 => f64::from(value as f32),
        ElementType::F16 => f16::from_f64(value).to_f64(),
        ElementType::Bf16 => bf16::from_f64(value).to_f64(),
    }
}
