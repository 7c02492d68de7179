//! The sums of SPEC 5 over the pairs of the last loss.
//!
//! `sum_ij W_ij (edot_i . e_j + e_i . edot_j)` with W = dG/dlambda is
//! `<(W + W^T) E, edot>`: the gradient's walk with other weights, and a dot product at its end.

use ndarray::ArrayView2;

use super::pairs::Owner;
use super::walk::Walk;
use super::weigh::Kind;
use crate::loss::ThresholdGradient;

/// Both sums; `walk` is over the batch of the last loss.
pub fn threshold_gradient(
    walk: &mut Walk<'_>,
    tangent: ArrayView2<'_, f32>,
    reference_tangent: Option<ArrayView2<'_, f32>>,
) -> ThresholdGradient {
    let mut sum = |kind| {
        let mut total = along(walk, Owner::Rows, kind, tangent);
        if let (Some(tangent), false) = (reference_tangent, walk.known.pairs.square) {
            total += along(walk, Owner::Columns, kind, tangent);
        }
        total
    };
    ThresholdGradient { pos: sum(Kind::LambdaPos), neg: sum(Kind::LambdaNeg) }
}

fn along(walk: &mut Walk<'_>, owner: Owner, kind: Kind, tangent: ArrayView2<'_, f32>) -> f64 {
    let rows = walk.known.pairs.side(owner).order;
    let dot = |position: usize, _: usize, sum: &[f32]| {
        let tangent = tangent.row(rows.rows[position] as usize);
        sum.iter().zip(tangent).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    // In one part, so that a dot product has one order of summation.
    walk.run(owner, kind, 1, dot).sum
}
