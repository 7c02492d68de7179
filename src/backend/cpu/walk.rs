//! The walk over all weighted pairs, block by block of the rows they are summed into: the gradient, and the
//! threshold gradient.
//!
//! A task sums one block of rows, or some dimensions of it, and visits the block's tiles in order of the
//! other side. So every sum has one order, whatever the thread count and whichever tiles were kept.

use std::sync::Mutex;

use ndarray::Array2;

use super::Scratch;
use super::gradient::{AddTile, Dimensions};
use super::pairs::Owner;
use super::rows::Side;
use super::simd::{GROUP, Level};
use super::tasks::{Workers, lock};
use super::tiles::{Known, Tiles};
use super::weigh::{Kind, Totals};

/// Fewest dimensions that are worth a task of their own.
const TASK_DIMENSIONS: usize = 64;

/// A walk over all weighted pairs, block by block of their owner.
pub struct Walk<'a> {
    pub known: Known<'a>,
    pub tiles: &'a Tiles,
    pub workers: Workers<'a>,
    pub scratch: &'a [Mutex<Scratch>],
    pub task_sums: &'a mut Vec<Mutex<TaskSums>>,
}

/// Sums of one task of a walk, or of the whole walk.
#[derive(Debug, Clone, Copy, Default)]
pub struct TaskSums {
    /// Sum of the values that `finish` returned.
    pub sum: f64,
    /// Sums over the pairs, each counted once.
    pub totals: Totals,
}

impl Walk<'_> {
    /// Number of ranges of dimensions that each block is divided into, so that a small batch keeps all
    /// threads busy.
    fn parts(&self, owner: Owner) -> usize {
        let Side { order, dim, .. } = self.known.pairs.side(owner);
        let blocks = order.blocks.len().max(1);
        // A tile that is not kept would be swept again for each part.
        if self.workers.count() <= blocks || !self.tiles.all_kept() {
            return 1;
        }
        self.workers.count().div_ceil(blocks).min(dim.div_ceil(TASK_DIMENSIONS))
    }

    /// Sums weighted rows for every row of the owner, in at most `parts` ranges of dimensions. `finish` gets a row's
    /// position, first dimension and sum. The values it returns, and the tiles' totals, are added up in a
    /// fixed order.
    pub fn run(
        &mut self,
        owner: Owner,
        kind: Kind,
        parts: usize,
        finish: impl Fn(usize, usize, &[f32]) -> f64 + Sync,
    ) -> TaskSums {
        let Side { order, dim, .. } = self.known.pairs.side(owner);
        let groups = dim.div_ceil(GROUP);
        let size = groups.div_ceil(parts).next_multiple_of(TASK_DIMENSIONS / GROUP);
        // Ranges of this size may be fewer; none is empty.
        let parts = groups.div_ceil(size);
        let tasks = order.blocks.len() * parts;
        self.task_sums.resize_with(tasks, Mutex::default);
        let Self { known, tiles, workers, scratch, task_sums } = &*self;
        let (side, pairs) = (self.known.pairs.side(owner), known.pairs);
        workers.for_each(tasks, scratch, |task, scratch| {
            let block = task / parts;
            let first = task % parts * size;
            let part = Dimensions { first, end: (first + size).min(groups) };
            let rows = side.order.blocks[block];
            scratch.gradient.begin(rows.rows, part);
            let mut sums = TaskSums::default();
            tiles.each_of(&pairs, owner, block, |index, owner_rows, owner_columns| {
                let tile = tiles.position(index);
                if kind == Kind::LambdaPos && !pairs.has_positives(tile.0, tile.1) {
                    return;
                }
                let Scratch { tile: tile_scratch, gradient: scratch, .. } = scratch;
                tiles.with_weights(known, kind, index, tile_scratch, |candidates, weighed| {
                    let selected = weighed.pairs;
                    // In the square form a tile is visited for its rows and its columns; count it once.
                    if part.first == 0 && (owner_columns || !pairs.square) {
                        sums.totals.add(&weighed.totals);
                    }
                    Level::best().dispatch(AddTile {
                        pairs,
                        tile,
                        candidates,
                        selected,
                        owner_rows,
                        owner_columns,
                        part,
                        scratch,
                    });
                });
            });
            for r in 0..rows.rows {
                let sum = scratch.gradient.sum(r, part, side.dim);
                sums.sum += finish(rows.start + r, part.first * GROUP, sum);
            }
            *lock(&task_sums[task]) = sums;
        });
        let mut all = TaskSums::default();
        for sums in &*self.task_sums {
            let sums = lock(sums);
            all.sum += sums.sum;
            all.totals.add(&sums.totals);
        }
        all
    }
}

/// Fills the gradient of one side; rows that take part in no pair get 0. Returns the sums over the pairs.
pub fn write_gradient(walk: &mut Walk<'_>, owner: Owner, gradient: &mut Array2<f32>, count: usize) -> Totals {
    let dim = walk.known.pairs.side(owner).dim;
    if gradient.dim() != (count, dim) || !gradient.is_standard_layout() {
        *gradient = Array2::zeros((count, dim));
    }
    let order = walk.known.pairs.side(owner).order;
    if order.rows.len() < count {
        gradient.fill(0.0);
    }
    let mut slots: Vec<Option<&mut [f32]>> = match gradient.as_slice_mut() {
        Some(values) => values.chunks_exact_mut(dim).map(Some).collect(),
        None => Vec::new(),
    };
    let slots: Vec<Mutex<Option<&mut [f32]>>> = order
        .rows
        .iter()
        .map(|&row| Mutex::new(slots.get_mut(row as usize).and_then(Option::take)))
        .collect();
    let parts = walk.parts(owner);
    let sums = walk.run(owner, Kind::Gradient, parts, |position, first, sum| {
        if let Some(row) = lock(&slots[position]).as_mut() {
            row[first..first + sum.len()].copy_from_slice(sum);
        }
        0.0
    });
    sums.totals
}
