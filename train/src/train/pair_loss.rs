//! The loss of a training run: that of DDTAS, or for comparison the contrastive or multi-similarity loss,
//! over the same mined pairs.
//!
//! The other two are computed in scalar float64 on top of [`reference()`], with B x N matrices: they are for
//! comparison runs, not for speed. They fill the same [`LossOutput`] as a backend.
//!
//! * contrastive: positives `1 - S`, negatives `max(0, S - lambda_neg)`, each kind averaged over its non-zero
//!   terms (ContrastiveLoss of pytorch-metric-learning on cosine similarity, margins 1 and 0.5);
//! * multi-similarity (Wang et al., CVPR 2019, eq. 14): alpha 2, beta 50, base `lambda_neg`, mean over
//!   anchors. Its miner is [`Mining::Symmetric`](ddtas::loss::Mining::Symmetric) with the miner's epsilon as
//!   gamma (0.1).

use ddtas::Result;
use ddtas::backend::Backend;
use ddtas::loss::gradient::gradients;
use ddtas::loss::select::Selection;
use ddtas::loss::similarity::Similarities;
use ddtas::loss::{Batch, LossOutput, LossScalars, LossSettings, reference};
use ndarray::Array2;
use serde::{Deserialize, Serialize};

/// The pair loss of a training run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PairLoss {
    /// The soft contrastive loss of DDTAS, with a threshold lambda.
    #[default]
    SoftContrastive,
    /// 1 - similarity on positives, a hinge at --margin on negatives.
    Contrastive,
    /// The multi-similarity loss: log-sum-exp over the pairs of each anchor.
    MultiSimilarity,
}

/// Similarity from which on the contrastive loss does not pull positives.
const POSITIVE_MARGIN: f64 = 1.0;

/// Exponents' factors of multi-similarity's positive and negative terms.
const MS_ALPHA: f64 = 2.0;
const MS_BETA: f64 = 50.0;

/// A loss and its pair weights dL/dS.
struct Evaluated {
    loss: f64,
    weights: Array2<f64>,
}

impl PairLoss {
    /// Mines a batch with `settings` and evaluates the loss and its gradient into `output`.
    ///
    /// Mining, counts and thresholds are those of the DDTAS loss. The other losses use `lambda_neg` as their
    /// margin (0.5 in both papers), and output 0 for the derivatives with respect to it.
    ///
    /// # Errors
    /// Errors of the backend.
    pub(super) fn evaluate(
        self,
        backend: &mut dyn Backend,
        batch: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()> {
        let loss = match self {
            Self::SoftContrastive => return backend.loss(batch, settings, output),
            Self::Contrastive => contrastive,
            Self::MultiSimilarity => multi_similarity,
        };
        let truth = reference(batch, settings)?;
        let selection = &truth.selection;
        let Evaluated { loss, weights } = loss(&truth.similarities, selection, settings.lambda_neg);
        let anchors = batch.anchors.embeddings.to_f64();
        let references = batch.references.map(|rows| rows.embeddings.to_f64());
        let (gradient, reference_gradient) =
            gradients(&weights, &anchors, references.as_ref(), batch.reference_gradient);
        let sizes = |sets: &[Vec<usize>]| sets.iter().map(|set| set.len() as u32).collect();
        let narrow = |values: &[f64]| values.iter().map(|&x| x as f32).collect();
        let single = |matrix: Array2<f64>| matrix.mapv(|x| x as f32);
        *output = LossOutput {
            gradient: single(gradient),
            reference_gradient: reference_gradient.map(single),
            min_pos: narrow(&selection.min_pos),
            max_neg: narrow(&selection.max_neg),
            count_pos: sizes(&selection.positives),
            count_neg: sizes(&selection.negatives),
            ..LossOutput::default()
        };
        let no_slopes = LossScalars { dloss_dlambda_pos: 0.0, dloss_dlambda_neg: 0.0, ..truth.scalars() };
        output.set_scalars(&LossScalars { loss, ..no_slopes });
        Ok(())
    }
}

/// Every mined pair, even if its anchor has no pairs of the other kind.
fn pairs(sets: &[Vec<usize>]) -> impl Iterator<Item = (usize, usize)> + Clone + '_ {
    sets.iter().enumerate().flat_map(|(i, set)| set.iter().map(move |&j| (i, j)))
}

fn contrastive(similarities: &Similarities, selection: &Selection, margin: f64) -> Evaluated {
    let s = &similarities.values;
    let mut out = Evaluated { loss: 0.0, weights: Array2::zeros(s.dim()) };
    let mut add_kind = |sets, slope: f64, margin: f64| {
        let term = |pair: (usize, usize)| (slope * (s[pair] - margin)).max(0.0);
        let above = || pairs(sets).filter(|&pair| term(pair) > 0.0);
        let count = above().count() as f64;
        for pair in above() {
            out.loss += term(pair) / count;
            out.weights[pair] = slope / count;
        }
    };
    add_kind(&selection.positives, -1.0, POSITIVE_MARGIN);
    add_kind(&selection.negatives, 1.0, margin);
    out
}

fn multi_similarity(similarities: &Similarities, selection: &Selection, base: f64) -> Evaluated {
    let s = &similarities.values;
    let anchors = similarities.anchors();
    let mut out = Evaluated { loss: 0.0, weights: Array2::zeros(s.dim()) };
    for i in 0..anchors {
        for (set, slope) in [(&selection.positives[i], -MS_ALPHA), (&selection.negatives[i], MS_BETA)] {
            // log(1 + sum exp(x)), with the largest exponent factored out.
            let x = |j: usize| slope * (s[[i, j]] - base);
            let largest = set.iter().map(|&j| x(j)).fold(0.0, f64::max);
            let sum: f64 = (-largest).exp() + set.iter().map(|&j| (x(j) - largest).exp()).sum::<f64>();
            let share = 1.0 / (anchors as f64 * slope.abs());
            out.loss += share * (largest + sum.ln());
            for &j in set {
                out.weights[[i, j]] = share * slope * (x(j) - largest).exp() / sum;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use ddtas::backend::cpu::CpuBackend;
    use ddtas::loss::Mining;
    use ndarray::array;

    use super::*;

    /// Rows on the unit circle, so that unit norm survives a change of angle.
    fn rows(angles: &[f64]) -> Array2<f32> {
        Array2::from_shape_fn((angles.len(), 2), |(i, d)| {
            if d == 0 { angles[i].cos() as f32 } else { angles[i].sin() as f32 }
        })
    }

    const ANGLES: [f64; 6] = [0.0, 0.7, 0.3, 1.1, 1.4, 0.9];
    const LABELS: [i64; 6] = [0, 0, 1, 1, 2, 2];

    fn settings(margin: f64) -> LossSettings {
        LossSettings { mining: Mining::None, lambda_neg: margin, ..LossSettings::default() }
    }

    fn loss_at(loss: PairLoss, angles: &[f64]) -> LossOutput {
        let embeddings = rows(angles);
        let mut output = LossOutput::default();
        let settings = settings(0.5);
        let batch = Batch::square(embeddings.view(), &LABELS);
        loss.evaluate(&mut CpuBackend::new(), &batch, &settings, &mut output).unwrap();
        output
    }

    #[test]
    fn gradients_agree_with_central_differences() {
        for loss in [PairLoss::SoftContrastive, PairLoss::Contrastive, PairLoss::MultiSimilarity] {
            let gradient = loss_at(loss, &ANGLES).gradient;
            for row in 0..ANGLES.len() {
                // Large compared with the rounding of rows to single precision.
                let step = 1e-3;
                let moved = |by: f64| {
                    let mut angles = ANGLES;
                    angles[row] += by;
                    loss_at(loss, &angles).loss
                };
                let wanted = (moved(step) - moved(-step)) / (2.0 * step);
                let along = array![-ANGLES[row].sin(), ANGLES[row].cos()];
                let got = gradient.row(row).mapv(f64::from).dot(&along);
                assert!(
                    (got - wanted).abs() < 2e-4 * (1.0 + wanted.abs()),
                    "{loss:?} row {row}: {got} {wanted}"
                );
            }
        }
    }

    #[test]
    fn contrastive_is_the_mean_over_violated_pairs() {
        // Negatives at S = 1 violate the margin; those at cos 1.2 = 0.36 do not, and do not enter the mean.
        let embeddings = rows(&[0.0, 1.2, 0.0, 1.2]);
        let batch = Batch::square(embeddings.view(), &[0, 0, 1, 1]);
        for margin in [0.5, 0.8] {
            let mut output = LossOutput::default();
            let (loss, backend) = (PairLoss::Contrastive, &mut CpuBackend::new());
            loss.evaluate(backend, &batch, &settings(margin), &mut output).unwrap();
            let wanted = (1.0 - 1.2f64.cos()) + (1.0 - margin);
            assert!((output.loss - wanted).abs() < 1e-6, "{} {wanted}", output.loss);
        }
    }

    #[test]
    fn multi_similarity_of_one_pair_of_each_kind_is_its_formula() {
        let embeddings = rows(&[0.0, 1.0, 0.5]);
        let loss_of = |labels: &[i64]| {
            let (batch, mut output) = (Batch::square(embeddings.view(), labels), LossOutput::default());
            let (loss, backend) = (PairLoss::MultiSimilarity, &mut CpuBackend::new());
            loss.evaluate(backend, &batch, &settings(0.4), &mut output).unwrap();
            output.loss
        };
        // Without negatives, mining keeps no pair.
        assert_eq!(loss_of(&[0, 0, -1]), 0.0);
        let found = loss_of(&[0, 0, 1]);
        let (p, n) = (1f64.cos(), 0.5f64.cos());
        let anchor =
            (1.0 + (-2.0 * (p - 0.4)).exp()).ln() / 2.0 + (1.0 + (50.0 * (n - 0.4)).exp()).ln() / 50.0;
        assert!((found - 2.0 * anchor / 3.0).abs() < 1e-6, "{found} {}", 2.0 * anchor / 3.0);
    }
}
