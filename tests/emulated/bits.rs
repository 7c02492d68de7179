//! Results must be the same bits under other schedules, calls and kernels, and with tiles stored or not.

use ddtas::backend::Backend;
use ddtas::backend::device::{DeviceBackend, Options};
use ddtas::backend::emulated::{self, EmulatedDevice};
use ddtas::loss::{Batch, ElementType, Embeddings, LossOutput, LossSettings};
use ddtas_cases::{self as cases, Case};
use ndarray::{Array2, s};

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

/// Rows in pairs that are near each other, of which none is near another pair: few candidates.
fn near_pairs(count: usize) -> Array2<f32> {
    let mut rows = random_rows(count, 8, 25);
    for i in (1..count).step_by(2) {
        let pair = rows.row(i - 1).to_owned();
        rows.row_mut(i).assign(&pair);
        rows[[i, 1]] += 0.2;
    }
    rows
}

/// The bits of a loss's gradient, and whether any row tile went by lists.
fn lists_under(budget: usize, mut rows: Array2<f32>, labels: &[i64]) -> (Array2<u32>, bool) {
    for mut row in rows.outer_iter_mut() {
        let norm = row.dot(&row).sqrt();
        row /= norm;
    }
    let options = Options { budget: Some(budget), ..Options::default() };
    let mut backend = DeviceBackend::new(EmulatedDevice::new(24), options);
    let mut output = LossOutput::default();
    backend.loss(&Batch::square(rows.view(), labels), &LossSettings::default(), &mut output).unwrap();
    assert!(output.active > 0);
    let (_, by_tiles) = backend.terms_of_last_loss().unwrap();
    (output.gradient.mapv(f32::to_bits), by_tiles.contains(&false))
}

#[test]
fn lists_do_not_depend_on_the_budget() {
    // 276 tiles, of which a sixteenth of the largest pool is 276 * 8 KiB.
    let (rows, labels) = (near_pairs(2900), (0..2900).map(|row| row / 2).collect::<Vec<i64>>());
    let (large, least) =
        (lists_under(1 << 30, rows.clone(), &labels), lists_under(276 << 13, rows.clone(), &labels));
    assert!(large.1 && large == least);
    assert!(!lists_under((276 << 13) - 32, rows, &labels).1);
}

#[test]
fn a_pool_that_holds_everything_gives_the_bits_of_one_that_does_not() {
    // 128 rows in near pairs, which point away from all others; of 1,000 others most pairs are candidates. 2 MiB, which would
    // be enough for lists, hold nearly half of those.
    let mut rows = random_rows(1128, 8, 26);
    rows.slice_mut(s![..128, ..]).assign(&near_pairs(128));
    for (i, mut row) in rows.outer_iter_mut().enumerate() {
        row[0] += if i < 128 { -0.8 } else { 1.5 };
    }
    let labels: Vec<i64> = (0..1128).map(|row| if row < 128 { row / 2 } else { 64 + row / 5 }).collect();
    let (large, least) = (lists_under(1 << 30, rows.clone(), &labels), lists_under(2 << 20, rows, &labels));
    assert!(!large.1 && large == least);
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
