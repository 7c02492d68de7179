//! Buffers in the memory of this rank's GPU, for messages between host and NCCL.
//!
//! Pinned host memory would not pay: copying messages to it, from ordinary vectors, takes as long as it saves.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError};
use cudarc::nccl::sys::cudaStream_t;

use crate::{Error, Result};

/// Initial size of each buffer, in bytes.
const SMALL: usize = 1 << 16;

/// Two buffers on a GPU, and the stream for all operations on them.
pub(super) struct Staging {
    stream: Arc<CudaStream>,
    done: CudaEvent,
    outgoing: CudaSlice<u8>,
    incoming: CudaSlice<u8>,
}

/// Buffers and stream of one NCCL call.
pub(super) struct Ends {
    pub from: *const c_void,
    pub to: *mut c_void,
    pub stream: cudaStream_t,
}

/// Number of GPUs that this process sees.
///
/// # Errors
/// [`Error::Lost`] with the driver's error, here and below.
pub(super) fn gpus() -> Result<usize> {
    Ok(usize::try_from(CudaContext::device_count().map_err(refused)?).unwrap_or(0))
}

impl Staging {
    /// Allocates the buffers on GPU number `ordinal`, and makes its context current in the calling thread.
    pub fn on(ordinal: usize) -> Result<Self> {
        let open = || {
            let context = CudaContext::new(ordinal)?;
            // SAFETY: there is only one stream, so no events are needed for ordering.
            unsafe { context.disable_event_tracking() };
            let stream = context.new_stream()?;
            let done = context.new_event(None)?;
            // SAFETY: the memory is written before it is read.
            let (outgoing, incoming) = unsafe { (stream.alloc(SMALL)?, stream.alloc(SMALL)?) };
            Ok(Self { stream, done, outgoing, incoming })
        };
        open().map_err(refused)
    }

    /// Copies `own` to the GPU, and makes room for `count` received bytes.
    pub fn upload(&mut self, own: &[u8], count: usize) -> Result<Ends> {
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
                // SAFETY: the memory is written before it is read.
                *buffer = unsafe { self.stream.alloc(length.next_power_of_two())? };
            }
        }
        if own.is_empty() { Ok(()) } else { self.stream.memcpy_htod(own, &mut self.outgoing) }
    }

    /// Records an event after all work issued so far.
    pub fn mark(&self) -> Result<()> {
        self.done.record(&self.stream).map_err(refused)
    }

    /// Whether all work before the event is done.
    pub fn is_done(&self) -> Result<bool> {
        self.done.try_is_complete().map_err(refused)
    }

    /// Copies the first `count` received bytes to the host.
    pub fn download(&self, count: usize) -> Result<Vec<u8>> {
        let mut received = vec![0u8; count];
        if count > 0 {
            let copied = self.stream.memcpy_dtoh(&self.incoming.slice(..count), &mut received);
            copied.and_then(|()| self.stream.synchronize()).map_err(refused)?;
        }
        Ok(received)
    }
}

/// Wraps an error of the driver.
fn refused(error: DriverError) -> Error {
    Error::Lost(format!("the GPU cannot be used for messages between ranks: {error}"))
}
