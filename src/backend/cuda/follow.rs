//! A device that goes with its caller from stream to stream, and into the capture of a graph.
//!
//! What was issued last is known by an event: a stream may be gone by the time its successor has to wait for it.

use std::ffi::c_void;

use cudarc::driver::{result, sys};

use super::device::CudaDevice;
use super::driver::{Primary, check};
use crate::Result;

/// An event of one GPU, recorded or not.
pub(super) struct Event {
    raw: sys::CUevent,
    recorded: bool,
    context: Primary,
}

impl Event {
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the driver refuses.
    pub(super) fn new(context: Primary) -> Result<Self> {
        let _kept = context.enter()?;
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let raw = check("cuEventCreate", result::event::create(flags))?;
        Ok(Self { raw, recorded: false, context })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let Ok(_kept) = self.context.enter() else { return };
        // SAFETY: created in `new`, and nothing can use it after this. Nobody is left to hear of an error.
        let _ = unsafe { result::event::destroy(self.raw) };
    }
}

/// The number of the capture that a stream is in, if it is in one.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device) if the driver refuses.
pub(super) fn capture_of(stream: sys::CUstream) -> Result<Option<u64>> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let mut number = 0;
    let none = std::ptr::null_mut;
    // SAFETY: the two outlive the call, which writes one value to each; the others may be null.
    let answer = unsafe {
        sys::cuStreamGetCaptureInfo_v3(
            stream,
            &raw mut status,
            &raw mut number,
            none(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    };
    check("cuStreamGetCaptureInfo", answer.result())?;
    let capturing = status == sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE;
    Ok(capturing.then_some(number))
}

impl CudaDevice {
    /// Works on `stream` from now on, behind what was issued before [`mark`](Self::mark) was last called.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the driver refuses.
    ///
    /// # Safety
    /// `stream` must be a stream of the primary context of this GPU, or null, and live until it is followed no more: another one is,
    /// or `mark` was called.
    pub unsafe fn follow(&mut self, stream: *mut c_void) -> Result<()> {
        let _kept = self.enter()?;
        let raw: sys::CUstream = stream.cast();
        // In a capture there is nothing to wait for: whoever begins one has waited, and replays it in order.
        if raw != self.stream.raw() && self.issued.recorded && capture_of(raw)?.is_none() {
            let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            // SAFETY: the caller's promise; the event lives as long as `self`.
            let waited = unsafe { result::stream::wait_event(raw, self.issued.raw, flags) };
            check("cuStreamWaitEvent", waited)?;
        }
        // SAFETY: handed on to the caller.
        unsafe { self.stream.borrow(raw) };
        Ok(())
    }

    /// Notes that everything issued so far comes before what another stream will be given.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the driver refuses.
    pub fn mark(&mut self) -> Result<()> {
        let _kept = self.enter()?;
        // An event that is recorded in a capture means nothing outside.
        if capture_of(self.stream.raw())?.is_none() {
            // SAFETY: both live as long as `self`.
            let recorded = unsafe { result::event::record(self.issued.raw, self.stream.raw()) };
            check("cuEventRecord", recorded)?;
            self.issued.recorded = true;
        }
        Ok(())
    }

    /// The number of the capture that `stream` is in, if it is in one.
    ///
    /// # Errors
    /// As [`CudaDevice::new`].
    ///
    /// # Safety
    /// As [`CudaDevice::on_stream`].
    pub unsafe fn capture(ordinal: usize, stream: *mut c_void) -> Result<Option<u64>> {
        let context = super::driver::context(ordinal)?;
        let _kept = context.enter()?;
        capture_of(stream.cast())
    }
}
