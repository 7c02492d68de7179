//! A million similarities at the bounds of mining, or beside them.

use ddtas::backend::Backend;
use ddtas::backend::device::{DeviceBackend, Options};
use ddtas::loss::{Batch, LossOutput, LossSettings, Mining};
use ndarray::Array2;

use super::{device, random_rows};

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
                let mut backend = DeviceBackend::new(device(seed, hopper), Options { budget, tf32: !exact });
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
            assert_eq!((sums, output.gradient), (same, recomputed.gradient), "{what}");
        }
    }
}
