//! The GPU backend: the kernels of `kernels/`, on NVIDIA GPUs from Ampere on.
//!
//! The host side of every pass is in [`device`](crate::backend::device), which the
//! emulated backend shares; here is only what talks to the driver. The driver is
//! loaded at run time, so a program with this backend starts anywhere, and
//! [`open`] says in one line why there is no GPU to use.

mod device;
mod driver;
mod event;
mod module;

pub use device::{CudaBuffer, CudaDevice, Gpu};
pub use driver::device_count;

use crate::Result;
use crate::backend::Backend;
use crate::backend::device::{DeviceBackend, Options};

/// The GPU backend. [`CudaDevice::on_stream`] takes the caller's stream.
pub type CudaBackend = DeviceBackend<CudaDevice>;

/// Whether `cuda:ordinal` can be used.
///
/// # Errors
/// As [`open`], which this does not call.
pub fn check(ordinal: usize) -> Result<()> {
    driver::context(ordinal).map(drop)
}

/// Opens `cuda:ordinal` with a stream of its own.
///
/// # Errors
/// [`Error::Unavailable`](crate::Error::Unavailable) without a driver, without that GPU, or
/// with too old a one; [`Error::Device`](crate::Error::Device) if the driver refuses a call.
pub fn open(ordinal: usize, options: Options) -> Result<Box<dyn Backend>> {
    Ok(Box::new(CudaBackend::new(CudaDevice::new(ordinal)?, options)))
}
