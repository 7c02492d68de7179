//! What a backend's answer is held to: counts exact, floats within the precision's bound.

use ddtas::backend::Nearest;
use ddtas::loss::{
    Batch, Hypergradient, LossOutput, LossSettings, reference, reference_hypergradient,
    reference_hypergradient_terms,
};
use ndarray::Array2;

use super::{Dtype, Side, batch};

/// The truth of a case.
#[derive(Clone)]
pub struct Expected {
    pub output: LossOutput,
    /// Largest relative error of the loss and of its derivatives by lambda.
    pub loss_bound: f64,
    /// Largest absolute error a gradient entry may have.
    pub gradient_bound: f64,
    pub reference_gradient_bound: f64,
    pub hyper: Hypergradient,
    /// Sums of the absolute terms of `hyper`.
    pub hyper_terms: Hypergradient,
}

/// Relative to the largest entry: the bound of f32 (the issue's, and the CPU's).
const F32_BOUND: f64 = 1e-5;
/// What tensor cores, which truncate when they add, may be off in a similarity of 16-bit rows. f32 is added
/// by the rounding adder.
const TRUNCATION: f64 = 4e-7;
/// Error of a hyper-gradient over the sum of its absolute terms.
const HYPER_BOUND: f64 = 1e-6;
/// Error over that of plain code in the same precision.
const PLAIN_FACTOR: f64 = 3.0;

impl Expected {
    /// Evaluates a batch in float64.
    pub fn new(dtype: Dtype, anchors: &Side, references: Option<&Side>, settings: &LossSettings) -> Self {
        let batch = batch(anchors, references);
        let truth = reference(&batch, settings).expect("the case is valid");
        let tangent = |side: &Side| side.tangent.mapv(f64::from);
        let (own, moving) = (tangent(anchors), references.map(tangent));
        let hyper =
            reference_hypergradient(&batch, settings, &own, moving.as_ref()).expect("the case is valid");
        let hyper_terms = reference_hypergradient_terms(&batch, settings, &own, moving.as_ref())
            .expect("the case is valid");

        let e = batch.anchors.embeddings.to_f64();
        let g = &truth.weighted.weights;
        let (gradient_error, reference_error) = match &batch.references {
            None => (plain_error(dtype, &(g + &g.t()), &e), 0.0),
            Some(rows) => {
                (plain_error(dtype, g, &rows.embeddings.to_f64()), plain_error(dtype, &g.t().to_owned(), &e))
            }
        };
        let bound = |plain: f64, m: &Array2<f64>| PLAIN_FACTOR * plain + F32_BOUND * largest(m);
        let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect();
        let count = |sets: &[Vec<usize>]| sets.iter().map(|set| set.len() as u32).collect();
        let truncation = if dtype == Dtype::F32 { 0.0 } else { TRUNCATION };
        Self {
            // A term changes by at most its sharpness times what the similarity does.
            loss_bound: F32_BOUND + settings.alpha.max(settings.beta) * truncation,
            gradient_bound: bound(gradient_error, &truth.gradient),
            reference_gradient_bound: truth
                .reference_gradient
                .as_ref()
                .map_or(0.0, |m| bound(reference_error, m)),
            hyper,
            hyper_terms,
            output: LossOutput {
                loss: truth.weighted.loss,
                gradient: truth.gradient.mapv(|value| value as f32),
                reference_gradient: truth.reference_gradient.as_ref().map(|m| m.mapv(|value| value as f32)),
                gamma_pos: truth.selection.tolerances.pos,
                gamma_neg: truth.selection.tolerances.neg,
                probe_neg: truth.selection.probe_neg,
                total_pos: truth.selection.total_pos,
                total_neg: truth.total_neg,
                min_pos: narrow(&truth.selection.min_pos),
                max_neg: narrow(&truth.selection.max_neg),
                count_pos: count(&truth.selection.positives),
                count_neg: count(&truth.selection.negatives),
                active: truth.active(),
                dloss_dlambda_pos: truth.weighted.dloss_dlambda_pos,
                dloss_dlambda_neg: truth.weighted.dloss_dlambda_neg,
                mean_pos: truth.mean_pos,
                mean_neg: truth.mean_neg,
            },
        }
    }
}

/// Largest error of M R where M is stored in the rows' type, as plain code would.
fn plain_error(dtype: Dtype, m: &Array2<f64>, rows: &Array2<f64>) -> f64 {
    let top = largest(m);
    if top == 0.0 {
        return 0.0;
    }
    // Plain code would scale its loss, as mixed-precision training does, lest f16 underflow.
    let scale = top.recip().log2().floor().exp2();
    let rounded = m.mapv(|value| dtype.round(value * scale) / scale);
    largest(&(&rounded.dot(rows) - &m.dot(rows)))
}

fn largest(m: &Array2<f64>) -> f64 {
    m.iter().fold(0.0, |top, value| top.max(value.abs()))
}

/// Holds an answer to the truth.
///
/// # Errors
/// The first thing that differs: where, what came out, what was wanted.
pub fn compare(expected: &Expected, got: &LossOutput, hyper: Hypergradient) -> Result<(), String> {
    let want = &expected.output;
    exact("total_pos", &[got.total_pos], &[want.total_pos])?;
    exact("probe_neg", &[got.probe_neg], &[want.probe_neg])?;
    exact("count_pos", &got.count_pos, &want.count_pos)?;
    exact("count_neg", &got.count_neg, &want.count_neg)?;
    exact("active", &[got.active], &[want.active])?;
    for (name, got, want) in
        [("gamma_pos", got.gamma_pos, want.gamma_pos), ("gamma_neg", got.gamma_neg, want.gamma_neg)]
    {
        close(name, [got], [want], F32_BOUND * want.abs())?;
    }
    for (name, got, want) in [
        ("loss", got.loss, want.loss),
        ("dloss_dlambda_pos", got.dloss_dlambda_pos, want.dloss_dlambda_pos),
        ("dloss_dlambda_neg", got.dloss_dlambda_neg, want.dloss_dlambda_neg),
    ] {
        close(name, [got], [want], expected.loss_bound * want.abs() + 1e-12)?;
    }
    for (name, got, want) in
        [("mean_pos", got.mean_pos, want.mean_pos), ("mean_neg", got.mean_neg, want.mean_neg)]
    {
        close(name, [got], [want], 1e-5)?;
    }
    let wide = |values: &[f32]| values.iter().copied().map(f64::from).collect::<Vec<_>>();
    close("min_pos", wide(&got.min_pos), wide(&want.min_pos), 2e-6)?;
    close("max_neg", wide(&got.max_neg), wide(&want.max_neg), 2e-6)?;
    matrix("gradient", &got.gradient, &want.gradient, expected.gradient_bound)?;
    match (&got.reference_gradient, &want.reference_gradient) {
        (None, None) => {}
        (Some(got), Some(want)) => {
            matrix("reference_gradient", got, want, expected.reference_gradient_bound)?;
        }
        (got, _) => return Err(format!("reference_gradient: present is {}", got.is_some())),
    }
    // Sums of many terms of both signs: relative to the terms, not to what is left of them.
    let bound = HYPER_BOUND * (expected.hyper_terms.pos + expected.hyper_terms.neg);
    close("hyper_pos", [hyper.pos], [expected.hyper.pos], bound)?;
    close("hyper_neg", [hyper.neg], [expected.hyper.neg], bound)
}

fn exact<T: PartialEq + std::fmt::Display>(name: &str, got: &[T], want: &[T]) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{name}: {} entries, want {}", got.len(), want.len()));
    }
    match got.iter().zip(want).position(|(got, want)| got != want) {
        Some(at) => Err(format!("{name}[{at}] is {}, want {}", got[at], want[at])),
        None => Ok(()),
    }
}

/// Every entry within `bound`; infinities and NaN must be the same ones.
fn close(
    name: &str,
    got: impl IntoIterator<Item = f64>,
    want: impl IntoIterator<Item = f64>,
    bound: f64,
) -> Result<(), String> {
    let (got, want): (Vec<_>, Vec<_>) = (got.into_iter().collect(), want.into_iter().collect());
    if got.len() != want.len() {
        return Err(format!("{name}: {} entries, want {}", got.len(), want.len()));
    }
    let error = |at: usize| {
        let (got, want) = (got[at], want[at]);
        if got == want || (got.is_nan() && want.is_nan()) { 0.0 } else { (got - want).abs() }
    };
    // A NaN on one side only compares as the worst of all.
    let rank = |at: &usize| if error(*at).is_nan() { f64::INFINITY } else { error(*at) };
    let Some(worst) = (0..got.len()).max_by(|a, b| rank(a).total_cmp(&rank(b))) else { return Ok(()) };
    if rank(&worst) <= bound {
        return Ok(());
    }
    Err(format!("{name}[{worst}] is {:e}, want {:e} within {bound:.1e}", got[worst], want[worst]))
}

fn matrix(name: &str, got: &Array2<f32>, want: &Array2<f32>, bound: f64) -> Result<(), String> {
    if got.dim() != want.dim() {
        return Err(format!("{name}: shape {:?}, want {:?}", got.dim(), want.dim()));
    }
    close(name, got.iter().copied().map(f64::from), want.iter().copied().map(f64::from), bound)
}

/// Holds a retrieval to the similarities in float64; ties within f32's error may swap.
///
/// # Errors
/// The first query whose list is wrong.
pub fn compare_nearest(batch: &Batch<'_>, k: usize, found: &Nearest) -> Result<(), String> {
    const BOUND: f64 = 2e-6;
    let s = batch.anchors.embeddings.to_f64().dot(&batch.reference_rows().embeddings.to_f64().t());
    if found.indices.dim() != (s.nrows(), k) || found.similarities.dim() != (s.nrows(), k) {
        return Err(format!("nearest: shape {:?}, want {:?}", found.indices.dim(), (s.nrows(), k)));
    }
    for (query, row) in s.outer_iter().enumerate() {
        let mut order: Vec<usize> = (0..row.len()).filter(|&j| !batch.is_square() || j != query).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        let mut seen = std::collections::HashSet::new();
        for place in 0..k {
            let (index, value) =
                (found.indices[[query, place]], f64::from(found.similarities[[query, place]]));
            let wrong =
                |want: String| Err(format!("nearest[{query}, {place}] is {index} at {value}, want {want}"));
            let Some(&best) = order.get(place) else {
                if index != Nearest::NONE || value != f64::NEG_INFINITY {
                    return wrong("none".into());
                }
                continue;
            };
            let valid = (index as usize) < row.len()
                && order.contains(&(index as usize))
                && seen.insert(index)
                && (row[index as usize] - value).abs() <= BOUND
                && (row[best] - value).abs() <= BOUND;
            if !valid {
                return wrong(format!("{best} at {}", row[best]));
            }
        }
    }
    Ok(())
}
