//! The loss of a part of a batch in steps, between which the caller gathers what all parts found.

use bytemuck::{Pod, cast_slice, cast_slice_mut};

use super::launcher::Launcher;
use super::layout::Remembered;
use super::loss::same_type;
use super::order::issue_order;
use super::params::{Counters, NUMBERS_COUNTS, NUMBERS_MAX_NEG, NUMBERS_MIN_POS, ReportParams, TakeParams};
use super::passes::{issue_gradients, issue_same_class, issue_selection, issue_sweep, issue_weigh};
use super::shape::Shape;
use super::transfer::{download_gradients, download_scalars, upload};
use super::workspace::Region;
use super::{Device, DeviceBackend, Kernel};
use crate::backend::step::Step;
use crate::loss::select::adapt;
use crate::loss::{Batch, LossOutput, LossSettings, PairTotals, RowNumbers};
use crate::{Error, Result};

/// Which numbers go in or out: a list, or two for the sizes of the sets.
#[derive(Debug, Clone, Copy)]
pub(super) enum Which {
    MinPos,
    MaxNeg,
    Counts,
}

impl Which {
    fn code(self) -> u32 {
        match self {
            Self::MinPos => NUMBERS_MIN_POS,
            Self::MaxNeg => NUMBERS_MAX_NEG,
            Self::Counts => NUMBERS_COUNTS,
        }
    }
}

/// Addresses of numbers, in original order: of anchors, then of references, two lists each.
#[derive(Debug, Clone, Copy)]
pub(super) struct Given {
    pub(super) lists: [u64; 4],
    /// References that have numbers.
    pub(super) references: usize,
    /// The address of the batch's totals where they have to be copied, or 0.
    pub(super) totals: u64,
}

impl<D: Device> DeviceBackend<D> {
    pub(super) fn run_same_class(
        &mut self,
        part: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()> {
        let last = self.remembered.take();
        settings.validate()?;
        part.validate()?;
        same_type(part)?;
        let shape = Shape { numbers: !part.is_square(), ..self.shape(part) };
        shape.check()?;
        let labels = Remembered::keep_labels(last, part);
        if shape.anchors == 0 {
            self.remembered = Some(Remembered::of_nothing(shape, settings, labels));
            *output = LossOutput::default();
            return Ok(());
        }
        let begun = self.begin(shape, settings, false);
        let loss = Remembered { step: Some(Step::SameClass), labels, ..begun };
        let Self { device, loss: workspace, .. } = self;
        let buffer = workspace.lay(device, &loss.layout.layout)?;
        let input = upload(device, buffer, &loss.layout, part)?;
        let base = device.address(buffer);
        let mut launcher = Launcher::new(&mut *device, &loss);
        issue_order(&mut launcher, base, &loss, &input)?;
        issue_same_class(&mut launcher, base, &loss)?;
        // For the totals and means, and for bad rows; nothing is mined yet.
        issue_weigh(&mut launcher, base, &loss, loss.scalars_at(base), false)?;
        download_scalars(device, buffer, &loss, input.check.tolerance, output)?;
        download_list(device, buffer, loss.layout.min_pos, shape.anchors, &mut output.min_pos)?;
        self.remembered = Some(loss);
        Ok(())
    }

    pub(super) fn run_sweep(
        &mut self,
        part: &Batch<'_>,
        min_pos: RowNumbers<'_, f32>,
        output: &mut LossOutput,
    ) -> Result<()> {
        let loss = self.go_on(part, Step::Sweep)?;
        min_pos.validate(part)?;
        if loss.shape.anchors == 0 {
            output.max_neg.clear();
            output.probe_neg = 0;
            self.remembered = Some(loss);
            return Ok(());
        }
        let (shape, buffer, device) = self.resumed(&loss)?;
        let given = upload_numbers(device, buffer, &loss, [min_pos.anchors, &[]], [min_pos.references, &[]])?;
        let base = device.address(buffer);
        let mut launcher = Launcher::new(&mut *device, &loss);
        take(&mut launcher, base, &loss, Which::MinPos, given)?;
        issue_sweep(&mut launcher, base, &loss)?;
        report(&mut launcher, base, &loss, Which::MaxNeg)?;
        output.probe_neg = download_counters(device, buffer, &loss)?.probe_neg;
        download_list(device, buffer, loss.layout.max_neg_out, shape.anchors, &mut output.max_neg)?;
        self.remembered = Some(loss);
        Ok(())
    }

    pub(super) fn run_select(
        &mut self,
        part: &Batch<'_>,
        max_neg: RowNumbers<'_, f32>,
        totals: PairTotals,
        output: &mut LossOutput,
    ) -> Result<()> {
        let loss = self.go_on(part, Step::Select)?;
        max_neg.validate(part)?;
        // What the kernels decide too, from the same two integers.
        let tolerances = adapt(&loss.host_settings, totals);
        (output.gamma_pos, output.gamma_neg) = (tolerances.pos, tolerances.neg);
        if loss.shape.anchors == 0 {
            output.count_pos.clear();
            output.count_neg.clear();
            self.remembered = Some(loss);
            return Ok(());
        }
        let (shape, buffer, device) = self.resumed(&loss)?;
        let given = upload_numbers(device, buffer, &loss, [max_neg.anchors, &[]], [max_neg.references, &[]])?;
        device.upload(
            buffer,
            loss.layout.totals.offset,
            cast_slice(&[totals.probe_neg, totals.total_pos]),
        )?;
        let base = device.address(buffer);
        let mut launcher = Launcher::new(&mut *device, &loss);
        take(&mut launcher, base, &loss, Which::MaxNeg, given)?;
        issue_selection(&mut launcher, base, &loss)?;
        report(&mut launcher, base, &loss, Which::Counts)?;
        download_list(device, buffer, loss.layout.count_pos, shape.anchors, &mut output.count_pos)?;
        download_list(device, buffer, loss.layout.count_neg, shape.anchors, &mut output.count_neg)?;
        self.remembered = Some(loss);
        Ok(())
    }

    pub(super) fn run_gradient(
        &mut self,
        part: &Batch<'_>,
        pos: RowNumbers<'_, u32>,
        neg: RowNumbers<'_, u32>,
        output: &mut LossOutput,
    ) -> Result<()> {
        let loss = self.go_on(part, Step::Gradient)?;
        RowNumbers::validate_sizes(&pos, &neg, part)?;
        if loss.shape.anchors == 0 {
            let gradient = ndarray::Array2::zeros((0, loss.shape.dim));
            *output = LossOutput {
                gradient,
                gamma_pos: output.gamma_pos,
                gamma_neg: output.gamma_neg,
                ..LossOutput::default()
            };
            self.remembered = Some(loss);
            return Ok(());
        }
        let (_, buffer, device) = self.resumed(&loss)?;
        let anchors = [pos.anchors, neg.anchors];
        let given = upload_numbers(device, buffer, &loss, anchors, [pos.references, neg.references])?;
        let base = device.address(buffer);
        let mut launcher = Launcher::new(&mut *device, &loss);
        take(&mut launcher, base, &loss, Which::Counts, given)?;
        let targets = [loss.layout.anchors, loss.layout.references].map(|side| side.ends(base).gradient);
        issue_weigh(&mut launcher, base, &loss, loss.scalars_at(base), true)?;
        issue_gradients(&mut launcher, base, &loss, targets)?;
        download_scalars(device, buffer, &loss, part.anchors.embeddings.norm_tolerance(), output)?;
        download_gradients(device, buffer, &loss, output)?;
        self.remembered = Some(loss);
        Ok(())
    }

    /// What the step before left, if `step` is the next one and `part` still the same.
    pub(super) fn go_on(&mut self, part: &Batch<'_>, step: Step) -> Result<Remembered> {
        let last = step.take_last(&mut self.remembered, |last| last.step)?;
        part.validate()?;
        same_type(part)?;
        let shape = Shape { numbers: last.shape.numbers, ..self.shape(part) };
        if last.shape != shape || !last.has_labels_of(part) {
            return Err(Error::OutOfOrder(
                "a step needs the part of the step before it: shape or labels differ",
            ));
        }
        Ok(Remembered { step: Some(step), ..last })
    }

    pub(super) fn resumed(&mut self, loss: &Remembered) -> Result<(Shape, &mut D::Buffer, &mut D)> {
        let Self { device, loss: workspace, .. } = self;
        let buffer = workspace.lay(device, &loss.layout.layout)?;
        Ok((loss.shape, buffer, device))
    }
}

/// Copies numbers to where [`take`] finds them.
fn upload_numbers<D: Device, T: Pod>(
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

/// Puts the caller's numbers in the place of those found here.
pub(super) fn take<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
    which: Which,
    given: Given,
) -> Result<()> {
    let [anchors, anchors_neg, references, references_neg] =
        given.lists.map(|address| address as usize as *const std::ffi::c_void);
    let params = TakeParams {
        pairs: loss.pairs(base),
        which: which.code(),
        given: given.references as u32,
        anchors,
        anchors_neg,
        references,
        references_neg,
        totals: given.totals as usize as *const u64,
    };
    launcher.launch(Kernel::TakeNumbers, false, &params)
}

/// Puts what was found into the workspace's lists, in the caller's order.
fn report<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
    which: Which,
) -> Result<()> {
    let layout = &loss.layout;
    let lists = match which {
        Which::MinPos => [layout.min_pos, layout.min_pos],
        Which::MaxNeg => [layout.max_neg_out, layout.max_neg_out],
        Which::Counts => [layout.count_pos, layout.count_neg],
    };
    report_to(launcher, base, loss, which, lists.map(|region| base + region.offset as u64), 0)
}

/// The same to two lists of the caller's, and n_neg and N_pos to `totals` unless that is 0.
pub(super) fn report_to<D: Device>(
    launcher: &mut Launcher<'_, D>,
    base: u64,
    loss: &Remembered,
    which: Which,
    lists: [u64; 2],
    totals: u64,
) -> Result<()> {
    let params = ReportParams {
        pairs: loss.pairs(base),
        which: which.code(),
        reserved: 0,
        anchors: lists[0] as usize as *mut std::ffi::c_void,
        anchors_neg: lists[1] as usize as *mut std::ffi::c_void,
        totals: totals as usize as *mut u64,
    };
    launcher.launch(Kernel::ReportNumbers, false, &params)
}

/// Waits for the counters.
fn download_counters<D: Device>(device: &mut D, buffer: &D::Buffer, loss: &Remembered) -> Result<Counters> {
    let mut words = [0u64; size_of::<Counters>() / size_of::<u64>()];
    device.download(buffer, loss.layout.counters.offset, cast_slice_mut(&mut words))?;
    Ok(Counters::from_words(&words))
}

fn download_list<D: Device, T: Pod>(
    device: &mut D,
    buffer: &D::Buffer,
    region: Region,
    rows: usize,
    list: &mut Vec<T>,
) -> Result<()> {
    list.resize(rows, T::zeroed());
    device.download(buffer, region.offset, cast_slice_mut(list))
}
