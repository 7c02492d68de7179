//! Networks from images to features, by name.
//!
//! | file | what |
//! | --- | --- |
//! | `graph.rs` | convolutional networks as lists of steps, with the names of their tensors in files |
//! | `residual.rs`, `efficientnet.rs`, `resnet.rs`, `bn_inception.rs` | the convolutional networks |
//! | `vision_transformer.rs` | ViT-S/16 |

mod bn_inception;
mod efficientnet;
mod graph;
mod residual;
mod resnet;
mod vision_transformer;

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use graph::Graph;
use vision_transformer::VisionTransformer;

use super::NetworkShape;
use super::batch_norm::Normalise;
use super::pooling::{Features, PoolingKind};
use crate::data::Preprocessing;
use crate::{Error, Result};

/// The backbone network.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum BackboneKind {
    /// A small residual network (--width, --depth) without published weights.
    #[default]
    Residual,
    /// EfficientNet-Lite0 with published weights, 3.4 M.
    EfficientnetLite0,
    /// ResNet-18 with torchvision's weights, 11.2 M.
    Resnet18,
    /// ResNet-50 with torchvision's weights, 23.5 M.
    Resnet50,
    /// BN-Inception with pretrainedmodels' weights, 10.3 M.
    BnInception,
    /// The vision transformer ViT-S/16 with DINO's weights, 21.7 M.
    VitS16,
    /// The same network with timm's AugReg weights, which take pictures scaled to -1..1.
    VitS16Augreg,
}

impl BackboneKind {
    /// The preprocessing that the network expects.
    #[must_use]
    pub fn preprocessing(self) -> Preprocessing {
        match self {
            Self::Residual | Self::Resnet18 | Self::Resnet50 | Self::VitS16 => Preprocessing::default(),
            Self::EfficientnetLite0 => Preprocessing::centred(),
            Self::BnInception => Preprocessing::caffe(),
            Self::VitS16Augreg => Preprocessing::symmetric(),
        }
    }

    fn is_transformer(self) -> bool {
        matches!(self, Self::VitS16 | Self::VitS16Augreg)
    }

    /// Whether the network has batch normalisation.
    pub(crate) fn has_batch_norm(self) -> bool {
        !self.is_transformer()
    }

    /// Default pooling of the features.
    #[must_use]
    pub fn pooling(self) -> PoolingKind {
        if self.is_transformer() { PoolingKind::Cls } else { PoolingKind::Avg }
    }

    /// Checks the settings that the backbone is combined with.
    ///
    /// # Errors
    /// [`Misused`](ddtas_io::Error::Misused) names the setting that does not fit.
    pub fn validate(self, pooling: Option<PoolingKind>, has_weights: bool, image_size: usize) -> Result<()> {
        if self == Self::BnInception && !bn_inception::takes(image_size) {
            return Err(Error::misuse(
                "image-size",
                image_size,
                "must be a size that bn-inception can halve: 96, 128, 160, 192, 224 or 227, for example",
            ));
        }
        let invalid = |name, value: &str, reason| Err(Error::misuse(name, value, reason));
        if has_weights && self == Self::Residual {
            return invalid(
                "weights",
                "",
                "needs --backbone NAME: there are no published weights of the residual network",
            );
        }
        if self.is_transformer() && !image_size.is_multiple_of(vision_transformer::PATCH) {
            return Err(Error::misuse(
                "image-size",
                image_size,
                "must be a multiple of 16: the vision transformer cuts pictures into patches of 16 x 16",
            ));
        }
        if !self.is_transformer() && pooling == Some(PoolingKind::Cls) {
            return invalid(
                "pooling",
                "cls",
                "give avg, max, avg+max or gem: only the vision transformer has a class token",
            );
        }
        Ok(())
    }

    /// Side of the pictures that the published weights were trained on; none for the small network.
    #[must_use]
    pub fn image_size(self) -> Option<usize> {
        (self != Self::Residual).then_some(224)
    }
}

/// A network from images to features.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "a process has one, or a few copies")]
pub enum Backbone {
    /// A convolutional network.
    Graph(Graph),
    /// The vision transformer.
    VisionTransformer(VisionTransformer),
}

impl Backbone {
    /// A network of this `shape` with random weights.
    #[must_use]
    pub fn new(shape: &NetworkShape, device: &Device) -> Self {
        match shape.backbone {
            BackboneKind::Residual => Self::Graph(residual::small(shape.width, shape.depth, device)),
            BackboneKind::EfficientnetLite0 => Self::Graph(efficientnet::lite0(device)),
            BackboneKind::Resnet18 => Self::Graph(resnet::resnet18(device)),
            BackboneKind::Resnet50 => Self::Graph(resnet::resnet50(device)),
            BackboneKind::VitS16 | BackboneKind::VitS16Augreg => {
                Self::VisionTransformer(VisionTransformer::small(device))
            }
            BackboneKind::BnInception => Self::Graph(bn_inception::bn_inception(device)),
        }
    }

    /// Length of a feature vector.
    #[must_use]
    pub fn features(&self) -> usize {
        match self {
            Self::Graph(network) => network.features(),
            Self::VisionTransformer(network) => network.features(),
        }
    }

    /// Lower bound on the values in memory at once in a forward pass of one picture of this `side`.
    pub(crate) fn least_values(&self, side: usize) -> usize {
        match self {
            Self::Graph(network) => network.least_values(side),
            Self::VisionTransformer(_) => VisionTransformer::least_values(side),
        }
    }

    /// Images `[N, 3, H, W]` to features.
    #[must_use]
    pub fn forward(&self, images: Tensor<4>, mode: Normalise) -> Features {
        match self {
            Self::Graph(network) => Features::Map(network.forward(images, mode)),
            Self::VisionTransformer(network) => Features::Tokens(network.forward(images)),
        }
    }

    /// Name in files of the tensor with Burn's path `path`.
    #[must_use]
    pub fn file_name(&self, path: &str) -> String {
        match self {
            Self::Graph(network) => network.file_name(path),
            // The transformer's fields have timm's names.
            Self::VisionTransformer(_) => path.to_owned(),
        }
    }
}
