//! The CPU backend against the scalar truth.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use ddtas::Error;
use ddtas::backend::cpu::CpuBackend;
use ddtas::backend::{Backend, DeviceSpec, OpenOptions, open_with};
use ddtas::loss::{Batch, Embeddings, Identity, LossOutput, LossSettings, Mining, Rows, reference};
use ddtas::threads::Threads;
use ddtas_cases::random::{Draw, compare, draw, tangent};
use ddtas_cases::{self as cases, Expected, Report, SINGLE_PRECISION};
use half::{bf16, f16};
use ndarray::{Array2, Axis, s};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

#[test]
fn the_cpu_backend_reproduces_every_golden_case() {
    cases::run_all(&mut CpuBackend::new(), cases::golden());
}

#[test]
fn the_cpu_backend_agrees_with_the_truth_on_the_table_of_cases() {
    cases::run_all(&mut CpuBackend::new(), cases::generated());
    cases::run_all(&mut CpuBackend::new(), cases::in_every_way());
}

#[test]
fn without_a_budget_every_tile_is_recomputed_and_nothing_changes() {
    cases::run_all(&mut CpuBackend::with_budget(0), cases::generated());
    cases::run_all(&mut CpuBackend::with_budget(0), cases::in_every_way());
}

prop_compose! {
    fn any_draw()(
        rows in 1usize..200, dim in 1usize..70, classes in 1usize..40, noise in 0.05f32..6.0,
        ignored in 0usize..6, duplicates in 0usize..6,
    ) -> Draw {
        Draw { rows, dim, classes, noise, ignored, duplicates }
    }
}

fn any_settings() -> impl Strategy<Value = LossSettings> {
    let mining =
        prop_oneof![Just(Mining::None), Just(Mining::Symmetric), Just(Mining::Asms), Just(Mining::AtAsms)];
    (mining, 0.01f64..0.5, 0.05f64..2.0, 0.05f64..2.0, 0.0f64..1.0, 0.2f64..0.9).prop_map(
        |(mining, gamma, negative_ratio, probe_ratio, tolerance, lambda)| {
            let defaults = LossSettings::default();
            LossSettings { mining, gamma, negative_ratio, probe_ratio, tolerance, ..defaults }
                .with_lambda(lambda)
        },
    )
}

proptest! {
    // The same batches in every run; `.ci/random.sh` draws others.
    #![proptest_config(ProptestConfig {
        cases: 150, failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default()
    })]

    #[test]
    fn any_batch_agrees_with_the_truth(
        how in any_draw(), settings in any_settings(), seed in any::<u64>(), budget in 0usize..40_000,
        extra in 1usize..250, square in any::<bool>(),
    ) {
        let against = (!square).then_some(extra);
        if let Some(report) = (RandomBatch { how, settings, seed, budget, against }).report() {
            prop_assert!(report.passes(SINGLE_PRECISION), "{report:#?}");
        }
    }
}

#[test]
fn random_batches_that_failed_once_agree_with_the_truth() {
    let draw = |rows, dim, classes| Draw { rows, dim, classes, noise: 1.0, ignored: 0, duplicates: 0 };
    let everything = LossSettings { mining: Mining::None, ..LossSettings::default() };
    let failed = [
        (
            "a threshold gradient whose terms cancel",
            RandomBatch {
                how: draw(137, 64, 12),
                settings: everything.with_lambda(0.87),
                seed: 329,
                budget: 0,
                against: None,
            },
        ),
        (
            "negatives whose sigmoid is nearly 1",
            RandomBatch {
                how: Draw { noise: 0.671_599_75, ignored: 4, duplicates: 3, ..draw(17, 1, 16) },
                settings: everything.with_lambda(0.838_100_803_505_426_4),
                seed: 2_844_632_261_410_986_724,
                budget: 0,
                against: Some(3),
            },
        ),
    ];
    for (name, batch) in failed {
        let report = batch.report().expect("clear of the thresholds");
        assert!(report.passes(SINGLE_PRECISION), "{name}: {report:#?}");
    }
}

/// One batch of [`any_batch_agrees_with_the_truth`], which prints these fields when it fails.
struct RandomBatch {
    how: Draw,
    settings: LossSettings,
    seed: u64,
    budget: usize,
    /// Number of reference rows; `None`: the square form.
    against: Option<usize>,
}

impl RandomBatch {
    /// The CPU backend's errors against the truth; `None` if a pair lies too near a threshold.
    fn report(&self) -> Option<Report> {
        let Self { how, settings, seed, budget, against } = *self;
        let (anchors, labels) = draw(how, seed);
        let (references, reference_labels) = draw(Draw { rows: against.unwrap_or(1), ..how }, seed ^ 1);
        let batch = match against {
            None => Batch::square(anchors.view(), &labels),
            Some(_) => Batch::rectangular(
                Rows::new(anchors.view(), &labels),
                Rows::new(references.view(), &reference_labels),
            )
            .with_reference_gradient(),
        };
        compare(&mut CpuBackend::with_budget(budget), &batch, &settings, seed)
    }
}

#[test]
fn a_row_that_stands_on_both_sides_is_no_positive_of_itself() {
    // Every row is its own class and also a reference: the pair with itself must not count, in any type.
    for (dim, noise) in [(7, 3.0), (512, 3.0), (1024, 3.0), (2048, 3.0), (2049, 3.0)] {
        let how = Draw { rows: 200, dim, classes: 1, noise, ignored: 0, duplicates: 0 };
        let (rows, _) = draw(how, dim as u64);
        let labels: Vec<i64> = (0..200).collect();
        let (narrow, brain) = (rows.mapv(f16::from_f32), rows.mapv(bf16::from_f32));
        for embeddings in
            [Embeddings::F32(rows.view()), Embeddings::F16(narrow.view()), Embeddings::Bf16(brain.view())]
        {
            let batch = Batch::rectangular(Rows::new(embeddings, &labels), Rows::new(embeddings, &labels));
            let mut output = LossOutput::default();
            CpuBackend::new().loss(&batch, &LossSettings::default(), &mut output).unwrap();
            assert_eq!((output.total_pos, output.active, output.loss), (0, 0, 0.0), "{dim}: {embeddings:?}");
            assert_eq!(reference(&batch, &LossSettings::default()).unwrap().selection.total_pos, 0);
        }
    }
}

#[test]
fn a_copy_of_another_length_is_a_positive() {
    // Its similarity exceeds the shorter row's squared norm, but not the longer one's.
    let how = Draw { rows: 120, dim: 16, classes: 9, noise: 1.5, ignored: 0, duplicates: 0 };
    let (mut rows, mut labels) = draw(how, 1);
    for i in (0..120).step_by(2) {
        let copy = &rows.row(i) * [0.999_5, 1.000_5][i / 2 % 2];
        rows.row_mut(i + 1).assign(&copy);
        labels[i + 1] = labels[i];
    }
    let settings = LossSettings { mining: Mining::None, ..LossSettings::default() };
    let (square, all) = (Batch::square(rows.view(), &labels), Rows::new(rows.view(), &labels));
    for batch in [square, Batch::rectangular(all, all).with_identity(Identity::From(0))] {
        let (mut output, truth) = (LossOutput::default(), reference(&batch, &settings).unwrap());
        CpuBackend::new().loss(&batch, &settings, &mut output).unwrap();
        let sizes: Vec<u32> = truth.selection.sizes().iter().map(|size| size[0]).collect();
        assert_eq!((output.total_pos, &output.count_pos), (truth.selection.total_pos, &sizes));
        assert!((output.loss - truth.weighted.loss).abs() < 1e-5 * truth.weighted.loss);
    }
}

#[test]
fn sides_of_different_types_are_refused() {
    let (rows, labels) =
        draw(Draw { rows: 20, dim: 6, classes: 4, noise: 1.5, ignored: 0, duplicates: 0 }, 1);
    let narrow = rows.mapv(f16::from_f32);
    let sides = [Rows::new(rows.view(), &labels), Rows::new(narrow.view(), &labels)];
    let (settings, mut output) = (LossSettings::default(), LossOutput::default());
    for (anchors, references) in [(sides[0], sides[1]), (sides[1], sides[0])] {
        let batch = Batch::rectangular(anchors, references);
        for refused in [
            CpuBackend::new().loss(&batch, &settings, &mut output).unwrap_err(),
            CpuBackend::new().normalized_loss(&batch, &settings, &mut output).unwrap_err(),
            reference(&batch, &settings).unwrap_err(),
        ] {
            assert!(matches!(refused, Error::TypeMismatch { .. }), "{refused}");
        }
    }
}

#[test]
fn one_backend_serves_batches_of_changing_shape() {
    let mut backend = CpuBackend::new();
    for (rows, dim, classes) in [(300, 20, 50), (7, 64, 2), (150, 3, 4), (1, 1, 1), (290, 20, 9)] {
        let (rows, labels) = draw(Draw { rows, dim, classes, noise: 1.5, ignored: 5, duplicates: 0 }, 3);
        // Then other labels of the same number, first and last.
        let (mut others, last) = (labels.clone(), labels.len() - 1);
        others[last.min(1)..last].reverse();
        for labels in [labels, others] {
            let batch = Batch::square(rows.view(), &labels);
            let mut fresh = LossOutput::default();
            CpuBackend::new().loss(&batch, &LossSettings::default(), &mut fresh).unwrap();
            let mut reused = LossOutput::default();
            backend.loss(&batch, &LossSettings::default(), &mut reused).unwrap();
            assert_eq!(format!("{fresh:?}"), format!("{reused:?}"));
        }
    }
}

#[test]
fn rows_whose_panels_are_too_large_to_keep_give_the_same_bits() {
    // Panels of 89 rows or more exceed 128 MiB from 350,000 dimensions on. Zeros behind a row change no bit.
    let how = Draw { rows: 100, dim: 40, classes: 12, noise: 1.8, ignored: 9, duplicates: 9 };
    let mut backend = CpuBackend::new();
    for (seed, mining) in [(1, Mining::None), (2, Mining::AtAsms)] {
        let (rows, labels) = draw(how, seed);
        let mut wide = Array2::zeros((100, 360_000));
        wide.slice_mut(s![.., ..40]).assign(&rows);
        let settings = LossSettings { mining, ..LossSettings::default() };
        // The backend goes from one kind to the other and back: no panel of another batch may stay.
        let [kept, mut packed] = [&rows, &wide].map(|rows| {
            let mut output = LossOutput::default();
            backend.loss(&Batch::square(rows.view(), &labels), &settings, &mut output).unwrap();
            output
        });
        assert!(kept.active > 50 && packed.gradient.slice(s![.., 40..]).iter().all(|x| *x == 0.0));
        packed.gradient = packed.gradient.slice(s![.., ..40]).to_owned();
        assert_eq!(packed, kept);
    }
}

#[test]
fn candidates_take_no_more_memory_than_their_budget() {
    let settings = LossSettings { mining: Mining::None, ..LossSettings::default() };
    let how = Draw { rows: 900, dim: 8, classes: 1, noise: 3.0, ignored: 0, duplicates: 0 };
    let (rows, _) = draw(how, 1);
    // Rows alone in their class have no candidates: the first tiles have most of them, then the last ones.
    let first: Vec<i64> = (0..900).map(|i| if i < 450 { i / 5 } else { i }).collect();
    let last: Vec<i64> = (0..900).map(|i| if i < 450 { i } else { 450 + i / 5 }).collect();
    // Bytes after each loss. With one thread the same tiles are kept in every run.
    let bytes = |budget: usize| {
        let (mut backend, mut output) = (CpuBackend::with_budget(budget), LossOutput::default());
        let pool = Threads::new(1).unwrap();
        [&first, &last, &first].map(|labels| {
            let batch = Batch::square(rows.view(), labels);
            pool.install(|| backend.loss(&batch, &settings, &mut output)).unwrap();
            backend.workspace_bytes()
        })
    };
    let without = bytes(0);
    // Candidates would take 1.2 MB, and 2.4 MB with their weights. A quarter is for the list of tiles.
    for budget in [300_000, 600_000, 1_500_000] {
        let most = budget + budget / 4;
        let [one, two, three] = bytes(budget);
        assert!((budget / 2..=most).contains(&(one - without[0])), "{} of {budget}", one - without[0]);
        // The room of tiles is kept for the next loss, and given back once it exceeds the budget.
        assert!(two - without[1] <= most + budget, "{} of {budget}", two - without[1]);
        assert!(three - without[2] <= most, "{} of {budget}", three - without[2]);
    }
}

#[test]
fn memory_is_linear_in_the_batch() {
    // Budget 0 stores no candidates: only the memory of the passes themselves remains.
    let bytes = |rows: usize| {
        let how = Draw { rows, dim: 4, classes: rows / 5, noise: 1.5, ignored: 0, duplicates: 0 };
        let (rows, labels) = draw(how, 1);
        let mut backend = CpuBackend::with_budget(0);
        let mut output = LossOutput::default();
        backend.loss(&Batch::square(rows.view(), &labels), &LossSettings::default(), &mut output).unwrap();
        assert!(output.loss > 0.0);
        backend.workspace_bytes() as f64
    };
    let (few, many) = (bytes(3_000), bytes(12_000));
    assert!(many < 4.2 * few, "{few} bytes for 3,000 rows, {many} for 12,000");
}

#[test]
fn a_backend_prints_its_sizes_and_keeps_the_memory_of_rows() {
    let (rows, labels) =
        draw(Draw { rows: 600, dim: 256, classes: 60, noise: 1.5, ignored: 0, duplicates: 0 }, 1);
    let (mut backend, mut output) = (CpuBackend::new(), LossOutput::default());
    let settings = LossSettings { mining: Mining::None, ..LossSettings::default() };
    backend.loss(&Batch::square(rows.view(), &labels), &settings, &mut output).unwrap();
    assert_eq!((output.gamma_pos, output.gamma_neg), (f64::INFINITY, f64::INFINITY));
    let bytes = backend.workspace_bytes();
    let text = format!("{backend:?}");
    assert!(text.len() < 1000 && text.contains(&format!("workspace_bytes: {bytes},")), "{text}");
    backend.loss(&Batch::square(rows.slice(s![..9, ..]), &labels[..9]), &settings, &mut output).unwrap();
    assert!(backend.workspace_bytes() > size_of_val(rows.as_slice().unwrap()), "the rows' memory stays");
}

#[test]
fn a_total_divides_the_loss_of_a_square_batch() {
    let (rows, labels) =
        draw(Draw { rows: 64, dim: 16, classes: 12, noise: 1.5, ignored: 0, duplicates: 0 }, 1);
    let batch = Batch::square(rows.view(), &labels);
    let [whole, half] = [None, Some(128)].map(|total| {
        let mut output = LossOutput::default();
        let batch = Batch { total, ..batch };
        CpuBackend::new().loss(&batch, &LossSettings::default(), &mut output).unwrap();
        output
    });
    assert!(whole.active > 0 && whole.gradient.iter().any(|x| *x != 0.0));
    let halved = LossOutput {
        loss: half.loss * 2.0,
        dloss_dlambda_pos: half.dloss_dlambda_pos * 2.0,
        dloss_dlambda_neg: half.dloss_dlambda_neg * 2.0,
        gradient: half.gradient * 2.0,
        ..half
    };
    assert_eq!(halved, whole);
}

#[test]
fn rows_of_any_length_are_compared_as_the_batch_says() {
    // Unit rows: normalising changes rounding alone, and total, identity and check are the batch's.
    let how = Draw { rows: 60, dim: 16, classes: 9, noise: 1.5, ignored: 7, duplicates: 0 };
    let (rows, labels) = draw(how, 1);
    let (mut others, mut other_labels) = draw(how, 2);
    let list: Vec<u32> = (0..60).map(|i| if i < 40 { 59 - i } else { Identity::ABSENT }).collect();
    for (i, &at) in list.iter().enumerate().take(40) {
        // Another row than the anchor, so that its value does not tell.
        other_labels[at as usize] = labels[i];
        others.row_mut(at as usize).assign(&rows.row((i + 7) % 40));
    }
    let batch = Batch::rectangular(Rows::new(rows.view(), &labels), Rows::new(others.view(), &other_labels));
    let batch = Batch { total: Some(77), ..batch.with_identity(Identity::List(&list)) };
    let (mut backend, settings) = (CpuBackend::new(), LossSettings::default());
    let [mut want, mut got] = [(); 2].map(|()| LossOutput::default());
    backend.loss(&batch, &settings, &mut want).unwrap();
    backend.normalized_loss(&batch, &settings, &mut got).unwrap();
    assert!(
        want.active > 20 && (got.loss - want.loss).abs() < 1e-5 * want.loss,
        "{} {}",
        got.loss,
        want.loss
    );
    assert_eq!((got.total_pos, got.total_neg, got.active), (want.total_pos, want.total_neg, want.active));

    // A row of zeros has no derivative; one that is not finite has none either, and says so.
    let mut rows = rows;
    rows.row_mut(11).fill(0.0);
    rows.row_mut(12).fill(f32::NAN);
    backend.normalized_loss(&Batch::square(rows.view(), &labels).trusted(), &settings, &mut got).unwrap();
    assert!(got.gradient.row(11).iter().all(|x| *x == 0.0), "{}", got.gradient.row(11));
    assert!(got.gradient.row(12).iter().all(|x| x.is_nan()), "{}", got.gradient.row(12));
}

#[test]
fn the_square_form_has_no_identity_and_trusted_rows_are_never_checked() {
    let (rows, labels) =
        draw(Draw { rows: 60, dim: 16, classes: 9, noise: 1.5, ignored: 0, duplicates: 0 }, 1);
    let longer = rows * 1.1;
    let batch = Batch::square(longer.view(), &labels).trusted();
    let mut backend = CpuBackend::new();
    let [plain, named] = [batch, batch.with_identity(Identity::From(1))].map(|batch| {
        let mut output = LossOutput::default();
        backend.loss(&batch, &LossSettings::default(), &mut output).unwrap();
        backend.threshold_gradient(&batch, tangent(60, 16, 1).view(), None).unwrap();
        output
    });
    assert!(plain.active > 20);
    assert_eq!(named, plain);
}

#[test]
fn a_backend_opened_by_name_has_the_budget_it_is_given() {
    let (rows, labels) =
        draw(Draw { rows: 300, dim: 8, classes: 60, noise: 1.5, ignored: 0, duplicates: 0 }, 1);
    let settings = LossSettings { mining: Mining::None, ..LossSettings::default() };
    let [none, default] = [Some(0), None].map(|budget| {
        let options = OpenOptions { budget, ..OpenOptions::default() };
        let mut backend = open_with(&DeviceSpec::Cpu, &options).unwrap();
        backend.loss(&Batch::square(rows.view(), &labels), &settings, &mut LossOutput::default()).unwrap();
        backend.workspace_bytes()
    });
    assert!(default > none + 300 * 299 / 2 * 4, "{none} bytes, and {default} with every candidate");
}

#[test]
fn a_setting_out_of_range_is_named_briefly() {
    for (alpha, text) in
        [(1e308, "1e308"), (-1e-320, "-1e-320"), (0.0, "0"), (f64::NAN, "NaN"), (1e5, "100000")]
    {
        let refused = LossSettings { alpha, ..LossSettings::default() }.validate().unwrap_err();
        assert_eq!(refused.to_string(), format!("alpha = {text} is out of range: above 0, at most 10000"));
    }
}

#[test]
fn permuting_the_batch_permutes_the_gradient() {
    let (rows, labels) =
        draw(Draw { rows: 170, dim: 40, classes: 30, noise: 1.5, ignored: 6, duplicates: 0 }, 5);
    // 170 and 63 share no factor, so this visits every row.
    let order: Vec<usize> = (0..170).map(|i| i * 63 % 170).collect();
    let permuted = rows.select(Axis(0), &order);
    let permuted_labels: Vec<i64> = order.iter().map(|&i| labels[i]).collect();
    let evaluate = |rows: &Array2<f32>, labels: &[i64]| {
        let mut output = LossOutput::default();
        let batch = Batch::square(rows.view(), labels);
        CpuBackend::new().loss(&batch, &LossSettings::default(), &mut output).unwrap();
        output
    };
    let (plain, moved) = (evaluate(&rows, &labels), evaluate(&permuted, &permuted_labels));
    assert!(plain.loss > 0.0);
    assert!((plain.loss - moved.loss).abs() < 1e-6 * plain.loss);
    let wanted = plain.gradient.select(Axis(0), &order);
    let scale = wanted.iter().fold(0.0f32, |scale, x| scale.max(x.abs()));
    for (got, wanted) in moved.gradient.iter().zip(&wanted) {
        assert!((got - wanted).abs() < 1e-5 * scale, "{got} {wanted}");
    }
}

#[test]
fn a_bad_row_is_named() {
    let (mut rows, labels) =
        draw(Draw { rows: 20, dim: 8, classes: 4, noise: 1.5, ignored: 0, duplicates: 0 }, 1);
    let mut backend = CpuBackend::new();
    let mut output = LossOutput::default();
    let settings = LossSettings::default();
    rows[[13, 2]] = f32::NAN;
    let error = backend.loss(&Batch::square(rows.view(), &labels), &settings, &mut output).unwrap_err();
    assert!(matches!(error, Error::NotFinite { rows: "anchors", row: 13 }), "{error}");
    rows.row_mut(13).fill(0.5);
    let error = backend.loss(&Batch::square(rows.view(), &labels), &settings, &mut output).unwrap_err();
    assert!(matches!(error, Error::NotUnit { row: 13, .. }), "{error}");
    // Unchecked rows may give any loss, but no panic.
    rows[[13, 2]] = f32::NAN;
    backend.loss(&Batch::square(rows.view(), &labels).trusted(), &settings, &mut output).unwrap();
}

#[test]
fn threshold_gradient_without_its_loss_is_an_error() {
    let (rows, labels) =
        draw(Draw { rows: 20, dim: 8, classes: 4, noise: 1.5, ignored: 0, duplicates: 0 }, 1);
    let batch = Batch::square(rows.view(), &labels);
    let mut backend = CpuBackend::new();
    let direction = tangent(20, 8, 1);
    assert!(matches!(backend.threshold_gradient(&batch, direction.view(), None), Err(Error::OutOfOrder(_))));
    backend.loss(&batch, &LossSettings::default(), &mut LossOutput::default()).unwrap();
    let other = tangent(19, 8, 1);
    assert!(matches!(
        backend.threshold_gradient(&batch, other.view(), None),
        Err(Error::LengthMismatch { .. })
    ));
    assert!(backend.threshold_gradient(&batch, direction.view(), None).is_ok());
    let reversed: Vec<i64> = labels.iter().rev().copied().collect();
    let relabelled = Batch::square(rows.view(), &reversed);
    assert!(matches!(
        backend.threshold_gradient(&relabelled, direction.view(), None),
        Err(Error::OutOfOrder(_))
    ));
    cases::check_what_is_remembered(&mut CpuBackend::new());
}

#[test]
fn an_output_that_is_used_again_is_refilled() {
    cases::check_outputs_are_refilled(&mut CpuBackend::new());
}

#[test]
fn queries_of_another_dimension_than_the_gallery_are_refused() {
    let (rows, wide) = (Array2::from_elem((2, 1), 1.0f32), Array2::from_elem((3, 4), 0.5f32));
    let (queries, gallery) = (Rows::new(rows.view(), &[0, 0]), Rows::new(wide.view(), &[0, 0, 0]));
    for (queries, gallery) in [(&queries, &gallery), (&gallery, &queries)] {
        let refused = CpuBackend::new().nearest(queries, Some(gallery), 1);
        assert!(matches!(refused, Err(Error::LengthMismatch { .. })), "{refused:?}");
    }
}

#[test]
fn nearest_agrees_with_a_full_sort() {
    for k in [1, 8, 100, 500] {
        check_nearest((190, 333, 24), k);
    }
    // Several groups of queries, the last one short, and candidate lists that are cut many times.
    check_nearest((1_703, 2_005, 7), 20);
}

/// Compares a search among the queries and one in a separate gallery with a full sort of all similarities.
fn check_nearest((count, against, dim): (usize, usize, usize), k: usize) {
    let how = Draw { rows: count, dim, classes: 30, noise: 2.0, ignored: 9, duplicates: 7 };
    let (queries, labels) = draw(how, 1);
    let (references, reference_labels) = draw(Draw { rows: against, ..how }, 2);
    let queries_rows = Rows::new(queries.view(), &labels);
    let references_rows = Rows::new(references.view(), &reference_labels);
    for itself in [false, true] {
        let others = if itself { &queries } else { &references };
        let found =
            CpuBackend::new().nearest(&queries_rows, (!itself).then_some(&references_rows), k).unwrap();
        let s = queries.mapv(f64::from).dot(&others.mapv(f64::from).t());
        for i in 0..queries.nrows() {
            let mut wanted: Vec<usize> = (0..others.nrows()).filter(|&j| !(itself && i == j)).collect();
            wanted.sort_by(|&a, &b| s[[i, b]].total_cmp(&s[[i, a]]));
            for (rank, &j) in wanted.iter().take(k).enumerate() {
                // Near ties may swap; the similarity at each rank may not change.
                assert!((f64::from(found.similarities[[i, rank]]) - s[[i, j]]).abs() < 1e-6);
                let index = found.indices[[i, rank]] as usize;
                assert!((s[[i, index]] - s[[i, j]]).abs() < 1e-6 && !(itself && index == i));
            }
            for rank in wanted.len()..k {
                assert_eq!(found.indices[[i, rank]], ddtas::backend::Nearest::NONE);
                assert_eq!(found.similarities[[i, rank]], f32::NEG_INFINITY);
            }
        }
    }
}

#[test]
fn a_search_leaves_the_pairs_of_the_last_loss_in_memory() {
    let (rows, labels) =
        draw(Draw { rows: 60, dim: 16, classes: 9, noise: 1.5, ignored: 0, duplicates: 0 }, 3);
    let batch = Batch::square(rows.view(), &labels);
    let direction = tangent(60, 16, 2);
    let mut backend = CpuBackend::new();
    backend.loss(&batch, &LossSettings::default(), &mut LossOutput::default()).unwrap();
    let before = backend.threshold_gradient(&batch, direction.view(), None).unwrap();
    backend.nearest(&batch.anchors, None, 3).unwrap();
    assert_eq!(backend.threshold_gradient(&batch, direction.view(), None).unwrap(), before);
}

#[test]
fn equal_similarities_are_ordered_by_index() {
    let rows = Array2::from_shape_fn((300, 2), |(_, d)| if d == 0 { 1.0 } else { 0.0 });
    let labels = vec![0; 300];
    let found = CpuBackend::new().nearest(&Rows::new(rows.view(), &labels), None, 3).unwrap();
    assert_eq!(found.indices.row(0).to_vec(), [1, 2, 3]);
    assert_eq!(found.indices.row(299).to_vec(), [0, 1, 2]);
}

#[test]
fn a_planted_fault_fails_the_comparison() {
    let (rows, labels) =
        draw(Draw { rows: 80, dim: 32, classes: 16, noise: 1.5, ignored: 0, duplicates: 0 }, 2);
    let batch = Batch::square(rows.view(), &labels);
    let settings = LossSettings::default();
    let direction = tangent(80, 32, 9);
    let expected = Expected::evaluate(&batch, &settings, &direction, None).unwrap();
    let mut backend = CpuBackend::new();
    let mut output = LossOutput::default();
    backend.loss(&batch, &settings, &mut output).unwrap();
    let sums = backend.threshold_gradient(&batch, direction.view(), None).unwrap();
    let passes = |output: &LossOutput, sums| Report::new(&expected, output, sums).passes(SINGLE_PRECISION);
    assert!(passes(&output, sums));

    let largest = output.gradient.iter().fold(0.0f32, |scale, x| scale.max(x.abs()));
    let faults: [fn(&mut LossOutput, f32); 7] = [
        |output, _| output.loss *= 1.0001,
        |output, largest| output.gradient[[41, 3]] += 1e-4 * largest,
        |output, _| output.gradient[[0, 0]] = f32::NAN,
        |output, _| output.count_neg[7] += 1,
        |output, _| output.probe_neg -= 1,
        |output, _| output.max_neg[3] += 1e-3,
        |output, _| output.dloss_dlambda_neg *= 1.01,
    ];
    for (number, fault) in faults.iter().enumerate() {
        let mut broken = output.clone();
        fault(&mut broken, largest);
        assert!(!passes(&broken, sums), "fault {number} went unnoticed");
    }
    let mut wrong = sums;
    wrong.pos *= 1.01;
    wrong.neg *= 1.01;
    assert!(!passes(&output, wrong));
}

#[test]
fn without_positives_or_negatives_nothing_is_adapted_and_the_loss_is_zero() {
    let (rows, _) = draw(Draw { rows: 30, dim: 16, classes: 3, noise: 1.5, ignored: 0, duplicates: 0 }, 2);
    let mut backend = CpuBackend::new();
    let mut output = LossOutput::default();
    for labels in [vec![4; 30], (0..30).collect::<Vec<i64>>(), vec![-1; 30]] {
        let batch = Batch::square(rows.view(), &labels);
        backend.loss(&batch, &LossSettings::default(), &mut output).unwrap();
        assert_eq!((output.loss, output.active), (0.0, 0));
        assert!(output.gradient.iter().all(|x| *x == 0.0));
        assert_eq!(output.gamma_pos, 0.1);
        let truth = reference(&batch, &LossSettings::default()).unwrap();
        assert_eq!(output.total_pos, truth.selection.total_pos);
    }
}
