//! A GPU, on a stream of its own or on the caller's.

use super::super::failure::Outcome;
use super::device::backend_options;
use super::{Engine, EngineOptions};
use crate::backend::cuda::{CudaBackend, CudaDevice};

/// Opens `cuda:index`.
///
/// # Safety
/// As [`super::open`].
pub unsafe fn open(index: usize, options: EngineOptions) -> Outcome<Box<dyn Engine>> {
    let device = match options.stream {
        None => CudaDevice::new(index),
        // SAFETY: handed on to the caller.
        Some(stream) => unsafe { CudaDevice::on_stream(index, stream) },
    }?;
    Ok(Box::new(CudaBackend::new(device, backend_options(options))))
}
