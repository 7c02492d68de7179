//! A checkpoint, ready to embed pictures.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::Device;

use super::{Event, Skipped};
use crate::data::{EvaluationBatches, Split, TestCrop};
use crate::model::{EmbeddingNetwork, NetworkShape};
use crate::train::checkpoint::Checkpoint;
use crate::train::{EVALUATION_CHUNK, Embedded, embed_batches};
use crate::{Error, Result};

/// A network from a checkpoint, and the size of the pictures it was trained on.
pub struct Embedder {
    network: EmbeddingNetwork,
    device: Device,
    shape: NetworkShape,
    image_size: usize,
    checkpoint: PathBuf,
    fingerprint: String,
}

impl Embedder {
    /// Opens a checkpoint. `image_size` is needed where the file does not say it itself.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io) or [`Format`](ddtas_io::Error::Format) if the file cannot be read or is no checkpoint; [`InvalidSetting`](ddtas_io::Error::InvalidSetting) if
    /// nobody says the size of the pictures, or it is out of range.
    pub fn open(checkpoint: &Path, image_size: Option<usize>) -> Result<Self> {
        image_size.map_or(Ok(()), check_image_size)?;
        let file = Checkpoint::open(checkpoint)?;
        let shape = file.shape()?;
        let image_size = match image_size {
            Some(size) => size,
            None => file.image_size()?.ok_or_else(|| {
                Error::setting(
                    "image-size",
                    "unknown",
                    "this checkpoint does not say which pictures it was trained on: give --image-size",
                )
            })?,
        };
        check_image_size(image_size)?;
        let device = Device::flex();
        let network = file.fill(EmbeddingNetwork::new(&shape, &device))?;
        let fingerprint = file.fingerprint();
        Ok(Self { network, device, shape, image_size, checkpoint: checkpoint.to_path_buf(), fingerprint })
    }

    /// Dimensions of an embedding.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.shape.embedding_dim
    }

    /// Side of the pictures the network sees.
    #[must_use]
    pub fn image_size(&self) -> usize {
        self.image_size
    }

    /// The file it came from.
    #[must_use]
    pub fn checkpoint(&self) -> &Path {
        &self.checkpoint
    }

    /// Tells checkpoints apart: CRC-32 of the file.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Embeds the pictures of a split in order, cut as in training's evaluations; those that cannot be read are left out.
    ///
    /// # Errors
    /// [`Error::Dataset`] if a class has no readable picture; [`Error::Training`] if an embedding is not finite.
    pub fn embed(&self, split: &Arc<Split>, tell: &mut dyn FnMut(Event<'_>)) -> Result<Embedded> {
        let total = split.len();
        let batches = EvaluationBatches::new(
            Arc::clone(split),
            self.image_size,
            TestCrop::default(),
            EVALUATION_CHUNK,
        )?;
        let progress = |done| tell(Event::Embedding { done, total });
        embed_batches(&self.network, &self.device, batches, progress)
    }
}

/// # Errors
/// [`InvalidSetting`](ddtas_io::Error::InvalidSetting) for a size that no network is made for.
pub(super) fn check_image_size(size: usize) -> Result<()> {
    if (8..=1024).contains(&size) {
        return Ok(());
    }
    Err(Error::setting("image-size", size, "8 to 1024"))
}

/// The pictures of a split that could not be read so far.
pub(super) fn skipped(split: &Split) -> Vec<Skipped> {
    split.unreadable().into_iter().map(|bad| Skipped { path: bad.path, reason: bad.reason }).collect()
}
