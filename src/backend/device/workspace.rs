//! One allocation, carved into regions, reused as long as it is large enough.

use super::Device;
use crate::{Error, Result};

/// Regions begin at multiples of this, with gaps of at least as many bytes.
const ALIGNMENT: usize = 256;

/// A part of a workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Region {
    /// First byte.
    pub offset: usize,
    /// Length in bytes.
    pub bytes: usize,
}

/// Hands out regions one behind the other.
#[derive(Debug, Clone, Default)]
pub struct Layout {
    regions: Vec<Region>,
    end: usize,
}

impl Layout {
    /// The next region, of `count` elements of `T`. A layout beyond the address space has `usize::MAX` bytes,
    /// which [`Workspace::lay`] refuses.
    pub fn region<T>(&mut self, count: usize) -> Region {
        let region = Region { offset: self.end, bytes: count.saturating_mul(size_of::<T>()) };
        // The gap lets a device detect kernels that run past a region.
        let end = region.offset.saturating_add(region.bytes).checked_next_multiple_of(ALIGNMENT);
        self.end = end.map_or(usize::MAX, |end| end.saturating_add(ALIGNMENT));
        self.regions.push(region);
        region
    }

    /// Bytes that hold all regions.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.end
    }
}

/// The memory that a layout is laid over.
pub struct Workspace<D: Device> {
    buffer: Option<D::Buffer>,
}

impl<D: Device> Default for Workspace<D> {
    fn default() -> Self {
        Self { buffer: None }
    }
}

impl<D: Device> Workspace<D> {
    /// Makes room for `layout`, keeping the old allocation if it is large enough.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the device has too little memory; [`Error::OutOfMemory`] if
    /// the layout exceeds the address space.
    pub fn lay(&mut self, device: &mut D, layout: &Layout) -> Result<&mut D::Buffer> {
        if isize::try_from(layout.bytes()).is_err() {
            return Err(Error::OutOfMemory { what: "the device's workspace", bytes: layout.bytes() });
        }
        let large_enough = |buffer: &D::Buffer| device.bytes(buffer) >= layout.bytes();
        if !self.buffer.as_ref().is_some_and(large_enough) {
            device.may_allocate()?;
            // Freed first: both at once may not fit.
            self.buffer = None;
            self.buffer = Some(device.allocate(layout.bytes())?);
        }
        let Some(buffer) = &mut self.buffer else { unreachable!("allocated above") };
        device.watch(buffer, &layout.regions);
        Ok(buffer)
    }

    /// The memory, if a layout was laid over it.
    pub fn buffer(&mut self) -> Option<&mut D::Buffer> {
        self.buffer.as_mut()
    }

    /// Bytes allocated.
    pub fn bytes(&self, device: &D) -> usize {
        self.buffer.as_ref().map_or(0, |buffer| device.bytes(buffer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_aligned_and_apart() {
        let mut layout = Layout::default();
        let sizes = [1, 255, 256, 257, 0, 1000];
        let regions: Vec<Region> = sizes.iter().map(|&bytes| layout.region::<u8>(bytes)).collect();
        for (region, bytes) in regions.iter().zip(sizes) {
            assert_eq!((region.offset % ALIGNMENT, region.bytes), (0, bytes));
        }
        for pair in regions.windows(2) {
            assert!(pair[0].offset + pair[0].bytes + ALIGNMENT <= pair[1].offset);
        }
        assert!(layout.bytes() >= regions[5].offset + 1000);
    }

    #[test]
    fn a_layout_beyond_the_address_space_is_known_by_its_size() {
        for counts in
            [vec![usize::MAX], vec![usize::MAX / 8 + 1], vec![usize::MAX / 2; 3], vec![usize::MAX - 100, 7]]
        {
            let mut layout = Layout::default();
            for &count in &counts {
                layout.region::<u64>(count);
            }
            layout.region::<u8>(1);
            assert_eq!(layout.bytes(), usize::MAX, "{counts:?}");
        }
    }
}
