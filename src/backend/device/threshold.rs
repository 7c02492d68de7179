//! The hyper-gradient's sums over the pairs of the last loss (SPEC 5).

use bytemuck::{cast_slice, cast_slice_mut};
use ndarray::ArrayView2;

use super::layout::{Remembered, SideRegions, pointer};
use super::loss::Launcher;
use super::params::{STAGE_BYTES, TILE, ThresholdParams, ThresholdPrepareParams, ThresholdSumParams};
use super::plan::{Shape, tiles};
use super::workspace::{Layout, Region};
use super::{Device, DeviceBackend, Kernel};
use crate::backend::step::Step;
use crate::loss::{Batch, Hypergradient};
use crate::{Error, Result};

/// The workspace of the threshold pass.
struct ThresholdLayout {
    layout: Layout,
    /// Tangents as they come, `[B, D]` and `[N, D]`.
    tangents: [Region; 2],
    /// `[edot | e]` of the anchors, `[e | edot]` of the references.
    joined: [Region; 2],
    partial: Region,
    sums: Region,
    half: usize,
}

impl ThresholdLayout {
    /// About `8 (B + N) D` bytes for joined rows, `4 (B + N) D` for tangents and 16 a tile.
    fn new(shape: &Shape) -> Self {
        let mut layout = Layout::default();
        let half = shape.dim.next_multiple_of(STAGE_BYTES as usize / size_of::<f32>());
        let counts = [shape.anchors, shape.reference_count()];
        Self {
            tangents: counts.map(|count| layout.region::<f32>(count * shape.dim)),
            joined: counts.map(|count| layout.region::<f32>(tiles(count) * TILE as usize * 2 * half)),
            partial: layout.region::<f64>(2 * shape.tiles()),
            sums: layout.region::<f64>(2),
            half,
            layout,
        }
    }
}

impl<D: Device> DeviceBackend<D> {
    pub(super) fn run_threshold(
        &mut self,
        batch: &Batch<'_>,
        tangent: ArrayView2<'_, f32>,
        reference_tangent: Option<ArrayView2<'_, f32>>,
    ) -> Result<Hypergradient> {
        let shape = self.shape(batch);
        if shape.anchors == 0
            && self.remembered.as_ref().is_some_and(|last| last.step == Some(Step::Gradient))
        {
            return Ok(Hypergradient::default());
        }
        // In the square form both sides move alike.
        let reference_tangent = if batch.is_square() { None } else { reference_tangent };
        self.sum_threshold(shape, |device, buffer, regions| {
            let names = ["tangent", "reference tangent"];
            let counts = [shape.anchors, shape.reference_count()];
            let mut addresses = [0; 2];
            for (side, tangent) in [Some(tangent), reference_tangent].into_iter().enumerate() {
                let Some(tangent) = tangent else { continue };
                check_tangent(names[side], (counts[side], shape.dim), &tangent)?;
                let tangent = tangent.as_standard_layout();
                let Some(values) = tangent.as_slice() else { unreachable!("standard layout") };
                device.upload(buffer, regions[side].offset, cast_slice(values))?;
                addresses[side] = device.address(buffer) + regions[side].offset as u64;
            }
            Ok(addresses)
        })
    }

    /// The sums, with tangents at the addresses that `place` answers (0 for a reference tangent of
    /// zero); it may put them into its buffer's regions.
    pub(super) fn sum_threshold(
        &mut self,
        shape: Shape,
        place: impl FnOnce(&mut D, &mut D::Buffer, &[Region; 2]) -> Result<[u64; 2]>,
    ) -> Result<Hypergradient> {
        let Self { device, loss, threshold, remembered, .. } = self;
        let (Some(remembered), Some(pairs_buffer)) = (remembered, loss.buffer()) else {
            return Err(Error::OutOfOrder("the threshold pass needs a loss before it"));
        };
        if remembered.step.is_some_and(|step| step != Step::Gradient) {
            return Err(Error::OutOfOrder("the threshold pass needs the last step of the loss before it"));
        }
        same_shape(&remembered.shape, &shape)?;
        let layout = ThresholdLayout::new(&shape);
        let buffer = threshold.lay(device, &layout.layout)?;
        let [own, other] = place(device, buffer, &layout.tangents)?;
        let tangents = [own, if shape.references.is_none() { own } else { other }];

        let (pairs_base, base) = (device.address(pairs_buffer), device.address(buffer));
        let mut launcher = Launcher { device: &mut *device, shape };
        let Remembered { layout: pairs_layout, .. } = &*remembered;
        for (index, regions) in [&pairs_layout.anchors, &pairs_layout.references].into_iter().enumerate() {
            let tangent = tangents[index] as usize as *const f32;
            let params = prepare_params(&shape, regions, pairs_base, index == 1, tangent)
                .writing(pointer(base, layout.joined[index]), layout.half);
            launcher.launch(Kernel::ThresholdPrepare(shape.precision), index == 1, &params)?;
        }
        let params = ThresholdParams {
            pairs: remembered.pairs(pairs_base),
            left: pointer::<f32>(base, layout.joined[0]),
            right: pointer::<f32>(base, layout.joined[1]),
            joined_half: layout.half as u32,
            reserved: 0,
            partial: pointer(base, layout.partial),
        };
        launcher.launch(Kernel::Threshold(shape.precision), false, &params)?;
        let sum = ThresholdSumParams {
            partial: pointer::<f64>(base, layout.partial),
            tiles: shape.tiles() as u64,
            sums: pointer(base, layout.sums),
        };
        launcher.launch(Kernel::ThresholdSum, false, &sum)?;
        let mut sums = [0.0f64; 2];
        device.download(buffer, layout.sums.offset, cast_slice_mut(&mut sums))?;
        Ok(Hypergradient { pos: sums[0], neg: sums[1] })
    }
}

fn prepare_params(
    shape: &Shape,
    regions: &SideRegions,
    base: u64,
    of_references: bool,
    tangent: *const f32,
) -> ThresholdPrepareParams {
    ThresholdPrepareParams {
        rows: pointer::<std::ffi::c_void>(base, regions.rows),
        tangent,
        order: pointer::<u32>(base, regions.order),
        joined: std::ptr::null_mut(),
        count: shape.sides(of_references).0 as u32,
        dim: shape.dim as u32,
        stride: shape.stride() as u32,
        joined_half: 0,
        tangent_first: u32::from(!of_references),
        reserved: 0,
    }
}

impl ThresholdPrepareParams {
    /// The same, with its result's place.
    fn writing(self, joined: *mut f32, half: usize) -> Self {
        Self { joined, joined_half: half as u32, ..self }
    }
}

fn same_shape(expected: &Shape, got: &Shape) -> Result<()> {
    let counts = |shape: &Shape| [shape.anchors, shape.reference_count(), shape.dim];
    let names = ["anchors of the last loss", "references of the last loss", "dimension of the last loss"];
    for ((what, expected), got) in names.into_iter().zip(counts(expected)).zip(counts(got)) {
        if expected != got {
            return Err(Error::LengthMismatch { what, expected, got });
        }
    }
    if expected.references.is_some() == got.references.is_some() && expected.precision == got.precision {
        return Ok(());
    }
    Err(Error::OutOfOrder("the threshold pass needs the batch of the last loss, in its form and type"))
}

fn check_tangent(what: &'static str, size: (usize, usize), tangent: &ArrayView2<'_, f32>) -> Result<()> {
    if tangent.dim() != size {
        return Err(Error::LengthMismatch { what, expected: size.0 * size.1, got: tangent.len() });
    }
    let bad = tangent.outer_iter().position(|row| !row.iter().all(|value| value.is_finite()));
    bad.map_or(Ok(()), |row| Err(Error::NotFinite { rows: what, row }))
}
