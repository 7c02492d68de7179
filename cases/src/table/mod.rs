//! One table of cases for every backend, and the comparison they are held to.
//!
//! Truth is `tests/golden` (SPEC 7), and `loss::reference` for what those files
//! do not have: other types of rows, the rectangular form, awkward shapes.
//! No pair of a case lies within [`CLEARANCE`] of a threshold, so counts are exact.

mod compare;
mod generate;
mod golden;

pub use compare::{Expected, compare, compare_nearest};
pub use generate::*;
pub use golden::golden;

use std::borrow::Borrow;

use ddtas::backend::Backend;
use ddtas::loss::{Batch, Embeddings, Identity, LossOutput, LossSettings, Rows, UnitCheck};
use half::{bf16, f16};
use ndarray::Array2;

/// No pair is closer to a threshold than this; f32 sums of D products err by some 1e-7.
pub const CLEARANCE: f64 = 3e-6;

/// Rows in one of the types a backend takes.
pub enum Matrix {
    F32(Array2<f32>),
    F16(Array2<f16>),
    Bf16(Array2<bf16>),
}

/// The type of a case's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// The rows as a caller of this type would hand them in.
    pub fn cast(self, rows: &Array2<f32>) -> Matrix {
        match self {
            Self::F32 => Matrix::F32(rows.clone()),
            Self::F16 => Matrix::F16(rows.mapv(f16::from_f32)),
            Self::Bf16 => Matrix::Bf16(rows.mapv(bf16::from_f32)),
        }
    }

    /// A weight as plain code in this precision would store it.
    pub fn round(self, value: f64) -> f64 {
        match self {
            Self::F32 => f64::from(value as f32),
            Self::F16 => f16::from_f64(value).to_f64(),
            Self::Bf16 => bf16::from_f64(value).to_f64(),
        }
    }
}

impl Matrix {
    fn view(&self) -> Embeddings<'_> {
        match self {
            Self::F32(m) => Embeddings::F32(m.view()),
            Self::F16(m) => Embeddings::F16(m.view()),
            Self::Bf16(m) => Embeddings::Bf16(m.view()),
        }
    }
}

/// Rows with their labels, and the tangent that goes with them.
pub struct Side {
    pub rows: Matrix,
    pub labels: Vec<i64>,
    pub tangent: Array2<f32>,
}

impl Side {
    fn view(&self) -> Rows<'_> {
        Rows { embeddings: self.rows.view(), labels: &self.labels }
    }
}

/// A batch, its settings, and what must come out.
pub struct Case {
    pub name: String,
    pub dtype: Dtype,
    pub settings: LossSettings,
    pub anchors: Side,
    pub references: Option<Side>,
    pub expected: Expected,
}

impl Case {
    /// The batch as the backend sees it; in the rectangular form with both gradients.
    pub fn batch(&self) -> Batch<'_> {
        batch(&self.anchors, self.references.as_ref())
    }
}

fn batch<'a>(anchors: &'a Side, references: Option<&'a Side>) -> Batch<'a> {
    Batch {
        anchors: anchors.view(),
        references: references.map(Side::view),
        reference_gradient: references.is_some(),
        identity: Identity::ByValue,
        total: None,
        check: UnitCheck::Check,
    }
}

/// Runs one case through every pass of a backend.
///
/// # Errors
/// What differs, with the worst index, what came out and what was wanted.
pub fn run(backend: &mut dyn Backend, case: &Case) -> Result<(), String> {
    let say = |error: ddtas::Error| error.to_string();
    let mut output = LossOutput::default();
    backend.loss(&case.batch(), &case.settings, &mut output).map_err(say)?;
    let tangent = case.anchors.tangent.view();
    let reference_tangent = case.references.as_ref().map(|side| side.tangent.view());
    let hyper = backend.hypergradient(&case.batch(), tangent, reference_tangent).map_err(say)?;
    compare(&case.expected, &output, hyper)?;
    for k in [1, 10] {
        let references = case.references.as_ref().map(Side::view);
        let found = backend.nearest(&case.anchors.view(), references.as_ref(), k).map_err(say)?;
        compare_nearest(&case.batch(), k, &found)?;
    }
    Ok(())
}

/// Runs a whole table and fails with every case that differs.
pub fn run_all(backend: &mut dyn Backend, cases: impl IntoIterator<Item = impl Borrow<Case>>) {
    let mut count = 0;
    let mut failures = Vec::new();
    for case in cases {
        count += 1;
        let case = case.borrow();
        if let Err(difference) = run(backend, case) {
            failures.push(format!("{} {:?}: {difference}", case.name, case.dtype));
        }
    }
    println!("{}: {count} cases, {} failed", backend.name(), failures.len());
    assert!(count > 0, "an empty table proves nothing");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
