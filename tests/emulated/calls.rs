//! The order of calls that a backend requires, and what it keeps between calls.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use ddtas::Error;
use ddtas::backend::cpu::CpuBackend;
use ddtas::backend::device::{DeviceBackend, Options};
use ddtas::backend::emulated::{self, EmulatedDevice};
use ddtas::backend::{Backend, Nearest};
use ddtas::loss::{
    Batch, Identity, LossOutput, LossSettings, Mining, PairTotals, RowNumbers, Rows, ThresholdGradient,
};
use ddtas_cases::random::{Draw, draw, tangent};
use ddtas_cases::{check_outputs_are_refilled, check_what_is_remembered};

use super::{golden_case, random_rows};

#[test]
fn the_workspace_has_the_bytes_that_it_says() {
    let case = golden_case("paper_batch80");
    let bytes = |budget| {
        let mut backend = emulated::open(Options { budget: Some(budget), ..Options::default() }, 13);
        let after = |backend: &mut dyn Backend| {
            backend.loss(&case.batch(), &case.settings, &mut LossOutput::default()).unwrap();
            backend.workspace_bytes()
        };
        let first = after(&mut *backend);
        assert_eq!(first, after(&mut *backend), "a second loss needs no more");
        first
    };
    let (nothing, some) = (bytes(0), bytes(4096));
    // Regions are aligned, so the rest may grow a little.
    assert!((4096..4096 + 1024).contains(&(some - nothing)), "{nothing} bytes for 0, {some} for 4096");
    let rows = case.batch().anchors.embeddings;
    assert!(nothing > rows.rows() * rows.dim() * size_of::<f32>(), "room for the rows");
}

#[test]
fn the_threshold_pass_needs_its_loss() {
    let case = golden_case("one_class");
    let mut backend = emulated::open(Options::default(), 11);
    let error = backend.threshold_gradient(&case.batch(), case.anchors.tangent.view(), None).unwrap_err();
    assert!(matches!(error, Error::OutOfOrder(_)), "{error}");

    // It also needs the batch of that loss, as on the CPU.
    let how = Draw { rows: 20, dim: 8, classes: 4, noise: 1.5, ignored: 0, duplicates: 0 };
    let (rows, labels) = draw(how, 1);
    let batch = Batch::square(rows.view(), &labels);
    let direction = tangent(20, 8, 1);
    for _ in 0..2 {
        backend.loss(&batch, &LossSettings::default(), &mut LossOutput::default()).unwrap();
        assert!(backend.threshold_gradient(&batch, direction.view(), None).is_ok());
    }
    let refused = backend.threshold_gradient(&batch, tangent(19, 8, 1).view(), None);
    let lengths = Error::LengthMismatch { what: "rows of the tangent", expected: 20, got: 19 };
    assert_eq!(refused.unwrap_err().to_string(), lengths.to_string());
    let reversed: Vec<i64> = labels.iter().rev().copied().collect();
    let relabelled = Batch::square(rows.view(), &reversed);
    let refused = backend.threshold_gradient(&relabelled, direction.view(), None);
    assert!(matches!(refused, Err(Error::OutOfOrder(_))));
    check_what_is_remembered(&mut *backend);
}

#[test]
fn an_output_that_is_used_again_is_refilled() {
    check_outputs_are_refilled(&mut *emulated::open(Options::default(), 15));
}

#[test]
fn steps_of_another_part_are_refused() {
    let how = Draw { rows: 12, dim: 8, classes: 3, noise: 1.5, ignored: 0, duplicates: 0 };
    let (rows, labels) = draw(how, 51);
    let all = Rows::new(rows.view(), &labels);
    let own = |first, end| Rows::new(rows.slice(ndarray::s![first..end, ..]), &labels[first..end]);
    let part = Batch::part(own(4, 8), all, Identity::From(4), 12);
    let shifted = Batch::part(own(3, 7), all, Identity::From(3), 12);
    assert_ne!(labels[3..7], labels[4..8]);
    let shorter = Batch::part(own(4, 7), all, Identity::From(4), 12);
    let (settings, mut output) = (LossSettings::default(), LossOutput::default());
    let mut backend = emulated::open(Options::default(), 16);
    for other in [shifted, shorter, Batch { total: Some(13), ..part }, part.with_reference_gradient()] {
        backend.same_class(&part, &settings, &mut output).unwrap();
        let numbers = vec![0.5; other.anchors.labels.len()];
        let refused = backend.sweep(&other, RowNumbers::new(&numbers, &[]), &mut output);
        assert!(matches!(refused, Err(Error::OutOfOrder(_))), "{refused:?}");
    }
}

#[test]
fn terms_of_the_anchors_add_up_to_the_loss_of_any_total() {
    let how = Draw { rows: 150, dim: 8, classes: 30, noise: 1.5, ignored: 9, duplicates: 0 };
    let (rows, labels) = draw(how, 1);
    let mut backend = DeviceBackend::new(EmulatedDevice::new(17), Options::default());
    for total in [None, Some(400)] {
        let (batch, mut output) =
            (Batch { total, ..Batch::square(rows.view(), &labels) }, LossOutput::default());
        backend.loss(&batch, &LossSettings::default(), &mut output).unwrap();
        let (terms, _) = backend.terms_of_last_loss().unwrap();
        assert!(output.active > 50 && (terms.iter().sum::<f64>() - output.loss).abs() < 1e-9 * output.loss);
    }
}

#[test]
fn slopes_of_steep_positives_fit_half_precision() {
    // Derivatives of weights by lambda_pos are up to beta / 4 times as large as weights.
    let how = Draw { rows: 150, dim: 16, classes: 10, noise: 1.5, ignored: 0, duplicates: 0 };
    let (rows, labels) = draw(how, 3);
    let narrow = rows.mapv(half::f16::from_f32);
    let batch = Batch::square(narrow.view(), &labels);
    let settings = LossSettings { mining: Mining::None, alpha: 2.0, beta: 1e4, ..LossSettings::default() };
    let mut first = LossOutput::default();
    CpuBackend::new().loss(&batch, &settings, &mut first).unwrap();
    // The slope is largest at the threshold.
    let settings = LossSettings { lambda_pos: first.min_pos[0].into(), ..settings };
    let backends: [Box<dyn Backend>; 2] =
        [emulated::open(Options::default(), 18), Box::new(CpuBackend::new())];
    let [got, want] = backends.map(|mut backend| {
        backend.loss(&batch, &settings, &mut LossOutput::default()).unwrap();
        backend.threshold_gradient(&batch, tangent(150, 16, 1).view(), None).unwrap()
    });
    assert!((got.pos - want.pos).abs() < 1e-2 * want.pos.abs(), "{got:?} {want:?}");
}

/// Losses and steps of a part without anchors, and the sums after them.
fn results_of_no_anchors(
    backend: &mut dyn Backend,
    part: &Batch<'_>,
    settings: &LossSettings,
) -> [(LossOutput, ThresholdGradient); 3] {
    let none = tangent(0, 16, 1);
    // What a call leaves as it was would be seen.
    let mut outputs = [(); 3].map(|()| LossOutput { loss: 7.0, active: 7, ..LossOutput::default() });
    let [steps, normalized, whole] = &mut outputs;
    let mut sums = [ThresholdGradient::default(); 3];
    backend.same_class(part, settings, steps).unwrap();
    backend.sweep(part, RowNumbers::default(), steps).unwrap();
    backend.select(part, RowNumbers::default(), PairTotals { probe_neg: 9, total_pos: 2 }, steps).unwrap();
    backend.gradient(part, RowNumbers::default(), RowNumbers::default(), steps).unwrap();
    sums[0] = backend.threshold_gradient(part, none.view(), None).unwrap();
    backend.normalized_loss(part, settings, normalized).unwrap();
    assert!(matches!(backend.threshold_gradient(part, none.view(), None), Err(Error::OutOfOrder(_))));
    backend.loss(part, settings, whole).unwrap();
    sums[2] = backend.threshold_gradient(part, none.view(), None).unwrap();
    let mut sums = sums.into_iter();
    outputs.map(|mut output| {
        output.dloss_dlambda_neg += 0.0; // the CPU's zero is negative
        (output, sums.next().unwrap())
    })
}

#[test]
fn a_part_without_anchors_has_the_zeros_of_the_cpu() {
    let rows = random_rows(30, 16, 5);
    let labels: Vec<i64> = (0..30).map(|row| row / 3).collect();
    let none = Rows::new(rows.slice(ndarray::s![..0, ..]), &[]);
    for identity in [Identity::ByValue, Identity::From(4)] {
        let part = Batch::part(none, Rows::new(rows.view(), &labels), identity, 90);
        for (part, mining) in [(part, Mining::AtAsms), (part.with_reference_gradient(), Mining::None)] {
            let settings = LossSettings { mining, ..LossSettings::default() };
            let mut device = emulated::open(Options::default(), 14);
            let found = results_of_no_anchors(&mut *device, &part, &settings);
            let wanted = results_of_no_anchors(&mut CpuBackend::new(), &part, &settings);
            for ((got, got_sums), (want, want_sums)) in found.iter().zip(&wanted) {
                // As text, since the means are NaN.
                assert_eq!(format!("{got:?}"), format!("{want:?}"));
                assert_eq!(got.gradient, want.gradient);
                assert_eq!(got.reference_gradient, want.reference_gradient);
                assert_eq!(got_sums, want_sums);
            }
            // A batch with anchors follows.
            let batch = Batch::square(rows.view(), &labels);
            device.loss(&batch, &settings, &mut LossOutput::default()).unwrap();
            device.threshold_gradient(&batch, tangent(30, 16, 1).view(), None).unwrap();
        }
    }
}

#[test]
fn a_gallery_is_prepared_once_for_several_sets_of_queries() {
    let (first, second, gallery) = (random_rows(130, 24, 1), random_rows(7, 24, 2), random_rows(300, 24, 3));
    let labels = vec![0; 300];
    let queries = [&first, &second].map(|rows| Rows::new(rows.view(), &labels[..rows.nrows()]));
    let gallery = Rows::new(gallery.view(), &labels);
    let mut backend = DeviceBackend::new(EmulatedDevice::new(4), Options::default());
    let apart = queries
        .each_ref()
        .map(|queries| backend.nearest(queries, Some(&gallery), 5).expect("the rows are valid"));
    let launched = backend.device().launched().len();
    let mut together = Vec::new();
    backend
        .search(&gallery, &mut |search| {
            for queries in &queries {
                together.push(search.nearest(queries, 5)?);
            }
            Ok(())
        })
        .expect("the rows are valid");
    assert_eq!(together, apart);
    // One kernel prepares the gallery; each set of queries takes three: prepare, search, merge.
    assert_eq!(backend.device().launched().len() - launched, 7);
    let other = random_rows(3, 16, 1);
    let other = Rows::new(other.view(), &labels[..3]);
    let refused = backend.search(&gallery, &mut |search| search.nearest(&other, 5).map(drop));
    assert!(matches!(refused, Err(ddtas::Error::LengthMismatch { .. })));
}

#[test]
fn more_neighbours_than_references_are_none() {
    let rows = random_rows(3, 5, 3);
    let queries = Rows::new(rows.view(), &[0, 1, 2]);
    let found = emulated::open(Options::default(), 12).nearest(&queries, None, 4).unwrap();
    for (indices, similarities) in found.indices.outer_iter().zip(found.similarities.outer_iter()) {
        assert!(indices.iter().take(2).all(|&index| index < 3));
        assert!(indices.iter().skip(2).all(|&index| index == Nearest::NONE));
        assert!(similarities.iter().skip(2).all(|&value| value == f32::NEG_INFINITY));
    }
}
