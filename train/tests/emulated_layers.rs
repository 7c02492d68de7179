//! The GPU backend's layers, compiled for the CPU, agree with the CPU backend's: outputs and gradients, for
//! the networks' shapes and random ones, to 2e-5 of the largest entry, as `tests/layers.rs` allows.

#![cfg(feature = "train-emulated")]
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

use burn::tensor::{Device, Tensor, TensorData};
use ddtas_train::model::layers::{self, Activation, ConvolutionOptions, NormaliseOptions, PoolOptions};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn values(random: &mut ChaCha8Rng, shape: &[usize]) -> TensorData {
    let count = shape.iter().product();
    // A sum of four uniform draws: nearly normal, with a standard deviation of 0.58.
    let draw = |_| (0..4).map(|_| random.random_range(-0.5f32..0.5)).sum::<f32>();
    TensorData::new((0..count).map(draw).collect::<Vec<f32>>(), shape.to_vec())
}

/// The values of several tensors.
type Values = Vec<Vec<f32>>;

fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

/// Asserts that `compute` gives nearly the CPU's result on the emulated GPU, and the same bits twice.
fn assert_same(what: &str, compute: impl Fn(&Device) -> Values) {
    let want = compute(&Device::flex().autodiff());
    let gpu = Device::cpu().autodiff();
    let got = compute(&gpu);
    let again = compute(&gpu);
    for (part, ((want, got), again)) in want.iter().zip(&got).zip(&again).enumerate() {
        assert_eq!(want.len(), got.len(), "{what}, part {part}");
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert!(bits(got) == bits(again), "{what}, part {part}: another result the second time");
        let largest = want.iter().fold(1e-3f32, |most, value| most.max(value.abs()));
        let off = want.iter().zip(got).fold(0.0f32, |most, (want, got)| {
            let off = (want - got).abs();
            // max() would ignore a NaN.
            if off.is_nan() { f32::INFINITY } else { most.max(off) }
        });
        assert!(off <= 2e-5 * largest, "{what}, part {part}: off by {off}, largest entry {largest}");
    }
}

/// A convolution; `shape`: `[images, channels in, channels out, height, width]`.
#[derive(Debug, Clone, Copy)]
struct Convolution {
    shape: [usize; 5],
    kernel: usize,
    options: ConvolutionOptions,
}

impl Convolution {
    /// Compares the output and both gradients on random values.
    fn check(&self, random: &mut ChaCha8Rng) {
        let [images, channels_in, channels_out, height, width] = self.shape;
        let per_group = if self.options.depthwise { 1 } else { channels_in };
        let input = values(random, &[images, channels_in, height, width]);
        let weight = values(random, &[channels_out, per_group, self.kernel, self.kernel]);
        let [out_height, out_width] = self.options.output([height, width], self.kernel);
        let probe = values(random, &[images, channels_out, out_height, out_width]);
        assert_same(&format!("{self:?}"), |device| {
            let input = Tensor::<4>::from_data(input.clone(), device).require_grad();
            let weight = Tensor::<4>::from_data(weight.clone(), device).require_grad();
            let output = layers::convolution(input.clone(), weight.clone(), self.options);
            let probe = Tensor::<4>::from_data(probe.clone(), device);
            let gradients = (output.clone() * probe).sum().backward();
            vec![read(output), read(input.grad(&gradients).unwrap()), read(weight.grad(&gradients).unwrap())]
        });
    }
}

/// Padding before and behind a side, as TensorFlow's `SAME`.
fn around(side: usize, kernel: usize, stride: usize) -> [usize; 2] {
    let total = ((side.div_ceil(stride) - 1) * stride + kernel).saturating_sub(side);
    [total / 2, total - total / 2]
}

/// Every kind of dense convolution in the networks: channels in, channels out, kernel, stride, side. Sides
/// are smaller than in training.
const DENSE: [[usize; 5]; 23] = [
    // The default network, at 12 pixels.
    [3, 16, 3, 1, 12],
    [16, 16, 3, 1, 12],
    [16, 32, 3, 2, 12],
    [16, 32, 1, 2, 12],
    [32, 64, 3, 2, 6],
    // ResNet-18 and ResNet-50.
    [3, 64, 7, 2, 33],
    [64, 64, 3, 1, 9],
    [64, 128, 3, 2, 9],
    [64, 128, 1, 2, 9],
    [128, 128, 3, 2, 7],
    [64, 256, 1, 1, 5],
    [256, 64, 1, 1, 5],
    [256, 512, 1, 2, 5],
    [512, 512, 3, 1, 2],
    // BN-Inception.
    [64, 192, 3, 1, 6],
    [192, 32, 1, 1, 6],
    [320, 96, 3, 2, 4],
    [1024, 352, 1, 1, 2],
    // EfficientNet-Lite0; its stem is tested below, with TensorFlow's padding.
    [16, 96, 1, 1, 9],
    [144, 24, 1, 1, 6],
    [672, 192, 1, 1, 3],
    [320, 1280, 1, 1, 2],
    // ViT-S/16.
    [3, 384, 16, 16, 32],
];

#[test]
fn convolutions_of_the_networks() {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for [channels_in, channels_out, kernel, stride, side] in DENSE {
        let options = ConvolutionOptions::new(stride, kernel / 2);
        let shape = [2, channels_in, channels_out, side, side];
        Convolution { shape, kernel, options }.check(&mut random);
    }
    for side in [12, 13, 24, 25] {
        let padding = [around(side, 3, 2); 2];
        let options = ConvolutionOptions { stride: 2, padding, depthwise: false };
        Convolution { shape: [3, 3, 32, side, side], kernel: 3, options }.check(&mut random);
    }
    // Depthwise convolutions of EfficientNet-Lite0: channels, kernel, stride, side.
    for [channels, kernel, stride, side] in [
        [32, 3, 1, 24],
        [96, 3, 2, 25],
        [144, 3, 1, 12],
        [144, 5, 2, 12],
        [240, 5, 1, 7],
        [240, 3, 2, 7],
        [480, 3, 1, 4],
        [480, 5, 1, 3],
        [672, 5, 2, 3],
        [1152, 5, 1, 2],
        [1152, 3, 1, 1],
    ] {
        let padding = [around(side, kernel, stride); 2];
        let options = ConvolutionOptions { stride, padding, depthwise: true };
        Convolution { shape: [3, channels, channels, side, side], kernel, options }.check(&mut random);
    }
}

fn drawn(random: &mut ChaCha8Rng) -> Convolution {
    let kernel = [1usize, 2, 3, 4, 5, 7][random.random_range(0..6)];
    let stride = random.random_range(1..4);
    let depthwise = random.random_bool(0.4);
    let padding = [0; 2].map(|_| [0; 2].map(|_| random.random_range(0..=kernel / 2 + 1)));
    let side = |[before, behind]: [usize; 2], random: &mut ChaCha8Rng| {
        let least = kernel.saturating_sub(before + behind).max(1);
        least + random.random_range(0..14)
    };
    let (height, width) = (side(padding[0], random), side(padding[1], random));
    // Kernels read multiples of 4 channels four at a time.
    let channels = |random: &mut ChaCha8Rng| {
        let count = random.random_range(1..10);
        if random.random_bool(0.6) { 4 * count } else { count }
    };
    let channels_in = channels(random);
    let channels_out = if depthwise { channels_in } else { channels(random) };
    Convolution {
        shape: [random.random_range(1..5), channels_in, channels_out, height, width],
        kernel,
        options: ConvolutionOptions { stride, padding, depthwise },
    }
}

#[test]
fn drawn_convolutions() {
    let mut random = ChaCha8Rng::seed_from_u64(2);
    for _ in 0..60 {
        drawn(&mut random).check(&mut random);
    }
}

#[test]
fn normalisations() {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let shapes =
        [[5, 7, 6, 9], [1, 1, 1, 2], [3, 8, 1, 1], [2, 24, 13, 5], [40, 16, 12, 12], [2, 1280, 3, 3]];
    for (shape, activation) in shapes
        .into_iter()
        .flat_map(|shape| [Activation::None, Activation::Relu, Activation::Relu6].map(|a| (shape, a)))
    {
        let (input, probe) = (values(&mut random, &shape), values(&mut random, &shape));
        let gamma = values(&mut random, &[shape[1]]);
        let beta = values(&mut random, &[shape[1]]);
        for from_batch in [true, false] {
            assert_same(&format!("{shape:?}, {activation:?}, from batch: {from_batch}"), |device| {
                // A mean of 20 standard deviations: the variance as a difference of squares would cancel.
                let input = (Tensor::<4>::from_data(input.clone(), device) * 3.0 + 35.0).require_grad();
                let gamma = (Tensor::<1>::from_data(gamma.clone(), device) * 4.0).require_grad();
                let beta = Tensor::<1>::from_data(beta.clone(), device).require_grad();
                let statistics = if from_batch {
                    layers::batch_statistics(input.clone())
                } else {
                    let mean = Tensor::full([1, shape[1]], 34.0, device);
                    Tensor::cat(vec![mean, Tensor::full([1, shape[1]], 3.0, device)], 0)
                };
                let options = NormaliseOptions { epsilon: 1e-3, activation, from_batch };
                let output = layers::normalise(
                    input.clone(),
                    statistics.clone(),
                    gamma.clone(),
                    beta.clone(),
                    options,
                );
                let probe = Tensor::<4>::from_data(probe.clone(), device);
                let gradients = (output.clone() * probe).sum().backward();
                vec![
                    read(statistics),
                    read(output),
                    read(input.grad(&gradients).unwrap()),
                    read(gamma.grad(&gradients).unwrap()),
                    read(beta.grad(&gradients).unwrap()),
                ]
            });
        }
    }
}

#[test]
fn residual_sums() {
    let mut random = ChaCha8Rng::seed_from_u64(4);
    for shape in [[3, 4, 5, 6], [1, 1, 1, 1], [2, 9, 7, 3]] {
        let [a, b, probe] = [0; 3].map(|_| values(&mut random, &shape));
        assert_same(&format!("{shape:?}"), |device| {
            let a = Tensor::<4>::from_data(a.clone(), device).require_grad();
            let b = Tensor::<4>::from_data(b.clone(), device).require_grad();
            let output = layers::add_relu(a.clone(), b.clone());
            let gradients = (output.clone() * Tensor::from_data(probe.clone(), device)).sum().backward();
            vec![read(output), read(a.grad(&gradients).unwrap()), read(b.grad(&gradients).unwrap())]
        });
    }
}

#[test]
fn maximum_poolings() {
    let mut random = ChaCha8Rng::seed_from_u64(6);
    for ([height, width], [stride, padding], ceil) in
        [([12, 13], [2, 1], false), ([12, 9], [2, 0], true), ([4, 3], [1, 1], true)]
    {
        let options = PoolOptions { stride, padding, ceil };
        let shape = [2, 5, options.side(height), options.side(width)];
        let [input, probe] = [[2, 5, height, width], shape].map(|shape| values(&mut random, &shape));
        assert_same(&format!("{height} x {width}, {options:?}"), |device| {
            let input = Tensor::<4>::from_data(input.clone(), device).require_grad();
            let output = layers::max_pool(input.clone(), options);
            let gradients = (output.clone() * Tensor::from_data(probe.clone(), device)).sum().backward();
            vec![read(output), read(input.grad(&gradients).unwrap())]
        });
    }
}

/// Slow, since every unit is a thread and they wait for each other: ignored unless asked for
/// (.ci/train-cuda.sh). Needs its own process, since `emulate_whole_cubes` holds for the rest of it.
#[test]
#[ignore = "minutes; run alone"]
fn cubes_as_large_as_a_gpus() {
    layers::emulate_whole_cubes();
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let dense = |shape, kernel, stride| {
        let options = ConvolutionOptions::new(stride, kernel / 2);
        Convolution { shape, kernel, options }
    };
    dense([1, 4, 36, 6, 6], 3, 1).check(&mut random);
    dense([2, 5, 3, 6, 5], 3, 2).check(&mut random);
    let options = ConvolutionOptions { stride: 1, padding: [[1, 1], [1, 1]], depthwise: true };
    Convolution { shape: [2, 12, 12, 9, 6], kernel: 3, options }.check(&mut random);
    let input = values(&mut random, &[3, 24, 20, 20]);
    assert_same("statistics", |device| {
        vec![read(layers::batch_statistics(Tensor::from_data(input.clone(), device)))]
    });
}
