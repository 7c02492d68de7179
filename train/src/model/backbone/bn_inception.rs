//! BN-Inception (Ioffe and Szegedy, 2015) with the tensor names of Cadene's pretrainedmodels. As there, convolutions have a
//! bias before their normalisation, and max-poolings round their output size up (ceil mode).

use burn::tensor::Device;

use super::graph::{Builder, Convolution, Graph, Pool, Value};
use crate::model::batch_norm::{Activation, NormOptions};
use crate::model::layers::PoolOptions;

/// Channels of an inception block's branches; 0 for a branch that the block does not have.
struct Block {
    name: &'static str,
    one: usize,
    three: [usize; 2],
    double: [usize; 2],
    /// Channels of the convolution after the pooling. If there is none, the block halves the map.
    projection: usize,
    pool: Pool,
}

const fn block(
    name: &'static str,
    one: usize,
    three: [usize; 2],
    double: [usize; 2],
    projection: usize,
) -> Block {
    Block { name, one, three, double, projection, pool: Pool::Average }
}

const HALVE: Pool = Pool::Max(PoolOptions { stride: 2, padding: 0, ceil: true });

const fn halving(name: &'static str, three: [usize; 2], double: [usize; 2]) -> Block {
    Block { name, one: 0, three, double, projection: 0, pool: HALVE }
}

const BLOCKS: [Block; 10] = [
    block("3a", 64, [64, 64], [64, 96], 32),
    block("3b", 64, [64, 96], [64, 96], 64),
    halving("3c", [128, 160], [64, 96]),
    block("4a", 224, [64, 96], [96, 128], 128),
    block("4b", 192, [96, 128], [96, 128], 128),
    block("4c", 160, [128, 160], [128, 160], 128),
    block("4d", 96, [128, 192], [160, 192], 128),
    halving("4e", [128, 192], [192, 256]),
    block("5a", 352, [192, 320], [160, 224], 128),
    Block {
        pool: Pool::Max(PoolOptions { stride: 1, padding: 1, ceil: true }),
        ..block("5b", 352, [192, 320], [192, 224], 128)
    },
];

/// The network with random weights.
pub(super) fn bn_inception(device: &Device) -> Graph {
    let (mut builder, images) = Builder::new(NormOptions::new(Activation::Relu), device);
    let mut last = unit(&mut builder, "conv1_7x7_s2", (64, 7, 2), images);
    last = builder.pool(HALVE, last);
    last = unit(&mut builder, "conv2_3x3_reduce", (64, 1, 1), last);
    last = unit(&mut builder, "conv2_3x3", (192, 3, 1), last);
    last = builder.pool(HALVE, last);
    for block in &BLOCKS {
        last = inception(&mut builder, block, last);
    }
    builder.build(last)
}

/// Whether the branches of every block have the same output size for pictures of side `size`. Poolings and
/// strided convolutions both round up, but differ in padding.
pub(super) fn takes(size: usize) -> bool {
    let halved = |side: usize| side.saturating_sub(3).div_ceil(2) + 1;
    let side = halved(halved(size.div_ceil(2)));
    side.is_multiple_of(4)
}

fn inception(builder: &mut Builder, block: &Block, input: Value) -> Value {
    let name = |part: &str| format!("inception_{}_{part}", block.name);
    let stride = if block.projection == 0 { 2 } else { 1 };
    let mut branches = Vec::new();
    if block.one > 0 {
        branches.push(unit(builder, &name("1x1"), (block.one, 1, 1), input));
    }
    let reduced = unit(builder, &name("3x3_reduce"), (block.three[0], 1, 1), input);
    branches.push(unit(builder, &name("3x3"), (block.three[1], 3, stride), reduced));
    let reduced = unit(builder, &name("double_3x3_reduce"), (block.double[0], 1, 1), input);
    let first = unit(builder, &name("double_3x3_1"), (block.double[1], 3, 1), reduced);
    branches.push(unit(builder, &name("double_3x3_2"), (block.double[1], 3, stride), first));
    let pooled = builder.pool(block.pool, input);
    branches.push(match block.projection {
        0 => pooled,
        channels => unit(builder, &name("pool_proj"), (channels, 1, 1), pooled),
    });
    builder.concat(&branches)
}

fn unit(
    builder: &mut Builder,
    name: &str,
    (channels, kernel, stride): (usize, usize, usize),
    input: Value,
) -> Value {
    let convolution = Convolution { stride, bias: true, ..Convolution::new(channels, kernel) };
    builder.unit([name.to_owned(), format!("{name}_bn")], convolution, input)
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_that_the_branches_agree_on() {
        for size in [96, 97, 128, 224, 227] {
            assert!(super::takes(size), "{size}");
        }
        for size in [80, 104, 112, 240] {
            assert!(!super::takes(size), "{size}");
        }
    }
}
