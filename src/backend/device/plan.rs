//! Launch plans: how many blocks each kernel of a loss has. Pure functions of the shape and the GPU.

use super::params::{
    GRADIENT_COLUMNS, ORDER_MERGED, ORDER_OWN, ORDER_WIDE_TILE, SELECT_BLOCKS, SPLITS_ADDED, THREADS, TILE,
    WEIGH_NO_WORDS,
};
use super::shape::{Shape, tiles};
use super::{DeviceProperties, Kernel};

/// Most blocks that share one block of gradient rows.
const MOST_SPLITS: usize = 64;

/// How a kernel is launched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaunchPlan {
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

/// The blocks of a gradient's product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GradientGrid {
    /// Blocks of rows.
    pub rows: usize,
    /// Blocks of columns.
    pub columns: usize,
    /// Blocks that share the other side's tiles of one block of rows and columns.
    pub splits: usize,
}

impl GradientGrid {
    /// The blocks of `kernel` for a batch of `shape`.
    ///
    /// The number of splits is the one of least estimated time: rounds of blocks, times the time of a block
    /// in thirds of a tile's. It makes few blocks fill the GPU, and keeps the last round of many from leaving
    /// most of it idle. Each split writes a part; the last of [`SPLITS_ADDED`] to finish adds theirs, and the
    /// last of these adds the sums. Writing a part takes the time of two tiles, writing a sum of parts that
    /// of one, reading either back two thirds (H200, 16 bits: a tile 1.7 us, a part 128 KB).
    pub fn new(kernel: Kernel, shape: &Shape, of_references: bool, gpu: DeviceProperties) -> Self {
        let kernel = variant(kernel, gpu);
        let (own, others) = shape.sides(of_references);
        let others = tiles(others);
        let rows = tiles(own) * (TILE / kernel.gradient_rows()) as usize;
        let columns = shape.stride().div_ceil(GRADIENT_COLUMNS as usize);
        let cost = |&splits: &usize| {
            let parts = match splits.div_ceil(SPLITS_ADDED as usize) {
                _ if splits == 1 => 0,
                1 => 6 + 2 * splits,
                groups => 6 + 2 * SPLITS_ADDED as usize + 3 + 2 * groups,
            };
            let rounds = (rows * columns * splits).div_ceil(gpu.multiprocessors as usize);
            rounds * (3 * others.div_ceil(splits) + parts)
        };
        let splits = (1..=others.min(MOST_SPLITS)).min_by_key(cost).unwrap_or(1);
        Self { rows, columns, splits }
    }

    /// Number of blocks of rows and columns, splits not counted.
    pub fn blocks(self) -> usize {
        self.rows * self.columns
    }

    /// Number of arrival counters of the blocks that add parts: for each block of rows and columns one for
    /// every group of splits, and one for the groups.
    pub fn counters(self) -> usize {
        match self.splits {
            1 => 0,
            splits => self.blocks() * (splits.div_ceil(SPLITS_ADDED as usize) + 1),
        }
    }
}

/// The kernel that does `kernel`'s work on this GPU.
pub(super) fn variant(kernel: Kernel, gpu: DeviceProperties) -> Kernel {
    if gpu.warpgroup_products { kernel.on_hopper() } else { kernel }
}

impl LaunchPlan {
    /// The plan of `kernel`, which must be this GPU's [`variant`]. That of a search is for one part, that of
    /// a merge without the room for its keys; callers change both.
    pub(super) fn new(kernel: Kernel, shape: &Shape, of_references: bool, gpu: DeviceProperties) -> Self {
        let (rows, _) = shape.sides(of_references);
        let own = tiles(rows);
        let gradient = || {
            let GradientGrid { rows, columns, splits } = GradientGrid::new(kernel, shape, of_references, gpu);
            [rows, columns, splits]
        };
        let grid = match kernel {
            Kernel::OrderTiles => line(rows.div_ceil(ORDER_OWN as usize)),
            Kernel::OrderTilesWide => line(rows.div_ceil(ORDER_WIDE_TILE as usize)),
            Kernel::OrderMerge => line(rows.div_ceil(ORDER_MERGED as usize)),
            Kernel::Identity | Kernel::ReportNumbers => line(blocks_for(shape.anchors)),
            Kernel::InvertOrder => line(blocks_for(rows)),
            Kernel::TakeNumbers => line(blocks_for(shape.anchors.max(shape.reference_count()))),
            Kernel::Prepare(_) | Kernel::PrepareHopper(_) => {
                // The blocks behind those of the row tiles find the anchors' classes.
                line(own + if of_references { 0 } else { blocks_for(shape.anchors) })
            }
            Kernel::SameClass(_) | Kernel::SameClassHopper(_) => line(own),
            Kernel::SweepHopper(_) => line(shape.tiles().min(gpu.multiprocessors as usize)),
            Kernel::SelectStored | Kernel::SelectStoredHopper => {
                line(shape.tiles().min((gpu.multiprocessors * SELECT_BLOCKS) as usize))
            }
            Kernel::Sweep(_) | Kernel::SelectRecomputed(_) | Kernel::SelectRecomputedHopper(_) => {
                line(shape.tiles())
            }
            Kernel::Weigh => {
                let finished = if shape.finished_words() == WEIGH_NO_WORDS { 0 } else { shape.tiles() };
                line(shape.weigh_blocks() + finished)
            }
            Kernel::Gradient(_) | Kernel::GradientHopper(_) => gradient(),
            Kernel::NormalizeBackward(_) => line(rows.div_ceil(THREADS as usize / 32)),
            // A block for each lambda.
            Kernel::Threshold(_) | Kernel::ThresholdHopper(_) => {
                let [rows, columns, splits] = gradient();
                [rows, columns, 2 * splits]
            }
            Kernel::ThresholdSum => line(1),
            Kernel::Retrieval(_) | Kernel::RetrievalHopper(_) => line(own),
            Kernel::RetrievalMerge => line(shape.anchors),
        };
        // `Shape::check` has bounded the numbers of blocks.
        Self {
            grid: grid.map(|blocks| blocks as u32),
            threads: kernel.threads(),
            shared_bytes: kernel.shared_bytes(),
        }
    }
}

fn line(blocks: usize) -> [usize; 3] {
    [blocks, 1, 1]
}

/// Blocks with one thread per row.
fn blocks_for(rows: usize) -> usize {
    rows.div_ceil(THREADS as usize)
}

#[cfg(test)]
mod tests {
    use super::super::{Precision, params};
    use super::*;

    const H200: DeviceProperties = DeviceProperties {
        multiprocessors: 132,
        warpgroup_products: true,
        list_bytes: DeviceProperties::LIST_BYTES,
    };
    const PRECISIONS: [Precision; 4] =
        [Precision::F32, Precision::RoundedF32, Precision::F16, Precision::Bf16];

    /// Every kernel except Hopper's own.
    fn kernels(precision: Precision) -> [Kernel; 19] {
        [
            Kernel::OrderTiles,
            Kernel::OrderTilesWide,
            Kernel::OrderMerge,
            Kernel::Prepare(precision),
            Kernel::InvertOrder,
            Kernel::Identity,
            Kernel::TakeNumbers,
            Kernel::ReportNumbers,
            Kernel::SameClass(precision),
            Kernel::Sweep(precision),
            Kernel::SelectStored,
            Kernel::SelectRecomputed(precision),
            Kernel::Weigh,
            Kernel::Gradient(precision),
            Kernel::NormalizeBackward(precision),
            Kernel::Threshold(precision),
            Kernel::ThresholdSum,
            Kernel::Retrieval(precision),
            Kernel::RetrievalMerge,
        ]
    }

    fn splits(shape: &Shape) -> usize {
        GradientGrid::new(Kernel::Gradient(shape.precision), shape, false, H200).splits
    }

    #[test]
    fn small_batches_are_split_and_large_ones_are_not() {
        let square = |anchors| splits(&Shape::square(anchors, 512, Precision::Bf16));
        assert_eq!(square(64), 1, "there is but one tile to share");
        assert_eq!(square(1_024), 4);
        assert_eq!(square(4_096), 2, "64 blocks, twice, are one round");
        assert_eq!(square(8_192), 1);
        assert_eq!(square(10_240), 4, "160 blocks would be two rounds");
        assert_eq!(square(16_384), 1);
        let bank = Shape { references: Some(65_536), ..Shape::square(80, 512, Precision::Bf16) };
        assert_eq!(splits(&bank), MOST_SPLITS, "added in two steps");
        // As in `parts_of_many_splits_are_added_in_two_steps` of the emulated tests.
        let emulated = DeviceProperties { multiprocessors: 64, ..H200 };
        let few = Shape { references: Some(6_000), ..Shape::square(24, 20, Precision::F32) };
        let kernel = Kernel::Gradient(Precision::F32);
        assert!(GradientGrid::new(kernel, &few, false, emulated).splits > SPLITS_ADDED as usize);
        // For f32, Hopper's blocks have 128 rows, others 64.
        let exact = Shape::square(4_096, 512, Precision::F32);
        assert_eq!(splits(&exact), 2);
        let others = DeviceProperties { warpgroup_products: false, ..H200 };
        assert_eq!(GradientGrid::new(Kernel::Gradient(Precision::F32), &exact, false, others).splits, 1);
    }

    #[test]
    fn blocks_fit_every_gpu() {
        for kernel in PRECISIONS.into_iter().flat_map(kernels) {
            // A block may use 99 KiB of shared memory on sm_89, and 227 KiB on sm_90.
            assert!(kernel.shared_bytes() <= 99 * 1024, "{kernel:?}");
            assert!(kernel.on_hopper().shared_bytes() <= 227 * 1024, "{kernel:?}");
        }
    }

    #[test]
    fn hopper_s_kernels_compute_the_same_parts_of_the_result() {
        let few = DeviceProperties { multiprocessors: 7, ..H200 };
        for precision in PRECISIONS {
            let shape = Shape::square(1_000, 512, precision);
            for kernel in kernels(precision) {
                let own = kernel.on_hopper();
                let grid = |kernel| LaunchPlan::new(kernel, &shape, false, few).grid;
                match own {
                    // A fixed number of blocks walks all tiles.
                    Kernel::SweepHopper(_) => {
                        assert_eq!((grid(own), grid(kernel)), ([7, 1, 1], [36, 1, 1]));
                    }
                    // Its blocks have twice the rows.
                    Kernel::GradientHopper(Precision::F32) => assert_eq!(own.gradient_rows(), 128),
                    _ => assert_eq!(grid(own), grid(kernel), "{own:?}"),
                }
                let threads = match own {
                    Kernel::GradientHopper(_) => 384,
                    Kernel::SweepHopper(Precision::F32) | Kernel::RetrievalHopper(Precision::F32) => 384,
                    Kernel::SweepHopper(_) | Kernel::RetrievalHopper(_) => 640,
                    Kernel::OrderTilesWide => params::ORDER_WIDE_THREADS,
                    _ => THREADS,
                };
                assert_eq!(own.threads(), threads, "{own:?}");
            }
        }
    }
}
