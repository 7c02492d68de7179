//! The calls of `Context` on float64 rows, by the scalar reference: for small batches and gradient checks.

use ddtas::loss::{DoubleBatch, DoubleRows, LossSettings, ThresholdGradient, UnitCheck};
use pyo3::prelude::*;

use crate::error::raise;
use crate::input::Matrix;
use crate::output::LossOutput;
use crate::sides::Sides;

fn batch<'a>(sides: &'a Sides<'_>, reference_gradient: bool, check: UnitCheck) -> PyResult<DoubleBatch<'a>> {
    let rows = |(matrix, labels): &'a (Matrix<'_>, _)| -> PyResult<DoubleRows<'a>> {
        let labels: &'a crate::input::Labels<'_> = labels;
        Ok(DoubleRows { embeddings: matrix.double()?, labels: labels.as_slice()? })
    };
    Ok(DoubleBatch {
        anchors: rows(&sides.anchors)?,
        references: sides.references.as_ref().map(rows).transpose()?,
        identity: sides.identity.as_library(),
        reference_gradient,
        check,
    })
}

/// Mining, loss and gradient in float64.
pub fn loss(
    py: Python<'_>,
    sides: &Sides<'_>,
    settings: &LossSettings,
    reference_gradient: bool,
    check: UnitCheck,
) -> PyResult<LossOutput> {
    let batch = batch(sides, reference_gradient, check)?;
    let truth = py.detach(|| batch.reference(settings)).map_err(raise)?;
    Ok(LossOutput::of_reference(py, truth))
}

/// The threshold gradient in float64.
pub fn threshold_gradient(
    py: Python<'_>,
    sides: &Sides<'_>,
    settings: &LossSettings,
    tangents: (&Matrix<'_>, Option<&Matrix<'_>>),
    check: UnitCheck,
) -> PyResult<ThresholdGradient> {
    let batch = batch(sides, false, check)?;
    let tangent = tangents.0.double()?.to_owned();
    let reference_tangent = tangents.1.map(|rows| Ok::<_, PyErr>(rows.double()?.to_owned())).transpose()?;
    py.detach(|| batch.threshold_gradient(settings, &tangent, reference_tangent.as_ref())).map_err(raise)
}
