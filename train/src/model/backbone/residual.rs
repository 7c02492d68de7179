//! A small residual network for images of any size (He et al., 2016, basic blocks).

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};

use crate::model::batch_norm::{Activation, BatchNorm, Normalise};
use crate::model::layers::{self, ConvolutionOptions};

/// A convolution with batch normalisation, and ReLU on request.
#[derive(Module, Debug)]
pub struct NormalisedConvolution {
    weight: Param<Tensor<4>>,
    norm: BatchNorm,
    kernel: usize,
    stride: usize,
}

impl NormalisedConvolution {
    fn new(
        channels: [usize; 2],
        kernel: usize,
        stride: usize,
        activation: Activation,
        device: &Device,
    ) -> Self {
        let [channels_in, channels_out] = channels;
        let (fan_in, fan_out) = (channels_in * kernel * kernel, channels_out * kernel * kernel);
        let initializer = Initializer::KaimingNormal { gain: 2f64.sqrt(), fan_out_only: true };
        let shape = [channels_out, channels_in, kernel, kernel];
        Self {
            weight: initializer.init_with(shape, Some(fan_in), Some(fan_out), device),
            norm: BatchNorm::new(channels_out, activation, device),
            kernel,
            stride,
        }
    }

    fn forward(&self, input: Tensor<4>, mode: Normalise) -> Tensor<4> {
        let options = ConvolutionOptions::new(self.stride, self.kernel / 2);
        self.norm.forward(layers::convolution(input, self.weight.val(), options), mode)
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
            first: NormalisedConvolution::new(channels, 3, stride, Activation::Relu, device),
            second: NormalisedConvolution::new([channels_out, channels_out], 3, 1, Activation::None, device),
            shortcut: projects
                .then(|| NormalisedConvolution::new(channels, 1, stride, Activation::None, device)),
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

/// A residual network: a stem, then three stages that double the width and halve the size.
#[derive(Module, Debug)]
pub struct Residual {
    stem: NormalisedConvolution,
    blocks: Vec<ResidualBlock>,
    features: usize,
}

/// Number of stages.
const STAGES: usize = 3;

impl Residual {
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
        Self {
            stem: NormalisedConvolution::new([3, width], 3, 1, Activation::Relu, device),
            blocks,
            features: channels,
        }
    }

    /// Channels of the feature map.
    #[must_use]
    pub fn features(&self) -> usize {
        self.features
    }

    /// Values that a picture takes at least at once: the input of a first block, which is added in the end, and the input and
    /// the output of its second convolution.
    pub(super) fn least_values(&self, side: usize) -> usize {
        let [width, ..] = self.stem.weight.shape().dims::<4>();
        3 * width * side * side
    }

    /// Images `[N, 3, H, W]` to a feature map `[N, features, H / 4, W / 4]`.
    #[must_use]
    pub fn forward(&self, images: Tensor<4>, mode: Normalise) -> Tensor<4> {
        let mut activation = self.stem.forward(images, mode);
        for block in &self.blocks {
            activation = block.forward(activation, mode);
        }
        activation
    }
}
