//! A split in order, in chunks, for embedding and retrieval.

use std::sync::Arc;

use rayon::prelude::*;

use super::augment::{Cropper, TestCrop};
use super::dataset::Split;
use super::loader::ImageBatch;
use super::preprocessing::Preprocessing;
use crate::{Error, Result};

/// Walks a split in chunks of `chunk` pictures, centre-cropped, each once; an iterator.
///
/// Unreadable pictures are left out and counted in the chunk: go by its `indices` and
/// `labels`. A chunk may thus be short, even empty. A class without a readable picture is an error, which ends it.
pub struct EvaluationBatches {
    split: Arc<Split>,
    cropper: Cropper,
    crop: TestCrop,
    chunk: usize,
    next: usize,
    /// Readable pictures of each class so far.
    readable: Vec<usize>,
}

impl EvaluationBatches {
    /// Starts at the first picture, which is cut to `image_size` and scaled for `preprocessing`.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] if `chunk` is 0, or the size or crop is out of range.
    pub fn new(
        split: Arc<Split>,
        (image_size, preprocessing): (usize, Preprocessing),
        crop: TestCrop,
        chunk: usize,
    ) -> Result<Self> {
        if chunk == 0 {
            return Err(Error::InvalidSetting {
                name: "evaluation chunk",
                value: "0".into(),
                range: "at least 1",
            });
        }
        crop.validate()?;
        let readable = vec![0; split.class_names().len()];
        let cropper = Cropper::new(image_size, preprocessing)?;
        Ok(Self { split, cropper, crop, chunk, next: 0, readable })
    }

    /// The next chunk; its pictures are decoded and cut on all cores.
    fn read(&mut self) -> Result<ImageBatch> {
        let range = self.next..self.split.len().min(self.next + self.chunk);
        let (split, cropper, crop) = (&self.split, &self.cropper, self.crop);
        let cut = |cropper: &mut Cropper, index| match split.picture(index) {
            Ok(picture) => {
                let mut pixels = Vec::with_capacity(cropper.floats());
                cropper.test(&picture, crop, &mut pixels).map(|()| Some((index, pixels)))
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
            image_size: cropper.size(),
            replaced: 0,
            skipped: 0,
        };
        for picture in prepared {
            let Some((index, pixels)) = picture else {
                batch.skipped += 1;
                continue;
            };
            let label = split.labels()[index];
            self.readable[label as usize] += 1;
            batch.pixels.extend(pixels);
            batch.labels.push(label);
            batch.indices.push(index);
        }
        self.next = range.end;
        self.check_classes(range)?;
        Ok(batch)
    }

    /// Every class that ended within `range` gave a picture.
    fn check_classes(&self, range: std::ops::Range<usize>) -> Result<()> {
        for (label, class) in self.split.by_class().iter().enumerate() {
            let ended = class.last().is_some_and(|last| range.contains(last));
            if ended && self.readable[label] == 0 {
                let (name, count) = (&self.split.class_names()[label], class.len());
                let reason =
                    self.split.picture(class[0]).err().map_or_else(String::new, |e| format!(": {e}"));
                return Err(Error::Dataset(format!(
                    "class {name} of the test split has no readable picture ({count} tried){reason}"
                )));
            }
        }
        Ok(())
    }
}

impl Iterator for EvaluationBatches {
    type Item = Result<ImageBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next == self.split.len() {
            return None;
        }
        let batch = self.read();
        if batch.is_err() {
            self.next = self.split.len();
        }
        Some(batch)
    }
}
