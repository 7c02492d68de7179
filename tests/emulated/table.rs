//! The table of cases and the golden ones, in every form; and random batches against the truth.

use ddtas::backend::Backend;
use ddtas::backend::device::{DeviceBackend, Options};
use ddtas::backend::emulated::{self, EmulatedDevice};
use ddtas::loss::{Batch, ElementType, LossOutput, LossSettings, Mining, Rows};
use ddtas_cases::random::{Draw, compare, draw};
use ddtas_cases::{self as cases, Case, SINGLE_PRECISION, parts};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{device, golden_case, loss_bits, loss_of, parts_on};

#[test]
fn golden_cases_agree() {
    for hopper in [false, true] {
        cases::run_all(&mut DeviceBackend::new(device(1, hopper), Options::default()), cases::golden());
    }
}

#[test]
fn every_type_and_form_agrees() {
    cases::run_all(&mut *emulated::open(Options::default(), 2), cases::generated());
}

#[test]
fn every_type_and_form_agrees_on_hopper_s_kernels() {
    let mut backend = DeviceBackend::new(EmulatedDevice::new(14).as_hopper(), Options::default());
    cases::run_all(&mut backend, cases::generated());
}

/// Loss of a case on Hopper's kernels, with this many bytes for candidates.
fn on_hopper(seed: u64, case: &Case, budget: usize) -> LossOutput {
    let options = Options { budget: Some(budget), ..Options::default() };
    loss_of(&mut DeviceBackend::new(device(seed, true), options), case).0
}

/// Each case agrees with the truth, and gives the same bits with all, no and some tiles stored.
fn agree_on_hopper_stored_or_not(first_seed: u64, cases: impl Iterator<Item = Case>) {
    for (seed, case) in (first_seed..).zip(cases) {
        let options = Options { budget: Some(1 << 30), ..Options::default() };
        cases::run_all(&mut DeviceBackend::new(device(seed, true), options), [&case]);
        let answer = |budget| loss_bits(&on_hopper(seed, &case, budget));
        let stored = answer(1 << 30);
        assert!(stored == answer(0), "{}", case.name);
        assert!(stored == answer(30_000), "{}", case.name);
    }
}

#[test]
fn every_square_width_agrees_on_hopper_s_kernels_stored_or_not() {
    agree_on_hopper_stored_or_not(40, cases::widths().into_iter().filter(|case| case.references.is_none()));
}

#[test]
fn every_rectangular_width_agrees_on_hopper_s_kernels_stored_or_not() {
    agree_on_hopper_stored_or_not(60, cases::widths().into_iter().filter(|case| case.references.is_some()));
}

#[test]
fn sixteen_bit_rows_agree_on_hopper_s_kernels_when_nothing_is_stored() {
    let options = Options { budget: Some(0), ..Options::default() };
    let narrow = cases::generated().into_iter().filter(|case| case.dtype() != ElementType::F32);
    cases::run_all(&mut DeviceBackend::new(device(16, true), options), narrow);
}

#[test]
fn lists_of_wide_rows_agree_on_hopper_s_kernels() {
    let case = cases::sparse(ElementType::Bf16);
    for budget in [None, Some(0)] {
        let options = Options { budget, ..Options::default() };
        cases::run_all(&mut DeviceBackend::new(device(17, true), options), [&case]);
    }
    // Lists add in another order than tiles; all else has the same bits.
    let (mut lists, mut tiles) = (on_hopper(17, &case, 1 << 30), on_hopper(17, &case, 0));
    assert!(lists.gradient != tiles.gradient, "the gradient does not go by lists");
    (lists.gradient, tiles.gradient) = Default::default();
    assert!(loss_bits(&lists) == loss_bits(&tiles));
}

#[test]
fn golden_cases_in_16_bits_agree_on_hopper_s_kernels() {
    let mut backend = DeviceBackend::new(EmulatedDevice::new(15).as_hopper(), Options::default());
    cases::run_all(&mut backend, cases::golden_in(ElementType::F16));
}

#[test]
fn the_table_of_cases_agrees_in_parts() {
    parts::run_all(parts_on(60, false, true), cases::generated());
    parts::check_memory(parts_on(65, false, true));
}

#[test]
fn the_table_of_cases_agrees_in_parts_on_hopper_s_kernels() {
    // Of f32 only some cases: parts do not change how its products are computed.
    let some = |case: &Case| case.dtype() != ElementType::F32 || case.name.contains("everything_mined");
    parts::run_all(parts_on(70, true, true), cases::generated().into_iter().filter(some));
}

#[test]
fn identity_by_index_agrees() {
    parts::check_identity(&mut *emulated::open(Options::default(), 80));
    parts::check_identity(&mut *emulated::open(Options { budget: Some(0), ..Options::default() }, 81));
}

#[test]
fn golden_cases_agree_when_nothing_is_stored() {
    let options = Options { budget: Some(0), ..Options::default() };
    cases::run_all(&mut *emulated::open(options, 3), cases::golden());
}

#[test]
fn every_type_and_form_agrees_when_few_tiles_fit() {
    // Room for 7,500 candidates: those of the tiles that come first.
    let options = Options { budget: Some(60_000), ..Options::default() };
    cases::run_all(&mut *emulated::open(options, 4), cases::generated());
}

#[test]
fn small_batches_split_among_many_blocks_agree() {
    let device = EmulatedDevice::new(8).with_multiprocessors(64);
    let mut backend = DeviceBackend::new(device, Options::default());
    cases::run_all(&mut backend, [golden_case("odd_sizes_257x130")]);
}

/// 24 anchors against 47 tiles of references: so many splits that several blocks add up their gradients.
#[test]
fn parts_of_many_splits_are_added_in_two_steps() {
    let how = Draw { rows: 24, dim: 20, classes: 40, noise: 1.0, ignored: 0, duplicates: 0 };
    let few = LossSettings { mining: Mining::Asms, gamma: 0.02, ..LossSettings::default() };
    let all = LossSettings { mining: Mining::None, ..LossSettings::default() };
    for (settings, hopper) in [(few, true), (all, true), (few, false), (all, false)] {
        let agrees = |seed: u64| {
            let (anchors, labels) = draw(how, seed);
            let (references, reference_labels) = draw(Draw { rows: 6_000, ..how }, seed ^ 1);
            let other = Rows::new(references.view(), &reference_labels);
            let batch = Batch::rectangular(Rows::new(anchors.view(), &labels), other);
            let mut backend =
                DeviceBackend::new(device(seed, hopper).with_multiprocessors(64), Options::default());
            let report = compare(&mut backend, &batch, &settings, seed)?;
            assert!(report.wrong_counts.is_empty() && report.gradient <= SINGLE_PRECISION, "{report:#?}");
            let gradient = |schedule: u64| {
                let device = device(schedule, hopper).with_multiprocessors(64);
                let mut output = LossOutput::default();
                DeviceBackend::new(device, Options::default()).loss(&batch, &settings, &mut output).unwrap();
                output.gradient
            };
            assert_eq!(gradient(1), gradient(2));
            Some(())
        };
        (0..1_000).find_map(agrees).expect("a batch that is clear of the thresholds");
    }
}

#[test]
fn weights_far_below_any_bound_keep_their_digits() {
    // Similarities far from their lambdas give terms of e^-20 and less: scaled by its largest possible value,
    // a weight would underflow f16.
    let Case { name, settings, anchors, .. } =
        cases::generated_case("everything_mined_140x330", ElementType::F32);
    let settings = LossSettings { alpha: 12.0, beta: 12.0, lambda_pos: -2.0, lambda_neg: 2.0, ..settings };
    let case = Case::new(name, settings, anchors, None).expect("a valid batch");
    for (hopper, budget, seed) in [(false, 1 << 30, 50), (false, 0, 51), (true, 1 << 30, 52), (true, 0, 53)] {
        let options = Options { budget: Some(budget), ..Options::default() };
        cases::run_all(&mut DeviceBackend::new(device(seed, hopper), options), [&case]);
    }
}

/// Compares a batch of f32 rows with the truth; `seed` draws shape, settings, device and budget.
/// Returns false if a pair lies too near a threshold.
fn random_batch_agrees(seed: u64) -> bool {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut one_of = |choices: &[usize]| choices[rng.random_range(0..choices.len())];
    let how = Draw {
        rows: one_of(&[1, 2, 17, 80, 128, 129, 200, 257, 330]),
        dim: one_of(&[1, 3, 32, 40, 64, 65, 130, 200]),
        classes: one_of(&[1, 2, 12, 40, 300]),
        noise: one_of(&[5, 10, 20, 40]) as f32 / 10.0,
        ignored: one_of(&[0, 3, 10]),
        duplicates: one_of(&[0, 0, 4]),
    };
    let settings = LossSettings {
        mining: [Mining::None, Mining::Symmetric, Mining::Asms, Mining::AtAsms][one_of(&[0, 1, 2, 3])],
        gamma: one_of(&[2, 10, 40]) as f64 / 100.0,
        ..LossSettings::default().with_lambda(one_of(&[20, 40, 70, 90]) as f64 / 100.0)
    };
    let against = one_of(&[0, 0, 1, 90, 260]);
    let (hopper, budget) = (one_of(&[0, 1, 1]) == 1, one_of(&[0, 3_000, 30_000, 1 << 30]));
    let (anchors, labels) = draw(how, seed);
    let (references, reference_labels) = draw(Draw { rows: against.max(1), ..how }, seed ^ 1);
    let (own, other) = (Rows::new(anchors.view(), &labels), Rows::new(references.view(), &reference_labels));
    let batch = match against {
        0 => Batch::square(anchors.view(), &labels),
        _ => Batch::rectangular(own, other).with_reference_gradient(),
    };
    let mut backend =
        DeviceBackend::new(device(seed, hopper), Options { budget: Some(budget), ..Options::default() });
    let report = compare(&mut backend, &batch, &settings, seed);
    if let Some(report) = &report {
        let on = format!("against {against}, hopper {hopper}, budget {budget}");
        // Without `slopes`: where every sigmoid is tiny, slopes are sums of few fixed-point digits.
        let error = [report.loss, report.gradient, report.thresholds, report.sums];
        let agrees = report.wrong_counts.is_empty() && error.iter().all(|&error| error <= SINGLE_PRECISION);
        assert!(agrees, "seed {seed}: {how:?}, {settings:?}, {on}: {report:#?}");
    }
    report.is_some()
}

#[test]
fn random_batches_agree_with_the_truth() {
    // The same in every run; `.ci/random.sh` draws others.
    let given =
        |name: &str, usual: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual);
    let (first, count) = (given("DDTAS_RANDOM_SEED", 1), given("DDTAS_RANDOM_CASES", 40));
    let compared = (first..first + count).filter(|&seed| random_batch_agrees(seed)).count();
    assert!(compared * 2 > count as usize, "{compared} of {count} batches were clear of the thresholds");
}
