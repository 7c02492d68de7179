//! The passes of one loss, in order: class order, same-class, sweep, selection, gradient.
//!
//! The host issues all of them and waits once, for the results. Every decision
//! on the way (adaptation, lists or tiles) is taken on the device.

use std::mem::offset_of;

use bytemuck::{cast_slice, cast_slice_mut};
use ndarray::Array2;

use super::layout::{
    Ends, LossLayout, Remembered, RowCheck, SideRegions, device_settings, pointer, unless_empty,
};
use super::params::{
    Counters, GradientParams, IdentityParams, InvertParams, LeadBackParams, LossScalars, MergeParams,
    ORDER_TILE, OrderParams, PairsParams, PrepareParams, RowSums, TILE, WeighParams, ZEROED, Zeroed,
};
use super::plan::{Shape, order_runs, order_tile, tiles};
use super::workspace::Region;
use super::{Device, DeviceBackend, Kernel, Params};
use crate::loss::check_unit;
use crate::loss::{Batch, Embeddings, Identity, LossOutput, LossSettings, Rows, UnitCheck};
use crate::{Error, Result};

/// The `NO_ROW` of params.h, which C writes as an unsigned literal.
pub(super) const NO_ROW: u32 = u32::MAX;

/// The bytes of a matrix whose rows lie one behind the other.
pub(super) fn matrix_bytes<'a>(embeddings: &'a Embeddings<'_>, rows: &'static str) -> Result<&'a [u8]> {
    let bytes = match embeddings {
        Embeddings::F32(m) => m.as_slice().map(cast_slice),
        Embeddings::F16(m) => m.as_slice().map(cast_slice),
        Embeddings::Bf16(m) => m.as_slice().map(cast_slice),
    };
    bytes.ok_or(Error::NotContiguous { rows })
}

/// Issues the kernels of one call, all on memory at `base`.
pub(super) struct Launcher<'a, D: Device> {
    pub(super) device: &'a mut D,
    pub(super) shape: Shape,
    /// A loss at once that has room for all its pairs: no tile of S is ever multiplied twice, in one kernel or another.
    pub(super) whole: bool,
}

impl<'a, D: Device> Launcher<'a, D> {
    /// For the kernels of one loss.
    pub(super) fn new(device: &'a mut D, loss: &Remembered) -> Self {
        let whole = loss.layout.stores_everything && loss.step.is_none();
        Self { device, shape: loss.shape, whole }
    }

    pub(super) fn launch<P: Params>(
        &mut self,
        kernel: Kernel,
        of_references: bool,
        params: &P,
    ) -> Result<()> {
        let multiprocessors = self.device.multiprocessors();
        let splits = self.shape.splits(of_references, multiprocessors);
        let kernel = self.shape.variant(kernel, self.device.has_warpgroup_products(), self.whole);
        let plan = self.shape.plan(kernel, of_references, splits, multiprocessors);
        // SAFETY: `params` is built in this folder from regions of a layout for this very shape, laid over
        // a buffer that lives in the backend; tests/emulated.rs runs every kernel with the gaps watched.
        unsafe { self.device.launch(kernel, plan, params) }
    }
}

impl<D: Device> DeviceBackend<D> {
    /// Bytes of the workspace of a loss on `batch`: a function of B, N, D, the type and the budget.
    #[must_use]
    pub fn loss_bytes(&self, batch: &Batch<'_>) -> usize {
        let shape = self.shape(batch);
        LossLayout::new(&shape, self.options.budget, self.device.multiprocessors(), false).layout.bytes()
    }

    pub(super) fn shape(&self, batch: &Batch<'_>) -> Shape {
        Shape {
            anchors: batch.anchors.embeddings.rows(),
            references: batch.references.map(|rows| rows.embeddings.rows()),
            dim: batch.anchors.embeddings.dim(),
            precision: self.precision(&batch.anchors),
            reference_gradient: batch.reference_gradient && !batch.is_square(),
            total: batch.total(),
            identity: !batch.is_square() && batch.identity != Identity::ByValue,
            numbers: false,
            any_length: false,
        }
    }

    pub(super) fn run_loss(
        &mut self,
        batch: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()> {
        self.run_loss_of(self.shape(batch), batch, settings, output)
    }

    /// [`Backend::loss`](crate::backend::Backend::loss) of rows of any length but 0: they are compared at unit length, and the
    /// gradients are those of the rows as they are given. A hypergradient after it takes tangents of the unit rows.
    ///
    /// # Errors
    /// As [`Backend::loss`](crate::backend::Backend::loss); [`Error::NotUnit`] for a row of zeros.
    pub fn loss_of_any_length(
        &mut self,
        batch: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()> {
        self.remembered = None;
        self.run_loss_of(Shape { any_length: true, ..self.shape(batch) }, batch, settings, output)
    }

    fn run_loss_of(
        &mut self,
        shape: Shape,
        batch: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()> {
        settings.validate()?;
        batch.validate()?;
        same_type(batch)?;
        shape.check()?;
        let loss = self.begin(shape, settings, false)?;
        let layout = &loss.layout;
        let Self { device, loss: workspace, .. } = self;
        let buffer = workspace.lay(device, &layout.layout)?;
        let input = upload(device, buffer, layout, batch)?;
        let (base, check) = (device.address(buffer), input.check);
        issue(&mut Launcher::new(&mut *device, &loss), base, &loss, &input)?;
        download_scalars(device, buffer, &loss, check.tolerance, output)?;
        download_anchors(device, buffer, &loss, output)?;
        download_gradients(device, buffer, &loss, output)?;
        self.remembered = Some(loss);
        Ok(())
    }

    /// Lays out the workspace; the first kernel zeroes what the passes count up in.
    pub(super) fn begin(
        &mut self,
        shape: Shape,
        settings: &LossSettings,
        resident: bool,
    ) -> Result<Remembered> {
        let layout = LossLayout::new(&shape, self.options.budget, self.device.multiprocessors(), resident);
        let Self { device, loss, .. } = self;
        loss.lay(device, &layout.layout)?;
        Ok(Remembered {
            shape,
            layout,
            settings: device_settings(settings, &shape),
            host_settings: *settings,
            step: None,
            labels: Default::default(),
        })
    }
}

/// Where a loss finds its rows, and what is said of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Input {
    /// Of the anchors, and of the references.
    pub(super) ends: [Ends; 2],
    pub(super) check: RowCheck,
    pub(super) identity: IdentityAt,
}

/// Where to read which reference is an anchor.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct IdentityAt {
    /// Reference `first + i` is anchor i; or the address of `first`.
    pub(super) first: u64,
    pub(super) first_at: u64,
    /// The address of a list, which goes before both.
    pub(super) list: u64,
}

/// Copies rows, labels and identity to the device.
pub(super) fn upload<D: Device>(
    device: &mut D,
    buffer: &mut D::Buffer,
    layout: &LossLayout,
    batch: &Batch<'_>,
) -> Result<Input> {
    upload_rows(device, buffer, &layout.anchors, &batch.anchors, "anchors")?;
    if let Some(references) = &batch.references {
        upload_rows(device, buffer, &layout.references, references, "references")?;
    }
    let base = device.address(buffer);
    let mut identity = IdentityAt::default();
    match batch.identity {
        Identity::ByValue => {}
        Identity::From(first) => identity.first = first as u64,
        Identity::List(list) if layout.identity_list.bytes > 0 => {
            device.upload(buffer, layout.identity_list.offset, cast_slice(list))?;
            identity.list = base + layout.identity_list.offset as u64;
        }
        Identity::List(_) => {}
    }
    let check = RowCheck { check: batch.check, tolerance: batch.anchors.embeddings.norm_tolerance() };
    Ok(Input { ends: [layout.anchors.ends(base), layout.references.ends(base)], check, identity })
}

/// Every kernel of one loss.
pub(super) fn issue<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
    input: &Input,
) -> Result<()> {
    issue_order(launcher, base, loss, input)?;
    issue_same_class(launcher, base, loss)?;
    issue_sweep(launcher, base, loss)?;
    issue_selection(launcher, base, loss)?;
    issue_gradients(launcher, base, loss, input.ends.map(|end| end.gradient))?;
    issue_lead_back(launcher, base, loss, input)
}

/// The gradients of rows of any length, in place of those of the unit rows.
pub(super) fn issue_lead_back<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
    input: &Input,
) -> Result<()> {
    let Remembered { shape, layout, .. } = loss;
    let wanted = [shape.any_length, shape.any_length && shape.reference_gradient];
    for (side, regions) in [&layout.anchors, &layout.references].into_iter().enumerate() {
        if !wanted[side] {
            continue;
        }
        let params = LeadBackParams {
            rows: input.ends[side].rows as usize as *const std::ffi::c_void,
            lengths: pointer::<f64>(base, regions.lengths),
            gradient: input.ends[side].gradient as usize as *mut f32,
            count: shape.sides(side == 1).0 as u32,
            dim: shape.dim as u32,
        };
        launcher.launch(Kernel::LeadBack(shape.precision), side == 1, &params)?;
    }
    Ok(())
}

/// Both sides must be multiplied in one type.
pub(super) fn same_type(batch: &Batch<'_>) -> Result<()> {
    let Some(references) = &batch.references else { return Ok(()) };
    match (&batch.anchors.embeddings, &references.embeddings) {
        (Embeddings::F32(_), Embeddings::F32(_))
        | (Embeddings::F16(_), Embeddings::F16(_))
        | (Embeddings::Bf16(_), Embeddings::Bf16(_)) => Ok(()),
        _ => Err(Error::InvalidSetting {
            name: "references",
            value: "another type than the anchors".into(),
            range: "both f32, both f16 or both bf16",
        }),
    }
}

fn upload_rows<D: Device>(
    device: &mut D,
    buffer: &mut D::Buffer,
    regions: &SideRegions,
    rows: &Rows<'_>,
    name: &'static str,
) -> Result<()> {
    device.upload(buffer, regions.input.offset, matrix_bytes(&rows.embeddings, name)?)?;
    device.upload(buffer, regions.labels.offset, cast_slice(rows.labels))
}

/// What the sort of one side's labels needs.
struct OrderedSide<'a> {
    regions: &'a SideRegions,
    labels: u64,
    of_references: bool,
    valid: *mut u32,
    valid_too: *mut u32,
}

/// One side's labels into class order; with `zeroed` the loss begins there.
fn sort<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
    side: &OrderedSide<'_>,
    zeroed: Option<[Zeroed; ZEROED as usize]>,
) -> Result<()> {
    let regions = side.regions;
    let count = loss.shape.sides(side.of_references).0 as u32;
    let runs: Vec<usize> = order_runs(count as usize).collect();
    let [keys, run_keys] = [regions.keys, regions.run_keys].map(|region| pointer::<u64>(base, region));
    let [order, run_order] = [regions.order, regions.run_order].map(|region| pointer::<u32>(base, region));
    // To and fro, so that the last one writes where the order is wanted.
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
        counters: zeroed.map_or(std::ptr::null_mut(), |_| pointer(base, loss.layout.counters)),
        zeroed: zeroed.unwrap_or([nothing; ZEROED as usize]),
    };
    let kernel = match order_tile(count as usize) as u32 {
        ORDER_TILE => Kernel::OrderTiles,
        _ => Kernel::OrderTilesWide,
    };
    launcher.launch(kernel, side.of_references, &tiles)?;
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
        launcher.launch(Kernel::OrderMerge, side.of_references, &merge)?;
    }
    Ok(())
}

/// Class order of both sides, prepared rows, class ranges.
pub(super) fn issue_order<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
    input: &Input,
) -> Result<()> {
    let Remembered { shape, layout, .. } = loss;
    let Input { ends, check, identity } = *input;
    let precision = shape.precision;
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
            labels: ends[side].labels,
            of_references: side == 1,
            valid: valid[side],
            valid_too: if square { valid[1] } else { std::ptr::null_mut() },
        };
        sort(launcher, base, loss, &side, zeroed)?;
    }
    // An anchor's class is a range of references, which are in order now.
    for &side in sides {
        let of_anchors = side == 0;
        let prepare = PrepareParams {
            input: ends[side].rows as usize as *const std::ffi::c_void,
            rows: pointer(base, regions[side].rows),
            order: pointer::<u32>(base, regions[side].order),
            valid: valid[side],
            count: shape.sides(!of_anchors).0 as u32,
            dim: shape.dim as u32,
            stride: shape.stride() as u32,
            check: u32::from(check.check == UnitCheck::Check),
            norm_tolerance: check.tolerance,
            square_sums: pointer(base, regions[side].square_sums),
            bad: bad[side],
            column_sums: pointer(base, regions[side].column_sums),
            duplicate: pointer(base, regions[side].duplicate),
            lengths: unless_empty(base, regions[side].lengths),
            keys: if of_anchors { pointer::<u64>(base, layout.anchors.keys) } else { std::ptr::null_mut() },
            reference_keys: pointer::<u64>(base, layout.references.keys),
            classes: pointer(base, layout.classes),
            references: shape.reference_count() as u32,
            reserved: 0,
        };
        launcher.launch(Kernel::Prepare(precision), !of_anchors, &prepare)?;
    }
    if !shape.identity {
        return Ok(());
    }
    let references = shape.reference_count() as u32;
    let invert = InvertParams {
        order: pointer::<u32>(base, layout.references.order),
        positions: pointer(base, layout.positions),
        count: references,
        reserved: 0,
    };
    launcher.launch(Kernel::InvertOrder, true, &invert)?;
    let params = IdentityParams {
        order: pointer::<u32>(base, layout.anchors.order),
        positions: pointer::<u32>(base, layout.positions),
        list: identity.list as usize as *const u32,
        first_at: identity.first_at as usize as *const u64,
        first: identity.first,
        identity: pointer(base, layout.identity),
        count: shape.anchors as u32,
        references,
    };
    launcher.launch(Kernel::Identity, false, &params)
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

/// Row weights, the scalars and the results of each anchor; then the gradients, to `targets` (of anchors, of references).
pub(super) fn issue_gradients<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
    targets: [u64; 2],
) -> Result<()> {
    issue_weigh(launcher, base, loss, pointer(base, loss.layout.scalars), true)?;
    issue_sums(launcher, base, loss, targets)
}

/// The gradients alone, once rows have their weights.
pub(super) fn issue_sums<D: Device>(
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

/// Row weights and the results of each anchor, and the scalars to an address. `swept`: how the gradient goes, too.
pub(super) fn issue_weigh<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
    scalars: *mut LossScalars,
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
        scalars,
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
    };
    launcher.launch(Kernel::Weigh, false, &weigh)
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
    let gradient = GradientParams {
        pairs: loss.pairs(base),
        of_references: u32::from(of_references),
        splits: shape.splits(of_references, launcher.device.multiprocessors()) as u32,
        weight_scale: shape.weight_scale(),
        reserved: 0,
        ways: pointer::<u8>(base, regions.ways),
        partial: pointer(base, regions.partial),
        arrived: pointer(base, regions.arrived),
        gradient: target as usize as *mut f32,
    };
    launcher.launch(Kernel::Gradient(shape.precision), of_references, &gradient)
}

/// Waits for the scalars; refuses bad rows.
pub(super) fn download_scalars<D: Device>(
    device: &mut D,
    buffer: &D::Buffer,
    loss: &Remembered,
    tolerance: f64,
    output: &mut LossOutput,
) -> Result<()> {
    let layout = &loss.layout;
    // u64s, so that the struct's alignment is met.
    let mut words = [0u64; size_of::<LossScalars>() / size_of::<u64>()];
    device.download(buffer, layout.scalars.offset, cast_slice_mut(&mut words))?;
    let scalars = LossScalars::from_words(&words);
    for (rows, row) in [("anchors", scalars.bad_anchor), ("references", scalars.bad_reference)] {
        if row != NO_ROW {
            check_unit(rows, row as usize, scalars.bad_square_sum, tolerance)?;
        }
    }
    output.loss = scalars.loss;
    output.gamma_pos = scalars.gamma_pos;
    output.gamma_neg = scalars.gamma_neg;
    output.probe_neg = scalars.probe_neg;
    output.total_pos = scalars.total_pos;
    output.total_neg = scalars.total_neg;
    output.active = scalars.active;
    output.dloss_dlambda_pos = scalars.dloss_dlambda_pos;
    output.dloss_dlambda_neg = scalars.dloss_dlambda_neg;
    output.mean_pos = scalars.mean_pos;
    output.mean_neg = scalars.mean_neg;
    Ok(())
}

/// The results per anchor.
pub(super) fn download_anchors<D: Device>(
    device: &mut D,
    buffer: &D::Buffer,
    loss: &Remembered,
    output: &mut LossOutput,
) -> Result<()> {
    let Remembered { shape, layout, .. } = loss;
    let rows = shape.anchors;
    output.min_pos.resize(rows, 0.0);
    output.max_neg.resize(rows, 0.0);
    output.count_pos.resize(rows, 0);
    output.count_neg.resize(rows, 0);
    device.download(buffer, layout.min_pos.offset, cast_slice_mut(&mut output.min_pos))?;
    device.download(buffer, layout.max_neg_out.offset, cast_slice_mut(&mut output.max_neg))?;
    device.download(buffer, layout.count_pos.offset, cast_slice_mut(&mut output.count_pos))?;
    device.download(buffer, layout.count_neg.offset, cast_slice_mut(&mut output.count_neg))
}

/// What each anchor adds to the loss, and whether its row tile took the gradient's way of tiles; in the caller's order.
pub(super) fn download_terms<D: Device>(
    device: &mut D,
    buffer: &D::Buffer,
    loss: &Remembered,
) -> Result<(Vec<f64>, Vec<bool>)> {
    let Remembered { shape, layout, settings, .. } = loss;
    let rows = shape.anchors;
    const WORDS: usize = size_of::<RowSums>() / size_of::<u64>();
    let mut sums = vec![[0u64; WORDS]; rows];
    device.download(buffer, layout.sums.offset, cast_slice_mut(sums.as_flattened_mut()))?;
    let mut order = vec![0u32; rows];
    device.download(buffer, layout.anchors.order.offset, cast_slice_mut(&mut order))?;
    let mut ways = vec![0u8; tiles(rows)];
    device.download(buffer, layout.anchors.ways.offset, &mut ways)?;
    let (mut terms, mut by_tiles) = (vec![0.0; rows], vec![false; rows]);
    for (row, (words, original)) in sums.iter().zip(order).enumerate() {
        let sums = RowSums::from_words(words);
        let original = original as usize;
        by_tiles[original] = ways[row / TILE as usize] == 0;
        if sums.count_pos == 0 || sums.count_neg == 0 {
            continue;
        }
        // As the kernel `weigh`.
        let part = |count: u32, sharpness: f64, sum: i64| {
            2.0 / (shape.total as f64 * f64::from(count)) / sharpness * sum as f64 / settings.sum_scale
        };
        terms[original] = part(sums.count_pos, settings.beta, sums.softplus_pos)
            + part(sums.count_neg, settings.alpha, sums.softplus_neg);
    }
    Ok((terms, by_tiles))
}

pub(super) fn download_gradients<D: Device>(
    device: &mut D,
    buffer: &D::Buffer,
    loss: &Remembered,
    output: &mut LossOutput,
) -> Result<()> {
    let Remembered { shape, layout, .. } = loss;
    let size = (shape.anchors, shape.dim);
    download_matrix(device, buffer, layout.anchors.gradient, size, &mut output.gradient)?;
    if shape.reference_gradient {
        let gradient = output.reference_gradient.get_or_insert_default();
        let size = (shape.reference_count(), shape.dim);
        download_matrix(device, buffer, layout.references.gradient, size, gradient)?;
    } else {
        output.reference_gradient = None;
    }
    Ok(())
}

fn download_matrix<D: Device>(
    device: &mut D,
    buffer: &D::Buffer,
    region: Region,
    size: (usize, usize),
    matrix: &mut Array2<f32>,
) -> Result<()> {
    if matrix.dim() != size || !matrix.is_standard_layout() {
        *matrix = Array2::zeros(size);
    }
    let Some(values) = matrix.as_slice_mut() else { unreachable!("standard layout, see above") };
    device.download(buffer, region.offset, cast_slice_mut(values))
}
