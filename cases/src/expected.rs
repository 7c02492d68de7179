//! The truth's results, a backend's errors against them, and bounds for these errors.

use ddtas::Result;
use ddtas::loss::{
    Batch, ElementType, LossOutput, LossSettings, Reference, ThresholdGradient, reference,
    reference_threshold_gradient, reference_threshold_gradient_terms,
};
use half::{bf16, f16};
use ndarray::Array2;

/// Bound on loss and gradient errors of a float32 backend, relative to the largest entry.
pub const SINGLE_PRECISION: f64 = 1e-5;

/// The same where f32 rows are rounded to TF32, against the truth of the rounded rows
/// ([`run_tf32`](crate::run_tf32)). Products of rows are exact in f32, so sets, counts and thresholds are as
/// exact as others; but pair weights are rounded too, by up to 2^-11 of each. The bound is twice that.
pub const TF32: f64 = 1e-3;

/// The expected results, in float64. Fields are those of [`LossOutput`] and [`ThresholdGradient`].
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
    pub total_neg: u64,
    pub min_pos: Vec<f64>,
    pub max_neg: Vec<f64>,
    pub count_pos: Vec<u32>,
    pub count_neg: Vec<u32>,
    pub active: u64,
    pub dloss_dlambda_pos: f64,
    pub dloss_dlambda_neg: f64,
    pub mean_pos: f64,
    pub mean_neg: f64,
    pub threshold_gradient: ThresholdGradient,
    /// Sums of the absolute terms of `threshold_gradient`, which its errors are measured against.
    pub threshold_terms: ThresholdGradient,
    /// Bounds for a backend's errors.
    pub bounds: Bounds,
}

impl Expected {
    /// Evaluates the scalar truth on a batch.
    ///
    /// # Errors
    /// As [`reference()`] and [`reference_threshold_gradient`].
    pub fn evaluate(
        batch: &Batch<'_>,
        settings: &LossSettings,
        tangent: &Array2<f32>,
        reference_tangent: Option<&Array2<f32>>,
    ) -> Result<Self> {
        let truth = reference(batch, settings)?;
        let wide = |matrix: &Array2<f32>| matrix.mapv(f64::from);
        let (tangent, moving) = (wide(tangent), reference_tangent.map(wide));
        let counts = |sets: &[Vec<usize>]| sets.iter().map(|set| set.len() as u32).collect();
        let selection = &truth.selection;
        Ok(Self {
            loss: truth.weighted.loss,
            gradient: truth.gradient.clone(),
            reference_gradient: truth.reference_gradient.clone(),
            gamma_pos: selection.tolerances.pos,
            gamma_neg: selection.tolerances.neg,
            probe_neg: selection.probe_neg,
            total_pos: selection.total_pos,
            total_neg: truth.total_neg,
            min_pos: selection.min_pos.clone(),
            max_neg: selection.max_neg.clone(),
            count_pos: counts(&selection.positives),
            count_neg: counts(&selection.negatives),
            active: truth.active(),
            dloss_dlambda_pos: truth.weighted.dloss_dlambda_pos,
            dloss_dlambda_neg: truth.weighted.dloss_dlambda_neg,
            mean_pos: truth.mean_pos,
            mean_neg: truth.mean_neg,
            threshold_gradient: reference_threshold_gradient(batch, settings, &tangent, moving.as_ref())?,
            threshold_terms: reference_threshold_gradient_terms(batch, settings, &tangent, moving.as_ref())?,
            bounds: Bounds::new(batch, settings, &truth),
        })
    }

    /// Bounds the errors of the sums of SPEC 5 by the larger sum, too. Terms of both signs may cancel: in the
    /// reference cases at least 1/2,800 of them is left, in drawn batches it may be nearly nothing.
    pub(crate) fn bound_by_sums(&mut self) {
        let ThresholdGradient { pos, neg } = self.threshold_gradient;
        let of_terms = pos.abs().max(neg.abs()) / (self.threshold_terms.pos + self.threshold_terms.neg);
        // Without terms it is NaN, which min() passes over.
        self.bounds.sums = self.bounds.sums.min(SINGLE_PRECISION * of_terms);
    }

    /// The expected results as a backend would return them.
    #[must_use]
    pub fn output(&self) -> LossOutput {
        let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect();
        let single = |matrix: &Array2<f64>| matrix.mapv(|value| value as f32);
        LossOutput {
            loss: self.loss,
            gradient: single(&self.gradient),
            reference_gradient: self.reference_gradient.as_ref().map(single),
            gamma_pos: self.gamma_pos,
            gamma_neg: self.gamma_neg,
            probe_neg: self.probe_neg,
            total_pos: self.total_pos,
            total_neg: self.total_neg,
            min_pos: narrow(&self.min_pos),
            max_neg: narrow(&self.max_neg),
            count_pos: self.count_pos.clone(),
            count_neg: self.count_neg.clone(),
            active: self.active,
            dloss_dlambda_pos: self.dloss_dlambda_pos,
            dloss_dlambda_neg: self.dloss_dlambda_neg,
            mean_pos: self.mean_pos,
            mean_neg: self.mean_neg,
        }
    }
}

/// Bounds for a backend's errors against the truth of its rows, whatever their type.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bound for the loss and its derivatives by lambda, relative.
    pub loss: f64,
    /// Bound for the gradients, relative to the largest entry.
    pub gradient: f64,
    /// Bound for the sums of SPEC 5, relative to their absolute terms.
    pub sums: f64,
}

impl Bounds {
    /// Error of a similarity of 16-bit rows on tensor cores, which truncate when they add; f32 is added with
    /// rounding.
    pub const TRUNCATION: f64 = 4e-7;
    /// Allowed error over that of plain code in the same precision.
    const PLAIN_FACTOR: f64 = 3.0;
    /// Bound for m+, m- and gamma, which are cosine similarities.
    const THRESHOLDS: f64 = 2e-6;
    /// Bound for the mean similarities.
    const MEANS: f64 = 1e-5;

    fn new(batch: &Batch<'_>, settings: &LossSettings, truth: &Reference) -> Self {
        let dtype = batch.anchors.embeddings.element_type();
        let (e, g) = (batch.anchors.embeddings.to_f64(), &truth.weighted.weights);
        let plain = match &batch.references {
            None => plain_error(dtype, &(g + &g.t()), &e),
            Some(rows) => {
                let anchors = plain_error(dtype, g, &rows.embeddings.to_f64());
                anchors.max(plain_error(dtype, &g.t().to_owned(), &e))
            }
        };
        let truncation = if dtype == ElementType::F32 { 0.0 } else { Self::TRUNCATION };
        Self {
            // A term changes by at most its sharpness times what the similarity does.
            loss: SINGLE_PRECISION + settings.alpha.max(settings.beta) * truncation,
            gradient: SINGLE_PRECISION + Self::PLAIN_FACTOR * plain,
            sums: 1e-6,
        }
    }
}

/// Largest error of M R over its largest entry, where M is stored in the rows' type, as plain code would.
fn plain_error(dtype: ElementType, m: &Array2<f64>, rows: &Array2<f64>) -> f64 {
    let top = largest(m);
    if top == 0.0 {
        return 0.0;
    }
    // Plain code would scale its loss, as mixed-precision training does, lest f16 underflow.
    let scale = top.recip().log2().floor().exp2();
    let rounded = m.mapv(|value| round(dtype, value * scale) / scale);
    let product = m.dot(rows);
    relative(largest(&(&rounded.dot(rows) - &product)), largest(&product))
}

fn largest(m: &Array2<f64>) -> f64 {
    worst(m.iter().map(|value| value.abs()))
}

/// Errors of a result against the expected one, relative to the largest entry of each quantity.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Report {
    /// Relative error of the loss.
    pub loss: f64,
    /// Worst error of the gradients over the largest entry.
    pub gradient: f64,
    /// Worst absolute error of m+, m-, `gamma_pos` and `gamma_neg`, all cosine similarities.
    pub thresholds: f64,
    /// The worse of `slopes` and `sums`.
    pub threshold_gradient: f64,
    /// Worst relative error of dL/dlambda.
    #[serde(skip)]
    pub slopes: f64,
    /// Worst error of the two sums of SPEC 5 over the absolute terms of both: terms of both signs may cancel to
    /// nearly 0.
    #[serde(skip)]
    pub sums: f64,
    /// Worst absolute error of the mean similarities.
    #[serde(skip)]
    pub means: f64,
    /// Counts that are not exact, e.g. `count_neg[3]: 7, expected 8`; empty if all are.
    pub wrong_counts: Vec<String>,
}

impl Report {
    /// Compares an answer with the expected one.
    #[must_use]
    pub fn new(expected: &Expected, output: &LossOutput, threshold_gradient: ThresholdGradient) -> Self {
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
        let terms = expected.threshold_terms.pos + expected.threshold_terms.neg;
        let single = |wanted: f64, got: f64| relative(difference(wanted, got), wanted.abs());
        let slopes = single(expected.dloss_dlambda_pos, output.dloss_dlambda_pos)
            .max(single(expected.dloss_dlambda_neg, output.dloss_dlambda_neg));
        let sums = relative(difference(expected.threshold_gradient.pos, threshold_gradient.pos), terms)
            .max(relative(difference(expected.threshold_gradient.neg, threshold_gradient.neg), terms));
        // Without such pairs the mean is NaN on both sides.
        let mean = |wanted: f64, got: f64| {
            if wanted.is_nan() && got.is_nan() { 0.0 } else { difference(wanted, got) }
        };
        Self {
            loss: single(expected.loss, output.loss),
            gradient,
            thresholds: worst(thresholds),
            threshold_gradient: slopes.max(sums),
            slopes,
            sums,
            means: mean(expected.mean_pos, output.mean_pos).max(mean(expected.mean_neg, output.mean_neg)),
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
            && self.threshold_gradient <= bound
    }

    /// Whether every count is exact and every error within its own bound.
    #[must_use]
    pub fn is_within(&self, bounds: &Bounds) -> bool {
        self.wrong_counts.is_empty()
            && self.loss <= bounds.loss
            && self.slopes <= bounds.loss
            && self.gradient <= bounds.gradient
            && self.thresholds <= Bounds::THRESHOLDS
            && self.sums <= bounds.sums
            && self.means <= Bounds::MEANS
    }
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

/// Error over scale; +inf for NaN, which a maximum would ignore. At scale 0 the error must be 0 too.
fn relative(error: f64, scale: f64) -> f64 {
    let ratio = if error == 0.0 { 0.0 } else { error / scale };
    if ratio.is_nan() { f64::INFINITY } else { ratio }
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
    relative(worst(wanted.iter().zip(got).map(|(w, g)| difference(*w, f64::from(*g)))), largest(wanted))
}

/// A value as rows of this type would store it.
fn round(dtype: ElementType, value: f64) -> f64 {
    match dtype {
        ElementType::F32 => f64::from(value as f32),
        ElementType::F16 => f16::from_f64(value).to_f64(),
        ElementType::Bf16 => bf16::from_f64(value).to_f64(),
    }
}
