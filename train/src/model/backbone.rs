//! A small residual network for images of any size (He et al., 2016, basic blocks).

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};

use super::batch_norm::{BatchNorm, Normalise};
use super::layers;

/// A convolution with batch normalisation, and ReLU on request.
#[derive(Module, Debug)]
pub struct NormalisedConvolution {
    weight: Param<Tensor<4>>,
    norm: BatchNorm,
    stride: usize,
}

impl NormalisedConvolution {
    fn new(channels: [usize; 2], kernel: usize, stride: usize, relu: bool, device: &Device) -> Self {
        let [channels_in, channels_out] = channels;
        let (fan_in, fan_out) = (channels_in * kernel * kernel, channels_out * kernel * kernel);
        let initializer = Initializer::KaimingNormal { gain: 2f64.sqrt(), fan_out_only: true };
        let shape = [channels_out, channels_in, kernel, kernel];
        Self {
            weight: initializer.init_with(shape, Some(fan_in), Some(fan_out), device),
            norm: BatchNorm::new(channels_out, relu, device),
            stride,
        }
    }

    fn forward(&self, input: Tensor<4>, mode: Normalise) -> Tensor<4> {
        self.norm.forward(layers::convolution(input, self.weight.val(), self.stride), mode)
    }
}

/// Two convolutions and a shortcut.
#[derive(Module, Debug)]
pub struct ResidualBlock {
    first: NormalisedConvolution,
    second: NormalisedConvolution,
    /// Where width or size change, the shortcut is a 1 x 1 convolution.
    shortcut: Option<NormalisedConvolution>,
}

impl ResidualBlock {
    fn new(channels: [usize; 2], stride: usize, device: &Device) -> Self {
        let [channels_in, channels_out] = channels;
        let projects = stride != 1 || channels_in != channels_out;
        Self {
            first: NormalisedConvolution::new(channels, 3, stride, true, device),
            second: NormalisedConvolution::new([channels_out, channels_out], 3, 1, false, device),
            shortcut: projects.then(|| NormalisedConvolution::new(channels, 1, stride, false, device)),
        }
    }

    fn forward(&self, input: Tensor<4>, mode: Normalise) -> Tensor<4> {
        let inner = self.second.forward(self.first.forward(input.clone(), mode), mode);
        let shortcut = match &self.shortcut {
            Some(projection) => projection.forward(input, mode),
            None => input,
        };
        layers::add_relu(inner, shortcut)
    }
}

/// A residual network: a stem, three stages that double the width and halve the size, a global average.
#[derive(Module, Debug)]
pub struct Backbone {
    stem: NormalisedConvolution,
    blocks: Vec<ResidualBlock>,
    features: usize,
}

/// Number of stages.
const STAGES: usize = 3;

impl Backbone {
    /// A network with `width` channels in the first stage and `depth` blocks a stage.
    #[must_use]
    pub fn new(width: usize, depth: usize, device: &Device) -> Self {
        let mut blocks = Vec::new();
        let mut channels = width;
        for stage in 0..STAGES {
            for block in 0..depth {
                let opens = stage > 0 && block == 0;
                let channels_out = width << stage;
                blocks.push(ResidualBlock::new([channels, channels_out], if opens { 2 } else { 1 }, device));
                channels = channels_out;
            }
        }
        Self { stem: NormalisedConvolution::new([3, width], 3, 1, true, device), blocks, features: channels }
    }

    /// Length of a feature vector.
    #[must_use]
    pub fn features(&self) -> usize {
        self.features
    }

    /// Images `[N, 3, H, W]` to feature vectors `[N, features]`.
    #[must_use]
    pub fn forward(&self, images: Tensor<4>, mode: Normalise) -> Tensor<2> {
        let mut activation = self.stem.forward(images, mode);
        for block in &self.blocks {
            activation = block.forward(activation, mode);
        }
        let [count, channels, height, width] = activation.dims();
        activation.reshape([count, channels, height * width]).mean_dim(2).reshape([count, channels])
    }
}
