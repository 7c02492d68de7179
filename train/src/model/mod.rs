//! Networks: a backbone, a pooling and an embedding head, as Burn modules.

mod backbone;
mod batch_norm;
mod head;
pub mod layers;
mod pooling;
pub(crate) mod ranks;
pub(crate) mod synchronised;
mod weights;

use std::sync::{Mutex, PoisonError};

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::store::ModuleSnapshot;
use burn::tensor::{Device, Tensor, TensorData};
use ddtas_io::console::one_line;
use ndarray::Array2;

pub use backbone::{Backbone, BackboneKind};
pub use batch_norm::{Activation, BatchNorm, NormOptions, Normalise};
pub use head::{EmbeddingHead, HeadKind, to_unit_rows};
pub use pooling::{Features, Pooling, PoolingKind};

use crate::arguments::name_of;
use crate::{Error, Result};

/// A network from images to unit embeddings.
#[derive(Module, Debug)]
pub struct EmbeddingNetwork {
    /// Images to features.
    pub backbone: Backbone,
    /// Features to one vector for each picture.
    pub pooling: Pooling,
    /// Vectors to embeddings.
    pub head: EmbeddingHead,
}

/// Shape of an [`EmbeddingNetwork`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct NetworkShape {
    /// The backbone network.
    #[serde(default, skip_serializing_if = "is_default")]
    pub backbone: BackboneKind,
    /// How the backbone's features are pooled.
    #[serde(default, skip_serializing_if = "is_default")]
    pub pooling: PoolingKind,
    /// Channels of the first of three stages; the later ones have two and four times as many. For the small
    /// network only, 0 for the others.
    #[serde(default, skip_serializing_if = "is_default")]
    pub width: usize,
    /// Residual blocks in each stage. For the small network only, 0 for the others.
    #[serde(default, skip_serializing_if = "is_default")]
    pub depth: usize,
    /// Dimensions of an embedding.
    pub embedding_dim: usize,
    /// Layers between features and embedding.
    #[serde(default, skip_serializing_if = "is_default")]
    pub head: HeadKind,
}

impl NetworkShape {
    /// The shape of a backbone with published weights, which have no head.
    pub(crate) fn published(backbone: BackboneKind) -> Self {
        let pooling = backbone.pooling();
        Self { backbone, pooling, width: 0, depth: 0, embedding_dim: 0, head: HeadKind::default() }
    }

    /// The numbers of the shape with their flags and ranges.
    pub(crate) fn sizes(&self) -> Vec<Size> {
        let [embedding_dim, width, depth] = network_sizes(self.embedding_dim, self.width, self.depth);
        if self.backbone == BackboneKind::Residual {
            vec![embedding_dim, width, depth]
        } else {
            vec![embedding_dim]
        }
    }

    /// Lower bound on the bytes of the weights: those of the small network's last stage, or of the head. In
    /// the other networks the head has at least the vision transformer's 384 features.
    pub(crate) fn least_bytes(&self) -> usize {
        let [backbone, head] = self.least_bytes_of_parts();
        backbone.max(head)
    }

    /// The same of the backbone and of the head.
    pub(crate) fn least_bytes_of_parts(&self) -> [usize; 2] {
        let features = if self.backbone == BackboneKind::Residual { 4 * self.width } else { 384 };
        let parts = [9 * (4 * self.width).pow(2) * self.depth, features * self.embedding_dim];
        parts.map(|weights| size_of::<f32>() * weights)
    }
}

/// Flag, value, smallest and largest value allowed, and the range as text.
pub(crate) type Size = (&'static str, usize, usize, usize, &'static str);

/// The ranges of a network's numbers, for flags and for checkpoints.
pub(crate) fn network_sizes(embedding_dim: usize, width: usize, depth: usize) -> [Size; 3] {
    [
        ("embedding-dim", embedding_dim, 1, 65_536, "1 to 65536"),
        ("width", width, 1, 4096, "1 to 4096"),
        ("depth", depth, 1, 64, "1 to 64"),
    ]
}

impl std::fmt::Display for NetworkShape {
    /// Writes the flags for this shape.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.backbone {
            BackboneKind::Residual => write!(f, "--width {} --depth {}", self.width, self.depth)?,
            other => write!(f, "--backbone {}", name_of(&other))?,
        }
        if self.pooling != self.backbone.pooling() {
            write!(f, " --pooling {}", name_of(&self.pooling))?;
        }
        if self.head != HeadKind::default() {
            write!(f, " --head {}", name_of(&self.head))?;
        }
        write!(f, " --embedding-dim {}", self.embedding_dim)
    }
}

/// Whether a field is left out of files, so that files of versions without the field can be read and do not change.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl EmbeddingNetwork {
    /// A network with random weights, which Burn draws at their first use (see [`seeded`]).
    #[must_use]
    pub fn new(shape: &NetworkShape, device: &Device) -> Self {
        let backbone = Backbone::new(shape, device);
        let head = EmbeddingHead::new(backbone.features(), shape.embedding_dim, device).with_kind(shape.head);
        Self { backbone, pooling: Pooling::new(shape.pooling, device), head }
    }

    /// Images `[N, 3, H, W]` to feature vectors `[N, features]`, the input of the head.
    #[must_use]
    pub fn features(&self, images: Tensor<4>, mode: Normalise) -> Tensor<2> {
        self.pooling.forward(self.backbone.forward(images, mode))
    }

    /// Images `[N, 3, H, W]` to embeddings `[N, dim]`, rows of unit norm.
    #[must_use]
    pub fn forward(&self, images: Tensor<4>, mode: Normalise) -> Tensor<2> {
        self.head.forward(self.features(images, mode))
    }

    /// Name in files of the tensor with Burn's path `path`.
    #[must_use]
    pub fn file_name(&self, path: &str) -> String {
        match path.strip_prefix("backbone.") {
            Some(path) => format!("backbone.{}", self.backbone.file_name(path)),
            None => path.to_owned(),
        }
    }
}

/// Runs `make` with the random generator of the device seeded, so that a seed gives the same weights.
///
/// Burn has one generator for all threads, so only one thread at a time is in here. It draws a weight at its first
/// use: `make` must use all of them.
pub fn seeded<T>(device: &Device, seed: u64, make: impl FnOnce() -> T) -> T {
    static DRAWING: Mutex<()> = Mutex::new(());
    let _alone = DRAWING.lock().unwrap_or_else(PoisonError::into_inner);
    device.seed(seed);
    make()
}

/// Gradients of the weights of `network` from its `embeddings` E and the `gradient` dL/dE: the backward pass
/// of `sum(E * dL/dE)`, so that autodiff does not need the loss itself.
pub fn backward<M: Module>(embeddings: Tensor<2>, gradient: &Array2<f32>, network: &M) -> GradientsParams {
    let data =
        TensorData::new(gradient.iter().copied().collect::<Vec<f32>>(), [gradient.nrows(), gradient.ncols()]);
    let gradient = Tensor::<2>::from_data(data, &embeddings.device());
    GradientsParams::from_grads((embeddings * gradient).sum().backward(), network)
}

/// CRC-32 of a module's weights and statistics; for published weights it does not depend on the file's format.
pub(crate) fn checksum(module: &impl ModuleSnapshot) -> Result<u32> {
    let mut sum = crc32fast::Hasher::new();
    for tensor in module.collect(None, None, true) {
        let (.., bytes) = tensor
            .into_parts()
            .map_err(|error| Error::Training(format!("weights cannot be read: {error}")))?;
        sum.update(&bytes);
    }
    Ok(sum.finalize())
}

/// Copies a tensor from the device, as `[rows, columns]`.
///
/// # Errors
/// [`Error::Training`] if the device could not compute it.
pub fn to_array(tensor: Tensor<2>) -> Result<Array2<f32>> {
    let [rows, columns] = tensor.dims();
    let values = read(tensor)?;
    Array2::from_shape_vec((rows, columns), values)
        .map_err(|error| Error::Training(format!("a tensor has another shape: {error}")))
}

/// Copies a tensor's values from the device, row by row. A GPU reports errors of earlier operations only
/// here, such as lack of memory.
///
/// # Errors
/// [`Error::Training`] with the device's reason.
pub fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    tensor.try_into_vec_as::<f32>().map_err(|error| {
        // Burn's message has several lines; one of them is the cause.
        Error::Training(format!("a tensor cannot be read back: {}", one_line(error)))
    })
}
