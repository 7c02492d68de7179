//! A whole loss on host rows: copies them to the device, issues the passes without a wait between them, and copies the results back.

use ndarray::Array2;

use super::layout::LossLayout;
use super::passes::Passes;
use super::remembered::{Remembered, device_settings};
use super::shape::Shape;
use super::transfer::{download_anchors, download_gradients, download_scalars, upload};
use super::{Device, DeviceBackend};
use crate::Result;
use crate::loss::select::initial_tolerances;
use crate::loss::{Batch, Identity, LossOutput, LossSettings, Rows};

impl<D: Device> DeviceBackend<D> {
    pub(super) fn shape(&self, batch: &Batch<'_>) -> Shape {
        let Rows { embeddings, .. } = &batch.anchors;
        Shape {
            references: batch.references.map(|rows| rows.embeddings.rows()),
            reference_gradient: batch.reference_gradient && !batch.is_square(),
            total: batch.total(),
            identity: !batch.is_square() && batch.identity != Identity::ByValue,
            ..Shape::square(embeddings.rows(), embeddings.dim(), self.precision(&batch.anchors))
        }
    }

    pub(super) fn run_loss(
        &mut self,
        shape: Shape,
        batch: &Batch<'_>,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Result<()> {
        let last = self.remembered.take();
        settings.validate()?;
        batch.validate()?;
        shape.check()?;
        let labels = Remembered::keep_labels(last, batch);
        let loss = Remembered { labels, ..self.begin(shape, settings, false) };
        if shape.anchors == 0 {
            let tolerances = initial_tolerances(settings);
            (output.gamma_pos, output.gamma_neg) = (tolerances.pos, tolerances.neg);
            return self.find_nothing(loss, output);
        }
        let layout = &loss.layout;
        let Self { device, loss: workspace, .. } = self;
        let buffer = workspace.lay(device, &layout.layout)?;
        let input = upload(device, buffer, layout, batch)?;
        let mut passes = Passes::new(&mut *device, buffer, &loss);
        passes.whole_loss(&input, passes.scalars())?;
        download_scalars(device, buffer, &loss, input.check.tolerance, output)?;
        download_anchors(device, buffer, &loss, output)?;
        download_gradients(device, buffer, &loss, output)?;
        self.remembered = Some(loss);
        Ok(())
    }

    /// A loss, or one of its steps, of a part without anchors: no kernel can run on no rows, and every result is
    /// zero. The tolerances stay, since they are the batch's.
    pub(super) fn find_nothing(&mut self, loss: Remembered, output: &mut LossOutput) -> Result<()> {
        let Shape { dim, reference_gradient, .. } = loss.shape;
        *output = LossOutput {
            gradient: Array2::zeros((0, dim)),
            reference_gradient: reference_gradient
                .then(|| Array2::zeros((loss.shape.reference_count(), dim))),
            gamma_pos: output.gamma_pos,
            gamma_neg: output.gamma_neg,
            ..LossOutput::default()
        };
        self.remembered = Some(loss);
        Ok(())
    }

    /// Plans the workspace. The first kernel zeroes the regions that the passes add to.
    pub(super) fn begin(&self, shape: Shape, settings: &LossSettings, resident: bool) -> Remembered {
        let layout = match shape.anchors {
            0 => LossLayout::default(),
            _ => LossLayout::new(&shape, self.budget, self.device.properties(), resident),
        };
        Remembered {
            shape,
            layout,
            settings: device_settings(settings, &shape),
            host_settings: *settings,
            step: None,
            labels: None,
        }
    }
}
