//! The float64 reference for rows that are float64 already; no backend takes such rows.
//!
//! For checks by central differences, which float32 rows would hide by their rounding.

use ndarray::{Array2, ArrayView2};

use super::batch::{check_unit, validate_dims, validate_identity, validate_shape};
use super::reference::{Reference, evaluate, threshold_gradient_along};
use super::{Identity, LossSettings, ThresholdGradient, UnitCheck};
use crate::Result;

/// How far a row's norm may be from 1: as for float32, so that a difference quotient may step off the sphere.
const NORM_TOLERANCE: f64 = 1e-3;

/// Rows in float64 with their labels. A negative label takes the row out of every pair.
#[derive(Debug, Clone, Copy)]
pub struct DoubleRows<'a> {
    /// The matrix, `[rows, dim]`, rows of unit L2 norm.
    pub embeddings: ArrayView2<'a, f64>,
    /// One label a row.
    pub labels: &'a [i64],
}

/// A [`Batch`](super::Batch) in float64: stores B x N matrices, meant for small batches.
#[derive(Debug, Clone, Copy)]
pub struct DoubleBatch<'a> {
    /// The rows the loss is averaged over.
    pub anchors: DoubleRows<'a>,
    /// The rows they are compared with; `None` means the anchors.
    pub references: Option<DoubleRows<'a>>,
    /// Rectangular form only: which references are anchors.
    pub identity: Identity<'a>,
    /// Rectangular form only: also compute dL/d(references).
    pub reference_gradient: bool,
    /// Whether rows are checked first.
    pub check: UnitCheck,
}

impl DoubleBatch<'_> {
    /// Evaluates mining, loss and gradient (SPEC 1-4).
    ///
    /// # Errors
    /// As [`reference()`](super::reference()).
    pub fn reference(&self, settings: &LossSettings) -> Result<Reference> {
        settings.validate()?;
        let anchors = self.read("anchors", &self.anchors)?;
        let references = self.references.map(|rows| self.read("references", &rows)).transpose()?;
        if let Some(references) = &references {
            validate_dims(anchors.ncols(), references.ncols())?;
        }
        if let Some(rows) = &self.references {
            validate_identity(&self.identity, self.anchors.labels, rows.labels)?;
        }
        let total = anchors.nrows();
        let references = references.as_ref().zip(self.references.map(|rows| rows.labels));
        let anchors = (&anchors, self.anchors.labels);
        Ok(evaluate(anchors, references, &self.identity, total, self.reference_gradient, settings))
    }

    /// Evaluates the threshold gradient (SPEC 5) along tangents of the anchors and of the references.
    ///
    /// # Errors
    /// As [`reference_threshold_gradient`](super::reference_threshold_gradient).
    pub fn threshold_gradient(
        &self,
        settings: &LossSettings,
        tangent: &Array2<f64>,
        reference_tangent: Option<&Array2<f64>>,
    ) -> Result<ThresholdGradient> {
        let evaluated = self.reference(settings)?;
        let anchors = self.anchors.embeddings.to_owned();
        let references = self.references.map(|rows| rows.embeddings.to_owned());
        let rows = (&anchors, references.as_ref());
        threshold_gradient_along(&evaluated, settings, rows, (tangent, reference_tangent))
    }

    fn read(&self, name: &'static str, rows: &DoubleRows<'_>) -> Result<Array2<f64>> {
        validate_shape(name, rows.embeddings.dim(), rows.labels)?;
        if self.check == UnitCheck::Check {
            for (row, vector) in rows.embeddings.outer_iter().enumerate() {
                check_unit(name, row, vector.dot(&vector), NORM_TOLERANCE)?;
            }
        }
        Ok(rows.embeddings.to_owned())
    }
}
