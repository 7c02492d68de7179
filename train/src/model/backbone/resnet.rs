//! ResNet-18 and ResNet-50 (He et al., 2016) with the tensor names of torchvision. As there, the 3 x 3
//! convolution of a bottleneck has the stride.

use burn::tensor::Device;

use super::graph::{Builder, Convolution, Graph, Pool, Value};
use crate::model::batch_norm::{Activation, NormOptions};
use crate::model::layers::PoolOptions;

/// Channels inside the blocks of the four stages.
const WIDTHS: [usize; 4] = [64, 128, 256, 512];

/// Ratio of a bottleneck's output channels to its inner channels.
const EXPANSION: usize = 4;

/// ResNet-18 with random weights.
pub(super) fn resnet18(device: &Device) -> Graph {
    resnet([2, 2, 2, 2], false, device)
}

/// ResNet-50 with random weights.
pub(super) fn resnet50(device: &Device) -> Graph {
    resnet([3, 4, 6, 3], true, device)
}

fn resnet(blocks: [usize; 4], bottleneck: bool, device: &Device) -> Graph {
    let (mut builder, images) = Builder::new(NormOptions::new(Activation::Relu), device);
    let stem = Convolution { stride: 2, ..Convolution::new(WIDTHS[0], 7) };
    let stem = builder.unit(["conv1".into(), "bn1".into()], stem, images);
    let mut last = builder.pool(Pool::Max(PoolOptions { stride: 2, padding: 1, ceil: false }), stem);
    for (stage, (width, blocks)) in WIDTHS.into_iter().zip(blocks).enumerate() {
        for block in 0..blocks {
            let stride = if stage > 0 && block == 0 { 2 } else { 1 };
            let name = format!("layer{}.{block}", stage + 1);
            let names = |unit| match unit {
                0 => [format!("{name}.downsample.0"), format!("{name}.downsample.1")],
                unit => [format!("{name}.conv{unit}"), format!("{name}.bn{unit}")],
            };
            last = residual(&mut builder, names, (width, stride, bottleneck), last);
        }
    }
    builder.build(last)
}

/// A block: convolutions and a shortcut, which has a 1 x 1 convolution if channels or side change. `names(0)`
/// are the names of the shortcut, `names(1)` and so on those of the convolutions.
pub(super) fn residual(
    builder: &mut Builder,
    names: impl Fn(usize) -> [String; 2],
    (width, stride, bottleneck): (usize, usize, bool),
    input: Value,
) -> Value {
    let convolutions = if bottleneck {
        let wide = Convolution::new(EXPANSION * width, 1);
        vec![Convolution::new(width, 1), Convolution { stride, ..Convolution::new(width, 3) }, wide]
    } else {
        vec![Convolution { stride, ..Convolution::new(width, 3) }, Convolution::new(width, 3)]
    };
    let count = convolutions.len();
    let mut last = input;
    for (number, convolution) in (1..).zip(convolutions) {
        let activation = if number == count { Activation::None } else { Activation::Relu };
        let convolution = Convolution { activation, ..convolution };
        last = builder.unit(names(number), convolution, last);
    }
    let shortcut = if stride == 1 && input.channels == last.channels {
        input
    } else {
        let projection = Convolution::new(last.channels, 1);
        let projection = Convolution { stride, activation: Activation::None, ..projection };
        builder.unit(names(0), projection, input)
    };
    builder.add(last, shortcut, true)
}
