//! The driver: is it there, is it new enough, which GPUs, and one context with a stream.
//!
//! Everything here is cudarc's thin layer over the driver API (`driver::result`),
//! so that an error keeps the name of the very call that failed.

use std::ffi::c_void;
use std::sync::{Arc, OnceLock};

use cudarc::driver::result::{self, DriverError, stream::StreamKind};
use cudarc::driver::{CudaContext, sys};

use crate::{Error, Result};

/// What the embedded kernels are compiled with: an older driver cannot load them.
const NEEDED_VERSION: i32 = 13_000;

/// Turns the driver's answer into ours, keeping the call and the code's name.
pub(super) fn check<T>(call: &'static str, answer: std::result::Result<T, DriverError>) -> Result<T> {
    answer.map_err(|error| {
        let code = error
            .error_name()
            .map_or_else(|_| format!("error {}", error.0 as u32), |name| name.to_string_lossy().into_owned());
        Error::Device { call, code }
    })
}

/// Initialises the driver.
///
/// # Errors
/// [`Error::Unavailable`] without a driver, without a GPU, or with a driver older than the kernels.
fn initialise() -> Result<()> {
    // Loading the library is slow, and whether it exists does not change under a running program.
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: loads and unloads libcuda; its initialisers have no precondition.
    if !*PRESENT.get_or_init(|| unsafe { sys::is_culib_present() }) {
        return Err(Error::Unavailable("no NVIDIA driver on this machine (libcuda was not found)".into()));
    }
    // From here on the library is there, so that cudarc's loader cannot panic.
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

/// GPUs the driver shows.
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
pub(super) fn context(ordinal: usize) -> Result<Arc<CudaContext>> {
    let count = device_count()?;
    if ordinal >= count {
        let found = match count {
            0 => "none".to_string(),
            1 => "only cuda:0".to_string(),
            _ => format!("cuda:0 to cuda:{}", count - 1),
        };
        return Err(Error::Unavailable(format!("there is no cuda:{ordinal}; this machine has {found}")));
    }
    let context = check("cuDevicePrimaryCtxRetain", CudaContext::new(ordinal))?;
    let (major, minor) = check("cuDeviceGetAttribute", context.compute_capability())?;
    if major < 8 {
        return Err(Error::Unavailable(format!(
            "cuda:{ordinal} has compute capability {major}.{minor}, and the kernels need 8.0 (Ampere) or newer"
        )));
    }
    Ok(context)
}

/// The stream that orders all work of one device.
pub(super) struct Stream {
    raw: sys::CUstream,
    owned: bool,
    context: Arc<CudaContext>,
}

impl Stream {
    /// A stream of its own, which does not wait for the default stream.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver refuses.
    pub(super) fn new(context: Arc<CudaContext>) -> Result<Self> {
        check("cuCtxSetCurrent", context.bind_to_thread())?;
        let raw = check("cuStreamCreate", result::stream::create(StreamKind::NonBlocking))?;
        Ok(Self { raw, owned: true, context })
    }

    /// The caller's stream (a `CUstream` or `cudaStream_t`; null is the default stream).
    ///
    /// # Safety
    /// `raw` must be a stream of this context, and outlive this value.
    pub(super) unsafe fn borrowed(context: Arc<CudaContext>, raw: *mut c_void) -> Self {
        Self { raw: raw.cast(), owned: false, context }
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Waits until everything issued so far is done.
    ///
    /// # Errors
    /// [`Error::Device`] with whatever a kernel or copy died of.
    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as `self`.
        check("cuStreamSynchronize", unsafe { result::stream::synchronize(self.raw) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Nobody is left to hear of an error.
        let _ = self.context.bind_to_thread();
        let _ = self.synchronize();
        if self.owned {
            // SAFETY: created in `new`, and nothing can use it after this.
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}
