//! Events, which mark the work issued last even when its stream no longer exists; and captures of graphs.

use cudarc::driver::{result, sys};

use super::driver::{Primary, check};
use crate::Result;

/// An event of one GPU, recorded or not.
pub(super) struct Event {
    pub(super) raw: sys::CUevent,
    pub(super) recorded: bool,
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
        // SAFETY: created in `new`, and nothing can use it after this. `drop` cannot report an error.
        let _ = unsafe { result::event::destroy(self.raw) };
    }
}

/// The id of the graph capture that a stream is in, if any.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device) if the driver refuses.
pub(super) fn capture_of(stream: sys::CUstream) -> Result<Option<u64>> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let mut number = 0;
    // SAFETY: the two outlive the call, which writes one value to each; the others may be null.
    let answer = unsafe {
        sys::cuStreamGetCaptureInfo_v3(
            stream,
            &raw mut status,
            &raw mut number,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    };
    check("cuStreamGetCaptureInfo", answer.result())?;
    let capturing = status == sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE;
    Ok(capturing.then_some(number))
}
