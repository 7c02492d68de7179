//! The threshold gradient of the online threshold generator (SPEC 5).

use ndarray::Array2;

use super::logistic::sigmoid;
use super::select::Selection;
use super::similarity::Similarities;
use super::{LossSettings, ThresholdGradient};

/// `sum_ij (dG_ij/dlambda) tilt_ij` with `tilt_ij = edot_i . e_j + e_i . edot_j`, `[B, N]`:
/// how fast each similarity moves along the tangent. `total` is B of the factor 1/B.
///
/// # Panics
/// If `tilt` or `selection` is of a smaller batch than `similarities`.
#[must_use]
pub fn threshold_gradient(
    similarities: &Similarities,
    selection: &Selection,
    settings: &LossSettings,
    tilt: &Array2<f64>,
    total: usize,
) -> ThresholdGradient {
    let s = &similarities.values;
    let batch = total as f64;
    let LossSettings { alpha, beta, lambda_pos, lambda_neg, .. } = *settings;
    let mut sums = ThresholdGradient::default();
    for i in (0..similarities.anchors()).filter(|&i| selection.is_active(i)) {
        let (positives, negatives) = (&selection.positives[i], &selection.negatives[i]);
        for &j in positives {
            let p = sigmoid(-beta * (s[[i, j]] - lambda_pos));
            sums.pos -= 2.0 * beta / (batch * positives.len() as f64) * p * (1.0 - p) * tilt[[i, j]];
        }
        for &j in negatives {
            let p = sigmoid(alpha * (s[[i, j]] - lambda_neg));
            sums.neg -= 2.0 * alpha / (batch * negatives.len() as f64) * p * (1.0 - p) * tilt[[i, j]];
        }
    }
    sums
}
