//! Host memory and the emulated machine behind the [`Device`] trait.

use std::alloc;
use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr::NonNull;

use crate::backend::device::{Device, DeviceProperties, Kernel, LaunchPlan, Params, Region};
use crate::{Error, Result};

unsafe extern "C" {
    /// kernels/emulation/machine.cpp: runs a kernel to its end. Returns -1 if there is no such kernel, or if
    /// it has other threads or parameters.
    fn ddtas_emulated_launch(
        name: *const c_char,
        grid: *const u32,
        threads: u32,
        shared_bytes: u32,
        params: *const c_void,
        params_bytes: usize,
        seed: u64,
    ) -> c_int;
    /// kernels/emulation/machine.cpp: under AddressSanitizer, forbids or allows access to bytes.
    fn ddtas_emulated_forbid(first: *const c_void, bytes: usize, forbidden: bool);
    /// kernels/emulation/tile_order.cpp: the tile at a position of the sweep.
    #[cfg(test)]
    fn ddtas_emulated_tile_at(tiles: u32, band: u32, position: u64, row: *mut u32, column: *mut u32);
}

/// Row and column of the tile of S at a position in the order of the sweep, in a square batch of `tiles` row
/// tiles.
#[cfg(test)]
pub(crate) fn tile_at(tiles: usize, band: usize, position: usize) -> (usize, usize) {
    let (mut row, mut column) = (0, 0);
    // SAFETY: writes the two numbers.
    unsafe {
        ddtas_emulated_tile_at(tiles as u32, band as u32, position as u64, &raw mut row, &raw mut column);
    }
    (row as usize, column as usize)
}

/// The emulated machine. Every launch has a schedule of its own, drawn from the seed.
pub struct EmulatedDevice {
    seed: u64,
    launched: Vec<&'static str>,
    fills: usize,
    properties: DeviceProperties,
}

/// Alignment of allocations, as on a GPU.
const ALIGNMENT: usize = 256;

/// Memory that kernels write through addresses; Rust therefore keeps no reference to it.
pub struct EmulatedBuffer {
    first: NonNull<u8>,
    layout: alloc::Layout,
}

// SAFETY: the buffer owns its memory, and only `Device`'s methods touch it, with the device borrowed mutably.
unsafe impl Send for EmulatedBuffer {}

impl EmulatedDevice {
    /// A machine whose schedules follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        // Two, so that small batches are split among blocks as on a GPU.
        let properties = DeviceProperties {
            multiprocessors: 2,
            warpgroup_products: false,
            list_bytes: DeviceProperties::LIST_BYTES,
        };
        Self { seed, launched: Vec::new(), fills: 0, properties }
    }

    /// The same with the kernels of Hopper in place of those for all GPUs.
    #[must_use]
    pub fn as_hopper(self) -> Self {
        let properties = DeviceProperties { warpgroup_products: true, ..self.properties };
        Self { properties, ..self }
    }

    /// The same with another number of multiprocessors, on which the split of small batches depends.
    #[must_use]
    pub fn with_multiprocessors(self, multiprocessors: u32) -> Self {
        let properties = DeviceProperties { multiprocessors: multiprocessors.max(1), ..self.properties };
        Self { properties, ..self }
    }

    /// The same with less memory for a search's lists.
    #[must_use]
    pub fn with_list_bytes(self, list_bytes: usize) -> Self {
        Self { properties: DeviceProperties { list_bytes, ..self.properties }, ..self }
    }

    /// The kernels launched so far, in order.
    #[must_use]
    pub fn launched(&self) -> &[&'static str] {
        &self.launched
    }

    /// Fills of memory so far, which on a GPU are launches too.
    #[must_use]
    pub fn fills(&self) -> usize {
        self.fills
    }
}

impl EmulatedBuffer {
    /// Panics if the range leaves the buffer: a fault of the workspace's layout, not of input.
    fn within(&self, offset: usize, bytes: usize) -> NonNull<u8> {
        assert!(
            offset.checked_add(bytes).is_some_and(|end| end <= self.layout.size()),
            "outside of the buffer"
        );
        // SAFETY: within the allocation, as just checked.
        unsafe { self.first.add(offset) }
    }

    fn forbid(&self, offset: usize, bytes: usize, forbidden: bool) {
        let first = self.within(offset, bytes);
        // SAFETY: the bytes belong to the allocation.
        unsafe { ddtas_emulated_forbid(first.as_ptr().cast(), bytes, forbidden) };
    }
}

impl Drop for EmulatedBuffer {
    fn drop(&mut self) {
        self.forbid(0, self.layout.size(), false);
        // SAFETY: allocated with this very layout, freed only here.
        unsafe { alloc::dealloc(self.first.as_ptr(), self.layout) };
    }
}

impl Device for EmulatedDevice {
    type Buffer = EmulatedBuffer;

    fn name(&self) -> String {
        "emulated".into()
    }

    fn properties(&self) -> DeviceProperties {
        self.properties
    }

    fn free_memory(&self) -> usize {
        // The same on every host.
        4 << 30
    }

    fn allocate(&mut self, bytes: usize) -> Result<EmulatedBuffer> {
        let refused = || Error::Device { call: "allocate", code: format!("{bytes} bytes of host memory") };
        let layout = alloc::Layout::from_size_align(bytes.max(1), ALIGNMENT).map_err(|_| refused())?;
        // SAFETY: the size is not 0.
        let first = NonNull::new(unsafe { alloc::alloc(layout) }).ok_or_else(refused)?;
        // NaN in every type, so that reads of memory that was not written show.
        // SAFETY: as many bytes were allocated.
        unsafe { first.write_bytes(0xff, layout.size()) };
        Ok(EmulatedBuffer { first, layout })
    }

    fn bytes(&self, buffer: &EmulatedBuffer) -> usize {
        buffer.layout.size()
    }

    fn address(&self, buffer: &EmulatedBuffer) -> u64 {
        buffer.first.as_ptr().expose_provenance() as u64
    }

    fn upload(&mut self, buffer: &mut EmulatedBuffer, offset: usize, source: &[u8]) -> Result<()> {
        let first = buffer.within(offset, source.len());
        // SAFETY: `within` has checked the length; the caller's slice is no part of the buffer.
        unsafe { first.copy_from_nonoverlapping(NonNull::from(source).cast(), source.len()) };
        Ok(())
    }

    fn download(&mut self, buffer: &EmulatedBuffer, offset: usize, target: &mut [u8]) -> Result<()> {
        let first = buffer.within(offset, target.len());
        // SAFETY: `within` has checked the length; the caller's slice is no part of the buffer.
        unsafe { first.copy_to_nonoverlapping(NonNull::from(&mut *target).cast(), target.len()) };
        Ok(())
    }

    unsafe fn download_from(&mut self, source: u64, target: &mut [u8]) -> Result<()> {
        let first = std::ptr::with_exposed_provenance::<u8>(source as usize);
        // SAFETY: the caller's promise; the device's memory is the host's.
        unsafe { first.copy_to_nonoverlapping(target.as_mut_ptr(), target.len()) };
        Ok(())
    }

    fn fill(&mut self, buffer: &mut EmulatedBuffer, offset: usize, bytes: usize, value: u8) -> Result<()> {
        self.fills += 1;
        let first = buffer.within(offset, bytes);
        // SAFETY: `within` has checked the length.
        unsafe { first.write_bytes(value, bytes) };
        Ok(())
    }

    fn watch(&mut self, buffer: &EmulatedBuffer, regions: &[Region]) {
        buffer.forbid(0, buffer.layout.size(), true);
        for region in regions {
            buffer.forbid(region.offset, region.bytes, false);
        }
    }

    unsafe fn launch<P: Params>(&mut self, kernel: Kernel, plan: LaunchPlan, params: &P) -> Result<()> {
        self.launched.push(kernel.name());
        let seed = self.seed.wrapping_mul(1_000_003).wrapping_add(self.launched.len() as u64);
        let refused = || {
            let (name, threads, bytes) = (kernel.name(), plan.threads, size_of::<P>());
            let code = format!("no kernel {name} of {threads} threads and {bytes} bytes of parameters");
            Error::Device { call: "launch", code }
        };
        let name = CString::new(kernel.name()).map_err(|_| refused())?;
        // SAFETY: name, grid and parameters outlive the call; what the parameters
        // point to is the caller's promise.
        let answer = unsafe {
            ddtas_emulated_launch(
                name.as_ptr(),
                plan.grid.as_ptr(),
                plan.threads,
                plan.shared_bytes,
                std::ptr::from_ref(params).cast(),
                size_of::<P>(),
                seed,
            )
        };
        if answer == 0 { Ok(()) } else { Err(refused()) }
    }
}
