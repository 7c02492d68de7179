//! The CPU backend: float32 tiles in one sweep; the same bits for any number of threads.
//!
//! | pass | file |
//! | --- | --- |
//! | rows in class order, checked and packed | `rows.rs`, `pairs.rs` |
//! | same-class pass (m+) and the sweep (m-, probe count, candidates) | `tiles.rs`, `tile.rs`, `statistics.rs` |
//! | selection: sizes of the mined sets | `select.rs` |
//! | weights and loss, gradient | `weigh.rs`, `walk.rs`, `gradient.rs` |
//! | threshold gradient | `threshold.rs` |
//! | top-K search | `retrieval.rs` |
//! | rows of any length, and their gradient | `unit.rs` |
//!
//! `steps.rs` has the order of the passes, `remembered.rs` what is kept of a loss between them, `shares.rs`
//! the bounds and weight factors of each row, `walk.rs` the part that gradient and threshold gradient have in
//! common; `product.rs` is the one matrix product, `simd.rs` chooses the instruction set, `tasks.rs` divides
//! work among threads, `buffer.rs` has memory in whole cache lines, `times.rs` the time of each pass. S is
//! computed tile by tile, once for both triangles; only a tile's candidates are kept, within a budget, and
//! tiles beyond it are computed again with the same bits.

use std::fmt;
use std::sync::Mutex;

use ndarray::ArrayView2;

use super::step::Step;
use super::{Backend, Nearest, PreparedGallery};
use crate::Result;
use crate::loss::{
    Batch, Embeddings, LossOutput, LossSettings, PairTotals, RowNumbers, Rows, ThresholdGradient,
};
use crate::loss::{has_entries, same_length};

mod buffer;
mod gradient;
mod pairs;
mod product;
mod remembered;
mod retrieval;
mod rows;
mod select;
mod shares;
mod simd;
mod statistics;
mod steps;
mod tasks;
mod threshold;
mod tile;
mod tiles;
mod times;
mod unit;
mod walk;
mod weigh;

use gradient::GradientScratch;
use pairs::Sides;
use remembered::Remembered;
use retrieval::Gallery;
use shares::Weights;
use simd::Level;
use statistics::{Gathered, Statistics};
use tasks::{Workers, lock};
use tile::TileScratch;
use tiles::Tiles;
use unit::UnitRows;
use walk::TaskSums;

pub use times::PassTimes;

/// Default bytes of kept candidates per row of either side, which makes memory linear in the batch: with the
/// panels of D = 512 and the tiles beside them, 5,120 rows stay below 64 MB and 10,240 below 128 MB.
const BUDGET_OF_A_ROW: usize = 6 << 10;

/// [`Backend`] on the processor's cores (those of the current rayon pool).
pub struct CpuBackend {
    /// Most bytes of kept candidates; `None`: [`BUDGET_OF_A_ROW`] per row.
    budget: Option<usize>,
    sides: Sides,
    tiles: Tiles,
    statistics: Statistics,
    weights: Weights,
    scratch: Vec<Mutex<Scratch>>,
    task_sums: Vec<Mutex<TaskSums>>,
    unit: UnitRows,
    remembered: Option<Remembered>,
    times: PassTimes,
}

/// Without the buffers, which would be megabytes of text.
impl fmt::Debug for CpuBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuBackend")
            .field("level", &Level::best())
            .field("budget", &self.budget)
            .field("workspace_bytes", &self.workspace_bytes())
            .field("remembered", &self.remembered)
            .finish_non_exhaustive()
    }
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
    /// tiles that do not fit are computed again. The room of the batch before is kept for the next one, and given
    /// back by the loss after it if both exceed the budget.
    #[must_use]
    pub fn with_budget(budget: usize) -> Self {
        Self::of_budget(Some(budget))
    }

    fn of_budget(budget: Option<usize>) -> Self {
        Self {
            sides: Sides::default(),
            tiles: Tiles::default(),
            budget,
            statistics: Statistics::default(),
            weights: Weights::default(),
            scratch: Vec::new(),
            task_sums: Vec::new(),
            unit: UnitRows::default(),
            remembered: None,
            times: PassTimes::default(),
        }
    }

    /// Scales rows to unit length as [`Backend::normalized_loss`] does, for batches in parts.
    /// Rows of zeros, and rows that are not finite, are not refused here but by the check of the loss.
    ///
    /// # Errors
    /// [`Error::Empty`](crate::Error::Empty), [`Error::NotContiguous`](crate::Error::NotContiguous).
    pub fn normalize<'a>(&'a mut self, rows: &'a Rows<'_>) -> Result<Embeddings<'a>> {
        has_entries("anchors", (rows.embeddings.rows(), rows.embeddings.dim()))?;
        workers_of_rows(rows).stay(|workers| self.unit.set_anchors(rows, workers))?;
        self.unit.anchors(rows)
    }

    /// Turns `gradient`, dL/d(unit rows) without gaps between rows, into dL/d(`rows`) in place.
    ///
    /// # Errors
    /// As [`normalize`](Self::normalize); [`Error::LengthMismatch`](crate::Error::LengthMismatch) unless the
    /// gradient has as many entries as the rows.
    pub fn normalize_backward(&mut self, rows: &Rows<'_>, gradient: &mut [f32]) -> Result<()> {
        let (count, dim) = (rows.embeddings.rows(), rows.embeddings.dim());
        has_entries("anchors", (count, dim))?;
        same_length("entries of the gradient", count * dim, gradient.len())?;
        workers_of_rows(rows).stay(|workers| {
            self.unit.set_anchors(rows, workers)?;
            self.unit.anchors_backward(rows, gradient, workers)
        })
    }

    fn make_all_steps(
        &mut self,
        batch: &Batch<'_>,
        settings: &LossSettings,
        workers: Workers<'_>,
        output: &mut LossOutput,
    ) -> Result<()> {
        self.find_same_class(batch, workers, output)?;
        self.sweep_tiles(batch, settings, workers, output)?;
        self.select_pairs(batch, settings, output.pair_totals(), workers, output)?;
        self.sum_gradient(batch, settings, workers, output)
    }

    /// Time of each pass of the last loss.
    #[must_use]
    pub fn pass_times(&self) -> PassTimes {
        self.times
    }
}

fn workers_of_rows(rows: &Rows<'_>) -> Workers<'static> {
    Workers::new(rows.embeddings.rows().saturating_mul(rows.embeddings.dim()))
}

fn workers_for(batch: &Batch<'_>) -> Workers<'static> {
    let embeddings = &batch.anchors.embeddings;
    let pairs = embeddings.rows().saturating_mul(batch.reference_rows().embeddings.rows());
    Workers::new(pairs.saturating_mul(embeddings.dim()))
}

impl Backend for CpuBackend {
    fn name(&self) -> String {
        "cpu".to_owned()
    }

    fn loss(&mut self, batch: &Batch<'_>, settings: &LossSettings, output: &mut LossOutput) -> Result<()> {
        self.remembered = None;
        settings.validate()?;
        batch.validate()?;
        workers_for(batch).stay(|workers| self.make_all_steps(batch, settings, workers, output))?;
        self.remembered = Some(Remembered::new(batch, settings, Step::Gradient));
        Ok(())
    }

    fn normalized_loss(
        &mut self,
        batch: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()> {
        self.remembered = None;
        settings.validate()?;
        batch.validate()?;
        let mut rows = std::mem::take(&mut self.unit);
        let done = workers_for(batch).stay(|workers| {
            rows.set(batch, workers)?;
            self.make_all_steps(&rows.batch(batch)?, settings, workers, output)?;
            rows.normalize_backward(batch, workers, output)
        });
        self.unit = rows;
        done
    }

    fn same_class(
        &mut self,
        part: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()> {
        self.remembered = None;
        settings.validate()?;
        part.validate()?;
        workers_for(part).stay(|workers| self.find_same_class(part, workers, output))?;
        self.remembered = Some(Remembered::new(part, settings, Step::SameClass));
        Ok(())
    }

    fn sweep(
        &mut self,
        part: &Batch<'_>,
        min_pos: RowNumbers<'_, f32>,
        output: &mut LossOutput,
    ) -> Result<()> {
        let settings = self.go_on(part, Step::Sweep)?;
        min_pos.validate(part)?;
        self.take_min_pos(&min_pos);
        workers_for(part).stay(|workers| self.sweep_tiles(part, &settings, workers, output))?;
        self.remembered = Some(Remembered::new(part, &settings, Step::Sweep));
        Ok(())
    }

    fn select(
        &mut self,
        part: &Batch<'_>,
        max_neg: RowNumbers<'_, f32>,
        totals: PairTotals,
        output: &mut LossOutput,
    ) -> Result<()> {
        let settings = self.go_on(part, Step::Select)?;
        max_neg.validate(part)?;
        self.take_max_neg(&max_neg);
        workers_for(part).stay(|workers| self.select_pairs(part, &settings, totals, workers, output))?;
        self.remembered = Some(Remembered::new(part, &settings, Step::Select));
        Ok(())
    }

    fn gradient(
        &mut self,
        part: &Batch<'_>,
        count_pos: RowNumbers<'_, u32>,
        count_neg: RowNumbers<'_, u32>,
        output: &mut LossOutput,
    ) -> Result<()> {
        let settings = self.go_on(part, Step::Gradient)?;
        RowNumbers::validate_sizes(&count_pos, &count_neg, part)?;
        self.take_counts(&count_pos, &count_neg);
        workers_for(part).stay(|workers| self.sum_gradient(part, &settings, workers, output))?;
        self.remembered = Some(Remembered::new(part, &settings, Step::Gradient));
        Ok(())
    }

    fn threshold_gradient(
        &mut self,
        batch: &Batch<'_>,
        tangent: ArrayView2<'_, f32>,
        reference_tangent: Option<ArrayView2<'_, f32>>,
    ) -> Result<ThresholdGradient> {
        self.sum_threshold_gradient(batch, tangent, reference_tangent)
    }

    fn nearest(&mut self, queries: &Rows<'_>, references: Option<&Rows<'_>>, k: usize) -> Result<Nearest> {
        retrieval::nearest(queries, references, k)
    }

    fn search(
        &mut self,
        gallery: &Rows<'_>,
        work: &mut dyn FnMut(&mut dyn PreparedGallery) -> Result<()>,
    ) -> Result<()> {
        work(&mut Gallery::new(gallery)?)
    }

    fn workspace_bytes(&self) -> usize {
        let scratch = |s: &Mutex<Scratch>| {
            let s = lock(s);
            s.tile.bytes() + s.gathered.bytes() + s.gradient.bytes()
        };
        self.sides.bytes()
            + self.tiles.bytes()
            + self.statistics.bytes()
            + self.weights.bytes()
            + self.scratch.iter().map(scratch).sum::<usize>()
            + self.task_sums.capacity() * size_of::<Mutex<TaskSums>>()
            + self.unit.bytes()
    }
}
