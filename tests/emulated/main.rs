//! The CUDA kernels executed on the CPU: the whole table of cases, and checks that only the emulation allows.
//!
//! With sanitizers, whose runtime must be loaded first:
//! `export DDTAS_SANITIZE=address,undefined ASAN_OPTIONS=detect_leaks=0`,
//! `export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="env LD_PRELOAD=$(g++ -print-file-name=libasan.so)"`,
//! `cargo test --release -p ddtas --features emulated --test emulated`.
//! ThreadSanitizer likewise: `DDTAS_SANITIZE=thread`, libtsan.so, and
//! `TSAN_OPTIONS="halt_on_error=1 exitcode=66 ignore_interceptors_accesses=1"` (kernels/emulation/races.h). All
//! tests take a quarter of an hour there; `every_kernel` runs each kernel in half a minute.

mod bits;
mod bounds;
mod calls;
mod rounded;
mod rows;
mod table;

use ddtas::backend::device::{DeviceBackend, Options};
use ddtas::backend::emulated::EmulatedDevice;
use ddtas::backend::{Backend, Nearest};
use ddtas::loss::{LossOutput, ThresholdGradient};
use ddtas_cases::{self as cases, Case};
use ndarray::Array2;

/// An emulated GPU; `hopper`: of that architecture.
fn device(seed: u64, hopper: bool) -> EmulatedDevice {
    let device = EmulatedDevice::new(seed);
    if hopper { device.as_hopper() } else { device }
}

fn golden_case(name: &str) -> Case {
    cases::golden().into_iter().find(|case| case.name == name).expect("the case is in tests/golden")
}

/// Loss and threshold gradient of a case.
fn loss_of(backend: &mut dyn Backend, case: &Case) -> (LossOutput, ThresholdGradient) {
    let mut output = LossOutput::default();
    backend.loss(&case.batch(), &case.settings, &mut output).expect("the case is valid");
    let reference_tangent = case.references.as_ref().map(|side| side.tangent.view());
    let sums = backend.threshold_gradient(&case.batch(), case.anchors.tangent.view(), reference_tangent);
    (output, sums.expect("the case is valid"))
}

/// Loss, threshold gradient and 3 nearest neighbours of a case.
fn answers(backend: &mut dyn Backend, case: &Case) -> (LossOutput, ThresholdGradient, Nearest) {
    let (output, sums) = loss_of(backend, case);
    let batch = case.batch();
    let nearest = backend.nearest(&batch.anchors, batch.references.as_ref(), 3).expect("the case is valid");
    (output, sums, nearest)
}

/// All numbers of a loss as bits, so that NaN equals NaN.
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
    bits.extend([output.probe_neg, output.total_pos, output.total_neg, output.active]);
    bits.extend(output.count_pos.iter().chain(&output.count_neg).map(|&n| u64::from(n)));
    let gradients = output.gradient.iter().chain(output.reference_gradient.iter().flatten());
    let floats = gradients.chain(&output.min_pos).chain(&output.max_neg);
    bits.extend(floats.map(|value| u64::from(value.to_bits())));
    bits
}

/// All numbers of a loss and of neighbours as bits.
fn bits((output, _, nearest): &(LossOutput, ThresholdGradient, Nearest)) -> Vec<u64> {
    let mut bits = loss_bits(output);
    bits.extend(nearest.indices.iter().map(|&n| u64::from(n)));
    bits.extend(nearest.similarities.iter().map(|value| u64::from(value.to_bits())));
    bits
}

/// Opens a backend for each part of a batch. `hopper`: Hopper's kernels; `exact`: f32 rows are not rounded.
fn parts_on(first_seed: u64, hopper: bool, exact: bool) -> impl FnMut(usize) -> Box<dyn Backend> {
    move |part| {
        // The first part stores nothing.
        let budget = (part == 0).then_some(0);
        Box::new(DeviceBackend::new(
            device(first_seed + part as u64, hopper),
            Options { budget, tf32: !exact },
        ))
    }
}

/// `count` random rows of `dim` entries and unit length.
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
