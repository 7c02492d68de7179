//! A network from a checkpoint or from published weights that embeds pictures.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{Device, Tensor};

use super::Event;
use crate::arguments::name_of;
use crate::data::{EvaluationBatches, Preprocessing, Split, check_classes, check_image_size};
use crate::model::{
    Backbone, BackboneKind, EmbeddingHead, EmbeddingNetwork, NetworkShape, Normalise, Pooling, PoolingKind,
    checksum, to_unit_rows,
};
use crate::train::checkpoint::{BEST, Checkpoint};
use crate::train::{EVALUATION_CHUNK, Embedded, check_embedding, embed_batches, without_direction};
use crate::{Error, Result};

/// Command-line arguments that select the network and its input.
#[derive(Debug, Clone, PartialEq, Eq, Default, clap::Args)]
pub struct NetworkSettings {
    /// A checkpoint of ddtas-train, or a run folder, for its best checkpoint.
    #[arg(long, value_name = "FILE|RUN")]
    pub checkpoint: Option<PathBuf>,
    /// A network with pretrained weights instead of a checkpoint; its pooled features are the embeddings.
    #[arg(long, value_enum, requires = "weights", conflicts_with = "checkpoint")]
    pub backbone: Option<BackboneKind>,
    /// The weights of --backbone: .safetensors, .pth or .pt.
    // clap does not ask for --backbone beside --checkpoint, since the two cannot be used together.
    #[arg(long, value_name = "FILE", requires = "backbone", conflicts_with = "checkpoint")]
    pub weights: Option<PathBuf>,
    /// How features are pooled over the picture [default: avg; cls for a transformer].
    #[arg(long, value_enum, requires = "backbone", conflicts_with = "checkpoint")]
    pub pooling: Option<PoolingKind>,
    /// Side of the square pictures the network sees, 8 to 1024 [default: as in training; 224 for --backbone].
    #[arg(long, value_name = "PIXELS")]
    pub image_size: Option<usize>,
    /// Average the embeddings of every picture and its mirror image.
    #[arg(long)]
    pub flips: bool,
}

impl NetworkSettings {
    /// The files that the network is read from, each with its flag.
    pub(super) fn files(&self) -> Vec<(&'static str, PathBuf)> {
        let best = |path: &PathBuf| if path.is_dir() { path.join(BEST) } else { path.clone() };
        let files = [("checkpoint", self.checkpoint.as_ref().map(best)), ("weights", self.weights.clone())];
        files.into_iter().filter_map(|(name, path)| Some((name, path?))).collect()
    }
}

/// A network with the preprocessing of its pictures.
pub struct Embedder {
    backbone: Backbone,
    pooling: Pooling,
    /// None for published weights: their embeddings are the features, scaled to unit norm.
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
    /// Opens a checkpoint, or published weights without a head.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io) or [`Format`](ddtas_io::Error::Format) if the file cannot be read, is no
    /// checkpoint or does not fit; [`Misused`](ddtas_io::Error::Misused) if neither settings nor file give
    /// the network or the size of the pictures; [`InvalidSetting`](ddtas_io::Error::InvalidSetting).
    pub fn new(settings: &NetworkSettings) -> Result<Self> {
        match &settings.checkpoint {
            Some(path) => Self::open(path, settings),
            None => Self::pretrained(settings),
        }
    }

    fn open(checkpoint: &Path, settings: &NetworkSettings) -> Result<Self> {
        settings.image_size.map_or(Ok(()), check_image_size)?;
        let file = Checkpoint::open(checkpoint)?;
        let shape = file.shape()?;
        let image_size = match settings.image_size {
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
            flips: settings.flips,
        })
    }

    fn pretrained(settings: &NetworkSettings) -> Result<Self> {
        let invalid = |name, reason| Error::misuse(name, "", reason);
        let kind = settings.backbone.ok_or_else(|| {
            invalid("checkpoint", "missing: give --checkpoint FILE, or --backbone NAME --weights FILE")
        })?;
        let weights = settings.weights.as_deref();
        let weights =
            weights.ok_or_else(|| invalid("weights", "missing: --backbone needs --weights FILE"))?;
        let image_size = settings.image_size.or(kind.image_size()).unwrap_or_default();
        kind.validate(settings.pooling, true, image_size)?;
        check_image_size(image_size)?;
        let device = Device::flex();
        let pooling = settings.pooling.unwrap_or_else(|| kind.pooling());
        let backbone = Backbone::new(&NetworkShape::published(kind), &device).with_weights(weights)?;
        let fingerprint = format!("{:08x}-{}", checksum(&backbone)?, name_of(&pooling));
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
            flips: settings.flips,
        })
    }

    /// Whether embeddings are averaged over a picture and its mirror image.
    #[must_use]
    pub fn flips(&self) -> bool {
        self.flips
    }

    /// Side of the pictures that the network sees.
    #[must_use]
    pub fn image_size(&self) -> usize {
        self.image_size
    }

    /// Dimensions of an embedding.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The file that the network was read from.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Identifies the network: the CRC-32 of the checkpoint, or that of the published weights and the pooling.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Embeds the pictures of a split in order, cropped as in the evaluations of training. Unreadable ones are left out.
    ///
    /// # Errors
    /// [`Error::Dataset`] if a class has no readable picture; [`Format`](ddtas_io::Error::Format) if an embedding is not
    /// finite or all zeros; [`Misused`](ddtas_io::Error::Misused) if this machine's memory is too small for the pictures.
    pub fn embed(&self, split: &Arc<Split>, tell: &mut dyn FnMut(Event<'_>)) -> Result<Embedded> {
        let total = split.len();
        self.check_memory(total)?;
        let shown = (self.image_size, self.preprocessing);
        let batches = EvaluationBatches::new(Arc::clone(split), shown, EVALUATION_CHUNK)?;
        let progress = |done| tell(Event::Embedding { done, total });
        let embedded = embed_batches(|images| self.forward(images), &self.device, batches, progress);
        let embedded = embedded.map_err(|error| match error {
            // Nothing was trained.
            Error::Diverged(_) => {
                let reason = "holds weights with which a picture's embedding is not finite: give others";
                Error::format(&self.file, reason)
            }
            other => other,
        })?;
        if let Some(name) = without_direction(&embedded, split) {
            let reason = format!(
                "holds weights with which the network maps {name} to zeros, which have no direction: give others"
            );
            return Err(Error::format(&self.file, reason));
        }
        check_classes(split, &embedded.labels)?;
        Ok(embedded)
    }

    /// An error if this machine's memory is too small for a chunk of `pictures` pictures.
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
