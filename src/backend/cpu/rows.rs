//! One side of a batch as the passes read it: float32 rows, in class order, in blocks.

use half::slice::HalfFloatSliceExt;
use ndarray::ArrayView2;

use super::buffer::Buffer;
use super::product::{Pack, pack_direct, pack_transposed};
use super::simd::{GROUP, Lanes, Level, Work};
use super::tasks::Workers;
use crate::loss::similarity::DUPLICATE;
use crate::loss::{Embeddings, Rows, UnitCheck, check_unit};
use crate::{Error, Result};

/// Most rows of a block; a tile of S is a pair of blocks. 96 rows are six panels, of which the product takes
/// three at once; 64 dimensions of a block (24 kB) fit the L1 cache while lists are summed, and two blocks of
/// D = 512 with their tile fit 1 MB of L2.
pub const MAX_BLOCK: usize = 96;

/// Panels are kept for the whole side up to this size, and packed block by block beyond it
/// (a memory bank is not copied).
const PACKED_BYTES: usize = 128 << 20;

/// The position of a row that takes part in no pair.
pub const NOWHERE: u32 = u32::MAX;

/// A run of rows in class order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    pub start: usize,
    pub rows: usize,
}

impl Block {
    /// Panels of 16 rows it fills.
    pub fn panels(self) -> usize {
        self.rows.div_ceil(GROUP)
    }

    pub fn range(self) -> std::ops::Range<usize> {
        self.start..self.start + self.rows
    }
}

/// The order of one side's rows, and everything else that follows from the labels alone.
#[derive(Debug, Default)]
pub struct Order {
    /// Labels of the caller's rows, to notice when nothing changed.
    labels: Vec<i64>,
    block_rows: usize,
    /// Caller's row of each position; rows with a negative label have no position.
    pub rows: Vec<u32>,
    /// Labels by position, ascending.
    pub sorted: Vec<i64>,
    pub blocks: Vec<Block>,
}

impl Order {
    /// Sorts rows by label. Classes of at most a quarter of a block do not straddle two blocks, so that their
    /// pairs lie in diagonal tiles. Blocks smaller than [`MAX_BLOCK`] are few, and are filled instead.
    pub fn by_class(&mut self, labels: &[i64], block_rows: usize) {
        if self.labels == labels && self.block_rows == block_rows {
            return;
        }
        self.labels.clear();
        self.labels.extend_from_slice(labels);
        self.block_rows = block_rows;
        self.rows.clear();
        self.rows.extend((0..labels.len() as u32).filter(|&i| labels[i as usize] >= 0));
        // Ties broken by index: unique, hence reproducible.
        if !self.rows.is_sorted_by_key(|&i| labels[i as usize]) {
            self.rows.sort_unstable_by_key(|&i| (labels[i as usize], i));
        }
        self.sorted.clear();
        self.sorted.extend(self.rows.iter().map(|&i| labels[i as usize]));

        self.blocks.clear();
        let mut start = 0;
        while start < self.rows.len() {
            let mut end = (start + block_rows).min(self.rows.len());
            if end < self.rows.len() && block_rows == MAX_BLOCK {
                let class = self.sorted[end];
                let first = self.sorted.partition_point(|&label| label < class);
                let last = self.sorted.partition_point(|&label| label <= class);
                if first > start && first < end && last - first <= block_rows / 4 {
                    end = first;
                }
            }
            self.blocks.push(Block { start, rows: end - start });
            start = end;
        }
    }

    /// The position of each of the caller's rows, by row; [`NOWHERE`] for rows that have none.
    pub fn positions(&self) -> Vec<u32> {
        let mut positions = vec![NOWHERE; self.labels.len()];
        for (position, &row) in (0..).zip(&self.rows) {
            positions[row as usize] = position;
        }
        positions
    }

    /// Caller's rows that have no position.
    fn ignored(&self) -> impl Iterator<Item = usize> {
        self.labels.iter().enumerate().filter(|(_, label)| **label < 0).map(|(row, _)| row)
    }

    /// Whether it was made by class from these labels.
    pub fn is_of(&self, labels: &[i64]) -> bool {
        self.labels == labels
    }

    /// Bytes its buffers hold.
    pub fn bytes(&self) -> usize {
        self.labels.capacity() * 8
            + self.rows.capacity() * 4
            + self.sorted.capacity() * 8
            + self.blocks.capacity() * 16
    }
}

/// Buffers of one side that live from call to call.
#[derive(Debug, Default)]
pub struct SideBuffers {
    pub order: Order,
    /// Half-precision rows, converted.
    converted: Vec<f32>,
    /// Panels of all blocks, if they are kept.
    packed: Buffer,
    /// Panels over the dimensions ([`pack_direct`]), if they are kept.
    direct: Buffer,
    /// Product of every row with itself, by position, with the bits that S has there.
    squares: Vec<f32>,
    /// Similarity from which a positive of each row may be a duplicate, by position.
    duplicate: Vec<f32>,
    /// Sums of the rows of each block, `[blocks, D]`, and of all rows that take part in pairs.
    block_sums: Vec<f64>,
    sum: Vec<f64>,
    /// Sum of `squares`.
    square_sum: f64,
}

/// Rows ready for the passes.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    pub order: &'a Order,
    pub dim: usize,
    values: &'a [f32],
    packed: &'a [f32],
    direct: &'a [f32],
    /// Sum of all rows that take part in pairs, `[D]`.
    pub sum: &'a [f64],
    /// Sum of their squares.
    pub square_sum: f64,
    /// Bounds by position: a pair of one class that reaches those of both rows is a duplicate (SPEC 1).
    pub duplicate: &'a [f32],
}

impl<'a> Side<'a> {
    /// The row at a position in class order.
    #[inline(always)]
    pub fn row(&self, position: usize) -> &'a [f32] {
        let row = self.order.rows[position] as usize;
        &self.values[row * self.dim..][..self.dim]
    }

    /// Panels of a block, from the kept ones or packed into `buffer`.
    pub fn panels<'b>(&self, block: usize, buffer: &'b mut PanelBuffer) -> &'b [f32]
    where
        'a: 'b,
    {
        let Block { start, rows } = self.order.blocks[block];
        let size = self.order.blocks[block].panels() * self.dim * GROUP;
        if !self.packed.is_empty() {
            return &self.packed[self.offset(block)..][..size];
        }
        if buffer.block != Some(block) {
            buffer.panels.grow(size);
            pack_transposed(|i| self.row(start + i), rows, self.dim, &mut buffer.panels[..size]);
            buffer.block = Some(block);
        }
        &buffer.panels[..size]
    }

    /// Panels of a block over its dimensions, `[D / 16][rows][16]`, kept ones or packed into `buffer`.
    pub fn direct_panels<'b>(&self, block: usize, buffer: &'b mut Buffer) -> &'b [f32]
    where
        'a: 'b,
    {
        let Block { start, rows } = self.order.blocks[block];
        let stride = self.dim.next_multiple_of(GROUP);
        if !self.direct.is_empty() {
            return &self.direct[block * self.order.block_rows * stride..][..rows * stride];
        }
        buffer.grow(rows * stride);
        pack_direct(|i| self.row(start + i), 0..rows, rows, &mut buffer[..rows * stride]);
        &buffer[..rows * stride]
    }

    /// Where the kept panels of a block begin. Blocks before the last have room for a full one.
    fn offset(&self, block: usize) -> usize {
        block * self.order.block_rows.div_ceil(GROUP) * self.dim * GROUP
    }
}

/// Panels of the block that was packed last.
#[derive(Debug, Default)]
pub struct PanelBuffer {
    panels: Buffer,
    block: Option<usize>,
}

impl PanelBuffer {
    /// Forgets the block, because another side or other values come next.
    pub fn reset(&mut self) {
        self.block = None;
    }

    pub fn bytes(&self) -> usize {
        self.panels.bytes()
    }
}

impl SideBuffers {
    pub fn bytes(&self) -> usize {
        let floats = self.converted.capacity() * 4 + self.packed.bytes() + self.direct.bytes();
        let doubles = self.block_sums.capacity() + self.sum.capacity();
        let of_rows = self.squares.capacity() + self.duplicate.capacity();
        self.order.bytes() + floats + doubles * 8 + of_rows * 4
    }

    /// Checks the rows, converts and packs them. `order` must have been set for these rows.
    ///
    /// # Errors
    /// `NotFinite` or `NotUnit` of the first bad row.
    pub fn prepare(
        &mut self,
        name: &'static str,
        rows: &Rows<'_>,
        check: UnitCheck,
        workers: &Workers,
    ) -> Result<()> {
        let size = rows.embeddings.rows() * rows.embeddings.dim();
        let dim = rows.embeddings.dim();
        match &rows.embeddings {
            Embeddings::F32(_) => {}
            Embeddings::F16(view) => {
                grow(&mut self.converted, size);
                contiguous(name, view)?.convert_to_f32_slice(&mut self.converted[..size]);
            }
            Embeddings::Bf16(view) => {
                grow(&mut self.converted, size);
                contiguous(name, view)?.convert_to_f32_slice(&mut self.converted[..size]);
            }
        }
        let values = values(name, rows, &self.converted)?;
        let order = &self.order;
        let panel_floats = order.block_rows.div_ceil(GROUP) * GROUP * dim;
        let stride = dim.next_multiple_of(GROUP);
        let block_floats = order.block_rows * stride;
        // All blocks but the last have the room of a full one.
        let (full, last) = match order.blocks.split_last() {
            Some((last, full)) => (full.len(), *last),
            None => (0, Block { start: 0, rows: 0 }),
        };
        let whole = full * panel_floats + last.panels() * dim * GROUP;
        let kept = whole > 0 && whole * 4 <= PACKED_BYTES;
        if kept {
            self.packed.resize(whole);
            self.direct.resize(full * block_floats + last.rows * stride);
        } else {
            self.packed = Buffer::default();
            self.direct = Buffer::default();
        }
        self.squares.resize(order.rows.len(), 0.0);
        self.block_sums.resize(order.blocks.len() * dim, 0.0);

        let mut packed = self.packed.chunks_mut(panel_floats.max(1));
        let mut direct = self.direct.chunks_mut(block_floats.max(1));
        let mut squares = self.squares.as_mut_slice();
        let parts = order.blocks.iter().zip(self.block_sums.chunks_mut(dim)).map(|(block, sums)| {
            let own = squares.split_off_mut(..block.rows).unwrap_or_default();
            let rows = &order.rows[block.range()];
            (rows, own, sums, packed.next(), direct.next())
        });
        workers.for_each_item(parts, |(rows, squares, sums, packed, direct)| {
            Level::best().dispatch(PrepareBlock { values, dim, rows, squares, sums, packed, direct });
        });
        if check == UnitCheck::Check {
            self.check(name, rows, values)?;
        }
        self.sum.clear();
        self.sum.resize(dim, 0.0);
        for sums in self.block_sums.chunks(dim) {
            for (sum, part) in self.sum.iter_mut().zip(sums) {
                *sum += part;
            }
        }
        let bound = |square: &f32| (DUPLICATE * f64::from(*square)) as f32;
        self.duplicate.clear();
        self.duplicate.extend(self.squares.iter().map(bound));
        self.square_sum = self.squares.iter().map(|&square| f64::from(square)).sum();
        Ok(())
    }

    /// The side as prepared last; `rows` must be the rows it was prepared from.
    ///
    /// # Errors
    /// `NotContiguous`.
    pub fn prepared<'a>(&'a self, name: &'static str, rows: &'a Rows<'_>) -> Result<Side<'a>> {
        Ok(Side {
            order: &self.order,
            dim: rows.embeddings.dim(),
            values: values(name, rows, &self.converted)?,
            packed: &self.packed,
            direct: &self.direct,
            sum: &self.sum,
            square_sum: self.square_sum,
            duplicate: &self.duplicate,
        })
    }

    /// Refuses the first row, in the caller's order, that is not finite or not of unit length.
    fn check(&self, name: &'static str, rows: &Rows<'_>, values: &[f32]) -> Result<()> {
        let tolerance = rows.embeddings.norm_tolerance();
        let check = |row: usize, square| check_unit(name, row, square, tolerance);
        let bad = |&(row, square): &(usize, f64)| check(row, square).is_err();
        let in_pairs = self
            .order
            .rows
            .iter()
            .zip(&self.squares)
            .map(|(&row, &square)| (row as usize, f64::from(square)));
        let dim = rows.embeddings.dim();
        // Squares of finite entries can overflow f32. Such a row is finite, so every backend reports its
        // norm.
        let in_pairs = in_pairs.map(|(row, square)| match square.is_finite() {
            true => (row, square),
            false => (row, double_square_sum(&values[row * dim..][..dim])),
        });
        let ignored = self.order.ignored().map(|row| (row, square_sum(&values[row * dim..][..dim])));
        match in_pairs.chain(ignored).filter(bad).min_by_key(|(row, _)| *row) {
            Some((row, square)) => check(row, square),
            None => Ok(()),
        }
    }
}

/// Computes everything that needs the rows of one block, while they are in the cache.
struct PrepareBlock<'a, 'b> {
    values: &'a [f32],
    dim: usize,
    /// Caller's rows of the block.
    rows: &'a [u32],
    squares: &'b mut [f32],
    sums: &'b mut [f64],
    /// Panels, where they are kept.
    packed: Option<&'b mut [f32]>,
    direct: Option<&'b mut [f32]>,
}

impl Work for PrepareBlock<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(mut self, simd: S) {
        let Self { values, dim, rows, .. } = self;
        let row = |i: usize| &values[rows[i] as usize * dim..][..dim];
        self.sums.fill(0.0);
        // A temporary panel, if panels are not kept.
        let mut passing = if self.packed.is_none() { vec![0.0; dim * GROUP] } else { Vec::new() };
        for start in (0..rows.len()).step_by(GROUP) {
            let range = start..(start + GROUP).min(rows.len());
            for i in range.clone() {
                for (sum, value) in self.sums.iter_mut().zip(row(i)) {
                    *sum += f64::from(*value);
                }
            }
            let panels = match &mut self.packed {
                Some(packed) => &mut packed[start * dim..][..dim * GROUP],
                None => &mut passing,
            };
            let count = range.len();
            Pack { rows: |i: usize| row(start + i), count, depth: dim, panels }.run(simd);
            let squares = squares(simd, panels);
            self.squares[range.clone()].copy_from_slice(&squares[..count]);
            if let Some(direct) = &mut self.direct {
                let panels = &mut direct[..rows.len() * dim.next_multiple_of(GROUP)];
                pack_direct(row, range, rows.len(), panels);
            }
        }
    }
}

/// Products of the rows of a panel with themselves, by the chain of [`product`](super::product::product): the
/// bits equal those in S of a row with itself.
#[inline(always)]
fn squares<S: Lanes>(simd: S, panel: &[f32]) -> [f32; GROUP] {
    let mut sums = [0.0; GROUP];
    for line in panel.as_chunks::<GROUP>().0 {
        for (sum, value) in S::as_mut_simd_f32s(&mut sums).0.iter_mut().zip(S::as_simd_f32s(line).0) {
            *sum = simd.mul_add_e_f32s(*value, *value, *sum);
        }
    }
    sums
}

/// All values in f32: the caller's own, or `converted`.
fn values<'a>(name: &'static str, rows: &'a Rows<'_>, converted: &'a [f32]) -> Result<&'a [f32]> {
    match &rows.embeddings {
        Embeddings::F32(view) => contiguous(name, view),
        Embeddings::F16(view) => Ok(&converted[..view.len()]),
        Embeddings::Bf16(view) => Ok(&converted[..view.len()]),
    }
}

/// The rows as one slice.
pub fn contiguous<'a, T>(name: &'static str, view: &'a ArrayView2<'_, T>) -> Result<&'a [T]> {
    view.as_slice().ok_or(Error::NotContiguous { rows: name })
}

/// Sum of squares: 16 f32 chains, summed in f64; if they overflow, in f64 throughout.
#[inline(always)]
pub fn square_sum(row: &[f32]) -> f64 {
    let (whole, tail) = row.as_chunks::<GROUP>();
    let mut sums = [0.0f32; GROUP];
    for chunk in whole {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += value * value;
        }
    }
    let sum = sums.iter().map(|&x| f64::from(x)).sum::<f64>() + double_square_sum(tail);
    if sum.is_finite() { sum } else { double_square_sum(row) }
}

/// Sum of squares in f64 throughout: finite if the row is.
pub fn double_square_sum(row: &[f32]) -> f64 {
    row.iter().map(|&x| f64::from(x) * f64::from(x)).sum()
}

/// Makes a buffer at least `length` long; new entries are zero.
pub fn grow<T: Copy + Default>(buffer: &mut Vec<T>, length: usize) {
    if buffer.len() < length {
        buffer.resize(length, T::default());
    }
}
