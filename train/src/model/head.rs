//! The embedding head: a linear map of the features, then L2 normalisation.
//!
//! The features are averages of ReLU outputs, all positive, so that an untrained
//! network starts with similarities near 0.87. That is where the soft
//! contrastive loss settles too: normalising the features first starts at 0,
//! and spends a hundred steps on the way back.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};

/// Kept under the norm, so that a zero row has a direction-less but finite embedding.
const SMALLEST_NORM: f32 = 1e-12;

/// Maps features to unit embeddings.
#[derive(Module, Debug)]
pub struct EmbeddingHead {
    /// `[features, dim]`.
    pub weight: Param<Tensor<2>>,
    /// `[dim]`.
    pub bias: Param<Tensor<1>>,
}

impl EmbeddingHead {
    /// A head from `features` to `dim` dimensions.
    #[must_use]
    pub fn new(features: usize, dim: usize, device: &Device) -> Self {
        let initializer = Initializer::XavierUniform { gain: 1.0 };
        Self {
            weight: initializer.init_with([features, dim], Some(features), Some(dim), device),
            bias: Initializer::Zeros.init([dim], device),
        }
    }

    /// Features `[N, features]` to embeddings `[N, dim]`, rows of unit norm.
    #[must_use]
    pub fn forward(&self, features: Tensor<2>) -> Tensor<2> {
        to_unit_rows(features.matmul(self.weight.val()).add(self.bias.val().unsqueeze()))
    }
}

/// Rows scaled to unit norm.
#[must_use]
pub fn to_unit_rows(rows: Tensor<2>) -> Tensor<2> {
    let norm = rows.clone().powi_scalar(2).sum_dim(1).sqrt().clamp_min(SMALLEST_NORM);
    rows.div(norm)
}
