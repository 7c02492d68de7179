//! The kernels of each pass, in order: class order (order.rs), same-class, sweep, selection, weights,
//! gradient.
//!
//! Every decision on the way (adaptation, lists or tiles) is taken on the device.

use super::launcher::Launcher;
use super::layout::{Remembered, ResidentOutput, pointer, unless_empty};
use super::order::issue_order;
use super::params::{
    GradientParams, LossScalars, NormalizeBackwardParams, PairsParams, WEIGH_NO_WORDS, WeighParams,
};
use super::plan::GradientGrid;
use super::transfer::Input;
use super::{Device, Kernel};
use crate::Result;

/// Every kernel of one loss.
pub(super) fn issue_loss<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
    input: &Input,
    output: ResidentOutput,
) -> Result<()> {
    issue_order(launcher, base, loss, input)?;
    issue_same_class(launcher, base, loss)?;
    issue_sweep(launcher, base, loss)?;
    issue_selection(launcher, base, loss)?;
    issue_weigh(launcher, base, loss, output, true)?;
    issue_gradients(launcher, base, loss, input.ends.map(|end| end.gradient))?;
    issue_normalize_backward(launcher, base, loss, input)
}

/// m+ and the positives.
pub(super) fn issue_same_class<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
) -> Result<()> {
    let params = PairsParams { pairs: loss.pairs(base) };
    launcher.launch(Kernel::SameClass(loss.shape.precision), false, &params)
}

/// m-, the probe and the candidates.
pub(super) fn issue_sweep<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
) -> Result<()> {
    let params = PairsParams { pairs: loss.pairs(base) };
    launcher.launch(Kernel::Sweep(loss.shape.precision), false, &params)
}

/// The mined sets and the sums over them.
pub(super) fn issue_selection<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
) -> Result<()> {
    let params = PairsParams { pairs: loss.pairs(base) };
    launcher.launch(Kernel::SelectStored, false, &params)?;
    // With room for every pair there is nothing to recompute.
    if loss.layout.stores_everything {
        return Ok(());
    }
    launcher.launch(Kernel::SelectRecomputed(loss.shape.precision), false, &params)
}

/// Row weights and the results of each anchor, and the scalars to an address. `swept`: how the gradient goes,
/// too.
pub(super) fn issue_weigh<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
    ResidentOutput { scalars, loss: figure }: ResidentOutput,
    swept: bool,
) -> Result<()> {
    let Remembered { layout, .. } = loss;
    let params = PairsParams { pairs: loss.pairs(base) };
    let weigh = WeighParams {
        pairs: params.pairs,
        anchor_column_sums: pointer::<f32>(base, layout.anchors.column_sums),
        reference_column_sums: pointer::<f32>(base, layout.references.column_sums),
        anchor_square_sums: pointer::<f64>(base, layout.anchors.square_sums),
        reference_square_sums: pointer::<f64>(base, layout.references.square_sums),
        scalars: scalars as usize as *mut LossScalars,
        loss: figure as usize as *mut f32,
        min_pos: pointer(base, layout.min_pos),
        max_neg: pointer(base, layout.max_neg_out),
        count_pos: pointer(base, layout.count_pos),
        count_neg: pointer(base, layout.count_neg),
        parts: pointer(base, layout.weigh_parts),
        arrived: pointer(base, layout.weigh_arrived),
        ways: [
            if swept { pointer(base, layout.anchors.ways) } else { std::ptr::null_mut() },
            if swept && loss.shape.reference_gradient {
                pointer(base, layout.references.ways)
            } else {
                std::ptr::null_mut()
            },
        ],
        blocks: loss.shape.weigh_blocks() as u32,
        words: if swept { loss.shape.finished_words() } else { WEIGH_NO_WORDS },
        weight_scale: loss.shape.weight_scale(),
        reserved: 0,
    };
    launcher.launch(Kernel::Weigh, false, &weigh)
}

/// The gradients, to `targets` (of anchors, of references).
pub(super) fn issue_gradients<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
    targets: [u64; 2],
) -> Result<()> {
    issue_gradient(launcher, base, loss, targets[0], false)?;
    if loss.shape.reference_gradient {
        issue_gradient(launcher, base, loss, targets[1], true)?;
    }
    Ok(())
}

/// One side's gradient: by lists where little is mined, by tiles elsewhere; each block looks which.
fn issue_gradient<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
    target: u64,
    of_references: bool,
) -> Result<()> {
    let Remembered { shape, layout, .. } = loss;
    let regions = if of_references { &layout.references } else { &layout.anchors };
    let kernel = Kernel::Gradient(shape.precision);
    let grid = GradientGrid::new(kernel, shape, of_references, launcher.device.properties());
    let gradient = GradientParams {
        pairs: loss.pairs(base),
        of_references: u32::from(of_references),
        splits: grid.splits as u32,
        weight_scale: shape.weight_scale(),
        reserved: 0,
        ways: pointer::<u8>(base, regions.ways),
        partial: pointer(base, regions.partial),
        arrived: pointer(base, regions.arrived),
        gradient: target as usize as *mut f32,
        zeros: unless_empty::<std::ffi::c_void>(base, layout.zeros),
    };
    launcher.launch(kernel, of_references, &gradient)
}

/// The gradients of rows of any length, in place of those of the unit rows.
pub(super) fn issue_normalize_backward<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
    input: &Input,
) -> Result<()> {
    let Remembered { shape, layout, .. } = loss;
    let wanted = [shape.normalize, shape.normalize && shape.reference_gradient];
    for (side, regions) in [&layout.anchors, &layout.references].into_iter().enumerate() {
        if !wanted[side] {
            continue;
        }
        let params = NormalizeBackwardParams {
            rows: input.ends[side].rows as usize as *const std::ffi::c_void,
            lengths: pointer::<f64>(base, regions.lengths),
            gradient: input.ends[side].gradient as usize as *mut f32,
            count: shape.sides(side == 1).0 as u32,
            dim: shape.dim as u32,
        };
        launcher.launch(Kernel::NormalizeBackward(shape.precision), side == 1, &params)?;
    }
    Ok(())
}
