//! The sums of SPEC 5 over the pairs of the last loss.
//!
//! `sum_ij W_ij (edot_i . e_j + e_i . edot_j)` with W = dG/dlambda is
//! `<(W + W^T) E, edot>`: the gradient's walk with other weights, and a dot product at its end.

use ndarray::ArrayView2;

use super::pairs::Owner;
use super::remembered::Remembered;
use super::walk::Walk;
use super::weigh::Kind;
use crate::loss::Hypergradient;
use crate::{Error, Result};

/// Checks that batch and tangents have the shape of the last loss.
pub fn check_shapes(
    remembered: &Remembered,
    batch: &Remembered,
    tangent: &ArrayView2<'_, f32>,
    reference_tangent: Option<&ArrayView2<'_, f32>>,
) -> Result<()> {
    let same = |what, expected: usize, got: usize| {
        if expected == got { Ok(()) } else { Err(Error::LengthMismatch { what, expected, got }) }
    };
    let (rows, dim) = remembered.anchors;
    let references = remembered.references.unwrap_or(0);
    same("rows of the batch of the last loss", rows, batch.anchors.0)?;
    same("dimension of the batch of the last loss", dim, batch.anchors.1)?;
    same("references of the last loss", references, batch.references.unwrap_or(0))?;
    same("rows of the tangent", rows, tangent.nrows())?;
    same("dimension of the tangent", dim, tangent.ncols())?;
    check_finite("tangent", tangent)?;
    if let (Some(tangent), Some(references)) = (reference_tangent, remembered.references) {
        same("rows of the reference tangent", references, tangent.nrows())?;
        same("dimension of the reference tangent", dim, tangent.ncols())?;
        check_finite("reference tangent", tangent)?;
    }
    Ok(())
}

fn check_finite(rows: &'static str, tangent: &ArrayView2<'_, f32>) -> Result<()> {
    match tangent.outer_iter().position(|row| row.iter().any(|x| !x.is_finite())) {
        Some(row) => Err(Error::NotFinite { rows, row }),
        None => Ok(()),
    }
}

/// Both sums; `walk` is over the batch of the last loss.
pub fn hypergradient(
    walk: &mut Walk<'_>,
    tangent: ArrayView2<'_, f32>,
    reference_tangent: Option<ArrayView2<'_, f32>>,
) -> Hypergradient {
    let mut sum = |kind| {
        let mut total = along(walk, Owner::Rows, kind, tangent);
        if let (Some(tangent), false) = (reference_tangent, walk.known.pairs.square) {
            total += along(walk, Owner::Columns, kind, tangent);
        }
        total
    };
    Hypergradient { pos: sum(Kind::LambdaPos), neg: sum(Kind::LambdaNeg) }
}

fn along(walk: &mut Walk<'_>, owner: Owner, kind: Kind, tangent: ArrayView2<'_, f32>) -> f64 {
    let rows = walk.known.pairs.side(owner).order;
    let dot = |position: usize, _: usize, sum: &[f32]| {
        let tangent = tangent.row(rows.rows[position] as usize);
        sum.iter().zip(tangent).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    // In one part: a dot product has one order of summation.
    walk.run(owner, kind, 1, dot).sum
}
