//! The soft contrastive loss and its pair weights G = dL/dS (SPEC 4).

use ndarray::Array2;

use super::LossSettings;
use super::logistic::{sigmoid, softplus};
use super::select::Selection;
use super::similarity::Similarities;

/// Loss, weights and threshold derivatives of a mined batch.
#[derive(Debug, Clone)]
pub struct Weighted {
    /// L.
    pub loss: f64,
    /// G, `[B, N]`; zero outside the mined pairs.
    pub weights: Array2<f64>,
    /// dL/d(lambda_pos).
    pub dloss_dlambda_pos: f64,
    /// dL/d(lambda_neg).
    pub dloss_dlambda_neg: f64,
}

/// Evaluates SPEC 4 on the mined pairs of a batch, or of a part of one; `total` is B of the factor 1/B. Mining
/// is constant under differentiation.
///
/// # Panics
/// If `selection` is of a larger batch than `similarities`.
#[must_use]
pub fn weigh(
    similarities: &Similarities,
    selection: &Selection,
    settings: &LossSettings,
    total: usize,
) -> Weighted {
    let s = &similarities.values;
    let batch = total as f64;
    let LossSettings { alpha, beta, lambda_pos, lambda_neg, .. } = *settings;
    let mut out = Weighted {
        loss: 0.0,
        weights: Array2::zeros(s.dim()),
        dloss_dlambda_pos: 0.0,
        dloss_dlambda_neg: 0.0,
    };
    for (i, size) in selection.sizes().iter().enumerate().filter(|(_, size)| !size.contains(&0)) {
        let [of_positives, of_negatives] = size.map(|size| 2.0 / (batch * f64::from(size)));
        for &j in &selection.positives[i] {
            let x = -beta * (s[[i, j]] - lambda_pos);
            out.loss += of_positives / beta * softplus(x);
            out.weights[[i, j]] = -of_positives * sigmoid(x);
            out.dloss_dlambda_pos -= out.weights[[i, j]];
        }
        for &j in &selection.negatives[i] {
            let x = alpha * (s[[i, j]] - lambda_neg);
            out.loss += of_negatives / alpha * softplus(x);
            out.weights[[i, j]] = of_negatives * sigmoid(x);
            out.dloss_dlambda_neg -= out.weights[[i, j]];
        }
    }
    out
}

/// dL/d(anchors) and, if `wanted`, dL/d(references) from `g` = dL/dS. Without references: the square form.
///
/// # Panics
/// If `g` is not `[B, N]`, or dimensions differ.
#[must_use]
pub fn gradients(
    g: &Array2<f64>,
    anchors: &Array2<f64>,
    references: Option<&Array2<f64>>,
    wanted: bool,
) -> (Array2<f64>, Option<Array2<f64>>) {
    match references {
        None => ((g + &g.t()).dot(anchors), None),
        Some(references) => (g.dot(references), wanted.then(|| g.t().dot(anchors))),
    }
}
