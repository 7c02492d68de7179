//! The layout of a loss's workspace.

use super::params::{
    ClassRange, Counters, LossScalars, RowNumbers, RowSame, RowWeights, TILE, WEIGH_SUMS, ZEROED, Zeroed,
};
use super::plan::GradientGrid;
use super::shape::{POOL_UNIT, Shape, order_runs, tiles};
use super::workspace::{Layout, Region};
use super::{DeviceProperties, Kernel};

/// Regions of one side's rows.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SideRegions {
    pub(super) input: Region,
    pub(super) labels: Region,
    pub(super) keys: Region,
    pub(super) order: Region,
    /// Second buffers of keys and order: the merges alternate between the two.
    pub(super) run_keys: Region,
    pub(super) run_order: Region,
    pub(super) rows: Region,
    pub(super) square_sums: Region,
    /// Norms of the rows as given, if they may be of any length.
    pub(super) lengths: Region,
    pub(super) duplicate: Region,
    pub(super) column_sums: Region,
    pub(super) by_lists: Region,
    pub(super) partial: Region,
    pub(super) arrived: Region,
    pub(super) gradient: Region,
}

/// The regions of a loss's workspace.
#[derive(Debug, Clone, Default)]
pub(super) struct LossLayout {
    pub(super) layout: Layout,
    pub(super) anchors: SideRegions,
    pub(super) references: SideRegions,
    pub(super) classes: Region,
    pub(super) same: Region,
    pub(super) max_neg: Region,
    pub(super) counters: Region,
    /// [`MinedSums`](super::params::MinedSums) of positives and of negatives: four lists of i64, then two of u32.
    pub(super) sums: Region,
    pub(super) weights: Region,
    pub(super) identity: Region,
    /// The caller's list of the anchors' references, and the position of each reference.
    pub(super) identity_list: Region,
    pub(super) positions: Region,
    pub(super) columns: Region,
    pub(super) column_weights: Region,
    pub(super) totals: Region,
    /// Numbers as the caller gives them: of anchors, then of references, two lists each.
    pub(super) given: [Region; 4],
    pub(super) tile_counts: Region,
    pub(super) tile_segments: Region,
    pub(super) pool_values: Region,
    pub(super) pool_words: Region,
    pub(super) scalars: Region,
    pub(super) weigh_parts: Region,
    pub(super) weigh_arrived: Region,
    pub(super) min_pos: Region,
    pub(super) max_neg_out: Region,
    pub(super) count_pos: Region,
    pub(super) count_neg: Region,
    pub(super) pool: usize,
    /// Whether there is room for every pair.
    pub(super) stores_everything: bool,
}

impl LossLayout {
    /// The workspace as a function of the shape, the budget for candidates and the GPU.
    ///
    /// In the square form B anchors of D dimensions take the budget and about
    /// `B D e + B D' (e + 4 s) + 4 B D + 164 B + 8 tiles` bytes: stride D', elements of e bytes (2 in
    /// prepared rows of rounded f32), s splits (0 if there is one, which writes the gradient itself).
    ///
    /// `resident`: input and gradients stay in the caller's memory and have no regions.
    pub(super) fn new(shape: &Shape, budget: usize, gpu: DeviceProperties, resident: bool) -> Self {
        let mut layout = Layout::default();
        let mut side =
            |of_references, gradient| Self::side(&mut layout, shape, of_references, gradient, gpu, resident);
        let anchors = side(false, true);
        let references = match shape.references {
            Some(_) => side(true, shape.reference_gradient),
            None => anchors,
        };
        let (rows, others) = (shape.anchors, shape.reference_count());
        let pool = shape.pool(budget);
        Self {
            anchors,
            references,
            classes: layout.region::<ClassRange>(rows),
            same: layout.region::<RowSame>(rows),
            max_neg: layout.region::<u32>(rows),
            counters: layout.region::<Counters>(1),
            sums: layout.region::<[u64; 5]>(rows),
            weights: layout.region::<RowWeights>(tiles(rows) * TILE as usize),
            identity: layout.region::<u32>(if shape.identity { rows } else { 0 }),
            identity_list: layout.region::<u32>(if shape.identity && !resident { rows } else { 0 }),
            positions: layout.region::<u32>(if shape.identity { others } else { 0 }),
            columns: layout.region::<RowNumbers>(if shape.numbers { others } else { 0 }),
            column_weights: layout.region::<RowWeights>(if shape.numbers {
                tiles(others) * TILE as usize
            } else {
                0
            }),
            totals: layout.region::<u64>(2),
            given: [rows, rows, others, others]
                .map(|count| layout.region::<u32>(if shape.numbers && !resident { count } else { 0 })),
            tile_counts: layout.region::<u32>(shape.tiles()),
            tile_segments: layout.region::<u32>(shape.tiles()),
            pool_values: layout.region::<f32>(pool * POOL_UNIT),
            pool_words: layout.region::<u32>(pool * POOL_UNIT),
            scalars: layout.region::<LossScalars>(1),
            weigh_parts: layout.region::<f64>(shape.weigh_blocks() * WEIGH_SUMS as usize),
            weigh_arrived: layout.region::<u32>(1),
            min_pos: layout.region::<f32>(rows),
            max_neg_out: layout.region::<f32>(rows),
            count_pos: layout.region::<u32>(rows),
            count_neg: layout.region::<u32>(rows),
            pool,
            stores_everything: pool == shape.most_units(),
            layout,
        }
    }

    /// The regions that must be 0 when a loss begins.
    pub(super) fn zeroed(&self, base: u64) -> [Zeroed; ZEROED as usize] {
        let mut all = [Zeroed { words: std::ptr::null_mut(), count: 0 }; ZEROED as usize];
        let arrived = [self.weigh_arrived, self.anchors.arrived, self.references.arrived];
        let counted = [self.max_neg, self.sums, self.columns, self.totals];
        for (zeroed, region) in all.iter_mut().zip(counted.into_iter().chain(arrived)) {
            *zeroed =
                Zeroed { words: pointer(base, region), count: (region.bytes / size_of::<u32>()) as u64 };
        }
        all
    }

    fn side(
        layout: &mut Layout,
        shape: &Shape,
        of_references: bool,
        gradient: bool,
        gpu: DeviceProperties,
        resident: bool,
    ) -> SideRegions {
        let (count, _) = shape.sides(of_references);
        let (padded, stride) = (tiles(count) * TILE as usize, shape.stride());
        let merged = if order_runs(count).next().is_some() { count } else { 0 };
        let grid = GradientGrid::new(Kernel::Gradient(shape.precision), shape, of_references, gpu);
        let splits = if grid.splits == 1 { 0 } else { grid.splits };
        // Without a gradient its regions are empty.
        let if_wanted = |elements: usize| if gradient { elements } else { 0 };
        let if_copied = |elements: usize| if resident { 0 } else { elements };
        SideRegions {
            input: layout.region::<u8>(if_copied(count * shape.dim * shape.precision.bytes())),
            labels: layout.region::<i64>(if_copied(count)),
            keys: layout.region::<u64>(count),
            order: layout.region::<u32>(count),
            run_keys: layout.region::<u64>(merged),
            run_order: layout.region::<u32>(merged),
            rows: layout.region::<u8>(padded * stride * shape.precision.stored_bytes()),
            square_sums: layout.region::<f64>(count),
            lengths: layout.region::<f64>(if shape.normalize { count } else { 0 }),
            duplicate: layout.region::<f32>(padded),
            column_sums: layout.region::<f32>(tiles(count) * stride),
            by_lists: layout.region::<u8>(if_wanted(tiles(count))),
            partial: layout.region::<f32>(if_wanted(splits * padded * stride)),
            arrived: layout.region::<u32>(if_wanted(grid.counters())),
            gradient: layout.region::<f32>(if_copied(if_wanted(count * shape.dim))),
        }
    }
}

/// The device address of a region, as a pointer of the type in params.h.
pub(super) fn pointer<T>(base: u64, region: Region) -> *mut T {
    (base as usize + region.offset) as *mut T
}

/// As [`pointer`], or null for an empty region.
pub(super) fn unless_empty<T>(base: u64, region: Region) -> *mut T {
    if region.bytes == 0 { std::ptr::null_mut() } else { pointer(base, region) }
}
