//! EfficientNet-Lite0 (Tan and Le, 2019; the Lite variant has ReLU6 and no squeeze-and-excitation), with the
//! tensor names of efficientnet_lite_pytorch.

use burn::tensor::Device;

use super::graph::{Builder, Convolution, Graph, Value};
use crate::model::batch_norm::{Activation, NormOptions};

/// Consecutive blocks with the same number of output channels.
struct Stage {
    blocks: usize,
    kernel: usize,
    /// Stride of the first block; the others have 1.
    stride: usize,
    /// Ratio of a block's inner channels to its input channels.
    expansion: usize,
    channels: usize,
}

const fn stage(blocks: usize, kernel: usize, stride: usize, expansion: usize, channels: usize) -> Stage {
    Stage { blocks, kernel, stride, expansion, channels }
}

const STAGES: [Stage; 7] = [
    stage(1, 3, 1, 1, 16),
    stage(2, 3, 2, 6, 24),
    stage(2, 5, 2, 6, 40),
    stage(3, 3, 2, 6, 80),
    stage(3, 5, 1, 6, 112),
    stage(4, 5, 2, 6, 192),
    stage(1, 3, 1, 6, 320),
];

const STEM: usize = 32;
const FEATURES: usize = 1280;

const NORM: NormOptions = NormOptions { epsilon: 1e-3, momentum: 0.01, activation: Activation::Relu6 };

/// The network with random weights.
pub(super) fn lite0(device: &Device) -> Graph {
    let (builder, images) = Builder::new(NORM, device);
    let mut builder = builder.with_tensorflow_padding();
    let stem = Convolution { stride: 2, ..relu6(STEM, 3) };
    let mut last = builder.unit(["_conv_stem".into(), "_bn0".into()], stem, images);
    let mut number = 0;
    for stage in &STAGES {
        for block in 0..stage.blocks {
            let stride = if block == 0 { stage.stride } else { 1 };
            last = inverted_residual(&mut builder, number, stage, stride, last);
            number += 1;
        }
    }
    let features = builder.unit(["_conv_head".into(), "_bn1".into()], relu6(FEATURES, 1), last);
    builder.build(features)
}

fn relu6(channels: usize, kernel: usize) -> Convolution {
    Convolution { activation: Activation::Relu6, ..Convolution::new(channels, kernel) }
}

/// A 1 x 1 convolution that expands the channels, a depthwise one, and a 1 x 1 one that reduces them; a
/// shortcut if input and output have the same shape.
fn inverted_residual(
    builder: &mut Builder,
    number: usize,
    stage: &Stage,
    stride: usize,
    input: Value,
) -> Value {
    let name = |part: &str| format!("_blocks.{number}.{part}");
    let inner = input.channels * stage.expansion;
    let mut last = input;
    if stage.expansion > 1 {
        last = builder.unit([name("_expand_conv"), name("_bn0")], relu6(inner, 1), last);
    }
    let depthwise = Convolution { depthwise: true, stride, ..relu6(inner, stage.kernel) };
    last = builder.unit([name("_depthwise_conv"), name("_bn1")], depthwise, last);
    let project = Convolution { activation: Activation::None, ..relu6(stage.channels, 1) };
    last = builder.unit([name("_project_conv"), name("_bn2")], project, last);
    if stride == 1 && input.channels == stage.channels { builder.add(last, input, false) } else { last }
}
