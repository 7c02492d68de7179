//! The driver: whether it is present and new enough, its GPUs, their contexts and streams.
//!
//! Everything here is cudarc's thin layer over the driver API (`driver::result`),
//! so that an error keeps the name of the very call that failed.

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::result::{self, DriverError, stream::StreamKind};
use cudarc::driver::{CudaContext, sys};

use crate::{Error, Result};

/// CUDA version that the embedded kernels are compiled with; an older driver cannot load them.
const NEEDED_VERSION: i32 = 13_000;

/// Turns the driver's result into ours, keeping the call and the code's name.
pub(super) fn check<T>(call: &'static str, answer: std::result::Result<T, DriverError>) -> Result<T> {
    answer.map_err(|error| {
        let code = error
            .error_name()
            .map_or_else(|_| format!("error {}", error.0 as u32), |name| name.to_string_lossy().into_owned());
        Error::Device { call, code }
    })
}

/// Id of the process that has initialised the driver; 0 if none has.
static HOME: AtomicU32 = AtomicU32::new(0);

/// Refuses a process that was forked from the one which uses the driver.
///
/// # Errors
/// [`Error::Unavailable`].
fn check_process() -> Result<()> {
    let home = HOME.load(Ordering::Acquire);
    if home == 0 || home == std::process::id() {
        return Ok(());
    }
    let reason = "the GPU was used before this process was forked, and CUDA does not survive a fork: \
                  start processes by spawn, or use the GPU in the child alone";
    Err(Error::Unavailable(reason.into()))
}

/// Initialises the driver.
///
/// # Errors
/// [`Error::Unavailable`] without a driver, without a GPU, with a driver older than the kernels, or in a
/// forked process.
fn initialise() -> Result<()> {
    check_process()?;
    // Loading the library is slow, so it is done once; without a lock, which a fork could leave held for
    // ever.
    if HOME.load(Ordering::Acquire) == 0 {
        // SAFETY: loads and unloads libcuda; its initialisers have no precondition.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Unavailable(
                "no NVIDIA driver on this machine (libcuda was not found)".into(),
            ));
        }
        HOME.store(std::process::id(), Ordering::Release);
    }
    // The library has been found, so cudarc's loader cannot panic from here on.
    if let Err(error) = result::init() {
        // A driver without a GPU (or in a container that hides it) fails here.
        let Err(reason) = check::<()>("cuInit", Err(error)) else { return Ok(()) };
        return Err(Error::Unavailable(format!("no GPU can be used ({reason})")));
    }
    let mut version = 0;
    // SAFETY: `version` outlives the call, which writes one int.
    let answer = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    check("cuDriverGetVersion", answer.result())?;
    if version < NEEDED_VERSION {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(Error::Unavailable(format!(
            "the NVIDIA driver serves CUDA {major}.{minor}, and the kernels need 13.0 (driver 580 or newer)"
        )));
    }
    Ok(())
}

/// Remembers the calling thread's current context, and makes it current again on drop: callers may use a
/// context of the CUDA runtime, torch or another library.
pub(super) struct CallersContext {
    before: sys::CUcontext,
}

impl CallersContext {
    fn new() -> Result<Self> {
        check_process()?;
        let before = check("cuCtxGetCurrent", result::ctx::get_current())?;
        Ok(Self { before: before.unwrap_or(std::ptr::null_mut()) })
    }
}

impl Drop for CallersContext {
    fn drop(&mut self) {
        let now = result::ctx::get_current().map(|now| now.unwrap_or(std::ptr::null_mut()));
        if now != Ok(self.before) {
            // SAFETY: it was current in this thread before. `drop` cannot report an error.
            let _ = unsafe { result::ctx::set_current(self.before) };
        }
    }
}

/// A shared reference to the primary context of a GPU.
#[derive(Clone)]
pub(super) struct Primary(ManuallyDrop<Arc<CudaContext>>);

impl Primary {
    /// Makes the context current in the calling thread until the result is dropped.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver refuses; [`Error::Unavailable`] in a forked process.
    pub(super) fn enter(&self) -> Result<CallersContext> {
        let kept = CallersContext::new()?;
        check("cuCtxSetCurrent", self.0.bind_to_thread())?;
        Ok(kept)
    }
}

impl Deref for Primary {
    type Target = CudaContext;

    fn deref(&self) -> &CudaContext {
        &self.0
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        // Dropping the last reference makes the context current to release it. In a forked process there is
        // nothing to release.
        let Ok(_kept) = CallersContext::new() else { return };
        // SAFETY: dropped only here, and not used after.
        unsafe { ManuallyDrop::drop(&mut self.0) };
    }
}

/// Number of GPUs that the driver shows.
///
/// # Errors
/// [`Error::Unavailable`] without a driver that is new enough; 0 is not an error.
pub fn device_count() -> Result<usize> {
    initialise()?;
    let count = check("cuDeviceGetCount", result::device::get_count())?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// The GPU's primary context, which it shares with the other libraries of the process
/// (PyTorch, CubeCL): their pointers and streams are good here.
///
/// # Errors
/// [`Error::Unavailable`] if there is no such GPU or it is too old.
pub(super) fn context(ordinal: usize) -> Result<Primary> {
    let count = device_count()?;
    if ordinal >= count {
        let found = match count {
            0 => "none".to_string(),
            1 => "only cuda:0".to_string(),
            _ => format!("cuda:0 to cuda:{}", count - 1),
        };
        return Err(Error::Unavailable(format!("there is no cuda:{ordinal}; this machine has {found}")));
    }
    // cudarc makes the context current; the caller's is restored at the end.
    let _kept = CallersContext::new()?;
    let context = check("cuDevicePrimaryCtxRetain", CudaContext::new(ordinal))?;
    let context = Primary(ManuallyDrop::new(context));
    let (major, minor) = check("cuDeviceGetAttribute", context.compute_capability())?;
    if major < 8 {
        return Err(Error::Unavailable(format!(
            "cuda:{ordinal} has compute capability {major}.{minor}, and the kernels need 8.0 (Ampere) or newer"
        )));
    }
    Ok(context)
}

/// The id of a stream, which no other stream of this process has or had.
///
/// # Errors
/// [`Error::Device`] if the driver refuses.
pub(super) fn id_of(stream: sys::CUstream) -> Result<u64> {
    let mut id = 0;
    // SAFETY: the call writes one value.
    check("cuStreamGetId", unsafe { sys::cuStreamGetId(stream, &raw mut id) }.result())?;
    Ok(id)
}

/// The stream that orders all work of one device.
pub(super) struct Stream {
    raw: sys::CUstream,
    owned: bool,
    context: Primary,
}

impl Stream {
    /// A stream of its own, which does not wait for the default stream.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver refuses.
    pub(super) fn new(context: Primary) -> Result<Self> {
        let _kept = context.enter()?;
        let raw = check("cuStreamCreate", result::stream::create(StreamKind::NonBlocking))?;
        Ok(Self { raw, owned: true, context })
    }

    /// The caller's stream (a `CUstream` or `cudaStream_t`; null is the default stream).
    ///
    /// # Safety
    /// `raw` must be a stream of this context, and outlive this value.
    pub(super) unsafe fn borrowed(context: Primary, raw: *mut c_void) -> Self {
        Self { raw: raw.cast(), owned: false, context }
    }

    /// Replaces this stream by the caller's.
    ///
    /// # Safety
    /// As [`borrowed`](Self::borrowed).
    pub(super) unsafe fn borrow(&mut self, raw: sys::CUstream) {
        if self.owned {
            // SAFETY: handed on to the caller.
            *self = unsafe { Self::borrowed(self.context.clone(), raw.cast()) };
        }
        self.raw = raw;
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Waits until everything issued so far is done.
    ///
    /// # Errors
    /// [`Error::Device`] if a kernel or copy failed.
    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as `self`.
        check("cuStreamSynchronize", unsafe { result::stream::synchronize(self.raw) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // `drop` cannot report an error.
        let Ok(_kept) = self.context.enter() else { return };
        if self.owned {
            let _ = self.synchronize();
            // SAFETY: created in `new`, and nothing can use it after this.
            let _ = unsafe { result::stream::destroy(self.raw) };
        } else {
            // The caller's stream may no longer exist.
            let _ = self.context.synchronize();
        }
    }
}
