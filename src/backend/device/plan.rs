//! Launch plans: how many blocks, how much shared memory. Pure functions of the shape.

use super::params::{
    GRADIENT_COLUMNS, GRADIENT_EXTRA_BYTES, GRADIENT_HOPPER_SHARED_BYTES, GRADIENT_HOPPER_THREADS,
    GRADIENT_ROWS_16BIT, GRADIENT_ROWS_32BIT, GRADIENT_SPLIT_SHARED_BYTES, GRADIENT_STAGES_BYTES,
    HOPPER_SHARED_BYTES, ORDER_MERGE_SHARED_BYTES, ORDER_MERGED, ORDER_OWN, ORDER_RUNS, ORDER_SHARED_BYTES,
    ORDER_TILE, ORDER_WIDE_SHARED_BYTES, ORDER_WIDE_THREADS, ORDER_WIDE_TILE, RETRIEVAL_HOPPER_SHARED_BYTES,
    RETRIEVAL_MERGE_EXTRA_BYTES, RETRIEVAL_SPLIT_SHARED_BYTES, SAME_CLASS_HOPPER_SHARED_BYTES,
    SAME_CLASS_SHARED_BYTES, SELECT_BLOCKS, SELECT_STORED_SHARED_BYTES, SHARING_STAGES_BYTES,
    SIMILARITY_STAGES_BYTES, STAGE_BYTES, SUM_SHARED_BYTES, SWEEP_EXACT_SHARED_BYTES,
    SWEEP_HOPPER_SHARED_BYTES, SWEEP_HOPPER_THREADS, SWEEP_SHARED_BYTES, SWEEP_SPLIT_SHARED_BYTES,
    SWEEP_SPLIT_THREADS, THREADS, TILE, TILE_MASK_WORDS, WEIGH_NO_WORDS, WEIGH_SHARED_BYTES,
    WEIGH_WORDS_BF16, WEIGH_WORDS_F16,
};
use super::{Kernel, LaunchPlan, Precision};
use crate::loss::{Embeddings, LossSettings};
use crate::{Error, Result};

/// Candidates that kernels read at once.
pub(super) const POOL_UNIT: usize = 4;
/// Bytes of a candidate: its similarity and its word.
const CANDIDATE: usize = size_of::<f32>() + size_of::<u32>();
/// Blocks that may share one block of gradient rows.
const MOST_SPLITS: usize = 64;
/// Bytes of the rows of a band of the sweep.
const BAND_BYTES: usize = 16 << 20;

impl Precision {
    /// How rows of this type are multiplied.
    #[must_use]
    pub fn of(embeddings: &Embeddings<'_>, exact: bool) -> Self {
        match embeddings {
            Embeddings::F32(_) if exact => Self::F32,
            Embeddings::F32(_) => Self::RoundedF32,
            Embeddings::F16(_) => Self::F16,
            Embeddings::Bf16(_) => Self::Bf16,
        }
    }

    /// Bytes of one element of the caller's rows.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::RoundedF32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Whether the kernels multiply 16-bit rows, and M in the rows' type.
    #[must_use]
    pub fn is_narrow(self) -> bool {
        self != Self::F32
    }

    /// Bytes of one element of prepared rows: f32 to its own precision is split into two f16.
    #[must_use]
    pub fn stored_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::RoundedF32 | Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// Tiles of `rows` rows.
pub(super) fn tiles(rows: usize) -> usize {
    rows.div_ceil(TILE as usize)
}

/// Keys that one block sorts: more where one merge of the usual ones would not do.
pub(super) fn order_tile(rows: usize) -> usize {
    let wide = rows > (ORDER_TILE * ORDER_RUNS) as usize;
    if wide { ORDER_WIDE_TILE as usize } else { ORDER_TILE as usize }
}

/// Keys of the runs that each merge of the class order begins with; none where one block sorts all of them.
pub(super) fn order_runs(rows: usize) -> impl Iterator<Item = usize> {
    let longer = |run: &usize| Some(run * ORDER_RUNS as usize);
    std::iter::successors(Some(order_tile(rows)), longer).take_while(move |&run| run < rows)
}

/// Elements between two prepared rows: whole pipeline stages.
pub(super) fn stride(dim: usize, precision: Precision) -> usize {
    // f32 to its own precision takes a stage of high parts and one of low ones together.
    let stages = if precision == Precision::F32 { 2 } else { 1 };
    dim.next_multiple_of(stages * STAGE_BYTES as usize / precision.stored_bytes())
}

/// What the passes of one loss work on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// B.
    pub anchors: usize,
    /// N; `None` in the square form.
    pub references: Option<usize>,
    /// D.
    pub dim: usize,
    pub precision: Precision,
    /// Whether the references' gradient is wanted; never in the square form.
    pub reference_gradient: bool,
    /// B of 1/B.
    pub total: usize,
    /// Whether somebody says which reference is an anchor; never in the square form.
    pub identity: bool,
    /// Whether references may be anchors of the whole batch, with numbers of their own; never in the square form.
    pub numbers: bool,
    /// Whether rows are brought to unit length first, and their gradients led back.
    pub any_length: bool,
}

impl Shape {
    /// N, whichever form this is.
    pub fn reference_count(&self) -> usize {
        self.references.unwrap_or(self.anchors)
    }

    pub fn stride(&self) -> usize {
        stride(self.dim, self.precision)
    }

    /// Tiles of S that are computed: the upper triangle in the square form.
    pub fn tiles(&self) -> usize {
        let rows = tiles(self.anchors);
        self.references.map_or(rows * (rows + 1) / 2, |count| rows * tiles(count))
    }

    /// Kernels index rows with 32 bits, a launch has at most 2^31 - 1 blocks, and offsets have 63 bits. Nothing else is
    /// computed from a shape before this: its products may not fit.
    pub fn check(&self) -> Result<()> {
        let counts = [self.anchors, self.reference_count(), self.dim];
        if counts.iter().all(|&count| count <= (1 << 31) - TILE as usize) {
            // The largest matrices are padded and have at most 16 bytes an entry, copies included.
            let rows = tiles(self.anchors.max(self.reference_count())) * TILE as usize;
            let bytes = rows.checked_mul(self.stride()).and_then(|entries| entries.checked_mul(16));
            if bytes.is_some_and(|bytes| isize::try_from(bytes).is_ok()) && self.tiles() < 1 << 31 {
                return Ok(());
            }
        }
        Err(Error::InvalidSetting {
            name: "batch",
            value: format!("{} x {} rows of {}", self.anchors, self.reference_count(), self.dim),
            range: "at most 2^31 tiles of 128 x 128 similarities, 2^31 dimensions and 2^59 entries a side",
        })
    }

    /// Units of [`POOL_UNIT`] candidates in the pool of all tiles, under a budget of bytes. 0 where it does not hold the bits
    /// that say which pairs of a tile are candidates.
    pub fn pool(&self, budget: usize) -> usize {
        let units = (budget / POOL_UNIT / CANDIDATE).min(self.most_units()).min(u32::MAX as usize);
        if units * POOL_UNIT < TILE_MASK_WORDS as usize { 0 } else { units }
    }

    /// Units of all pairs: with as many nothing is ever recomputed.
    pub fn most_units(&self) -> usize {
        self.tiles() * (TILE * TILE) as usize / POOL_UNIT
    }

    /// Columns of tiles whose rows are read again and again while the sweep is in their band: 16 MiB, which L2 holds beside
    /// the rows of the blocks that are under way.
    pub fn band(&self) -> usize {
        let tile = TILE as usize * self.stride() * self.precision.stored_bytes();
        let columns = (BAND_BYTES / tile).max(1);
        1 << columns.ilog2()
    }

    /// Blocks that share the other side's tiles of one block of gradient rows, so that few blocks fill the GPU, and the last
    /// of more do not leave most of it idle. Each has a partial result of its own, and the last one adds all. The least
    /// of: rounds of blocks, times what one takes, in thirds of a tile. A part is written in the time of two tiles, and
    /// read again in that of two thirds (H200: a tile 1.7 us, a part 128 KB).
    pub fn splits(&self, of_references: bool, multiprocessors: u32) -> usize {
        let others = tiles(self.sides(of_references).1);
        let blocks = self.row_blocks(of_references) * self.column_blocks();
        let cost = |&splits: &usize| {
            let parts = if splits == 1 { 0 } else { 6 + 2 * splits };
            (blocks * splits).div_ceil(multiprocessors as usize) * (3 * others.div_ceil(splits) + parts)
        };
        (1..=others.min(MOST_SPLITS)).min_by_key(cost).unwrap_or(1)
    }

    /// Counters of the blocks that share rows and columns of a gradient.
    pub fn gradient_blocks(&self, of_references: bool) -> usize {
        self.row_blocks(of_references) * self.column_blocks()
    }

    /// Blocks that weigh: one for each row tile of whichever side has more, where references are asked for.
    pub fn weigh_blocks(&self) -> usize {
        let both = self.numbers || self.reference_gradient;
        tiles(if both { self.anchors.max(self.reference_count()) } else { self.anchors })
    }

    /// The type of M's elements that `weigh` makes of words, a block for each tile of S.
    pub fn finished_words(&self) -> u32 {
        match self.precision {
            Precision::F32 => WEIGH_NO_WORDS,
            Precision::RoundedF32 | Precision::F16 => WEIGH_WORDS_F16,
            Precision::Bf16 => WEIGH_WORDS_BF16,
        }
    }

    fn row_blocks(&self, of_references: bool) -> usize {
        tiles(self.sides(of_references).0) * (TILE / self.gradient_rows()) as usize
    }

    /// Rows of the result's side, and of the side it sums over.
    pub fn sides(&self, of_references: bool) -> (usize, usize) {
        let (anchors, references) = (self.anchors, self.reference_count());
        if of_references { (references, anchors) } else { (anchors, references) }
    }

    /// Rows of the result that one block of the tile way owns, and blocks side by side.
    fn gradient_rows(&self) -> u32 {
        if self.precision.is_narrow() { GRADIENT_ROWS_16BIT } else { GRADIENT_ROWS_32BIT }
    }

    fn column_blocks(&self) -> usize {
        self.stride().div_ceil(GRADIENT_COLUMNS as usize)
    }

    /// Power of two that the tile of M is stored with. A weight is at most 4 / B, and f16 ends at
    /// 65,504 above and 6e-8 below: with the largest at 2^13 and more, what underflows is 2^-37 of it.
    pub fn weight_scale(&self) -> f32 {
        if !self.precision.is_narrow() {
            return 1.0;
        }
        let log2 = i32::try_from(self.total.ilog2()).unwrap_or(0);
        2.0f32.powi(log2 + 11)
    }

    /// The same for the slopes of the weights by a lambda, which are up to a quarter of the sharpness as large.
    pub fn slope_scale(&self, sharpness: f64) -> f32 {
        if !self.precision.is_narrow() {
            return 1.0;
        }
        self.weight_scale() / 2.0f64.powi((sharpness / 4.0).max(1.0).log2().ceil() as i32) as f32
    }

    /// The kernel that does `kernel`'s work on this GPU. Hopper has its own where S or the gradient is multiplied.
    pub fn variant(&self, kernel: Kernel, warpgroup_products: bool) -> Kernel {
        if !warpgroup_products {
            return kernel;
        }
        match kernel {
            Kernel::Threshold(precision) => Kernel::ThresholdHopper(precision),
            Kernel::Prepare(precision) => Kernel::PrepareHopper(precision),
            Kernel::SameClass(precision) => Kernel::SameClassHopper(precision),
            Kernel::Sweep(precision) => Kernel::SweepHopper(precision),
            Kernel::SelectStored => Kernel::SelectStoredHopper,
            Kernel::SelectRecomputed(precision) => Kernel::SelectRecomputedHopper(precision),
            Kernel::Gradient(precision) => Kernel::GradientHopper(precision),
            Kernel::Retrieval(precision) => Kernel::RetrievalHopper(precision),
            other => other,
        }
    }

    /// How a kernel is launched; of a merge of lists without the memory for its keys.
    pub fn plan(
        &self,
        kernel: Kernel,
        of_references: bool,
        splits: usize,
        multiprocessors: u32,
    ) -> LaunchPlan {
        let own = tiles(self.sides(of_references).0);
        let gradient_grid = [self.row_blocks(of_references), self.column_blocks(), splits];
        let gradient_bytes = |precision: Precision| {
            let element = if precision.is_narrow() { 2 } else { 4 };
            let matrix = self.gradient_rows() * TILE * element;
            GRADIENT_STAGES_BYTES + matrix + GRADIENT_EXTRA_BYTES
        };
        let (grid, shared_bytes) = match kernel {
            Kernel::OrderTiles => {
                ([self.sides(of_references).0.div_ceil(ORDER_OWN as usize), 1, 1], ORDER_SHARED_BYTES)
            }
            Kernel::OrderTilesWide => {
                let blocks = self.sides(of_references).0.div_ceil(ORDER_WIDE_TILE as usize);
                ([blocks, 1, 1], ORDER_WIDE_SHARED_BYTES)
            }
            Kernel::OrderMerge => {
                let blocks = self.sides(of_references).0.div_ceil(ORDER_MERGED as usize);
                ([blocks, 1, 1], ORDER_MERGE_SHARED_BYTES)
            }
            Kernel::Identity | Kernel::ReportNumbers => (threads_for(self.anchors), 0),
            Kernel::InvertOrder => (threads_for(self.sides(of_references).0), 0),
            Kernel::TakeNumbers => (threads_for(self.anchors.max(self.reference_count())), 0),
            Kernel::Prepare(_) | Kernel::PrepareHopper(_) => {
                // Behind the row tiles' blocks those that find the anchors' classes.
                let [classes, ..] = if of_references { [0; 3] } else { threads_for(self.anchors) };
                ([own + classes, 1, 1], SIMILARITY_STAGES_BYTES)
            }
            Kernel::SameClass(_) => ([own, 1, 1], SAME_CLASS_SHARED_BYTES),
            Kernel::SameClassHopper(_) => ([own, 1, 1], SAME_CLASS_HOPPER_SHARED_BYTES),
            Kernel::Sweep(precision) => {
                let shared_bytes =
                    if precision.is_narrow() { SWEEP_SHARED_BYTES } else { SWEEP_EXACT_SHARED_BYTES };
                ([self.tiles(), 1, 1], shared_bytes)
            }
            Kernel::SweepHopper(precision) => {
                let shared_bytes =
                    if precision.is_narrow() { SWEEP_HOPPER_SHARED_BYTES } else { SWEEP_SPLIT_SHARED_BYTES };
                ([self.tiles().min(multiprocessors as usize), 1, 1], shared_bytes)
            }
            Kernel::SelectStored | Kernel::SelectStoredHopper => {
                let blocks = (multiprocessors * SELECT_BLOCKS) as usize;
                ([self.tiles().min(blocks), 1, 1], SELECT_STORED_SHARED_BYTES)
            }
            Kernel::SelectRecomputedHopper(_) => ([self.tiles(), 1, 1], HOPPER_SHARED_BYTES),
            Kernel::SelectRecomputed(_) => ([self.tiles(), 1, 1], SIMILARITY_STAGES_BYTES),
            Kernel::LeadBack(_) => ([self.sides(of_references).0.div_ceil(THREADS as usize / 32), 1, 1], 0),
            Kernel::Weigh => {
                let finished = if self.finished_words() == WEIGH_NO_WORDS { 0 } else { self.tiles() };
                ([self.weigh_blocks() + finished, 1, 1], WEIGH_SHARED_BYTES)
            }
            Kernel::ThresholdSum => ([1, 1, 1], SUM_SHARED_BYTES),
            Kernel::Gradient(precision) => (gradient_grid, gradient_bytes(precision)),
            // A block for each lambda.
            Kernel::Threshold(precision) | Kernel::ThresholdHopper(precision) => {
                let [rows, columns, splits] = gradient_grid;
                ([rows, columns, 2 * splits], gradient_bytes(precision))
            }
            Kernel::GradientHopper(precision) => {
                let shared_bytes = if precision.is_narrow() {
                    GRADIENT_HOPPER_SHARED_BYTES
                } else {
                    GRADIENT_SPLIT_SHARED_BYTES
                };
                ([own, self.column_blocks(), splits], shared_bytes)
            }
            Kernel::Retrieval(precision) => {
                let shared_bytes =
                    if precision.is_narrow() { SHARING_STAGES_BYTES } else { SIMILARITY_STAGES_BYTES };
                ([own, splits, 1], shared_bytes)
            }
            Kernel::RetrievalHopper(precision) => {
                let shared_bytes = if precision.is_narrow() {
                    RETRIEVAL_HOPPER_SHARED_BYTES
                } else {
                    RETRIEVAL_SPLIT_SHARED_BYTES
                };
                ([own, splits, 1], shared_bytes)
            }
            Kernel::RetrievalMerge => ([self.anchors, 1, 1], RETRIEVAL_MERGE_EXTRA_BYTES),
        };
        let threads = match kernel {
            Kernel::GradientHopper(_) => GRADIENT_HOPPER_THREADS,
            Kernel::SweepHopper(Precision::F32) | Kernel::RetrievalHopper(Precision::F32) => {
                SWEEP_SPLIT_THREADS
            }
            Kernel::SweepHopper(_) | Kernel::RetrievalHopper(_) => SWEEP_HOPPER_THREADS,
            Kernel::OrderTilesWide => ORDER_WIDE_THREADS,
            _ => THREADS,
        };
        // `check` has bounded them.
        LaunchPlan { grid: grid.map(|blocks| blocks as u32), threads, shared_bytes }
    }
}

/// Blocks of a thread a row.
fn threads_for(rows: usize) -> [usize; 3] {
    [rows.div_ceil(THREADS as usize), 1, 1]
}

/// Most of one term of the loss.
///
/// softplus(x) <= max(x, 0) + 1 with x <= sharpness * (1 + |lambda|), and a margin for
/// rows that are not quite of unit length.
fn largest_term(settings: &LossSettings) -> f64 {
    let largest = |sharpness: f64, lambda: f64| sharpness * (1.1 + lambda.abs()) + 1.0;
    largest(settings.alpha, settings.lambda_neg).max(largest(settings.beta, settings.lambda_pos))
}

/// Fixed-point units in 1.0 for a row's sums: as many as 62 bits hold of N terms; 2^50 of a sigmoid fit the words of a
/// tile's sums (select.cu).
pub(super) fn sum_scale(settings: &LossSettings, references: usize) -> f64 {
    2.0f64.powi((62 - (largest_term(settings) * references as f64).log2().ceil() as i32).min(50))
}

/// The same for what a term is more than its sigmoid: 2^41 of them hold one.
pub(super) fn more_scale(settings: &LossSettings, references: usize) -> f64 {
    2.0f64.powi(41 - largest_term(settings).log2().ceil() as i32).min(sum_scale(settings, references))
}

#[cfg(test)]
mod tests {
    use super::super::params::SWEEP_HOPPER_RUN;
    use super::*;

    fn square(anchors: usize, dim: usize, precision: Precision) -> Shape {
        Shape {
            anchors,
            references: None,
            dim,
            precision,
            reference_gradient: false,
            total: anchors,
            identity: false,
            numbers: false,
            any_length: false,
        }
    }

    #[test]
    fn the_square_form_computes_half_the_tiles() {
        let shape = square(1000, 64, Precision::F32);
        assert_eq!(shape.tiles(), 8 * 9 / 2);
        assert_eq!(Shape { references: Some(1000), ..shape }.tiles(), 64);
    }

    #[test]
    fn shapes_whose_products_do_not_fit_are_refused() {
        let most = (1 << 31) - 128;
        for (anchors, references, dim) in [
            (usize::MAX, None, 8),
            (8, Some(usize::MAX), 8),
            (8, None, usize::MAX),
            (1 << 31, None, 1),
            (1 << 20, None, 8),
            (1, Some(most), most),
        ] {
            let shape = Shape { references, ..square(anchors, dim, Precision::F32) };
            let refused = shape.check();
            let fits = anchors == 1 << 20;
            assert_eq!(refused.is_ok(), fits, "{anchors} x {references:?} x {dim}");
        }
    }

    #[test]
    fn few_launches_merge_what_is_sorted() {
        let runs = |rows| order_runs(rows).collect::<Vec<_>>();
        assert_eq!(runs(1), [0usize; 0]);
        assert_eq!(runs(2_048), [0usize; 0]);
        assert_eq!(runs(2_049), [2_048]);
        assert_eq!(runs(65_536), [2_048]);
        assert_eq!(runs(65_537), [8_192]);
        assert_eq!(runs(262_144), [8_192]);
        assert_eq!(runs(262_145), [8_192, 262_144]);
        // The largest batch there is: a run still is a number of 32 bits.
        assert_eq!(runs((1 << 31) - 128), [8_192, 1 << 18, 1 << 23, 1 << 28]);
    }

    #[test]
    fn rows_are_padded_to_whole_stages() {
        assert_eq!(stride(130, Precision::F32), 192);
        assert_eq!(stride(130, Precision::RoundedF32), 192);
        assert_eq!(stride(130, Precision::Bf16), 192);
        assert_eq!(stride(512, Precision::F16), 512);
    }

    #[test]
    fn the_pool_stays_within_the_budget() {
        let shape = square(16_384, 512, Precision::Bf16);
        for budget in [0, 5, 4095, 4096, 1 << 20, 1 << 30, usize::MAX / 2] {
            let units = shape.pool(budget);
            assert!(units * 32 <= budget);
            // Or the bits of a tile's candidates would not fit.
            assert_eq!(units == 0, budget < 4096);
        }
        assert_eq!(shape.pool(2 << 30), shape.most_units());
        // A unit's number has 32 bits.
        assert_eq!(square(1 << 20, 512, Precision::Bf16).pool(usize::MAX), u32::MAX as usize);
    }

    #[test]
    fn a_band_s_rows_fit_l2_and_there_is_always_one() {
        assert_eq!(square(1, 512, Precision::Bf16).band(), 128);
        assert_eq!(square(1, 130, Precision::F32).band(), 128);
        assert_eq!(square(1, 64, Precision::Bf16).band(), 1024);
        assert_eq!(square(1, 1 << 20, Precision::Bf16).band(), 1);
    }

    /// The tiles of the sweep in the order of `tile_at` in tile.cuh, of a square form of `tiles` row tiles.
    fn order_of_tiles(tiles: usize, band: usize) -> Vec<(usize, usize)> {
        let firsts = (0..tiles).step_by(band);
        let in_band = |first: usize| {
            let end = tiles.min(first + band);
            // The longest row of the triangle, the shortest, and so on.
            let triangle =
                (0..end - first).map(move |k| if k % 2 == 0 { first + k / 2 } else { end - 1 - k / 2 });
            let columns = move |row: usize| (row.max(first)..end).map(move |column| (row, column));
            (0..first).chain(triangle).flat_map(columns)
        };
        firsts.flat_map(in_band).collect()
    }

    /// Bytes that a cache of `lines` tiles' rows, the least recently used leaving, fetches for Hopper's sweep of 132 blocks,
    /// one tile each at a time: a column tile for every tile, a row tile where the row changes.
    fn fetched(
        order: &[(usize, usize)],
        waves: usize,
        tiles: usize,
        tile_bytes: usize,
        lines: usize,
    ) -> usize {
        const BLOCKS: usize = 132;
        let share = |first: usize, end: usize, part: usize, of: usize| first + (end - first) * part / of;
        let (mut used, mut queue) = (vec![0usize; tiles], std::collections::VecDeque::new());
        let (mut now, mut held, mut misses) = (0, 0, 0);
        let mut touch = |tile: usize| {
            now += 1;
            if used[tile] == 0 {
                misses += 1;
                held += 1;
            }
            used[tile] = now;
            queue.push_back((tile, now));
            while held > lines {
                let Some((oldest, when)) = queue.pop_front() else { unreachable!("held tiles are queued") };
                if used[oldest] == when {
                    used[oldest] = 0;
                    held -= 1;
                }
            }
        };
        let mut rows = [usize::MAX; BLOCKS];
        for wave in 0..waves {
            let (first, end) = (share(0, order.len(), wave, waves), share(0, order.len(), wave + 1, waves));
            let runs: Vec<_> =
                (0..BLOCKS).map(|b| share(first, end, b, BLOCKS)..share(first, end, b + 1, BLOCKS)).collect();
            for step in 0..runs.iter().map(ExactSizeIterator::len).max().unwrap_or(0) {
                for (run, row) in runs.iter().zip(&mut rows) {
                    let Some(&tile) = run.clone().nth(step).and_then(|at| order.get(at)) else { continue };
                    if *row != tile.0 {
                        *row = tile.0;
                        touch(tile.0);
                    }
                    touch(tile.1);
                }
            }
        }
        misses * tile_bytes
    }

    #[test]
    fn bands_keep_rows_in_l2() {
        // 50 MB of L2, rows of 512 dimensions in 16 bits.
        for (anchors, least, most_megabytes) in [(65_536, 10, 500), (262_144, 40, 6_000)] {
            let shape = square(anchors, 512, Precision::Bf16);
            let (tiles, tile_bytes) = (tiles(anchors), TILE as usize * 1024);
            let waves = shape.tiles().div_ceil(132 * SWEEP_HOPPER_RUN as usize);
            let banded = fetched(
                &order_of_tiles(tiles, shape.band()),
                waves,
                tiles,
                tile_bytes,
                50_000_000 / tile_bytes,
            );
            let by_rows =
                fetched(&order_of_tiles(tiles, tiles), 1, tiles, tile_bytes, 50_000_000 / tile_bytes);
            let megabytes = [banded, by_rows].map(|bytes| bytes / 1_000_000);
            assert!(megabytes[0] < most_megabytes && by_rows > least * banded, "{anchors}: {megabytes:?} MB");
        }
    }

    #[test]
    fn small_batches_are_split_and_large_ones_are_not() {
        assert_eq!(square(16_384, 512, Precision::Bf16).splits(false, 132), 1);
        assert_eq!(square(1024, 512, Precision::Bf16).splits(false, 132), 4);
        assert_eq!(
            square(4096, 512, Precision::Bf16).splits(false, 132),
            2,
            "64 blocks, twice, are one round"
        );
        assert_eq!(square(8192, 512, Precision::Bf16).splits(false, 132), 1);
        assert_eq!(
            square(10_240, 512, Precision::Bf16).splits(false, 132),
            4,
            "160 blocks would be two rounds"
        );
        assert_eq!(square(64, 512, Precision::Bf16).splits(false, 132), 1, "there is but one tile to share");
        let bank = Shape { references: Some(65_536), ..square(80, 512, Precision::Bf16) };
        assert!((16..=MOST_SPLITS).contains(&bank.splits(false, 132)));
    }

    #[test]
    fn blocks_fit_every_gpu() {
        // A block of sm_89 may have 99 KiB.
        let shape = square(1000, 512, Precision::F32);
        for precision in [Precision::F32, Precision::RoundedF32, Precision::F16, Precision::Bf16] {
            for kernel in [
                Kernel::Prepare(precision),
                Kernel::Sweep(precision),
                Kernel::SameClass(precision),
                Kernel::Gradient(precision),
                Kernel::Retrieval(precision),
            ] {
                assert!(shape.plan(kernel, false, 1, 132).shared_bytes <= 99 * 1024, "{kernel:?}");
            }
        }
    }

    #[test]
    fn hopper_s_blocks_fit_hopper() {
        for precision in [Precision::F32, Precision::RoundedF32, Precision::F16, Precision::Bf16] {
            let shape = square(1000, 512, precision);
            for kernel in [
                Kernel::Prepare(precision),
                Kernel::SameClass(precision),
                Kernel::Sweep(precision),
                Kernel::SelectRecomputed(precision),
                Kernel::Gradient(precision),
                Kernel::Retrieval(precision),
            ] {
                let variant = shape.variant(kernel, true);
                assert_eq!(shape.variant(kernel, false), kernel);
                // A block of sm_90 may have 227 KiB.
                let plan = |kernel| shape.plan(kernel, false, 3, 7);
                assert!(plan(variant).shared_bytes <= 227 * 1024, "{variant:?}");
                let threads = match variant {
                    Kernel::GradientHopper(_) => 384,
                    Kernel::SweepHopper(Precision::F32) | Kernel::RetrievalHopper(Precision::F32) => 384,
                    Kernel::SweepHopper(_) | Kernel::RetrievalHopper(_) => 640,
                    _ => THREADS,
                };
                assert_eq!(plan(variant).threads, threads, "{variant:?}");
                if let Kernel::SweepHopper(_) = variant {
                    // Its blocks walk the tiles that there are.
                    assert_eq!((plan(variant).grid, plan(kernel).grid), ([7, 1, 1], [36, 1, 1]));
                } else {
                    // Both variants compute the same part of the result in the same block, but for twice the rows.
                    let [mut rows, columns, splits] = plan(variant).grid;
                    if variant == Kernel::GradientHopper(Precision::F32) {
                        rows *= 2;
                    }
                    assert_eq!([rows, columns, splits], plan(kernel).grid);
                }
                assert_ne!(variant, kernel);
            }
        }
    }

    #[test]
    fn sums_of_the_largest_terms_do_not_overflow() {
        let settings = LossSettings { alpha: 1e4, lambda_neg: -2.0, ..LossSettings::default() };
        let scale = sum_scale(&settings, 1 << 30);
        assert!(scale * 1e4 * 3.1 * f64::from(1 << 30) < 2.0f64.powi(63));
        assert!(
            more_scale(&settings, 1 << 30) * 1e4 * 3.1 < 2.0f64.powi(41),
            "the limit is out of reach of unit rows"
        );
        assert!(sum_scale(&LossSettings::default(), 16_384) > 2.0f64.powi(40));
    }

    #[test]
    fn scaled_weights_fit_half_precision() {
        for anchors in [1, 2, 3, 80, 16_384, 262_144] {
            let scale = square(anchors, 8, Precision::F16).weight_scale();
            let largest = 4.0 / anchors as f32 * scale;
            assert!((4096.0..=32_768.0).contains(&largest), "{anchors}: {largest}");
        }
    }
}
