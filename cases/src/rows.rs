//! Rows in every type that a backend takes.

use ddtas::loss::Embeddings;
use half::{bf16, f16};
use ndarray::Array2;

/// The type of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// Single precision.
    #[default]
    F32,
    /// IEEE half precision.
    F16,
    /// Brain floating point.
    Bf16,
}

impl Dtype {
    /// Every type that a backend takes.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// As the programs and files spell it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// That of these rows.
    #[must_use]
    pub fn of(rows: &Embeddings<'_>) -> Self {
        match rows {
            Embeddings::F32(_) => Self::F32,
            Embeddings::F16(_) => Self::F16,
            Embeddings::Bf16(_) => Self::Bf16,
        }
    }

    /// The rows as a caller of this type would hand them in.
    #[must_use]
    pub fn cast(self, rows: &Array2<f32>) -> Matrix {
        match self {
            Self::F32 => Matrix::F32(rows.clone()),
            Self::F16 => Matrix::F16(rows.mapv(f16::from_f32)),
            Self::Bf16 => Matrix::Bf16(rows.mapv(bf16::from_f32)),
        }
    }

    /// A weight as plain code in this precision would store it.
    pub(crate) fn round(self, value: f64) -> f64 {
        match self {
            Self::F32 => f64::from(value as f32),
            Self::F16 => f16::from_f64(value).to_f64(),
            Self::Bf16 => bf16::from_f64(value).to_f64(),
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Rows in one of the types a backend takes.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "documented at the variants of the same names in Dtype")]
pub enum Matrix {
    F32(Array2<f32>),
    F16(Array2<f16>),
    Bf16(Array2<bf16>),
}

impl Matrix {
    /// The rows in another type.
    #[must_use]
    pub fn rounded_to(&self, dtype: Dtype) -> Self {
        dtype.cast(&self.view().to_f64().mapv(|value| value as f32))
    }

    /// As a backend takes them.
    #[must_use]
    pub fn view(&self) -> Embeddings<'_> {
        match self {
            Self::F32(m) => Embeddings::F32(m.view()),
            Self::F16(m) => Embeddings::F16(m.view()),
            Self::Bf16(m) => Embeddings::Bf16(m.view()),
        }
    }
}
