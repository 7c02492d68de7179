//! Labelled pictures: their sources, and the cache of decoded pictures.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::decode::{Failure, PixelBox, cut, decode};
use crate::{Error, Result};
use ddtas_io::files::as_text;

/// Default budget of a [`Split`] for decoded pictures in memory: 1 GiB.
///
/// 11,870 pictures of 64 x 64 take 139 MiB. Pictures that do not fit are decoded again each time.
pub const DEFAULT_CACHE_BYTES: usize = 1 << 30;

/// Values of K in Recall@K for a data set without usual ones.
pub const RECALL_AT: &[usize] = &[1, 2, 4, 8];

/// A training and a test split, with disjoint classes unless [`seen`](Self::seen).
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Name in reports, such as `emoji` or `synthetic`.
    pub name: String,
    /// Classes the network learns from.
    pub train: Arc<Split>,
    /// Queries, of unseen classes. Each is compared with the other queries unless there is a gallery.
    pub test: Arc<Split>,
    /// The pictures that queries are compared with, if that is a separate set (In-Shop). It has the labels
    /// and class names of `test`; a class may have no pictures in one of the two.
    pub gallery: Option<Arc<Split>>,
    /// Whether test classes are also training classes, so that Recall@K is not measured on unseen classes.
    pub seen: bool,
    /// The values of K in Recall@K that are usual for this set, ascending.
    pub recall_at: &'static [usize],
    /// Lines to show before training (classes with one picture, empty folders).
    pub warnings: Vec<String>,
}

impl Dataset {
    /// Sizes of the training and the test split.
    #[must_use]
    pub fn extents(&self) -> [Extent; 2] {
        [&self.train, &self.test].map(|split| split.extent())
    }

    /// Checksum of the names of classes and pictures; it does not depend on the folder the set is in.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut sum = crc32fast::Hasher::new();
        for split in [Some(&self.train), Some(&self.test), self.gallery.as_ref()].into_iter().flatten() {
            for (source, label) in split.sources.iter().zip(&split.labels) {
                let name = source.path().file_name().unwrap_or_default();
                for part in [split.class_names[*label as usize].as_bytes(), name.as_encoded_bytes()] {
                    sum.update(part);
                    sum.update(b"\0");
                }
            }
        }
        format!("{:08x}", sum.finalize())
    }

    /// Whether any query has a picture of its class to find.
    pub(super) fn has_answers(&self) -> bool {
        // Without a gallery, one picture of the class is the query itself.
        let least = if self.gallery.is_some() { 1 } else { 2 };
        let mut classes = self.test.by_class().iter().zip(self.searched().by_class());
        classes.any(|(queries, pictures)| !queries.is_empty() && pictures.len() >= least)
    }

    /// The pictures that queries are compared with: the gallery if there is one, else the test split.
    #[must_use]
    pub fn searched(&self) -> &Split {
        self.gallery.as_ref().unwrap_or(&self.test)
    }
}

/// Where one picture comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A picture file.
    File(PathBuf),
    /// A part of a picture file.
    Part {
        /// The file.
        path: PathBuf,
        /// The part; [`Split::picture`] clips it to the picture's border.
        area: PixelBox,
    },
    /// The `instance`-th picture of the `class`-th design of an [`Artist`].
    Synthetic {
        /// Index of the design.
        class: usize,
        /// Index of the picture within the class.
        instance: usize,
    },
}

/// Draws pictures in memory; a picture has the same bytes each time.
pub trait Artist: std::fmt::Debug + Send + Sync {
    /// Name of a class.
    fn name(&self, class: usize) -> &str;

    /// A picture of a class.
    fn draw(&self, class: usize, instance: usize) -> RgbImage;
}

/// The size of a split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Number of classes.
    pub classes: usize,
    /// Number of pictures.
    pub pictures: usize,
}

/// A file that could not be decoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unreadable {
    /// The file.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// The decoder's error.
    pub reason: String,
}

/// Labelled pictures: the training split, test split or gallery of a [`Dataset`].
///
/// Labels run from 0 without gaps; `class_names[label]` is the name. Pictures are decoded on first use and
/// kept if they fit the cache budget. Threads may share a split. A file that could not be decoded is not
/// tried again.
#[derive(Debug)]
pub struct Split {
    sources: Vec<Source>,
    labels: Vec<i64>,
    class_names: Vec<String>,
    by_class: Vec<Vec<usize>>,
    artist: Option<Arc<dyn Artist>>,
    slots: Vec<OnceLock<Slot>>,
    cached_bytes: AtomicUsize,
    cache_bytes: usize,
}

#[derive(Debug)]
enum Slot {
    Picture(Arc<RgbImage>),
    Unreadable(String),
}

impl Split {
    /// A split of files: the name and pictures of each class.
    pub fn from_files(classes: Vec<(String, Vec<PathBuf>)>, cache_bytes: usize) -> Self {
        let classes = classes
            .into_iter()
            .map(|(name, files)| (name, files.into_iter().map(Source::File).collect()))
            .collect();
        Self::from_sources(classes, cache_bytes)
    }

    /// A split of files or parts of files: the name and pictures of each class.
    pub fn from_sources(classes: Vec<(String, Vec<Source>)>, cache_bytes: usize) -> Self {
        Self::new(classes, None, cache_bytes)
    }

    /// A split of drawn pictures: the classes `designs` of `artist`, with `pictures` pictures each.
    pub fn drawn(
        artist: Arc<dyn Artist>,
        designs: std::ops::Range<usize>,
        pictures: usize,
        cache_bytes: usize,
    ) -> Self {
        let classes = designs
            .map(|class| {
                let sources = (0..pictures).map(|instance| Source::Synthetic { class, instance }).collect();
                (artist.name(class).to_owned(), sources)
            })
            .collect();
        Self::new(classes, Some(artist), cache_bytes)
    }

    fn new(classes: Vec<(String, Vec<Source>)>, artist: Option<Arc<dyn Artist>>, cache_bytes: usize) -> Self {
        let (mut sources, mut labels) = (Vec::new(), Vec::new());
        let (mut class_names, mut by_class) = (Vec::new(), Vec::new());
        for (label, (name, pictures)) in classes.into_iter().enumerate() {
            by_class.push((sources.len()..sources.len() + pictures.len()).collect());
            labels.resize(labels.len() + pictures.len(), label as i64);
            sources.extend(pictures);
            class_names.push(name);
        }
        let slots = sources.iter().map(|_| OnceLock::new()).collect();
        Self {
            sources,
            labels,
            class_names,
            by_class,
            artist,
            slots,
            cached_bytes: AtomicUsize::new(0),
            cache_bytes,
        }
    }

    /// Number of classes and pictures.
    pub fn extent(&self) -> Extent {
        Extent { classes: self.class_names.len(), pictures: self.len() }
    }

    /// Number of pictures.
    pub fn len(&self) -> usize {
        self.sources.len()
    }

    /// Whether there is no picture at all.
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    /// Where each picture comes from.
    pub fn sources(&self) -> &[Source] {
        &self.sources
    }

    /// Label of each picture, `0..classes`.
    pub fn labels(&self) -> &[i64] {
        &self.labels
    }

    /// Names of the classes, by label.
    pub fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// Indices of the pictures of each class, by label.
    pub fn by_class(&self) -> &[Vec<usize>] {
        &self.by_class
    }

    /// Name of the class of picture `index`.
    pub fn class_name(&self, index: usize) -> &str {
        &self.class_names[self.labels[index] as usize]
    }

    /// Picture `index`: cached, or else decoded or drawn.
    ///
    /// # Errors
    /// [`Error::Image`] if the file cannot be read or decoded; [`Io`](ddtas_io::Error::Io) if the system lacks memory or
    /// file handles.
    pub fn picture(&self, index: usize) -> Result<Arc<RgbImage>> {
        let slot = &self.slots[index];
        match slot.get() {
            Some(Slot::Picture(picture)) => return Ok(Arc::clone(picture)),
            Some(Slot::Unreadable(reason)) => return Err(self.image_error(index, reason.clone())),
            None => {}
        }
        match self.draw(index) {
            Ok(picture) => {
                let picture = Arc::new(picture);
                let bytes = picture.as_raw().len();
                // If another thread fills the slot first, the reserved bytes are released.
                let before = self.cached_bytes.fetch_add(bytes, Ordering::Relaxed);
                let fits = before.saturating_add(bytes) <= self.cache_bytes;
                if !fits || slot.set(Slot::Picture(Arc::clone(&picture))).is_err() {
                    self.cached_bytes.fetch_sub(bytes, Ordering::Relaxed);
                }
                Ok(picture)
            }
            Err(Failure::System(error)) => Err(error),
            Err(Failure::Undecodable(reason)) => {
                let error = self.image_error(index, reason.clone());
                // If another thread filled the slot first, it stored the same result.
                let _ = slot.set(Slot::Unreadable(reason));
                Err(error)
            }
        }
    }

    /// The files that could not be decoded so far.
    pub fn unreadable(&self) -> Vec<Unreadable> {
        let failed = |(slot, source): (&OnceLock<Slot>, &Source)| match slot.get() {
            Some(Slot::Unreadable(reason)) => {
                Some(Unreadable { path: source.path().to_path_buf(), reason: reason.clone() })
            }
            _ => None,
        };
        self.slots.iter().zip(&self.sources).filter_map(failed).collect()
    }

    /// Bytes of decoded pictures in memory now.
    pub fn cached_bytes(&self) -> usize {
        self.cached_bytes.load(Ordering::Relaxed)
    }

    fn draw(&self, index: usize) -> std::result::Result<RgbImage, Failure> {
        match (&self.sources[index], &self.artist) {
            (Source::Synthetic { class, instance }, Some(artist)) => Ok(artist.draw(*class, *instance)),
            (Source::Synthetic { .. }, None) => Err(Failure::Undecodable("nobody to draw it".into())),
            (Source::File(path), _) => decode(path),
            (Source::Part { path, area }, _) => cut(&decode(path)?, *area).map_err(Failure::Undecodable),
        }
    }

    fn image_error(&self, index: usize, reason: String) -> Error {
        Error::Image { path: self.sources[index].path().to_path_buf(), reason }
    }
}

impl Source {
    /// The file, or an empty path for a picture drawn in memory.
    pub fn path(&self) -> &Path {
        match self {
            Self::File(path) | Self::Part { path, .. } => path,
            Self::Synthetic { .. } => Path::new(""),
        }
    }
}
