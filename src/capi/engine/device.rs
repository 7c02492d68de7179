//! Rows in device memory, for every device that has some.

use super::super::failure::{Failure, Outcome};
use super::super::input::CheckedRows;
use super::super::types::{Dtype, Status};
use super::{DeviceLoss, Engine, EngineOptions};
use crate::backend::device::{Device, DeviceBackend, Options, ResidentBatch, ResidentRows, ResidentType};
use crate::loss::{Hypergradient, LossOutput, LossSettings};

/// The backend's options from the caller's.
pub fn backend_options(options: EngineOptions) -> Options {
    let default = Options::default();
    let budget = if options.budget == 0 { default.budget } else { options.budget };
    Options { budget, exact: !options.tf32 }
}

fn side(rows: &CheckedRows, gradient: *mut f32) -> ResidentRows {
    ResidentRows {
        count: rows.extent.count,
        embeddings: rows.embeddings.expose_provenance() as u64,
        labels: rows.labels.expose_provenance() as u64,
        gradient: gradient.expose_provenance() as u64,
    }
}

fn batch(call: &DeviceLoss) -> ResidentBatch {
    ResidentBatch {
        dim: call.anchors.extent.dim,
        dtype: match call.anchors.dtype {
            Dtype::F32 => ResidentType::F32,
            Dtype::F16 => ResidentType::F16,
            Dtype::Bf16 => ResidentType::Bf16,
        },
        anchors: side(&call.anchors, call.gradient),
        references: call.references.as_ref().map(|rows| side(rows, call.reference_gradient)),
        check: call.check,
    }
}

impl<D: Device> Engine for DeviceBackend<D> {
    unsafe fn device_loss(
        &mut self,
        call: &DeviceLoss,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Outcome<()> {
        if call.gradient.is_null() {
            let message = "the rows lie in device memory: gradient must not be NULL";
            return Err(Failure::new(Status::NullPointer, message));
        }
        // SAFETY: handed on to the caller.
        unsafe { self.loss_resident(&batch(call), settings, output) }?;
        Ok(self.anchors_of_last_loss(output)?)
    }

    unsafe fn device_hypergradient(
        &mut self,
        call: &DeviceLoss,
        tangents: [*const f32; 2],
    ) -> Outcome<Hypergradient> {
        let addresses = tangents.map(|tangent| tangent.expose_provenance() as u64);
        // SAFETY: handed on to the caller.
        Ok(unsafe { self.hypergradient_resident(&batch(call), addresses) }?)
    }
}
