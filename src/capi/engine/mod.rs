//! The engine of a context: a backend that may also take rows in device memory.

use std::ffi::c_void;

use super::failure::{Failure, Outcome};
use super::input::CheckedRows;
use super::types::{LossScalars, Status};
use crate::backend::cpu::CpuBackend;
use crate::backend::{Backend, DeviceSpec, Nearest, Picked, auto};
use crate::loss::{LossOutput, LossSettings, ThresholdGradient, UnitCheck};

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "kernels")]
mod device;
#[cfg(feature = "emulated")]
mod emulated;

/// Options of an engine.
#[derive(Debug, Clone, Copy)]
pub struct EngineOptions {
    /// Bytes for candidates; `None` for the device's default.
    pub budget: Option<usize>,
    /// Whether f32 rows may be rounded to TF32's precision.
    #[cfg_attr(not(feature = "kernels"), expect(dead_code, reason = "the CPU has no TF32"))]
    pub tf32: bool,
    /// The caller's stream, if it gave one.
    pub stream: Option<*mut c_void>,
}

/// A batch in device memory: checked addresses, whose memory cannot be checked.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(feature = "kernels"), expect(dead_code, reason = "the CPU has no memory of its own"))]
pub struct DeviceBatch {
    pub anchors: CheckedRows,
    pub references: Option<CheckedRows>,
    /// Addresses that receive the gradients; NULL if they are not wanted.
    pub gradients: [*mut f32; 2],
    pub check: UnitCheck,
}

impl DeviceBatch {
    /// A batch for the calls that write nothing to device memory.
    pub fn new(anchors: CheckedRows, references: Option<CheckedRows>) -> Self {
        Self { anchors, references, gradients: [std::ptr::null_mut(); 2], check: UnitCheck::Check }
    }
}

/// A backend with the calls on device memory that the C ABI needs, which the CPU refuses.
pub trait Engine: Backend {
    /// [`Backend::loss`] on rows in device memory; the gradients go where the batch says,
    /// everything else into `output`.
    ///
    /// # Safety
    /// Every address leads to live memory of this device, of the length its rows state, complete
    /// on the device's stream, and nothing else writes to it meanwhile.
    unsafe fn device_loss(
        &mut self,
        batch: &DeviceBatch,
        settings: &LossSettings,
        output: &mut LossOutput,
    ) -> Outcome<()> {
        let _ = (batch, settings, output);
        Err(no_device_memory(&self.name()))
    }

    /// As [`Engine::device_loss`], but issued without waiting, and of rows of any length with `normalize`. The
    /// scalars go to device memory, and the thresholds come from there unless `lambda` is NULL.
    ///
    /// # Safety
    /// As [`Engine::device_loss`], until the device has finished.
    unsafe fn device_enqueue(
        &mut self,
        batch: &DeviceBatch,
        settings: &LossSettings,
        normalize: bool,
        lambda: *const f64,
        scalars: *mut LossScalars,
    ) -> Outcome<()> {
        let _ = (batch, settings, normalize, lambda, scalars);
        Err(no_device_memory(&self.name()))
    }

    /// [`Backend::threshold_gradient`] with tangents in device memory; a NULL reference tangent is zero.
    ///
    /// # Safety
    /// As [`Engine::device_loss`].
    unsafe fn device_threshold_gradient(
        &mut self,
        batch: &DeviceBatch,
        tangents: [*const f32; 2],
    ) -> Outcome<ThresholdGradient> {
        let _ = (batch, tangents);
        Err(no_device_memory(&self.name()))
    }

    /// [`Backend::nearest`] on rows in device memory, all of them or those `picked` from the square form, see
    /// `DeviceBackend::nearest_resident`.
    ///
    /// # Safety
    /// As [`Engine::device_loss`].
    unsafe fn device_nearest(
        &mut self,
        batch: &DeviceBatch,
        picked: Option<&Picked<'_>>,
        k: usize,
    ) -> Outcome<Nearest> {
        let _ = (batch, picked, k);
        Err(no_device_memory(&self.name()))
    }

    /// The labels of rows in device memory.
    ///
    /// # Safety
    /// As [`Engine::device_loss`].
    unsafe fn device_labels(&mut self, rows: &CheckedRows) -> Outcome<Vec<i64>> {
        let _ = rows;
        Err(no_device_memory(&self.name()))
    }
}

impl Engine for CpuBackend {}

fn no_device_memory(name: &str) -> Failure {
    Failure::new(Status::Unavailable, format!("the device {name} takes rows in host memory only"))
}

/// Opens an engine.
///
/// # Safety
/// A stream must be one of the GPU's primary context, and outlive the engine.
pub unsafe fn open(spec: DeviceSpec, options: EngineOptions) -> Outcome<Box<dyn Engine>> {
    let on_gpu = matches!(spec, DeviceSpec::Cuda(_));
    if options.stream.is_some() && !on_gpu {
        let message = format!("a stream was given, and the device is {spec}: name the GPU it belongs to");
        return Err(Failure::new(Status::InvalidValue, message));
    }
    match spec {
        // SAFETY: there is no stream.
        DeviceSpec::Auto => unsafe { open(auto().spec, options) },
        DeviceSpec::Cpu => Ok(Box::new(options.budget.map_or_else(CpuBackend::new, CpuBackend::with_budget))),
        // SAFETY: handed on to the caller.
        DeviceSpec::Cuda(index) => unsafe { gpu::open(index, options) },
        DeviceSpec::Emulated => emulation::open(options),
    }
}

#[cfg(feature = "cuda")]
use cuda as gpu;
#[cfg(feature = "emulated")]
use emulated as emulation;

/// The refusal of a device that this build lacks.
#[cfg(not(all(feature = "cuda", feature = "emulated")))]
fn refuse(feature: &str) -> Outcome<Box<dyn Engine>> {
    let message = format!(
        "this build of the library has no backend `{feature}`: build and install one that has it, with \
         `packaging/install.sh PREFIX {feature}`"
    );
    Err(Failure::new(Status::Unavailable, message))
}

#[cfg(not(feature = "cuda"))]
mod gpu {
    use super::{Engine, EngineOptions, Outcome};

    pub unsafe fn open(_index: usize, _options: EngineOptions) -> Outcome<Box<dyn Engine>> {
        super::refuse("cuda")
    }
}

#[cfg(not(feature = "emulated"))]
mod emulation {
    use super::{Engine, EngineOptions, Outcome};

    pub fn open(_options: EngineOptions) -> Outcome<Box<dyn Engine>> {
        super::refuse("emulated")
    }
}
