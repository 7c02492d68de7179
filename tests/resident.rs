//! Rows given by device address give the bits of rows given from the host. The device is the emulated one,
//! whose memory is the host's.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use ddtas::backend::cpu::CpuBackend;
use ddtas::backend::device::{
    DeviceBackend, ElementType, Options, ResidentBatch, ResidentIdentity, ResidentNumbers, ResidentOutput,
    ResidentPart, ResidentRows, ResidentSettings,
};
use ddtas::backend::emulated::EmulatedDevice;
use ddtas::backend::{Backend, Nearest, Picked};
use ddtas::loss::{
    Batch, Embeddings, Identity, LossOutput, LossScalars, LossSettings, Mining, RowNumbers, Rows, UnitCheck,
};
use ddtas::retrieval::{recall, recall_by};
use ddtas::{Error, Result};
use ddtas_cases::parts::loss_in_parts;
use half::{bf16, f16};
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
    let scalars = enqueue_on(&mut backend, &settings, (&e, &labels), &mut gradient, false).unwrap();
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
    let mut scalars = LossOutput::default().scalars();
    let batch = batch(resident(&e, &labels, &mut gradient), None);
    let part = ResidentPart { batch, identity: ResidentIdentity::ByValue, total: 190, normalize: false };
    let output = ResidentOutput { scalars: &raw mut scalars as u64, loss: 0 };
    // SAFETY: the matrices, thresholds and scalars outlive the call.
    unsafe { backend().enqueue_loss(&part, &given, output) }.unwrap();
    assert!((scalars.loss - host.loss).abs() < 1e-5 * host.loss, "{} {}", scalars.loss, host.loss);
}

/// Rows for searches, without labels and gradient.
fn searched<T>(rows: &Array2<T>) -> ResidentRows {
    ResidentRows { count: rows.nrows(), embeddings: rows.as_ptr() as u64, labels: 0, gradient: 0 }
}

fn nearest(batch: &ResidentBatch, k: usize) -> Result<Nearest> {
    // SAFETY: as in `run`.
    unsafe { backend().nearest_resident(batch, None, k) }
}

/// Compares searches of rows in device memory and in host memory, in one type.
fn search_both_ways<T>(
    (e, r): (&Array2<T>, &Array2<T>),
    dtype: ElementType,
    embeddings: fn(&Array2<T>) -> Embeddings<'_>,
) {
    // More queries than one tile; some k exceed the references.
    for (references, k) in [(None, 1), (None, 200), (Some(r), 1), (Some(r), 7), (Some(r), 60)] {
        let labels = [0; 140];
        let side = |rows| Rows { embeddings: embeddings(rows), labels: &labels[..rows.nrows()] };
        let host =
            backend().nearest(&side(e), references.map(side).as_ref(), k).expect("rows of unit length");
        let batch = ResidentBatch { dtype, ..batch(searched(e), references.map(searched)) };
        assert_eq!(nearest(&batch, k).expect("the same rows"), host, "{dtype:?}, k = {k}");
    }
}

#[test]
fn neighbours_of_resident_rows_are_those_of_the_host_s_in_every_type_and_form() {
    let ((e, _), (r, _)) = (rows(140, 0.0), rows(30, 0.1));
    search_both_ways((&e, &r), ElementType::F32, |m| Embeddings::F32(m.view()));
    let half = |m: &Array2<f32>| m.mapv(f16::from_f32);
    search_both_ways((&half(&e), &half(&r)), ElementType::F16, |m| Embeddings::F16(m.view()));
    let brain = |m: &Array2<f32>| m.mapv(bf16::from_f32);
    search_both_ways((&brain(&e), &brain(&r)), ElementType::Bf16, |m| Embeddings::Bf16(m.view()));
}

#[test]
fn a_search_with_bad_rows_addresses_or_k_is_refused() {
    let ((e, _), (mut r, _)) = (rows(20, 0.0), rows(9, 0.1));
    r[[4, 0]] = f32::NAN;
    r[[6, 1]] = 2.0;
    let (queries, references) = (searched(&e), searched(&r));
    let error = nearest(&batch(queries, Some(references)), 3).unwrap_err();
    assert!(matches!(error, Error::NotFinite { rows: "references", row: 4 }), "{error}");
    r[[4, 0]] = 0.0;
    r[[4, 1]] = 1.0;
    let error = nearest(&batch(searched(&r), None), 3).unwrap_err();
    assert!(matches!(error, Error::NotUnit { rows: "queries", row: 6, .. }), "{error}");
    let trusted = ResidentBatch { check: UnitCheck::Trust, ..batch(searched(&r), None) };
    nearest(&trusted, 3).unwrap();

    for k in [0, 1 << 32] {
        let error = nearest(&batch(queries, None), k).unwrap_err();
        assert!(matches!(error, Error::InvalidSetting { name: "k", .. }), "{error}");
    }
    for address in [0, queries.embeddings + 2] {
        let bad = ResidentRows { embeddings: address, ..queries };
        for refused in [batch(bad, None), batch(queries, Some(bad))] {
            let error = nearest(&refused, 1).unwrap_err();
            assert!(matches!(error, Error::InvalidSetting { name: "embeddings", .. }), "{error}");
        }
    }
    let none = ResidentRows { count: 0, ..queries };
    assert!(matches!(nearest(&batch(none, None), 1), Err(Error::Empty { rows: "queries" })));
    assert!(matches!(nearest(&batch(queries, Some(none)), 1), Err(Error::Empty { rows: "references" })));
}

#[test]
fn recall_of_resident_rows_leaves_ignored_ones_out() {
    let (mut e, mut labels) = rows(140, 0.0);
    for row in (0..140).step_by(5) {
        labels[row] = -1;
    }
    // An ignored row is not checked.
    e[[5, 0]] = f32::NAN;
    e[[135, 0]] = f32::NAN;
    let batch = batch(ResidentRows { labels: labels.as_ptr() as u64, ..searched(&e) }, None);
    let ks = [1, 2, 8];
    let mut backend = backend();
    let host = recall(&mut backend, &Rows::new(e.view(), &labels), None, &ks).unwrap();
    // SAFETY: as in `run`.
    let there = unsafe { backend.labels_resident(&batch.anchors) }.unwrap();
    assert_eq!(there, labels);
    let mut among = |picked: &Picked<'_>, k| {
        // SAFETY: as in `run`.
        unsafe { backend.nearest_resident(&batch, Some(picked), k) }
    };
    assert_eq!(recall_by(&there, &ks, &mut among).unwrap(), host);
    assert!(host.at[0].1 < 1.0 && host.queries > 100, "rows that recall does not trivially pass: {host:?}");

    for listed in [&[][..], &[3, 140]] {
        let few = &[1, 2][..];
        for picked in
            [Picked { queries: listed, gallery: None }, Picked { queries: few, gallery: Some(listed) }]
        {
            let error = among(&picked, 1).unwrap_err();
            let named = matches!(error, Error::Empty { .. } | Error::InvalidSetting { name: "picked", .. });
            assert!(named, "{picked:?}: {error}");
        }
    }
    // SAFETY: as in `run`.
    let refused = unsafe {
        let picked = Picked { queries: &[1, 2], gallery: None };
        backend.nearest_resident(
            &ResidentBatch { references: Some(batch.anchors), ..batch },
            Some(&picked),
            1,
        )
    };
    assert!(matches!(refused, Err(Error::InvalidSetting { name: "picked", .. })), "{refused:?}");
    let good = &[1, 2, 3][..];
    // Far beyond the number of picked rows, too.
    for (bad, row) in [(&[4, 5, 6][..], 5), (&[134, 135, 136], 135)] {
        for picked in
            [Picked { queries: bad, gallery: Some(good) }, Picked { queries: good, gallery: Some(bad) }]
        {
            // In a workspace of its own, which is no larger than it needs to be.
            let mut backend = DeviceBackend::new(EmulatedDevice::new(5), Options::default());
            // SAFETY: as in `run`.
            let error = unsafe { backend.nearest_resident(&batch, Some(&picked), 1) }.unwrap_err();
            let named = matches!(error, Error::NotFinite { rows: "queries", row: said } if said == row);
            assert!(named, "the caller's row: {error}");
        }
    }
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

/// What two parts found: numbers of the rows, totals, gradient and the parts' scalars.
struct FoundInParts {
    min_pos: Vec<f32>,
    max_neg: Vec<f32>,
    count_pos: Vec<u32>,
    count_neg: Vec<u32>,
    sums: [u64; 2],
    gradient: Array2<f32>,
    scalars: [LossScalars; 2],
}

/// Enqueues the loss of 140 rows in two parts. Thresholds are in device memory, and differ from those in the settings.
fn enqueue_parts((e, labels): (&Array2<f32>, &[i64]), lambda: [f64; 2], normalize: bool) -> FoundInParts {
    let list: Vec<u32> = (0..50).collect();
    let given = ResidentSettings { settings: LossSettings::default(), lambda: lambda.as_ptr() as u64 };
    let mut gradients = [Array2::zeros((50, 2)), Array2::zeros((90, 2))];
    let identities = [ResidentIdentity::List(list.as_ptr() as u64), ResidentIdentity::From(50)];
    let ranges = [0..50, 50..140];
    let part = |p: usize, gradient: &mut Array2<f32>| {
        let part = part_of((e, labels), ranges[p].clone(), gradient, identities[p]);
        ResidentPart { normalize, ..part }
    };
    let parts: Vec<ResidentPart> =
        gradients.iter_mut().enumerate().map(|(p, gradient)| part(p, gradient)).collect();
    let mut backends = [backend(), backend()];
    let (mut min_pos, mut max_neg) = (vec![0.0f32; 140], vec![0.0f32; 140]);
    let (mut count_pos, mut count_neg) = (vec![0u32; 140], vec![0u32; 140]);
    let (mut totals, mut sums) = ([[0u64; 2]; 2], [0u64; 2]);
    let mut scalars = [[0u64; size_of::<LossScalars>() / 8]; 2];
    let at = |base: u64, row: usize| base + 4 * row as u64;
    let numbers = |base: u64, p: usize| ResidentNumbers {
        anchors: at(base, ranges[p].start),
        references: base,
        count: 140,
    };
    let lists = [min_pos.as_mut_ptr() as u64, max_neg.as_mut_ptr() as u64];
    let counts = [count_pos.as_mut_ptr() as u64, count_neg.as_mut_ptr() as u64];
    // SAFETY: every address is that of a matrix or list of this test, which is long enough.
    unsafe {
        for p in 0..2 {
            let to = at(lists[0], ranges[p].start);
            backends[p].enqueue_same_class(&parts[p], &given, to).unwrap();
        }
        for p in 0..2 {
            let (to, found) = (at(lists[1], ranges[p].start), totals[p].as_mut_ptr() as u64);
            backends[p].enqueue_sweep(&parts[p], numbers(lists[0], p), to, found).unwrap();
        }
        // A call on the emulated device has finished when it returns.
        sums[0] = totals[0][0] + totals[1][0];
        sums[1] = totals[0][1] + totals[1][1];
        for p in 0..2 {
            let to = counts.map(|list| at(list, ranges[p].start));
            let sums = sums.as_ptr() as u64;
            backends[p].enqueue_select(&parts[p], numbers(lists[1], p), sums, to).unwrap();
        }
        for p in 0..2 {
            let given = counts.map(|list| numbers(list, p));
            backends[p].enqueue_gradient(&parts[p], given, scalars[p].as_mut_ptr() as u64).unwrap();
        }
    }
    let [first, second] = gradients;
    let gradient = ndarray::concatenate![ndarray::Axis(0), first, second];
    // SAFETY: the words have the size and alignment of LossScalars; its fields allow any bit pattern.
    let scalars = scalars.map(|words| unsafe { words.as_ptr().cast::<LossScalars>().read() });
    FoundInParts { min_pos, max_neg, count_pos, count_neg, sums, gradient, scalars }
}

#[test]
fn parts_that_nobody_waits_for_give_the_bits_of_parts_from_the_host() {
    let (e, labels) = rows(140, 0.0);
    let all = Rows::new(e.view(), &labels);
    let settings = LossSettings { lambda_pos: 0.6, lambda_neg: 0.4, ..LossSettings::default() };
    let mut host: Vec<Box<dyn Backend>> = vec![Box::new(backend()), Box::new(backend())];
    let tangent = Array2::zeros((140, 2));
    let wanted = loss_in_parts(&mut host, &all, &[50, 90], &settings, tangent.view()).unwrap().output;
    assert!(wanted.active > 0, "a batch that mines something");

    let found = enqueue_parts((&e, &labels), [0.6, 0.4], false);
    assert_eq!((found.min_pos, found.max_neg), (wanted.min_pos, wanted.max_neg));
    assert_eq!((found.count_pos, found.count_neg), (wanted.count_pos, wanted.count_neg));
    assert_eq!(found.sums, [wanted.probe_neg, wanted.total_pos]);
    assert_eq!(found.gradient, wanted.gradient);
    // The fixed-point unit of the sums allows for any threshold, so they are rounded more coarsely.
    let loss = found.scalars.iter().map(|scalars| scalars.loss).sum::<f64>();
    assert!((loss - wanted.loss).abs() < 1e-9, "{loss} {}", wanted.loss);
    assert_eq!(found.scalars.iter().map(|scalars| scalars.active).sum::<u64>(), wanted.active);
}

#[test]
fn parts_of_rows_of_any_length_have_the_loss_and_gradient_of_the_whole_batch() {
    let (unit, labels) = rows(140, 0.0);
    let e = unit * 3.0;
    let mut gradient = Array2::from_elem((140, 2), f32::NAN);
    let whole = enqueue(&e, &labels, &mut gradient, true).unwrap();
    let LossSettings { lambda_pos, lambda_neg, .. } = LossSettings::default();
    let found = enqueue_parts((&e, &labels), [lambda_pos, lambda_neg], true);
    let sum = |of: fn(&LossScalars) -> f64| found.scalars.iter().map(of).sum::<f64>();
    assert!(whole.loss > 0.0 && (sum(|part| part.loss) - whole.loss).abs() < 1e-6 * whole.loss);
    assert_eq!(sum(|part| part.mined_pos as f64), whole.mined_pos as f64);
    assert_eq!(sum(|part| part.mined_neg as f64), whole.mined_neg as f64);
    let largest = gradient.iter().fold(0.0f32, |most, entry| most.max(entry.abs()));
    assert!(largest > 0.0);
    let close = |(got, want): (&f32, &f32)| (got - want).abs() <= 1e-5 * largest;
    assert!(found.gradient.iter().zip(&gradient).all(close), "{} {gradient}", found.gradient);
}

/// Enqueues the loss of a whole batch with default settings; its scalars.
fn enqueue(
    e: &Array2<f32>,
    labels: &[i64],
    gradient: &mut Array2<f32>,
    normalize: bool,
) -> Result<LossScalars> {
    enqueue_on(&mut backend(), &LossSettings::default(), (e, labels), gradient, normalize)
}

fn enqueue_on(
    backend: &mut DeviceBackend<EmulatedDevice>,
    settings: &LossSettings,
    (e, labels): (&Array2<f32>, &[i64]),
    gradient: &mut Array2<f32>,
    normalize: bool,
) -> Result<LossScalars> {
    let batch = batch(resident(e, labels, gradient), None);
    let part = ResidentPart { batch, identity: ResidentIdentity::ByValue, total: labels.len(), normalize };
    let given = ResidentSettings { settings: *settings, lambda: 0 };
    let (mut scalars, mut loss) = (LossOutput::default().scalars(), 0.0f32);
    let output = ResidentOutput { scalars: &raw mut scalars as u64, loss: &raw mut loss as u64 };
    // SAFETY: the matrices, the scalars and the loss outlive the call.
    unsafe { backend.enqueue_loss(&part, &given, output) }?;
    assert_eq!(loss.to_bits(), (scalars.loss as f32).to_bits());
    Ok(scalars)
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

#[test]
fn parts_of_another_shape_or_out_of_order_are_refused() {
    let (e, labels) = rows(30, 0.0);
    let mut gradient = Array2::zeros((20, 2));
    let part = part_of((&e, &labels), 0..20, &mut gradient, ResidentIdentity::From(0));
    let given = ResidentSettings { settings: LossSettings::default(), lambda: 0 };
    let mut list = [0u64; 31];
    let address = list.as_mut_ptr() as u64;
    let numbers = ResidentNumbers { anchors: address, references: address, count: 30 };
    let mut backend = backend();
    // SAFETY: every address is that of a matrix or list of this test; refused calls use none.
    unsafe {
        let early = backend.enqueue_sweep(&part, numbers, address, address);
        assert!(matches!(early, Err(Error::OutOfOrder(_))));
        backend.enqueue_same_class(&part, &given, address).unwrap();
        let other = part_of((&e, &labels), 0..19, &mut gradient, ResidentIdentity::From(0));
        let refused = backend.enqueue_sweep(&other, numbers, address, address);
        assert!(matches!(refused, Err(Error::OutOfOrder(_))));
        backend.enqueue_same_class(&part, &given, address).unwrap();
        let many = ResidentNumbers { count: 31, ..numbers };
        let refused = backend.enqueue_sweep(&part, many, address, address);
        assert!(matches!(refused, Err(Error::LengthMismatch { .. })));
        backend.enqueue_same_class(&part, &given, address).unwrap();
        backend.enqueue_sweep(&part, numbers, address, address).unwrap();
        backend.enqueue_select(&part, numbers, address, [address; 2]).unwrap();
        let fewer = ResidentNumbers { count: 29, ..numbers };
        let refused = backend.enqueue_gradient(&part, [numbers, fewer], address);
        assert!(matches!(refused, Err(Error::LengthMismatch { .. })), "{refused:?}");
        for normalize in [false, true] {
            let part = ResidentPart { normalize, ..part };
            backend.enqueue_same_class(&part, &given, address).unwrap();
            backend.enqueue_sweep(&part, numbers, address, address).unwrap();
            backend.enqueue_select(&part, numbers, address, [address; 2]).unwrap();
            backend.enqueue_gradient(&part, [numbers; 2], address).unwrap();
            let sums = backend.threshold_gradient_resident(&part.batch, [e.as_ptr() as u64, 0]);
            assert_eq!(matches!(sums, Err(Error::OutOfOrder(_))), normalize, "{sums:?}");
        }
        let odd = ResidentSettings { lambda: 4, ..given };
        let refused = backend.enqueue_same_class(&part, &odd, address);
        assert!(matches!(refused, Err(Error::InvalidSetting { name: "lambda", .. })));
        let none = ResidentPart { total: 0, ..part };
        let refused = backend.enqueue_same_class(&none, &given, address);
        assert!(matches!(refused, Err(Error::InvalidSetting { name: "total", .. })));
    }
}
