//! The threshold gradient: its two sums over the pairs of the last loss (SPEC 5).

use bytemuck::{cast_slice, cast_slice_mut};
use ndarray::ArrayView2;

use super::layout::{pointer, unless_empty};
use super::params::{GradientParams, ThresholdParams, ThresholdSumParams};
use super::passes::Passes;
use super::plan::GradientGrid;
use super::remembered::Remembered;
use super::shape::Shape;
use super::workspace::{Layout, Region};
use super::{Device, DeviceBackend, DeviceProperties, Kernel};
use crate::backend::step::{NO_LOSS, OTHER_LABELS, Step};
use crate::loss::{Batch, TangentOf, ThresholdGradient};
use crate::{Error, Result};

/// Message for a threshold_gradient of a loss whose thresholds are in the caller's memory.
const THRESHOLDS_BY_ADDRESS: &str =
    "threshold_gradient needs a loss with thresholds in its settings: those at an address may be gone";

/// The workspace of the threshold pass.
struct ThresholdLayout {
    layout: Layout,
    /// Tangents as given, `[B, D]` and `[N, D]`.
    tangents: [Region; 2],
    /// A sum for each lambda and each block of both sides.
    partial: Region,
    sums: Region,
    /// Number of blocks of a lambda on each side.
    blocks: [usize; 2],
}

impl ThresholdLayout {
    /// About `4 (B + N) D` bytes for tangents, and 16 for each block of a gradient.
    fn new(shape: &Shape, gpu: DeviceProperties, resident: bool) -> Self {
        let mut layout = Layout::default();
        let counts = [shape.anchors, shape.references.unwrap_or(0)];
        let blocks = [false, true].map(|of_references| {
            let there = !of_references || shape.references.is_some();
            let grid = grid(shape, of_references, gpu);
            if there { grid.blocks() * grid.splits } else { 0 }
        });
        Self {
            tangents: counts.map(|count| layout.region::<f32>(if resident { 0 } else { count * shape.dim })),
            partial: layout.region::<f64>(2 * (blocks[0] + blocks[1])),
            sums: layout.region::<f64>(2),
            blocks,
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
    ) -> Result<ThresholdGradient> {
        let shape = self.shape(batch);
        if let Some(last) = &self.remembered
            && last.shape.size() == shape.size()
            && !last.has_labels_of(batch)
        {
            return Err(Error::OutOfOrder(OTHER_LABELS));
        }
        // In the square form the anchors' tangent is that of both sides.
        let reference_tangent = if batch.is_square() { None } else { reference_tangent };
        self.sum_threshold(shape, false, |device, buffer, regions| {
            let mut addresses = [0; 2];
            for (side, tangent) in [Some(tangent), reference_tangent].into_iter().enumerate() {
                let Some(tangent) = tangent else { continue };
                shape.size().check_tangent([TangentOf::Anchors, TangentOf::References][side], &tangent)?;
                let tangent = tangent.as_standard_layout();
                let Some(values) = tangent.as_slice() else { unreachable!("standard layout") };
                device.upload(buffer, regions[side].offset, cast_slice(values))?;
                addresses[side] = device.address(buffer) + regions[side].offset as u64;
            }
            Ok(addresses)
        })
    }

    /// Computes the sums. `place` returns the tangents' addresses (0 for a reference tangent of zero, or in
    /// the square form); unless they are `resident`, it first copies them into the regions it is given.
    pub(super) fn sum_threshold(
        &mut self,
        shape: Shape,
        resident: bool,
        place: impl FnOnce(&mut D, &mut D::Buffer, &[Region; 2]) -> Result<[u64; 2]>,
    ) -> Result<ThresholdGradient> {
        let Self { device, loss, threshold, remembered, .. } = self;
        let Some(remembered) = remembered else { return Err(Error::OutOfOrder(NO_LOSS)) };
        if remembered.step.is_some_and(|step| step != Step::Gradient) {
            return Err(Error::OutOfOrder(NO_LOSS));
        }
        if remembered.settings.lambda != 0 {
            return Err(Error::OutOfOrder(THRESHOLDS_BY_ADDRESS));
        }
        remembered.shape.size().is_of_last(shape.size())?;
        if remembered.shape.precision != shape.precision {
            return Err(Error::OutOfOrder(
                "threshold_gradient needs the batch of the last loss, in its type",
            ));
        }
        if shape.anchors == 0 {
            return Ok(ThresholdGradient::default());
        }
        let Some(pairs_buffer) = loss.buffer() else { return Err(Error::OutOfOrder(NO_LOSS)) };
        let layout = ThresholdLayout::new(&shape, device.properties(), resident);
        let buffer = threshold.lay(device, &layout.layout)?;
        let tangents = place(device, buffer, &layout.tangents)?;
        let base = device.address(buffer);
        let mut passes = Passes::new(&mut *device, pairs_buffer, remembered);
        // With a single tangent only its side has blocks.
        let of_sides: &[bool] = if tangents[1] == 0 { &[false] } else { &[false, true] };
        let blocks = layout.blocks[..of_sides.len()].iter().sum::<usize>() as u64;
        for &of_references in of_sides {
            let params = ThresholdParams {
                walk: passes.walk(of_references),
                tangent: tangents[usize::from(of_references)] as usize as *const f32,
                partial: pointer(base, layout.partial),
                blocks,
                first: if of_references { layout.blocks[0] as u64 } else { 0 },
            };
            passes.launcher.launch(Kernel::Threshold(shape.precision), of_references, &params)?;
        }
        let sum = ThresholdSumParams {
            partial: pointer::<f64>(base, layout.partial),
            blocks,
            sums: pointer(base, layout.sums),
        };
        passes.launcher.launch(Kernel::ThresholdSum, false, &sum)?;
        let mut sums = [0.0f64; 2];
        device.download(buffer, layout.sums.offset, cast_slice_mut(&mut sums))?;
        Ok(ThresholdGradient { pos: sums[0], neg: sums[1] })
    }
}

fn grid(shape: &Shape, of_references: bool, gpu: DeviceProperties) -> GradientGrid {
    GradientGrid::new(Kernel::Threshold(shape.precision), shape, of_references, gpu)
}

impl<D: Device> Passes<'_, D> {
    /// Parameters of the gradient's walk over the pairs of the loss; it writes no gradient.
    fn walk(&self, of_references: bool) -> GradientParams {
        let Remembered { shape, layout, settings, .. } = self.loss;
        let regions = if of_references { &layout.references } else { &layout.anchors };
        GradientParams {
            pairs: self.pairs(),
            of_references: u32::from(of_references),
            splits: grid(shape, of_references, self.launcher.device.properties()).splits as u32,
            weight_scale: shape.slope_scale(settings.alpha.max(settings.beta)),
            reserved: 0,
            by_lists: unless_empty::<u8>(self.base, regions.by_lists),
            partial: std::ptr::null_mut(),
            arrived: std::ptr::null_mut(),
            gradient: std::ptr::null_mut(),
        }
    }
}
