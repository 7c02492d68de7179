//! The tiles of a batch between the passes: what is kept of each within the budget, and the passes that go
//! over all of them: same class, sweep, count of the mined pairs, weights.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use super::Scratch;
use super::buffer::Buffer;
use super::pairs::{Owner, Pairs};
use super::select::{CountTile, Counts};
use super::shares::Weights;
use super::simd::Level;
use super::statistics::{Statistics, TileSameClass};
use super::tasks::{Workers, lock};
use super::tile::{Candidates, SameClassTile, Sweep, TileScratch};
use super::weigh::{Kind, WeighTile, Weighed};

/// One tile between the passes.
#[derive(Debug, Default)]
struct Tile {
    /// Whether the candidates are kept between the passes.
    kept: bool,
    words: Vec<u16>,
    /// Similarities of the candidates; once the tile is weighed their weights, if there is no room for both.
    values: Vec<f32>,
    /// Weights of the candidates, if there is room for both.
    weights: Vec<f32>,
    weighed: Weighed,
}

impl Tile {
    /// Bytes of candidates it has room for.
    fn room(&self) -> usize {
        self.words.capacity() * 2 + (self.values.capacity() + self.weights.capacity()) * 4
    }
}

/// The [`Tile`]s themselves may take 1 / `PLACES` of the budget; tiles beyond that number are not kept.
const PLACES: usize = 4;

/// Which values the kept tiles hold for their candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum TileContents {
    #[default]
    Similarities,
    /// Weights in place of similarities.
    Weights,
    Both,
}

/// Everything that is needed to sweep a tile again, and to weigh it.
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
        Level::best().dispatch(WeighTile { pairs, tile, candidates, weights, kind, weighed })
    }
}

/// The run of row blocks whose tiles with one block of columns hold pairs of one class.
#[derive(Debug, Clone, Copy)]
struct Run {
    first: usize,
    /// Number of such tiles in the columns before.
    before: usize,
}

/// All tiles of a batch; in the square form those on and above the diagonal.
#[derive(Debug, Default)]
pub struct Tiles {
    budget: usize,
    /// Bytes and number of the candidates that are kept.
    used: AtomicUsize,
    values: AtomicUsize,
    kept: TileContents,
    rows: usize,
    columns: usize,
    square: bool,
    /// Tiles with pairs of one class, a run for each column; a last entry holds their number.
    runs: Vec<Run>,
    /// All similarities of these tiles, from the same-class pass to the sweep; empty if not kept.
    similarities: Vec<Mutex<Buffer>>,
    /// The tiles that may be kept: the first ones.
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
        let places = budget / PLACES / size_of::<RwLock<Tile>>();
        self.tiles.resize_with(self.count_tiles().min(places), RwLock::default);
        // Each tile keeps the room it once needed; give it all back when that adds up to too much.
        let held: usize = self.tiles.iter_mut().map(|tile| exclusive(tile).room()).sum();
        for tile in &mut self.tiles {
            let tile = exclusive(tile);
            tile.kept = false;
            if held > self.budget {
                *tile = Tile::default();
            }
        }
        (self.used, self.values) = Default::default();
        self.kept = TileContents::Similarities;
        self.set_runs(pairs);
        // With small classes few tiles hold pairs of one class: their similarities are kept for the sweep, in
        // linear memory.
        let with_positives = self.with_positives();
        let few = with_positives <= 2 * (self.rows + self.columns);
        self.similarities.resize_with(if few { with_positives } else { 0 }, Mutex::default);
    }

    fn set_runs(&mut self, pairs: &Pairs<'_>) {
        self.runs.clear();
        let mut before = 0;
        for (column, columns) in pairs.columns.order.blocks.iter().enumerate() {
            let rows = &pairs.rows.order.blocks;
            // Classes ascend with the rows, and so do their ranges of columns.
            let first = rows
                .partition_point(|block| pairs.classes[block.range().end - 1].1 as usize <= columns.start);
            let end =
                rows.partition_point(|block| (pairs.classes[block.start].0 as usize) < columns.range().end);
            let end = if self.square { end.min(column + 1) } else { end };
            self.runs.push(Run { first, before });
            before += end.saturating_sub(first);
        }
        self.runs.push(Run { first: 0, before });
    }

    /// Number of tiles.
    fn count_tiles(&self) -> usize {
        if self.square { self.rows * (self.rows + 1) / 2 } else { self.rows * self.columns }
    }

    /// Number of tiles with pairs of one class.
    fn with_positives(&self) -> usize {
        self.runs.last().map_or(0, |end| end.before)
    }

    /// Row and column of the tile that has this number among those with pairs of one class.
    fn tile_with_positives(&self, number: usize) -> (usize, usize) {
        let column = self.runs.partition_point(|run| run.before <= number) - 1;
        let Run { first, before } = self.runs[column];
        (first + number - before, column)
    }

    /// The similarities of a tile that the same-class pass has kept.
    fn similarities_of(&self, (row, column): (usize, usize)) -> Option<&Mutex<Buffer>> {
        let (run, next) = (self.runs[column], self.runs[column + 1]);
        let number = run.before + row.checked_sub(run.first)?;
        if number < next.before { self.similarities.get(number) } else { None }
    }

    pub fn bytes(&self) -> usize {
        let similarities: usize = self.similarities.iter().map(|buffer| lock(buffer).bytes()).sum();
        self.tiles.iter().map(|tile| read(tile).room()).sum::<usize>()
            + self.tiles.capacity() * size_of::<RwLock<Tile>>()
            + similarities
            + self.similarities.capacity() * size_of::<Mutex<Buffer>>()
            + self.runs.capacity() * size_of::<Run>()
    }

    /// Row and column of a tile.
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
        begin(scratch, statistics, f32::INFINITY);
        workers.for_each(self.with_positives(), scratch, |number, scratch| {
            let tile = self.tile_with_positives(number);
            let (rows, columns) = (pairs.rows.order.blocks[tile.0], pairs.columns.order.blocks[tile.1]);
            let duplicate = [&pairs.rows.duplicate[rows.range()], &pairs.columns.duplicate[columns.range()]];
            let mut similarities = self.similarities.get(number).map(lock);
            let (mut same_class, gathered) = (TileSameClass::default(), &mut scratch.gathered);
            let extremes = &mut gathered.extremes;
            let visit = |row: usize, first: usize, similarities: &[f32]| {
                let itself = pairs.itself(rows.start + row, tile.1);
                for (column, &s) in (first..).zip(similarities) {
                    let positive = itself != Some(column) && s < duplicate[0][row].max(duplicate[1][column]);
                    same_class.add(s, positive);
                    if positive {
                        let least = &mut extremes[rows.start + row];
                        *least = least.min(s);
                        if pairs.square {
                            let least = &mut extremes[columns.start + column];
                            *least = least.min(s);
                        }
                    }
                }
            };
            Level::best().dispatch(SameClassTile {
                pairs: *pairs,
                tile,
                scratch: &mut scratch.tile,
                keep: similarities.as_deref_mut(),
                visit,
            });
            gathered.add_same_class(same_class);
        });
        for scratch in scratch {
            statistics.merge_same_class(pairs.square, &lock(scratch).gathered);
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
        begin(scratch, statistics, f32::NEG_INFINITY);
        let (keep, probe) = statistics.bounds(pairs.square);
        workers.for_each(self.count_tiles(), scratch, |index, scratch| {
            let Scratch { tile: scratch, gathered, .. } = scratch;
            let tile = self.position(index);
            let similarities = self.similarities_of(tile).map(lock);
            let kept = similarities.as_deref().map_or(&[][..], |buffer| buffer);
            Level::best().dispatch(Sweep { pairs: *pairs, tile, keep, probe, kept, scratch });
            gathered.probe += scratch.found.probe;
            let (rows, columns) = (pairs.rows.order.blocks[tile.0], pairs.columns.order.blocks[tile.1]);
            gathered.raise(rows.start, &scratch.found.row_max[..rows.rows]);
            if pairs.square {
                gathered.raise(columns.start, &scratch.found.column_max[..columns.rows]);
            }
            if let Some(tile) = self.tiles.get(index) {
                self.keep(&mut write(tile), scratch);
            }
        });
        for scratch in scratch {
            statistics.merge_sweep(&lock(scratch).gathered);
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
        self.tiles.len() == self.count_tiles() && self.tiles.iter().all(|tile| read(tile).kept)
    }

    /// The tile, if its candidates are kept.
    fn kept(&self, index: usize) -> Option<std::sync::RwLockReadGuard<'_, Tile>> {
        self.tiles.get(index).map(read).filter(|tile| tile.kept)
    }

    /// Calls `use_them` with a tile's candidates and similarities, kept or swept again, and with a buffer for
    /// weights.
    fn with_similarities<R>(
        &self,
        known: &Known<'_>,
        index: usize,
        scratch: &mut TileScratch,
        use_them: impl FnOnce(Candidates<'_>, &mut Vec<f32>) -> R,
    ) -> R {
        if let Some(tile) = self.kept(index).filter(|_| self.kept != TileContents::Weights) {
            return use_them(Candidates { words: &tile.words, values: &tile.values }, &mut scratch.weighed);
        }
        let pairs = known.pairs;
        let (keep, probe) = known.statistics.bounds(pairs.square);
        Level::best().dispatch(Sweep { pairs, tile: self.position(index), keep, probe, kept: &[], scratch });
        let (candidates, weighed) = scratch.swept();
        use_them(candidates, weighed)
    }

    /// Calls `use_them` with a tile's candidates and their weights of `kind`, kept or weighed now.
    pub fn with_weights(
        &self,
        known: &Known<'_>,
        kind: Kind,
        index: usize,
        scratch: &mut TileScratch,
        use_them: impl FnOnce(Candidates<'_>, Weighed),
    ) {
        let stored = kind == Kind::Gradient && self.kept != TileContents::Similarities;
        if let Some(tile) = self.kept(index).filter(|_| stored) {
            let values = if self.kept == TileContents::Both { &tile.weights } else { &tile.values };
            return use_them(Candidates { words: &tile.words, values }, tile.weighed);
        }
        self.with_similarities(known, index, scratch, |candidates, weighed| {
            let sums = known.weigh(self.position(index), candidates, kind, weighed);
            use_them(Candidates { values: &weighed[..candidates.values.len()], ..candidates }, sums);
        });
    }

    /// Weighs the kept tiles for the gradient. A pair weighs the same for both of its rows, so this is done
    /// once. Weights take the place of similarities unless the budget has room for both.
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
        self.kept = if both { TileContents::Both } else { TileContents::Weights };
    }

    /// Counts |P_i| and |N_i| at the final bounds.
    pub fn count(
        &self,
        pairs: &Pairs<'_>,
        workers: &Workers,
        scratch: &[Mutex<Scratch>],
        weights: &Weights,
        statistics: &mut Statistics,
    ) {
        begin(scratch, statistics, 0.0);
        let known = Known { pairs: *pairs, statistics, weights };
        workers.for_each(self.count_tiles(), scratch, |index, scratch| {
            let Scratch { tile: scratch, gathered, .. } = scratch;
            let (tile, mut counts) = (self.position(index), Counts::default());
            self.with_similarities(&known, index, scratch, |candidates, _| {
                Level::best().dispatch(CountTile {
                    pairs: *pairs,
                    tile,
                    candidates,
                    weights,
                    counts: &mut counts,
                });
            });
            let (rows, columns) = (pairs.rows.order.blocks[tile.0], pairs.columns.order.blocks[tile.1]);
            gathered.count(rows.start, &counts.rows[..rows.rows]);
            if pairs.square {
                gathered.count(columns.start, &counts.columns[..columns.rows]);
            }
        });
        for scratch in scratch {
            statistics.merge_counts(&lock(scratch).gathered);
        }
    }
}

/// Begins a pass over the rows on every thread, with extremes that start from `extreme`.
fn begin(scratch: &[Mutex<Scratch>], statistics: &Statistics, extreme: f32) {
    for scratch in scratch {
        lock(scratch).gathered.begin(statistics.min_pos.len(), extreme);
    }
}

/// Makes `target` a copy of `values`; its capacity grows no further than that needs.
fn refill<T: Copy>(target: &mut Vec<T>, values: &[T]) {
    target.clear();
    target.reserve_exact(values.len());
    target.extend_from_slice(values);
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
