//! Pooling of a backbone's output to a feature vector for each picture.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};

/// Lower bound of the values in the generalised mean.
const SMALLEST: f32 = 1e-6;

/// Initial exponent of the generalised mean; 1 would be the average, infinity the maximum.
const EXPONENT: f64 = 3.0;

/// Output of a backbone.
#[derive(Debug, Clone)]
pub enum Features {
    /// `[N, C, H, W]`.
    Map(Tensor<4>),
    /// `[N, 1 + T, C]`: the class token, then one for each patch.
    Tokens(Tensor<3>),
}

/// How features are pooled over the picture.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum PoolingKind {
    /// The average.
    #[default]
    Avg,
    /// The maximum.
    Max,
    /// The sum of average and maximum.
    #[value(name = "avg+max")]
    #[serde(rename = "avg+max")]
    AvgMax,
    /// The generalised mean (GeM), with a learned exponent that starts at 3.
    Gem,
    /// The class token (vision transformers).
    Cls,
}

/// Pools features.
#[derive(Module, Debug)]
pub struct Pooling {
    /// The generalised mean's exponent.
    exponent: Option<Param<Tensor<1>>>,
    #[module(skip)]
    kind: PoolingKind,
}

impl Pooling {
    /// A pooling of this `kind`; only the generalised mean has a weight.
    #[must_use]
    pub fn new(kind: PoolingKind, device: &Device) -> Self {
        let exponent = || Initializer::Constant { value: EXPONENT }.init([1], device);
        Self { exponent: (kind == PoolingKind::Gem).then(exponent), kind }
    }

    /// Features to vectors `[N, C]`.
    #[must_use]
    pub fn forward(&self, features: Features) -> Tensor<2> {
        // Positions last: `[N, C, T]`.
        let (places, class) = match features {
            Features::Map(map) => {
                let [count, channels, height, width] = map.dims();
                (map.reshape([count, channels, height * width]), None)
            }
            Features::Tokens(tokens) => {
                let [count, length, channels] = tokens.dims();
                let class = tokens.clone().slice([0..count, 0..1, 0..channels]).reshape([count, channels]);
                (tokens.slice([0..count, 1..length, 0..channels]).swap_dims(1, 2), Some(class))
            }
        };
        let [count, channels, _] = places.dims();
        let pooled = match (self.kind, class) {
            (PoolingKind::Cls, Some(class)) => return class,
            // `BackboneKind::validate` refuses `Cls` for a map.
            (PoolingKind::Avg | PoolingKind::Cls, _) => places.mean_dim(2),
            (PoolingKind::Max, _) => places.max_dim(2),
            (PoolingKind::AvgMax, _) => places.clone().mean_dim(2) + places.max_dim(2),
            (PoolingKind::Gem, _) => self.generalised_mean(places),
        };
        pooled.reshape([count, channels])
    }

    /// `mean(x^p)^(1/p)`, with x clamped to at least `SMALLEST`.
    fn generalised_mean(&self, places: Tensor<3>) -> Tensor<3> {
        let Some(exponent) = &self.exponent else { return places.mean_dim(2) };
        let exponent = exponent.val().reshape([1, 1, 1]);
        let powers = (places.clamp_min(SMALLEST).log() * exponent.clone()).exp();
        (powers.mean_dim(2).log() / exponent).exp()
    }
}
