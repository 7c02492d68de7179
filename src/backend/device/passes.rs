//! The kernels of each pass, in order: class order (order.rs), same-class, sweep, selection, weights,
//! gradient; the exchange of numbers (steps.rs); the threshold gradient's walk (threshold.rs).
//!
//! Every decision on the way (adaptation, lists or tiles) is taken on the device.

use super::launcher::Launcher;
use super::layout::pointer;
use super::params::{
    GradientParams, LossScalars, NormalizeBackwardParams, Pairs, PairsParams, WEIGH_NO_WORDS, WeighParams,
};
use super::plan::GradientGrid;
use super::remembered::Remembered;
use super::transfer::Input;
use super::workspace::Region;
use super::{Device, Kernel};
use crate::Result;

/// Device addresses that the scalars of a loss are written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResidentOutput {
    /// The address of a [`LossScalars`](crate::loss::LossScalars).
    pub scalars: u64,
    /// The address of an f32 that also receives the loss; or 0.
    pub loss: u64,
}

/// Issues the passes of one loss, on its workspace at `base`.
pub(super) struct Passes<'a, D: Device> {
    pub(super) launcher: Launcher<'a, D>,
    pub(super) base: u64,
    pub(super) loss: &'a Remembered,
}

impl<'a, D: Device> Passes<'a, D> {
    pub(super) fn new(device: &'a mut D, buffer: &D::Buffer, loss: &'a Remembered) -> Self {
        let base = device.address(buffer);
        Self { launcher: Launcher { device, shape: loss.shape }, base, loss }
    }
}

impl<D: Device> Passes<'_, D> {
    /// The device address of a region of the workspace.
    pub(super) fn at<T>(&self, region: Region) -> *mut T {
        pointer(self.base, region)
    }

    /// The parameter that all passes share.
    pub(super) fn pairs(&self) -> Pairs {
        self.loss.pairs(self.base)
    }

    /// Address of the scalars in the workspace, for a loss that is waited for.
    pub(super) fn scalars(&self) -> ResidentOutput {
        ResidentOutput { scalars: self.base + self.loss.layout.scalars.offset as u64, loss: 0 }
    }

    /// Every kernel of one loss.
    pub(super) fn whole_loss(&mut self, input: &Input, output: ResidentOutput) -> Result<()> {
        self.order(input)?;
        self.same_class()?;
        self.sweep()?;
        self.select()?;
        self.weigh(output, true)?;
        self.gradients(input.addresses.map(|side| side.gradient))?;
        self.normalize_backward(input)
    }

    /// m+ and the positives.
    pub(super) fn same_class(&mut self) -> Result<()> {
        self.over_pairs(Kernel::SameClass(self.loss.shape.precision))
    }

    /// m-, the probe and the candidates.
    pub(super) fn sweep(&mut self) -> Result<()> {
        self.over_pairs(Kernel::Sweep(self.loss.shape.precision))
    }

    /// The mined sets and the sums over them.
    pub(super) fn select(&mut self) -> Result<()> {
        self.over_pairs(Kernel::SelectStored)?;
        // With room for every pair there is nothing to recompute.
        if self.loss.layout.stores_everything {
            return Ok(());
        }
        self.over_pairs(Kernel::SelectRecomputed(self.loss.shape.precision))
    }

    fn over_pairs(&mut self, kernel: Kernel) -> Result<()> {
        let params = PairsParams { pairs: self.pairs() };
        self.launcher.launch(kernel, false, &params)
    }

    /// Computes row weights, the results of each anchor and the scalars. With `swept` also decides how each
    /// row tile's gradient is computed.
    pub(super) fn weigh(
        &mut self,
        ResidentOutput { scalars, loss: figure }: ResidentOutput,
        swept: bool,
    ) -> Result<()> {
        let Remembered { shape, layout, .. } = self.loss;
        let params = WeighParams {
            pairs: self.pairs(),
            anchor_column_sums: self.at::<f32>(layout.anchors.column_sums),
            reference_column_sums: self.at::<f32>(layout.references.column_sums),
            anchor_square_sums: self.at::<f64>(layout.anchors.square_sums),
            reference_square_sums: self.at::<f64>(layout.references.square_sums),
            scalars: scalars as usize as *mut LossScalars,
            loss: figure as usize as *mut f32,
            min_pos: self.at(layout.min_pos),
            max_neg: self.at(layout.max_neg_out),
            count_pos: self.at(layout.count_pos),
            count_neg: self.at(layout.count_neg),
            parts: self.at(layout.weigh_parts),
            arrived: self.at(layout.weigh_arrived),
            by_lists: [
                if swept { self.at(layout.anchors.by_lists) } else { std::ptr::null_mut() },
                if swept && shape.reference_gradient {
                    self.at(layout.references.by_lists)
                } else {
                    std::ptr::null_mut()
                },
            ],
            blocks: shape.weigh_blocks() as u32,
            words: if swept { shape.finished_words() } else { WEIGH_NO_WORDS },
            weight_scale: shape.weight_scale(),
            reserved: 0,
        };
        self.launcher.launch(Kernel::Weigh, false, &params)
    }

    /// Computes the gradients into `targets` (of anchors, of references).
    pub(super) fn gradients(&mut self, targets: [u64; 2]) -> Result<()> {
        self.gradient(targets[0], false)?;
        if self.loss.shape.reference_gradient {
            self.gradient(targets[1], true)?;
        }
        Ok(())
    }

    /// One side's gradient: by lists where little is mined, by tiles elsewhere; each block reads which.
    fn gradient(&mut self, target: u64, of_references: bool) -> Result<()> {
        let Remembered { shape, layout, .. } = self.loss;
        let regions = if of_references { &layout.references } else { &layout.anchors };
        let kernel = Kernel::Gradient(shape.precision);
        let grid = GradientGrid::new(kernel, shape, of_references, self.launcher.device.properties());
        let params = GradientParams {
            pairs: self.pairs(),
            of_references: u32::from(of_references),
            splits: grid.splits as u32,
            weight_scale: shape.weight_scale(),
            reserved: 0,
            by_lists: self.at::<u8>(regions.by_lists),
            partial: self.at(regions.partial),
            arrived: self.at(regions.arrived),
            gradient: target as usize as *mut f32,
        };
        self.launcher.launch(kernel, of_references, &params)
    }

    /// Replaces the gradients with respect to unit rows by those with respect to the rows as given.
    pub(super) fn normalize_backward(&mut self, input: &Input) -> Result<()> {
        let Remembered { shape, layout, .. } = self.loss;
        let wanted = [shape.normalize, shape.normalize && shape.reference_gradient];
        for (side, regions) in [&layout.anchors, &layout.references].into_iter().enumerate() {
            if !wanted[side] {
                continue;
            }
            let params = NormalizeBackwardParams {
                rows: input.addresses[side].rows as usize as *const std::ffi::c_void,
                lengths: self.at::<f64>(regions.lengths),
                gradient: input.addresses[side].gradient as usize as *mut f32,
                count: shape.sides(side == 1).0 as u32,
                dim: shape.dim as u32,
            };
            self.launcher.launch(Kernel::NormalizeBackward(shape.precision), side == 1, &params)?;
        }
        Ok(())
    }
}
