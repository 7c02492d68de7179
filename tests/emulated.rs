//! The CUDA kernels, executed on the CPU: the whole table of cases, and what only the emulation shows.
//!
//! With sanitizers, whose runtime must be loaded first:
//! `export DDTAS_SANITIZE=address,undefined ASAN_OPTIONS=detect_leaks=0`,
//! `export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="env LD_PRELOAD=$(g++ -print-file-name=libasan.so)"`,
//! `cargo test --release -p ddtas --features emulated --test emulated`.
//! ThreadSanitizer likewise: `DDTAS_SANITIZE=thread`, libtsan.so, and
//! `TSAN_OPTIONS="halt_on_error=1 exitcode=66 ignore_interceptors_accesses=1"` (kernels/emulation/races.h). All
//! tests take a quarter of an hour there; `every_kernel` runs each kernel in half a minute.

use ddtas::backend::device::{DeviceBackend, Options};
use ddtas::backend::emulated::{self, EmulatedDevice};
use ddtas::backend::{Backend, Nearest};
use ddtas::loss::{Batch, Hypergradient, LossOutput, LossSettings, Mining, Rows, UnitCheck, reference};
use ddtas_cases::random::{Draw, compare, draw};
use ddtas_cases::{self as cases, Case, Dtype, SINGLE_PRECISION, parts};
use ndarray::Array2;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// An emulated GPU, perhaps Hopper.
fn device(seed: u64, hopper: bool) -> EmulatedDevice {
    let device = EmulatedDevice::new(seed);
    if hopper { device.as_hopper() } else { device }
}

fn golden_case(name: &str) -> Case {
    cases::golden().into_iter().find(|case| case.name == name).expect("the case is in tests/golden")
}

/// Loss and hyper-gradient of a case.
fn loss_of(backend: &mut dyn Backend, case: &Case) -> (LossOutput, Hypergradient) {
    let mut output = LossOutput::default();
    backend.loss(&case.batch(), &case.settings, &mut output).expect("the case is valid");
    let reference_tangent = case.references.as_ref().map(|side| side.tangent.view());
    let hyper = backend.hypergradient(&case.batch(), case.anchors.tangent.view(), reference_tangent);
    (output, hyper.expect("the case is valid"))
}

/// Everything a backend says of a case.
fn answers(backend: &mut dyn Backend, case: &Case) -> (LossOutput, Hypergradient, Nearest) {
    let (output, hyper) = loss_of(backend, case);
    let batch = case.batch();
    let nearest = backend.nearest(&batch.anchors, batch.references.as_ref(), 3).expect("the case is valid");
    (output, hyper, nearest)
}

/// The bits of a loss, so that NaN equals NaN.
fn loss_bits(output: &LossOutput) -> Vec<u64> {
    let mut bits: Vec<u64> = [
        output.loss,
        output.gamma_pos,
        output.gamma_neg,
        output.dloss_dlambda_pos,
        output.dloss_dlambda_neg,
        output.mean_pos,
        output.mean_neg,
    ]
    .map(f64::to_bits)
    .into();
    bits.extend([output.probe_neg, output.total_pos, output.active]);
    bits.extend(output.count_pos.iter().chain(&output.count_neg).map(|&n| u64::from(n)));
    let gradients = output.gradient.iter().chain(output.reference_gradient.iter().flatten());
    let floats = gradients.chain(&output.min_pos).chain(&output.max_neg);
    bits.extend(floats.map(|value| u64::from(value.to_bits())));
    bits
}

/// The bits of a loss and of neighbours.
fn bits((output, _, nearest): &(LossOutput, Hypergradient, Nearest)) -> Vec<u64> {
    let mut bits = loss_bits(output);
    bits.extend(nearest.indices.iter().map(|&n| u64::from(n)));
    bits.extend(nearest.similarities.iter().map(|value| u64::from(value.to_bits())));
    bits
}

#[test]
fn golden_cases_agree() {
    cases::run_all(&mut *emulated::open(Options::default(), 1), cases::golden());
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

/// Case by case: all stored; nothing; tiles of few candidates.
fn agree_on_hopper_stored_or_not(first_seed: u64, cases: impl Iterator<Item = Case>) {
    for (seed, case) in (first_seed..).zip(cases) {
        let backend = |budget| {
            let device = EmulatedDevice::new(seed).as_hopper();
            DeviceBackend::new(device, Options { budget, ..Options::default() })
        };
        cases::run_all(&mut backend(1 << 30), [&case]);
        let answer = |budget| loss_bits(&loss_of(&mut backend(budget), &case).0);
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
fn golden_cases_in_16_bits_agree_on_hopper_s_kernels() {
    let mut backend = DeviceBackend::new(EmulatedDevice::new(15).as_hopper(), Options::default());
    cases::run_all(&mut backend, cases::golden_in(Dtype::F16));
}

/// A backend for each part of a batch; `hopper`: with the kernels of that GPU.
fn parts_on(first_seed: u64, hopper: bool, exact: bool) -> impl FnMut(usize) -> Box<dyn Backend> {
    move |part| {
        // The first part stores nothing.
        let budget = if part == 0 { 0 } else { Options::default().budget };
        Box::new(DeviceBackend::new(device(first_seed + part as u64, hopper), Options { budget, exact }))
    }
}

#[test]
fn the_table_of_cases_agrees_in_parts() {
    parts::run_all(parts_on(60, false, true), cases::generated());
    parts::check_memory(parts_on(65, false, true));
}

#[test]
fn the_table_of_cases_agrees_in_parts_on_hopper_s_kernels() {
    // Of f32 the forms; how it is multiplied is no part's matter.
    let some = |case: &Case| case.dtype() != Dtype::F32 || case.name.contains("everything_mined");
    parts::run_all(parts_on(70, true, true), cases::generated().into_iter().filter(some));
}

#[test]
fn identity_by_index_agrees() {
    parts::check_identity(&mut *emulated::open(Options::default(), 80));
    parts::check_identity(&mut *emulated::open(Options { budget: 0, ..Options::default() }, 81));
}

#[test]
fn golden_cases_agree_when_nothing_is_stored() {
    let options = Options { budget: 0, ..Options::default() };
    cases::run_all(&mut *emulated::open(options, 3), cases::golden());
}

#[test]
fn every_type_and_form_agrees_when_few_tiles_fit() {
    // 7,500 candidates, for whichever tiles come first.
    let options = Options { budget: 60_000, ..Options::default() };
    cases::run_all(&mut *emulated::open(options, 4), cases::generated());
}

#[test]
fn schedules_do_not_change_a_bit() {
    // Whatever fits: which tiles are stored then depends on the schedule, and nothing else does.
    for (name, budget) in
        [("odd_sizes_257x130", 1 << 30), ("odd_sizes_257x130", 40_000), ("hard_many_mined", 60_000)]
    {
        let case = golden_case(name);
        let options = Options { budget, ..Options::default() };
        let first = answers(&mut *emulated::open(options, 10), &case);
        for seed in 11..15 {
            let other = answers(&mut *emulated::open(options, seed), &case);
            assert!(bits(&first) == bits(&other), "{name}, budget {budget}, seed {seed}");
            assert_eq!(first.1, other.1, "{name}, budget {budget}, seed {seed}");
        }
    }
}

#[test]
fn a_sweep_of_several_runs_a_block_leaves_no_tile_out() {
    // 78 tiles on one multiprocessor: two runs of at most 64.
    let rows = random_rows(1500, 8, 5).mapv(half::bf16::from_f32);
    let labels: Vec<i64> = (0..1500).map(|row| row / 4).collect();
    let batch = Batch::square(ddtas::loss::Embeddings::Bf16(rows.view()), &labels).trusted();
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
    // Dense enough for the tile way whatever is stored; the diagonal is recomputed as well.
    let case = golden_case("hard_many_mined");
    let full = answers(&mut *emulated::open(Options::default(), 6), &case);
    let options = Options { budget: 0, ..Options::default() };
    let none = answers(&mut *emulated::open(options, 7), &case);
    assert!(bits(&full) == bits(&none));
    assert_eq!(full.1, none.1);
}

/// A case of 16-bit rows that covers both widths of Hopper's product and tiles on and off the diagonal.
fn narrow_case(name: &str) -> Case {
    cases::generated_case(name, Dtype::Bf16)
}

/// The kernels that these rows are given to, rounded and on Hopper as well: ThreadSanitizer's programme.
fn run_every_kernel(dtype: Dtype) {
    // Tiles, from candidates and recomputed; lists.
    let dense = cases::generated_case("rectangular_everything_mined", dtype);
    let sparse = cases::golden_in(dtype).into_iter().find(|case| case.name == "easy_few_mined");
    let sparse = sparse.expect("the case is clear of the thresholds in every type");
    for hopper in [false, true] {
        let answer = |case: &Case, budget: usize| {
            let options = Options { budget, ..Options::default() };
            answers(&mut DeviceBackend::new(device(20, hopper), options), case)
        };
        if dtype == Dtype::F32 {
            // Rounded, f32 is f16 once it is prepared.
            let options = Options { exact: false, ..Options::default() };
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
    run_every_kernel(Dtype::F32);
}

#[test]
fn every_kernel_of_f16_gives_the_same_bits_stored_or_not() {
    run_every_kernel(Dtype::F16);
}

#[test]
fn every_kernel_of_bf16_gives_the_same_bits_stored_or_not() {
    run_every_kernel(Dtype::Bf16);
}

#[test]
fn hopper_s_kernels_sum_in_the_order_of_the_others() {
    // The emulated products of a warp and of a warpgroup round alike, so equal order is equal bits. All of
    // these are dense enough for the tile way: lists are in the order of the sweep's threads.
    for (name, budget) in [
        ("everything_mined_140x330", 1 << 30),
        ("odd_sizes_257x130", 0),
        ("rectangular_everything_mined", 1 << 30),
    ] {
        let case = narrow_case(name);
        let options = Options { budget, ..Options::default() };
        let mut hopper = DeviceBackend::new(EmulatedDevice::new(16).as_hopper(), options);
        let mut other = DeviceBackend::new(EmulatedDevice::new(17), options);
        assert!(bits(&answers(&mut hopper, &case)) == bits(&answers(&mut other, &case)), "{name}");
    }
}

#[test]
fn rounded_f32_gives_the_bits_of_f16_rows() {
    // Granules whole or not, ignored rows, another side, copies; and every tile mined.
    let names = ["a_tile_and_one", "rectangular_ignored_labels", "duplicates", "everything_mined_140x330"];
    for case in cases::generated_to_round().into_iter().filter(|case| names.contains(&case.name.as_str())) {
        let narrow = case.rounded_to(Dtype::F16).expect("rows of unit length");
        for (hopper, budget) in [(false, 1 << 30), (true, 0)] {
            let answer = |case: &Case, exact| {
                let mut backend = DeviceBackend::new(device(25, hopper), Options { budget, exact });
                let answers = answers(&mut backend, case);
                (bits(&answers), answers.1, backend.device().launched().to_vec())
            };
            let (rounded, given) = (answer(&case, false), answer(&narrow, true));
            let what = format!("{}, hopper {hopper}, budget {budget}", case.name);
            assert!((rounded.0, rounded.1) == (given.0, given.1), "{what}");
            // The same kernels, but for that one.
            let prepared = |name: &&'static str| name.replace("rounded_f32", "f16");
            let kernels: Vec<String> = rounded.2.iter().map(prepared).collect();
            assert_eq!(kernels, given.2, "{what}");
            assert_ne!(rounded.2, given.2, "{what}");
        }
    }
}

#[test]
fn weights_far_below_any_bound_keep_their_digits() {
    // Terms of the loss are e^-20 and less, far from their lambdas: f16 would hold nothing of a weight that is scaled by what
    // it could be at most.
    let Case { name, settings, anchors, .. } = cases::generated_case("everything_mined_140x330", Dtype::F32);
    let settings = LossSettings { alpha: 12.0, beta: 12.0, lambda_pos: -2.0, lambda_neg: 2.0, ..settings };
    let case = Case::new(name, settings, anchors, None).expect("a valid batch");
    for (hopper, budget, seed) in [(false, 1 << 30, 50), (false, 0, 51), (true, 1 << 30, 52), (true, 0, 53)] {
        let options = Options { budget, ..Options::default() };
        cases::run_all(&mut DeviceBackend::new(device(seed, hopper), options), [&case]);
    }
}

#[test]
fn rounded_f32_agrees_on_hopper_s_kernels() {
    let options = Options { exact: false, ..Options::default() };
    let mut backend = DeviceBackend::new(device(26, true), options);
    cases::run_all_tf32(&mut backend, cases::generated_to_round());
}

#[test]
fn rounded_f32_agrees_in_parts_on_hopper_s_kernels() {
    let rounded = |case: Case| {
        let Case { expected, .. } = case.rounded_to(Dtype::F16).expect("rows of unit length");
        Case { expected, ..case }
    };
    parts::run_all(parts_on(85, true, false), cases::generated_to_round().into_iter().map(rounded));
}

#[test]
fn hopper_s_stored_and_recomputed_tiles_give_the_same_bits() {
    let case = narrow_case("everything_mined_140x330");
    let answer = |budget, seed| {
        let options = Options { budget, ..Options::default() };
        answers(&mut DeviceBackend::new(EmulatedDevice::new(seed).as_hopper(), options), &case)
    };
    let (stored, none) = (answer(1 << 30, 18), answer(0, 19));
    assert!(bits(&stored) == bits(&none));
    assert_eq!(stored.1, none.1);
}

/// Rows of 16 entries of about 1/4 with random signs, `jitter` units of the last place off, in classes of two: similarities are
/// multiples of 1/8, or a few units of the last place beside them, and so are the bounds. `unit` is that of 1.
fn rows_at_the_bounds(count: usize, jitter: i32, unit: f32) -> (Array2<f32>, Vec<i64>) {
    let mut state = 7u64;
    let rows = Array2::from_shape_simple_fn((count, 16), || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let off = ((state >> 33) as i32).rem_euclid(2 * jitter + 1) - jitter;
        let value = 0.25 * (1.0 + off as f32 * unit);
        if state >> 63 == 0 { value } else { -value }
    });
    (rows, (0..count as i64).map(|row| row / 2).collect())
}

#[test]
fn similarities_at_the_bounds_count_alike_in_all_passes() {
    // A million pairs.
    const COUNT: usize = 1440;
    let settings = LossSettings { mining: Mining::Symmetric, gamma: 0.25, ..LossSettings::default() };
    // As the bounds of the kernels.
    let above = |value: f32, tolerance: f64| (f64::from(value) + tolerance) as f32;
    for jitter in [0, 3] {
        for (exact, hopper, seed) in
            [(true, false, 30), (true, true, 33), (false, false, 31), (false, true, 32)]
        {
            // Rounding to f16 would leave nothing of units of f32's last place.
            let unit = if exact { f32::EPSILON } else { half::f16::EPSILON.to_f32() };
            let (rows, labels) = rows_at_the_bounds(COUNT, jitter, unit);
            let batch = Batch::square(rows.view(), &labels);
            let answer = |rows: &Array2<f32>, budget| {
                let mut backend = DeviceBackend::new(device(seed, hopper), Options { budget, exact });
                let (mut output, batch) =
                    (LossOutput::default(), Batch::square(rows.view(), &labels).trusted());
                backend.loss(&batch, &settings, &mut output).unwrap();
                let tangent = random_rows(COUNT, 16, 6);
                let hyper = backend.hypergradient(&batch, tangent.view(), None).unwrap();
                (output, hyper)
            };
            let (output, hyper) = answer(&rows, 1 << 30);
            let what = format!("jitter {jitter}, exact {exact}, hopper {hopper}");
            let LossOutput { min_pos, max_neg, count_pos, count_neg, .. } = &output;
            assert!(output.active > 1000, "{what}");
            for row in 0..COUNT {
                let (low, high) = (min_pos[row], max_neg[row]);
                // m+ of a class of two is one similarity, whichever of its rows asks.
                assert_eq!(low.to_bits(), min_pos[row ^ 1].to_bits(), "{what}: row {row}");
                // The same-class pass's similarity, held against the sweep's, is the selection's against it.
                assert_eq!(count_pos[row] == 1, low < above(high, 0.25), "{what}: row {row}");
                assert_eq!(count_neg[row] > 0, high > above(low, -0.25), "{what}: row {row}");
            }
            // Multiples of 1/8 are exact everywhere, and so is f16 of them.
            if jitter == 0 {
                let mut cpu = LossOutput::default();
                ddtas::backend::cpu::CpuBackend::new().loss(&batch, &settings, &mut cpu).unwrap();
                assert!(cpu.count_neg == output.count_neg && cpu.count_pos == output.count_pos, "{what}");
                assert_eq!((cpu.min_pos, cpu.max_neg), (output.min_pos, output.max_neg), "{what}");
                continue;
            }
            // f16's sums have one order on Hopper and elsewhere.
            if !exact && !hopper {
                continue;
            }
            // S_ji in place of S_ij: rows and classes in reverse order.
            let reverse = Array2::from_shape_fn((COUNT, 16), |(row, d)| rows[[COUNT - 1 - row, d]]);
            let (reversed, _) = answer(&reverse, 1 << 30);
            let back = |values: &[u32]| values.iter().rev().copied().collect::<Vec<_>>();
            assert!(
                back(&reversed.count_neg) == *count_neg && back(&reversed.count_pos) == *count_pos,
                "{what}"
            );
            assert!(
                reversed.min_pos.iter().rev().eq(min_pos) && reversed.max_neg.iter().rev().eq(max_neg),
                "{what}"
            );
            // Nothing stored: every pass multiplies anew.
            let (recomputed, same) = answer(&rows, 0);
            assert!(recomputed.count_neg == *count_neg && recomputed.count_pos == *count_pos, "{what}");
            assert_eq!((hyper, output.gradient), (same, recomputed.gradient), "{what}");
        }
    }
}

#[test]
fn rows_of_any_length_agree_with_the_cpu() {
    for (name, scale) in
        [("odd_sizes_257x130", 1.0f32), ("rectangular_ignored_labels", 3.0), ("a_tile_and_one", 1e28)]
    {
        for dtype in Dtype::ALL {
            let case = cases::generated_case(name, dtype);
            // Lengths from 1 to 4, or beyond what f32 squares hold where the type does.
            let scale = if dtype == Dtype::F16 { scale.min(3.0) } else { scale };
            let stretched = |rows: &cases::Matrix| {
                let mut wide = rows.view().to_f64().mapv(|value| value as f32);
                for (i, mut row) in wide.outer_iter_mut().enumerate() {
                    row *= scale * (1 + i % 4) as f32;
                }
                dtype.cast(&wide)
            };
            let anchors = stretched(&case.anchors.rows);
            let references = case.references.as_ref().map(|side| stretched(&side.rows));
            let rows = Rows { embeddings: anchors.view(), labels: &case.anchors.labels };
            let batch = match (&references, &case.references) {
                (Some(others), Some(side)) => {
                    let others = Rows { embeddings: others.view(), labels: &side.labels };
                    Batch::rectangular(rows, others).with_reference_gradient()
                }
                _ => Batch::square(rows.embeddings, rows.labels),
            };
            let mut truth = LossOutput::default();
            let mut cpu = ddtas::backend::cpu::CpuBackend::new();
            cpu.loss_of_any_length(&batch, &case.settings, &mut truth).unwrap();
            for hopper in [false, true] {
                let device = EmulatedDevice::new(33);
                let device = if hopper { device.as_hopper() } else { device };
                let (mut backend, mut output) =
                    (DeviceBackend::new(device, Options::default()), LossOutput::default());
                backend.loss_of_any_length(&batch, &case.settings, &mut output).unwrap();
                let what = format!("{name}, {dtype:?}, hopper {hopper}");
                // Unit rows may differ in the last bit, and 16-bit ones with it.
                let bound = if dtype == Dtype::F32 { 1e-5 } else { 3e-2 };
                assert!((output.loss - truth.loss).abs() <= bound * truth.loss, "{what}");
                let pairs = [(&output.gradient, &truth.gradient)]
                    .into_iter()
                    .chain(output.reference_gradient.as_ref().zip(truth.reference_gradient.as_ref()));
                for (got, want) in pairs {
                    // max() below overlooks a NaN.
                    assert!(got.iter().all(|value| value.is_finite()), "{what}");
                    let most = want.fold(0.0f32, |most, value| most.max(value.abs()));
                    let worst = got.iter().zip(want).fold(0.0f32, |worst, (g, w)| worst.max((g - w).abs()));
                    assert!(most > 0.0 && f64::from(worst / most) <= bound, "{what}: {}", worst / most);
                }
            }
        }
    }
}

#[test]
fn rounded_f32_of_any_length_is_rounded_at_unit_length() {
    for (name, scale) in
        [("odd_sizes_257x130", 1.0f32), ("rectangular_ignored_labels", 3.0), ("a_tile_and_one", 1e28)]
    {
        let to_round = cases::generated_to_round().into_iter().find(|case| case.name == name);
        let case = to_round.expect("the case is in the table");
        let with = |rows: &dyn Fn(&cases::Side) -> Array2<f32>, dtype: Dtype| {
            let side = |side: &cases::Side| cases::Side { rows: dtype.cast(&rows(side)), ..side.clone() };
            let references = case.references.as_ref().map(side);
            Case { anchors: side(&case.anchors), references, ..case.clone() }
        };
        let length = |i: usize| scale * (1 + i % 4) as f32;
        let stretched = |side: &cases::Side| {
            let unit = side.rows.view().to_f64();
            Array2::from_shape_fn(unit.dim(), |(i, d)| unit[[i, d]] as f32 * length(i))
        };
        let lengths = |rows: &Array2<f64>| rows.outer_iter().map(|x| x.dot(&x).sqrt()).collect::<Vec<_>>();
        let unit = |side: &cases::Side| {
            let rows = stretched(side).mapv(f64::from);
            let lengths = lengths(&rows);
            Array2::from_shape_fn(rows.dim(), |(i, d)| (rows[[i, d]] / lengths[i]) as f32)
        };
        let (given, narrow) = (with(&stretched, Dtype::F32), with(&unit, Dtype::F16));
        for hopper in [false, true] {
            let options = Options { exact: false, ..Options::default() };
            let mut backend = DeviceBackend::new(device(35, hopper), options);
            let (mut output, mut plain) = (LossOutput::default(), LossOutput::default());
            backend.loss_of_any_length(&given.batch(), &case.settings, &mut output).unwrap();
            backend.loss(&narrow.batch(), &case.settings, &mut plain).unwrap();
            let what = format!("{name}, hopper {hopper}");
            assert!((output.loss - plain.loss).abs() <= 1e-6 * plain.loss, "{what}");
            let sides = std::iter::once(&given.anchors).chain(&given.references);
            let gradients =
                |output: LossOutput| std::iter::once(output.gradient).chain(output.reference_gradient);
            for (side, (got, of_unit)) in sides.zip(gradients(output).zip(gradients(plain))) {
                let rows = side.rows.view().to_f64();
                let (mut worst, mut most) = (0.0f64, 0.0f64);
                for (i, length) in lengths(&rows).into_iter().enumerate() {
                    let (u, g) = (rows.row(i).mapv(|x| x / length), of_unit.row(i).mapv(f64::from));
                    let want = (&g - &u * g.dot(&u)) / length * f64::from(scale);
                    for (got, want) in got.row(i).iter().zip(&want) {
                        worst = worst.max((f64::from(*got) * f64::from(scale) - want).abs());
                        most = most.max(want.abs());
                    }
                }
                // The rows that the gradient is led back through are not rounded.
                assert!(most > 0.0 && worst <= 1e-6 * most, "{what}: {}", worst / most);
            }
        }
    }
}

#[test]
fn rows_without_a_direction_are_named_as_on_the_cpu() {
    let mut rows = random_rows(150, 24, 8) * 5.0;
    let labels: Vec<i64> = (0..150).map(|row| row / 3).collect();
    let settings = LossSettings::default();
    for (value, message) in
        [(0.0, "row 70 of the anchors has L2 norm 0.000000"), (f32::NAN, "row 70 of the anchors holds")]
    {
        rows.row_mut(70).fill(value);
        let mut backend = DeviceBackend::new(EmulatedDevice::new(34), Options::default());
        let mut output = LossOutput::default();
        let batch = Batch::square(rows.view(), &labels);
        let error = backend.loss_of_any_length(&batch, &settings, &mut output).unwrap_err();
        assert!(error.to_string().starts_with(message), "{error}");
        // Trusted, it is computed; a row of zeros has no derivative.
        backend.loss_of_any_length(&batch.trusted(), &settings, &mut output).unwrap();
        let own = output.gradient.row(70);
        assert!(if value == 0.0 { own.iter().all(|&g| g == 0.0) } else { own.iter().all(|g| g.is_nan()) });
    }
}

#[test]
fn small_batches_split_among_many_blocks_agree() {
    let device = EmulatedDevice::new(8).with_multiprocessors(64);
    let mut backend = DeviceBackend::new(device, Options::default());
    cases::run_all(&mut backend, [golden_case("odd_sizes_257x130")]);
}

/// `count` rows of `dim` random numbers, of unit length.
fn random_rows(count: usize, dim: usize, seed: u64) -> Array2<f32> {
    let mut state = seed;
    let mut rows = Array2::from_shape_simple_fn((count, dim), || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    });
    for mut row in rows.outer_iter_mut() {
        let norm = row.dot(&row).sqrt();
        row /= norm;
    }
    rows
}

#[test]
fn labels_of_several_sort_tiles_are_ordered() {
    // 1,100 labels in no order, some ignored, every class in several sort tiles.
    let count = 1100;
    let rows = random_rows(count, 8, 1);
    let labels: Vec<i64> = (0..count).map(|row| (row * 7919 % 40) as i64 - 2).collect();
    let batch = Batch::square(rows.view(), &labels);
    let settings = LossSettings::default();
    let truth = reference(&batch, &settings).unwrap();
    let mut output = LossOutput::default();
    emulated::open(Options::default(), 9).loss(&batch, &settings, &mut output).unwrap();
    assert_eq!(output.total_pos, truth.selection.total_pos);
    for (row, (&got, &want)) in output.min_pos.iter().zip(&truth.selection.min_pos).enumerate() {
        assert!(
            got == want as f32 || (f64::from(got) - want).abs() < 1e-6,
            "m+ of row {row}: {got}, want {want}"
        );
    }
    for (row, (&got, &want)) in output.max_neg.iter().zip(&truth.selection.max_neg).enumerate() {
        assert!(
            got == want as f32 || (f64::from(got) - want).abs() < 1e-6,
            "m- of row {row}: {got}, want {want}"
        );
    }
    assert!((output.mean_neg - truth.mean_neg).abs() < 1e-6, "{} {}", output.mean_neg, truth.mean_neg);
}

#[test]
fn bad_rows_are_named_in_the_caller_s_order() {
    let mut rows = random_rows(200, 24, 2);
    let labels: Vec<i64> = (0..200).map(|row| 199 - row).collect();
    let mut output = LossOutput::default();
    let settings = LossSettings::default();
    // Rounded rows are checked as they are given.
    let mut backends = [(false, true), (false, false), (true, false)].map(|(hopper, exact)| {
        DeviceBackend::new(device(10, hopper), Options { exact, ..Options::default() })
    });
    let mut message = |rows: &Array2<f32>| {
        let messages = backends.each_mut().map(|backend| {
            let error = backend.loss(&Batch::square(rows.view(), &labels), &settings, &mut output);
            error.expect_err("a bad row").to_string()
        });
        assert!(messages.iter().all(|other| *other == messages[0]), "{messages:?}");
        messages[0].clone()
    };
    // Longer than f16's numbers.
    rows[[199, 5]] = 1e6;
    assert!(message(&rows).starts_with("row 199 of the anchors has L2 norm 1000000"), "{}", message(&rows));
    // Off by less than f16 rows may be, and by more than f32 rows may.
    rows[[190, 0]] = (rows[[190, 0]].powi(2) + 2.2e-3).sqrt();
    assert!(message(&rows).starts_with("row 190 of the anchors has L2 norm 1.0010"), "{}", message(&rows));
    rows[[150, 3]] = f32::NAN;
    rows[[170, 0]] = 9.0;
    assert_eq!(message(&rows), "row 150 of the anchors holds a value that is not finite (NaN or infinity)");
    rows[[20, 0]] += 2.0;
    let text = message(&rows);
    assert!(text.starts_with("row 20 of the anchors has L2 norm"), "{text}");

    // The loss of nonsense is nonsense, but it is computed.
    let batch = Batch { check: UnitCheck::Trust, ..Batch::square(rows.view(), &labels) };
    for backend in &mut backends {
        backend.loss(&batch, &settings, &mut output).unwrap();
    }
}

#[test]
fn sums_of_rows_far_from_unit_length_saturate() {
    // Similarities of 10^6 and more: a term alone exceeds what a row's sum holds.
    let rows = random_rows(150, 24, 4) * 3000.0;
    let labels: Vec<i64> = (0..150).map(|row| row / 3).collect();
    let mut output = LossOutput::default();
    let settings = LossSettings { mining: Mining::None, ..LossSettings::default() };
    let batch = Batch::square(rows.view(), &labels).trusted();
    emulated::open(Options::default(), 21).loss(&batch, &settings, &mut output).unwrap();
    assert!(output.loss > 1.0 && output.loss.is_finite(), "{}", output.loss);
    assert!(output.dloss_dlambda_pos > 0.0 && output.dloss_dlambda_neg < 0.0, "{output:?}");
}

#[test]
fn the_threshold_pass_needs_its_loss() {
    let case = golden_case("one_class");
    let mut backend = emulated::open(Options::default(), 11);
    let error = backend.hypergradient(&case.batch(), case.anchors.tangent.view(), None).unwrap_err();
    assert!(matches!(error, ddtas::Error::OutOfOrder(_)), "{error}");
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
    // The gallery, and for each set its rows, its lists and what is best of them.
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

#[test]
fn the_workspace_is_as_large_as_stated() {
    let case = golden_case("paper_batch80");
    let mut backend =
        DeviceBackend::new(EmulatedDevice::new(13), Options { budget: 4096, ..Options::default() });
    let mut output = LossOutput::default();
    backend.loss(&case.batch(), &case.settings, &mut output).unwrap();
    assert_eq!(backend.workspace_bytes(), backend.loss_bytes(&case.batch()));
}

/// Draws a batch of f32 rows by `seed`, of any shape and settings, on a device with any budget: it agrees, or a pair lies too
/// near a threshold, which is false.
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
    let mut backend = DeviceBackend::new(device(seed, hopper), Options { budget, ..Options::default() });
    let report = compare(&mut backend, &batch, &settings, seed);
    if let Some(report) = &report {
        let on = format!("against {against}, hopper {hopper}, budget {budget}");
        // Not of the slopes alone: where every sigmoid is tiny, they are sums of few of its fixed-point digits.
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
    assert!(compared > 0, "no batch was clear of the thresholds");
}
