//! The passes of one loss, in order: class order, same-class, sweep, selection, gradient.
//!
//! The host issues all of them and waits once, for the results. Every decision
//! on the way (adaptation, lists or tiles) is taken on the device.

use std::mem::offset_of;

use bytemuck::{cast_slice, cast_slice_mut};
use ndarray::Array2;

use super::params::{
    ClassRange, Counters, GradientParams, IdentityParams, InvertParams, LossScalars, MergeParams,
    OrderParams, Pairs, PairsParams, PrepareParams, RowNumbers, RowSame, RowSums, RowWeights, Settings, Side,
    TILE, WEIGH_SUMS, WeighParams, ZEROED, Zeroed,
};
use super::plan::{POOL_UNIT, Shape, order_runs, sum_scale, term_limit, tiles};
use super::workspace::{Layout, Region};
use super::{Device, DeviceBackend, Kernel, Params};
use crate::backend::step::Step;
use crate::loss::check_unit;
use crate::loss::{
    Batch, Embeddings, Identity, LossOutput, LossSettings, Mining, Rows, UnitCheck,
    select::initial_tolerances, select::probe_tolerance,
};
use crate::{Error, Result};

/// The `NO_ROW` of params.h, which C writes as an unsigned literal.
pub(super) const NO_ROW: u32 = u32::MAX;

/// Regions of one side's rows.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SideRegions {
    input: Region,
    labels: Region,
    keys: Region,
    pub(super) order: Region,
    /// What the merges of the class order go to and fro between.
    run_keys: Region,
    run_order: Region,
    pub(super) rows: Region,
    pub(super) square_sums: Region,
    duplicate: Region,
    column_sums: Region,
    ways: Region,
    partial: Region,
    arrived: Region,
    gradient: Region,
}

/// Addresses of one side's input and gradient, in the workspace or wherever the caller has them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    pub(super) rows: u64,
    pub(super) labels: u64,
    pub(super) gradient: u64,
}

impl SideRegions {
    pub(super) fn ends(&self, base: u64) -> Ends {
        let address = |region: Region| base + region.offset as u64;
        Ends { rows: address(self.input), labels: address(self.labels), gradient: address(self.gradient) }
    }
}

/// Whether rows are checked, and how far their norms may be from 1.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowCheck {
    pub(super) check: UnitCheck,
    pub(super) tolerance: f64,
}

/// The workspace of a loss: everything in it, and where.
#[derive(Debug, Clone, Default)]
pub(super) struct LossLayout {
    pub(super) layout: Layout,
    pub(super) anchors: SideRegions,
    pub(super) references: SideRegions,
    classes: Region,
    same: Region,
    max_neg: Region,
    pub(super) counters: Region,
    sums: Region,
    weights: Region,
    identity: Region,
    /// A list of the anchors' references as the caller wrote it, and positions of the references.
    identity_list: Region,
    positions: Region,
    pub(super) columns: Region,
    column_weights: Region,
    pub(super) totals: Region,
    /// Numbers as the caller gives them: of anchors, then of references, two lists each.
    pub(super) given: [Region; 4],
    tile_counts: Region,
    tile_segments: Region,
    pool_values: Region,
    pool_words: Region,
    pub(super) scalars: Region,
    weigh_parts: Region,
    weigh_arrived: Region,
    pub(super) min_pos: Region,
    pub(super) max_neg_out: Region,
    pub(super) count_pos: Region,
    pub(super) count_neg: Region,
    pool: usize,
    /// There is room for every pair.
    stores_everything: bool,
}

impl LossLayout {
    /// The workspace as a function of the shape, the budget for candidates and the GPU's size.
    ///
    /// For B anchors of D dimensions in the square form, with stride D' and s splits (0 for one, whose
    /// kernels write the gradient itself), about `B D e + B D' (e + 4 s) + 4 B D + 164 B + 8 tiles` bytes with
    /// elements of e bytes, and the budget.
    ///
    /// `resident`: input and gradients stay in the caller's memory, so none is set aside for them.
    pub(super) fn new(shape: &Shape, budget: usize, multiprocessors: u32, resident: bool) -> Self {
        let mut layout = Layout::default();
        let mut side = |of_references, gradient| {
            Self::side(&mut layout, shape, of_references, gradient, multiprocessors, resident)
        };
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
            sums: layout.region::<RowSums>(rows),
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

    /// What a loss begins with as 0.
    fn zeroed(&self, base: u64) -> [Zeroed; ZEROED as usize] {
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
        multiprocessors: u32,
        resident: bool,
    ) -> SideRegions {
        let (count, _) = shape.sides(of_references);
        let (padded, stride) = (tiles(count) * TILE as usize, shape.stride());
        let merged = if order_runs(count).next().is_some() { count } else { 0 };
        let splits = match shape.splits(of_references, multiprocessors) {
            1 => 0,
            several => several,
        };
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
            rows: layout.region::<u8>(padded * stride * shape.precision.bytes()),
            square_sums: layout.region::<f64>(count),
            duplicate: layout.region::<f32>(padded),
            column_sums: layout.region::<f32>(tiles(count) * stride),
            ways: layout.region::<u8>(if_wanted(tiles(count))),
            partial: layout.region::<f32>(if_wanted(splits * padded * stride)),
            arrived: layout.region::<u32>(if_wanted(splits.min(1) * shape.gradient_blocks(of_references))),
            gradient: layout.region::<f32>(if_copied(if_wanted(count * shape.dim))),
        }
    }
}

/// The last loss: where its pairs are.
pub(super) struct Remembered {
    pub(super) shape: Shape,
    pub(super) layout: LossLayout,
    pub(super) settings: Settings,
    pub(super) host_settings: LossSettings,
    /// How far the steps of a part have come; `None` for a loss at once.
    pub(super) step: Option<Step>,
    /// Labels of both sides, where the host has them: those of the next step must be the same.
    pub(super) labels: [Vec<i64>; 2],
}

const _: () = assert!(offset_of!(Counters, probe_neg) == 0 && offset_of!(Counters, total_pos) == 8);

impl Remembered {
    /// The first step of a part without anchors, which no kernel is asked for.
    pub(super) fn of_nothing(shape: Shape, settings: &LossSettings, labels: [Vec<i64>; 2]) -> Self {
        Self {
            shape,
            layout: LossLayout::default(),
            settings: device_settings(settings, &shape),
            host_settings: *settings,
            step: Some(Step::SameClass),
            labels,
        }
    }

    /// The parameter that all passes share, for a workspace at `base`.
    pub(super) fn pairs(&self, base: u64) -> Pairs {
        let (shape, layout) = (&self.shape, &self.layout);
        let side = |regions: &SideRegions, count: usize| Side {
            rows: pointer(base, regions.rows),
            order: pointer(base, regions.order),
            duplicate: pointer(base, regions.duplicate),
            count: count as u32,
            tiles: tiles(count) as u32,
        };
        Pairs {
            anchors: side(&layout.anchors, shape.anchors),
            references: side(&layout.references, shape.reference_count()),
            total: shape.total as u32,
            band: shape.band() as u32,
            square: u32::from(shape.references.is_none()),
            stride: shape.stride() as u32,
            dim: shape.dim as u32,
            pool: layout.pool as u32,
            tiles: shape.tiles() as u64,
            classes: pointer(base, layout.classes),
            same: pointer(base, layout.same),
            max_neg: pointer(base, layout.max_neg),
            counters: pointer(base, layout.counters),
            sums: pointer(base, layout.sums),
            weights: pointer(base, layout.weights),
            identity: unless_empty::<u32>(base, layout.identity),
            columns: unless_empty(base, layout.columns),
            column_weights: match shape.references {
                None => pointer(base, layout.weights),
                Some(_) => unless_empty(base, layout.column_weights),
            },
            // In one process the whole batch's are those that its sweep counts.
            totals: match self.step {
                None => pointer::<u64>(base, layout.counters),
                Some(_) => pointer(base, layout.totals),
            },
            tile_counts: pointer(base, layout.tile_counts),
            tile_segments: pointer(base, layout.tile_segments),
            pool_values: pointer(base, layout.pool_values),
            pool_words: pointer(base, layout.pool_words),
            settings: self.settings,
        }
    }
}

/// The device address of a region, as the type params.h gives it.
pub(super) fn pointer<T>(base: u64, region: Region) -> *mut T {
    (base as usize + region.offset) as *mut T
}

/// The same, or null for a region of nothing.
fn unless_empty<T>(base: u64, region: Region) -> *mut T {
    if region.bytes == 0 { std::ptr::null_mut() } else { pointer(base, region) }
}

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

impl<D: Device> Launcher<'_, D> {
    pub(super) fn launch<P: Params>(
        &mut self,
        kernel: Kernel,
        of_references: bool,
        params: &P,
    ) -> Result<()> {
        let multiprocessors = self.device.multiprocessors();
        let splits = self.shape.splits(of_references, multiprocessors);
        let kernel = self.shape.variant(kernel, self.device.has_warpgroup_products());
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
        }
    }

    pub(super) fn run_loss(
        &mut self,
        batch: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()> {
        settings.validate()?;
        batch.validate()?;
        same_type(batch)?;
        let shape = self.shape(batch);
        shape.check()?;
        let loss = self.begin(shape, settings, false)?;
        let layout = &loss.layout;
        let Self { device, loss: workspace, .. } = self;
        let buffer = workspace.lay(device, &layout.layout)?;
        let input = upload(device, buffer, layout, batch)?;
        let (base, check) = (device.address(buffer), input.check);
        issue(&mut Launcher { device: &mut *device, shape }, base, &loss, &input)?;
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
    issue_gradients(launcher, base, loss, input.ends.map(|end| end.gradient))
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

fn device_settings(settings: &LossSettings, shape: &Shape) -> Settings {
    let tolerances = initial_tolerances(settings);
    let probe = probe_tolerance(settings);
    Settings {
        gamma_pos: tolerances.pos,
        gamma_neg: tolerances.neg,
        probe,
        // The negative tolerance only ever shrinks: nothing below this one is ever mined.
        candidate: probe.max(tolerances.neg),
        tolerance: settings.tolerance,
        alpha: settings.alpha,
        beta: settings.beta,
        lambda_pos: settings.lambda_pos,
        lambda_neg: settings.lambda_neg,
        lambda: 0,
        sum_scale: sum_scale(settings, shape.reference_count()),
        term_limit: term_limit(shape.reference_count()),
        adaptive: u32::from(settings.mining == Mining::AtAsms),
        reserved: 0,
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
    launcher.launch(Kernel::OrderTiles, side.of_references, &tiles)?;
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
