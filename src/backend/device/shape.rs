//! The sizes of a batch, and what follows from them alone.

use super::Precision;
use super::params::{
    ORDER_RUNS, ORDER_TILE, ORDER_WIDE_TILE, STAGE_BYTES, TILE, TILE_MASK_WORDS, WEIGH_NO_WORDS,
    WEIGH_WORDS_BF16, WEIGH_WORDS_F16,
};
use crate::loss::{BatchSize, LossSettings};
use crate::{Error, Result};

/// Candidates that kernels read at once.
pub(super) const POOL_UNIT: usize = 4;
/// Bytes of a candidate: its similarity and its word.
const CANDIDATE: usize = size_of::<f32>() + size_of::<u32>();
/// Most dimensions: the bytes of 128 rows in two parts are counted in 32 bits.
const MOST_DIMENSIONS: usize = 1 << 22;
/// Most anchors of the whole batch, B of the factor 1/B.
const MOST_ROWS: usize = 1 << 31;
/// Bytes of the rows in a band of the sweep.
const BAND_BYTES: usize = 16 << 20;

/// Tiles of `rows` rows.
pub(super) fn tiles(rows: usize) -> usize {
    rows.div_ceil(TILE as usize)
}

/// Keys that one block sorts: more if a single merge of shorter runs would not do.
pub(super) fn order_tile(rows: usize) -> usize {
    let wide = rows > (ORDER_TILE * ORDER_RUNS) as usize;
    if wide { ORDER_WIDE_TILE as usize } else { ORDER_TILE as usize }
}

/// Length in keys of the runs that each merge of the class order begins with; none if one block sorts all.
pub(super) fn order_runs(rows: usize) -> impl Iterator<Item = usize> {
    let longer = |run: &usize| Some(run * ORDER_RUNS as usize);
    std::iter::successors(Some(order_tile(rows)), longer).take_while(move |&run| run < rows)
}

/// Elements between two prepared rows: whole pipeline stages.
pub(super) fn stride(dim: usize, precision: Precision) -> usize {
    // f32 at its own precision takes a stage of high parts and one of low parts together.
    let stages = if precision == Precision::F32 { 2 } else { 1 };
    dim.next_multiple_of(stages * STAGE_BYTES as usize / precision.stored_bytes())
}

/// The sizes and the form of a batch.
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
    /// B of the factor 1/B.
    pub total: usize,
    /// Whether the caller says which reference is an anchor; never in the square form.
    pub identity: bool,
    /// Whether references may be anchors of the whole batch, with numbers from the caller; never in the
    /// square form.
    pub numbers: bool,
    /// Whether rows are scaled to unit length first, and gradients are with respect to the rows as given.
    pub normalize: bool,
}

impl Shape {
    /// The square form of unit rows.
    pub fn square(anchors: usize, dim: usize, precision: Precision) -> Self {
        Self {
            anchors,
            references: None,
            dim,
            precision,
            reference_gradient: false,
            total: anchors,
            identity: false,
            numbers: false,
            normalize: false,
        }
    }

    pub fn size(&self) -> BatchSize {
        BatchSize { anchors: self.anchors, references: self.references, dim: self.dim }
    }

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

    /// Refuses sizes that the kernels cannot count: they index rows, and the bytes of a tile's rows, with 32
    /// bits, and a launch has at most 2^31 - 1 blocks. Comes before other arithmetic, which may overflow.
    pub fn check(&self) -> Result<()> {
        let counts = [self.anchors, self.reference_count()];
        let counted = counts.iter().all(|&count| count <= (1 << 31) - TILE as usize);
        // The largest grid is that of `weigh`.
        let blocks = || self.tiles() + self.weigh_blocks();
        // Padded rows, copies included, take 16 bytes an entry: 2^57 bytes at most.
        if counted && self.dim <= MOST_DIMENSIONS && self.total <= MOST_ROWS && blocks() < 1 << 31 {
            return Ok(());
        }
        let [anchors, references] = counts;
        Err(Error::InvalidSetting {
            name: "batch",
            value: format!("{anchors} x {references} rows of {}, of {} in all", self.dim, self.total),
            range: "at most 2^31 tiles of 128 x 128 similarities, 2^22 dimensions and 2^31 rows in all",
        })
    }

    /// Units of [`POOL_UNIT`] candidates in the pool of all tiles, under a budget of bytes; 0 if the pool
    /// would not hold the bits that tell which pairs of one tile are candidates.
    pub fn pool(&self, budget: usize) -> usize {
        let units = (budget / POOL_UNIT / CANDIDATE).min(self.most_units()).min(u32::MAX as usize);
        if units * POOL_UNIT < TILE_MASK_WORDS as usize { 0 } else { units }
    }

    /// Units of all pairs: with that many, nothing is recomputed.
    pub fn most_units(&self) -> usize {
        self.tiles() * (TILE * TILE) as usize / POOL_UNIT
    }

    /// Column tiles of a band, whose rows are read for every row tile while the sweep is in the band: 16 MiB,
    /// which L2 holds beside the rows of the running blocks.
    pub fn band(&self) -> usize {
        let tile = TILE as usize * self.stride() * self.precision.stored_bytes();
        let columns = (BAND_BYTES / tile).max(1);
        1 << columns.ilog2()
    }

    /// Blocks that weigh: one per row tile of the anchors or, if references are weighed, of the larger side.
    pub fn weigh_blocks(&self) -> usize {
        let both = self.numbers || self.reference_gradient;
        tiles(if both { self.anchors.max(self.reference_count()) } else { self.anchors })
    }

    /// Type of the elements of M that `weigh` writes in place of words, or [`WEIGH_NO_WORDS`].
    pub fn finished_words(&self) -> u32 {
        match self.precision {
            Precision::F32 => WEIGH_NO_WORDS,
            Precision::RoundedF32 | Precision::F16 => WEIGH_WORDS_F16,
            Precision::Bf16 => WEIGH_WORDS_BF16,
        }
    }

    /// Number of rows of the result's side, and of the side that is summed over.
    pub fn sides(&self, of_references: bool) -> (usize, usize) {
        let (anchors, references) = (self.anchors, self.reference_count());
        if of_references { (references, anchors) } else { (anchors, references) }
    }

    /// Power of two that weights are multiplied by in a tile of M. A weight is at most 4 / B, and f16 ranges
    /// from 2^-24 to 65,504: with the largest weight above 2^12, those that underflow are below 2^-36 of it.
    pub fn weight_scale(&self) -> f32 {
        if !self.precision.is_narrow() {
            return 1.0;
        }
        let log2 = i32::try_from(self.total.ilog2()).unwrap_or(0);
        2.0f32.powi(log2 + 11)
    }

    /// The same for the derivatives of the weights by a lambda, which are up to `sharpness` / 4 times as
    /// large.
    pub fn slope_scale(&self, sharpness: f64) -> f32 {
        if !self.precision.is_narrow() {
            return 1.0;
        }
        self.weight_scale() / 2.0f64.powi((sharpness / 4.0).max(1.0).log2().ceil() as i32) as f32
    }
}

/// Upper bound of one term of the loss.
///
/// softplus(x) <= max(x, 0) + 1 with x <= sharpness * (1 + |lambda|), and a margin for
/// rows that are not quite of unit length.
fn largest_term(settings: &LossSettings) -> f64 {
    let largest = |sharpness: f64, lambda: f64| sharpness * (1.1 + lambda.abs()) + 1.0;
    largest(settings.alpha, settings.lambda_neg).max(largest(settings.beta, settings.lambda_pos))
}

/// Fixed-point units per 1.0 in a row's sums: as many as let N terms fit 62 bits. At most 2^50: a sigmoid
/// then fits the words of a tile's sums (select.cu).
pub(super) fn sum_scale(settings: &LossSettings, references: usize) -> f64 {
    2.0f64.powi((62 - (largest_term(settings) * references as f64).log2().ceil() as i32).min(50))
}

/// The same for the excess of a term over its sigmoid: the largest term is at most 2^41 units.
pub(super) fn more_scale(settings: &LossSettings, references: usize) -> f64 {
    2.0f64.powi(41 - largest_term(settings).log2().ceil() as i32).min(sum_scale(settings, references))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_square_form_computes_half_the_tiles() {
        let shape = Shape::square(1000, 64, Precision::F32);
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
            (65_534 * 128, None, 8),
            (65_535 * 128, None, 8),
            (1, Some(most), 1 << 22),
            (1, None, (1 << 22) + 1),
        ] {
            let shape = Shape { references, ..Shape::square(anchors, dim, Precision::F32) };
            let refused = shape.check();
            let fits = [1 << 20, 65_534 * 128].contains(&anchors) || dim == 1 << 22;
            assert_eq!(refused.is_ok(), fits, "{anchors} x {references:?} x {dim}");
        }
        let part = |total| Shape { total, ..Shape::square(8, 8, Precision::F32) }.check().is_ok();
        assert!(part(1 << 31) && !part((1 << 31) + 1), "1/B is worked out from 32 bits");
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
        // For the largest batch, the length of a run still fits 32 bits.
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
        let shape = Shape::square(16_384, 512, Precision::Bf16);
        for budget in [0, 5, 4095, 4096, 1 << 20, 1 << 30, usize::MAX / 2] {
            let units = shape.pool(budget);
            assert!(units * 32 <= budget);
            // A smaller pool could not hold the candidate bits of a tile.
            assert_eq!(units == 0, budget < 4096);
        }
        assert_eq!(shape.pool(2 << 30), shape.most_units());
        // Unit numbers have 32 bits.
        assert_eq!(Shape::square(1 << 20, 512, Precision::Bf16).pool(usize::MAX), u32::MAX as usize);
    }

    #[test]
    fn a_band_s_rows_fit_l2_and_there_is_always_one() {
        assert_eq!(Shape::square(1, 512, Precision::Bf16).band(), 128);
        assert_eq!(Shape::square(1, 130, Precision::F32).band(), 128);
        assert_eq!(Shape::square(1, 64, Precision::Bf16).band(), 1024);
        assert_eq!(Shape::square(1, 1 << 20, Precision::Bf16).band(), 1);
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
            let scale = Shape::square(anchors, 8, Precision::F16).weight_scale();
            let largest = 4.0 / anchors as f32 * scale;
            assert!((4096.0..=32_768.0).contains(&largest), "{anchors}: {largest}");
        }
    }
}

/// How often rows are fetched, in the order in which the kernels take tiles.
#[cfg(all(test, feature = "emulated"))]
mod bands {
    use super::super::params::SWEEP_HOPPER_RUN;
    use super::*;
    use crate::backend::emulated::tile_at;

    /// The sweep's tiles of a square batch of `tiles` row tiles, in order.
    fn order_of_tiles(tiles: usize, band: usize) -> Vec<(usize, usize)> {
        (0..tiles * (tiles + 1) / 2).map(|position| tile_at(tiles, band, position)).collect()
    }

    /// Bytes that an LRU cache of the rows of `lines` tiles fetches for Hopper's sweep of 132 blocks, which
    /// take one tile each at a time: a column tile for every tile, and a row tile where the row changes.
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
            let shape = Shape::square(anchors, 512, Precision::Bf16);
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
}
