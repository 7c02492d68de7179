//! The embedding head: an optional layer normalisation of the features, a linear map, then L2 normalisation.
//!
//! Features are averages of ReLU outputs, all positive, so similarities of an untrained network are near
//! 0.87, which is also where the soft contrastive loss settles. With layer normalisation they start at 0, and
//! training spends a hundred steps to return there.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

/// Lower bound of the norm, so that a zero row gives a zero embedding, not NaN.
const SMALLEST_NORM: f32 = 1e-12;

/// Added to the variance before the square root.
const EPSILON: f64 = 1e-5;

/// Layers between features and embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
pub enum HeadKind {
    /// A linear layer.
    #[default]
    #[value(name = "linear")]
    #[serde(rename = "linear")]
    Linear,
    /// Layer normalisation without learned parameters, then a linear layer.
    #[value(name = "layer-norm+linear")]
    #[serde(rename = "layer-norm+linear")]
    LayerNormLinear,
}

/// Maps features to unit embeddings.
#[derive(Module, Debug)]
pub struct EmbeddingHead {
    /// `[features, dim]`; the transpose in files.
    pub weight: Param<Tensor<2>>,
    /// `[dim]`.
    pub bias: Param<Tensor<1>>,
    layer_norm: bool,
}

impl EmbeddingHead {
    /// A head from `features` to `dim` dimensions.
    #[must_use]
    pub fn new(features: usize, dim: usize, device: &Device) -> Self {
        let initializer = Initializer::XavierUniform { gain: 1.0 };
        Self {
            weight: initializer.init_with([features, dim], Some(features), Some(dim), device),
            bias: Initializer::Zeros.init([dim], device),
            layer_norm: false,
        }
    }

    /// The head with the same weights and this `kind`.
    #[must_use]
    pub fn with_kind(self, kind: HeadKind) -> Self {
        Self { layer_norm: kind == HeadKind::LayerNormLinear, ..self }
    }

    /// The linear map's input: the features `[N, features]`, normalised if the kind asks for it.
    #[must_use]
    pub fn input(&self, features: Tensor<2>) -> Tensor<2> {
        if !self.layer_norm {
            return features;
        }
        let centred = features.clone().sub(features.mean_dim(1));
        let variance = centred.clone().powi_scalar(2).mean_dim(1);
        centred.div(variance.add_scalar(EPSILON).sqrt())
    }

    /// Features `[N, features]` to embeddings `[N, dim]`, rows of unit norm.
    #[must_use]
    pub fn forward(&self, features: Tensor<2>) -> Tensor<2> {
        to_unit_rows(self.input(features).matmul(self.weight.val()).add(self.bias.val().unsqueeze()))
    }
}

/// Scales rows to unit norm.
#[must_use]
pub fn to_unit_rows(rows: Tensor<2>) -> Tensor<2> {
    let norm = rows.clone().powi_scalar(2).sum_dim(1).sqrt().clamp_min(SMALLEST_NORM);
    rows.div(norm)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops where something is off")]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::model::read;

    #[test]
    fn layer_norm_divides_by_the_biased_deviation() {
        let device = Device::flex();
        let head = EmbeddingHead::new(4, 2, &device).with_kind(HeadKind::LayerNormLinear);
        let features = Tensor::from_data(TensorData::from([[1.0f32, 2.0, 3.0, 6.0], [0.5; 4]]), &device);
        let got = read(head.input(features)).unwrap();
        let deviation = (3.5f32 + 1e-5).sqrt();
        let want = [-2.0, -1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0].map(|centred: f32| centred / deviation);
        assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-6), "{got:?}, not {want:?}");
    }

    #[test]
    fn initial_weights_fill_the_range_of_xavier() {
        let weights = read(EmbeddingHead::new(96, 32, &Device::flex()).weight.val()).unwrap();
        let most = weights.iter().fold(0.0f32, |most, weight| most.max(weight.abs()));
        let bound = (6.0f32 / 128.0).sqrt();
        assert!(most <= bound && most > 0.98 * bound, "{most} of {bound}");
    }
}
