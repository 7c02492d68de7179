//! Tests only: the CUDA kernels, compiled by g++ and executed on the CPU.
//!
//! `kernels/emulation` runs a block's threads as fibers under a random schedule
//! drawn from a seed, and stops the program with a message when threads diverge
//! at a barrier. Slow: for shapes of a few hundred rows.

mod device;

pub use device::EmulatedDevice;
#[cfg(test)]
pub(crate) use device::tile_at;

use super::Backend;
use super::device::{DeviceBackend, Options};

/// The schedule of a backend that is opened by name; the tests try others.
pub(crate) const SCHEDULE_SEED: u64 = 0;

/// The emulated backend with a schedule of its own.
#[must_use]
pub fn open(options: Options, seed: u64) -> Box<dyn Backend> {
    Box::new(DeviceBackend::new(EmulatedDevice::new(seed), options))
}
