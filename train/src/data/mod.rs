//! Data: sets of labelled pictures, P-K batches, augmentation, and a loader
//! that prepares batches ahead of the step.
//!
//! [`DatasetSettings`] names the set and its place: one drawn in memory ([`synthetic`]), the user's pictures (`folder.rs`),
//! or one of the four standard sets, each in a file of its name. `root.rs` finds their files, `archive.rs` unpacks archives.
//!
//! A [`Dataset`] has two [`Split`]s with disjoint classes (SPEC 6) unless the user asks otherwise. A training
//! step takes an [`ImageBatch`] from a [`Loader`]; evaluation reads a split in order with
//! [`EvaluationBatches`]. Random numbers depend only on (seed, purpose, step, position), so that neither the
//! number of workers nor their timing can change a batch.

mod archive;
mod augment;
mod cars196;
mod cub200;
mod dataset;
mod decode;
mod evaluation;
mod files;
mod folder;
mod in_shop;
mod lists;
mod loader;
pub mod mat;
mod preprocessing;
mod random;
mod root;
mod sampler;
mod settings;
mod sop;
pub mod synthetic;

pub(crate) use augment::check_image_size;
pub use augment::{AugmentSettings, Cropper};
pub use dataset::{Artist, DEFAULT_CACHE_BYTES, Dataset, Extent, RECALL_AT, Source, Split, Unreadable};
pub use decode::PixelBox;
pub use evaluation::{EvaluationBatches, check_classes};
pub(crate) use files::{IgnoredFiles, KINDS, file_name, is_hidden, is_picture, name_of_bytes};
pub use folder::{FolderSettings, TrainClasses, folder};
pub use loader::{ImageBatch, Loader, LoaderSettings};
pub use preprocessing::{ChannelOrder, Preprocessing};
pub use sampler::PkSampler;
pub(crate) use sampler::fewer_than;
pub use settings::{DatasetKind, DatasetSettings};
