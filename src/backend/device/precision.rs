//! Number formats in which rows are given and multiplied.

use crate::loss::ElementType;

/// Number format in which S and the gradient's product are computed. Sums are f32 throughout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Precision {
    /// f32 rows at f32's precision: each product is made of three f16 products.
    F32,
    /// f32 rows that are rounded to f16 when they are prepared, and are f16 rows from then on: TF32's 11
    /// significant bits, for a third of the work or less.
    RoundedF32,
    /// IEEE half precision rows.
    F16,
    /// Brain floating point rows.
    Bf16,
}

impl Precision {
    /// The precision in which rows of this type are multiplied.
    #[must_use]
    pub fn of(element: ElementType, tf32: bool) -> Self {
        match element {
            ElementType::F32 if tf32 => Self::RoundedF32,
            ElementType::F32 => Self::F32,
            ElementType::F16 => Self::F16,
            ElementType::Bf16 => Self::Bf16,
        }
    }

    /// Bytes of one element of the caller's rows.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::RoundedF32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// `narrow` if the kernels multiply 16-bit rows, otherwise `exact`.
    pub(super) fn pick<T>(self, narrow: T, exact: T) -> T {
        if self.is_narrow() { narrow } else { exact }
    }

    /// Whether the kernels multiply 16-bit rows, and weights in the rows' type.
    #[must_use]
    pub fn is_narrow(self) -> bool {
        self != Self::F32
    }

    /// Bytes of one element of prepared rows: f32 to its own precision is split into two f16.
    #[must_use]
    pub fn stored_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::RoundedF32 | Self::F16 | Self::Bf16 => 2,
        }
    }
}
