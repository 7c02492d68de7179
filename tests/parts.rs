//! The loss of a batch in parts: however the rows are split, each row's results have the bits of one process.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use ddtas::Error;
use ddtas::backend::Backend;
use ddtas::backend::cpu::CpuBackend;
use ddtas::loss::{
    Batch, Embeddings, Identity, LossOutput, LossSettings, Mining, PairTotals, RowNumbers, Rows,
    ThresholdGradient, reference,
};
use ddtas_cases::golden;
use ddtas_cases::parts::{
    Together, check_identity, check_memory, loss_in_parts, run_all, slice, split, with_memory,
};
use ddtas_cases::random::{Draw, draw, tangent};
use half::{bf16, f16};
use ndarray::{Array2, s};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// A backend for each of `parts` parts; the first has a budget of 0.
fn backends(parts: usize) -> Vec<Box<dyn Backend>> {
    let of = |p: usize| -> Box<dyn Backend> {
        if p == 0 { Box::new(CpuBackend::with_budget(0)) } else { Box::new(CpuBackend::new()) }
    };
    (0..parts).map(of).collect()
}

/// The whole batch at once, in the square form.
fn at_once(rows: &Rows<'_>, settings: &LossSettings, tangent: &Array2<f32>) -> Together {
    let mut backend = CpuBackend::new();
    let batch = Batch::square(rows.embeddings.view(), rows.labels);
    let mut output = LossOutput::default();
    backend.loss(&batch, settings, &mut output).unwrap();
    let sums = backend.threshold_gradient(&batch, tangent.view(), None).unwrap();
    Together { output, threshold_gradient: sums }
}

/// Asserts that results of rows are equal bit for bit, and sums over the batch up to rounding.
fn assert_same(parts: &Together, whole: &Together, what: &str) {
    let (got, wanted) = (&parts.output, &whole.output);
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&got.min_pos), bits(&wanted.min_pos), "{what}: m+");
    assert_eq!(bits(&got.max_neg), bits(&wanted.max_neg), "{what}: m-");
    assert_eq!(got.count_pos, wanted.count_pos, "{what}: |P|");
    assert_eq!(got.count_neg, wanted.count_neg, "{what}: |N|");
    assert_eq!((got.gamma_pos, got.gamma_neg), (wanted.gamma_pos, wanted.gamma_neg), "{what}: tolerances");
    let totals = |output: &LossOutput| (output.probe_neg, output.total_pos, output.total_neg, output.active);
    assert_eq!(totals(got), totals(wanted), "{what}: probe, positives, negatives, active");
    let differ = got.gradient.outer_iter().zip(wanted.gradient.outer_iter());
    let differ = differ.filter(|(a, b)| a.iter().zip(b).any(|(x, y)| x.to_bits() != y.to_bits())).count();
    assert_eq!(differ, 0, "{what}: gradients of {differ} of {} rows differ", wanted.count_pos.len());
    let near = |name: &str, got: f64, wanted: f64| {
        let same = (got - wanted).abs() <= 1e-6 * wanted.abs() || (got.is_nan() && wanted.is_nan());
        assert!(same, "{what}: {name} is {got}, not {wanted}");
    };
    near("loss", got.loss, wanted.loss);
    near("dL/dlambda_pos", got.dloss_dlambda_pos, wanted.dloss_dlambda_pos);
    near("dL/dlambda_neg", got.dloss_dlambda_neg, wanted.dloss_dlambda_neg);
    let near = |got: f64, wanted: f64| (got - wanted).abs() < 1e-9 || (got.is_nan() && wanted.is_nan());
    assert!(near(got.mean_pos, wanted.mean_pos), "{what}: mean of the positives");
    assert!(near(got.mean_neg, wanted.mean_neg), "{what}: mean of the negatives");
    // The threshold gradient is a sum of dot products of rows, which have the same bits.
    for (got, wanted) in [
        (parts.threshold_gradient.pos, whole.threshold_gradient.pos),
        (parts.threshold_gradient.neg, whole.threshold_gradient.neg),
    ] {
        assert!(
            (got - wanted).abs() <= 1e-9 * wanted.abs() + 1e-12,
            "{what}: threshold gradient {got}, {wanted}"
        );
    }
}

#[test]
fn parts_have_the_bits_of_one_process() {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let minings = [Mining::AtAsms, Mining::None, Mining::Symmetric, Mining::Asms];
    for (round, (rows, dim)) in
        [(80, 64), (81, 130), (320, 48), (500, 17), (1280, 32)].into_iter().enumerate()
    {
        for (m, mining) in minings.into_iter().enumerate() {
            // Noise decides how many pairs are mined: few (gradient by lists) to all (by products).
            let noise = [1.0, 2.2, 3.5][(round + m) % 3];
            let classes = [rows / 5, 3][usize::from(round == 3)];
            let how = Draw { rows, dim, classes, noise, ignored: 9, duplicates: 11 };
            let (embeddings, labels) = draw(how, round as u64);
            let settings = LossSettings { mining, lambda_pos: 0.6, ..LossSettings::default() };
            let tangent = tangent(rows, dim, 3);
            let lengths = split(rows, &mut random);
            let f32_rows = Rows::new(embeddings.view(), &labels);
            let (half, brain) = (embeddings.mapv(f16::from_f32), embeddings.mapv(bf16::from_f32));
            let all = match (round + m) % 3 {
                0 => Rows::new(Embeddings::F16(half.view()), &labels),
                1 => Rows::new(Embeddings::Bf16(brain.view()), &labels),
                _ => f32_rows,
            };
            let whole = at_once(&all, &settings, &tangent);
            let parts =
                loss_in_parts(&mut backends(lengths.len()), &all, &lengths, &settings, tangent.view())
                    .unwrap();
            assert_same(&parts, &whole, &format!("{rows} x {dim}, {mining:?}, {lengths:?}"));
        }
    }
}

#[test]
fn parts_without_rows_without_pairs_and_of_ignored_rows_alone() {
    let how = Draw { rows: 120, dim: 24, classes: 20, noise: 1.8, ignored: 0, duplicates: 0 };
    let (embeddings, mut labels) = draw(how, 5);
    // The first part mines nothing, since each of its rows is alone in its class; the second is ignored.
    for (i, label) in labels.iter_mut().enumerate().take(50) {
        *label = if i < 30 { 1000 + i as i64 } else { -1 };
    }
    let all = Rows::new(embeddings.view(), &labels);
    let (settings, tangent) = (LossSettings::default(), tangent(120, 24, 1));
    let whole = at_once(&all, &settings, &tangent);
    assert!(whole.output.active > 0);
    for lengths in [vec![30, 20, 70], vec![0, 120, 0], vec![0, 30, 0, 20, 70], vec![1; 120]] {
        let parts =
            loss_in_parts(&mut backends(lengths.len()), &all, &lengths, &settings, tangent.view()).unwrap();
        assert_same(&parts, &whole, &format!("{lengths:?}"));
    }
}

#[test]
fn reference_cases_split_at_random_places() {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    for case in golden() {
        let all = case.anchors.view();
        let whole = at_once(&all, &case.settings, &case.anchors.tangent);
        for _ in 0..4 {
            let lengths = split(case.anchors.labels.len(), &mut random);
            let mut backends = backends(lengths.len());
            let parts =
                loss_in_parts(&mut backends, &all, &lengths, &case.settings, case.anchors.tangent.view())
                    .unwrap();
            assert_same(&parts, &whole, &format!("{} {lengths:?}", case.name));
        }
    }
}

#[test]
fn a_memory_behind_the_batch_selects_nothing() {
    let (embeddings, labels) = with_memory();
    let all = Rows::new(embeddings.view(), &labels);
    let tangent = tangent(90, 20, 4);
    for mining in [Mining::AtAsms, Mining::None] {
        let settings = LossSettings { mining, ..LossSettings::default() };
        let one = loss_in_parts(&mut backends(1), &all, &[90], &settings, tangent.view()).unwrap();
        for lengths in [vec![45, 45], vec![1, 20, 0, 69]] {
            let mut backends = backends(lengths.len());
            let parts = loss_in_parts(&mut backends, &all, &lengths, &settings, tangent.view()).unwrap();
            assert_same(&parts, &one, &format!("memory, {lengths:?}"));
        }
        // The rectangular form with both gradients sums the same in another order.
        let batch = Batch::rectangular(slice(&all, 0, 90), all).with_identity(Identity::From(0));
        let mut output = LossOutput::default();
        CpuBackend::new().loss(&batch.with_reference_gradient(), &settings, &mut output).unwrap();
        let back = output.reference_gradient.take().unwrap();
        let wanted = &output.gradient + &back.slice(s![..90, ..]);
        let largest = wanted.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let off = &wanted - &one.output.gradient;
        assert!(off.iter().all(|x| x.abs() <= 1e-6 * largest), "{off} of {largest}");
        assert_eq!((&output.count_pos, &output.count_neg), (&one.output.count_pos, &one.output.count_neg));
        assert!((output.loss - one.output.loss).abs() < 1e-6 * output.loss);
    }
}

#[test]
fn a_memory_behind_the_batch_agrees_with_the_truth() {
    check_memory(|part| backends(part + 1).remove(part));
}

/// References that are given in three blocks, one at a time: the anchors' numbers are combined over the
/// blocks, and each step repeats the steps before it.
#[test]
fn references_in_blocks() {
    let how = Draw { rows: 60, dim: 24, classes: 12, noise: 1.8, ignored: 10, duplicates: 9 };
    let (anchors, labels) = draw(how, 31);
    let (mut references, mut reference_labels) = draw(Draw { rows: 400, ..how }, 32);
    // Some anchors are also references.
    references.slice_mut(s![100..120, ..]).assign(&anchors.slice(s![..20, ..]));
    reference_labels[100..120].copy_from_slice(&labels[..20]);
    let list: Vec<u32> = (0..60).map(|i| if i < 20 { 100 + i } else { Identity::ABSENT }).collect();
    let anchors = Rows::new(anchors.view(), &labels);
    let references = Rows::new(references.view(), &reference_labels);
    let settings = LossSettings::default();
    let batch = Batch::rectangular(anchors, references).with_identity(Identity::List(&list));
    let mut whole = LossOutput::default();
    CpuBackend::new().loss(&batch, &settings, &mut whole).unwrap();

    let lists: Vec<Vec<u32>> = [(0, 130), (130, 131), (131, 400)]
        .iter()
        .map(|(first, end)| {
            let within = |at: &u32| if (*first..*end).contains(at) { at - first } else { Identity::ABSENT };
            list.iter().map(within).collect()
        })
        .collect();
    let part = |b: usize| {
        let (first, end) = [(0, 130), (130, 131), (131, 400)][b];
        Batch::part(anchors, slice(&references, first, end), Identity::List(&lists[b]), 60)
    };
    let (mut backend, mut output) = (CpuBackend::new(), LossOutput::default());
    let mut got = LossOutput {
        min_pos: vec![f32::INFINITY; 60],
        max_neg: vec![f32::NEG_INFINITY; 60],
        count_pos: vec![0; 60],
        count_neg: vec![0; 60],
        gradient: Array2::zeros((60, 24)),
        ..LossOutput::default()
    };
    for b in 0..3 {
        backend.same_class(&part(b), &settings, &mut output).unwrap();
        got.total_pos += output.total_pos;
        got.min_pos.iter_mut().zip(&output.min_pos).for_each(|(least, found)| *least = least.min(*found));
    }
    for b in 0..3 {
        backend.same_class(&part(b), &settings, &mut output).unwrap();
        backend.sweep(&part(b), RowNumbers::new(&got.min_pos, &[]), &mut output).unwrap();
        got.probe_neg += output.probe_neg;
        got.max_neg.iter_mut().zip(&output.max_neg).for_each(|(most, found)| *most = most.max(*found));
    }
    let (totals, mut mined) = (got.pair_totals(), (0, 0));
    for last in [false, true] {
        let (count_pos, count_neg) = (got.count_pos.clone(), got.count_neg.clone());
        for b in 0..3 {
            backend.same_class(&part(b), &settings, &mut output).unwrap();
            backend.sweep(&part(b), RowNumbers::new(&got.min_pos, &[]), &mut output).unwrap();
            backend.select(&part(b), RowNumbers::new(&got.max_neg, &[]), totals, &mut output).unwrap();
            if !last {
                got.count_pos.iter_mut().zip(&output.count_pos).for_each(|(sum, found)| *sum += found);
                got.count_neg.iter_mut().zip(&output.count_neg).for_each(|(sum, found)| *sum += found);
                continue;
            }
            let of = |counts| RowNumbers { anchors: counts, references: &[] };
            backend.gradient(&part(b), of(&count_pos), of(&count_neg), &mut output).unwrap();
            got.loss += output.loss;
            got.gradient += &output.gradient;
            let (pos, neg) = output.mined_of_part(&count_pos, &count_neg);
            mined = (mined.0 + pos, mined.1 + neg);
        }
    }
    assert_eq!((&got.min_pos, &got.max_neg), (&whole.min_pos, &whole.max_neg));
    assert_eq!((&got.count_pos, &got.count_neg), (&whole.count_pos, &whole.count_neg));
    assert_eq!(mined, whole.mined());
    assert!(whole.active > 0 && (got.loss - whole.loss).abs() < 1e-6 * whole.loss);
    let largest = whole.gradient.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let off = &got.gradient - &whole.gradient;
    assert!(off.iter().all(|x| x.abs() <= 1e-6 * largest), "{off} of {largest}");
}

#[test]
fn the_table_of_cases_in_parts() {
    run_all(|part| backends(part + 1).remove(part), ddtas_cases::generated());
}

#[test]
fn identity_by_index_agrees_with_the_truth() {
    check_identity(&mut CpuBackend::new());
}

#[test]
fn identity_by_index_leaves_a_row_out_that_its_value_would_not() {
    // A row's reference copy is rounded to bf16, so that it is no exact duplicate.
    let how = Draw { rows: 50, dim: 64, classes: 10, noise: 1.5, ignored: 8, duplicates: 0 };
    let (anchors, labels) = draw(how, 41);
    let coarse = anchors.mapv(|x| bf16::from_f32(x).to_f32());
    let list: Vec<u32> = (0..50).rev().collect();
    let turned = Array2::from_shape_fn((50, 64), |(i, d)| coarse[[49 - i, d]]);
    let turned_labels: Vec<i64> = labels.iter().rev().copied().collect();
    let references = Rows::new(turned.view(), &turned_labels);
    let by_value = Batch::rectangular(Rows::new(anchors.view(), &labels), references).trusted();
    let by_index = by_value.with_identity(Identity::List(&list));
    let settings = LossSettings::default();
    let mut positives = Vec::new();
    for batch in [by_value, by_index] {
        let mut output = LossOutput::default();
        CpuBackend::new().loss(&batch, &settings, &mut output).unwrap();
        let truth = reference(&batch, &settings).unwrap();
        assert_eq!(output.total_pos, truth.selection.total_pos);
        assert_eq!(output.total_neg, truth.total_neg);
        assert!((output.mean_neg - truth.mean_neg).abs() < 1e-6);
        assert!((output.mean_pos - truth.mean_pos).abs() < 1e-6);
        positives.push(output.total_pos);
    }
    let rows = labels.iter().filter(|label| **label >= 0).count() as u64;
    assert_eq!(positives[0] - positives[1], rows);
}

#[test]
fn steps_out_of_order_and_numbers_of_another_length_are_refused() {
    let how = Draw { rows: 12, dim: 8, classes: 3, noise: 1.5, ignored: 0, duplicates: 0 };
    let (embeddings, labels) = draw(how, 51);
    let all = Rows::new(embeddings.view(), &labels);
    let part = Batch::part(slice(&all, 4, 8), all, Identity::From(4), 12);
    let settings = LossSettings::default();
    let (mut backend, mut output) = (CpuBackend::new(), LossOutput::default());
    let (floats, counts) = ([0.5f32; 13], [1u32; 13]);
    let numbers = RowNumbers::new(&floats[..4], &floats[..12]);
    let sizes = RowNumbers::new(&counts[..4], &counts[..12]);
    let out_of_order = |result: ddtas::Result<()>| assert!(matches!(result, Err(Error::OutOfOrder(_))));

    out_of_order(backend.sweep(&part, numbers, &mut output));
    backend.same_class(&part, &settings, &mut output).unwrap();
    out_of_order(backend.select(&part, numbers, PairTotals::default(), &mut output));
    // An error ends the sequence: it starts again with the same-class step.
    out_of_order(backend.sweep(&part, numbers, &mut output));
    backend.same_class(&part, &settings, &mut output).unwrap();
    let larger = Batch { total: Some(13), ..part };
    out_of_order(backend.sweep(&larger, numbers, &mut output));
    backend.same_class(&part, &settings, &mut output).unwrap();
    let elsewhere = Batch::part(slice(&all, 3, 7), all, Identity::From(3), 12);
    out_of_order(backend.sweep(&elsewhere, numbers, &mut output));
    backend.same_class(&part, &settings, &mut output).unwrap();
    backend.loss(&Batch::square(all.embeddings.view(), all.labels), &settings, &mut output).unwrap();
    out_of_order(backend.sweep(&part, numbers, &mut output));
    backend.same_class(&part, &settings, &mut output).unwrap();
    backend.sweep(&part, numbers, &mut output).unwrap();
    out_of_order(backend.gradient(&part, sizes, sizes, &mut output));
    let sums = |backend: &mut CpuBackend| backend.threshold_gradient(&part, tangent(4, 8, 1).view(), None);
    assert!(matches!(sums(&mut backend), Err(Error::OutOfOrder(_))));

    for (anchors, references) in [(3, 12), (5, 12), (4, 13)] {
        backend.same_class(&part, &settings, &mut output).unwrap();
        let numbers = RowNumbers::new(&floats[..anchors], &floats[..references]);
        assert!(matches!(backend.sweep(&part, numbers, &mut output), Err(Error::LengthMismatch { .. })));
    }
    // `count_pos` and `count_neg` must have the same number of references.
    backend.same_class(&part, &settings, &mut output).unwrap();
    backend.sweep(&part, numbers, &mut output).unwrap();
    backend.select(&part, numbers, PairTotals::default(), &mut output).unwrap();
    let fewer = RowNumbers::new(&counts[..4], &counts[..11]);
    let refused = backend.gradient(&part, sizes, fewer, &mut output);
    assert!(matches!(refused, Err(Error::LengthMismatch { expected: 12, got: 11, .. })));
    for identity in [Identity::From(9), Identity::From(usize::MAX), Identity::List(&[4, 5, 6, 99])] {
        let part = Batch { identity, ..part };
        let refused = backend.same_class(&part, &settings, &mut output);
        assert!(matches!(refused, Err(Error::InvalidSetting { name: "identity", .. })), "{identity:?}");
    }
    let other_label = labels.iter().position(|label| *label != labels[4]).unwrap() as u32;
    let list = [other_label, 5, 6, 7];
    let refused = Batch { identity: Identity::List(&list), ..part }.validate();
    assert!(matches!(refused, Err(Error::InvalidSetting { name: "identity", .. })));
    let refused = Batch { identity: Identity::List(&list[1..]), ..part }.validate();
    assert!(matches!(refused, Err(Error::LengthMismatch { .. })));
    let refused = Batch { total: Some(0), ..part }.validate();
    assert!(matches!(refused, Err(Error::InvalidSetting { name: "total", .. })));
    // Numbers of the right length are not checked: NaN, or other than the steps found.
    let sums = sums_of_any_numbers(&mut backend, &part);
    assert!(sums.pos.is_finite() && sums.neg.is_finite());
}

fn sums_of_any_numbers(backend: &mut CpuBackend, part: &Batch<'_>) -> ThresholdGradient {
    let mut output = LossOutput::default();
    let strange = [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, -7.0];
    let numbers = RowNumbers::new(&strange[..], &strange[..]);
    backend.same_class(part, &LossSettings::default(), &mut output).unwrap();
    backend.sweep(part, numbers, &mut output).unwrap();
    backend.select(part, numbers, PairTotals { probe_neg: u64::MAX, total_pos: 0 }, &mut output).unwrap();
    let counts = [u32::MAX, 0, 1, 7];
    let counts = RowNumbers::new(&counts[..], &counts[..]);
    backend.gradient(part, counts, counts, &mut output).unwrap();
    backend.threshold_gradient(part, tangent(4, 8, 1).view(), None).unwrap()
}
