//! The results of a loss evaluation.

use ndarray::Array2;

use super::PairTotals;

/// Result of one loss evaluation. A backend refills it in place, so that a
/// training loop that keeps one allocates nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct LossOutput {
    /// The loss L (SPEC 4).
    pub loss: f64,
    /// dL/d(anchors), `[B, D]`. Square form: the whole gradient `(G + Gᵀ) E`.
    pub gradient: Array2<f32>,
    /// dL/d(references), `[N, D]`, if the batch asked for it.
    pub reference_gradient: Option<Array2<f32>>,
    /// The positive tolerance in force, after adaptation (SPEC 3); `+inf` with
    /// [`Mining::None`](super::Mining::None).
    pub gamma_pos: f64,
    /// The negative tolerance in force, likewise.
    pub gamma_neg: f64,
    /// Negatives that passed the probe, over all anchors.
    pub probe_neg: u64,
    /// Ordered positive pairs, N_pos.
    pub total_pos: u64,
    /// Ordered negative pairs.
    pub total_neg: u64,
    /// Smallest similarity to a positive, an entry per anchor; `+inf` if it has none.
    pub min_pos: Vec<f32>,
    /// Largest similarity to a negative, an entry per anchor; `-inf` if it has none.
    pub max_neg: Vec<f32>,
    /// |P_i|, inactive anchors included.
    pub count_pos: Vec<u32>,
    /// |N_i|, inactive anchors included.
    pub count_neg: Vec<u32>,
    /// Anchors with both sets non-empty.
    pub active: u64,
    /// dL/d(lambda_pos).
    pub dloss_dlambda_pos: f64,
    /// dL/d(lambda_neg).
    pub dloss_dlambda_neg: f64,
    /// Mean similarity over all positive pairs of the batch; NaN if there is none.
    pub mean_pos: f64,
    /// Mean similarity over all negative pairs of the batch; NaN if there is none.
    pub mean_neg: f64,
}

impl Default for LossOutput {
    fn default() -> Self {
        Self {
            loss: 0.0,
            gradient: Array2::zeros((0, 0)),
            reference_gradient: None,
            gamma_pos: 0.0,
            gamma_neg: 0.0,
            probe_neg: 0,
            total_pos: 0,
            total_neg: 0,
            min_pos: Vec::new(),
            max_neg: Vec::new(),
            count_pos: Vec::new(),
            count_neg: Vec::new(),
            active: 0,
            dloss_dlambda_pos: 0.0,
            dloss_dlambda_neg: 0.0,
            mean_pos: f64::NAN,
            mean_neg: f64::NAN,
        }
    }
}

impl LossOutput {
    /// The totals that the tolerances adapt to (SPEC 3); of a part of a batch, its own share of them.
    #[must_use]
    pub fn pair_totals(&self) -> PairTotals {
        PairTotals { probe_neg: self.probe_neg, total_pos: self.total_pos }
    }

    /// Numbers of positive and negative pairs that enter the loss: |P_i| and |N_i|, summed over active
    /// anchors. For a part of a batch use [`mined_of_part`](Self::mined_of_part): pairs found by other parts
    /// can make an anchor active.
    #[must_use]
    pub fn mined(&self) -> (u64, u64) {
        self.mined_of_part(&self.count_pos, &self.count_neg)
    }

    /// Numbers of the part's own pairs that enter the loss: the sizes of its sets, summed over the anchors
    /// that are active by `count_pos` and `count_neg`, the sizes over all parts.
    #[must_use]
    pub fn mined_of_part(&self, count_pos: &[u32], count_neg: &[u32]) -> (u64, u64) {
        let own = self.count_pos.iter().zip(&self.count_neg);
        own.zip(count_pos.iter().zip(count_neg))
            .filter(|(_, (pos, neg))| **pos > 0 && **neg > 0)
            .fold((0, 0), |sum, ((pos, neg), _)| (sum.0 + u64::from(*pos), sum.1 + u64::from(*neg)))
    }
}

/// d/dlambda of <dL/dE, tangent> with the mined sets held fixed (SPEC 5), before the factor -eta.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ThresholdGradient {
    /// Through lambda_pos.
    pub pos: f64,
    /// Through lambda_neg.
    pub neg: f64,
}
