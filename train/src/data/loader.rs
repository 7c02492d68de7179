//! Worker threads that prepare batches ahead of the training step.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use image::RgbImage;

use super::augment::{AugmentSettings, Cropper};
use super::dataset::Split;
use super::preprocessing::Preprocessing;
use super::random::{Purpose, generator};
use super::sampler::PkSampler;
use crate::error::check;
use crate::ranks::share;
use crate::{Error, Result};

/// A batch of pictures for the network.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageBatch {
    /// Normalised pixels of the rank's own pictures, `[own.len(), 3, image_size, image_size]`, row-major.
    pub pixels: Vec<f32>,
    /// Labels of the whole batch, as in the split, `[B]`.
    pub labels: Vec<i64>,
    /// Indices in the split of the pictures of the whole batch, `[B]`.
    pub indices: Vec<usize>,
    /// The rank's share of the batch; all of it if there is one rank.
    pub own: Range<usize>,
    /// Side of a picture, in pixels.
    pub image_size: usize,
    /// Number of unreadable pictures that were replaced by another one of the class (training).
    pub replaced: usize,
}

/// What the loader prepares, and how far ahead.
#[derive(Debug, Clone, PartialEq)]
pub struct LoaderSettings {
    /// Side of the network's input, 8 to 1024 pixels.
    pub image_size: usize,
    /// How pictures are scaled.
    pub preprocessing: Preprocessing,
    /// How pictures are varied.
    pub augment: AugmentSettings,
    /// Threads, at least 1. Default 1: a second one pays off only for large pictures.
    pub workers: usize,
    /// Number of batches prepared ahead, at least 1. Default 4.
    pub queue: usize,
    /// Seed of the augmentation.
    pub seed: u64,
    /// Step of the first batch: 0, or the step at which a run is resumed.
    pub first_step: u64,
    /// Number of batches to deliver.
    pub steps: u64,
    /// Rank and number of ranks: a rank prepares its share of every batch. Default (0, 1), the whole batch.
    pub rank: (usize, usize),
}

impl LoaderSettings {
    /// Defaults for `steps` batches of pictures of side `image_size`.
    pub fn new(image_size: usize, steps: u64, seed: u64) -> Self {
        let augment = AugmentSettings::default();
        let preprocessing = Preprocessing::default();
        let (first_step, rank) = (0, (0, 1));
        Self { image_size, preprocessing, augment, workers: 1, queue: 4, seed, first_step, steps, rank }
    }
}

/// Iterator over the batches of a [`PkSampler`], in order.
///
/// A worker prepares a whole batch, which depends only on the settings and the step: any number of workers
/// gives the same batches. The first error ends the iteration. Dropping the loader stops the workers at their
/// next picture and joins them.
pub struct Loader {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    split: Arc<Split>,
    sampler: PkSampler,
    settings: LoaderSettings,
    state: Mutex<State>,
    /// Notifies the workers that a batch was delivered or the loader closed.
    room: Condvar,
    /// Notifies the consumer that a batch is ready.
    ready: Condvar,
}

struct State {
    /// The next batch to prepare.
    next_claimed: u64,
    /// The next batch to deliver.
    next_delivered: u64,
    finished: BTreeMap<u64, Result<ImageBatch>>,
    closed: bool,
}

impl Loader {
    /// Starts the workers.
    ///
    /// # Errors
    /// [`InvalidSetting`](ddtas_io::Error::InvalidSetting) or [`InvalidArgument`](ddtas_io::Error::InvalidArgument) for
    /// sizes, shares or counts out of range; [`ddtas::Error::Unavailable`] if the system gives no thread.
    pub fn new(split: Arc<Split>, sampler: PkSampler, settings: LoaderSettings) -> Result<Self> {
        settings.augment.validate()?;
        check(settings.workers > 0, "workers", settings.workers, "at least 1")?;
        if settings.queue == 0 {
            return Err(Error::argument("loader queue", 0, "at least 1"));
        }
        let croppers: Vec<_> = (0..settings.workers)
            .map(|_| Cropper::new(settings.image_size, settings.preprocessing))
            .collect::<Result<_>>()?;
        let first = settings.first_step;
        let state =
            State { next_claimed: first, next_delivered: first, finished: BTreeMap::new(), closed: false };
        let shared = Arc::new(Shared {
            split,
            sampler,
            settings,
            state: Mutex::new(state),
            room: Condvar::new(),
            ready: Condvar::new(),
        });
        let mut loader = Self { shared, workers: Vec::new() };
        for (i, cropper) in croppers.into_iter().enumerate() {
            let shared = Arc::clone(&loader.shared);
            let worker = thread::Builder::new()
                .name(format!("loader-{i}"))
                .spawn(move || shared.work(cropper))
                .map_err(|e| ddtas::Error::Unavailable(format!("cannot start a loader thread: {e}")))?;
            loader.workers.push(worker);
        }
        Ok(loader)
    }
}

impl Iterator for Loader {
    type Item = Result<ImageBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        let shared = &self.shared;
        let mut state = shared.lock();
        if state.closed || state.next_delivered == shared.end() {
            return None;
        }
        let wanted = state.next_delivered;
        loop {
            if let Some(batch) = state.finished.remove(&wanted) {
                state.next_delivered += 1;
                state.closed = batch.is_err();
                shared.room.notify_all();
                return Some(batch);
            }
            state = shared.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.room.notify_all();
        for worker in self.workers.drain(..) {
            // A worker's panic was already delivered as an error.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn end(&self) -> u64 {
        self.settings.first_step.saturating_add(self.settings.steps)
    }

    /// Ignores poisoning: the state is valid whenever the lock is released.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, mut cropper: Cropper) {
        while let Some(step) = self.claim() {
            let batch = catch_unwind(AssertUnwindSafe(|| self.prepare(step, &mut cropper)));
            let batch = batch.unwrap_or_else(|_| {
                Some(Err(Error::Training(format!("a loader thread panicked at batch {step}"))))
            });
            let Some(batch) = batch else { return };
            let failed = batch.is_err();
            self.lock().finished.insert(step, batch);
            self.ready.notify_all();
            if failed {
                return;
            }
        }
    }

    /// Waits until the queue has room and returns the next batch to prepare; none if all are taken or the loader is closed.
    fn claim(&self) -> Option<u64> {
        let mut state = self.lock();
        loop {
            if state.closed || state.next_claimed == self.end() {
                return None;
            }
            if state.next_claimed - state.next_delivered < self.settings.queue as u64 {
                state.next_claimed += 1;
                return Some(state.next_claimed - 1);
            }
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Prepares batch `step`; `None` if the loader is closed meanwhile.
    fn prepare(&self, step: u64, cropper: &mut Cropper) -> Option<Result<ImageBatch>> {
        let mut indices = self.sampler.batch(step);
        let (rank, size) = self.settings.rank;
        let own = share(indices.len(), rank, size);
        let mut pixels = Vec::with_capacity(own.len() * cropper.floats());
        let mut replaced = 0;
        for place in own.clone() {
            if self.lock().closed {
                return None;
            }
            let (index, picture) = match self.readable(&indices, place) {
                Ok(found) => found,
                Err(error) => return Some(Err(error)),
            };
            replaced += usize::from(index != indices[place]);
            indices[place] = index;
            let mut rng = generator(self.settings.seed, Purpose::Augment, step, place as u64);
            if let Err(error) = cropper.train(&picture, &self.settings.augment, &mut rng, &mut pixels) {
                return Some(Err(error));
            }
        }
        let labels = indices.iter().map(|&index| self.split.labels()[index]).collect();
        let image_size = self.settings.image_size;
        Some(Ok(ImageBatch { pixels, labels, indices, own, image_size, replaced }))
    }

    /// The picture at `place` of the batch. If it cannot be read, another of its class, if possible one that
    /// the batch does not contain yet.
    fn readable(&self, batch: &[usize], place: usize) -> Result<(usize, Arc<RgbImage>)> {
        let wanted = batch[place];
        let first_error = match self.split.picture(wanted) {
            Ok(picture) => return Ok((wanted, picture)),
            Err(error @ Error::Image { .. }) => error,
            Err(error) => return Err(error),
        };
        let class = &self.split.by_class()[self.split.labels()[wanted] as usize];
        let start = class.iter().position(|&index| index == wanted).unwrap_or(0);
        let others = || class.iter().cycle().skip(start + 1).take(class.len() - 1).copied();
        let fresh = others().filter(|index| !batch.contains(index));
        let repeated = others().filter(|index| batch.contains(index));
        for index in fresh.chain(repeated) {
            match self.split.picture(index) {
                Ok(picture) => return Ok((index, picture)),
                Err(Error::Image { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::Dataset(format!(
            "class {} of the training split has no readable picture ({} tried): {first_error}; put pictures in place of its files (a \
             run keeps its data set: to train without the class, begin a new one)",
            self.split.class_name(wanted),
            class.len()
        )))
    }
}
