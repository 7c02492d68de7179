//! A million pairs whose similarities lie at the bounds of mining or just beside them.

use ddtas::backend::Backend;
use ddtas::backend::device::{DeviceBackend, Options};
use ddtas::loss::{Batch, LossOutput, LossSettings, Mining};
use ndarray::Array2;

use super::{device, random_rows};

/// Rows in classes of two, each of 16 entries ±1/4 that are off by up to `jitter` units in the last place
/// (`unit`: the spacing at 1). Similarities and bounds are multiples of 1/8, or a few units beside one.
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
    const COUNT: usize = 1440;
    let settings = LossSettings { mining: Mining::Symmetric, gamma: 0.25, ..LossSettings::default() };
    // Computed as the kernels compute their bounds.
    let above = |value: f32, tolerance: f64| (f64::from(value) + tolerance) as f32;
    for jitter in [0, 3] {
        for (exact, hopper, seed) in
            [(true, false, 30), (true, true, 33), (false, false, 31), (false, true, 32)]
        {
            // Rounding to f16 would erase a jitter in f32's last place.
            let unit = if exact { f32::EPSILON } else { half::f16::EPSILON.to_f32() };
            let (rows, labels) = rows_at_the_bounds(COUNT, jitter, unit);
            let batch = Batch::square(rows.view(), &labels);
            let answer = |rows: &Array2<f32>, budget| {
                let mut backend =
                    DeviceBackend::new(device(seed, hopper), Options { budget: Some(budget), tf32: !exact });
                let (mut output, batch) =
                    (LossOutput::default(), Batch::square(rows.view(), &labels).trusted());
                backend.loss(&batch, &settings, &mut output).unwrap();
                let tangent = random_rows(COUNT, 16, 6);
                let sums = backend.threshold_gradient(&batch, tangent.view(), None).unwrap();
                (output, sums)
            };
            let (output, sums) = answer(&rows, 1 << 30);
            let what = format!("jitter {jitter}, exact {exact}, hopper {hopper}");
            let LossOutput { min_pos, max_neg, count_pos, count_neg, .. } = &output;
            assert!(output.active > 1000, "{what}");
            for row in 0..COUNT {
                let (low, high) = (min_pos[row], max_neg[row]);
                // The two rows of a class have the same m+: the similarity of their pair.
                assert_eq!(low.to_bits(), min_pos[row ^ 1].to_bits(), "{what}: row {row}");
                // The selection must count what m+ of the same-class pass and m- of the sweep imply.
                assert_eq!(count_pos[row] == 1, low < above(high, 0.25), "{what}: row {row}");
                assert_eq!(count_neg[row] > 0, high > above(low, -0.25), "{what}: row {row}");
            }
            // Without jitter all is exact in f32 and f16: the CPU must agree bit for bit.
            if jitter == 0 {
                let mut cpu = LossOutput::default();
                ddtas::backend::cpu::CpuBackend::new().loss(&batch, &settings, &mut cpu).unwrap();
                assert!(cpu.count_neg == output.count_neg && cpu.count_pos == output.count_pos, "{what}");
                assert_eq!((cpu.min_pos, cpu.max_neg), (output.min_pos, output.max_neg), "{what}");
                continue;
            }
            // Products of f16 are summed in the same order with and without Hopper's kernels: once suffices.
            if !exact && !hopper {
                continue;
            }
            // Rows and classes in reverse order: S_ji is computed in place of S_ij.
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
            // Budget 0: every pass computes the similarities again.
            let (recomputed, same) = answer(&rows, 0);
            assert!(recomputed.count_neg == *count_neg && recomputed.count_pos == *count_pos, "{what}");
            assert_eq!((sums, output.gradient), (same, recomputed.gradient), "{what}");
        }
    }
}
