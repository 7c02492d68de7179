//! The soft contrastive loss and its pair weights G = dL/dS (SPEC 4).

use ndarray::Array2;

use super::LossSettings;
use super::select::Selection;
use super::similarity::Similarities;

/// `1 / (1 + exp(-x))`, stable for every x.
#[must_use]
pub fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

/// `log(1 + exp(x))`, stable for every x.
#[must_use]
pub fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

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

/// Evaluates SPEC 4 on the mined pairs. Mining is constant under differentiation.
#[must_use]
pub fn weigh(similarities: &Similarities, selection: &Selection, settings: &LossSettings) -> Weighted {
    let s = &similarities.values;
    let batch = similarities.anchors() as f64;
    let LossSettings { alpha, beta, lambda_pos, lambda_neg, .. } = *settings;
    let mut out = Weighted {
        loss: 0.0,
        weights: Array2::zeros(s.dim()),
        dloss_dlambda_pos: 0.0,
        dloss_dlambda_neg: 0.0,
    };
    for i in (0..similarities.anchors()).filter(|&i| selection.is_active(i)) {
        let (positives, negatives) = (&selection.positives[i], &selection.negatives[i]);
        for &j in positives {
            let x = -beta * (s[[i, j]] - lambda_pos);
            let share = 2.0 / (batch * positives.len() as f64);
            out.loss += share / beta * softplus(x);
            out.weights[[i, j]] = -share * sigmoid(x);
            out.dloss_dlambda_pos -= out.weights[[i, j]];
        }
        for &j in negatives {
            let x = alpha * (s[[i, j]] - lambda_neg);
            let share = 2.0 / (batch * negatives.len() as f64);
            out.loss += share / alpha * softplus(x);
            out.weights[[i, j]] = share * sigmoid(x);
            out.dloss_dlambda_neg -= out.weights[[i, j]];
        }
    }
    out
}
