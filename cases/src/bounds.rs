//! Pairs whose similarities lie at the bounds of mining or just beside them.

use ddtas::backend::Backend;
use ddtas::backend::cpu::CpuBackend;
use ddtas::loss::{Batch, ElementType, LossOutput, LossSettings, Mining, OwnedEmbeddings};
use half::{bf16, f16};
use ndarray::Array2;

use crate::random::tangent;
use crate::{Expected, Report};

/// Rows whose similarities lie at the bounds.
#[derive(Debug, Clone, Copy)]
pub struct AtBounds {
    /// Rows, in classes of two.
    pub count: usize,
    /// Dimensions: 16 times a power of 4.
    pub dim: usize,
    /// Type of the rows.
    pub dtype: ElementType,
    /// Whether f32 rows are rounded to f16: a jitter in f32's last place would be erased.
    pub tf32: bool,
    /// Whether S_ji is also computed in place of S_ij, for rows in reverse order.
    pub reversed: bool,
}

impl AtBounds {
    /// Rows of entries that are all of one size, in 16 groups of one sign each, so that a similarity is a
    /// multiple of 1/8. Each entry is off by up to `jitter` units in the last place.
    fn rows(&self, jitter: i32) -> Array2<f32> {
        let unit = match self.dtype {
            ElementType::F32 if !self.tf32 => f32::EPSILON,
            ElementType::F32 | ElementType::F16 => f16::EPSILON.to_f32(),
            ElementType::Bf16 => bf16::EPSILON.to_f32(),
        };
        let size = (self.dim as f32).sqrt().recip();
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as i32
        };
        let signs = Array2::from_shape_simple_fn((self.count, 16), || next() >> 30 == 0);
        Array2::from_shape_fn((self.count, self.dim), |(row, d)| {
            let off = next().rem_euclid(2 * jitter + 1) - jitter;
            let value = size * (1.0 + off as f32 * unit);
            if signs[[row, d % 16]] { value } else { -value }
        })
    }
}

/// Checks that all passes of a backend agree about such pairs, stored or not, and where their similarities are
/// exact, also with the CPU and with the truth. `open` gives a backend with this many bytes for candidates.
///
/// # Panics
/// If they do not.
pub fn check_at_bounds(rows: AtBounds, mut open: impl FnMut(usize) -> Box<dyn Backend>) {
    let (count, what) = (rows.count, format!("{rows:?}"));
    let settings = LossSettings { mining: Mining::Symmetric, gamma: 0.25, ..LossSettings::default() };
    let labels: Vec<i64> = (0..count as i64).map(|row| row / 2).collect();
    let tangent = tangent(count, rows.dim, 6);
    let mut answer = |rows: &OwnedEmbeddings, budget| {
        let mut backend = open(budget);
        let (mut output, batch) = (LossOutput::default(), Batch::square(rows.view(), &labels).trusted());
        backend.loss(&batch, &settings, &mut output).expect("a valid batch");
        let sums = backend.threshold_gradient(&batch, tangent.view(), None).expect("the batch of the loss");
        (output, sums)
    };
    // Computed as the kernels compute their bounds.
    let above = |value: f32, tolerance: f64| (f64::from(value) + tolerance) as f32;
    for jitter in [0, 3] {
        let what = format!("{what}, jitter {jitter}");
        let wide = rows.rows(jitter);
        let given = OwnedEmbeddings::new(&wide, rows.dtype);
        let (output, sums) = answer(&given, 1 << 30);
        let LossOutput { min_pos, max_neg, count_pos, count_neg, .. } = &output;
        assert!(output.active as usize > count / 2, "{what}");
        for row in 0..count {
            let (low, high) = (min_pos[row], max_neg[row]);
            // The two rows of a class have the same m+: the similarity of their pair.
            assert_eq!(low.to_bits(), min_pos[row ^ 1].to_bits(), "{what}: row {row}");
            // The selection must count what m+ of the same-class pass and m- of the sweep imply.
            assert_eq!(count_pos[row] == 1, low < above(high, 0.25), "{what}: row {row}");
            assert_eq!(count_neg[row] > 0, high > above(low, -0.25), "{what}: row {row}");
        }
        // Without jitter all is exact in every type: the CPU must agree bit for bit, and with the truth.
        if jitter == 0 {
            let (mut cpu, batch) = (LossOutput::default(), Batch::square(given.view(), &labels).trusted());
            CpuBackend::new().loss(&batch, &settings, &mut cpu).expect("a valid batch");
            assert!(cpu.count_neg == *count_neg && cpu.count_pos == *count_pos, "{what}");
            assert_eq!((&cpu.min_pos, &cpu.max_neg), (min_pos, max_neg), "{what}");
            // Rounding changes no row here, but then weights are rounded too.
            let stored = if rows.tf32 { ElementType::F16 } else { rows.dtype };
            let stored = OwnedEmbeddings::new(&wide, stored);
            let batch = Batch::square(stored.view(), &labels);
            let expected = Expected::evaluate(&batch, &settings, &tangent, None).expect("a valid batch");
            let report = Report::new(&expected, &output, sums);
            assert!(report.is_within(&expected.bounds), "{what}: {report:?}");
            continue;
        }
        if rows.reversed {
            // Rows and classes in reverse order.
            let reverse = Array2::from_shape_fn(wide.dim(), |(row, d)| wide[[count - 1 - row, d]]);
            let (reversed, _) = answer(&OwnedEmbeddings::new(&reverse, rows.dtype), 1 << 30);
            let back = |values: &[u32]| values.iter().rev().copied().collect::<Vec<_>>();
            let counts = (back(&reversed.count_pos), back(&reversed.count_neg));
            assert!(counts.0 == *count_pos && counts.1 == *count_neg, "{what}");
            let extremes = [(&reversed.min_pos, min_pos), (&reversed.max_neg, max_neg)];
            assert!(extremes.iter().all(|(there, here)| there.iter().rev().eq(here.iter())), "{what}");
        }
        // Every pass computes the similarities again.
        let (recomputed, same) = answer(&given, 0);
        assert!(recomputed.count_neg == *count_neg && recomputed.count_pos == *count_pos, "{what}");
        assert_eq!((sums, &output.gradient), (same, &recomputed.gradient), "{what}");
    }
}
