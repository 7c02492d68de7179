//! Holds a backend's answer against the expected one: counts exact, floats within a bound.

use ndarray::Array2;

use crate::file::Case;
use ddtas::Result;
use ddtas::backend::Backend;
use ddtas::loss::{
    Batch, Hypergradient, LossOutput, LossSettings, Reference, reference, reference_hypergradient,
    reference_hypergradient_terms,
};

/// Bound on loss and gradient errors of a float32 backend, relative to the largest entry.
pub const SINGLE_PRECISION: f64 = 1e-5;

/// The same with TF32 products, against the truth of the rounded rows ([`run_tf32`]). Their products are exact
/// in f32, so sets, counts and thresholds are as exact as others; but the gradient's other factor, the pair
/// weights, is rounded too, by up to 2^-11 of each: twice that.
pub const TF32: f64 = 1e-3;

/// What a backend must answer, in float64. Fields are those of [`LossOutput`] and [`Hypergradient`].
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "documented at the fields of the same names in LossOutput")]
pub struct Expected {
    pub loss: f64,
    pub gradient: Array2<f64>,
    pub reference_gradient: Option<Array2<f64>>,
    pub gamma_pos: f64,
    pub gamma_neg: f64,
    pub probe_neg: u64,
    pub total_pos: u64,
    pub min_pos: Vec<f64>,
    pub max_neg: Vec<f64>,
    pub count_pos: Vec<u32>,
    pub count_neg: Vec<u32>,
    pub active: u64,
    pub dloss_dlambda_pos: f64,
    pub dloss_dlambda_neg: f64,
    pub hyper_pos: f64,
    pub hyper_neg: f64,
    /// Sums of the absolute terms of the two above, which their errors are measured against.
    pub hyper_terms: Hypergradient,
}

impl Expected {
    /// The scalar truth's answer.
    #[must_use]
    pub fn new(truth: &Reference, hyper: Hypergradient, hyper_terms: Hypergradient) -> Self {
        let counts = |sets: &[Vec<usize>]| sets.iter().map(|set| set.len() as u32).collect();
        let selection = &truth.selection;
        Self {
            loss: truth.weighted.loss,
            gradient: truth.gradient.clone(),
            reference_gradient: truth.reference_gradient.clone(),
            gamma_pos: selection.tolerances.pos,
            gamma_neg: selection.tolerances.neg,
            probe_neg: selection.probe_neg,
            total_pos: selection.total_pos,
            min_pos: selection.min_pos.clone(),
            max_neg: selection.max_neg.clone(),
            count_pos: counts(&selection.positives),
            count_neg: counts(&selection.negatives),
            active: truth.active(),
            dloss_dlambda_pos: truth.weighted.dloss_dlambda_pos,
            dloss_dlambda_neg: truth.weighted.dloss_dlambda_neg,
            hyper_pos: hyper.pos,
            hyper_neg: hyper.neg,
            hyper_terms,
        }
    }

    /// Evaluates the scalar truth on a batch.
    ///
    /// # Errors
    /// As [`reference()`] and [`reference_hypergradient`].
    pub fn evaluate(
        batch: &Batch<'_>,
        settings: &LossSettings,
        tangent: &Array2<f32>,
        reference_tangent: Option<&Array2<f32>>,
    ) -> Result<Self> {
        let truth = reference(batch, settings)?;
        let wide = |matrix: &Array2<f32>| matrix.mapv(f64::from);
        let (tangent, moving) = (wide(tangent), reference_tangent.map(wide));
        let hyper = reference_hypergradient(batch, settings, &tangent, moving.as_ref())?;
        let terms = reference_hypergradient_terms(batch, settings, &tangent, moving.as_ref())?;
        Ok(Self::new(&truth, hyper, terms))
    }
}

/// How far an answer is from the expected one. Relative to the largest entry of each quantity.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Report {
    /// Relative error of the loss.
    pub loss: f64,
    /// Worst error of the gradients over the largest entry.
    pub gradient: f64,
    /// Worst absolute error of m+, m-, `gamma_pos` and `gamma_neg`, all cosine similarities.
    pub thresholds: f64,
    /// Worst relative error of dL/dlambda, and worst error of the two sums of SPEC 5 over the absolute terms of
    /// both: terms of both signs may cancel to nearly 0.
    pub hypergradient: f64,
    /// Counts that are not exact, e.g. `count_neg[3]: 7, expected 8`; empty if all are.
    pub wrong_counts: Vec<String>,
}

impl Report {
    /// Compares an answer with the expected one.
    #[must_use]
    pub fn new(expected: &Expected, output: &LossOutput, hyper: Hypergradient) -> Self {
        let mut gradient = matrix_error(&expected.gradient, &output.gradient);
        if let Some(wanted) = &expected.reference_gradient {
            let got = output.reference_gradient.as_ref();
            gradient = gradient.max(got.map_or(f64::INFINITY, |got| matrix_error(wanted, got)));
        }
        let thresholds = [
            vector_error(&expected.min_pos, &output.min_pos),
            vector_error(&expected.max_neg, &output.max_neg),
            difference(expected.gamma_pos, output.gamma_pos),
            difference(expected.gamma_neg, output.gamma_neg),
        ];
        let terms = expected.hyper_terms.pos + expected.hyper_terms.neg;
        let single = |wanted: f64, got: f64| relative(difference(wanted, got), wanted.abs());
        let hypergradient = [
            single(expected.dloss_dlambda_pos, output.dloss_dlambda_pos),
            single(expected.dloss_dlambda_neg, output.dloss_dlambda_neg),
            relative(difference(expected.hyper_pos, hyper.pos), terms),
            relative(difference(expected.hyper_neg, hyper.neg), terms),
        ];
        Self {
            loss: relative(difference(expected.loss, output.loss), expected.loss.abs()),
            gradient,
            thresholds: worst(thresholds),
            hypergradient: worst(hypergradient),
            wrong_counts: wrong_counts(expected, output),
        }
    }

    /// Whether every count is exact and every error within `bound`.
    #[must_use]
    pub fn passes(&self, bound: f64) -> bool {
        self.wrong_counts.is_empty()
            && self.loss <= bound
            && self.gradient <= bound
            && self.thresholds <= bound
            && self.hypergradient <= bound
    }
}

/// Runs a case through a backend.
///
/// # Errors
/// What the backend answers.
pub fn run(case: &Case, backend: &mut dyn Backend) -> Result<Report> {
    answer(case, backend).map(|(output, hyper)| Report::new(&case.expected, &output, hyper))
}

fn answer(case: &Case, backend: &mut dyn Backend) -> Result<(LossOutput, Hypergradient)> {
    let batch = Batch::square(case.embeddings.view(), &case.labels);
    let mut output = LossOutput::default();
    backend.loss(&batch, &case.settings, &mut output)?;
    let hyper = backend.hypergradient(&batch, case.tangent.view(), None)?;
    Ok((output, hyper))
}

/// Runs a case through a backend that multiplies in TF32: it must answer what the truth does for rows that are
/// rounded so. The backend gets the case's own rows.
///
/// # Errors
/// What the backend answers, or the truth of the rounded rows.
pub fn run_tf32(case: &Case, backend: &mut dyn Backend) -> Result<Report> {
    let rounded = case.embeddings.mapv(to_tf32);
    let batch = Batch::square(rounded.view(), &case.labels);
    let expected = Expected::evaluate(&batch, &case.settings, &case.tangent, None)?;
    answer(case, backend).map(|(output, hyper)| Report::new(&expected, &output, hyper))
}

/// The nearest number of 10 bits of mantissa, ties away from zero, as GPUs round.
#[must_use]
pub fn to_tf32(value: f32) -> f32 {
    f32::from_bits(value.to_bits().wrapping_add(0x1000) & !0x1fff)
}

fn wrong_counts(expected: &Expected, output: &LossOutput) -> Vec<String> {
    let scalars = [
        ("probe_neg", expected.probe_neg, output.probe_neg),
        ("total_pos", expected.total_pos, output.total_pos),
        ("active", expected.active, output.active),
    ];
    let mut wrong: Vec<String> = scalars
        .iter()
        .filter(|(_, wanted, got)| wanted != got)
        .map(|(name, wanted, got)| format!("{name}: {got}, expected {wanted}"))
        .collect();
    let vectors = [
        ("count_pos", &expected.count_pos, &output.count_pos),
        ("count_neg", &expected.count_neg, &output.count_neg),
    ];
    for (name, wanted, got) in vectors {
        if wanted.len() != got.len() {
            wrong.push(format!("{name}: {} entries, expected {}", got.len(), wanted.len()));
        }
        let rows = wanted.iter().zip(got).enumerate().filter(|(_, (wanted, got))| wanted != got);
        wrong.extend(rows.map(|(row, (wanted, got))| format!("{name}[{row}]: {got}, expected {wanted}")));
    }
    wrong
}

/// 0 for equal values, infinities included; +inf where one is NaN.
fn difference(wanted: f64, got: f64) -> f64 {
    if wanted == got {
        return 0.0;
    }
    let error = (wanted - got).abs();
    if error.is_nan() { f64::INFINITY } else { error }
}

/// Error over scale. Where everything expected is 0, the answer must be 0 too.
fn relative(error: f64, scale: f64) -> f64 {
    if error == 0.0 { 0.0 } else { error / scale }
}

fn worst(errors: impl IntoIterator<Item = f64>) -> f64 {
    errors.into_iter().fold(0.0, f64::max)
}

fn vector_error(wanted: &[f64], got: &[f32]) -> f64 {
    if wanted.len() != got.len() {
        return f64::INFINITY;
    }
    worst(wanted.iter().zip(got).map(|(w, g)| difference(*w, f64::from(*g))))
}

fn matrix_error(wanted: &Array2<f64>, got: &Array2<f32>) -> f64 {
    if wanted.dim() != got.dim() {
        return f64::INFINITY;
    }
    let scale = worst(wanted.iter().map(|w| w.abs()));
    relative(worst(wanted.iter().zip(got).map(|(w, g)| difference(*w, f64::from(*g)))), scale)
}
