//! Evaluations between steps: the network's on the test classes, and that of raw pixels to compare with.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ndarray::ArrayView2;

use crate::backend::Nearest;
use crate::data::{self, EvaluationBatches, ImageBatch, Split, TestCrop};
use crate::loss::{Embeddings, Rows};
use crate::retrieval::{Recall, recall};
use crate::train::engine::Engine;
use crate::{Error, Result};

/// The values of K in Recall@K.
const RECALL_AT: [usize; 4] = [1, 2, 4, 8];

/// Pictures embedded at once.
const EVALUATION_CHUNK: usize = 128;

/// The test classes, at the network's size.
pub(super) struct Test<'a> {
    pub split: &'a Arc<Split>,
    pub image_size: usize,
    /// Set from outside to end the run: an evaluation is then given up.
    pub stop: &'a AtomicBool,
}

/// What an evaluation found.
pub(super) struct Evaluated {
    pub recall: Recall,
    pub nearest: Nearest,
    /// Picture of each row of `nearest`, an index into the split.
    pub pictures: Vec<usize>,
}

impl Test<'_> {
    /// Recall of the network as it stands; `None` if the run is to end.
    pub fn recall(&self, engine: &mut Engine, progress: impl FnMut(usize)) -> Result<Option<Evaluated>> {
        let embedded = engine.embed(self.batches()?, progress)?;
        if self.stopped() {
            return Ok(None);
        }
        let (recall, nearest) = search(engine, embedded.view()?.into(), &embedded.labels)?;
        Ok(Some(Evaluated { recall, nearest, pictures: embedded.indices }))
    }

    /// Recall of nearest neighbours among the pictures themselves, cut as for the network, by the cosine
    /// of their pixels less their mean, and the pictures that could be read; `None` if the run is to end.
    pub fn recall_by_pixels(&self, engine: &mut Engine) -> Result<Option<(Recall, Vec<usize>)>> {
        let (mut pixels, mut labels, mut pictures) = (Vec::new(), Vec::new(), Vec::new());
        for batch in self.batches()? {
            let batch = batch?;
            pixels.extend(batch.pixels);
            labels.extend(batch.labels);
            pictures.extend(batch.indices);
        }
        if self.stopped() {
            return Ok(None);
        }
        let area = self.image_size * self.image_size;
        let dim = 3 * area;
        for picture in pixels.chunks_exact_mut(dim) {
            for (plane, (mean, deviation)) in picture.chunks_exact_mut(area).zip(channels()) {
                plane.iter_mut().for_each(|value| *value = *value * deviation + mean);
            }
            to_unit_row(picture);
        }
        let pixels = ArrayView2::from_shape((labels.len(), dim), &pixels)
            .map_err(|error| Error::Dataset(error.to_string()))?;
        Ok(Some((search(engine, pixels.into(), &labels)?.0, pictures)))
    }

    /// The pictures in order, to the end or until the run is to end.
    fn batches(&self) -> Result<impl Iterator<Item = Result<ImageBatch>>> {
        let (split, size) = (Arc::clone(self.split), self.image_size);
        let batches = EvaluationBatches::new(split, size, TestCrop::default(), EVALUATION_CHUNK)?;
        Ok(batches.take_while(|_| !self.stopped()))
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Mean and deviation that the data module normalised each channel by.
fn channels() -> impl Iterator<Item = (f32, f32)> {
    data::MEAN.into_iter().zip(data::STANDARD_DEVIATION)
}

/// Takes the mean off a picture and scales it to unit norm, so that brightness and contrast do not decide.
fn to_unit_row(picture: &mut [f32]) {
    let mean = picture.iter().map(|&value| f64::from(value)).sum::<f64>() / picture.len() as f64;
    let norm = picture.iter().map(|&value| (f64::from(value) - mean).powi(2)).sum::<f64>().sqrt();
    if norm < 1e-6 {
        // A picture of one colour resembles no other.
        picture.fill((picture.len() as f32).sqrt().recip());
    } else {
        picture.iter_mut().for_each(|value| *value = ((f64::from(*value) - mean) / norm) as f32);
    }
}

fn search<'a>(
    engine: &mut Engine,
    embeddings: Embeddings<'a>,
    labels: &'a [i64],
) -> Result<(Recall, Nearest)> {
    recall(engine.backend(), &Rows::new(embeddings, labels), &RECALL_AT)
}
