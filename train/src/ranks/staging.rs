//! The memory of this rank's GPU where messages are on their way from and to the host.
//!
//! Not by pinned memory: what is sent and received lies in vectors, and to copy it there first would take as long as it spares.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError};
use cudarc::nccl::sys::cudaStream_t;

use crate::{Error, Result};

/// Bytes of each buffer at first.
const SMALL: usize = 1 << 16;

/// Two buffers of a GPU, and the stream that orders what is done with them.
pub(super) struct Staging {
    stream: Arc<CudaStream>,
    done: CudaEvent,
    outgoing: CudaSlice<u8>,
    incoming: CudaSlice<u8>,
}

/// Where a call of NCCL's sends from and receives to.
pub(super) struct Ends {
    pub from: *const c_void,
    pub to: *mut c_void,
    pub stream: cudaStream_t,
}

/// GPUs that this process sees.
///
/// # Errors
/// [`Error::Lost`] with the driver's, here and below.
pub(super) fn gpus() -> Result<usize> {
    Ok(usize::try_from(CudaContext::device_count().map_err(refused)?).unwrap_or(0))
}

impl Staging {
    /// Makes the GPU's context current in the calling thread.
    pub fn on(ordinal: usize) -> Result<Self> {
        let open = || {
            let context = CudaContext::new(ordinal)?;
            // SAFETY: there is one stream, which orders everything.
            unsafe { context.disable_event_tracking() };
            let stream = context.new_stream()?;
            let done = context.new_event(None)?;
            // SAFETY: written before it is read.
            let (outgoing, incoming) = unsafe { (stream.alloc(SMALL)?, stream.alloc(SMALL)?) };
            Ok(Self { stream, done, outgoing, incoming })
        };
        open().map_err(refused)
    }

    /// Copies `own` here, and makes room for `count` bytes that come.
    pub fn take(&mut self, own: &[u8], count: usize) -> Result<Ends> {
        self.copy_in(own, count).map_err(refused)?;
        let (from, _) = self.outgoing.device_ptr(&self.stream);
        let (to, _) = self.incoming.device_ptr_mut(&self.stream);
        let address = |pointer: u64| std::ptr::with_exposed_provenance_mut(pointer as usize);
        Ok(Ends { from: address(from), to: address(to), stream: self.stream.cu_stream().cast() })
    }

    fn copy_in(&mut self, own: &[u8], count: usize) -> Result<(), DriverError> {
        self.stream.context().bind_to_thread()?;
        for (buffer, length) in [(&mut self.outgoing, own.len()), (&mut self.incoming, count)] {
            if buffer.len() < length {
                // SAFETY: written before it is read.
                *buffer = unsafe { self.stream.alloc(length.next_power_of_two())? };
            }
        }
        if own.is_empty() { Ok(()) } else { self.stream.memcpy_htod(own, &mut self.outgoing) }
    }

    /// Marks the end of what has been issued so far.
    pub fn mark(&self) -> Result<()> {
        self.done.record(&self.stream).map_err(refused)
    }

    /// Whether everything up to the mark is done.
    pub fn is_done(&self) -> Result<bool> {
        self.done.try_is_complete().map_err(refused)
    }

    /// The first `count` bytes that have come.
    pub fn give(&self, count: usize) -> Result<Vec<u8>> {
        let mut received = vec![0u8; count];
        if count > 0 {
            let copied = self.stream.memcpy_dtoh(&self.incoming.slice(..count), &mut received);
            copied.and_then(|()| self.stream.synchronize()).map_err(refused)?;
        }
        Ok(received)
    }
}

/// The driver's error.
fn refused(error: DriverError) -> Error {
    Error::Lost(format!("the GPU cannot be used for messages between ranks: {error}"))
}
