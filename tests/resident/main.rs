//! Rows given by device address give the bits of rows given from the host. The device is the emulated one,
//! whose memory is the host's.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod parts;
mod search;

use ddtas::backend::cpu::CpuBackend;
use ddtas::backend::device::{
    DeviceBackend, ElementType, Options, ResidentBatch, ResidentIdentity, ResidentNumbers, ResidentOutput,
    ResidentPart, ResidentRows, ResidentSettings,
};
use ddtas::backend::emulated::EmulatedDevice;
use ddtas::backend::{Backend, Nearest};
use ddtas::loss::{
    Batch, Identity, LossOutput, LossScalars, LossSettings, Mining, RowNumbers, Rows, UnitCheck,
};
use ddtas::{Error, Result};
use ndarray::Array2;

/// Distinct unit rows on a circle, with labels of three rows per class.
fn rows(count: usize, turn: f32) -> (Array2<f32>, Vec<i64>) {
    let angle = |i: usize| (i as f32 * 0.37 + turn).sin() * 3.0;
    let m = Array2::from_shape_fn((count, 2), |(i, d)| if d == 0 { angle(i).cos() } else { angle(i).sin() });
    (m, (0..count).map(|i| (i / 3) as i64).collect())
}

fn resident(rows: &Array2<f32>, labels: &[i64], gradient: &mut Array2<f32>) -> ResidentRows {
    ResidentRows {
        count: labels.len(),
        embeddings: rows.as_ptr() as u64,
        labels: labels.as_ptr() as u64,
        gradient: gradient.as_mut_ptr() as u64,
    }
}

fn batch(anchors: ResidentRows, references: Option<ResidentRows>) -> ResidentBatch {
    ResidentBatch { dim: 2, dtype: ElementType::F32, anchors, references, check: UnitCheck::Check }
}

fn backend() -> DeviceBackend<EmulatedDevice> {
    DeviceBackend::new(EmulatedDevice::new(5), Options::default())
}

fn run(batch: &ResidentBatch) -> Result<LossOutput> {
    let mut output = LossOutput::default();
    // SAFETY: the tests below pass addresses of matrices that outlive the call.
    unsafe { backend().loss_resident(batch, &LossSettings::default(), &mut output) }.map(|()| output)
}

fn nearest(batch: &ResidentBatch, k: usize) -> Result<Nearest> {
    // SAFETY: as in `run`.
    unsafe { backend().nearest_resident(batch, None, k) }
}

/// The part of rows `range` of the batch `all`.
fn part_of(
    all: (&Array2<f32>, &[i64]),
    range: std::ops::Range<usize>,
    gradient: &mut Array2<f32>,
    identity: ResidentIdentity,
) -> ResidentPart {
    let (rows, labels) = all;
    let whole = ResidentRows {
        count: labels.len(),
        embeddings: rows.as_ptr() as u64,
        labels: labels.as_ptr() as u64,
        gradient: 0,
    };
    let own = ResidentRows {
        count: range.len(),
        embeddings: whole.embeddings + (range.start * 2 * size_of::<f32>()) as u64,
        labels: whole.labels + (range.start * size_of::<i64>()) as u64,
        gradient: gradient.as_mut_ptr() as u64,
    };
    ResidentPart { batch: batch(own, Some(whole)), identity, total: labels.len(), normalize: false }
}

/// Enqueues the loss of a whole batch with default settings; its scalars.
fn enqueue(
    e: &Array2<f32>,
    labels: &[i64],
    gradient: &mut Array2<f32>,
    normalize: bool,
) -> Result<LossScalars> {
    enqueue_on(
        &mut backend(),
        &ResidentSettings { settings: LossSettings::default(), lambda: 0 },
        (e, labels),
        gradient,
        normalize,
    )
}

fn enqueue_on(
    backend: &mut DeviceBackend<EmulatedDevice>,
    given: &ResidentSettings,
    (e, labels): (&Array2<f32>, &[i64]),
    gradient: &mut Array2<f32>,
    normalize: bool,
) -> Result<LossScalars> {
    let batch = batch(resident(e, labels, gradient), None);
    let part = ResidentPart { batch, identity: ResidentIdentity::ByValue, total: labels.len(), normalize };
    let (mut scalars, mut loss) = (LossOutput::default().scalars(), 0.0f32);
    let output = ResidentOutput { scalars: &raw mut scalars as u64, loss: &raw mut loss as u64 };
    // SAFETY: the matrices, the thresholds, the scalars and the loss outlive the call.
    unsafe { backend.enqueue_loss(&part, given, output) }?;
    assert_eq!(loss.to_bits(), (scalars.loss as f32).to_bits());
    Ok(scalars)
}

#[test]
fn square_form_gives_the_same_bits() {
    let (e, labels) = rows(140, 0.0);
    let mut host = LossOutput::default();
    backend().loss(&Batch::square(e.view(), &labels), &LossSettings::default(), &mut host).unwrap();
    assert!(host.active > 0, "a batch that mines something");

    let mut gradient = Array2::zeros((140, 2));
    let own = run(&batch(resident(&e, &labels, &mut gradient), None)).unwrap();
    assert_eq!(gradient, host.gradient);
    assert_eq!((own.loss, own.probe_neg, own.active), (host.loss, host.probe_neg, host.active));
}

#[test]
fn pairs_of_anchors_that_do_not_enter_the_loss_are_not_counted_as_mined() {
    // The classes lie apart, so that most anchors keep positives but no negative; only two classes overlap.
    let (_, labels) = rows(140, 0.0);
    let angle = |i: usize| (i / 3).max(1) as f32 * 0.13 + (i % 3) as f32 * 0.01;
    let e = Array2::from_shape_fn((140, 2), |(i, d)| if d == 0 { angle(i).cos() } else { angle(i).sin() });
    let mut gradient = Array2::zeros((140, 2));
    let settings = LossSettings { gamma: 0.05, ..LossSettings::default() };
    let (mut backend, mut output) = (backend(), LossOutput::default());
    let given = ResidentSettings { settings, lambda: 0 };
    let scalars = enqueue_on(&mut backend, &given, (&e, &labels), &mut gradient, false).unwrap();
    backend.anchors_of_last_loss(&mut output).unwrap();
    assert_eq!((scalars.mined_pos, scalars.mined_neg), output.mined());
    let kept: u64 = output.count_pos.iter().chain(&output.count_neg).map(|&count| u64::from(count)).sum();
    assert!(scalars.mined_neg > 0 && kept > scalars.mined_pos + scalars.mined_neg, "{kept}");
}

#[test]
fn rectangular_form_gives_the_same_bits_on_both_sides() {
    let ((e, labels), (r, reference_labels)) = (rows(30, 0.0), rows(150, 0.1));
    let rectangular =
        Batch::rectangular(Rows::new(e.view(), &labels), Rows::new(r.view(), &reference_labels));
    let mut host = LossOutput::default();
    backend().loss(&rectangular.with_reference_gradient(), &LossSettings::default(), &mut host).unwrap();

    let (mut gradient, mut reference_gradient) = (Array2::zeros((30, 2)), Array2::zeros((150, 2)));
    let references = resident(&r, &reference_labels, &mut reference_gradient);
    let own = run(&batch(resident(&e, &labels, &mut gradient), Some(references))).unwrap();
    assert_eq!(own.loss, host.loss);
    assert_eq!(gradient, host.gradient);
    assert_eq!(Some(reference_gradient), host.reference_gradient);
}

#[test]
fn a_bad_row_and_a_null_address_are_refused() {
    let (mut e, labels) = rows(9, 0.0);
    let mut gradient = Array2::zeros((9, 2));
    e[[4, 0]] = f32::NAN;
    let rows = resident(&e, &labels, &mut gradient);
    assert!(matches!(run(&batch(rows, None)), Err(Error::NotFinite { rows: "anchors", row: 4 })));
    let null = ResidentRows { gradient: 0, ..rows };
    assert!(matches!(run(&batch(null, None)), Err(Error::InvalidSetting { name: "gradient", .. })));
}

#[test]
fn bad_rows_are_the_same_error_on_the_device_and_on_the_processor() {
    let cases = [f32::NAN, f32::INFINITY, 3e38, 1e20, 2.0, 1e-20, 0.0];
    for (first, second) in cases.iter().flat_map(|a| cases.iter().map(move |b| (*a, *b))) {
        let (mut e, mut labels) = rows(40, 0.0);
        // Two bad rows, one ignored, not in class order: the error names the first in the caller's order.
        labels[9] = -1;
        labels[30] = 0;
        for (row, value) in [(9, first), (30, second)] {
            e.row_mut(row).assign(&ndarray::aview1(&[value, 0.0]));
        }
        let said = |backend: &mut dyn Backend| {
            let (good, good_labels) = rows(12, 0.1);
            let (bad, good) = (Rows::new(e.view(), &labels), Rows::new(good.view(), &good_labels));
            let settings = LossSettings::default();
            let mut output = LossOutput::default();
            let mut loss =
                |batch: &Batch<'_>| backend.loss(batch, &settings, &mut output).unwrap_err().to_string();
            let losses = [
                loss(&Batch::square(e.view(), &labels)),
                loss(&Batch::rectangular(good, bad)),
                loss(&Batch::rectangular(bad, bad)),
            ];
            let searches =
                [None, Some(&good)].map(|side| backend.nearest(&bad, side, 2).unwrap_err().to_string());
            (losses, searches)
        };
        let (there, here) = (said(&mut backend()), said(&mut CpuBackend::new()));
        assert_eq!(there, here, "{first} and {second}");
        assert!(here.0[0].contains("row 9 of the anchors"), "{here:?}");
        assert_eq!(here.0[0].contains("not finite"), !first.is_finite(), "{here:?}");
    }
}

#[test]
fn sizes_that_no_memory_has_are_refused_before_anything_is_allocated() {
    let (e, labels) = rows(9, 0.0);
    let mut gradient = Array2::zeros((9, 2));
    let good = resident(&e, &labels, &mut gradient);
    for count in [1 << 31, 1 << 62, usize::MAX] {
        let large = ResidentRows { count, ..good };
        for refused in
            [batch(large, None), batch(good, Some(large)), ResidentBatch { dim: count, ..batch(good, None) }]
        {
            let error = run(&refused).unwrap_err();
            assert!(matches!(error, Error::InvalidSetting { name: "batch", .. }), "{error}");
            let error = nearest(&refused, 1).unwrap_err();
            assert!(matches!(error, Error::InvalidSetting { name: "batch", .. }), "{error}");
        }
    }
    for count in [1 << 60, usize::MAX] {
        // SAFETY: so many labels cannot be allocated, so none is read.
        let refused = unsafe { backend().labels_resident(&ResidentRows { count, ..good }) };
        assert!(matches!(refused, Err(Error::OutOfMemory { what: "labels", .. })));
    }
    assert!(matches!(nearest(&batch(good, None), usize::MAX), Err(Error::InvalidSetting { name: "k", .. })));
}

#[test]
fn every_address_is_checked_and_nothing_is_remembered_of_a_refused_loss() {
    let ((e, labels), (r, reference_labels)) = (rows(30, 0.0), rows(60, 0.1));
    let (mut gradient, mut reference_gradient) = (Array2::zeros((30, 2)), Array2::zeros((60, 2)));
    let anchors = resident(&e, &labels, &mut gradient);
    let references = resident(&r, &reference_labels, &mut reference_gradient);
    let good = batch(anchors, Some(references));
    let tangents = [e.as_ptr() as u64, 0];
    let mut backend = backend();
    let mut scalars = LossOutput::default().scalars();
    let output = ResidentOutput { scalars: &raw mut scalars as u64, loss: 0 };
    let given = ResidentSettings { settings: LossSettings::default(), lambda: 0 };
    let part = ResidentPart { batch: good, identity: ResidentIdentity::ByValue, total: 30, normalize: false };
    let odd = |rows: ResidentRows| {
        [
            ("labels", ResidentRows { labels: rows.labels + 4, ..rows }),
            ("gradient", ResidentRows { gradient: 2, ..rows }),
        ]
    };
    let mut refused: Vec<(&str, ResidentPart, ResidentOutput)> = Vec::new();
    refused.extend(
        odd(anchors).map(|(name, rows)| {
            (name, ResidentPart { batch: batch(rows, Some(references)), ..part }, output)
        }),
    );
    refused.extend(
        odd(references)
            .map(|(name, rows)| (name, ResidentPart { batch: batch(anchors, Some(rows)), ..part }, output)),
    );
    refused.push(("identity", ResidentPart { identity: ResidentIdentity::List(6), ..part }, output));
    refused.push(("loss", part, ResidentOutput { loss: 6, ..output }));
    refused.push(("scalars", part, ResidentOutput { scalars: 4, ..output }));
    for (name, part, output) in refused {
        // SAFETY: the good addresses are those of this test's matrices; a call with a bad one uses none.
        let error = unsafe { backend.enqueue_loss(&part, &given, output) }.unwrap_err();
        assert!(matches!(error, Error::InvalidSetting { name: said, .. } if said == name), "{name}: {error}");
    }
    let wrong = LossSettings { alpha: -1.0, ..LossSettings::default() };
    // SAFETY: as above.
    unsafe {
        backend.loss_resident(&good, &LossSettings::default(), &mut LossOutput::default()).unwrap();
        backend.threshold_gradient_resident(&good, tangents).unwrap();
        let narrow = ResidentBatch { dtype: ElementType::F16, ..good };
        let other = backend.threshold_gradient_resident(&narrow, tangents);
        assert!(matches!(other, Err(Error::OutOfOrder(_))), "rows of another type: {other:?}");
        backend.loss_resident(&good, &wrong, &mut LossOutput::default()).unwrap_err();
        let after = backend.threshold_gradient_resident(&good, tangents);
        assert!(matches!(after, Err(Error::OutOfOrder(_))), "{after:?}");
    }
}

#[test]
fn the_square_form_has_one_tangent_and_no_identity_and_outputs_are_refilled() {
    let (e, labels) = rows(60, 0.0);
    let mut gradients = [Array2::zeros((60, 2)), Array2::zeros((60, 2))];
    let addresses = gradients.each_mut().map(|gradient| resident(&e, &labels, gradient));
    let mut backend = backend();
    let other = Array2::<f32>::ones((60, 2));
    let mut output = LossOutput { count_pos: vec![7], gradient: other.clone(), ..LossOutput::default() };
    let square = batch(addresses[0], None);
    // SAFETY: every address is that of a matrix of this test.
    unsafe {
        backend.loss_resident(&square, &LossSettings::default(), &mut output).unwrap();
        assert!(output.active > 0 && output.count_pos.is_empty() && output.gradient.is_empty());
        let [one, two] = [0, other.as_ptr() as u64]
            .map(|second| backend.threshold_gradient_resident(&square, [e.as_ptr() as u64, second]).unwrap());
        assert_eq!(one, two);
    }
    let mut scalars = LossOutput::default().scalars();
    let to = ResidentOutput { scalars: &raw mut scalars as u64, loss: 0 };
    let given = ResidentSettings { settings: LossSettings::default(), lambda: 0 };
    let (batch, identity) = (batch(addresses[1], None), ResidentIdentity::From(1));
    // SAFETY: as above.
    unsafe {
        backend.enqueue_loss(&ResidentPart { batch, identity, total: 60, normalize: false }, &given, to)
    }
    .unwrap();
    assert_eq!(scalars.loss, output.loss);
    assert_eq!(gradients[0], gradients[1]);
}

#[test]
fn sums_of_thresholds_in_device_memory_have_room_for_any_in_range() {
    // Every pair is mined, and its term is nearly the largest that a threshold of -2 allows for.
    let (_, labels) = rows(190, 0.0);
    let e = Array2::from_shape_fn((190, 2), |(i, d)| {
        let angle = i as f32 * 0.002;
        if d == 0 { angle.cos() } else { angle.sin() }
    });
    let settings = LossSettings { mining: Mining::None, alpha: 1e4, ..LossSettings::default() };
    let mut host = LossOutput::default();
    let batch_of_host = Batch::square(e.view(), &labels);
    CpuBackend::new().loss(&batch_of_host, &settings.with_lambda(-2.0), &mut host).unwrap();
    let mut gradient = Array2::zeros((190, 2));
    let thresholds = [-2.0f64; 2];
    let given = ResidentSettings { settings: settings.with_lambda(0.0), lambda: thresholds.as_ptr() as u64 };
    let scalars = enqueue_on(&mut backend(), &given, (&e, &labels), &mut gradient, false).unwrap();
    assert!((scalars.loss - host.loss).abs() < 1e-5 * host.loss, "{} {}", scalars.loss, host.loss);
}

#[test]
fn a_whole_loss_that_nobody_waits_for_gives_the_same_bits_and_nan_for_a_bad_row() {
    let (mut e, labels) = rows(140, 0.0);
    let mut host = LossOutput::default();
    backend().loss(&Batch::square(e.view(), &labels), &LossSettings::default(), &mut host).unwrap();
    let mut gradient = Array2::zeros((140, 2));
    let enqueue = |e: &Array2<f32>, gradient: &mut Array2<f32>| enqueue(e, &labels, gradient, false).unwrap();
    let scalars = enqueue(&e, &mut gradient);
    assert_eq!(gradient, host.gradient);
    assert_eq!((scalars.loss, scalars.total_neg), (host.loss, host.total_neg));
    assert_eq!((scalars.mined_pos, scalars.mined_neg), host.mined());
    assert!(scalars.mined_pos > 0 && scalars.mined_neg > 0);
    e[[77, 0]] = 3.0;
    let scalars = enqueue(&e, &mut gradient);
    assert!(
        scalars.loss.is_nan() && scalars.dloss_dlambda_pos.is_nan() && scalars.dloss_dlambda_neg.is_nan()
    );
    assert_eq!(scalars.bad_anchor, 77);
    assert!(gradient.iter().all(|entry| entry.is_nan()));
}

#[test]
fn a_loss_of_rows_of_any_length_that_nobody_waits_for_gives_the_bits_of_one_that_is_waited_for() {
    let (unit, labels) = rows(200, 0.0);
    let e = unit * 3.0;
    let settings = LossSettings::default();
    let mut host = LossOutput::default();
    backend().normalized_loss(&Batch::square(e.view(), &labels), &settings, &mut host).unwrap();
    let mut gradient = Array2::from_elem((200, 2), f32::NAN);
    let scalars = enqueue(&e, &labels, &mut gradient, true).unwrap();
    assert_eq!(scalars.loss, host.loss);
    assert!(host.gradient.iter().all(|value| value.is_finite()), "{}", host.gradient);
    assert_eq!(gradient, host.gradient);
}

#[test]
fn a_safe_call_reads_no_address_that_an_earlier_call_was_given() {
    let (e, labels) = rows(30, 0.0);
    let mut gradient = Array2::zeros((30, 2));
    let square = batch(resident(&e, &labels, &mut gradient), None);
    let whole =
        ResidentPart { batch: square, identity: ResidentIdentity::ByValue, total: 30, normalize: false };
    let part = part_of((&e, &labels), 0..30, &mut gradient, ResidentIdentity::From(0));
    let mut lists = [[0u64; 30]; 6];
    let [min_pos, max_neg, totals, count_pos, count_neg, scalars] =
        lists.each_mut().map(|list| list.as_mut_ptr() as u64);
    let output = ResidentOutput { scalars, loss: 0 };
    let numbers = |list| ResidentNumbers { anchors: list, references: list, count: 30 };
    let all = Rows::new(e.view(), &labels);
    let of_host = Batch::part(all, all, Identity::From(0), 30);
    for by_address in [false, true] {
        let mut backend = backend();
        let thresholds = Box::new([0.7f64; 2]);
        let lambda = if by_address { thresholds.as_ptr() as u64 } else { 0 };
        let given = ResidentSettings { settings: LossSettings::default(), lambda };
        // SAFETY: every address is that of a matrix or list of this test.
        unsafe { backend.enqueue_loss(&whole, &given, output) }.unwrap();
        let sums = |backend: &mut DeviceBackend<EmulatedDevice>, batch: &Batch<'_>| {
            let sums = backend.threshold_gradient(batch, e.view(), None);
            assert_eq!(matches!(sums, Err(Error::OutOfOrder(_))), by_address, "{sums:?}");
        };
        // SAFETY: as above.
        unsafe {
            backend.enqueue_same_class(&part, &given, min_pos).unwrap();
            backend.enqueue_sweep(&part, numbers(min_pos), max_neg, totals).unwrap();
            backend.enqueue_select(&part, numbers(max_neg), totals, [count_pos, count_neg]).unwrap();
            backend.enqueue_gradient(&part, [numbers(count_pos), numbers(count_neg)], scalars).unwrap();
        }
        sums(&mut backend, &of_host);
        // SAFETY: as above.
        unsafe { backend.enqueue_loss(&whole, &given, output) }.unwrap();
        drop(thresholds);
        sums(&mut backend, &Batch::square(e.view(), &labels));
        // A step on host rows would need regions that the layout for device rows lacks.
        // SAFETY: as above.
        unsafe { backend.enqueue_same_class(&part, &ResidentSettings { lambda: 0, ..given }, min_pos) }
            .unwrap();
        let numbers = RowNumbers { anchors: &[0.5; 30][..], references: &[0.5; 30][..] };
        let refused = backend.sweep(&of_host, numbers, &mut LossOutput::default());
        assert!(matches!(refused, Err(Error::OutOfOrder(_))), "{refused:?}");
    }
}
