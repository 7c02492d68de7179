//! The CPU backend: float32 tiles, one sweep, any number of threads, the same bits.
//!
//! | pass | file |
//! | --- | --- |
//! | rows in class order, checked and packed | `rows.rs` |
//! | same-class pass (m+) and the sweep (m-, probe count, candidates) | `similarity.rs`, `tile.rs`, `statistics.rs` |
//! | selection | `select.rs` |
//! | weights and loss, gradient | `weigh.rs`, `gradient.rs` |
//! | hyper-gradient of the loss threshold | `threshold.rs` |
//! | top-K search | `retrieval.rs` |
//!
//! `product.rs` is the one matrix product, `simd.rs` the choice of instruction
//! set, `tasks.rs` the sharing-out of work, `buffer.rs` memory in whole cache lines, `times.rs` what each pass took. S is computed tile by tile, once for
//! both triangles; of a tile only the candidates are kept, within a budget, and
//! tiles beyond it are computed again with the same bits.

use std::sync::Mutex;

use ndarray::{Array2, ArrayView2};

use super::{Backend, Nearest};
use crate::loss::select::{Tolerances, adapt};
use crate::loss::{Batch, Hypergradient, LossOutput, LossSettings, Rows};
use crate::{Error, Result};

mod buffer;
mod gradient;
mod product;
mod retrieval;
mod rows;
mod select;
mod simd;
mod similarity;
mod statistics;
mod tasks;
mod threshold;
mod tile;
mod times;
mod weigh;

use gradient::{AddTile, GradientScratch, Part};
use rows::{MAX_BLOCK, Side, SideBuffers};
use select::Weights;
use simd::{GROUP, Level};
use similarity::{Known, Tiles};
use statistics::{Gathered, Statistics};
use tasks::{Workers, lock};
use tile::{Pairs, TileScratch};
use times::Stopwatch;
use weigh::{Kind, Totals};

pub use times::PassTimes;

/// Most bytes of candidates kept between the passes for each row of either side, unless stated otherwise. So memory is
/// linear in the batch: with the panels of D = 512 and the tiles beside them, 5,120 rows stay below 64 MB and
/// 10,240 below 128 MB.
const BUDGET_OF_A_ROW: usize = 6 << 10;

/// Fewest dimensions that are worth a task of their own in the gradient.
const PART_DIMENSIONS: usize = 64;

/// [`Backend`] on the processor's cores (those of the current rayon pool).
#[derive(Debug)]
pub struct CpuBackend {
    level: Level,
    /// Most bytes of candidates, if not [`BUDGET_OF_A_ROW`] for each.
    budget: Option<usize>,
    rows: SideBuffers,
    columns: SideBuffers,
    classes: Vec<(u32, u32)>,
    tiles: Tiles,
    statistics: Statistics,
    weights: Weights,
    scratch: Vec<Mutex<Scratch>>,
    answers: Vec<Mutex<Answer>>,
    remembered: Option<Remembered>,
    times: PassTimes,
}

/// Shape of the last loss.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Remembered {
    anchors: (usize, usize),
    references: Option<usize>,
}

/// Buffers of one thread.
#[derive(Debug, Default)]
struct Scratch {
    tile: TileScratch,
    gathered: Gathered,
    gradient: GradientScratch,
}

impl Default for CpuBackend {
    fn default() -> Self {
        Self::new()
    }
}

impl CpuBackend {
    /// A backend that keeps candidates in at most 6 KiB for each row of either side.
    #[must_use]
    pub fn new() -> Self {
        Self::of_budget(None)
    }

    /// A backend that keeps candidates in at most `budget` bytes. The result is the same bit for bit;
    /// tiles that do not fit are computed again.
    #[must_use]
    pub fn with_budget(budget: usize) -> Self {
        Self::of_budget(Some(budget))
    }

    fn of_budget(budget: Option<usize>) -> Self {
        Self {
            level: Level::best(),
            rows: SideBuffers::default(),
            columns: SideBuffers::default(),
            classes: Vec::new(),
            tiles: Tiles::default(),
            budget,
            statistics: Statistics::default(),
            weights: Weights::default(),
            scratch: Vec::new(),
            answers: Vec::new(),
            remembered: None,
            times: PassTimes::default(),
        }
    }

    /// Time of each pass of the last loss.
    #[must_use]
    pub fn pass_times(&self) -> PassTimes {
        self.times
    }

    fn loss_passes(
        &mut self,
        batch: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
        workers: Workers<'_>,
    ) -> Result<()> {
        let mut watch = Stopwatch::start();
        self.scratch.resize_with(workers.count(), Mutex::default);
        self.rows.order.by_class(batch.anchors.labels, block_rows(batch.anchors.labels.len()));
        let rows = self.rows.prepare("anchors", &batch.anchors, batch.check, &workers)?;
        let columns = match &batch.references {
            None => rows,
            Some(references) => {
                self.columns.order.by_class(references.labels, block_rows(references.labels.len()));
                self.columns.prepare("references", references, batch.check, &workers)?
            }
        };
        find_classes(&rows.order.sorted, &columns.order.sorted, &mut self.classes);
        let pairs =
            Pairs { rows, columns, square: batch.is_square(), classes: &self.classes, level: self.level };
        for scratch in &self.scratch {
            lock(scratch).tile.reset();
        }
        self.times.rows = watch.lap();

        let against = if pairs.square { 0 } else { columns.order.rows.len() };
        let of_rows = BUDGET_OF_A_ROW.saturating_mul(rows.order.rows.len() + against);
        self.tiles.set(&pairs, self.budget.unwrap_or(of_rows));
        self.statistics.reset(&pairs);
        self.tiles.same_class_pass(&pairs, &workers, &self.scratch, &mut self.statistics);
        self.times.same_class = watch.lap();
        self.statistics.set_bounds(settings);
        self.tiles.sweep(&pairs, &workers, &self.scratch, &mut self.statistics);

        self.times.sweep = watch.lap();

        let statistics = &mut self.statistics;
        let tolerances = adapt(settings, statistics.probe_neg, statistics.same_class.positives);
        self.weights.set_bounds(&pairs, settings, tolerances, &statistics.min_pos, &statistics.max_neg);
        self.tiles.count(&pairs, &workers, &self.scratch, &self.weights, statistics);
        let batch_rows = batch.anchors.labels.len();
        let active = self.weights.set_factors(&statistics.counts, batch_rows);
        self.times.select = watch.lap();

        let known = Known { pairs, statistics: &self.statistics, weights: &self.weights };
        self.tiles.weigh(&known, &workers, &self.scratch);
        let mut walk =
            Walk { known, tiles: &self.tiles, workers, scratch: &self.scratch, answers: &mut self.answers };
        let totals = write_gradient(&mut walk, Owner::Rows, &mut output.gradient, batch_rows);
        if batch.reference_gradient && !pairs.square {
            let gradient = output.reference_gradient.get_or_insert_default();
            write_gradient(&mut walk, Owner::Columns, gradient, batch.reference_rows().labels.len());
        } else {
            output.reference_gradient = None;
        }
        self.statistics.report(&pairs, tolerances, batch_rows, output);
        report_loss(settings, &totals, active, output);
        self.times.gradient = watch.lap();
        self.remembered = Some(Self::shape(batch));
        Ok(())
    }

    fn shape(batch: &Batch<'_>) -> Remembered {
        let embeddings = &batch.anchors.embeddings;
        Remembered {
            anchors: (embeddings.rows(), embeddings.dim()),
            references: batch.references.map(|rows| rows.embeddings.rows()),
        }
    }
}

/// Rows of a block for a side of `count` rows. A small batch is two blocks, for two threads to work on.
fn block_rows(count: usize) -> usize {
    count.div_ceil(2).next_multiple_of(GROUP).min(MAX_BLOCK)
}

fn workers_for(batch: &Batch<'_>) -> Workers<'static> {
    let embeddings = &batch.anchors.embeddings;
    let pairs = embeddings.rows().saturating_mul(batch.reference_rows().embeddings.rows());
    Workers::new(pairs.saturating_mul(embeddings.dim()))
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

impl Backend for CpuBackend {
    fn name(&self) -> String {
        "cpu".to_owned()
    }

    fn loss(&mut self, batch: &Batch<'_>, settings: &LossSettings, output: &mut LossOutput) -> Result<()> {
        self.remembered = None;
        settings.validate()?;
        batch.validate()?;
        workers_for(batch).stay(|workers| self.loss_passes(batch, settings, output, workers))
    }

    fn hypergradient(
        &mut self,
        batch: &Batch<'_>,
        tangent: ArrayView2<'_, f32>,
        reference_tangent: Option<ArrayView2<'_, f32>>,
    ) -> Result<Hypergradient> {
        batch.validate()?;
        let remembered = self.remembered.ok_or(Error::OutOfOrder("hypergradient needs a loss before it"))?;
        threshold::check_shapes(remembered, &Self::shape(batch), &tangent, reference_tangent.as_ref())?;
        let workers = workers_for(batch);
        self.scratch.resize_with(workers.count(), Mutex::default);
        let same_labels = self.rows.order.is_of(batch.anchors.labels)
            && batch.references.is_none_or(|rows| self.columns.order.is_of(rows.labels));
        if !same_labels {
            return Err(Error::OutOfOrder(
                "hypergradient needs the batch of the last loss: its labels differ",
            ));
        }
        let trusted = crate::loss::UnitCheck::Trust;
        let rows = self.rows.prepare("anchors", &batch.anchors, trusted, &workers)?;
        let columns = match &batch.references {
            None => rows,
            Some(references) => self.columns.prepare("references", references, trusted, &workers)?,
        };
        let pairs =
            Pairs { rows, columns, square: batch.is_square(), classes: &self.classes, level: self.level };
        for scratch in &self.scratch {
            lock(scratch).tile.reset();
        }
        let mut walk = Walk {
            known: Known { pairs, statistics: &self.statistics, weights: &self.weights },
            tiles: &self.tiles,
            workers,
            scratch: &self.scratch,
            answers: &mut self.answers,
        };
        Ok(threshold::hypergradient(&mut walk, tangent, reference_tangent))
    }

    fn nearest(&mut self, queries: &Rows<'_>, references: Option<&Rows<'_>>, k: usize) -> Result<Nearest> {
        retrieval::nearest(self, queries, references, k)
    }

    fn workspace_bytes(&self) -> usize {
        let scratch = |s: &Mutex<Scratch>| {
            let s = lock(s);
            s.tile.bytes() + s.gathered.bytes() + s.gradient.bytes()
        };
        self.rows.bytes()
            + self.columns.bytes()
            + self.classes.capacity() * 8
            + self.tiles.bytes()
            + self.statistics.bytes()
            + self.weights.bytes()
            + self.scratch.iter().map(scratch).sum::<usize>()
            + self.answers.capacity() * size_of::<Mutex<Answer>>()
    }
}

/// Whose rows a walk sums into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Rows,
    Columns,
}

/// A walk over all weighted pairs, block by block of their owner.
struct Walk<'a> {
    known: Known<'a>,
    tiles: &'a Tiles,
    workers: Workers<'a>,
    scratch: &'a [Mutex<Scratch>],
    answers: &'a mut Vec<Mutex<Answer>>,
}

/// What a task of a walk, or the whole walk, adds up to.
#[derive(Debug, Clone, Copy, Default)]
struct Answer {
    /// Of what its rows were finished with.
    sum: f64,
    /// Of the pairs, each once; over the owner's rows in the rectangular form.
    totals: Totals,
}

impl Walk<'_> {
    fn side(&self, owner: Owner) -> Side<'_> {
        match owner {
            Owner::Rows => self.known.pairs.rows,
            Owner::Columns => self.known.pairs.columns,
        }
    }

    /// Parts of the dimensions that are summed as tasks of their own, so that a small batch keeps all threads busy.
    fn parts(&self, owner: Owner) -> usize {
        let Side { order, dim, .. } = self.side(owner);
        let blocks = order.blocks.len().max(1);
        // A tile that is not kept would be swept again for each part.
        if self.workers.count() <= blocks || !self.tiles.all_kept() {
            return 1;
        }
        self.workers.count().div_ceil(blocks).min(dim.div_ceil(PART_DIMENSIONS))
    }

    /// Sums weighted rows for every row of the owner, in `parts` parts of the dimensions each. `finish` gets
    /// position, first dimension and sum; what it answers is added up, and so are the tiles' totals, in one order.
    fn run(
        &mut self,
        owner: Owner,
        kind: Kind,
        parts: usize,
        finish: impl Fn(usize, usize, &[f32]) -> f64 + Sync,
    ) -> Answer {
        let tasks = self.side(owner).order.blocks.len() * parts;
        self.answers.resize_with(tasks, Mutex::default);
        let Self { known, tiles, workers, scratch, answers } = &*self;
        let (side, pairs) = (self.side(owner), known.pairs);
        let groups = side.dim.div_ceil(GROUP);
        let size = groups.div_ceil(parts).next_multiple_of(PART_DIMENSIONS / GROUP);
        workers.for_each(tasks, scratch, |task, scratch| {
            let block = task / parts;
            let first = (task % parts * size).min(groups);
            let part = Part { first, end: (first + size).min(groups) };
            let rows = side.order.blocks[block];
            scratch.gradient.begin(rows.rows, part);
            let mut answer = Answer::default();
            tiles.each_of(&pairs, owner, block, |index, owner_rows, owner_columns| {
                let tile = tiles.position(index);
                if kind == Kind::LambdaPos && !pairs.has_positives(tile.0, tile.1) {
                    return;
                }
                let Scratch { tile: tile_scratch, gradient: scratch, .. } = scratch;
                tiles.with_weights(known, kind, index, tile_scratch, |candidates, weighed| {
                    let selected = weighed.pairs;
                    // A tile of the square form is met by its rows and by its columns.
                    if part.first == 0 && (owner_columns || !pairs.square) {
                        answer.totals.add(&weighed.totals);
                    }
                    pairs.level.dispatch(AddTile {
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
                answer.sum += finish(rows.start + r, part.first * GROUP, sum);
            }
            *lock(&answers[task]) = answer;
        });
        let mut all = Answer::default();
        for answer in &*self.answers {
            let answer = lock(answer);
            all.sum += answer.sum;
            all.totals.add(&answer.totals);
        }
        all
    }
}

/// Fills the gradient of one side; rows that take part in no pair get 0. Returns the sums over the pairs.
fn write_gradient(walk: &mut Walk<'_>, owner: Owner, gradient: &mut Array2<f32>, count: usize) -> Totals {
    let dim = walk.side(owner).dim;
    if gradient.dim() != (count, dim) || !gradient.is_standard_layout() {
        *gradient = Array2::zeros((count, dim));
    }
    let order = walk.side(owner).order;
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
    let answer = walk.run(owner, Kind::Gradient, parts, |position, first, sum| {
        if let Some(row) = lock(&slots[position]).as_mut() {
            row[first..first + sum.len()].copy_from_slice(sum);
        }
        0.0
    });
    answer.totals
}

fn report_loss(settings: &LossSettings, totals: &Totals, active: u64, output: &mut LossOutput) {
    output.loss = totals.softplus[0] / settings.beta + totals.softplus[1] / settings.alpha;
    output.dloss_dlambda_pos = totals.sigmoid[0];
    output.dloss_dlambda_neg = -totals.sigmoid[1];
    output.active = active;
}

impl Statistics {
    /// Copies what belongs to the caller's rows into the output.
    fn report(&self, pairs: &Pairs<'_>, tolerances: Tolerances, batch_rows: usize, output: &mut LossOutput) {
        output.gamma_pos = tolerances.pos;
        output.gamma_neg = tolerances.neg;
        output.probe_neg = self.probe_neg;
        output.total_pos = self.same_class.positives;
        let fill = |values: &mut Vec<f32>, value| {
            values.clear();
            values.resize(batch_rows, value);
        };
        fill(&mut output.min_pos, f32::INFINITY);
        fill(&mut output.max_neg, f32::NEG_INFINITY);
        for counts in [&mut output.count_pos, &mut output.count_neg] {
            counts.clear();
            counts.resize(batch_rows, 0);
        }
        for (position, &row) in pairs.rows.order.rows.iter().enumerate() {
            let row = row as usize;
            output.min_pos[row] = self.min_pos[position];
            output.max_neg[row] = self.max_neg[position];
            output.count_pos[row] = self.counts[position][0];
            output.count_neg[row] = self.counts[position][1];
        }
        (output.mean_pos, output.mean_neg) = self.means(pairs);
    }
}
