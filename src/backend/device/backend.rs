//! [`Backend`] over any [`Device`].

use ndarray::ArrayView2;

use super::layout::Remembered;
use super::workspace::Workspace;
use super::{Device, Precision};
use crate::Result;
use crate::backend::{Backend, Nearest, PreparedGallery};
use crate::loss::{Batch, LossOutput, LossSettings, PairTotals, RowNumbers, Rows, ThresholdGradient};

/// How a device backend works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Bytes for the candidates of all tiles; tiles that do not fit are recomputed. Default
    /// [`Options::SHARE_OF_FREE`].
    pub budget: usize,
    /// Whether f32 rows are multiplied as TF32 would: rounded to 11 bits (f16, entries below 6e-5 to an
    /// absolute 3e-8), with products summed in f32. Default false: to f32's precision.
    pub tf32: bool,
}

impl Options {
    /// The budget that is a quarter of the memory free when the backend is made. Of it a loss takes what all
    /// pairs of its batch would, at most: 8 bytes each.
    pub const SHARE_OF_FREE: usize = usize::MAX;
}

impl Default for Options {
    fn default() -> Self {
        Self { budget: Self::SHARE_OF_FREE, tf32: false }
    }
}

/// The passes on one device, with their workspaces.
///
/// The workspace of the loss is allocated on the first call and again only for a
/// larger batch. Its size is [`DeviceBackend::loss_bytes`]. The threshold and the retrieval pass have
/// their own, from their first use on, since the pairs of the last loss outlive them.
pub struct DeviceBackend<D: Device> {
    pub(super) device: D,
    pub(super) options: Options,
    pub(super) loss: Workspace<D>,
    pub(super) threshold: Workspace<D>,
    /// What is searched, while it is.
    pub(super) gallery: Workspace<D>,
    pub(super) retrieval: Workspace<D>,
    /// The last loss, while its pairs are in the workspace.
    pub(super) remembered: Option<Remembered>,
}

impl<D: Device> DeviceBackend<D> {
    /// A backend without any memory yet.
    pub fn new(device: D, options: Options) -> Self {
        let budget = match options.budget {
            Options::SHARE_OF_FREE => device.free_memory() / 4,
            bytes => bytes,
        };
        Self {
            device,
            options: Options { budget, ..options },
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

    /// The device, to be told which stream to work on.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    pub(super) fn precision(&self, rows: &Rows<'_>) -> Precision {
        Precision::of(rows.embeddings.element_type(), self.options.tf32)
    }
}

impl<D: Device> Backend for DeviceBackend<D> {
    fn name(&self) -> String {
        self.device.name()
    }

    fn loss(&mut self, batch: &Batch<'_>, settings: &LossSettings, output: &mut LossOutput) -> Result<()> {
        self.run_loss(batch, settings, output)
    }

    fn same_class(
        &mut self,
        part: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()> {
        self.run_same_class(part, settings, output)
    }

    fn sweep(
        &mut self,
        part: &Batch<'_>,
        min_pos: RowNumbers<'_, f32>,
        output: &mut LossOutput,
    ) -> Result<()> {
        self.run_sweep(part, min_pos, output)
    }

    fn select(
        &mut self,
        part: &Batch<'_>,
        max_neg: RowNumbers<'_, f32>,
        totals: PairTotals,
        output: &mut LossOutput,
    ) -> Result<()> {
        self.run_select(part, max_neg, totals, output)
    }

    fn gradient(
        &mut self,
        part: &Batch<'_>,
        count_pos: RowNumbers<'_, u32>,
        count_neg: RowNumbers<'_, u32>,
        output: &mut LossOutput,
    ) -> Result<()> {
        self.run_gradient(part, count_pos, count_neg, output)
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
