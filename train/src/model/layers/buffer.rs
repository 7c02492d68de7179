//! Buffers that are written in parallel.

use std::mem::MaybeUninit;

use rayon::prelude::*;

/// Returns a buffer of `length` floats, filled in parallel in chunks of `size` (the last may be shorter) by
/// `write(scratch, index, chunk)`. The chunk is zero before; the scratch belongs to the thread.
///
/// Each thread clears a chunk right before writing it: if one thread cleared whole buffers beforehand, that
/// would be a tenth of the time of a training step.
pub fn written<T: Default>(
    length: usize,
    size: usize,
    write: impl Fn(&mut T, usize, &mut [f32]) + Sync,
) -> Vec<f32> {
    let mut values = Vec::with_capacity(length);
    let chunks = values.spare_capacity_mut()[..length].par_chunks_mut(size.max(1));
    chunks.enumerate().for_each_init(T::default, |scratch, (index, chunk)| {
        chunk.fill(MaybeUninit::new(0.0));
        // SAFETY: the line above initialised every element.
        write(scratch, index, unsafe { chunk.assume_init_mut() });
    });
    // SAFETY: the chunks cover all of `length`, and each was initialised.
    unsafe { values.set_len(length) };
    values
}
