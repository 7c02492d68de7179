//! Chunks of a split in order, for embedding and retrieval.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::augment::Cropper;
use super::dataset::Split;
use super::loader::ImageBatch;
use super::preprocessing::Preprocessing;
use crate::{Error, Result};

/// Iterator over a split in chunks of `chunk` pictures, centre-cropped, each picture once.
///
/// Unreadable pictures are left out: a chunk's `indices` and `labels` list the others. It may thus be short or empty.
/// An error ends the iteration.
pub struct EvaluationBatches {
    split: Arc<Split>,
    cropper: Cropper,
    chunk: usize,
    /// The pictures to read; `next` is the first of the next chunk.
    range: Range<usize>,
    next: usize,
}

impl EvaluationBatches {
    /// Starts at the first picture. Pictures are cropped to `image_size` and scaled for `preprocessing`.
    ///
    /// # Errors
    /// [`InvalidArgument`](ddtas_io::Error::InvalidArgument) if `chunk` is 0, or the size is out of range.
    pub fn new(
        split: Arc<Split>,
        (image_size, preprocessing): (usize, Preprocessing),
        chunk: usize,
    ) -> Result<Self> {
        if chunk == 0 {
            return Err(Error::argument("evaluation chunk", "0", "at least 1"));
        }
        let cropper = Cropper::new(image_size, preprocessing)?;
        let range = 0..split.len();
        Ok(Self { split, cropper, chunk, range, next: 0 })
    }

    /// Restricts the iterator to the pictures `range`.
    #[must_use]
    pub fn within(self, range: Range<usize>) -> Self {
        Self { next: range.start, range, ..self }
    }

    /// The next chunk; its pictures are decoded and cropped on all cores.
    fn read(&mut self) -> Result<ImageBatch> {
        let range = self.next..self.range.end.min(self.next + self.chunk);
        let (split, cropper) = (&self.split, &self.cropper);
        let cut = |cropper: &mut Cropper, index| match split.picture(index) {
            Ok(picture) => {
                let mut pixels = Vec::with_capacity(cropper.floats());
                cropper.test(&picture, &mut pixels).map(|()| Some((index, pixels)))
            }
            Err(Error::Image { .. }) => Ok(None),
            Err(error) => Err(error),
        };
        let prepared: Vec<Option<(usize, Vec<f32>)>> =
            range.clone().into_par_iter().map_init(|| cropper.another(), cut).collect::<Result<_>>()?;

        let mut batch = ImageBatch {
            pixels: Vec::with_capacity(range.len() * cropper.floats()),
            labels: Vec::with_capacity(range.len()),
            indices: Vec::with_capacity(range.len()),
            own: 0..0,
            image_size: cropper.size(),
            replaced: 0,
        };
        for (index, pixels) in prepared.into_iter().flatten() {
            batch.pixels.extend(pixels);
            batch.labels.push(split.labels()[index]);
            batch.indices.push(index);
        }
        batch.own = 0..batch.labels.len();
        self.next = range.end;
        Ok(batch)
    }
}

/// Checks that every class of `split` that has pictures occurs in `labels`, the labels of the readable pictures.
///
/// # Errors
/// [`Error::Dataset`] names the first class that does not.
pub fn check_classes(split: &Split, labels: &[i64]) -> Result<()> {
    let mut readable = vec![false; split.class_names().len()];
    labels.iter().for_each(|&label| readable[label as usize] = true);
    let missing = |label: &usize| !readable[*label] && !split.by_class()[*label].is_empty();
    let Some(label) = (0..readable.len()).find(missing) else { return Ok(()) };
    let class = &split.by_class()[label];
    let (name, count) = (&split.class_names()[label], class.len());
    let reason = class.first().and_then(|&first| split.picture(first).err());
    let reason = reason.map_or_else(String::new, |error| format!(": {error}"));
    Err(Error::Dataset(format!(
        "class {name} of the test split has no readable picture ({count} tried){reason}"
    )))
}

impl Iterator for EvaluationBatches {
    type Item = Result<ImageBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.range.end {
            return None;
        }
        let batch = self.read();
        if batch.is_err() {
            self.next = self.range.end;
        }
        Some(batch)
    }
}
