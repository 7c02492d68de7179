//! The emulated device in place of a GPU, for tests: its memory is the host's, and it has no streams.

use std::ffi::c_void;

use ddtas::Result;
use ddtas::backend::device::DeviceBackend;
use ddtas::backend::emulated::EmulatedDevice;

/// The backend on the emulated device.
pub type CudaBackend = DeviceBackend<CudaDevice>;
pub type CudaDevice = EmulatedDevice;

/// What a GPU can do with streams. Here every call has finished when it returns.
pub trait OnStream: Sized {
    /// # Safety
    /// None.
    unsafe fn on_stream(ordinal: usize, stream: *mut c_void) -> Result<Self>;

    /// # Safety
    /// None.
    unsafe fn follow(&mut self, _stream: *mut c_void) -> Result<()> {
        Ok(())
    }

    fn mark(&mut self) -> Result<()> {
        Ok(())
    }
}

impl OnStream for EmulatedDevice {
    unsafe fn on_stream(_ordinal: usize, _stream: *mut c_void) -> Result<Self> {
        Ok(Self::new(0))
    }
}

/// The only emulated device.
pub struct Gpu;

impl Gpu {
    pub fn new(_ordinal: usize) -> Result<Self> {
        Ok(Self)
    }

    /// # Safety
    /// None.
    pub unsafe fn capture(&self, _stream: *mut c_void) -> Result<Option<u64>> {
        Ok(None)
    }
}
