//! Losses to compare with: plain contrastive and multi-similarity, over any mined pairs.
//!
//! They are here for comparison runs, not as the product: computed in scalar
//! float64 on top of [`reference()`](super::reference()), B x N matrices and all.
//! [`evaluate`] fills the same [`LossOutput`] as a backend, so a trainer does not care which it runs.
//!
//! * contrastive: positives `1 - S`, negatives `max(0, S - lambda_neg)`, each kind averaged over its non-zero
//!   terms (ContrastiveLoss of pytorch-metric-learning on cosine similarity, margins 1 and 0.5);
//! * multi-similarity (Wang et al., CVPR 2019, eq. 14): alpha 2, beta 50, base `lambda_neg`, mean over
//!   anchors. Its miner is [`Mining::Symmetric`](super::Mining::Symmetric) with the miner's epsilon as gamma
//!   (0.1).

use std::fmt;
use std::str::FromStr;

use ndarray::Array2;

use super::reference::gradients;
use super::select::Selection;
use super::similarity::Similarities;
use super::{Batch, LossOutput, LossScalars, LossSettings, reference};
use crate::{Error, Result};

/// The pair loss of a training run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum PairLoss {
    /// DDTAS's own (SPEC 4); backends compute it, fused.
    #[default]
    SoftContrastive,
    /// Hinge on negatives, linear on positives.
    Contrastive,
    /// Log-sum-exp over the pairs of each anchor.
    MultiSimilarity,
}

impl PairLoss {
    /// Every loss, DDTAS's own first.
    pub const ALL: [Self; 3] = [Self::SoftContrastive, Self::Contrastive, Self::MultiSimilarity];

    /// As the programs and files spell it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SoftContrastive => "soft-contrastive",
            Self::Contrastive => "contrastive",
            Self::MultiSimilarity => "multi-similarity",
        }
    }
}

impl fmt::Display for PairLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for PairLoss {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|loss| loss.name() == text);
        found.ok_or_else(|| Error::InvalidSetting {
            name: "loss",
            value: text.to_owned(),
            range: "soft-contrastive, contrastive or multi-similarity",
        })
    }
}

/// Similarity at which the contrastive loss stops pulling positives.
const POSITIVE_MARGIN: f64 = 1.0;

/// Sharpness of multi-similarity's positive and negative terms.
const MS_ALPHA: f64 = 2.0;
const MS_BETA: f64 = 50.0;

/// A loss and its pair weights dL/dS.
struct Evaluated {
    loss: f64,
    weights: Array2<f64>,
}

/// Mines a batch with `settings` and evaluates `loss` and its gradient into `output`.
///
/// Mining, counts and thresholds are those of the DDTAS loss. The baselines take their margin from
/// `lambda_neg` (both papers' is 0.5), and their derivatives with respect to it are given as 0.
/// [`PairLoss::SoftContrastive`] gives the scalar truth.
///
/// # Errors
/// As [`reference()`].
pub fn evaluate(
    loss: PairLoss,
    batch: &Batch<'_>,
    settings: &LossSettings,
    output: &mut LossOutput,
) -> Result<()> {
    let truth = reference(batch, settings)?;
    let (similarities, selection) = (&truth.similarities, &truth.selection);
    let evaluated = match loss {
        PairLoss::SoftContrastive => {
            Evaluated { loss: truth.weighted.loss, weights: truth.weighted.weights.clone() }
        }
        PairLoss::Contrastive => contrastive(similarities, selection, settings.lambda_neg),
        PairLoss::MultiSimilarity => multi_similarity(similarities, selection, settings.lambda_neg),
    };
    let anchors = batch.anchors.embeddings.to_f64();
    let references = batch.references.map(|rows| rows.embeddings.to_f64());
    let (gradient, reference_gradient) =
        gradients(&evaluated.weights, &anchors, references.as_ref(), batch.reference_gradient);
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
    output.set_scalars(&LossScalars { loss: evaluated.loss, ..truth.scalars() });
    if loss != PairLoss::SoftContrastive {
        (output.dloss_dlambda_pos, output.dloss_dlambda_neg) = (0.0, 0.0);
    }
    Ok(())
}

/// Every mined pair, whether or not its anchor has pairs of the other kind.
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
            // log(1 + sum exp(x)), the largest exponent taken out first.
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
    use ndarray::array;

    use super::super::Mining;
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
        evaluate(loss, &Batch::square(embeddings.view(), &LABELS), &settings, &mut output).unwrap();
        output
    }

    #[test]
    fn gradients_agree_with_central_differences() {
        for loss in [PairLoss::SoftContrastive, PairLoss::Contrastive, PairLoss::MultiSimilarity] {
            let gradient = loss_at(loss, &ANGLES).gradient;
            for row in 0..ANGLES.len() {
                // Large enough to dwarf the rounding of the rows to single precision.
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
        // Negatives at S = 1 violate the margin; those at cos 1.2 = 0.36 do not, and are not averaged over.
        let embeddings = rows(&[0.0, 1.2, 0.0, 1.2]);
        let batch = Batch::square(embeddings.view(), &[0, 0, 1, 1]);
        for margin in [0.5, 0.8] {
            let mut output = LossOutput::default();
            evaluate(PairLoss::Contrastive, &batch, &settings(margin), &mut output).unwrap();
            let wanted = (1.0 - 1.2f64.cos()) + (1.0 - margin);
            assert!((output.loss - wanted).abs() < 1e-6, "{} {wanted}", output.loss);
        }
    }

    #[test]
    fn multi_similarity_of_one_pair_of_each_kind_is_its_formula() {
        let embeddings = rows(&[0.0, 1.0, 0.5]);
        let mut output = LossOutput::default();
        let settings = settings(0.4);
        evaluate(
            PairLoss::MultiSimilarity,
            &Batch::square(embeddings.view(), &[0, 0, -1]),
            &settings,
            &mut output,
        )
        .unwrap();
        // Without a negative no pair is kept by mining.
        assert_eq!(output.loss, 0.0);
        evaluate(
            PairLoss::MultiSimilarity,
            &Batch::square(embeddings.view(), &[0, 0, 1]),
            &settings,
            &mut output,
        )
        .unwrap();
        let (p, n) = (1f64.cos(), 0.5f64.cos());
        let anchor =
            (1.0 + (-2.0 * (p - 0.4)).exp()).ln() / 2.0 + (1.0 + (50.0 * (n - 0.4)).exp()).ln() / 50.0;
        assert!((output.loss - 2.0 * anchor / 3.0).abs() < 1e-6, "{} {}", output.loss, 2.0 * anchor / 3.0);
    }
}
