//! Networks: a residual backbone and an embedding head, as Burn modules.

mod backbone;
mod batch_norm;
mod head;
pub mod layers;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use ndarray::Array2;

pub use backbone::Backbone;
pub use batch_norm::{BatchNorm, Normalise};
pub use head::{EmbeddingHead, HeadKind};

use crate::{Error, Result};

/// A network from images to unit embeddings.
#[derive(Module, Debug)]
pub struct EmbeddingNetwork {
    /// Images to features.
    pub backbone: Backbone,
    /// Features to embeddings.
    pub head: EmbeddingHead,
}

/// Shape of an [`EmbeddingNetwork`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct NetworkShape {
    /// Channels of the first of three stages; the later ones have two and four times as many.
    pub width: usize,
    /// Residual blocks a stage.
    pub depth: usize,
    /// Dimensions of an embedding.
    pub embedding_dim: usize,
    /// What lies between features and embedding.
    #[serde(default)]
    pub head: HeadKind,
}

impl EmbeddingNetwork {
    /// A network with random weights, drawn from the device's generator (seed it first).
    #[must_use]
    pub fn new(shape: &NetworkShape, device: &Device) -> Self {
        let backbone = Backbone::new(shape.width, shape.depth, device);
        let head = EmbeddingHead::new(backbone.features(), shape.embedding_dim, device).with_kind(shape.head);
        Self { backbone, head }
    }

    /// Images `[N, 3, H, W]` to embeddings `[N, dim]`, rows of unit norm.
    #[must_use]
    pub fn forward(&self, images: Tensor<4>, mode: Normalise) -> Tensor<2> {
        self.head.forward(self.backbone.forward(images, mode))
    }
}

/// Gradients of the weights of `network` from dL/dE of its `embeddings`: the backward pass of the surrogate
/// `sum(E * dL/dE)`, so that autodiff never sees the loss.
pub fn backward<M: Module>(embeddings: Tensor<2>, gradient: &Array2<f32>, network: &M) -> GradientsParams {
    let data =
        TensorData::new(gradient.iter().copied().collect::<Vec<f32>>(), [gradient.nrows(), gradient.ncols()]);
    let gradient = Tensor::<2>::from_data(data, &embeddings.device());
    GradientsParams::from_grads((embeddings * gradient).sum().backward(), network)
}

/// Reads a tensor back, `[rows, columns]`.
///
/// # Errors
/// [`Error::Training`] if the device could not compute it.
pub fn to_array(tensor: Tensor<2>) -> Result<Array2<f32>> {
    let [rows, columns] = tensor.dims();
    let values = read(tensor)?;
    Array2::from_shape_vec((rows, columns), values)
        .map_err(|error| Error::Training(format!("a tensor has another shape: {error}")))
}

/// Reads a tensor's values back, row by row. A GPU tells only here that it could not compute them: it was out of
/// memory, or something went wrong earlier.
///
/// # Errors
/// [`Error::Training`] with the device's reason.
pub fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    tensor.try_into_vec_as::<f32>().map_err(|error| {
        // Burn's message is several lines, the cause among them.
        let reason = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        Error::Training(format!("a tensor cannot be read back: {reason}"))
    })
}
