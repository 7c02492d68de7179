//! Buffers that many threads write.

use std::mem::MaybeUninit;

use rayon::prelude::*;

/// A buffer of `length` floats, written in chunks of `size` (the last may be shorter): `write(scratch, index, chunk)`
/// finds zeros there, and a scratch that no other thread has.
///
/// Each thread clears a chunk right before it writes it. Cleared in one piece beforehand, by one thread, the outputs of
/// a training step would take a tenth of its time.
pub fn written<T: Default>(
    length: usize,
    size: usize,
    write: impl Fn(&mut T, usize, &mut [f32]) + Sync,
) -> Vec<f32> {
    let mut values = Vec::with_capacity(length);
    let chunks = values.spare_capacity_mut()[..length].par_chunks_mut(size.max(1));
    chunks.enumerate().for_each_init(T::default, |scratch, (index, chunk)| {
        chunk.fill(MaybeUninit::new(0.0));
        // SAFETY: the line above has set every element.
        write(scratch, index, unsafe { chunk.assume_init_mut() });
    });
    // SAFETY: the chunks cover all of `length`, and each was set.
    unsafe { values.set_len(length) };
    values
}
