//! What one tile adds to the gradient of its owner, one of its two blocks: weights times the other's rows.
//!
//! Weights are applied as lists of pairs or, where the tile is dense, as a matrix product. Both give the same
//! bits: the choice depends on the owner's rows, and in a part of a batch the owner has other rows.

use super::buffer::Buffer;
use super::pairs::Pairs;
use super::product::{DEPTH, STRIP, product};
use super::rows::{Block, MAX_BLOCK, Side};
use super::simd::{GROUP, Lanes, Work, padded};
use super::tile::{Candidates, MAX_GROUPS};

/// Share of a tile's pairs from which a product is faster than lists. A listed pair costs about three times
/// one in a product: it loads its row anew, while the product keeps rows in registers.
const DENSE: f64 = 0.35;

/// Listed pairs per row below which [`add_sparse`] sums each row from end to end.
const SPARSE: f64 = 4.0;

/// A range of groups of 16 dimensions: the part of the gradient that one task sums.
#[derive(Debug, Clone, Copy)]
pub struct Dimensions {
    pub first: usize,
    pub end: usize,
}

impl Dimensions {
    fn groups(self) -> usize {
        self.end - self.first
    }
}

/// Buffers of one thread.
#[derive(Debug)]
pub struct GradientScratch {
    /// Weighted pairs of each of the owner's rows: rows of the other block, weights, number of pairs.
    columns: Vec<[u32; LIST]>,
    weights: Vec<[f32; LIST]>,
    lengths: [u32; MAX_BLOCK],
    /// Sums of the owner's rows over the task's dimensions; the number of rows is rounded up to whole strips.
    sums: Buffer,
    /// The tile's weights as a matrix, and the other side's rows as panels over D if the side keeps none.
    matrix: Buffer,
    panels: Buffer,
}

/// Floats between the sums of two rows. An odd number of groups: with a power of two, the same dimensions of
/// all rows would fall into a few cache sets.
fn stride(dim: usize) -> usize {
    (dim.div_ceil(GROUP) | 1) * GROUP
}

// A tile's product has one chain per sum, so zero weights change no bit.
const _: () = assert!(MAX_BLOCK <= DEPTH);

/// Room in the list of a row: lists are written 16 entries at a time.
const LIST: usize = MAX_BLOCK + GROUP;

impl Default for GradientScratch {
    fn default() -> Self {
        Self {
            columns: Vec::new(),
            weights: Vec::new(),
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
        self.columns.capacity() * size_of::<[u32; LIST]>()
            + self.weights.capacity() * size_of::<[f32; LIST]>()
            + buffers.iter().map(|buffer| buffer.bytes()).sum::<usize>()
    }

    /// Zeroes the sums of a block of `rows` rows over the dimensions `part`.
    pub fn begin(&mut self, rows: usize, part: Dimensions) {
        let length = rows.next_multiple_of(STRIP) * stride(part.groups() * GROUP);
        self.sums.grow(length);
        self.sums[..length].fill(0.0);
    }

    /// The sum of a row over the dimensions `part`; `dim` is D.
    pub fn sum(&self, row: usize, part: Dimensions, dim: usize) -> &[f32] {
        let length = dim.min(part.end * GROUP) - part.first * GROUP;
        &self.sums[row * stride(part.groups() * GROUP)..][..length]
    }

    fn clear_lists(&mut self, rows: usize) {
        if self.columns.len() < rows {
            self.columns.resize(rows, [0; LIST]);
            self.weights.resize(rows, [0.0; LIST]);
        }
        self.lengths.fill(0);
    }

    /// Appends the first `count` of a group of pairs to the list of `row`.
    #[inline(always)]
    fn append(&mut self, row: usize, columns: &[u32; GROUP], weights: &[f32; GROUP], count: usize) {
        let length = self.lengths[row] as usize;
        if let Some(target) = self.columns[row][length..].first_chunk_mut() {
            *target = *columns;
        }
        if let Some(target) = self.weights[row][length..].first_chunk_mut() {
            *target = *weights;
        }
        self.lengths[row] += count as u32;
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
    /// The tile's candidates, with weights for values.
    pub candidates: Candidates<'b>,
    /// Number of weights that are not zero.
    pub selected: usize,
    /// Whether the owner is the block of rows, the block of columns or, on the diagonal, both.
    pub owner_rows: bool,
    pub owner_columns: bool,
    pub part: Dimensions,
    pub scratch: &'b mut GradientScratch,
}

impl Work for AddTile<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(mut self, simd: S) {
        let (row, column) = self.tile;
        let blocks = (self.pairs.rows.order.blocks[row], self.pairs.columns.order.blocks[column]);
        let (owner, other, side, block) = if self.owner_rows {
            (blocks.0, blocks.1, self.pairs.columns, column)
        } else {
            (blocks.1, blocks.0, self.pairs.rows, row)
        };
        // On the diagonal a pair belongs to both of its rows.
        let listed = self.selected * if self.owner_rows && self.owner_columns { 2 } else { 1 };
        if listed == 0 {
            return;
        }
        let dense = listed as f64 > DENSE * (owner.rows * other.rows) as f64;
        if dense {
            self.fill_matrix(simd, blocks);
        } else {
            self.list(simd, blocks);
            if (listed as f64) < SPARSE * owner.rows as f64 {
                add_sparse(simd, self.scratch, owner, other, side, self.part);
                return;
            }
        }
        // Moved out, as the rest of the scratch is borrowed below.
        let mut buffer = std::mem::take(&mut self.scratch.panels);
        let size = other.rows * GROUP;
        let panels = &side.direct_panels(block, &mut buffer)[self.part.first * size..self.part.end * size];
        if dense {
            add_dense(simd, self.scratch, owner, other.rows, panels);
        } else {
            add_listed(simd, self.scratch, owner, other.rows, panels);
        }
        self.scratch.panels = buffer;
    }
}

impl AddTile<'_, '_> {
    /// Lists the pairs by row of the owner.
    #[inline(always)]
    fn list<S: Lanes>(&mut self, simd: S, (rows, across): (Block, Block)) {
        let mut reader = self.candidates;
        let mut columns = [0; MAX_BLOCK + GROUP];
        self.scratch.clear_lists(if self.owner_rows { rows.rows } else { across.rows });
        for r in 0..rows.rows {
            let weights = reader.next_row(simd, &mut columns);
            for (columns, weights) in columns[..weights.len()].chunks(GROUP).zip(weights.chunks(GROUP)) {
                let (columns, weights) = (padded(columns), padded(weights));
                let mask = simd.other_than_zero(&weights);
                let count = mask.count_ones() as usize;
                let (mut local, mut kept) = ([0; GROUP], [0; GROUP]);
                simd.compress(&columns, mask, &mut local);
                simd.compress(bytemuck::cast_ref(&weights), mask, &mut kept);
                let kept: [f32; GROUP] = bytemuck::cast(kept);
                if self.owner_rows {
                    self.scratch.append(r, &local, &kept, count);
                }
                if self.owner_columns {
                    for (&column, &weight) in local.iter().zip(&kept).take(count) {
                        self.scratch.push(column as usize, r, weight);
                    }
                }
            }
        }
    }

    /// Lays the weights out as a matrix in panels of 16 rows of the owner:
    /// `matrix[i / 16][other row][i % 16]`.
    #[inline(always)]
    fn fill_matrix<S: Lanes>(&mut self, simd: S, (rows, across): (Block, Block)) {
        let (owner, depth) = if self.owner_rows { (rows, across.rows) } else { (across, rows.rows) };
        let size = owner.panels() * depth * GROUP;
        self.scratch.matrix.grow(size);
        let matrix = &mut self.scratch.matrix[..size];
        if self.owner_columns {
            matrix.fill(0.0);
        }
        let matrix = matrix.as_chunks_mut::<GROUP>().0;
        let mut reader = self.candidates;
        let mut lines = Lines([[[0.0; GROUP]; GROUP]; MAX_GROUPS]);
        for start in (0..rows.rows).step_by(GROUP) {
            for r in start..(start + GROUP).min(rows.rows) {
                reader.next_lines(simd, |group, _, line| {
                    if self.owner_rows {
                        lines.0[group][r - start] = line;
                    }
                    if self.owner_columns {
                        // A line of the tile is a line of the matrix. On the diagonal, what earlier rows have
                        // added to this line is in groups before this one.
                        matrix[group * depth + r] = line;
                    }
                });
            }
            if !self.owner_rows {
                continue;
            }
            for (group, lines) in lines.0.iter_mut().enumerate().take(across.panels()) {
                let panel = &mut matrix[start / GROUP * depth..][..depth];
                // On the diagonal both triangles write to a line; where one has an entry, the other is zero.
                store_transposed(simd, lines, &mut panel[group * GROUP..], self.owner_columns);
                lines.fill([0.0; GROUP]);
            }
        }
    }
}

/// Transposes 16 lines into the first 16 lines of `panel`, or as many as it has; `adds` to what they hold.
#[inline(always)]
fn store_transposed<S: Lanes>(
    simd: S,
    lines: &[[f32; GROUP]; GROUP],
    panel: &mut [[f32; GROUP]],
    adds: bool,
) {
    for (row, column) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
        let part =
            |l: usize| -> [f32; 8] { lines[row + l][column..].first_chunk().copied().unwrap_or_default() };
        let square = [part(0), part(1), part(2), part(3), part(4), part(5), part(6), part(7)];
        for (line, values) in panel.iter_mut().skip(column).zip(&simd.transpose(square)) {
            let Some(line) = line[row..].first_chunk_mut::<8>() else { continue };
            if adds {
                line.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
            } else {
                *line = *values;
            }
        }
    }
}

/// Sixteen rows of a tile, by groups of columns.
#[repr(align(64))]
struct Lines([[[f32; GROUP]; GROUP]; MAX_GROUPS]);

/// Panels summed at a time. Their 64 dimensions of a block's rows fit the L1 cache, and their sums are enough
/// to hide the latency of a multiply-add.
const TOGETHER: usize = 4;

/// `sums[r] += sum over listed pairs of weight * other row`; `panels` are the other rows,
/// `[D / 16][depth][16]`.
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
        // One bounds check for all panels, which are equally long.
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

/// As [`add_listed`], but from the rows as given, each read once from end to end. With short lists this is
/// faster than passing over all lists for every few dimensions.
#[inline(always)]
fn add_sparse<S: Lanes>(
    simd: S,
    scratch: &mut GradientScratch,
    owner: Block,
    other: Block,
    side: Side<'_>,
    part: Dimensions,
) {
    let dim = side.dim;
    let stride = stride(part.groups() * GROUP);
    let whole = part.end.min(dim / GROUP);
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
        let mut group = part.first;
        while group + TOGETHER <= whole {
            add_groups::<S, TOGETHER>(simd, &mut sums[group - part.first..], group, rows, weights);
            group += TOGETHER;
        }
        while group < whole {
            add_groups::<S, 1>(simd, &mut sums[group - part.first..], group, rows, weights);
            group += 1;
        }
        if let (Some(sum), true) = (sums.get_mut(whole - part.first), whole < part.end) {
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

/// As [`add_listed`], but as a product of the tile's weight matrix with the other side's rows. Zeros change
/// no bit of a chain that begins at 0, so the sums equal those of the lists.
#[inline(always)]
fn add_dense<S: Lanes>(simd: S, scratch: &mut GradientScratch, owner: Block, depth: usize, panels: &[f32]) {
    let stride = stride(panels.len() / depth);
    let panel = depth * GROUP;
    for start in (0..owner.rows).step_by(STRIP) {
        let rows = &scratch.matrix[start / GROUP * panel..][..panel];
        product(simd, rows, start % GROUP, panels, &mut scratch.sums[start * stride..], stride, true);
    }
}
