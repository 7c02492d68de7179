//! Between the steps of a part's loss: checks that a call is the next one, takes over the numbers that the
//! caller gathered from all parts, and reports those that a step found.

use bytemuck::{Pod, cast_slice, cast_slice_mut};

use super::params::{Counters, NUMBERS_COUNTS, NUMBERS_MAX_NEG, NUMBERS_MIN_POS, ReportParams, TakeParams};
use super::passes::Passes;
use super::remembered::Remembered;
use super::shape::Shape;
use super::{Device, DeviceBackend, Kernel};
use crate::backend::step::Step;
use crate::loss::Batch;
use crate::{Error, Result};

/// Which numbers are taken or reported: a list, or two for the sizes of the sets.
#[derive(Debug, Clone, Copy)]
pub(super) enum NumberKind {
    MinPos,
    MaxNeg,
    Counts,
}

impl NumberKind {
    fn code(self) -> u32 {
        match self {
            Self::MinPos => NUMBERS_MIN_POS,
            Self::MaxNeg => NUMBERS_MAX_NEG,
            Self::Counts => NUMBERS_COUNTS,
        }
    }
}

/// Addresses of the caller's numbers, in original order: of anchors, then of references, two lists each.
#[derive(Debug, Clone, Copy)]
pub(super) struct Given {
    pub(super) lists: [u64; 4],
    /// References that have numbers.
    pub(super) references: usize,
    /// The address of the batch's totals if they must be copied; or 0.
    pub(super) totals: u64,
}

impl<D: Device> DeviceBackend<D> {
    /// The state after the step before, if `step` is the next one and `part` still the same.
    pub(super) fn go_on(&mut self, part: &Batch<'_>, step: Step) -> Result<Remembered> {
        let last = step.take_last(&mut self.remembered, |last| last.step)?;
        part.validate()?;
        let shape = Shape { numbers: last.shape.numbers, ..self.shape(part) };
        // After a step on device rows the workspace has no room for the host's numbers and gradient.
        if last.shape != shape || last.labels.is_none() || !last.has_labels_of(part) {
            return Err(Error::OutOfOrder(
                "a step needs the part of the step before it: memory, shape or labels differ",
            ));
        }
        Ok(Remembered { step: Some(step), ..last })
    }

    pub(super) fn resumed(&mut self, loss: &Remembered) -> Result<(&mut D::Buffer, &mut D)> {
        let Self { device, loss: workspace, .. } = self;
        Ok((workspace.lay(device, &loss.layout.layout)?, device))
    }
}

/// Copies numbers to the device, for [`Passes::take`].
pub(super) fn upload_numbers<D: Device, T: Pod>(
    device: &mut D,
    buffer: &mut D::Buffer,
    loss: &Remembered,
    anchors: [&[T]; 2],
    references: [&[T]; 2],
) -> Result<Given> {
    let mut lists = [0; 4];
    let all = [anchors[0], anchors[1], references[0], references[1]];
    for ((list, region), values) in lists.iter_mut().zip(loss.layout.given).zip(all) {
        device.upload(buffer, region.offset, cast_slice(values))?;
        *list = device.address(buffer) + region.offset as u64;
    }
    Ok(Given { lists, references: references[0].len(), totals: 0 })
}

impl<D: Device> Passes<'_, D> {
    /// Replaces the numbers found here by the caller's.
    pub(super) fn take(&mut self, which: NumberKind, given: Given) -> Result<()> {
        let [anchors, anchors_neg, references, references_neg] =
            given.lists.map(|address| address as usize as *const std::ffi::c_void);
        let params = TakeParams {
            pairs: self.pairs(),
            which: which.code(),
            given: given.references as u32,
            anchors,
            anchors_neg,
            references,
            references_neg,
            totals: given.totals as usize as *const u64,
        };
        self.launcher.launch(Kernel::TakeNumbers, false, &params)
    }

    /// Writes the numbers found to the workspace's lists, in the caller's order.
    pub(super) fn report(&mut self, which: NumberKind) -> Result<()> {
        let layout = &self.loss.layout;
        let lists = match which {
            NumberKind::MinPos => [layout.min_pos, layout.min_pos],
            NumberKind::MaxNeg => [layout.max_neg_out, layout.max_neg_out],
            NumberKind::Counts => [layout.count_pos, layout.count_neg],
        };
        self.report_to(which, lists.map(|region| self.base + region.offset as u64), 0)
    }

    /// As [`report`](Self::report), to two given addresses; n_neg and N_pos go to `totals` unless that is 0.
    pub(super) fn report_to(&mut self, which: NumberKind, lists: [u64; 2], totals: u64) -> Result<()> {
        let params = ReportParams {
            pairs: self.pairs(),
            which: which.code(),
            reserved: 0,
            anchors: lists[0] as usize as *mut std::ffi::c_void,
            anchors_neg: lists[1] as usize as *mut std::ffi::c_void,
            totals: totals as usize as *mut u64,
        };
        self.launcher.launch(Kernel::ReportNumbers, false, &params)
    }
}

/// Waits for the counters.
pub(super) fn download_counters<D: Device>(
    device: &mut D,
    buffer: &D::Buffer,
    loss: &Remembered,
) -> Result<Counters> {
    let mut words = [0u64; size_of::<Counters>() / size_of::<u64>()];
    device.download(buffer, loss.layout.counters.offset, cast_slice_mut(&mut words))?;
    Ok(Counters::from_words(&words))
}
