//! A small residual network for pictures of any size, trained from random weights: a stem, then three stages
//! of basic blocks (He et al., 2016). The second and third stage each double the channels and halve the side.

use burn::tensor::Device;

use super::graph::{Builder, Convolution, Graph};
use super::resnet::residual;
use crate::model::batch_norm::{Activation, NormOptions};

const STAGES: usize = 3;

/// A network with `width` channels in the first stage, `depth` blocks in each, and random weights.
pub(super) fn small(width: usize, depth: usize, device: &Device) -> Graph {
    let (builder, images) = Builder::new(NormOptions::new(Activation::Relu), device);
    let mut builder = builder.with_own_names();
    let names = |unit: String| [unit.clone(), unit + ".norm"];
    let mut last = builder.unit(names("stem".into()), Convolution::new(width, 3), images);
    for block in 0..STAGES * depth {
        let stage = block / depth;
        let stride = if stage > 0 && block % depth == 0 { 2 } else { 1 };
        let names = |unit| names(format!("blocks.{block}.{}", ["shortcut", "first", "second"][unit]));
        last = residual(&mut builder, names, (width << stage, stride, false), last);
    }
    builder.build(last)
}
