//! The pairs of a batch: two sides in class order, the columns of each row's class, rows on both sides.

use super::rows::{MAX_BLOCK, NOWHERE, Order, Side, SideBuffers};
use super::simd::GROUP;
use super::tasks::Workers;
use crate::Result;
use crate::loss::{Batch, Identity, UnitCheck};

/// Which pairs a batch is made of, and where to find their rows.
#[derive(Clone, Copy)]
pub struct Pairs<'a> {
    pub rows: Side<'a>,
    pub columns: Side<'a>,
    /// Both sides are the same rows: only tiles and entries above the diagonal are visited.
    pub square: bool,
    /// Positions of the columns of each row's class, by position of the row.
    pub classes: &'a [(u32, u32)],
    /// Position of the column that is the row itself, by position of the row; empty if unknown.
    pub identity: &'a [u32],
}

/// The side that a walk over the pairs sums for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    Rows,
    Columns,
}

impl<'a> Pairs<'a> {
    pub fn side(&self, owner: Owner) -> Side<'a> {
        match owner {
            Owner::Rows => self.rows,
            Owner::Columns => self.columns,
        }
    }

    /// Local columns `first..last` of block `column` that have the class of the row at position `i`.
    pub fn class_columns(&self, i: usize, column: usize) -> (usize, usize) {
        let block = self.columns.order.blocks[column];
        let (first, last) = self.classes[i];
        let local =
            |position: u32| (position as usize).clamp(block.start, block.start + block.rows) - block.start;
        (local(first), local(last))
    }

    /// Local column of block `column` that is the row at position `i` itself.
    pub fn itself(&self, i: usize, column: usize) -> Option<usize> {
        let block = self.columns.order.blocks[column];
        let local = (*self.identity.get(i)? as usize).checked_sub(block.start)?;
        (local < block.rows).then_some(local)
    }

    /// Whether a tile holds pairs of one class.
    pub fn has_positives(&self, row: usize, column: usize) -> bool {
        let rows = self.rows.order.blocks[row].range();
        // Classes ascend with the rows, so the first and the last row bound the columns.
        let (first, _) = self.class_columns(rows.start, column);
        let (_, last) = self.class_columns(rows.end - 1, column);
        first < last
    }
}

/// Buffers of both sides that live from call to call.
#[derive(Debug, Default)]
pub struct Sides {
    rows: SideBuffers,
    columns: SideBuffers,
    classes: Vec<(u32, u32)>,
    identity: Vec<u32>,
}

impl Sides {
    /// Orders both sides by class, then checks, converts and packs their rows.
    ///
    /// # Errors
    /// `NotFinite` or `NotUnit` of the first bad row.
    pub fn set(&mut self, batch: &Batch<'_>, workers: &Workers) -> Result<()> {
        self.rows.order.by_class(batch.anchors.labels, block_rows(batch.anchors.labels.len()));
        if let Some(references) = &batch.references {
            self.columns.order.by_class(references.labels, block_rows(references.labels.len()));
        }
        self.prepare(batch, batch.check, workers)?;
        let rows = &self.rows.order;
        let columns = if batch.is_square() { rows } else { &self.columns.order };
        find_classes(&rows.sorted, &columns.sorted, &mut self.classes);
        self.identity.clear();
        if !batch.is_square() && batch.identity != Identity::ByValue {
            let positions = columns.positions();
            let of = |row: &u32| {
                batch.identity.of(*row as usize).map_or(NOWHERE, |reference| positions[reference])
            };
            self.identity.extend(rows.rows.iter().map(of));
        }
        Ok(())
    }

    /// Checks, converts and packs the rows again, in the existing order.
    ///
    /// # Errors
    /// As [`set`](Self::set).
    pub fn prepare(&mut self, batch: &Batch<'_>, check: UnitCheck, workers: &Workers) -> Result<()> {
        self.rows.prepare("anchors", &batch.anchors, check, workers)?;
        if let Some(references) = &batch.references {
            self.columns.prepare("references", references, check, workers)?;
        }
        Ok(())
    }

    /// The orders of rows and columns; in the square form the columns' order is a leftover of another batch.
    pub fn orders(&self) -> (&Order, &Order) {
        (&self.rows.order, &self.columns.order)
    }

    /// Whether the orders were made from the labels of `batch`.
    pub fn are_of(&self, batch: &Batch<'_>) -> bool {
        self.rows.order.is_of(batch.anchors.labels)
            && batch.references.is_none_or(|rows| self.columns.order.is_of(rows.labels))
    }

    /// The pairs of `batch`, which must be the batch prepared last.
    ///
    /// # Errors
    /// `NotContiguous`.
    pub fn pairs<'a>(&'a self, batch: &'a Batch<'_>) -> Result<Pairs<'a>> {
        let rows = self.rows.prepared("anchors", &batch.anchors)?;
        let columns = match &batch.references {
            None => rows,
            Some(references) => self.columns.prepared("references", references)?,
        };
        let Self { classes, identity, .. } = self;
        Ok(Pairs { rows, columns, square: batch.is_square(), classes, identity })
    }

    pub fn bytes(&self) -> usize {
        let indices = self.classes.capacity() * 8 + self.identity.capacity() * 4;
        self.rows.bytes() + self.columns.bytes() + indices
    }
}

/// Rows of a block for a side of `count` rows. A small batch has two blocks, so that two threads have work.
fn block_rows(count: usize) -> usize {
    count.div_ceil(2).next_multiple_of(GROUP).min(MAX_BLOCK)
}

/// Positions among the columns of each row's class: both sides ascend, so one walk finds them.
fn find_classes(rows: &[i64], columns: &[i64], classes: &mut Vec<(u32, u32)>) {
    classes.clear();
    let (mut first, mut last) = (0, 0);
    for label in rows {
        while first < columns.len() && columns[first] < *label {
            first += 1;
        }
        last = last.max(first);
        while last < columns.len() && columns[last] == *label {
            last += 1;
        }
        classes.push((first as u32, last as u32));
    }
}
