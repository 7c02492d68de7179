//! Evaluations of the network on the test classes, and of raw pixels for comparison.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ndarray::Axis;

use crate::data::{Dataset, EvaluationBatches, ImageBatch, Preprocessing, Split, check_classes};
use crate::ranks::{self, Collective, share};
use crate::train::engine::{Embedded, Engine, without_direction};
use crate::{Error, Result};
use ddtas::backend::{Backend, Nearest};
use ddtas::loss::{Embeddings, Rows};
use ddtas::retrieval::{Metrics, Recall, evaluate, recall};

/// Pictures embedded at once.
pub const EVALUATION_CHUNK: usize = 128;

/// Largest side at which raw pixels are compared; a larger one does not improve recall.
const LARGEST_PIXELS: usize = 48;
/// Most multiplications for raw pixels, about a minute on two cores: large sets are compared at a smaller side.
const PIXEL_PRODUCTS: f64 = 4e12;

/// The test split and gallery, with everything needed to embed them.
pub(super) struct Test<'a> {
    pub dataset: &'a Dataset,
    pub image_size: usize,
    /// The network's preprocessing.
    pub preprocessing: Preprocessing,
    /// Set from outside to end the run; an evaluation is then cancelled.
    pub stop: &'a AtomicBool,
    /// The ranks; each embeds a share of the pictures.
    pub ranks: Rc<dyn Collective>,
}

/// Embeddings of the test split and gallery.
pub(super) struct TestRows {
    queries: Embedded,
    gallery: Option<Embedded>,
}

/// The readable pictures, by their indices in their splits.
pub(super) struct Readable {
    pub queries: Vec<usize>,
    /// Readable pictures of the gallery, if there is one.
    pub gallery: Option<Vec<usize>>,
}

impl Readable {
    /// Number of queries and gallery pictures.
    pub fn len(&self) -> usize {
        self.queries.len() + self.gallery.as_ref().map_or(0, Vec::len)
    }

    /// The pictures that the indices of [`Nearest`] refer to: the gallery if there is one, else the queries.
    pub fn searched(&self) -> &[usize] {
        self.gallery.as_ref().unwrap_or(&self.queries)
    }
}

impl TestRows {
    /// The rows of queries, and of the gallery if there is one.
    fn sides(&self) -> Result<(Rows<'_>, Option<Rows<'_>>)> {
        fn view(embedded: &Embedded) -> Result<Rows<'_>> {
            Ok(Rows::new(Embeddings::from(embedded.view()?), &embedded.labels))
        }
        Ok((view(&self.queries)?, self.gallery.as_ref().map(view).transpose()?))
    }

    pub fn readable(&self) -> Readable {
        let gallery = self.gallery.as_ref().map(|side| side.indices.clone());
        Readable { queries: self.queries.indices.clone(), gallery }
    }

    /// Retrieval metrics of the test set, with Recall@K for `ks`.
    pub fn measure(&self, backend: &mut dyn Backend, ks: &[usize]) -> Result<Metrics> {
        let (queries, gallery) = self.sides()?;
        Ok(evaluate(backend, &queries, gallery.as_ref(), ks, &mut |_, _| {})?)
    }

    /// The `depth` nearest neighbours of the queries `chosen`, as rows of the gallery or queries.
    pub fn nearest(&self, backend: &mut dyn Backend, chosen: &[usize], depth: usize) -> Result<Nearest> {
        let (queries, gallery) = self.sides()?;
        let among_queries = gallery.is_none();
        let searched = gallery.unwrap_or(queries);
        let rows = self.queries.view()?.select(Axis(0), chosen);
        let labels: Vec<i64> = chosen.iter().map(|&row| queries.labels[row]).collect();
        // One more than wanted, since a query without gallery finds itself, too.
        let found = backend.nearest(&Rows::new(rows.view(), &labels), Some(&searched), depth + 1)?;
        let mut nearest = Nearest::none(chosen.len(), depth)?;
        for (row, &query) in chosen.iter().enumerate() {
            let list = found.indices.row(row).into_iter().zip(found.similarities.row(row));
            let others = list.filter(|(index, _)| !among_queries || **index as usize != query);
            for (place, (&index, &similarity)) in others.take(depth).enumerate() {
                nearest.indices[[row, place]] = index;
                nearest.similarities[[row, place]] = similarity;
            }
        }
        Ok(nearest)
    }
}

impl Test<'_> {
    /// Number of queries and gallery pictures.
    pub fn len(&self) -> usize {
        self.dataset.test.len() + self.dataset.gallery.as_ref().map_or(0, |gallery| gallery.len())
    }

    /// Embeds the pictures with the current network; `None` if the run was stopped. `progress` assumes that
    /// all ranks are as far as this one.
    pub fn embed(&self, engine: &Engine, progress: &mut dyn FnMut(usize)) -> Result<Option<TestRows>> {
        let Dataset { test, gallery, .. } = self.dataset;
        let Some(queries) = self.embed_split(engine, test, progress)? else { return Ok(None) };
        let Some(gallery) = gallery else { return Ok(Some(TestRows { queries, gallery: None })) };
        let embedded = self.embed_split(engine, gallery, &mut |done| progress(test.len() + done))?;
        Ok(embedded.map(|gallery| TestRows { queries, gallery: Some(gallery) }))
    }

    fn embed_split(
        &self,
        engine: &Engine,
        split: &Arc<Split>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Option<Embedded>> {
        let size = self.ranks.size();
        let own = share(split.len(), self.ranks.rank(), size);
        let batches = self.batches(split, (self.image_size, self.preprocessing), own)?;
        let embedded = engine.embed(batches, |done| progress((done * size).min(split.len())))?;
        if ranks::any(&*self.ranks, self.stopped())? {
            return Ok(None);
        }
        let embedded = embedded.of_all(&*self.ranks)?;
        if let Some(name) = without_direction(&embedded, split) {
            return Err(Error::Diverged(format!(
                "the network maps {name} to zeros, which have no direction: give a wider --width, another --pooling or other weights"
            )));
        }
        check_classes(split, &embedded.labels)?;
        Ok(Some(embedded))
    }

    /// Recall of nearest neighbours by raw pixels, and the readable pictures; `None` if the run was stopped.
    /// The similarity is the cosine of the pixels minus their mean, of pictures cropped as for the network
    /// but at most [`LARGEST_PIXELS`] wide.
    pub fn recall_by_pixels(&self, backend: &mut dyn Backend) -> Result<Option<(Recall, Readable)>> {
        let Dataset { test, gallery, recall_at, .. } = self.dataset;
        let pairs = test.len() as f64 * gallery.as_ref().unwrap_or(test).len() as f64;
        let affordable = (PIXEL_PRODUCTS / (3.0 * pairs.max(1.0))).sqrt() as usize;
        let side = affordable.clamp(8, LARGEST_PIXELS).min(self.image_size);
        let queries = self.pixel_rows(test, side)?;
        let gallery = gallery.as_ref().map(|gallery| self.pixel_rows(gallery, side)).transpose()?;
        if self.stopped() {
            return Ok(None);
        }
        let rows = TestRows { queries, gallery };
        let (queries, searched) = rows.sides()?;
        let recall = recall(backend, &queries, searched.as_ref(), recall_at)?;
        Ok(Some((recall, rows.readable())))
    }

    /// The pixels of pictures as rows of unit norm.
    fn pixel_rows(&self, split: &Arc<Split>, side: usize) -> Result<Embedded> {
        let area = side * side;
        let mut rows = Embedded::default();
        for batch in self.batches(split, (side, Preprocessing::default()), 0..split.len())? {
            let batch = batch?;
            rows.values.extend(batch.pixels);
            rows.labels.extend(batch.labels);
            rows.indices.extend(batch.indices);
        }
        if !self.stopped() {
            check_classes(split, &rows.labels)?;
        }
        for picture in rows.values.chunks_exact_mut(3 * area) {
            for (plane, (mean, deviation)) in picture.chunks_exact_mut(area).zip(channels()) {
                plane.iter_mut().for_each(|value| *value = *value * deviation + mean);
            }
            to_unit_row(picture);
        }
        Ok(rows)
    }

    /// Batches of the pictures `range` in order; ends early if the run is stopped.
    fn batches(
        &self,
        split: &Arc<Split>,
        shown: (usize, Preprocessing),
        range: Range<usize>,
    ) -> Result<impl Iterator<Item = Result<ImageBatch>>> {
        let batches = EvaluationBatches::new(Arc::clone(split), shown, EVALUATION_CHUNK)?;
        Ok(batches.within(range).take_while(|_| !self.stopped()))
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Mean and deviation of the pixels' normalisation, for each channel.
fn channels() -> impl Iterator<Item = (f32, f32)> {
    let Preprocessing { mean, deviation, .. } = Preprocessing::default();
    mean.into_iter().zip(deviation)
}

/// Subtracts a picture's mean and scales it to unit norm, so that brightness and contrast have no influence.
fn to_unit_row(picture: &mut [f32]) {
    let mean = picture.iter().map(|&value| f64::from(value)).sum::<f64>() / picture.len() as f64;
    let norm = picture.iter().map(|&value| (f64::from(value) - mean).powi(2)).sum::<f64>().sqrt();
    if norm < 1e-6 {
        // A picture of one colour: a constant row has similarity 0 to all rows with mean 0.
        picture.fill((picture.len() as f32).sqrt().recip());
    } else {
        picture.iter_mut().for_each(|value| *value = ((f64::from(*value) - mean) / norm) as f32);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops where something is off")]
mod tests {
    use image::{Rgb, RgbImage};

    use super::*;
    use crate::data::RECALL_AT;

    #[test]
    fn raw_pixels_are_compared_whatever_their_brightness_and_contrast() {
        let place = tempfile::tempdir().unwrap();
        let files = [(1, 10), (2, 40)].map(|(contrast, brightness)| {
            let path = place.path().join(format!("{contrast}.png"));
            let shade = |x: u32, y: u32| [x * 6, y * 6, x * y / 2].map(|v| (v * contrast + brightness) as u8);
            RgbImage::from_fn(12, 12, |x, y| Rgb(shade(x, y))).save(&path).unwrap();
            path
        });
        let split = Arc::new(Split::from_files(vec![("a".to_owned(), files.to_vec())], 0));
        let dataset = Dataset {
            name: String::new(),
            train: Arc::clone(&split),
            test: Arc::clone(&split),
            gallery: None,
            seen: false,
            recall_at: RECALL_AT,
            warnings: Vec::new(),
        };
        let (preprocessing, stop) = (Preprocessing::caffe(), AtomicBool::new(false));
        let test = Test {
            dataset: &dataset,
            image_size: 12,
            preprocessing,
            stop: &stop,
            ranks: Rc::new(ranks::One),
        };
        let rows = test.pixel_rows(&split, 12).unwrap();
        let rows = rows.view().unwrap();
        assert!((rows.row(0).dot(&rows.row(0)) - 1.0).abs() < 1e-5);
        assert!((rows.row(0).dot(&rows.row(1)) - 1.0).abs() < 1e-5, "{}", rows.row(0).dot(&rows.row(1)));
    }
}
