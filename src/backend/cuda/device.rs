//! One GPU behind the [`Device`] trait: memory, copies and launches on one stream.

use std::ffi::c_void;
use std::io::Write;

use cudarc::driver::{result, sys};

use super::driver::{self, CallersContext, Primary, Stream, check, id_of};
use super::event::{Event, capture_of};
use super::module::Module;
use crate::backend::device::{Device, DeviceProperties, Kernel, LaunchPlan, Params};
use crate::{Error, Result};

/// An NVIDIA GPU, its stream and the loaded kernels.
///
/// Fields are dropped in this order: the stream waits for the kernels before their module is unloaded.
pub struct CudaDevice {
    pub(super) stream: Stream,
    /// The id of the stream that was followed last.
    followed: Option<u64>,
    /// Recorded behind the work that was issued last outside of captures, see [`CudaDevice::mark`].
    issued: Event,
    /// The same in a capture.
    captured: Event,
    module: Module,
    context: Primary,
    properties: DeviceProperties,
    /// Major number of the compute capability.
    major: i32,
    /// Whether each kernel is named on stderr and waited for: the last name of a run that hangs is that of
    /// its kernel.
    traced: bool,
}

// SAFETY: the handles inside belong to the process, not to a thread; the driver
// asks only for the context to be current, which `enter` sees to in every method.
unsafe impl Send for CudaDevice {}

/// Memory of one GPU, freed when dropped.
pub struct CudaBuffer {
    address: sys::CUdeviceptr,
    bytes: usize,
    context: Primary,
}

impl CudaDevice {
    /// The GPU `cuda:ordinal`, with a stream of its own.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if there is no such GPU, no driver, or either is too old;
    /// [`Error::Device`] if the driver refuses a call.
    pub fn new(ordinal: usize) -> Result<Self> {
        let context = driver::context(ordinal)?;
        let stream = Stream::new(context.clone())?;
        Self::with(context, stream)
    }

    /// The GPU `cuda:ordinal`, working on the caller's stream, in order with what the caller issues there.
    ///
    /// `stream` is a `CUstream` or `cudaStream_t`; null is the default stream.
    ///
    /// # Errors
    /// As [`CudaDevice::new`].
    ///
    /// # Safety
    /// `stream` must be a stream of the primary context of that GPU, and outlive this value.
    pub unsafe fn on_stream(ordinal: usize, stream: *mut c_void) -> Result<Self> {
        let context = driver::context(ordinal)?;
        // SAFETY: handed on to the caller.
        let stream = unsafe { Stream::borrowed(context.clone(), stream) };
        Self::with(context, stream)
    }

    /// The same without Hopper's own kernels, to compare these with the others.
    #[must_use]
    pub fn without_warpgroup_products(self) -> Self {
        let properties = DeviceProperties { warpgroup_products: false, ..self.properties };
        Self { properties, ..self }
    }

    fn with(context: Primary, stream: Stream) -> Result<Self> {
        let module = Module::load(context.clone())?;
        let (issued, captured) = (Event::new(context.clone())?, Event::new(context.clone())?);
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let count = check("cuDeviceGetAttribute", context.attribute(attribute))?;
        let multiprocessors = u32::try_from(count).unwrap_or(1).max(1);
        let (major, _) = check("cuDeviceGetAttribute", context.compute_capability())?;
        let traced = std::env::var_os("DDTAS_TRACE_KERNELS").is_some();
        let properties = DeviceProperties {
            multiprocessors,
            warpgroup_products: major == 9,
            list_bytes: DeviceProperties::LIST_BYTES,
        };
        Ok(Self { stream, followed: None, issued, captured, module, context, properties, major, traced })
    }

    /// Makes the context current in this thread until the result, which restores the caller's, is dropped.
    pub(super) fn enter(&self) -> Result<CallersContext> {
        self.context.enter()
    }
}

/// `CU_STREAM_PER_THREAD`: a different stream in each thread.
const PER_THREAD: sys::CUstream = std::ptr::without_provenance_mut(2);

/// The address of `bytes` bytes from `offset` on.
fn within(buffer: &CudaBuffer, offset: usize, bytes: usize) -> Result<sys::CUdeviceptr> {
    let end = offset.checked_add(bytes);
    if end.is_none_or(|end| end > buffer.bytes) {
        let got = end.unwrap_or(usize::MAX);
        return Err(Error::LengthMismatch { what: "device memory", expected: buffer.bytes, got });
    }
    Ok(buffer.address + offset as u64)
}

impl CudaDevice {
    /// Works on `stream` from now on, after everything issued before the last [`mark`](Self::mark). In a capture it waits
    /// for what was issued in the same capture only, since a graph is replayed after its caller has waited.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the driver refuses.
    ///
    /// # Safety
    /// `stream` must be a stream of the primary context of this GPU, or null, and live until another stream
    /// is followed or `mark` is called.
    pub unsafe fn follow(&mut self, stream: *mut c_void) -> Result<()> {
        let _kept = self.enter()?;
        let raw: sys::CUstream = stream.cast();
        // A new stream may have the address of one that was destroyed, but not its id.
        let id = Some(id_of(raw)?);
        if id != self.followed || raw == PER_THREAD {
            let capture = capture_of(raw)?;
            let event = if capture.is_none() { &self.issued } else { &self.captured };
            // SAFETY: the caller's promise; the context is current.
            unsafe { event.wait(raw, capture) }?;
        }
        self.followed = id;
        // SAFETY: handed on to the caller.
        unsafe { self.stream.borrow(raw) };
        Ok(())
    }

    /// Marks everything issued so far: a stream that is followed later waits for it.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the driver refuses.
    pub fn mark(&mut self) -> Result<()> {
        let _kept = self.enter()?;
        let stream = self.stream.raw();
        let capture = capture_of(stream)?;
        let event = if capture.is_none() { &mut self.issued } else { &mut self.captured };
        // SAFETY: the stream lives until another one is followed; the context is current.
        unsafe { event.record(stream, capture) }
    }
}

/// A GPU that is asked about its streams. It keeps its context, since getting one takes a dozen driver calls.
pub struct Gpu(Primary);

impl Gpu {
    /// The GPU `cuda:ordinal`.
    ///
    /// # Errors
    /// As [`CudaDevice::new`].
    pub fn new(ordinal: usize) -> Result<Self> {
        driver::context(ordinal).map(Self)
    }

    /// The id of the graph capture that `stream` is in, if any.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the driver refuses.
    ///
    /// # Safety
    /// As [`CudaDevice::on_stream`].
    pub unsafe fn capture(&self, stream: *mut c_void) -> Result<Option<u64>> {
        let _kept = self.0.enter()?;
        capture_of(stream.cast())
    }
}

impl Device for CudaDevice {
    type Buffer = CudaBuffer;

    fn name(&self) -> String {
        format!("cuda:{}", self.context.ordinal())
    }

    fn properties(&self) -> DeviceProperties {
        self.properties
    }

    fn may_allocate(&self) -> Result<()> {
        let _kept = self.enter()?;
        if capture_of(self.stream.raw())?.is_some() {
            let reason =
                "memory cannot be allocated while a graph is captured: call it once with this shape before";
            return Err(Error::Unavailable(reason.into()));
        }
        Ok(())
    }

    fn free_memory(&self) -> usize {
        // 0 if the driver refuses: the allocation that follows reports the error.
        let Ok(_kept) = self.enter() else { return 0 };
        result::mem_get_info().map_or(0, |(free, _)| free)
    }

    fn allocate(&mut self, bytes: usize) -> Result<CudaBuffer> {
        let _kept = self.enter()?;
        // The driver refuses an allocation of nothing; what it returns is aligned to 256 bytes.
        // SAFETY: the context is current, and the memory is written before it is read.
        let address = check("cuMemAlloc", unsafe { result::malloc_sync(bytes.max(1)) })?;
        Ok(CudaBuffer { address, bytes, context: self.context.clone() })
    }

    fn bytes(&self, buffer: &CudaBuffer) -> usize {
        buffer.bytes
    }

    fn address(&self, buffer: &CudaBuffer) -> u64 {
        buffer.address
    }

    fn upload(&mut self, buffer: &mut CudaBuffer, offset: usize, source: &[u8]) -> Result<()> {
        let target = within(buffer, offset, source.len())?;
        let _kept = self.enter()?;
        // SAFETY: `within` checked the target; the wait below ends the borrow of the source.
        let copied = unsafe { result::memcpy_htod_async(target, source, self.stream.raw()) };
        check("cuMemcpyHtoDAsync", copied)?;
        // A source in pinned memory is still being read when the call returns.
        self.stream.synchronize()
    }

    fn download(&mut self, buffer: &CudaBuffer, offset: usize, target: &mut [u8]) -> Result<()> {
        let source = within(buffer, offset, target.len())?;
        // SAFETY: `within` checked the source, and only this stream writes to it.
        unsafe { self.download_from(source, target) }
    }

    unsafe fn download_from(&mut self, source: u64, target: &mut [u8]) -> Result<()> {
        let _kept = self.enter()?;
        // SAFETY: the caller's promise; the wait below ends the borrow of the target.
        let copied = unsafe { result::memcpy_dtoh_async(target, source, self.stream.raw()) };
        check("cuMemcpyDtoHAsync", copied)?;
        self.stream.synchronize()
    }

    fn fill(&mut self, buffer: &mut CudaBuffer, offset: usize, bytes: usize, value: u8) -> Result<()> {
        let target = within(buffer, offset, bytes)?;
        let _kept = self.enter()?;
        // SAFETY: `within` checked the target.
        check("cuMemsetD8Async", unsafe { result::memset_d8_async(target, value, bytes, self.stream.raw()) })
    }

    unsafe fn launch<P: Params>(&mut self, kernel: Kernel, plan: LaunchPlan, params: &P) -> Result<()> {
        let _kept = self.enter()?;
        let function = self.module.function(kernel.name(), plan.shared_bytes)?;
        let [x, y, z] = plan.grid;
        // The driver copies the struct before it returns, and never writes to it.
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
        // From sm_90 on a kernel may be launched while the one before still runs; it waits for that one's end
        // by itself (`begin_kernel` in kernels/ptx/device.cuh).
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: plan.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: plan.shared_bytes,
            hStream: self.stream.raw(),
            attrs: &raw mut overlap,
            numAttrs: u32::from(self.major >= 9),
        };
        if self.traced {
            // Unbuffered, so that the name appears before the kernel runs; a closed stderr is no error.
            let _ = writeln!(std::io::stderr(), "kernel {} of {:?} blocks", kernel.name(), plan.grid);
        }
        // SAFETY: the caller vouches for `P` and its pointers, `Module` for the function; what `config`
        // points to outlives the call.
        let launched = unsafe {
            sys::cuLaunchKernelEx(&raw const config, function, arguments.as_mut_ptr(), std::ptr::null_mut())
        };
        check("cuLaunchKernelEx", launched.result()).map_err(|error| match error {
            // The call is the same for all kernels: name the kernel.
            Error::Device { call, code } => {
                Error::Device { call, code: format!("{code} ({})", kernel.name()) }
            }
            other => other,
        })?;
        // In a capture nothing runs yet.
        if self.traced && capture_of(self.stream.raw())?.is_none() {
            self.stream.synchronize()
        } else {
            Ok(())
        }
    }
}

impl Drop for CudaBuffer {
    fn drop(&mut self) {
        let Ok(_kept) = self.context.enter() else { return };
        // A kernel may still be using it. Errors have been or will be reported elsewhere.
        let _ = self.context.synchronize();
        // SAFETY: allocated in `allocate`, freed only here, and nothing runs.
        let _ = unsafe { result::free_sync(self.address) };
    }
}
