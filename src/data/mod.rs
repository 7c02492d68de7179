//! Data: sets of labelled pictures, P-K batches, augmentation, and a loader
//! that prepares batches ahead of the step.
//!
//! A [`Dataset`] has two [`Split`]s whose classes are disjoint (SPEC 6). A
//! training step takes an [`ImageBatch`] from a [`Loader`]; evaluation walks a
//! split in order with [`EvaluationBatches`]. Everything drawn at random comes
//! from (seed, purpose, step, position), so that neither the number of workers
//! nor their timing can change a batch.

mod augment;
mod dataset;
mod evaluation;
mod folder;
mod loader;
mod random;
mod sampler;
pub mod synthetic;

pub use augment::{AugmentSettings, Cropper, MEAN, STANDARD_DEVIATION, TestCrop};
pub use dataset::{DEFAULT_CACHE_BYTES, Dataset, Source, Split, Unreadable};
pub use evaluation::EvaluationBatches;
pub(crate) use folder::is_picture;
pub use folder::{FolderSettings, folder};
pub use loader::{ImageBatch, Loader, LoaderSettings};
pub use sampler::PkSampler;
