//! Results must be the same bits under other schedules, calls and kernels, and with tiles stored or not.

use ddtas::backend::Backend;
use ddtas::backend::device::{DeviceBackend, Options};
use ddtas::backend::emulated::{self, EmulatedDevice};
use ddtas::loss::{Batch, ElementType, Embeddings, LossOutput, LossSettings};
use ddtas_cases::{self as cases, Case};
use ndarray::s;

use super::{answers, bits, device, golden_case, random_rows};

#[test]
fn schedules_do_not_change_a_bit() {
    // With a small budget the schedule decides which tiles are stored; nothing else may depend on it.
    for (name, budget) in
        [("odd_sizes_257x130", 1 << 30), ("odd_sizes_257x130", 40_000), ("hard_many_mined", 60_000)]
    {
        let case = golden_case(name);
        let options = Options { budget: Some(budget), ..Options::default() };
        let first = answers(&mut *emulated::open(options, 10), &case);
        for seed in 11..15 {
            let other = answers(&mut *emulated::open(options, seed), &case);
            assert!(bits(&first) == bits(&other), "{name}, budget {budget}, seed {seed}");
            assert_eq!(first.1, other.1, "{name}, budget {budget}, seed {seed}");
        }
    }
}

#[test]
fn lists_do_not_depend_on_the_budget() {
    // 128 rows in near pairs, which point away from all others and so have few candidates; of 1,000 others most pairs are.
    let (near, all) = (128, 1128);
    let mut rows = random_rows(all, 8, 25);
    for i in 0..all {
        if i < near && i % 2 == 1 {
            let pair = rows.row(i - 1).to_owned();
            rows.row_mut(i).assign(&pair);
            rows[[i, 1]] += 0.01;
        } else {
            rows[[i, 0]] += if i < near { -0.8 } else { 1.5 };
        }
        let norm = rows.row(i).dot(&rows.row(i)).sqrt();
        rows.row_mut(i).mapv_inplace(|entry| entry / norm);
    }
    let labels: Vec<i64> =
        (0..all as i64).map(|row| if row < 128 { row / 2 } else { 64 + row / 5 }).collect();
    // 2 MiB hold all candidates of 256 rows, and nearly half of those of 1,128.
    for (count, some_lists) in [(256, true), (all, false)] {
        let batch = Batch::square(Embeddings::F32(rows.slice(s![..count, ..])), &labels[..count]);
        let answer = |budget: usize| {
            let options = Options { budget: Some(budget), ..Options::default() };
            let mut backend = DeviceBackend::new(EmulatedDevice::new(24), options);
            let mut output = LossOutput::default();
            backend.loss(&batch, &LossSettings::default(), &mut output).unwrap();
            assert!(output.active > 0);
            let (_, by_tiles) = backend.terms_of_last_loss().unwrap();
            assert_eq!(by_tiles.contains(&false), some_lists, "{count} rows, budget {budget}");
            output.gradient.mapv(f32::to_bits)
        };
        assert_eq!(answer(1 << 30), answer(2 << 20), "{count} rows");
    }
}

#[test]
fn a_sweep_of_several_runs_a_block_leaves_no_tile_out() {
    // 78 tiles on one multiprocessor: two runs of at most 64.
    let rows = random_rows(1500, 8, 5).mapv(half::bf16::from_f32);
    let labels: Vec<i64> = (0..1500).map(|row| row / 4).collect();
    let batch = Batch::square(Embeddings::Bf16(rows.view()), &labels).trusted();
    let loss = |device: EmulatedDevice| {
        let mut output = LossOutput::default();
        DeviceBackend::new(device, Options::default())
            .loss(&batch, &LossSettings::default(), &mut output)
            .unwrap();
        output
    };
    let (one, other) =
        (loss(EmulatedDevice::new(22).with_multiprocessors(1).as_hopper()), loss(EmulatedDevice::new(23)));
    assert!(one.active > 1000);
    assert_eq!(
        (one.max_neg, one.count_neg, one.probe_neg),
        (other.max_neg, other.count_neg, other.probe_neg)
    );
}

#[test]
fn a_second_call_in_the_same_workspace_gives_the_same_bits() {
    let mut backend = emulated::open(Options::default(), 5);
    let (large, small) = (golden_case("ragged_singletons"), golden_case("duplicate_image"));
    let first = bits(&answers(&mut *backend, &small));
    answers(&mut *backend, &large);
    assert!(first == bits(&answers(&mut *backend, &small)));
}

#[test]
fn stored_and_recomputed_tiles_give_the_same_bits() {
    // Dense enough that the gradient goes by tiles, stored or not; diagonal tiles are recomputed too.
    let case = golden_case("hard_many_mined");
    let full = answers(&mut *emulated::open(Options::default(), 6), &case);
    let options = Options { budget: Some(0), ..Options::default() };
    let none = answers(&mut *emulated::open(options, 7), &case);
    assert!(bits(&full) == bits(&none));
    assert_eq!(full.1, none.1);
}

/// A generated case with bf16 rows.
fn narrow_case(name: &str) -> Case {
    cases::generated_case(name, ElementType::Bf16)
}

/// Runs every kernel that takes rows of `dtype`, with and without Hopper's, f32 rows also rounded.
/// ThreadSanitizer is run on these tests.
fn run_every_kernel(dtype: ElementType) {
    // `dense`: the gradient by tiles, stored and recomputed. `sparse`: by lists.
    let dense = cases::generated_case("rectangular_everything_mined", dtype);
    let sparse = cases::golden_in(dtype).into_iter().find(|case| case.name == "easy_few_mined");
    let sparse = sparse.expect("the case is clear of the thresholds in every type");
    for hopper in [false, true] {
        let answer = |case: &Case, budget: usize| {
            let options = Options { budget: Some(budget), ..Options::default() };
            answers(&mut DeviceBackend::new(device(20, hopper), options), case)
        };
        if dtype == ElementType::F32 {
            // Rounded f32 rows are f16 once prepared: one case suffices.
            let options = Options { tf32: true, ..Options::default() };
            answers(&mut DeviceBackend::new(device(20, hopper), options), &sparse);
        }
        let stored = answer(&dense, 1 << 30);
        assert!(bits(&stored) == bits(&answer(&dense, 0)), "{dtype:?}, hopper {hopper}");
        let (few, _, _) = answer(&sparse, 1 << 30);
        assert!(few.active > 0 && few.mined().1 < stored.0.mined().1, "{dtype:?}: {:?}", few.mined());
    }
}

#[test]
fn every_kernel_of_f32_gives_the_same_bits_stored_or_not() {
    run_every_kernel(ElementType::F32);
}

#[test]
fn every_kernel_of_f16_gives_the_same_bits_stored_or_not() {
    run_every_kernel(ElementType::F16);
}

#[test]
fn every_kernel_of_bf16_gives_the_same_bits_stored_or_not() {
    run_every_kernel(ElementType::Bf16);
}

#[test]
fn hopper_s_kernels_sum_in_the_order_of_the_others() {
    // The emulated products of a warp and of a warpgroup round alike, so the same order gives the same bits.
    // All cases go by tiles: the order of lists is that of the sweep's threads, which differ.
    for (name, budget) in [
        ("everything_mined_140x330", 1 << 30),
        ("odd_sizes_257x130", 0),
        ("rectangular_everything_mined", 1 << 30),
    ] {
        let case = narrow_case(name);
        let options = Options { budget: Some(budget), ..Options::default() };
        let mut hopper = DeviceBackend::new(EmulatedDevice::new(16).as_hopper(), options);
        let mut other = DeviceBackend::new(EmulatedDevice::new(17), options);
        assert!(bits(&answers(&mut hopper, &case)) == bits(&answers(&mut other, &case)), "{name}");
    }
}

#[test]
fn hopper_s_stored_and_recomputed_tiles_give_the_same_bits() {
    let case = narrow_case("everything_mined_140x330");
    let answer = |budget, seed| {
        let options = Options { budget: Some(budget), ..Options::default() };
        answers(&mut DeviceBackend::new(EmulatedDevice::new(seed).as_hopper(), options), &case)
    };
    let (stored, none) = (answer(1 << 30, 18), answer(0, 19));
    assert!(bits(&stored) == bits(&none));
    assert_eq!(stored.1, none.1);
}
