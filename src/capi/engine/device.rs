//! Rows in device memory, for every device that has some.

use super::super::failure::{Failure, Outcome};
use super::super::input::CheckedRows;
use super::super::types::{LossScalars, Status};
use super::{DeviceBatch, Engine, EngineOptions};
use crate::backend::device::{
    Device, DeviceBackend, Options, ResidentBatch, ResidentIdentity, ResidentOutput, ResidentPart,
    ResidentRows, ResidentSettings,
};
use crate::backend::{Nearest, Picked};
use crate::loss::{LossOutput, LossSettings, ThresholdGradient};

/// The backend's options from the caller's.
pub fn backend_options(options: EngineOptions) -> Options {
    Options { budget: options.budget, tf32: options.tf32 }
}

fn side(rows: &CheckedRows, gradient: *mut f32) -> ResidentRows {
    ResidentRows {
        count: rows.extent.count,
        embeddings: rows.embeddings.expose_provenance() as u64,
        labels: rows.labels.expose_provenance() as u64,
        gradient: gradient.expose_provenance() as u64,
    }
}

fn resident(batch: &DeviceBatch) -> ResidentBatch {
    let [gradient, reference_gradient] = batch.gradients;
    ResidentBatch {
        dim: batch.anchors.extent.dim,
        dtype: batch.anchors.dtype,
        anchors: side(&batch.anchors, gradient),
        references: batch.references.as_ref().map(|rows| side(rows, reference_gradient)),
        check: batch.check,
    }
}

impl<D: Device> Engine for DeviceBackend<D> {
    unsafe fn device_loss(
        &mut self,
        batch: &DeviceBatch,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Outcome<()> {
        if batch.gradients[0].is_null() {
            let message = "the rows lie in device memory: gradient must not be NULL";
            return Err(Failure::new(Status::NullPointer, message));
        }
        // SAFETY: handed on to the caller.
        unsafe { self.loss_resident(&resident(batch), settings, output) }?;
        Ok(self.anchors_of_last_loss(output)?)
    }

    unsafe fn device_enqueue(
        &mut self,
        batch: &DeviceBatch,
        settings: &LossSettings,
        normalize: bool,
        lambda: *const f64,
        scalars: *mut LossScalars,
    ) -> Outcome<()> {
        let (identity, total) = (ResidentIdentity::ByValue, batch.anchors.extent.count);
        let part = ResidentPart { batch: resident(batch), identity, total, normalize };
        let settings = ResidentSettings { settings: *settings, lambda: lambda.expose_provenance() as u64 };
        let output = ResidentOutput { scalars: scalars.expose_provenance() as u64, loss: 0 };
        // SAFETY: handed on to the caller.
        Ok(unsafe { self.enqueue_loss(&part, &settings, output) }?)
    }

    unsafe fn device_threshold_gradient(
        &mut self,
        batch: &DeviceBatch,
        tangents: [*const f32; 2],
    ) -> Outcome<ThresholdGradient> {
        let addresses = tangents.map(|tangent| tangent.expose_provenance() as u64);
        // SAFETY: handed on to the caller.
        Ok(unsafe { self.threshold_gradient_resident(&resident(batch), addresses) }?)
    }

    unsafe fn device_nearest(
        &mut self,
        batch: &DeviceBatch,
        picked: Option<&Picked<'_>>,
        k: usize,
    ) -> Outcome<Nearest> {
        // SAFETY: handed on to the caller.
        Ok(unsafe { self.nearest_resident(&resident(batch), picked, k) }?)
    }

    unsafe fn device_labels(&mut self, rows: &CheckedRows) -> Outcome<Vec<i64>> {
        // SAFETY: handed on to the caller.
        Ok(unsafe { self.labels_resident(&side(rows, std::ptr::null_mut())) }?)
    }
}
