//! SPEC 1-5 from end to end in scalar float64: the truth every backend is held to.

use ndarray::Array2;

use super::batch::check_unit;
use super::gradient::{Weighted, gradients, weigh};
use super::select::Selection;
use super::similarity::Similarities;
use super::{
    Batch, BatchSize, Identity, LossSettings, Rows, TangentOf, ThresholdGradient, UnitCheck, threshold,
};
use crate::Result;

/// The loss of a batch with every intermediate result. Holds B x N matrices.
#[derive(Debug, Clone)]
pub struct Reference {
    /// Similarities and pairs.
    pub similarities: Similarities,
    /// Mined pairs and tolerances.
    pub selection: Selection,
    /// Loss and pair weights.
    pub weighted: Weighted,
    /// dL/d(anchors), `[B, D]`; in the square form the whole gradient.
    pub gradient: Array2<f64>,
    /// dL/d(references), `[N, D]`, if asked for.
    pub reference_gradient: Option<Array2<f64>>,
    /// Mean similarity over all positive pairs; NaN if there is none.
    pub mean_pos: f64,
    /// Mean similarity over all negative pairs; NaN if there is none.
    pub mean_neg: f64,
    /// Ordered negative pairs.
    pub total_neg: u64,
    /// B of the factor 1/B.
    total: usize,
}

impl Reference {
    /// Anchors that enter the loss.
    #[must_use]
    pub fn active(&self) -> u64 {
        (0..self.similarities.anchors()).filter(|&i| self.selection.is_active(i)).count() as u64
    }
}

/// Evaluates mining, loss and gradient in float64.
///
/// # Errors
/// As [`Batch::validate`], and [`Error::NotFinite`](crate::Error::NotFinite) /
/// [`Error::NotUnit`](crate::Error::NotUnit) for bad rows.
pub fn reference(batch: &Batch<'_>, settings: &LossSettings) -> Result<Reference> {
    settings.validate()?;
    batch.validate()?;
    let anchors = read(batch, "anchors", &batch.anchors)?;
    let references = batch.references.map(|rows| read(batch, "references", &rows)).transpose()?;
    let references = references.as_ref().zip(batch.references.map(|rows| rows.labels));
    let anchors = (&anchors, batch.anchors.labels);
    let (identity, total) = (&batch.identity, batch.total());
    Ok(evaluate(anchors, references, identity, total, batch.reference_gradient, settings))
}

/// Runs the passes in order on checked rows; `references` only in the rectangular form.
pub(super) fn evaluate(
    anchors: (&Array2<f64>, &[i64]),
    references: Option<(&Array2<f64>, &[i64])>,
    identity: &Identity<'_>,
    total: usize,
    reference_gradient: bool,
    settings: &LossSettings,
) -> Reference {
    let similarities = Similarities::new(anchors, references.map(|(rows, labels)| (rows, labels, identity)));
    let selection = Selection::new(&similarities, settings);
    let weighted = weigh(&similarities, &selection, settings, total);

    let (gradient, reference_gradient) =
        gradients(&weighted.weights, anchors.0, references.map(|rows| rows.0), reference_gradient);
    let (_, mean_pos) = mean(&similarities, |i| similarities.positives(i).collect());
    let (total_neg, mean_neg) = mean(&similarities, |i| similarities.negatives(i).collect());
    Reference {
        similarities,
        selection,
        weighted,
        gradient,
        reference_gradient,
        mean_pos,
        mean_neg,
        total_neg,
        total,
    }
}

/// Evaluates the threshold gradient of SPEC 5 in float64.
///
/// `tangent` and `reference_tangent` as in
/// [`Backend::threshold_gradient`](crate::backend::Backend::threshold_gradient).
///
/// # Errors
/// As [`reference()`], and [`Error::LengthMismatch`](crate::Error::LengthMismatch) for a tangent of another
/// shape.
pub fn reference_threshold_gradient(
    batch: &Batch<'_>,
    settings: &LossSettings,
    tangent: &Array2<f64>,
    reference_tangent: Option<&Array2<f64>>,
) -> Result<ThresholdGradient> {
    threshold_gradient_by(|entry| entry, batch, settings, (tangent, reference_tangent))
}

/// The sums of the absolute values of all terms of [`reference_threshold_gradient`], down to the products of
/// single entries. Rounding errors are proportional to these, since the terms have both signs.
///
/// # Errors
/// As [`reference_threshold_gradient`].
pub fn reference_threshold_gradient_terms(
    batch: &Batch<'_>,
    settings: &LossSettings,
    tangent: &Array2<f64>,
    reference_tangent: Option<&Array2<f64>>,
) -> Result<ThresholdGradient> {
    let sums = threshold_gradient_by(f64::abs, batch, settings, (tangent, reference_tangent))?;
    // dG/dlambda is negative for every pair.
    Ok(ThresholdGradient { pos: sums.pos.abs(), neg: sums.neg.abs() })
}

/// The sums of SPEC 5 over the batch's pairs, with `entry` applied to each entry of rows and tangents.
fn threshold_gradient_by(
    entry: impl Fn(f64) -> f64,
    batch: &Batch<'_>,
    settings: &LossSettings,
    (tangent, reference_tangent): (&Array2<f64>, Option<&Array2<f64>>),
) -> Result<ThresholdGradient> {
    let evaluated = reference(batch, settings)?;
    let made = |matrix: &Array2<f64>| matrix.mapv(&entry);
    let anchors = made(&batch.anchors.embeddings.to_f64());
    let references = batch.references.map(|rows| made(&rows.embeddings.to_f64()));
    let (tangent, moving) = (made(tangent), reference_tangent.map(made));
    threshold_gradient_along(
        &evaluated,
        settings,
        (&anchors, references.as_ref()),
        (&tangent, moving.as_ref()),
    )
}

/// The sums of SPEC 5 along tangents of `rows`, which has references only in the rectangular form.
pub(super) fn threshold_gradient_along(
    evaluated: &Reference,
    settings: &LossSettings,
    rows: (&Array2<f64>, Option<&Array2<f64>>),
    (tangent, reference_tangent): (&Array2<f64>, Option<&Array2<f64>>),
) -> Result<ThresholdGradient> {
    let (anchors, references) = (rows.0, rows.1.unwrap_or(rows.0));
    let size =
        BatchSize { anchors: anchors.nrows(), references: rows.1.map(Array2::nrows), dim: anchors.ncols() };
    size.check_tangent_size(TangentOf::Anchors, tangent.dim())?;
    let mut tilt = tangent.dot(&references.t());
    let moving = if rows.1.is_none() { Some(tangent) } else { reference_tangent };
    if let Some(moving) = moving {
        size.check_tangent_size(TangentOf::References, moving.dim())?;
        tilt += &anchors.dot(&moving.t());
    }
    let Reference { similarities, selection, total, .. } = evaluated;
    Ok(threshold::threshold_gradient(similarities, selection, settings, &tilt, *total))
}

fn read(batch: &Batch<'_>, name: &'static str, rows: &Rows<'_>) -> Result<Array2<f64>> {
    let values = rows.embeddings.to_f64();
    if batch.check == UnitCheck::Check {
        for (row, vector) in values.outer_iter().enumerate() {
            check_unit(name, row, vector.dot(&vector), rows.embeddings.norm_tolerance())?;
        }
    }
    Ok(values)
}

/// Number of pairs of all anchors, and their mean similarity.
fn mean(similarities: &Similarities, pairs: impl Fn(usize) -> Vec<usize>) -> (u64, f64) {
    let of = |i: usize| pairs(i).into_iter().map(move |j| similarities.values[[i, j]]);
    let all = (0..similarities.anchors()).flat_map(of);
    let (count, sum) = all.fold((0, 0.0), |(count, sum), s| (count + 1, sum + s));
    (count, sum / count as f64)
}
