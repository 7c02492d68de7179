//! How a search is divided: its lists, and the blocks that share a query tile. Pure functions of the shape.

use super::DeviceProperties;
use super::params::{RETRIEVAL_MERGED, RETRIEVAL_SLACK, THREADS, TILE};
use super::shape::{Shape, tiles};

/// Fixed cost of a block in products of a tile: its start, and cutting its lists at the end.
const BLOCK_TILES: usize = 4;
/// Rounds of a merge that take as long as the product of a tile of 512 dimensions, and merges that a
/// multiprocessor runs at a time.
const TILE_ROUNDS: usize = 10;
const MERGES: usize = 4;

/// The lists of a search, and its launches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SearchPlan {
    /// Most keys that a list is cut to: a few more than are wanted, so that a threshold is found soon.
    pub kept: usize,
    /// Room of a list in keys, a power of two.
    pub capacity: usize,
    /// Blocks that share a query tile, each with a range of the references: few queries then fill the GPU,
    /// and the last round of many does not leave most of it idle.
    pub splits: usize,
    /// Lists of a query.
    pub lists: usize,
    /// Query tiles of one launch.
    pub turn: usize,
}

impl SearchPlan {
    /// Plans a search of `shape.anchors` queries among `shape.reference_count()` rows.
    pub fn new(shape: &Shape, k: usize, gpu: DeviceProperties) -> Self {
        let (queries, references) = (tiles(shape.anchors), tiles(shape.reference_count()));
        let DeviceProperties { multiprocessors, warpgroup_products, list_bytes } = gpu;
        let multiprocessors = multiprocessors as usize;
        // On GPUs other than Hopper two blocks of 16-bit rows share a multiprocessor.
        let sharing = if warpgroup_products || !shape.precision.is_narrow() { 1 } else { 2 };
        let blocks = sharing * multiprocessors;
        let wanted = k.min(shape.reference_count());
        let kept = wanted + wanted / 4 + 4;
        let capacity = (kept + RETRIEVAL_SLACK as usize).next_power_of_two();
        // Two lists of a query, where two warps divide a tile's columns or two teams divide the tiles.
        let lists = if warpgroup_products && !shape.precision.is_narrow() { 1 } else { 2 };
        let tile_bytes = lists * capacity * TILE as usize * size_of::<u64>();
        let turn = |splits: usize| (list_bytes / (tile_bytes * splits)).clamp(1, queries);
        let cost = |&splits: &usize| {
            let turn = turn(splits);
            let rounds = |tiles: usize| (tiles * splits).div_ceil(blocks);
            let all_rounds = queries / turn * rounds(turn) + rounds(queries % turn);
            let merge = (lists * splits * kept).div_ceil(THREADS as usize);
            let merges = shape.anchors.div_ceil(MERGES * multiprocessors);
            TILE_ROUNDS * all_rounds * (references.div_ceil(splits) + BLOCK_TILES) + merges * merge
        };
        let most = references.min(blocks).min(list_bytes / tile_bytes).max(1);
        let splits = (1..=most).min_by_key(cost).unwrap_or(1);
        Self { kept, capacity, splits, lists: lists * splits, turn: turn(splits) }
    }

    /// Shared memory for the keys of a block that merges lists.
    pub fn merge_bytes(&self) -> u32 {
        let keys = if self.capacity <= RETRIEVAL_MERGED as usize { self.capacity } else { 0 };
        (keys * size_of::<u64>()) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::super::Precision;
    use super::super::params::RETRIEVAL_MERGE_EXTRA_BYTES;
    use super::*;

    const LIST_BYTES: usize = DeviceProperties::LIST_BYTES;

    fn plan(queries: usize, references: usize, k: usize) -> SearchPlan {
        plan_of(queries, references, k, true)
    }

    fn plan_of(queries: usize, references: usize, k: usize, warpgroup_products: bool) -> SearchPlan {
        let shape = Shape { references: Some(references), ..Shape::square(queries, 512, Precision::Bf16) };
        let gpu = DeviceProperties { multiprocessors: 132, warpgroup_products, list_bytes: LIST_BYTES };
        SearchPlan::new(&shape, k, gpu)
    }

    #[test]
    fn few_queries_are_split_and_many_are_not() {
        assert!(plan(100, 1_000_000, 10).splits > 128);
        assert_eq!(plan(1_024, 1_024, 10).splits, 8, "a tile a block");
        assert_eq!(plan(100, 100, 10).splits, 1, "there is but one tile");
        assert_eq!(plan(1 << 20, 1 << 20, 10).splits, 1);
        // 473 query tiles take four rounds of 132 blocks; in three splits, eleven rounds of a third.
        assert_eq!(plan(60_502, 60_502, 10).splits, 3);
        // Two blocks run on a multiprocessor at a time.
        assert!(plan_of(100, 1_000_000, 10, false).splits > 2 * 128);
        // Fewer splits, because many long lists take long to merge.
        assert!(plan(100, 1_000_000, 1_000).splits < 132);
    }

    #[test]
    fn lists_take_what_a_tile_adds_and_fit_their_memory() {
        for queries in [1, 129, 5_000, 60_502, 1 << 20] {
            for k in [1, 10, 100, 1_000, 100_000, 1 << 30] {
                let plan = plan(queries, 1 << 20, k);
                let what = format!("{queries} queries, k = {k}: {plan:?}");
                assert!(plan.kept >= k.min(1 << 20), "{what}");
                assert!(plan.capacity.is_power_of_two(), "{what}");
                assert!(plan.capacity >= plan.kept + RETRIEVAL_SLACK as usize, "{what}");
                let bytes = plan.turn * TILE as usize * plan.lists * plan.capacity * size_of::<u64>();
                assert!(bytes <= LIST_BYTES || (plan.turn == 1 && plan.splits == 1), "{what}");
                // A block may use 99 KiB of shared memory on sm_89.
                assert!(plan.merge_bytes() + RETRIEVAL_MERGE_EXTRA_BYTES <= 99 * 1024, "{what}");
            }
        }
    }
}
