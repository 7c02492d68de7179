//! The table of cases every backend is held to, and random batches to draw them from.
#![allow(clippy::unwrap_used, reason = "for tests, which stop where something is off")]

use crate::file::{Case, find};
use crate::verify::{Expected, Report, SINGLE_PRECISION, run};
use ddtas::backend::Backend;
use ddtas::loss::select::{initial_tolerances, probe_tolerance};
use ddtas::loss::{Batch, LossOutput, LossSettings, Mining, Reference, Rows, reference};
use ndarray::Array2;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Pairs closer to a threshold than this may be counted either way in single precision.
const SLACK: f64 = 3e-6;

/// How to draw one side of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Draw {
    pub rows: usize,
    pub dim: usize,
    /// Labels are drawn from `0..classes`, so sizes are ragged.
    pub classes: usize,
    /// Length of the noise added to a class centre of length 1.
    pub noise: f32,
    /// One row in this many is ignored, and one a copy of another; 0 for none.
    pub ignored: usize,
    pub duplicates: usize,
}

/// Unit rows around class centres (which depend on the class alone), in a mixed order.
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

pub fn normalise(mut row: ndarray::ArrayViewMut1<'_, f32>) {
    let norm = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    if norm > 0.0 {
        row.mapv_inplace(|x| (f64::from(x) / norm) as f32);
    } else {
        row[0] = 1.0;
    }
}

/// Whether no pair lies so near a threshold that single precision may decide otherwise.
pub fn is_clear(truth: &Reference, settings: &LossSettings) -> bool {
    is_clear_by(SLACK, truth, settings)
}

/// Whether no pair lies within `slack` of a threshold.
pub fn is_clear_by(slack: f64, truth: &Reference, settings: &LossSettings) -> bool {
    let selection = &truth.selection;
    let s = &truth.similarities.values;
    let tolerances = [probe_tolerance(settings), initial_tolerances(settings).neg, selection.tolerances.neg];
    let near = |a: f64, b: f64| (a - b).abs() < slack;
    (0..truth.similarities.anchors()).all(|i| {
        let (min_pos, max_neg) = (selection.min_pos[i], selection.max_neg[i]);
        let negatives_clear = truth
            .similarities
            .negatives(i)
            .all(|j| tolerances.iter().all(|tolerance| !near(s[[i, j]], min_pos - tolerance)));
        let positives_clear = truth.similarities.positives(i).all(|j| {
            !near(s[[i, j]], max_neg + selection.tolerances.pos)
                && !near(s[[i, j]], truth.similarities.duplicate_bound(i, j))
        });
        negatives_clear && positives_clear
    })
}

pub fn tangent(rows: usize, dim: usize, seed: u64) -> Array2<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Array2::from_shape_simple_fn((rows, dim), || rng.random::<f32>() - 0.5)
}

/// Runs a batch through a backend and compares with the truth. `None` if a pair lies too near a threshold.
pub fn compare(
    backend: &mut dyn Backend,
    batch: &Batch<'_>,
    settings: &LossSettings,
    seed: u64,
) -> Option<(Report, LossOutput)> {
    let truth = reference(batch, settings).unwrap();
    if !is_clear(&truth, settings) {
        return None;
    }
    let dim = batch.anchors.embeddings.dim();
    let anchor_tangent = tangent(batch.anchors.labels.len(), dim, seed);
    let reference_tangent = batch.references.map(|rows| tangent(rows.labels.len(), dim, seed + 1));
    let expected = Expected::evaluate(batch, settings, &anchor_tangent, reference_tangent.as_ref()).unwrap();
    let mut output = LossOutput::default();
    backend.loss(batch, settings, &mut output).unwrap();
    let moving = reference_tangent.as_ref().map(|matrix| matrix.view());
    let hyper = backend.hypergradient(batch, anchor_tangent.view(), moving).unwrap();
    for (what, got, wanted) in
        [("mean_pos", output.mean_pos, truth.mean_pos), ("mean_neg", output.mean_neg, truth.mean_neg)]
    {
        let same = (got.is_nan() && wanted.is_nan()) || (got - wanted).abs() < 1e-5;
        assert!(same, "{what} is {got}, expected {wanted}");
    }
    Some((Report::new(&expected, &output, hyper), output))
}

/// The reference cases.
pub fn golden_cases() -> Vec<Case> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden");
    find(&[folder.into()]).unwrap().iter().map(|file| Case::read(file).unwrap()).collect()
}

/// Fails unless the backend reproduces every golden case.
pub fn check_golden(backend: &mut dyn Backend) {
    for case in golden_cases() {
        let report = run(&case, backend).unwrap();
        assert!(report.passes(SINGLE_PRECISION), "{} on {}: {report:#?}", case.name, backend.name());
    }
}

/// Shapes and settings that have broken something once, or could.
pub fn check_table(backend: &mut dyn Backend) {
    let plain = Draw { rows: 60, dim: 32, classes: 12, noise: 1.5, ignored: 0, duplicates: 0 };
    let draws = [
        ("a plain batch", plain),
        ("one row", Draw { rows: 1, ..plain }),
        ("two rows", Draw { rows: 2, classes: 1, ..plain }),
        ("one dimension", Draw { dim: 1, ..plain }),
        ("odd sizes", Draw { rows: 257, dim: 130, ..plain }),
        ("one class", Draw { classes: 1, ..plain }),
        ("a class wider than a tile", Draw { rows: 400, dim: 16, classes: 2, ..plain }),
        ("every row a class of its own", Draw { rows: 20, classes: 1_000_000, ..plain }),
        ("ignored rows", Draw { ignored: 4, ..plain }),
        ("all rows ignored", Draw { ignored: 1, ..plain }),
        ("duplicates", Draw { duplicates: 4, ..plain }),
        ("duplicates and ignored rows", Draw { rows: 150, duplicates: 5, ignored: 5, ..plain }),
        ("tight classes", Draw { noise: 0.2, ..plain }),
        ("noise alone", Draw { noise: 20.0, rows: 100, ..plain }),
    ];
    let settings = [Mining::None, Mining::Symmetric, Mining::Asms, Mining::AtAsms]
        .map(|mining| LossSettings { mining, ..LossSettings::default() });
    let dual = LossSettings { probe_ratio: 1.0, lambda_pos: 0.9, lambda_neg: 0.4, ..LossSettings::default() };
    for (name, how) in draws {
        for settings in settings.iter().chain([&dual]) {
            for form in ["square", "rectangular"] {
                check_one(backend, name, how, settings, form);
            }
        }
    }
}

fn check_one(backend: &mut dyn Backend, name: &str, how: Draw, settings: &LossSettings, form: &str) {
    // A draw with a pair on a threshold is replaced by the next.
    for seed in 0..40 {
        let (anchors, labels) = draw(how, seed);
        let (references, reference_labels) = draw(Draw { rows: how.rows + 37, ..how }, seed + 100);
        let batch = match form {
            "square" => Batch::square(anchors.view(), &labels),
            _ => Batch::rectangular(
                Rows::new(anchors.view(), &labels),
                Rows::new(references.view(), &reference_labels),
            )
            .with_reference_gradient(),
        };
        if let Some((report, _)) = compare(backend, &batch, settings, seed) {
            let mining = settings.mining;
            assert!(report.passes(SINGLE_PRECISION), "{name}, {form}, {mining:?}, seed {seed}: {report:#?}");
            return;
        }
    }
    panic!("{name}, {form}: no draw clear of the thresholds");
}
