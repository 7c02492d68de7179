//! A checkpoint, ready to embed pictures.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::store::ModuleSnapshot;
use burn::tensor::{Device, Tensor};

use super::{Event, Skipped};
use crate::data::{EvaluationBatches, Preprocessing, Split, TestCrop, check_image_size};
use crate::model::{
    Backbone, BackboneKind, EmbeddingHead, EmbeddingNetwork, HeadKind, NetworkShape, Normalise, Pooling,
    PoolingKind, name_of, to_unit_rows,
};
use crate::train::checkpoint::{BEST, Checkpoint};
use crate::train::{EVALUATION_CHUNK, Embedded, check_embedding, embed_batches};
use crate::{Error, Result};

/// Published weights instead of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default, clap::Args)]
pub struct PretrainedSettings {
    /// A network with pretrained weights instead of a checkpoint; its pooled features are the embeddings.
    #[arg(long, value_enum, requires = "weights", conflicts_with = "checkpoint")]
    pub backbone: Option<BackboneKind>,
    /// The weights of --backbone: .safetensors, .pth or .pt.
    #[arg(long, value_name = "FILE", requires = "backbone")]
    pub weights: Option<PathBuf>,
    /// How features are pooled over the picture [default: avg; cls for vit-s16].
    #[arg(long, value_enum, requires = "backbone")]
    pub pooling: Option<PoolingKind>,
}

/// The files that a network is read from, with their settings.
pub(super) fn files_of(
    checkpoint: Option<&Path>,
    pretrained: &PretrainedSettings,
) -> Vec<(&'static str, PathBuf)> {
    let checkpoint = checkpoint.map(|path| if path.is_dir() { path.join(BEST) } else { path.to_path_buf() });
    let files = [("checkpoint", checkpoint), ("weights", pretrained.weights.clone())];
    files.into_iter().filter_map(|(name, path)| Some((name, path?))).collect()
}

/// A network from a file, with the preprocessing of its pictures.
pub struct Embedder {
    backbone: Backbone,
    pooling: Pooling,
    /// None where published weights are taken as they are: the embeddings are the features, scaled to unit norm.
    head: Option<EmbeddingHead>,
    device: Device,
    dim: usize,
    image_size: usize,
    preprocessing: Preprocessing,
    file: PathBuf,
    fingerprint: String,
    flips: bool,
}

impl Embedder {
    /// Opens a checkpoint, or takes published weights instead.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`pretrained`](Self::pretrained).
    pub fn new(
        checkpoint: Option<&Path>,
        pretrained: &PretrainedSettings,
        image_size: Option<usize>,
    ) -> Result<Self> {
        match checkpoint {
            Some(path) => Self::open(path, image_size),
            None => Self::pretrained(pretrained, image_size),
        }
    }

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
                Error::misuse(
                    "image-size",
                    "",
                    "missing: this checkpoint does not hold the size of the pictures it was trained on",
                )
            })?,
        };
        check_image_size(image_size)?;
        shape.backbone.validate(Some(shape.pooling), false, image_size)?;
        let device = Device::flex();
        let network = file.fill(EmbeddingNetwork::new(&shape, &device))?;
        let EmbeddingNetwork { backbone, pooling, head } = network;
        Ok(Self {
            backbone,
            pooling,
            head: Some(head),
            device,
            dim: shape.embedding_dim,
            image_size,
            preprocessing: shape.backbone.preprocessing(),
            file: file.path().to_path_buf(),
            fingerprint: file.fingerprint(),
            flips: false,
        })
    }

    /// A network with published weights and no head.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io) or [`Format`](ddtas_io::Error::Format) if the file cannot be read or does not fit; [`InvalidSetting`](ddtas_io::Error::InvalidSetting).
    pub fn pretrained(settings: &PretrainedSettings, image_size: Option<usize>) -> Result<Self> {
        let invalid = |name, reason| Error::misuse(name, "", reason);
        let kind = settings.backbone.ok_or_else(|| {
            invalid("checkpoint", "missing: give --checkpoint FILE, or --backbone NAME --weights FILE")
        })?;
        let weights = settings.weights.as_deref();
        let weights =
            weights.ok_or_else(|| invalid("weights", "missing: --backbone needs --weights FILE"))?;
        let image_size = image_size.or(kind.image_size()).unwrap_or_default();
        kind.validate(settings.pooling, true, image_size)?;
        check_image_size(image_size)?;
        let device = Device::flex();
        let pooling = settings.pooling.unwrap_or_else(|| kind.pooling());
        let shape = NetworkShape {
            backbone: kind,
            pooling,
            width: 0,
            depth: 0,
            embedding_dim: 0,
            head: HeadKind::default(),
        };
        let backbone = Backbone::new(&shape, &device).with_weights(weights)?;
        let fingerprint = format!("{}-{}", fingerprint(&backbone)?, name_of(&pooling));
        Ok(Self {
            dim: backbone.features(),
            backbone,
            pooling: Pooling::new(pooling, &device),
            head: None,
            device,
            image_size,
            preprocessing: kind.preprocessing(),
            file: weights.to_path_buf(),
            fingerprint,
            flips: false,
        })
    }

    /// Whether an embedding is the mean of those of the picture and its mirror image, scaled to unit norm.
    #[must_use]
    pub fn with_flips(self, flips: bool) -> Self {
        Self { flips, ..self }
    }

    /// Whether pictures are mirrored as well.
    #[must_use]
    pub fn flips(&self) -> bool {
        self.flips
    }

    /// Dimensions of an embedding.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Side of the pictures the network sees.
    #[must_use]
    pub fn image_size(&self) -> usize {
        self.image_size
    }

    /// The file it came from.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Identifies the network: CRC-32 of the checkpoint, or of the published weights, with the pooling.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Embeds the pictures of a split in order, cut as in training's evaluations; those that cannot be read are left out.
    ///
    /// # Errors
    /// [`Error::Dataset`] if a class has no readable picture; [`Error::Diverged`] if an embedding is not finite;
    /// [`Misused`](ddtas_io::Error::Misused) if this machine's memory is too small for the pictures.
    pub fn embed(&self, split: &Arc<Split>, tell: &mut dyn FnMut(Event<'_>)) -> Result<Embedded> {
        let total = split.len();
        self.check_memory(total)?;
        let shown = (self.image_size, self.preprocessing);
        let batches =
            EvaluationBatches::new(Arc::clone(split), shown, TestCrop::default(), EVALUATION_CHUNK)?;
        let progress = |done| tell(Event::Embedding { done, total });
        embed_batches(|images| self.forward(images), &self.device, batches, progress)
    }

    /// Refuses to embed so many `pictures` if this machine's memory is too small for a chunk of them.
    pub(super) fn check_memory(&self, pictures: usize) -> Result<()> {
        check_embedding(self.image_size, self.backbone.least_values(self.image_size), pictures)
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        if self.flips {
            let mirrored = self.embedding(images.clone().flip([3]));
            to_unit_rows(self.embedding(images) + mirrored)
        } else {
            self.embedding(images)
        }
    }

    fn embedding(&self, images: Tensor<4>) -> Tensor<2> {
        let features = self.pooling.forward(self.backbone.forward(images, Normalise::Running));
        match &self.head {
            Some(head) => head.forward(features),
            None => to_unit_rows(features),
        }
    }
}

/// CRC-32 of a backbone's weights: the same in whatever form they are kept.
fn fingerprint(backbone: &Backbone) -> Result<String> {
    let mut sum = crc32fast::Hasher::new();
    for tensor in backbone.collect(None, None, true) {
        let (.., bytes) = tensor
            .into_parts()
            .map_err(|error| Error::Training(format!("weights cannot be read: {error}")))?;
        sum.update(&bytes);
    }
    Ok(format!("{:08x}", sum.finalize()))
}

/// The pictures of a split that could not be read so far.
pub(super) fn skipped(split: &Split) -> Vec<Skipped> {
    split.unreadable().into_iter().map(|bad| Skipped { path: bad.path, reason: bad.reason }).collect()
}
