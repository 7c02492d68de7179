//! The first passes of a loss: labels in class order, prepared rows, class ranges.

use std::mem::offset_of;

use super::layout::{SideRegions, pointer, unless_empty};
use super::params::{
    Counters, IdentityParams, InvertParams, MergeParams, ORDER_TILE, OrderParams, PrepareParams, ZEROED,
    Zeroed,
};
use super::passes::Passes;
use super::remembered::Remembered;
use super::shape::{order_runs, order_tile};
use super::transfer::Input;
use super::{Device, Kernel};
use crate::Result;
use crate::loss::UnitCheck;

/// One side of a sort of labels.
struct OrderedSide<'a> {
    regions: &'a SideRegions,
    labels: u64,
    of_references: bool,
    valid: *mut u32,
    valid_too: *mut u32,
}

impl<D: Device> Passes<'_, D> {
    /// Sorts one side's labels into class order. The first kernel also zeroes what `zeroed` lists.
    fn sort(&mut self, side: &OrderedSide<'_>, zeroed: Option<[Zeroed; ZEROED as usize]>) -> Result<()> {
        let loss = self.loss;
        let regions = side.regions;
        let count = loss.shape.sides(side.of_references).0 as u32;
        let runs: Vec<usize> = order_runs(count as usize).collect();
        let [keys, run_keys] = [regions.keys, regions.run_keys].map(|region| self.at::<u64>(region));
        let [order, run_order] = [regions.order, regions.run_order].map(|region| self.at::<u32>(region));
        // Merges alternate between two buffers, so that the last one writes to `keys` and `order`.
        let place = |left: usize| if left.is_multiple_of(2) { (keys, order) } else { (run_keys, run_order) };
        let valid = |left: usize| match left {
            0 => (side.valid, side.valid_too),
            _ => (std::ptr::null_mut(), std::ptr::null_mut()),
        };
        let nothing = Zeroed { words: std::ptr::null_mut(), count: 0 };
        let tiles = OrderParams {
            labels: side.labels as usize as *const i64,
            count,
            reserved: 0,
            keys: place(runs.len()).0,
            order: place(runs.len()).1,
            valid: valid(runs.len()).0,
            valid_too: valid(runs.len()).1,
            counters: zeroed.map_or(std::ptr::null_mut(), |_| self.at(loss.layout.counters)),
            zeroed: zeroed.unwrap_or([nothing; ZEROED as usize]),
        };
        let kernel = match order_tile(count as usize) as u32 {
            ORDER_TILE => Kernel::OrderTiles,
            _ => Kernel::OrderTilesWide,
        };
        self.launcher.launch(kernel, side.of_references, &tiles)?;
        for (merge, &run) in runs.iter().enumerate() {
            let left = runs.len() - merge - 1;
            let merge = MergeParams {
                from_keys: place(left + 1).0,
                from_order: place(left + 1).1,
                keys: place(left).0,
                order: place(left).1,
                count,
                run: run as u32,
                valid: valid(left).0,
                valid_too: valid(left).1,
            };
            self.launcher.launch(Kernel::OrderMerge, side.of_references, &merge)?;
        }
        Ok(())
    }

    /// Sorts both sides into class order, prepares their rows and finds class ranges.
    pub(super) fn order(&mut self, input: &Input) -> Result<()> {
        let Remembered { shape, layout, .. } = self.loss;
        let Input { addresses, check, identity } = *input;
        let (base, precision) = (self.base, shape.precision);
        let square = shape.references.is_none();
        let counter = |field: usize| pointer::<u32>(base + field as u64, layout.counters);
        let valid =
            [counter(offset_of!(Counters, valid_anchors)), counter(offset_of!(Counters, valid_references))];
        let bad = [counter(offset_of!(Counters, bad_anchor)), counter(offset_of!(Counters, bad_reference))];
        let sides: &[usize] = if square { &[0] } else { &[0, 1] };
        let regions = [&layout.anchors, &layout.references];
        for &side in sides {
            let zeroed = (side == 0).then(|| layout.zeroed(base));
            let side = OrderedSide {
                regions: regions[side],
                labels: addresses[side].labels,
                of_references: side == 1,
                valid: valid[side],
                valid_too: if square { valid[1] } else { std::ptr::null_mut() },
            };
            self.sort(&side, zeroed)?;
        }
        // An anchor's class is a range of references, which are in order now.
        for &side in sides {
            let of_anchors = side == 0;
            let prepare = PrepareParams {
                input: addresses[side].rows as usize as *const std::ffi::c_void,
                rows: self.at(regions[side].rows),
                order: self.at::<u32>(regions[side].order),
                valid: valid[side],
                count: shape.sides(!of_anchors).0 as u32,
                dim: shape.dim as u32,
                stride: shape.stride() as u32,
                check: u32::from(check.check == UnitCheck::Check),
                norm_tolerance: check.tolerance,
                square_sums: self.at(regions[side].square_sums),
                bad: bad[side],
                column_sums: self.at(regions[side].column_sums),
                duplicate: self.at(regions[side].duplicate),
                lengths: unless_empty(base, regions[side].lengths),
                keys: if of_anchors { self.at::<u64>(layout.anchors.keys) } else { std::ptr::null_mut() },
                reference_keys: self.at::<u64>(layout.references.keys),
                classes: self.at(layout.classes),
                references: shape.reference_count() as u32,
                reserved: 0,
            };
            self.launcher.launch(Kernel::Prepare(precision), !of_anchors, &prepare)?;
        }
        if !shape.identity {
            return Ok(());
        }
        let references = shape.reference_count() as u32;
        let invert = InvertParams {
            order: self.at::<u32>(layout.references.order),
            positions: self.at(layout.positions),
            count: references,
            reserved: 0,
        };
        self.launcher.launch(Kernel::InvertOrder, true, &invert)?;
        let params = IdentityParams {
            order: self.at::<u32>(layout.anchors.order),
            positions: self.at::<u32>(layout.positions),
            list: identity.list as usize as *const u32,
            first: identity.first,
            identity: self.at(layout.identity),
            count: shape.anchors as u32,
            references,
        };
        self.launcher.launch(Kernel::Identity, false, &params)
    }
}
