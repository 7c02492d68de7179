//! Floats that begin at a cache line.

use std::ops::{Deref, DerefMut};

use super::simd::GROUP;

/// A group of floats that is one cache line.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; GROUP]);

/// Floats in whole cache lines: no vector straddles two lines, which would cost an additional load or store.
#[derive(Debug, Default)]
pub struct Buffer {
    lines: Vec<Line>,
    length: usize,
}

impl Buffer {
    /// Changes the length; new floats are zero.
    pub fn resize(&mut self, length: usize) {
        if length > self.length {
            let kept = self.length;
            self.lines.resize(length.div_ceil(GROUP), Line([0.0; GROUP]));
            self.length = length;
            // The last line may hold old values behind `kept`.
            let line_end = kept.next_multiple_of(GROUP).min(length);
            self[kept..line_end].fill(0.0);
        } else {
            self.lines.truncate(length.div_ceil(GROUP));
            self.length = length;
        }
    }

    /// Makes it at least `length` long.
    pub fn grow(&mut self, length: usize) {
        if self.length < length {
            self.resize(length);
        }
    }

    pub fn bytes(&self) -> usize {
        self.lines.capacity() * size_of::<Line>()
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_begin_at_a_line_and_new_ones_are_zero() {
        let mut buffer = Buffer::default();
        assert!(buffer.is_empty());
        for length in [5, 40, 3, 17, 16, 48] {
            let kept = buffer.len().min(length);
            buffer.resize(length);
            assert_eq!(buffer.len(), length);
            assert_eq!(buffer.as_ptr().addr() % 64, 0);
            assert!(buffer[kept..].iter().all(|&x| x == 0.0) && buffer[..kept].iter().all(|&x| x == 7.0));
            buffer.fill(7.0);
        }
    }
}
