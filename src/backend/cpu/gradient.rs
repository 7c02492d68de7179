//! Weighted loss and gradient from the candidates (SPEC 4), and the same walk for SPEC 5.
//!
//! Each block of rows is owned by one task, which visits its tiles in order of
//! the other side and sums into rows of its own. So every sum has one order,
//! whatever the thread count and whichever tiles were kept. A tile's weights
//! are applied as lists of pairs or, where it is dense, as a matrix product.

use super::buffer::Buffer;
use super::product::{STRIP, product};
use super::rows::{Block, MAX_BLOCK, Side};
use super::select::{Share, ShareRun, Weights};
use super::simd::{GROUP, Lanes, Work};
use super::tile::{Candidates, Pairs, Reader};

/// Share of a tile's pairs from which a product beats lists. A listed pair costs about three times
/// one in a product: it loads its row anew, where the product keeps rows in registers.
const DENSE: f64 = 0.35;

/// Listed pairs a row up to which each row is summed from end to end.
const SPARSE: f64 = 4.0;

/// Which function of the similarity weighs a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// G: the gradient.
    Gradient,
    /// dG/d(lambda_pos).
    LambdaPos,
    /// dG/d(lambda_neg).
    LambdaNeg,
}

/// Sums over the pairs of one block, with the factor 2 / (B |set|) inside.
#[derive(Debug, Clone, Copy, Default)]
pub struct Totals {
    /// Softplus of positives and negatives.
    pub softplus: [f64; 2],
    /// Sigmoid of positives and negatives.
    pub sigmoid: [f64; 2],
    /// What the caller makes of finished rows.
    pub finished: f64,
}

impl Totals {
    pub fn add(&mut self, other: &Self) {
        for kind in 0..2 {
            self.softplus[kind] += other.softplus[kind];
            self.sigmoid[kind] += other.sigmoid[kind];
        }
        self.finished += other.finished;
    }
}

/// Buffers of one thread.
#[derive(Debug)]
pub struct GradientScratch {
    /// Weighted pairs by row of the owner: columns of the other side, weights, how many.
    columns: Box<[[u32; LIST]; MAX_BLOCK]>,
    weights: Box<[[f32; LIST]; MAX_BLOCK]>,
    lengths: [u32; MAX_BLOCK],
    /// Sums of the owner's rows, `[rows, D]`, rows rounded up to whole strips and D to whole groups.
    sums: Buffer,
    /// The tile's weights as a matrix, and the other side's rows as panels over D where those are not kept.
    matrix: Buffer,
    panels: Buffer,
}

/// Floats between the sums of two rows: an odd number of groups, so that those of some dimensions do not all fall
/// into a few sets of the cache, as they would where D is a power of two.
fn stride(dim: usize) -> usize {
    (dim.div_ceil(GROUP) | 1) * GROUP
}

/// Room in the list of a row: lists are written 16 entries at a time.
const LIST: usize = MAX_BLOCK + GROUP;

impl Default for GradientScratch {
    fn default() -> Self {
        Self {
            columns: Box::new([[0; LIST]; MAX_BLOCK]),
            weights: Box::new([[0.0; LIST]; MAX_BLOCK]),
            lengths: [0; MAX_BLOCK],
            sums: Buffer::default(),
            matrix: Buffer::default(),
            panels: Buffer::default(),
        }
    }
}

impl GradientScratch {
    pub fn bytes(&self) -> usize {
        let buffers = [&self.sums, &self.matrix, &self.panels];
        size_of_val(&*self.columns)
            + size_of_val(&*self.weights)
            + buffers.iter().map(|buffer| buffer.bytes()).sum::<usize>()
    }

    /// Starts a block of `rows` rows.
    pub fn begin(&mut self, rows: usize, dim: usize) {
        let length = rows.next_multiple_of(STRIP) * stride(dim);
        self.sums.grow(length);
        self.sums[..length].fill(0.0);
    }

    /// The sum of a row of the block.
    pub fn sum(&self, row: usize, dim: usize) -> &[f32] {
        &self.sums[row * stride(dim)..][..dim]
    }

    fn push(&mut self, row: usize, column: usize, weight: f32) {
        let length = &mut self.lengths[row];
        self.columns[row][*length as usize] = column as u32;
        self.weights[row][*length as usize] = weight;
        *length += 1;
    }
}

/// Adds one tile's part to the rows of its owner.
pub struct AddTile<'a, 'b> {
    pub pairs: Pairs<'a>,
    pub tile: (usize, usize),
    pub candidates: &'b Candidates,
    pub weights: &'b Weights,
    pub kind: Kind,
    /// The owner is the block of rows, of columns, or (on the diagonal) both.
    pub owner_rows: bool,
    pub owner_columns: bool,
    pub scratch: &'b mut GradientScratch,
    pub totals: &'b mut Totals,
}

impl Work for AddTile<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(mut self, simd: S) {
        let (row, column) = self.tile;
        let blocks = (self.pairs.rows.order.blocks[row], self.pairs.columns.order.blocks[column]);
        self.scratch.lengths.fill(0);
        self.weigh(simd, blocks);
        let (owner, other, side, block) = if self.owner_rows {
            (blocks.0, blocks.1, self.pairs.columns, column)
        } else {
            (blocks.1, blocks.0, self.pairs.rows, row)
        };
        let listed: u32 = self.scratch.lengths[..owner.rows].iter().sum();
        if listed == 0 {
            return;
        }
        let dense = f64::from(listed) > DENSE * (owner.rows * other.rows) as f64;
        if !dense && f64::from(listed) < SPARSE * owner.rows as f64 {
            add_sparse(simd, self.scratch, owner, other, side);
            return;
        }
        // Taken out while the rest of the scratch is in use.
        let mut buffer = std::mem::take(&mut self.scratch.panels);
        let panels = side.direct_panels(block, &mut buffer);
        if dense {
            add_dense(simd, self.scratch, owner, other.rows, panels);
        } else {
            add_listed(simd, self.scratch, owner, other.rows, panels);
        }
        self.scratch.panels = buffer;
    }
}

impl AddTile<'_, '_> {
    /// Turns similarities into weights, listed by row of the owner.
    #[inline(always)]
    fn weigh<S: Lanes>(&mut self, simd: S, (rows, across): (Block, Block)) {
        let mut reader = Reader::new(self.candidates);
        let mut columns = [0; MAX_BLOCK + GROUP];
        let positives = self.pairs.has_positives(self.tile.0, self.tile.1);
        let w = self.weights;
        let across_negatives = w.negatives.columns(&self.pairs, across);
        let across_positives = w.positives.columns(&self.pairs, across);
        let mut totals = [GroupTotals::default(); 2];
        for r in 0..rows.rows {
            let s = reader.next_row(simd, &mut columns);
            let columns = &columns[..s.len()];
            let position = rows.start + r;
            let (mut first, mut last) = (0, 0);
            if positives {
                let (begin, end) = self.pairs.class_columns(position, self.tile.1);
                first = columns.partition_point(|&c| (c as usize) < begin);
                last = columns.partition_point(|&c| (c as usize) < end);
            }
            if self.kind != Kind::LambdaPos {
                let (scale, lambda) = (w.alpha, w.lambda_neg);
                let curve = Curve { scale, lambda, sign: 1.0, own: w.negatives.row(position) };
                for range in [0..first, last..s.len()] {
                    let (columns, s) = (&columns[range.clone()], &s[range]);
                    self.weigh_run(simd, (r, columns, s), curve, across_negatives, &mut totals[1]);
                }
            }
            if self.kind != Kind::LambdaNeg && first < last {
                let (scale, lambda) = (-w.beta, w.lambda_pos);
                let curve = Curve { scale, lambda, sign: -1.0, own: w.positives.row(position) };
                let (columns, s) = (&columns[first..last], &s[first..last]);
                self.weigh_run(simd, (r, columns, s), curve, across_positives, &mut totals[0]);
            }
        }
        for (kind, totals) in totals.iter().enumerate() {
            self.totals.softplus[kind] += totals.softplus.iter().map(|&x| f64::from(x)).sum::<f64>();
            self.totals.sigmoid[kind] += totals.sigmoid.iter().map(|&x| f64::from(x)).sum::<f64>();
        }
    }

    /// Weighs pairs of one kind in one row of the tile, 16 at a time.
    #[inline(always)]
    fn weigh_run<S: Lanes>(
        &mut self,
        simd: S,
        (row, columns, s): (usize, &[u32], &[f32]),
        curve: Curve,
        across: ShareRun<'_>,
        totals: &mut GroupTotals,
    ) {
        let Curve { scale, lambda, sign, own } = curve;
        for (columns, s) in columns.chunks(GROUP).zip(s.chunks(GROUP)) {
            let (similarity, local) = (padded(s), padded(columns));
            let (mut bound, mut factor) = ([0.0f32; GROUP], [0.0f32; GROUP]);
            // Dense rows have their columns side by side: no gather is needed.
            let start = local[0] as usize;
            let run = columns.len() == GROUP && local[GROUP - 1] as usize == start + GROUP - 1;
            let chunks = across
                .bounds
                .get(start..)
                .and_then(|b| b.first_chunk().zip(across.factors[start..].first_chunk()));
            if let (true, Some((bounds, factors))) = (run, chunks) {
                (bound, factor) = (*bounds, *factors);
            } else {
                for l in 0..columns.len() {
                    bound[l] = across.bounds[columns[l] as usize];
                    factor[l] = across.factors[columns[l] as usize];
                }
            }
            let mut both = [0.0f32; GROUP];
            for l in 0..GROUP {
                // Positives are selected below their bound, negatives above it.
                let own_factor = if sign * similarity[l] > sign * own.bound { own.factor } else { 0.0 };
                let other_factor = if sign * similarity[l] > sign * bound[l] { factor[l] } else { 0.0 };
                both[l] = own_factor + other_factor;
            }
            for filler in &mut both[s.len()..] {
                *filler = 0.0;
            }
            let mut x = [0.0f32; GROUP];
            for l in 0..GROUP {
                x[l] = scale * (similarity[l] - lambda);
            }
            let (sigmoid, e) = logistic(&x);
            // The walk meets each pair once as a row's and once as a column's: it is counted as a row's.
            if self.owner_rows && self.kind == Kind::Gradient {
                let softplus = softplus(&x, &e);
                for l in 0..GROUP {
                    totals.softplus[l] += both[l] * softplus[l];
                    totals.sigmoid[l] += both[l] * sigmoid[l];
                }
            }
            let mut weights = [0.0f32; GROUP];
            if self.kind == Kind::Gradient {
                for l in 0..GROUP {
                    weights[l] = sign * both[l] * sigmoid[l];
                }
            } else {
                // d sigmoid(x) / d lambda = -scale * p (1 - p).
                for l in 0..GROUP {
                    weights[l] = -sign * scale * both[l] * sigmoid[l] * (1.0 - sigmoid[l]);
                }
            }
            let zero = simd.splat_f32s(0.0);
            let mut mask = 0;
            for (part, &weight) in S::as_simd_f32s(&weights).0.iter().enumerate() {
                let other_than_zero = simd.above(weight, zero) | simd.above(zero, weight);
                mask |= other_than_zero << (part * S::F32_LANES);
            }
            let mask = mask as u16;
            self.list(simd, row, &local, &weights, mask);
        }
    }

    #[inline(always)]
    fn list<S: Lanes>(
        &mut self,
        simd: S,
        row: usize,
        columns: &[u32; GROUP],
        weights: &[f32; GROUP],
        mask: u16,
    ) {
        let count = mask.count_ones() as usize;
        let (mut local, mut kept) = ([0; GROUP], [0; GROUP]);
        simd.compress(columns, mask, &mut local);
        simd.compress(bytemuck::cast_ref(weights), mask, &mut kept);
        let kept: [f32; GROUP] = bytemuck::cast(kept);
        if self.owner_rows {
            let length = self.scratch.lengths[row] as usize;
            if let Some(target) = self.scratch.columns[row][length..].first_chunk_mut() {
                *target = local;
            }
            if let Some(target) = self.scratch.weights[row][length..].first_chunk_mut() {
                *target = kept;
            }
            self.scratch.lengths[row] += count as u32;
        }
        if self.owner_columns {
            for (&column, &weight) in local.iter().zip(&kept).take(count) {
                self.scratch.push(column as usize, row, weight);
            }
        }
    }
}

/// A group of values, filled up with zeros.
#[inline(always)]
fn padded<T: Copy + Default>(values: &[T]) -> [T; GROUP] {
    if let Some(whole) = values.first_chunk() {
        return *whole;
    }
    let mut group = [T::default(); GROUP];
    for (lane, value) in group.iter_mut().zip(values) {
        *lane = *value;
    }
    group
}

/// The function of S that weighs one kind of pair in one row: `sigmoid(scale (S - lambda))`.
#[derive(Debug, Clone, Copy)]
struct Curve {
    scale: f32,
    lambda: f32,
    /// -1 for positives.
    sign: f32,
    own: Share,
}

/// Sums of one kind of pair in a tile, by lane.
#[derive(Debug, Clone, Copy, Default)]
struct GroupTotals {
    softplus: [f32; GROUP],
    sigmoid: [f32; GROUP],
}

/// Sigmoid of x, and exp(-|x|) for [`softplus`], to a few units in the last place, without branches.
#[inline(always)]
fn logistic(x: &[f32; GROUP]) -> ([f32; GROUP], [f32; GROUP]) {
    let mut sigmoid = [0.0; GROUP];
    let mut e = [0.0; GROUP];
    for l in 0..GROUP {
        e[l] = exp_negative(x[l].abs());
        let share = 1.0 / (1.0 + e[l]);
        sigmoid[l] = if x[l] >= 0.0 { share } else { e[l] * share };
    }
    (sigmoid, e)
}

/// log(1 + exp(x)) from x and exp(-|x|).
#[inline(always)]
fn softplus(x: &[f32; GROUP], e: &[f32; GROUP]) -> [f32; GROUP] {
    let mut out = [0.0; GROUP];
    for l in 0..GROUP {
        // log(1 + e) = 2 artanh(z), z = e / (2 + e) <= 1/3: the series is cut below 1e-8.
        let z = e[l] / (2.0 + e[l]);
        let z2 = z * z;
        let mut series = 1.0 / 15.0;
        for denominator in [13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
            series = series * z2 + 1.0 / denominator;
        }
        let above = if x[l] > 0.0 { x[l] } else { 0.0 };
        out[l] = above + 2.0 * z * series;
    }
    out
}

/// exp(-x) for x >= 0: two to the rounded quotient, times a polynomial on the remainder.
#[inline(always)]
fn exp_negative(x: f32) -> f32 {
    /// Adding it rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // Below exp(-87) the result is subnormal; no pair is so light that it matters.
    let x = if x < 87.0 { -x } else { -87.0 };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, so that the remainder is exact.
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let p = 1.0
        + r * (1.0
            + r * (0.5
                + r * (0.166_666_65
                    + r * (0.041_665_795 + r * (0.008_333_452 + r * (0.001_398_2 + r * 0.000_198_756_9))))));
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    p * power
}

/// Panels summed at a time: with the 64 dimensions of all rows of a block in the first-level cache, and
/// as many sums as hide the latency of a multiply-add.
const TOGETHER: usize = 4;

/// `sums[r] += sum over listed pairs of weight * other row`; `panels` are the other rows, `[D / 16][depth][16]`.
#[inline(always)]
fn add_listed<S: Lanes>(simd: S, scratch: &mut GradientScratch, owner: Block, depth: usize, panels: &[f32]) {
    let stride = stride(panels.len() / depth);
    let rows = panels.as_chunks::<GROUP>().0;
    for (chunk, panels) in rows.chunks(TOGETHER * depth).enumerate() {
        for r in 0..owner.rows {
            let length = scratch.lengths[r] as usize;
            if length == 0 {
                continue;
            }
            let (columns, weights) = (&scratch.columns[r][..length], &scratch.weights[r][..length]);
            let sums = &mut scratch.sums[r * stride..][..stride];
            let sums = &mut sums.as_chunks_mut::<GROUP>().0[chunk * TOGETHER..];
            if panels.len() == TOGETHER * depth {
                let panels = std::array::from_fn(|p| &panels[p * depth..][..depth]);
                add_panels::<S, TOGETHER>(simd, sums, columns, weights, panels);
            } else {
                for (panel, sums) in panels.chunks_exact(depth).zip(sums.chunks_mut(1)) {
                    add_panels::<S, 1>(simd, sums, columns, weights, [panel]);
                }
            }
        }
    }
}

#[inline(always)]
fn add_panels<S: Lanes, const P: usize>(
    simd: S,
    sums: &mut [[f32; GROUP]],
    columns: &[u32],
    weights: &[f32],
    panels: [&[[f32; GROUP]]; P],
) {
    let parts = GROUP / S::F32_LANES;
    let Some(sums) = sums.first_chunk_mut::<P>() else { return };
    // A group is one or two vectors; the second is dropped where it is one.
    let mut totals = [[simd.splat_f32s(0.0); 2]; P];
    let depth = panels[0].len();
    for (&column, &weight) in columns.iter().zip(weights) {
        let weight = simd.splat_f32s(weight);
        // One comparison for all panels; they are equally long.
        let column = column as usize;
        assert!(column < depth);
        for p in 0..P {
            let values = S::as_simd_f32s(&panels[p][column]).0;
            for part in 0..parts {
                totals[p][part] = simd.mul_add_e_f32s(weight, values[part], totals[p][part]);
            }
        }
    }
    for (sum, totals) in sums.iter_mut().zip(&totals) {
        for (sum, total) in S::as_mut_simd_f32s(sum).0.iter_mut().zip(totals) {
            *sum = simd.add_f32s(*sum, *total);
        }
    }
}

/// The same row by row, from the rows as they came: each is read once from end to end. Where lists are
/// short that is quicker than to go over all of them for every few dimensions.
#[inline(always)]
fn add_sparse<S: Lanes>(simd: S, scratch: &mut GradientScratch, owner: Block, other: Block, side: Side<'_>) {
    let dim = side.dim;
    let stride = stride(dim);
    let whole = dim / GROUP;
    let mut rows: [&[f32]; LIST] = [&[]; LIST];
    for r in 0..owner.rows {
        let length = scratch.lengths[r] as usize;
        if length == 0 {
            continue;
        }
        let (columns, weights) = (&scratch.columns[r][..length], &scratch.weights[r][..length]);
        for (row, &column) in rows.iter_mut().zip(columns) {
            *row = side.row(other.start + column as usize);
        }
        let rows = &rows[..length];
        let sums = scratch.sums[r * stride..][..stride].as_chunks_mut::<GROUP>().0;
        let mut group = 0;
        while group + TOGETHER <= whole {
            add_groups::<S, TOGETHER>(simd, &mut sums[group..], group, rows, weights);
            group += TOGETHER;
        }
        while group < whole {
            add_groups::<S, 1>(simd, &mut sums[group..], group, rows, weights);
            group += 1;
        }
        if let (Some(sum), true) = (sums.get_mut(whole), whole * GROUP < dim) {
            let mut totals = [0.0f32; GROUP];
            for (row, &weight) in rows.iter().zip(weights) {
                for (total, value) in totals.iter_mut().zip(&row[whole * GROUP..]) {
                    *total = weight.mul_add(*value, *total);
                }
            }
            for (sum, total) in sum.iter_mut().zip(&totals) {
                *sum += total;
            }
        }
    }
}

/// The sums of P groups of dimensions from `group` on, `sums[0]` being the first.
#[inline(always)]
fn add_groups<S: Lanes, const P: usize>(
    simd: S,
    sums: &mut [[f32; GROUP]],
    group: usize,
    rows: &[&[f32]],
    weights: &[f32],
) {
    let parts = GROUP / S::F32_LANES;
    let Some(sums) = sums.first_chunk_mut::<P>() else { return };
    // A group is one or two vectors; the second is dropped where it is one.
    let mut totals = [[simd.splat_f32s(0.0); 2]; P];
    for (row, &weight) in rows.iter().zip(weights) {
        let weight = simd.splat_f32s(weight);
        let values = S::as_simd_f32s(&row[group * GROUP..][..P * GROUP]).0;
        for p in 0..P {
            for part in 0..parts {
                totals[p][part] = simd.mul_add_e_f32s(weight, values[p * parts + part], totals[p][part]);
            }
        }
    }
    for (sum, totals) in sums.iter_mut().zip(&totals) {
        for (sum, total) in S::as_mut_simd_f32s(sum).0.iter_mut().zip(totals) {
            *sum = simd.add_f32s(*sum, *total);
        }
    }
}

/// The same as a product of the tile's weights with the other side's rows.
#[inline(always)]
fn add_dense<S: Lanes>(simd: S, scratch: &mut GradientScratch, owner: Block, depth: usize, panels: &[f32]) {
    let stride = stride(panels.len() / depth);
    let panel = depth * GROUP;
    let size = owner.panels() * panel;
    scratch.matrix.grow(size);
    let matrix = &mut scratch.matrix[..size];
    matrix.fill(0.0);
    for r in 0..owner.rows {
        let length = scratch.lengths[r] as usize;
        let line = &mut matrix[r / GROUP * panel..][..panel].as_chunks_mut::<GROUP>().0;
        for (&column, &weight) in scratch.columns[r][..length].iter().zip(&scratch.weights[r][..length]) {
            line[column as usize][r % GROUP] = weight;
        }
    }
    for start in (0..owner.rows).step_by(STRIP) {
        let rows = &scratch.matrix[start / GROUP * panel..][..panel];
        product(simd, rows, start % GROUP, panels, &mut scratch.sums[start * stride..], stride, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::gradient as truth;

    #[test]
    fn logistic_agrees_with_the_truth_over_its_whole_range() {
        for step in -4000..=4000 {
            let x = step as f32 * 0.025;
            let (p, e) = logistic(&[x; GROUP]);
            let (p, q) = (p[0], softplus(&[x; GROUP], &e)[0]);
            let wanted_p = 1.0 / (1.0 + f64::from(-x).exp());
            let wanted_q = truth::softplus(f64::from(x));
            assert!((f64::from(p) / wanted_p - 1.0).abs() < 1e-6 || wanted_p < 1e-37, "sigmoid({x}) = {p}");
            assert!((f64::from(q) / wanted_q - 1.0).abs() < 1e-6 || wanted_q < 1e-37, "softplus({x}) = {q}");
        }
    }
}
