//! The one matrix product: a few rows times packed panels of 16 columns.
//!
//! Entry (r, c) is a single chain of fused multiply-adds over the depth, so its
//! bits depend neither on the tile it is computed in nor on which of the two
//! vectors is the row: a recomputed similarity equals the kept one, and S is symmetric.

use super::simd::{GROUP, Lanes};

/// Rows of one call.
pub const STRIP: usize = 8;

/// `out[r][c] = sum_k rows[k][first + r] panels[c / 16][k][c % 16]`, or `+=` if `add`.
///
/// `rows` is one panel, `first` 0 or 8; `panels` are whole panels as deep as `rows`; `out` is `[STRIP, stride]`.
#[inline(always)]
pub fn product<S: Lanes>(
    simd: S,
    rows: &[f32],
    first: usize,
    panels: &[f32],
    out: &mut [f32],
    stride: usize,
    add: bool,
) {
    if S::F32_LANES == GROUP {
        if first == 0 {
            wide_panels::<S, 0>(simd, rows, panels, out, stride, add);
        } else {
            wide_panels::<S, STRIP>(simd, rows, panels, out, stride, add);
        }
    } else if first == 0 {
        narrow_panels::<S, 0, 4>(simd, rows, panels, out, stride, add);
    } else {
        narrow_panels::<S, 8, 12>(simd, rows, panels, out, stride, add);
    }
}

#[inline(always)]
fn wide_panels<S: Lanes, const FIRST: usize>(
    simd: S,
    rows: &[f32],
    panels: &[f32],
    out: &mut [f32],
    stride: usize,
    add: bool,
) {
    let count = panels.len() / rows.len();
    let panel = |p: usize| &panels[p * rows.len()..][..rows.len()];
    let mut p = 0;
    // 24 accumulators, 3 columns and a broadcast row value: 28 of the 32 registers of AVX-512.
    while p + 3 <= count {
        let three = [panel(p), panel(p + 1), panel(p + 2)];
        wide::<S, FIRST, 3>(simd, rows, three, &mut out[p * GROUP..], stride, add);
        p += 3;
    }
    if p + 2 == count {
        wide::<S, FIRST, 2>(simd, rows, [panel(p), panel(p + 1)], &mut out[p * GROUP..], stride, add);
    } else if p + 1 == count {
        wide::<S, FIRST, 1>(simd, rows, [panel(p)], &mut out[p * GROUP..], stride, add);
    }
}

/// Panels as vectors of 16.
#[inline(always)]
fn wide<S: Lanes, const FIRST: usize, const P: usize>(
    simd: S,
    rows: &[f32],
    panels: [&[f32]; P],
    out: &mut [f32],
    stride: usize,
    add: bool,
) {
    let rows = rows.as_chunks::<GROUP>().0;
    // One iterator per panel and no index: a bounds check a step would cost a tenth.
    let mut columns = panels.map(|panel| S::as_simd_f32s(panel).0.iter());
    let mut sums = [[simd.splat_f32s(0.0); P]; STRIP];
    if add {
        for (r, sums) in sums.iter_mut().enumerate() {
            sums.copy_from_slice(&S::as_simd_f32s(&out[r * stride..][..P * GROUP]).0[..P]);
        }
    }
    for row in rows {
        let mut column = [simd.splat_f32s(0.0); P];
        for (column, columns) in column.iter_mut().zip(&mut columns) {
            let Some(value) = columns.next() else { return };
            *column = *value;
        }
        for r in 0..STRIP {
            let value = simd.splat_f32s(row[FIRST + r]);
            for p in 0..P {
                sums[r][p] = simd.mul_add_e_f32s(value, column[p], sums[r][p]);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        S::as_mut_simd_f32s(&mut out[r * stride..][..P * GROUP]).0.copy_from_slice(sums);
    }
}

#[inline(always)]
fn narrow_panels<S: Lanes, const LOWER: usize, const UPPER: usize>(
    simd: S,
    rows: &[f32],
    panels: &[f32],
    out: &mut [f32],
    stride: usize,
    add: bool,
) {
    for (p, panel) in panels.chunks_exact(rows.len()).enumerate() {
        narrow::<S, LOWER>(simd, rows, panel, &mut out[p * GROUP..], stride, add);
        narrow::<S, UPPER>(simd, rows, panel, &mut out[STRIP / 2 * stride + p * GROUP..], stride, add);
    }
}

/// Four rows of one panel as two vectors of 8: 8 accumulators, 2 columns and a row value of AVX2's 16 registers.
#[inline(always)]
fn narrow<S: Lanes, const FIRST: usize>(
    simd: S,
    rows: &[f32],
    panel: &[f32],
    out: &mut [f32],
    stride: usize,
    add: bool,
) {
    let mut sums = [[simd.splat_f32s(0.0); 2]; STRIP / 2];
    if add {
        for (r, sums) in sums.iter_mut().enumerate() {
            sums.copy_from_slice(S::as_simd_f32s(&out[r * stride..][..GROUP]).0);
        }
    }
    let columns = S::as_simd_f32s(panel).0.as_chunks::<2>().0;
    for (row, column) in rows.as_chunks::<GROUP>().0.iter().zip(columns) {
        for r in 0..STRIP / 2 {
            let value = simd.splat_f32s(row[FIRST + r]);
            for p in 0..2 {
                sums[r][p] = simd.mul_add_e_f32s(value, column[p], sums[r][p]);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        S::as_mut_simd_f32s(&mut out[r * stride..][..GROUP]).0.copy_from_slice(sums);
    }
}

/// Packs rows into panels of 16: `panels[i / 16][k][i % 16] = rows(i)[k]`, zero behind the last row.
pub fn pack_transposed<'a>(
    rows: impl Fn(usize) -> &'a [f32],
    count: usize,
    depth: usize,
    panels: &mut [f32],
) {
    for (p, panel) in panels.chunks_exact_mut(depth * GROUP).enumerate() {
        let filled = count.saturating_sub(p * GROUP).min(GROUP);
        if filled < GROUP {
            panel.fill(0.0);
        }
        // Blocks of 16 x 16 keep both sides of the transposition in the first-level cache.
        for start in (0..depth).step_by(GROUP) {
            let end = (start + GROUP).min(depth);
            for lane in 0..filled {
                let row = &rows(p * GROUP + lane)[start..end];
                for (k, value) in row.iter().enumerate() {
                    panel[(start + k) * GROUP + lane] = *value;
                }
            }
        }
    }
}

/// Packs rows into panels over their dimensions: `panels[d / 16][i][d % 16] = rows(i)[d]`, zero behind the last.
pub fn pack_direct<'a>(rows: impl Fn(usize) -> &'a [f32], count: usize, dim: usize, panels: &mut [f32]) {
    let size = count * GROUP;
    for i in 0..count {
        let (whole, tail) = rows(i)[..dim].as_chunks::<GROUP>();
        for (p, chunk) in whole.iter().enumerate() {
            panels[p * size + i * GROUP..][..GROUP].copy_from_slice(chunk);
        }
        if !tail.is_empty() {
            let last = &mut panels[whole.len() * size + i * GROUP..][..GROUP];
            last[..tail.len()].copy_from_slice(tail);
            last[tail.len()..].fill(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Level, Work};
    use super::*;

    struct Multiply<'a> {
        rows: &'a [f32],
        first: usize,
        panels: &'a [f32],
        out: &'a mut [f32],
        stride: usize,
        add: bool,
    }

    impl Work for Multiply<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) {
            product(simd, self.rows, self.first, self.panels, self.out, self.stride, self.add);
        }
    }

    fn packed(rows: &[Vec<f32>], depth: usize) -> Vec<f32> {
        let mut panels = vec![f32::NAN; rows.len().div_ceil(GROUP) * depth * GROUP];
        pack_transposed(|i| rows[i].as_slice(), rows.len(), depth, &mut panels);
        panels
    }

    #[test]
    fn the_product_agrees_with_a_plain_loop_on_every_instruction_set() {
        let value = |i: usize, k: usize| ((i * 31 + k * 17) % 23) as f32 / 23.0 - 0.5;
        let matrix = |from: usize, count: usize, depth: usize| -> Vec<Vec<f32>> {
            (from..from + count).map(|i| (0..depth).map(|k| value(i, k)).collect()).collect()
        };
        for (level, first) in Level::available().into_iter().flat_map(|level| [(level, 0), (level, STRIP)]) {
            for (depth, columns) in [(1, 1), (3, 16), (17, 33), (64, 48), (130, 79)] {
                let (left, right) = (matrix(0, GROUP, depth), matrix(100, columns, depth));
                let (rows, panels) = (packed(&left, depth), packed(&right, depth));
                let stride = columns.next_multiple_of(GROUP);
                let mut out = vec![1.0; STRIP * stride];
                for add in [false, true] {
                    let (rows, panels, out) = (&rows, &panels, &mut out);
                    level.dispatch(Multiply { rows, first, panels, out, stride, add });
                }
                for r in 0..STRIP {
                    for c in 0..stride {
                        let wanted: f64 = right.get(c).map_or(0.0, |column| {
                            2.0 * left[first + r]
                                .iter()
                                .zip(column)
                                .map(|(a, b)| f64::from(a * b))
                                .sum::<f64>()
                        });
                        let got = f64::from(out[r * stride + c]);
                        let error = (got - wanted).abs();
                        assert!(
                            error < 1e-5 * (1.0 + wanted.abs()),
                            "{level:?} {depth} {columns}: {got} {wanted}"
                        );
                    }
                }
            }
        }
    }
}
