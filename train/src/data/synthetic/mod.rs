//! `--dataset synthetic`: fine-grained car silhouettes, drawn in memory from a seed.
//!
//! A class is a design ([`Design`]): body shape, proportions, windows, wheels, lamps, trim. Within a class
//! paint, pose, scale, light, background, objects in front and noise vary. Classes 0..98 train and the others
//! test, as in Cars196. Nearest neighbours of raw pixels find little, because the scene dominates them;
//! tests/synthetic.rs checks that.

mod canvas;
mod car;
mod design;
mod scene;

use std::sync::Arc;

use image::RgbImage;

pub use design::{Body, Design};

use super::dataset::{Artist, DEFAULT_CACHE_BYTES, Dataset, RECALL_AT, Split};
use super::random::{Purpose, generator};
use crate::{Error, Result};

/// Number and size of the pictures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyntheticSettings {
    /// Number of designs, at least 4; the first half, rounded down, is for training. Default 196.
    pub classes: usize,
    /// Number of pictures of each training class, at least 2. Default 40.
    pub train_pictures: usize,
    /// Number of pictures of each test class, at least 2. Default 20.
    pub test_pictures: usize,
    /// Side of a picture, 16 to 512 pixels. Default 64.
    pub picture_size: usize,
    /// Seed of designs and scenes.
    pub seed: u64,
}

impl Default for SyntheticSettings {
    fn default() -> Self {
        Self { classes: 196, train_pictures: 40, test_pictures: 20, picture_size: 64, seed: 0 }
    }
}

/// The car designs of a seed; draws their pictures.
#[derive(Debug)]
pub struct Fleet {
    designs: Vec<Design>,
    picture_size: u32,
    seed: u64,
}

impl Fleet {
    /// Draws `classes` designs.
    ///
    /// # Errors
    /// [`InvalidArgument`](ddtas_io::Error::InvalidArgument) unless `picture_size` is in 16..=512.
    pub fn new(classes: usize, picture_size: usize, seed: u64) -> Result<Self> {
        in_range("synthetic picture size", picture_size, 16..=512, "16 to 512 pixels")?;
        let designs = (0..classes)
            .map(|class| Design::draw(class, &mut generator(seed, Purpose::Design, class as u64, 0)))
            .collect();
        Ok(Self { designs, picture_size: picture_size as u32, seed })
    }

    /// The design of `class`.
    pub fn design(&self, class: usize) -> &Design {
        &self.designs[class]
    }
}

impl Artist for Fleet {
    fn name(&self, class: usize) -> &str {
        &self.designs[class].name
    }

    fn draw(&self, class: usize, instance: usize) -> RgbImage {
        let mut rng = generator(self.seed, Purpose::Scene, class as u64, instance as u64);
        scene::draw(&self.designs[class], self.picture_size, &mut rng)
    }
}

/// The synthetic data set.
///
/// # Errors
/// [`InvalidArgument`](ddtas_io::Error::InvalidArgument) names the first count that is out of range.
pub fn synthetic(settings: &SyntheticSettings) -> Result<Dataset> {
    in_range("synthetic classes", settings.classes, 4..=100_000, "4 to 100000")?;
    in_range("synthetic training pictures", settings.train_pictures, 2..=100_000, "2 to 100000 per class")?;
    in_range("synthetic test pictures", settings.test_pictures, 2..=100_000, "2 to 100000 per class")?;
    let fleet = Arc::new(Fleet::new(settings.classes, settings.picture_size, settings.seed)?);
    let half = settings.classes / 2;
    let split = |designs, pictures| {
        let artist: Arc<dyn Artist> = Arc::clone(&fleet) as _;
        Arc::new(Split::drawn(artist, designs, pictures, DEFAULT_CACHE_BYTES))
    };
    Ok(Dataset {
        name: "synthetic".into(),
        train: split(0..half, settings.train_pictures),
        test: split(half..settings.classes, settings.test_pictures),
        gallery: None,
        seen: false,
        recall_at: RECALL_AT,
        warnings: Vec::new(),
    })
}

fn in_range(
    name: &'static str,
    value: usize,
    allowed: std::ops::RangeInclusive<usize>,
    range: &'static str,
) -> Result<()> {
    if allowed.contains(&value) {
        return Ok(());
    }
    Err(Error::argument(name, value, range))
}
