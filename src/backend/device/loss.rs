//! The passes of one loss, in order: class order (order.rs), same-class, sweep, selection, gradient.
//!
//! The host issues all of them and waits once, for the results. Every decision
//! on the way (adaptation, lists or tiles) is taken on the device.

use bytemuck::{cast_slice, cast_slice_mut};
use ndarray::Array2;

use super::layout::{
    Ends, LossLayout, Remembered, ResidentOutput, RowCheck, SideRegions, device_settings, pointer,
    unless_empty,
};
use super::order::issue_order;
use super::params::{
    GradientParams, LeadBackParams, LossScalars, PairsParams, RowSums, TILE, WEIGH_NO_WORDS, WeighParams,
};
use super::plan::{Shape, tiles};
use super::workspace::Region;
use super::{Device, DeviceBackend, Kernel, Params};
use crate::loss::check_unit;
use crate::loss::{Batch, Embeddings, Identity, LossOutput, LossSettings, Rows};
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
}

impl<'a, D: Device> Launcher<'a, D> {
    /// For the kernels of one loss.
    pub(super) fn new(device: &'a mut D, loss: &Remembered) -> Self {
        Self { device, shape: loss.shape }
    }

    pub(super) fn launch<P: Params>(
        &mut self,
        kernel: Kernel,
        of_references: bool,
        params: &P,
    ) -> Result<()> {
        let splits = self.shape.splits(of_references, self.device.multiprocessors());
        self.launch_split(kernel, of_references, splits, 0, params)
    }

    /// The same with splits of the caller's, and more shared memory.
    pub(super) fn launch_split<P: Params>(
        &mut self,
        kernel: Kernel,
        of_references: bool,
        splits: usize,
        more_bytes: u32,
        params: &P,
    ) -> Result<()> {
        let kernel = self.shape.variant(kernel, self.device.has_warpgroup_products());
        let mut plan = self.shape.plan(kernel, of_references, splits, self.device.multiprocessors());
        plan.shared_bytes += more_bytes;
        // SAFETY: `params` is built in this folder from regions of a layout for this very shape, laid over
        // a buffer that lives in the backend; tests/emulated runs every kernel with the gaps watched.
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
    issue_weigh(launcher, base, loss, loss.scalars_at(base), true)?;
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
        zeros: unless_empty::<std::ffi::c_void>(base, layout.zeros),
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
