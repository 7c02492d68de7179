//! The part that the CUDA and the emulated backend share: everything but the device itself.
//!
//! [`DeviceBackend`] implements [`Backend`](crate::backend::Backend) over any
//! [`Device`], which allocates, copies and launches. Launch plans and the
//! workspace's layout are pure functions, tested without a device.

mod backend;
mod enqueue;
mod kernel;
mod launcher;
mod layout;
mod loss;
mod order;
pub mod params;
mod passes;
mod plan;
mod precision;
mod remembered;
mod resident;
mod retrieval;
mod search_plan;
mod shape;
mod steps;
mod threshold;
mod transfer;
mod workspace;

pub use backend::{DeviceBackend, Options};
pub use enqueue::{ResidentIdentity, ResidentNumbers, ResidentPart, ResidentSettings};
pub use kernel::Kernel;
pub use passes::ResidentOutput;
pub use plan::LaunchPlan;
pub use precision::Precision;
pub use resident::{ResidentBatch, ResidentRows};
pub use workspace::Region;

use crate::Result;
pub use crate::loss::ElementType;

/// A struct of `kernels/params.h` that a kernel takes as its only argument.
///
/// # Safety
/// The layout must be that of the kernel's parameter.
pub unsafe trait Params: Copy {}

/// Properties of a GPU that launch plans depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceProperties {
    /// Number of multiprocessors; at least as many blocks run at the same time.
    pub multiprocessors: u32,
    /// Whether the kernels that only Hopper (sm_90) runs can be launched.
    pub warpgroup_products: bool,
    /// Most bytes of a search's lists at a time; more queries are searched in turns.
    pub list_bytes: usize,
}

impl DeviceProperties {
    /// The usual `list_bytes`: a multiple of what all multiprocessors of one GPU work on (132 tiles of 128
    /// queries, k = 10: 138 MB; k = 1,000: 554 MB).
    pub const LIST_BYTES: usize = 1 << 30;
}

/// A machine that runs kernels, in the order they were launched.
///
/// Copies are ordered with the launches, and `download` waits for its bytes.
pub trait Device: Send {
    /// An allocation in the device's memory.
    type Buffer: Send;

    /// The device's name: `cuda:0`, `emulated`.
    fn name(&self) -> String;

    /// Properties that launch plans depend on.
    fn properties(&self) -> DeviceProperties;

    /// Bytes of free memory, approximately.
    fn free_memory(&self) -> usize;

    /// Bytes of uninitialised memory, at least 256-byte aligned.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if too little memory is free.
    fn allocate(&mut self, bytes: usize) -> Result<Self::Buffer>;

    /// The allocation's length in bytes.
    fn bytes(&self, buffer: &Self::Buffer) -> usize;

    /// The device's address of the first byte.
    fn address(&self, buffer: &Self::Buffer) -> u64;

    /// Copies `source` to `buffer` from byte `offset` on; `source` may be reused on return.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the copy fails.
    fn upload(&mut self, buffer: &mut Self::Buffer, offset: usize, source: &[u8]) -> Result<()>;

    /// Copies from byte `offset` on of `buffer` to `target`, and waits for it.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the copy or an earlier kernel failed.
    fn download(&mut self, buffer: &Self::Buffer, offset: usize, target: &mut [u8]) -> Result<()>;

    /// As [`download`](Device::download), from any address.
    ///
    /// # Safety
    /// `source` must be the address of as many live bytes of this device as `target` has, and earlier writes
    /// to them must be ordered by the device's stream.
    ///
    /// # Errors
    /// As [`download`](Device::download).
    unsafe fn download_from(&mut self, source: u64, target: &mut [u8]) -> Result<()>;

    /// Sets `bytes` bytes from `offset` on to `value`.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the device refuses.
    fn fill(&mut self, buffer: &mut Self::Buffer, offset: usize, bytes: usize, value: u8) -> Result<()>;

    /// Whether memory may be allocated and freed now.
    ///
    /// # Errors
    /// [`Error::Unavailable`](crate::Error::Unavailable) while launches are captured instead of run.
    fn may_allocate(&self) -> Result<()> {
        Ok(())
    }

    /// Declares that kernels may access these regions of the buffer and nothing between them. A device that
    /// can check this does.
    fn watch(&mut self, buffer: &Self::Buffer, regions: &[Region]) {
        let _ = (buffer, regions);
    }

    /// Launches a kernel and does not wait for it.
    ///
    /// # Safety
    /// `P` must be the kernel's parameter struct, and its pointers must lead to live
    /// device memory of the lengths params.h states for its counts.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the launch is refused.
    unsafe fn launch<P: Params>(&mut self, kernel: Kernel, plan: LaunchPlan, params: &P) -> Result<()>;
}
