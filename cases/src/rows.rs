//! Rows in every type that a backend takes.

use ddtas::loss::{ElementType, Embeddings};
use half::{bf16, f16};
use ndarray::Array2;

/// A value as rows of this type would store it.
pub(crate) fn round(dtype: ElementType, value: f64) -> f64 {
    match dtype {
        ElementType::F32 => f64::from(value as f32),
        ElementType::F16 => f16::from_f64(value).to_f64(),
        ElementType::Bf16 => bf16::from_f64(value).to_f64(),
    }
}

/// Rows in one of the types a backend takes.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "documented at the variants of the same names in ElementType")]
pub enum Matrix {
    F32(Array2<f32>),
    F16(Array2<f16>),
    Bf16(Array2<bf16>),
}

impl Matrix {
    /// These rows in that type.
    #[must_use]
    pub fn new(rows: &Array2<f32>, dtype: ElementType) -> Self {
        match dtype {
            ElementType::F32 => Self::F32(rows.clone()),
            ElementType::F16 => Self::F16(rows.mapv(f16::from_f32)),
            ElementType::Bf16 => Self::Bf16(rows.mapv(bf16::from_f32)),
        }
    }

    /// The rows in another type.
    #[must_use]
    pub fn rounded_to(&self, dtype: ElementType) -> Self {
        Self::new(&self.view().to_f64().mapv(|value| value as f32), dtype)
    }

    /// The rows as a backend takes them.
    #[must_use]
    pub fn view(&self) -> Embeddings<'_> {
        match self {
            Self::F32(m) => Embeddings::F32(m.view()),
            Self::F16(m) => Embeddings::F16(m.view()),
            Self::Bf16(m) => Embeddings::Bf16(m.view()),
        }
    }
}
