//! A small network that gives every pixel an embedding: the backbone, then the embedding head of the
//! training engine on each pixel.

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use ddtas_train::model::{EmbeddingHead, Normalise};

use crate::backbone::{Backbone, WIDTH};
use crate::scenes::{SIDE, Scene};

/// A network from scenes to unit embeddings of their pixels.
#[derive(Module, Debug)]
pub struct PixelNetwork {
    backbone: Backbone,
    head: EmbeddingHead,
}

impl PixelNetwork {
    /// A network with random weights, drawn from the device's generator.
    pub fn new(dim: usize, device: &Device) -> Self {
        Self { backbone: Backbone::new(device), head: EmbeddingHead::new(WIDTH, dim, device) }
    }

    /// `[N, 3, H, W]` to `[N * H * W, dim]`, pixels row by row.
    pub fn forward(&self, scenes: Tensor<4>, mode: Normalise) -> Tensor<2> {
        let features = self.backbone.forward(scenes, mode);
        let [count, pixels, channels] = features.dims();
        self.head.forward(features.reshape([count * pixels, channels]))
    }
}

/// Scenes as a tensor, with pixel values from -1 to 1.
pub fn tensor(scenes: &[Scene], device: &Device) -> Tensor<4> {
    let values: Vec<f32> =
        scenes.iter().flat_map(|scene| scene.pixels.iter().map(|v| 2.0 * v - 1.0)).collect();
    Tensor::from_data(TensorData::new(values, [scenes.len(), 3, SIDE, SIDE]), device)
}
