//! Events, which mark the work issued last even when its stream no longer exists; and captures of graphs.

use cudarc::driver::{result, sys};

use super::driver::{Primary, check};
use crate::Result;

/// The id of a capture of a graph; `None` outside of captures.
pub(super) type Capture = Option<u64>;

/// An event of one GPU.
pub(super) struct Event {
    raw: sys::CUevent,
    /// Where it was recorded last.
    recorded: Option<Capture>,
    context: Primary,
}

impl Event {
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the driver refuses.
    pub(super) fn new(context: Primary) -> Result<Self> {
        let _kept = context.enter()?;
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let raw = check("cuEventCreate", result::event::create(flags))?;
        Ok(Self { raw, recorded: None, context })
    }

    /// Records it behind the work issued on `stream`, which is in `capture`.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the driver refuses.
    ///
    /// # Safety
    /// `stream` must be a stream of the event's context, which must be current.
    pub(super) unsafe fn record(&mut self, stream: sys::CUstream, capture: Capture) -> Result<()> {
        // SAFETY: the caller's promise; the event lives as long as `self`.
        check("cuEventRecord", unsafe { result::event::record(self.raw, stream) })?;
        self.recorded = Some(capture);
        Ok(())
    }

    /// Makes `stream`, which is in `capture`, wait for it if it was recorded there. An event that was recorded in a
    /// capture cannot be waited for elsewhere.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the driver refuses.
    ///
    /// # Safety
    /// As [`record`](Self::record).
    pub(super) unsafe fn wait(&self, stream: sys::CUstream, capture: Capture) -> Result<()> {
        if self.recorded != Some(capture) {
            return Ok(());
        }
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the caller's promise; the event lives as long as `self`.
        check("cuStreamWaitEvent", unsafe { result::stream::wait_event(stream, self.raw, flags) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let Ok(_kept) = self.context.enter() else { return };
        // SAFETY: created in `new`, and nothing can use it after this. `drop` cannot report an error.
        let _ = unsafe { result::event::destroy(self.raw) };
    }
}

/// The capture that a stream is in.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device) if the driver refuses.
pub(super) fn capture_of(stream: sys::CUstream) -> Result<Capture> {
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
