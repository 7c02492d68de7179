//! A backbone of five 3 x 3 convolutions, each normalised, that gives every pixel of a scene features.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};
use ddtas_train::model::layers::{self, ConvolutionOptions};
use ddtas_train::model::{Activation, BatchNorm, Normalise};

/// Channels of the features.
pub const WIDTH: usize = 24;
/// Number of convolutions; the receptive field is 11 x 11 pixels.
const DEPTH: usize = 5;

/// A convolution with batch normalisation and ReLU.
#[derive(Module, Debug)]
struct Layer {
    weight: Param<Tensor<4>>,
    norm: BatchNorm,
}

/// A network from scenes to features of their pixels.
#[derive(Module, Debug)]
pub struct Backbone {
    layers: Vec<Layer>,
}

impl Backbone {
    /// A backbone with random weights, drawn from the device's generator.
    pub fn new(device: &Device) -> Self {
        let layer = |index: usize| {
            let channels = if index == 0 { 3 } else { WIDTH };
            let initializer = Initializer::KaimingNormal { gain: 2f64.sqrt(), fan_out_only: true };
            let fans = [channels, WIDTH].map(|channels| Some(channels * 9));
            let shape = [WIDTH, channels, 3, 3];
            Layer {
                weight: initializer.init_with(shape, fans[0], fans[1], device),
                norm: BatchNorm::new(WIDTH, Activation::Relu, device),
            }
        };
        Self { layers: (0..DEPTH).map(layer).collect() }
    }

    /// `[N, 3, H, W]` to `[N, H * W, WIDTH]`, pixels row by row.
    pub fn forward(&self, scenes: Tensor<4>, mode: Normalise) -> Tensor<3> {
        let mut activation = scenes;
        for layer in &self.layers {
            let options = ConvolutionOptions::new(1, 1);
            activation =
                layer.norm.forward(layers::convolution(activation, layer.weight.val(), options), mode);
        }
        let [count, channels, height, width] = activation.dims();
        activation.permute([0, 2, 3, 1]).reshape([count, height * width, channels])
    }
}
