//! Batches to draw at random.

use ddtas::backend::Backend;
use ddtas::loss::{Batch, LossOutput, LossSettings, reference};
use ndarray::{Array2, ArrayViewMut1};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{Expected, Report, is_clear};

/// Pairs closer to a threshold than this may be counted either way in single precision: f32 sums of D products err by some 1e-7.
pub const SLACK: f64 = 3e-6;

/// How to draw one side of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Draw {
    /// Rows.
    pub rows: usize,
    /// Dimensions of a row.
    pub dim: usize,
    /// Labels are drawn from `0..classes`, so sizes are ragged.
    pub classes: usize,
    /// Length of the noise added to a class centre of length 1.
    pub noise: f32,
    /// One row in this many is ignored; 0 for none.
    pub ignored: usize,
    /// One row in this many is a copy of another; 0 for none.
    pub duplicates: usize,
}

/// Unit rows around class centres (which depend on the class alone), in a mixed order.
#[must_use]
pub fn draw(draw: Draw, seed: u64) -> (Array2<f32>, Vec<i64>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut embeddings = Array2::zeros((draw.rows, draw.dim));
    let mut labels = vec![0i64; draw.rows];
    for i in 0..draw.rows {
        labels[i] = rng.random_range(0..draw.classes) as i64;
        let mut centre = ChaCha8Rng::seed_from_u64(1_000_003 + labels[i] as u64);
        let scale = (draw.dim as f32).sqrt();
        for d in 0..draw.dim {
            let noise = draw.noise * (rng.random::<f32>() - 0.5) / scale;
            embeddings[[i, d]] = (centre.random::<f32>() - 0.5) / scale + noise;
        }
        if draw.duplicates > 0 && i > 0 && rng.random_range(0..draw.duplicates) == 0 {
            let other = rng.random_range(0..i);
            labels[i] = labels[other];
            let row = embeddings.row(other).to_owned();
            embeddings.row_mut(i).assign(&row);
        }
        normalise(embeddings.row_mut(i));
        if draw.ignored > 0 && rng.random_range(0..draw.ignored) == 0 {
            labels[i] = -1 - rng.random_range(0..3) as i64;
        }
    }
    (embeddings, labels)
}

/// Scales a row to unit length; one of zeros becomes the first axis.
pub fn normalise(mut row: ArrayViewMut1<'_, f32>) {
    let norm = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    if norm > 0.0 {
        row.mapv_inplace(|x| (f64::from(x) / norm) as f32);
    } else {
        row[0] = 1.0;
    }
}

/// A tangent for rows of this shape.
#[must_use]
pub fn tangent(rows: usize, dim: usize, seed: u64) -> Array2<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Array2::from_shape_simple_fn((rows, dim), || rng.random::<f32>() - 0.5)
}

/// Runs a batch through a backend and compares with the truth. `None` if a pair lies too near a threshold.
///
/// # Panics
/// If the batch is not valid, or a mean is off.
pub fn compare(
    backend: &mut dyn Backend,
    batch: &Batch<'_>,
    settings: &LossSettings,
    seed: u64,
) -> Option<Report> {
    let truth = reference(batch, settings).expect("a valid batch");
    if !is_clear(&truth, settings, SLACK) {
        return None;
    }
    let dim = batch.anchors.embeddings.dim();
    let anchor_tangent = tangent(batch.anchors.labels.len(), dim, seed);
    let moving = batch.references.map(|rows| tangent(rows.labels.len(), dim, seed + 1));
    let expected =
        Expected::evaluate(batch, settings, &anchor_tangent, moving.as_ref()).expect("a valid batch");
    let mut output = LossOutput::default();
    backend.loss(batch, settings, &mut output).expect("a valid batch");
    let moving = moving.as_ref().map(|matrix| matrix.view());
    let sums = backend.threshold_gradient(batch, anchor_tangent.view(), moving).expect("a valid batch");
    let report = Report::new(&expected, &output, sums);
    assert!(report.means < 1e-5, "{report:#?}");
    Some(report)
}
