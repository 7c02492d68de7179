//! The test classes: embedding them, searching them, and what raw pixels find.

use std::sync::Arc;

use ndarray::ArrayView2;

use super::engine::{Embedded, Engine};
use crate::backend::{Backend, Nearest};
use crate::data::{self, Dataset, EvaluationBatches, Split, TestCrop};
use crate::loss::{Embeddings, Rows};
use crate::retrieval::{Recall, recall};
use crate::{Error, Result};

/// Pictures embedded at once.
const EVALUATION_CHUNK: usize = 128;

/// Raw pixels are compared at this side at most: they tell no more at a larger one.
const LARGEST_PIXELS: usize = 48;
/// Multiplications that raw pixels may cost, about a minute on two cores: large sets are compared at a smaller side.
const PIXEL_PRODUCTS: f64 = 4e12;

/// Queries, and what they are searched in.
pub(super) struct TestSet<'a> {
    queries: &'a Arc<Split>,
    gallery: Option<&'a Arc<Split>>,
    recall_at: &'static [usize],
    image_size: usize,
}

/// A [`TestSet`], embedded.
pub(super) struct EmbeddedTest {
    pub queries: Embedded,
    pub gallery: Option<Embedded>,
}

impl<'a> TestSet<'a> {
    pub fn new(dataset: &'a Dataset, image_size: usize) -> Self {
        let Dataset { test: queries, recall_at, .. } = dataset;
        Self { queries, gallery: dataset.gallery.as_ref(), recall_at, image_size }
    }

    /// Pictures on both sides.
    pub fn len(&self) -> usize {
        self.queries.len() + self.gallery.map_or(0, |gallery| gallery.len())
    }

    /// Embeds both sides; `progress` gets the pictures done so far.
    pub fn embed(&self, engine: &Engine, progress: &mut dyn FnMut(usize)) -> Result<EmbeddedTest> {
        let queries = engine.embed(batches(self.queries, self.image_size)?, &mut *progress)?;
        let gallery = self
            .gallery
            .map(|gallery| {
                engine.embed(batches(gallery, self.image_size)?, |done| progress(self.queries.len() + done))
            })
            .transpose()?;
        Ok(EmbeddedTest { queries, gallery })
    }

    /// Searches the embedded queries and counts hits, at the set's values of K.
    pub fn search(&self, backend: &mut dyn Backend, embedded: &EmbeddedTest) -> Result<(Recall, Nearest)> {
        fn rows(embedded: &Embedded) -> Result<Rows<'_>> {
            Ok(Rows::new(Embeddings::from(embedded.view()?), &embedded.labels))
        }
        let gallery = embedded.gallery.as_ref().map(rows).transpose()?;
        recall(backend, &rows(&embedded.queries)?, gallery.as_ref(), self.recall_at)
    }

    /// Recall of nearest neighbours among the pictures themselves, cut as for the network but not larger than
    /// [`LARGEST_PIXELS`], by the cosine of their pixels less their mean; and how many pictures cannot be read.
    pub fn recall_by_pixels(&self, backend: &mut dyn Backend) -> Result<(Recall, usize)> {
        let pairs = self.queries.len() as f64 * self.gallery.unwrap_or(self.queries).len() as f64;
        let affordable = (PIXEL_PRODUCTS / (3.0 * pairs.max(1.0))).sqrt() as usize;
        let side = affordable.max(8).min(LARGEST_PIXELS).min(self.image_size);
        let queries = pixel_rows(self.queries, side)?;
        let gallery = self.gallery.map(|gallery| pixel_rows(gallery, side)).transpose()?;
        let skipped = queries.skipped + gallery.as_ref().map_or(0, |gallery| gallery.skipped);
        let gallery = gallery.as_ref().map(PixelRows::rows).transpose()?;
        Ok((recall(backend, &queries.rows()?, gallery.as_ref(), self.recall_at)?.0, skipped))
    }
}

fn batches(split: &Arc<Split>, image_size: usize) -> Result<EvaluationBatches> {
    EvaluationBatches::new(Arc::clone(split), image_size, TestCrop::default(), EVALUATION_CHUNK)
}

/// Pictures as rows of unit norm.
struct PixelRows {
    values: Vec<f32>,
    labels: Vec<i64>,
    dim: usize,
    skipped: usize,
}

impl PixelRows {
    fn rows(&self) -> Result<Rows<'_>> {
        let view = ArrayView2::from_shape((self.labels.len(), self.dim), &self.values)
            .map_err(|error| Error::Dataset(error.to_string()))?;
        Ok(Rows::new(Embeddings::from(view), &self.labels))
    }
}

fn pixel_rows(split: &Arc<Split>, side: usize) -> Result<PixelRows> {
    let area = side * side;
    let mut rows = PixelRows { values: Vec::new(), labels: Vec::new(), dim: 3 * area, skipped: 0 };
    for batch in batches(split, side)? {
        let batch = batch?;
        rows.values.extend(batch.pixels);
        rows.labels.extend(batch.labels);
        rows.skipped += batch.skipped;
    }
    for picture in rows.values.chunks_exact_mut(rows.dim) {
        for (plane, (mean, deviation)) in picture.chunks_exact_mut(area).zip(channels()) {
            plane.iter_mut().for_each(|value| *value = *value * deviation + mean);
        }
        to_unit_row(picture);
    }
    Ok(rows)
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
