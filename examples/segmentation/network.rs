//! A small network that gives every pixel an embedding: five 3 x 3 convolutions, then the
//! embedding head of the training engine on each pixel.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use ddtas::model::{BatchNorm, EmbeddingHead, Normalise, layers};

use crate::scenes::{SIDE, Scene};

/// Channels between the convolutions.
const WIDTH: usize = 24;
/// Convolutions; a pixel sees 11 x 11 others.
const DEPTH: usize = 5;

/// A convolution, normalised and cut at zero.
#[derive(Module, Debug)]
struct Layer {
    weight: Param<Tensor<4>>,
    norm: BatchNorm,
}

/// Scenes to unit embeddings of their pixels.
#[derive(Module, Debug)]
pub struct PixelNetwork {
    layers: Vec<Layer>,
    head: EmbeddingHead,
}

impl PixelNetwork {
    /// A network with random weights, drawn from the device's generator.
    pub fn new(dim: usize, device: &Device) -> Self {
        let layer = |index: usize| {
            let channels = if index == 0 { 3 } else { WIDTH };
            let initializer = Initializer::KaimingNormal { gain: 2f64.sqrt(), fan_out_only: true };
            let fans = [channels, WIDTH].map(|channels| Some(channels * 9));
            let shape = [WIDTH, channels, 3, 3];
            Layer {
                weight: initializer.init_with(shape, fans[0], fans[1], device),
                norm: BatchNorm::new(WIDTH, true, device),
            }
        };
        Self { layers: (0..DEPTH).map(layer).collect(), head: EmbeddingHead::new(WIDTH, dim, device) }
    }

    /// `[N, 3, H, W]` to `[N * H * W, dim]`, pixels row by row.
    pub fn forward(&self, scenes: Tensor<4>, mode: Normalise) -> Tensor<2> {
        let mut activation = scenes;
        for layer in &self.layers {
            activation = layer.norm.forward(layers::convolution(activation, layer.weight.val(), 1), mode);
        }
        let [count, channels, height, width] = activation.dims();
        self.head.forward(activation.permute([0, 2, 3, 1]).reshape([count * height * width, channels]))
    }
}

/// Scenes as a tensor, pixel values around zero.
pub fn tensor(scenes: &[Scene], device: &Device) -> Tensor<4> {
    let values: Vec<f32> =
        scenes.iter().flat_map(|scene| scene.pixels.iter().map(|v| 2.0 * v - 1.0)).collect();
    Tensor::from_data(TensorData::new(values, [scenes.len(), 3, SIDE, SIDE]), device)
}
