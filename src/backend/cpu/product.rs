//! The one matrix product: a few rows times packed panels of 16 columns.
//!
//! Entry (r, c) is a single chain of fused multiply-adds over the depth, so its
//! bits depend neither on the tile it is computed in nor on which of the two
//! vectors is the row: a recomputed similarity equals the kept one, and S is symmetric.

use super::simd::{GROUP, Lanes, Level, Work};

/// Rows of one [`product`].
pub const STRIP: usize = 8;

/// `out[r][c] = sum_k rows[k][first + r] panels[c / 16][k][c % 16]`. With `add` the chain, which begins at 0,
/// is added to `out`, so that zero factors change no bit (up to a depth of [`DEPTH`]).
///
/// `rows` is one panel, `first` 0 or 8; `panels` are whole panels as deep as `rows`; `out` is
/// `[STRIP, stride]`.
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

/// [`product`] of P panels in vectors of 16.
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
        let out = S::as_mut_simd_f32s(&mut out[r * stride..][..P * GROUP]).0;
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = if add { simd.add_f32s(*out, *sum) } else { *sum };
        }
    }
}

/// Depth multiplied at a time by vectors of 8: the parts of the rows and of three vectors of columns then
/// stay in the first-level cache. Sums go on from where they were, so an entry is the same single chain.
pub const DEPTH: usize = 128;

/// What the sums of a product start from, and what is stored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sum {
    /// Starts at 0; stores the chain.
    Set,
    /// Starts at the stored value and continues its chain.
    Continue,
    /// Starts at 0; adds the chain to the stored value.
    Add,
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
    let depth = rows.len() / GROUP;
    let vectors = 2 * (panels.len() / rows.len());
    for start in (0..depth).step_by(DEPTH) {
        let part = start * GROUP..(start + DEPTH).min(depth) * GROUP;
        let rows = &rows[part.clone()];
        let panel = |v: usize| &panels[v / 2 * depth * GROUP..][part.clone()];
        let sum = match start {
            0 if add => Sum::Add,
            0 => Sum::Set,
            _ => Sum::Continue,
        };
        let mut v = 0;
        while v < vectors {
            let out = &mut out[v * S::F32_LANES..];
            v += if vectors - v == 2 || vectors - v == 4 {
                let two = [panel(v), panel(v + 1)];
                strip::<S, LOWER, UPPER, 0, 2>(simd, rows, two, out, stride, sum)
            } else {
                let three = [panel(v), panel(v + 1), panel(v + 2)];
                if v.is_multiple_of(2) {
                    strip::<S, LOWER, UPPER, 0, 3>(simd, rows, three, out, stride, sum)
                } else {
                    strip::<S, LOWER, UPPER, 1, 3>(simd, rows, three, out, stride, sum)
                }
            };
        }
    }
}

/// Both halves of a strip times P vectors; returns P.
#[inline(always)]
fn strip<S: Lanes, const LOWER: usize, const UPPER: usize, const HALF: usize, const P: usize>(
    simd: S,
    rows: &[f32],
    panels: [&[f32]; P],
    out: &mut [f32],
    stride: usize,
    sum: Sum,
) -> usize {
    narrow::<S, LOWER, HALF, P>(simd, rows, panels, out, stride, sum);
    narrow::<S, UPPER, HALF, P>(simd, rows, panels, &mut out[STRIP / 2 * stride..], stride, sum);
    P
}

/// Four rows times P vectors of 8, which alternate between the halves of their panels from `HALF` on: 12
/// accumulators, 3 columns and a row value are the 16 registers of AVX2.
#[inline(always)]
fn narrow<S: Lanes, const FIRST: usize, const HALF: usize, const P: usize>(
    simd: S,
    rows: &[f32],
    panels: [&[f32]; P],
    out: &mut [f32],
    stride: usize,
    sum: Sum,
) {
    let width = P * S::F32_LANES;
    let mut sums = [[simd.splat_f32s(0.0); P]; STRIP / 2];
    if sum == Sum::Continue {
        for (r, sums) in sums.iter_mut().enumerate() {
            sums.copy_from_slice(S::as_simd_f32s(&out[r * stride..][..width]).0);
        }
    }
    let rows = rows.as_chunks::<GROUP>().0;
    // PERF: plain indices. Iterators over the depth, or columns gathered by a closure, make the compiler
    // spill accumulators, which costs a fifth.
    let columns = panels.map(|panel| &S::as_simd_f32s(panel).0.as_chunks::<2>().0[..rows.len()]);
    for k in 0..rows.len() {
        let mut column = [simd.splat_f32s(0.0); P];
        for p in 0..P {
            column[p] = columns[p][k][(HALF + p) % 2];
        }
        for r in 0..STRIP / 2 {
            let value = simd.splat_f32s(rows[k][FIRST + r]);
            for p in 0..P {
                sums[r][p] = simd.mul_add_e_f32s(value, column[p], sums[r][p]);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let out = S::as_mut_simd_f32s(&mut out[r * stride..][..width]).0;
        for (out, total) in out.iter_mut().zip(sums) {
            *out = if sum == Sum::Add { simd.add_f32s(*out, *total) } else { *total };
        }
    }
}

/// Packs rows into panels of 16: `panels[i / 16][k][i % 16] = rows(i)[k]`, zero behind the last row.
pub fn pack_transposed<'a>(
    rows: impl Fn(usize) -> &'a [f32],
    count: usize,
    depth: usize,
    panels: &mut [f32],
) {
    Level::best().dispatch(Pack { rows, count, depth, panels });
}

/// [`pack_transposed`] as [`Work`], to run inside other work.
pub struct Pack<'p, F> {
    pub rows: F,
    pub count: usize,
    pub depth: usize,
    pub panels: &'p mut [f32],
}

impl<'a, F: Fn(usize) -> &'a [f32]> Work for Pack<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { rows, count, depth, panels } = self;
        for (p, panel) in panels.chunks_exact_mut(depth * GROUP).enumerate() {
            let filled = count.saturating_sub(p * GROUP).min(GROUP);
            if filled < GROUP {
                panel.fill(0.0);
            }
            let row = |lane: usize| &rows(p * GROUP + lane)[..depth];
            let panel = panel.as_chunks_mut::<GROUP>().0;
            // Squares of 8 x 8 are transposed in registers; the remaining entries are copied one by one.
            let whole = filled / 8 * 8;
            for lane in (0..whole).step_by(8) {
                let [a, b, c, d, e, f, g, h] = std::array::from_fn(|l| row(lane + l).as_chunks::<8>().0);
                for (i, lines) in panel.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                    // PERF: one by one. `map` over an array of rows goes through memory, which takes twice as
                    // long.
                    let square = [a[i], b[i], c[i], d[i], e[i], f[i], g[i], h[i]];
                    let columns = simd.transpose(square);
                    for (line, column) in lines.iter_mut().zip(&columns) {
                        line[lane..lane + 8].copy_from_slice(column);
                    }
                }
                for (k, line) in panel.iter_mut().enumerate().skip(depth / 8 * 8) {
                    for (l, value) in line[lane..lane + 8].iter_mut().enumerate() {
                        *value = row(lane + l)[k];
                    }
                }
            }
            for lane in whole..filled {
                for (line, value) in panel.iter_mut().zip(row(lane)) {
                    line[lane] = *value;
                }
            }
        }
    }
}

/// Packs rows `range` of a block of `count` into its panels over their dimensions:
/// `panels[d / 16][i][d % 16] = rows(i)[d]`, zero behind the last dimension.
#[inline(always)]
pub fn pack_direct<'a>(
    rows: impl Fn(usize) -> &'a [f32],
    range: std::ops::Range<usize>,
    count: usize,
    panels: &mut [f32],
) {
    let size = count * GROUP;
    for i in range {
        let (whole, tail) = rows(i).as_chunks::<GROUP>();
        let mut places = panels.chunks_exact_mut(size).map(|panel| &mut panel[i * GROUP..][..GROUP]);
        for (chunk, place) in whole.iter().zip(&mut places) {
            place.copy_from_slice(chunk);
        }
        if let (Some(last), false) = (places.next(), tail.is_empty()) {
            last[..tail.len()].copy_from_slice(tail);
            last[tail.len()..].fill(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn packing_transposes_on_every_instruction_set() {
        for level in Level::available() {
            for (count, depth) in [(1usize, 1usize), (8, 8), (16, 24), (23, 17), (40, 5)] {
                let rows: Vec<Vec<f32>> =
                    (0..count).map(|i| (0..depth).map(|k| (100 * i + k + 1) as f32).collect()).collect();
                let mut panels = vec![f32::NAN; count.div_ceil(GROUP) * depth * GROUP];
                level.dispatch(Pack {
                    rows: |i: usize| rows[i].as_slice(),
                    count,
                    depth,
                    panels: &mut panels,
                });
                for (at, value) in panels.iter().enumerate() {
                    let (i, k) = (at / GROUP / depth * GROUP + at % GROUP, at / GROUP % depth);
                    assert_eq!(*value, rows.get(i).map_or(0.0, |row| row[k]), "{level:?} {count} {depth}");
                }
            }
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
            for (depth, columns) in [(1, 1), (3, 16), (17, 33), (64, 48), (130, 79), (300, 96)] {
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
