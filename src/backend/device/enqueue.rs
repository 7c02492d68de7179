//! Losses that are issued without waiting, whole or in steps. All inputs and outputs are in device memory.
//!
//! After the first call of a shape nothing is allocated, looked up or copied between host and device, so that
//! a caller can capture the calls in a graph. A bad row makes loss and gradients NaN, and its index is in the
//! scalars.

use super::passes::{Passes, ResidentOutput};
use super::remembered::Remembered;
use super::resident::{ResidentBatch, aligned};
use super::shape::{Shape, more_scale, sum_scale};
use super::steps::{Given, NumberKind};
use super::transfer::{IdentityAt, Input};
use super::{Device, DeviceBackend};
use crate::backend::step::Step;
use crate::loss::{LossSettings, check_total, same_length};
use crate::{Error, Result};

/// Says which reference is the same row as an anchor; see [`Identity`](crate::loss::Identity).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ResidentIdentity {
    /// Unknown: an anchor among the references is recognised by its value.
    #[default]
    ByValue,
    /// Reference `first + i` is anchor i.
    From(usize),
    /// The device address of an [`Identity::List`](crate::loss::Identity::List), `[B]`, u32.
    List(u64),
}

/// A part of a batch in device memory, see [`Batch::part`](crate::loss::Batch::part); or a whole one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResidentPart {
    /// Anchors and references.
    pub batch: ResidentBatch,
    /// Rectangular form only.
    pub identity: ResidentIdentity,
    /// B of the factor 1/B.
    pub total: usize,
    /// Whether rows may have any length but 0: they are compared at unit length, and the gradients are with
    /// respect to the rows as given. No threshold_gradient can follow.
    pub normalize: bool,
}

/// Settings of a loss. The thresholds lambda may be in device memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ResidentSettings {
    /// The settings.
    pub settings: LossSettings,
    /// Device address of lambda_pos and lambda_neg, two f64 that replace those of `settings`; or 0. The
    /// kernels read them unchecked; they must be within -2 to 2. No threshold_gradient can follow: it would
    /// read them again, when the caller may have freed them.
    pub lambda: u64,
}

/// Device addresses of [`RowNumbers`](crate::loss::RowNumbers): f32, or u32 for the sizes of sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResidentNumbers {
    /// `[B]`.
    pub anchors: u64,
    /// `[count]`; may be 0 if `count` is 0.
    pub references: u64,
    /// Number of references that have an entry; these come first.
    pub count: usize,
}

impl ResidentPart {
    fn validate(&self) -> Result<()> {
        self.batch.validate()?;
        if let ResidentIdentity::List(address) = self.identity {
            aligned("identity", address, 4)?;
        }
        check_total(Some(self.total))
    }

    fn shape(&self, tf32: bool, numbers: bool) -> Shape {
        let rectangular = self.batch.references.is_some();
        Shape {
            total: self.total,
            identity: rectangular && self.identity != ResidentIdentity::ByValue,
            numbers: rectangular && numbers,
            normalize: self.normalize,
            ..self.batch.shape(tf32)
        }
    }

    pub(super) fn input(&self) -> Input {
        let mut identity = IdentityAt::default();
        match self.identity {
            ResidentIdentity::ByValue => {}
            ResidentIdentity::From(first) => identity.first = first as u64,
            ResidentIdentity::List(address) => identity.list = address,
        }
        Input { identity, ..self.batch.input() }
    }
}

impl ResidentNumbers {
    fn validate(&self, part: &ResidentPart) -> Result<()> {
        aligned("numbers of the anchors", self.anchors, 4)?;
        let expected = part.batch.references.map_or(0, |rows| rows.count);
        if self.count > expected {
            let got = self.count;
            return Err(Error::LengthMismatch { what: "numbers of the references", expected, got });
        }
        if self.count > 0 { aligned("numbers of the references", self.references, 4) } else { Ok(()) }
    }
}

impl<D: Device> DeviceBackend<D> {
    /// Issues a whole loss: the gradients go where the batch says, the scalars to `output`.
    ///
    /// # Errors
    /// As [`loss_resident`](Self::loss_resident), but bad rows are no error: only the device knows of them.
    ///
    /// # Safety
    /// As [`loss_resident`](Self::loss_resident), for all addresses. The memory must stay valid, and the
    /// inputs unchanged, until the device has finished.
    pub unsafe fn enqueue_loss(
        &mut self,
        part: &ResidentPart,
        settings: &ResidentSettings,
        output: ResidentOutput,
    ) -> Result<()> {
        aligned("scalars", output.scalars, 8)?;
        if output.loss != 0 {
            aligned("loss", output.loss, 4)?;
        }
        let loss = self.begin_resident(part, settings, false)?;
        self.issue(loss, |passes| passes.whole_loss(&part.input(), output))?;
        self.forget_normalized(part);
        Ok(())
    }

    /// Issues the first step of a part, see [`Backend::same_class`](crate::backend::Backend::same_class): m+
    /// goes to `min_pos`, `[B]`.
    ///
    /// # Errors
    /// As [`enqueue_loss`](Self::enqueue_loss).
    ///
    /// # Safety
    /// As [`enqueue_loss`](Self::enqueue_loss).
    pub unsafe fn enqueue_same_class(
        &mut self,
        part: &ResidentPart,
        settings: &ResidentSettings,
        min_pos: u64,
    ) -> Result<()> {
        aligned("min_pos", min_pos, 4)?;
        let mut loss = self.begin_resident(part, settings, true)?;
        loss.step = Some(Step::SameClass);
        self.issue(loss, |passes| {
            passes.order(&part.input())?;
            passes.same_class()?;
            passes.report_to(NumberKind::MinPos, [min_pos; 2], 0)
        })
    }

    /// Issues the second step: m- goes to `max_neg`, `[B]`, and the part's n_neg of the probe and N_pos to
    /// `totals`, two u64.
    ///
    /// # Errors
    /// [`Error::OutOfOrder`] without the step before it, or for another shape; as
    /// [`enqueue_loss`](Self::enqueue_loss).
    ///
    /// # Safety
    /// As [`enqueue_loss`](Self::enqueue_loss), for the thresholds of the first step too; and rows, labels
    /// and identity must be those of that step.
    pub unsafe fn enqueue_sweep(
        &mut self,
        part: &ResidentPart,
        min_pos: ResidentNumbers,
        max_neg: u64,
        totals: u64,
    ) -> Result<()> {
        aligned("max_neg", max_neg, 4)?;
        aligned("totals", totals, 8)?;
        let loss = self.go_on_resident(part, Step::Sweep)?;
        let given = given(part, [min_pos; 2], 0)?;
        self.issue(loss, |passes| {
            passes.take(NumberKind::MinPos, given)?;
            passes.sweep()?;
            passes.report_to(NumberKind::MaxNeg, [max_neg; 2], totals)
        })
    }

    /// Issues the third step. `totals` holds the sums over all parts; |P_i| and |N_i| go to `counts`, `[B]`,
    /// u32 each.
    ///
    /// # Errors
    /// As [`enqueue_sweep`](Self::enqueue_sweep).
    ///
    /// # Safety
    /// As [`enqueue_sweep`](Self::enqueue_sweep).
    pub unsafe fn enqueue_select(
        &mut self,
        part: &ResidentPart,
        max_neg: ResidentNumbers,
        totals: u64,
        counts: [u64; 2],
    ) -> Result<()> {
        aligned("totals", totals, 8)?;
        counts.iter().try_for_each(|&address| aligned("counts", address, 4))?;
        let loss = self.go_on_resident(part, Step::Select)?;
        let given = given(part, [max_neg; 2], totals)?;
        self.issue(loss, |passes| {
            passes.take(NumberKind::MaxNeg, given)?;
            passes.select()?;
            passes.report_to(NumberKind::Counts, counts, 0)
        })
    }

    /// Issues the last step: the gradient of the anchors goes where the batch says, the part's scalars to
    /// `scalars`, as [`LossScalars`](crate::loss::LossScalars).
    ///
    /// # Errors
    /// As [`enqueue_sweep`](Self::enqueue_sweep).
    ///
    /// # Safety
    /// As [`enqueue_sweep`](Self::enqueue_sweep).
    pub unsafe fn enqueue_gradient(
        &mut self,
        part: &ResidentPart,
        counts: [ResidentNumbers; 2],
        scalars: u64,
    ) -> Result<()> {
        aligned("scalars", scalars, 8)?;
        let loss = self.go_on_resident(part, Step::Gradient)?;
        let (given, input) = (given(part, counts, 0)?, part.input());
        self.issue(loss, |passes| {
            passes.take(NumberKind::Counts, given)?;
            passes.weigh(ResidentOutput { scalars, loss: 0 }, true)?;
            passes.gradients(input.addresses.map(|side| side.gradient))?;
            passes.normalize_backward(&input)
        })?;
        self.forget_normalized(part);
        Ok(())
    }

    /// After a loss that normalised its rows no threshold_gradient can follow.
    fn forget_normalized(&mut self, part: &ResidentPart) {
        if part.normalize {
            self.remembered = None;
        }
    }

    /// Checks and plans a loss on device rows, whole or in steps, which exchange `numbers` of the references.
    pub(super) fn begin_resident(
        &mut self,
        part: &ResidentPart,
        settings: &ResidentSettings,
        numbers: bool,
    ) -> Result<Remembered> {
        self.remembered = None;
        settings.settings.validate()?;
        part.validate()?;
        let shape = part.shape(self.tf32, numbers);
        shape.check()?;
        let mut loss = self.begin(shape, &settings.settings, true);
        if settings.lambda != 0 {
            aligned("lambda", settings.lambda, 8)?;
            loss.settings.lambda = settings.lambda;
            // The scales for |lambda| = 2, the largest in range.
            let widest = settings.settings.with_lambda(-2.0);
            loss.settings.sum_scale = sum_scale(&widest, shape.reference_count());
            loss.settings.more_scale = more_scale(&widest, shape.reference_count());
        }
        Ok(loss)
    }

    fn go_on_resident(&mut self, part: &ResidentPart, step: Step) -> Result<Remembered> {
        let last = step.take_last(&mut self.remembered, |last| last.step)?;
        part.validate()?;
        if last.shape != part.shape(self.tf32, true) {
            return Err(Error::OutOfOrder("a step needs the part of the step before it: its shape differs"));
        }
        Ok(Remembered { step: Some(step), ..last })
    }

    /// Issues a step, and remembers it.
    fn issue(&mut self, loss: Remembered, step: impl FnOnce(&mut Passes<'_, D>) -> Result<()>) -> Result<()> {
        let (buffer, device) = self.resumed(&loss)?;
        step(&mut Passes::new(device, buffer, &loss))?;
        self.remembered = Some(loss);
        Ok(())
    }
}

fn given(part: &ResidentPart, lists: [ResidentNumbers; 2], totals: u64) -> Result<Given> {
    for list in &lists {
        list.validate(part)?;
    }
    same_length("numbers of the references", lists[0].count, lists[1].count)?;
    let addresses = [lists[0].anchors, lists[1].anchors, lists[0].references, lists[1].references];
    Ok(Given { lists: addresses, references: lists[0].count, totals })
}
