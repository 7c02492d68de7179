//! The tiles of a batch, the same-class pass, and the one sweep (SPEC 1-3).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use super::buffer::Buffer;
use super::rows::MAX_BLOCK;
use super::select::{CountTile, Counts, Weights, negative_bound};
use super::tasks::Workers;
use super::tile::{Bounds, Candidates, Pairs, SameClass, Sweep, TileScratch};
use super::weigh::{Kind, Totals, WeighTile, Weighed};
use super::{Owner, Scratch};
use crate::loss::LossSettings;
use crate::loss::select::{initial_tolerances, probe_tolerance};

/// What the passes know of each row and of the whole batch, by position in class order.
#[derive(Debug, Default)]
pub struct Statistics {
    pub min_pos: Vec<f32>,
    pub max_neg: Vec<f32>,
    /// `[|P_i|, |N_i|]`.
    pub counts: Vec<[u32; 2]>,
    pub probe_neg: u64,
    /// Ordered positive pairs.
    pub positives: u64,
    positive_sum: f64,
    /// All ordered same-class pairs and the sum of their similarities, duplicates included.
    same_class: u64,
    same_class_sum: f64,
    keep: Vec<f32>,
    probe: Vec<f32>,
}

impl Statistics {
    pub fn reset(&mut self, pairs: &Pairs<'_>) {
        let rows = pairs.rows.order.rows.len();
        let refill = |values: &mut Vec<f32>, value| {
            values.clear();
            values.resize(rows, value);
        };
        refill(&mut self.min_pos, f32::INFINITY);
        refill(&mut self.max_neg, f32::NEG_INFINITY);
        self.counts.clear();
        self.counts.resize(rows, [0; 2]);
        (self.probe_neg, self.positives, self.same_class) = (0, 0, 0);
        (self.positive_sum, self.same_class_sum) = (0.0, 0.0);
    }

    /// Bounds of the sweep from m+: the probe's, and the lower of it and the initial one for candidates.
    pub fn set_bounds(&mut self, settings: &LossSettings) {
        let probe = probe_tolerance(settings);
        let keep = probe.max(initial_tolerances(settings).neg);
        self.probe.clear();
        self.probe.extend(self.min_pos.iter().map(|&m| negative_bound(m, probe)));
        self.keep.clear();
        self.keep.extend(self.min_pos.iter().map(|&m| negative_bound(m, keep)));
    }

    fn bounds(&self, square: bool) -> (Bounds<'_>, Bounds<'_>) {
        let keep = Bounds { rows: &self.keep, columns: square.then_some(self.keep.as_slice()) };
        (keep, Bounds { rows: &self.probe, columns: square.then_some(self.probe.as_slice()) })
    }

    /// Mean similarity of all positives and of all negatives. The sum over all pairs is closed: that of
    /// e_i . e_j over i and j is the product of the sums of e_i and of e_j.
    pub fn means(&self, pairs: &Pairs<'_>) -> (f64, f64) {
        let all: f64 = pairs.rows.sum.iter().zip(pairs.columns.sum).map(|(a, b)| a * b).sum();
        let (rows, columns) = (pairs.rows.order.rows.len() as u64, pairs.columns.order.rows.len() as u64);
        let (all, count) = if pairs.square {
            (all - pairs.rows.squares, rows * columns.saturating_sub(1))
        } else {
            (all, rows * columns)
        };
        let negatives = count - self.same_class;
        let mean_neg = if negatives == 0 { f64::NAN } else { (all - self.same_class_sum) / negatives as f64 };
        (self.positive_sum / self.positives as f64, mean_neg)
    }

    pub fn bytes(&self) -> usize {
        let floats =
            self.min_pos.capacity() + self.max_neg.capacity() + self.keep.capacity() + self.probe.capacity();
        floats * 4 + self.counts.capacity() * 8
    }
}

/// One tile between the passes.
#[derive(Debug)]
struct Tile {
    /// Whether the candidates are kept between the passes.
    kept: bool,
    words: Vec<u16>,
    /// Similarities of the candidates, or once the tile is weighed what they weigh, if there is no room for both.
    values: Vec<f32>,
    /// What the candidates weigh, if there is.
    weights: Vec<f32>,
    weighed: Weighed,
    /// All similarities of a tile with pairs of one class, from that pass to the sweep; or empty.
    similarities: Buffer,
    row_extreme: [f32; MAX_BLOCK],
    column_extreme: [f32; MAX_BLOCK],
    counts: Counts,
    probe: u64,
    positives: u64,
    positive_sum: f64,
    same_class: u64,
    same_class_sum: f64,
}

impl Default for Tile {
    fn default() -> Self {
        Self {
            kept: false,
            words: Vec::new(),
            values: Vec::new(),
            weights: Vec::new(),
            weighed: Weighed::default(),
            similarities: Buffer::default(),
            row_extreme: [0.0; MAX_BLOCK],
            column_extreme: [0.0; MAX_BLOCK],
            counts: Counts::default(),
            probe: 0,
            positives: 0,
            positive_sum: 0.0,
            same_class: 0,
            same_class_sum: 0.0,
        }
    }
}

impl Tile {
    /// Bytes of candidates it has room for.
    fn room(&self) -> usize {
        self.words.capacity() * 2 + (self.values.capacity() + self.weights.capacity()) * 4
    }
}

/// What the kept tiles hold of their candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Kept {
    #[default]
    Similarities,
    /// Weights in their place.
    Weights,
    Both,
}

/// What is known of a batch once it is swept: enough to sweep a tile again, and to weigh it.
#[derive(Clone, Copy)]
pub struct Known<'a> {
    pub pairs: Pairs<'a>,
    pub statistics: &'a Statistics,
    pub weights: &'a Weights,
}

impl Known<'_> {
    fn weigh(
        &self,
        tile: (usize, usize),
        candidates: Candidates<'_>,
        kind: Kind,
        weighed: &mut Vec<f32>,
    ) -> Weighed {
        let Self { pairs, weights, .. } = *self;
        pairs.level.dispatch(WeighTile { pairs, tile, candidates, weights, kind, weighed })
    }
}

/// All tiles of a batch; in the square form those on and above the diagonal.
#[derive(Debug, Default)]
pub struct Tiles {
    budget: usize,
    /// Bytes and number of the candidates that are kept.
    used: AtomicUsize,
    values: AtomicUsize,
    kept: Kept,
    rows: usize,
    columns: usize,
    square: bool,
    /// Tiles with pairs of one class.
    with_positives: Vec<usize>,
    tiles: Vec<RwLock<Tile>>,
}

impl Tiles {
    /// Lays the tiles out for a batch, to keep at most `budget` bytes of candidates. Buffers of earlier
    /// batches are reused.
    pub fn set(&mut self, pairs: &Pairs<'_>, budget: usize) {
        self.budget = budget;
        self.rows = pairs.rows.order.blocks.len();
        self.columns = pairs.columns.order.blocks.len();
        self.square = pairs.square;
        let count = if self.square { self.rows * (self.rows + 1) / 2 } else { self.rows * self.columns };
        self.tiles.resize_with(count, RwLock::default);
        // Each tile keeps the room it once needed; give it all back when that adds up to too much.
        let held: usize = self.tiles.iter_mut().map(|tile| exclusive(tile).room()).sum();
        for tile in &mut self.tiles {
            let tile = exclusive(tile);
            if held > self.budget {
                (tile.words, tile.values, tile.weights) = Default::default();
            }
            tile.similarities.resize(0);
        }
        (self.used, self.values) = Default::default();
        self.kept = Kept::Similarities;
        self.with_positives.clear();
        let positions = (0..count).filter(|&index| {
            let (row, column) = position(self.square, self.rows, index);
            pairs.has_positives(row, column)
        });
        self.with_positives.extend(positions);
    }

    pub fn bytes(&self) -> usize {
        let held = |tile: &RwLock<Tile>| {
            let tile = read(tile);
            tile.room() + tile.similarities.bytes()
        };
        self.tiles.iter().map(held).sum::<usize>() + self.tiles.capacity() * size_of::<RwLock<Tile>>()
    }

    /// Blocks of rows and columns of a tile.
    pub fn position(&self, index: usize) -> (usize, usize) {
        position(self.square, self.rows, index)
    }

    /// Visits the tiles that hold pairs of one block of the owner, in order of the other side. The
    /// visitor learns whether the owner is the tile's rows, its columns, or both.
    pub fn each_of(
        &self,
        pairs: &Pairs<'_>,
        owner: Owner,
        block: usize,
        mut visit: impl FnMut(usize, bool, bool),
    ) {
        if pairs.square {
            for row in 0..block {
                visit(index(true, self.rows, row, block), false, true);
            }
            visit(index(true, self.rows, block, block), true, true);
            for column in block + 1..self.columns {
                visit(index(true, self.rows, block, column), true, false);
            }
        } else if owner == Owner::Rows {
            for column in 0..self.columns {
                visit(index(false, self.rows, block, column), true, false);
            }
        } else {
            for row in 0..self.rows {
                visit(index(false, self.rows, row, block), false, true);
            }
        }
    }

    /// m+ of every row, from the tiles that hold pairs of one class.
    pub fn same_class_pass(
        &self,
        pairs: &Pairs<'_>,
        workers: &Workers,
        scratch: &[Mutex<Scratch>],
        statistics: &mut Statistics,
    ) {
        // Few tiles hold them where classes are small: those are kept for the sweep, in linear memory.
        let keep = self.with_positives.len() <= 2 * (self.rows + self.columns);
        workers.for_each(self.with_positives.len(), scratch, |task, scratch| {
            let index = self.with_positives[task];
            let tile = &mut *write(&self.tiles[index]);
            let similarities = &mut tile.similarities;
            tile.row_extreme.fill(f32::INFINITY);
            tile.column_extreme.fill(f32::INFINITY);
            (tile.positives, tile.same_class) = (0, 0);
            (tile.positive_sum, tile.same_class_sum) = (0.0, 0.0);
            let (row, column) = self.position(index);
            let duplicate = &pairs.rows.duplicate[pairs.rows.order.blocks[row].range()];
            let column_duplicate = &pairs.columns.duplicate[pairs.columns.order.blocks[column].range()];
            let visit = |row: usize, first: usize, similarities: &[f32]| {
                for (column, &s) in (first..).zip(similarities) {
                    tile.same_class += 1;
                    tile.same_class_sum += f64::from(s);
                    if s < duplicate[row].max(column_duplicate[column]) {
                        tile.positives += 1;
                        tile.positive_sum += f64::from(s);
                        tile.row_extreme[row] = tile.row_extreme[row].min(s);
                        tile.column_extreme[column] = tile.column_extreme[column].min(s);
                    }
                }
            };
            pairs.level.dispatch(SameClass {
                pairs: *pairs,
                tile: self.position(index),
                scratch: &mut scratch.tile,
                keep: keep.then_some(similarities),
                visit,
            });
        });
        // Each unordered pair of the square form was met once.
        let weight = if pairs.square { 2 } else { 1 };
        for &index in &self.with_positives {
            let tile = read(&self.tiles[index]);
            statistics.positives += weight * tile.positives;
            statistics.same_class += weight * tile.same_class;
            statistics.positive_sum += weight as f64 * tile.positive_sum;
            statistics.same_class_sum += weight as f64 * tile.same_class_sum;
            let (row, column) = self.position(index);
            let rows = pairs.rows.order.blocks[row].range();
            for (min, s) in statistics.min_pos[rows].iter_mut().zip(&tile.row_extreme) {
                *min = min.min(*s);
            }
            if pairs.square {
                let columns = pairs.columns.order.blocks[column].range();
                for (min, s) in statistics.min_pos[columns].iter_mut().zip(&tile.column_extreme) {
                    *min = min.min(*s);
                }
            }
        }
    }

    /// The one sweep: m-, the probe's count, and the candidates.
    pub fn sweep(
        &self,
        pairs: &Pairs<'_>,
        workers: &Workers,
        scratch: &[Mutex<Scratch>],
        statistics: &mut Statistics,
    ) {
        let (keep, probe) = statistics.bounds(pairs.square);
        workers.for_each(self.tiles.len(), scratch, |index, scratch| {
            let scratch = &mut scratch.tile;
            let tile = &mut *write(&self.tiles[index]);
            let (position, kept) = (self.position(index), &*tile.similarities);
            pairs.level.dispatch(Sweep { pairs: *pairs, tile: position, keep, probe, kept, scratch });
            tile.row_extreme = scratch.found.row_max;
            tile.column_extreme = scratch.found.column_max;
            tile.probe = scratch.found.probe;
            self.keep(tile, scratch);
        });
        for (index, tile) in self.tiles.iter().enumerate() {
            let tile = read(tile);
            statistics.probe_neg += tile.probe;
            let (row, column) = self.position(index);
            let rows = pairs.rows.order.blocks[row].range();
            for (max, s) in statistics.max_neg[rows].iter_mut().zip(&tile.row_extreme) {
                *max = max.max(*s);
            }
            if pairs.square {
                let columns = pairs.columns.order.blocks[column].range();
                for (max, s) in statistics.max_neg[columns].iter_mut().zip(&tile.column_extreme) {
                    *max = max.max(*s);
                }
            }
        }
    }

    /// Keeps the candidates of the tile swept last, if they fit the budget.
    fn keep(&self, tile: &mut Tile, scratch: &mut TileScratch) {
        let (found, _) = scratch.swept();
        let bytes = size_of_val(found.words) + size_of_val(found.values);
        tile.kept = self.used.fetch_add(bytes, Ordering::Relaxed) + bytes <= self.budget;
        if tile.kept {
            self.values.fetch_add(found.values.len(), Ordering::Relaxed);
            refill(&mut tile.words, found.words);
            refill(&mut tile.values, found.values);
        } else {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    /// Whether every tile's candidates are kept.
    pub fn all_kept(&self) -> bool {
        self.tiles.iter().all(|tile| read(tile).kept)
    }

    /// Hands a tile's candidates and their similarities to `use_them`, with room for weights: the kept ones, or
    /// swept again.
    fn with_similarities<R>(
        &self,
        known: &Known<'_>,
        index: usize,
        scratch: &mut TileScratch,
        use_them: impl FnOnce(Candidates<'_>, &mut Vec<f32>) -> R,
    ) -> R {
        let tile = read(&self.tiles[index]);
        if tile.kept && self.kept != Kept::Weights {
            return use_them(Candidates { words: &tile.words, values: &tile.values }, &mut scratch.weighed);
        }
        drop(tile);
        let pairs = known.pairs;
        let (keep, probe) = known.statistics.bounds(pairs.square);
        pairs.level.dispatch(Sweep { pairs, tile: self.position(index), keep, probe, kept: &[], scratch });
        let (candidates, weighed) = scratch.swept();
        use_them(candidates, weighed)
    }

    /// Hands a tile's candidates and what they weigh to `use_them`: kept, or weighed now.
    pub fn with_weights(
        &self,
        known: &Known<'_>,
        kind: Kind,
        index: usize,
        scratch: &mut TileScratch,
        use_them: impl FnOnce(Candidates<'_>, Weighed),
    ) {
        let tile = read(&self.tiles[index]);
        if tile.kept && kind == Kind::Gradient && self.kept != Kept::Similarities {
            let values = if self.kept == Kept::Both { &tile.weights } else { &tile.values };
            return use_them(Candidates { words: &tile.words, values }, tile.weighed);
        }
        drop(tile);
        let sums = self.with_similarities(known, index, scratch, |candidates, weighed| {
            let sums = known.weigh(self.position(index), candidates, kind, weighed);
            let values = &weighed[..candidates.values.len()];
            use_them(Candidates { values, ..candidates }, sums);
            sums
        });
        if kind == Kind::Gradient {
            write(&self.tiles[index]).weighed = sums;
        }
    }

    /// Weighs the kept tiles for the gradient. A pair weighs the same for both of its rows, so this is done once.
    /// Weights take the place of similarities unless the budget has room for both.
    pub fn weigh(&mut self, known: &Known<'_>, workers: &Workers, scratch: &[Mutex<Scratch>]) {
        let both = *self.used.get_mut() + *self.values.get_mut() * size_of::<f32>() <= self.budget;
        let tiles = &*self;
        workers.for_each(tiles.tiles.len(), scratch, |index, scratch| {
            if !read(&tiles.tiles[index]).kept {
                return;
            }
            let scratch = &mut scratch.tile;
            let sums = tiles.with_similarities(known, index, scratch, |candidates, weighed| {
                known.weigh(tiles.position(index), candidates, Kind::Gradient, weighed)
            });
            let tile = &mut *write(&tiles.tiles[index]);
            tile.weighed = sums;
            let weights = &scratch.weighed[..tile.values.len()];
            refill(if both { &mut tile.weights } else { &mut tile.values }, weights);
        });
        self.kept = if both { Kept::Both } else { Kept::Weights };
    }

    /// Sums over all pairs, once their tiles are weighed.
    pub fn totals(&self) -> Totals {
        let mut sum = Totals::default();
        for tile in &self.tiles {
            sum.add(&read(tile).weighed.totals);
        }
        sum
    }

    /// |P_i| and |N_i| at the final bounds.
    pub fn count(
        &self,
        pairs: &Pairs<'_>,
        workers: &Workers,
        scratch: &[Mutex<Scratch>],
        weights: &Weights,
        statistics: &mut Statistics,
    ) {
        let known = Known { pairs: *pairs, statistics, weights };
        workers.for_each(self.tiles.len(), scratch, |index, scratch| {
            let mut counts = Counts::default();
            self.with_similarities(&known, index, &mut scratch.tile, |candidates, _| {
                let (tile, counts) = (self.position(index), &mut counts);
                pairs.level.dispatch(CountTile { pairs: *pairs, tile, candidates, weights, counts });
            });
            write(&self.tiles[index]).counts = counts;
        });
        for (index, tile) in self.tiles.iter().enumerate() {
            let tile = read(tile);
            let (row, column) = self.position(index);
            let rows = pairs.rows.order.blocks[row].range();
            add(&mut statistics.counts[rows], &tile.counts.rows);
            if pairs.square {
                let columns = pairs.columns.order.blocks[column].range();
                add(&mut statistics.counts[columns], &tile.counts.columns);
            }
        }
    }
}

/// Makes it a copy of `values`, with room for no more.
fn refill<T: Copy>(target: &mut Vec<T>, values: &[T]) {
    target.clear();
    target.reserve_exact(values.len());
    target.extend_from_slice(values);
}

fn add(sums: &mut [[u32; 2]], counts: &[[u8; 2]]) {
    for (sum, count) in sums.iter_mut().zip(counts) {
        sum[0] += u32::from(count[0]);
        sum[1] += u32::from(count[1]);
    }
}

/// Tiles are numbered column by column, so that a thread packs a block of columns once.
fn index(square: bool, rows: usize, row: usize, column: usize) -> usize {
    if square { column * (column + 1) / 2 + row } else { column * rows + row }
}

fn position(square: bool, rows: usize, index: usize) -> (usize, usize) {
    if !square {
        return (index % rows, index / rows);
    }
    // Exact far beyond any tile count: the root is corrected by comparison.
    let mut column = ((((8 * index + 1) as f64).sqrt() - 1.0) / 2.0) as usize;
    while column * (column + 1) / 2 > index {
        column -= 1;
    }
    while (column + 1) * (column + 2) / 2 <= index {
        column += 1;
    }
    (index - column * (column + 1) / 2, column)
}

fn read<T>(tile: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    tile.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(tile: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    tile.write().unwrap_or_else(PoisonError::into_inner)
}

fn exclusive<T>(tile: &mut RwLock<T>) -> &mut T {
    tile.get_mut().unwrap_or_else(PoisonError::into_inner)
}
