//! The loss from Rust, in its two forms, checked against the float64 reference.
//!
//! `cargo run --release -p ddtas --example loss`

use std::io::{Write, stdout};

use ddtas::backend::{DeviceSpec, open};
use ddtas::loss::{Batch, LossOutput, LossSettings, Rows, reference};
use ndarray::{Array2, Axis};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const CLASSES: usize = 24;
const EACH: usize = 4;
const DIM: usize = 64;

/// `EACH` rows of every class around the class's centre, of unit length.
fn draw(seed: u64) -> (Array2<f32>, Vec<i64>) {
    let mut noise = ChaCha8Rng::seed_from_u64(seed);
    let labels: Vec<i64> = (0..CLASSES * EACH).map(|row| (row / EACH) as i64).collect();
    let mut rows = Array2::zeros((labels.len(), DIM));
    for (mut row, &label) in rows.axis_iter_mut(Axis(0)).zip(&labels) {
        let mut centre = ChaCha8Rng::seed_from_u64(1000 + label as u64);
        row.mapv_inplace(|_: f32| centre.random::<f32>() - 0.5 + 1.2 * (noise.random::<f32>() - 0.5));
        let norm = row.dot(&row).sqrt();
        row /= norm;
    }
    (rows, labels)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut backend = open(&DeviceSpec::Auto)?;
    let settings = LossSettings::default();
    let mut output = LossOutput::default();

    let (anchors, labels) = draw(1);
    let square = Batch::square(anchors.view(), &labels);
    // A bank of earlier embeddings, which are references only.
    let (bank, bank_labels) = draw(2);
    let rectangular =
        Batch::rectangular(Rows::new(anchors.view(), &labels), Rows::new(bank.view(), &bank_labels));
    for (form, batch) in [("square", square), ("against a bank", rectangular)] {
        backend.loss(&batch, &settings, &mut output)?;
        let truth = reference(&batch, &settings)?;
        let error = output
            .gradient
            .iter()
            .zip(&truth.gradient)
            .fold(0.0f64, |worst, (got, want)| worst.max((f64::from(*got) - want).abs()));
        writeln!(
            stdout(),
            "{form} on {}: loss {:.6} (float64: {:.6}), {} of {} anchors active, gradient within {error:.1e}",
            backend.name(),
            output.loss,
            truth.weighted.loss,
            output.active,
            labels.len(),
        )?;
    }
    Ok(())
}
