//! The emulated device, whose memory is the host's: tests the device path without a GPU.

use super::super::failure::Outcome;
use super::device::backend_options;
use super::{Engine, EngineOptions};
use crate::backend::device::DeviceBackend;
use crate::backend::emulated::{EmulatedDevice, SCHEDULE_SEED};

/// Opens the emulated device.
pub fn open(options: EngineOptions) -> Outcome<Box<dyn Engine>> {
    Ok(Box::new(DeviceBackend::new(EmulatedDevice::new(SCHEDULE_SEED), backend_options(options))))
}
