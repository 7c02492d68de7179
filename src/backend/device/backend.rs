//! [`Backend`] over any [`Device`].

use bytemuck::cast_slice;
use ndarray::ArrayView2;

use super::passes::Passes;
use super::remembered::Remembered;
use super::shape::Shape;
use super::steps::{NumberKind, download_counters, upload_numbers};
use super::transfer::{download_gradients, download_list, download_scalars, upload};
use super::workspace::Workspace;
use super::{Device, Precision};
use crate::Result;
use crate::backend::step::Step;
use crate::backend::{Backend, Nearest, PreparedGallery};
use crate::loss::select::adapt;
use crate::loss::{Batch, LossOutput, LossSettings, PairTotals, RowNumbers, Rows, ThresholdGradient};

/// Options of a device backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Bytes for the candidates of all tiles; tiles that do not fit are recomputed. `None`: a quarter of the
    /// memory that is free when the backend is made. A loss takes at most 8 bytes of it for each pair of its
    /// batch.
    pub budget: Option<usize>,
    /// Whether f32 rows are multiplied with TF32's precision: rounded to f16's 11 significant bits (entries
    /// below 6e-5 to an absolute 3e-8), products summed in f32. Default false: f32's precision.
    pub tf32: bool,
}

/// The passes on one device, with their workspaces.
///
/// The workspace of the loss is allocated on the first call and again only for a larger batch. The threshold
/// and the retrieval pass have workspaces of their own, allocated on first use, so that the pairs of the last
/// loss survive them.
pub struct DeviceBackend<D: Device> {
    pub(super) device: D,
    /// Bytes for the candidates of a loss.
    pub(super) budget: usize,
    pub(super) tf32: bool,
    pub(super) loss: Workspace<D>,
    pub(super) threshold: Workspace<D>,
    /// The gallery, while it is searched.
    pub(super) gallery: Workspace<D>,
    pub(super) retrieval: Workspace<D>,
    /// The last loss, while its pairs are in the workspace.
    pub(super) remembered: Option<Remembered>,
}

impl<D: Device> DeviceBackend<D> {
    /// A backend without any memory yet.
    pub fn new(device: D, options: Options) -> Self {
        let Options { budget, tf32 } = options;
        Self {
            budget: budget.unwrap_or_else(|| device.free_memory() / 4),
            tf32,
            device,
            loss: Workspace::default(),
            threshold: Workspace::default(),
            gallery: Workspace::default(),
            retrieval: Workspace::default(),
            remembered: None,
        }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device, for setting the stream it works on.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    pub(super) fn precision(&self, rows: &Rows<'_>) -> Precision {
        Precision::of(rows.embeddings.element_type(), self.tf32)
    }
}

impl<D: Device> Backend for DeviceBackend<D> {
    fn name(&self) -> String {
        self.device.name()
    }

    fn loss(&mut self, batch: &Batch<'_>, settings: &LossSettings, output: &mut LossOutput) -> Result<()> {
        self.run_loss(self.shape(batch), batch, settings, output)
    }

    fn normalized_loss(
        &mut self,
        batch: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()> {
        let shape = Shape { normalize: true, ..self.shape(batch) };
        let done = self.run_loss(shape, batch, settings, output);
        self.remembered = None;
        done
    }

    fn same_class(
        &mut self,
        part: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()> {
        let last = self.remembered.take();
        settings.validate()?;
        part.validate()?;
        let shape = Shape { numbers: !part.is_square(), ..self.shape(part) };
        shape.check()?;
        let labels = Remembered::keep_labels(last, part);
        let begun = self.begin(shape, settings, false);
        let loss = Remembered { step: Some(Step::SameClass), labels, ..begun };
        if shape.anchors == 0 {
            return self.find_nothing(loss, output);
        }
        let Self { device, loss: workspace, .. } = self;
        let buffer = workspace.lay(device, &loss.layout.layout)?;
        let input = upload(device, buffer, &loss.layout, part)?;
        let mut passes = Passes::new(&mut *device, buffer, &loss);
        passes.order(&input)?;
        passes.same_class()?;
        // Computes totals and means, and finds bad rows; nothing is mined yet.
        passes.weigh(passes.scalars(), false)?;
        download_scalars(device, buffer, &loss, input.check.tolerance, output)?;
        download_list(device, buffer, loss.layout.min_pos, shape.anchors, &mut output.min_pos)?;
        self.remembered = Some(loss);
        Ok(())
    }

    fn sweep(
        &mut self,
        part: &Batch<'_>,
        min_pos: RowNumbers<'_, f32>,
        output: &mut LossOutput,
    ) -> Result<()> {
        let loss = self.go_on(part, Step::Sweep)?;
        min_pos.validate(part)?;
        if loss.shape.anchors == 0 {
            return self.find_nothing(loss, output);
        }
        let (buffer, device) = self.resumed(&loss)?;
        let given = upload_numbers(device, buffer, &loss, [min_pos.anchors, &[]], [min_pos.references, &[]])?;
        let mut passes = Passes::new(&mut *device, buffer, &loss);
        passes.take(NumberKind::MinPos, given)?;
        passes.sweep()?;
        passes.report(NumberKind::MaxNeg)?;
        output.probe_neg = download_counters(device, buffer, &loss)?.probe_neg;
        download_list(device, buffer, loss.layout.max_neg_out, loss.shape.anchors, &mut output.max_neg)?;
        self.remembered = Some(loss);
        Ok(())
    }

    fn select(
        &mut self,
        part: &Batch<'_>,
        max_neg: RowNumbers<'_, f32>,
        totals: PairTotals,
        output: &mut LossOutput,
    ) -> Result<()> {
        let loss = self.go_on(part, Step::Select)?;
        max_neg.validate(part)?;
        // The kernels compute the same tolerances from the same two integers.
        let tolerances = adapt(&loss.host_settings, totals);
        (output.gamma_pos, output.gamma_neg) = (tolerances.pos, tolerances.neg);
        if loss.shape.anchors == 0 {
            return self.find_nothing(loss, output);
        }
        let (buffer, device) = self.resumed(&loss)?;
        let given = upload_numbers(device, buffer, &loss, [max_neg.anchors, &[]], [max_neg.references, &[]])?;
        device.upload(
            buffer,
            loss.layout.totals.offset,
            cast_slice(&[totals.probe_neg, totals.total_pos]),
        )?;
        let mut passes = Passes::new(&mut *device, buffer, &loss);
        passes.take(NumberKind::MaxNeg, given)?;
        passes.select()?;
        passes.report(NumberKind::Counts)?;
        download_list(device, buffer, loss.layout.count_pos, loss.shape.anchors, &mut output.count_pos)?;
        download_list(device, buffer, loss.layout.count_neg, loss.shape.anchors, &mut output.count_neg)?;
        self.remembered = Some(loss);
        Ok(())
    }

    fn gradient(
        &mut self,
        part: &Batch<'_>,
        count_pos: RowNumbers<'_, u32>,
        count_neg: RowNumbers<'_, u32>,
        output: &mut LossOutput,
    ) -> Result<()> {
        let loss = self.go_on(part, Step::Gradient)?;
        RowNumbers::validate_sizes(&count_pos, &count_neg, part)?;
        if loss.shape.anchors == 0 {
            return self.find_nothing(loss, output);
        }
        let (buffer, device) = self.resumed(&loss)?;
        let anchors = [count_pos.anchors, count_neg.anchors];
        let given =
            upload_numbers(device, buffer, &loss, anchors, [count_pos.references, count_neg.references])?;
        let mut passes = Passes::new(&mut *device, buffer, &loss);
        passes.take(NumberKind::Counts, given)?;
        let (anchors, references) = (loss.layout.anchors, loss.layout.references);
        passes.weigh(passes.scalars(), true)?;
        passes.gradients([anchors, references].map(|side| side.addresses(passes.base).gradient))?;
        download_scalars(device, buffer, &loss, part.anchors.embeddings.norm_tolerance(), output)?;
        download_gradients(device, buffer, &loss, output)?;
        self.remembered = Some(loss);
        Ok(())
    }

    fn threshold_gradient(
        &mut self,
        batch: &Batch<'_>,
        tangent: ArrayView2<'_, f32>,
        reference_tangent: Option<ArrayView2<'_, f32>>,
    ) -> Result<ThresholdGradient> {
        self.run_threshold(batch, tangent, reference_tangent)
    }

    fn nearest(&mut self, queries: &Rows<'_>, references: Option<&Rows<'_>>, k: usize) -> Result<Nearest> {
        self.run_retrieval(queries, references, k)
    }

    fn search(
        &mut self,
        gallery: &Rows<'_>,
        work: &mut dyn FnMut(&mut dyn PreparedGallery) -> Result<()>,
    ) -> Result<()> {
        self.run_search(gallery, work)
    }

    fn workspace_bytes(&self) -> usize {
        [&self.loss, &self.threshold, &self.gallery, &self.retrieval]
            .iter()
            .map(|workspace| workspace.bytes(&self.device))
            .sum()
    }
}

#[cfg(all(test, feature = "emulated"))]
mod tests {
    use super::*;
    use crate::backend::emulated::EmulatedDevice;

    #[test]
    fn the_budget_is_a_quarter_of_the_free_memory_unless_it_is_given() {
        let budget = |options| DeviceBackend::new(EmulatedDevice::new(0), options).budget;
        assert_eq!(budget(Options::default()), EmulatedDevice::new(0).free_memory() / 4);
        assert_eq!(budget(Options { budget: Some(5), ..Options::default() }), 5);
    }
}
