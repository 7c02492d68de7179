//! The hand-written layers agree with Burn's own operations, forward and backward.

use burn::tensor::activation::relu;
use burn::tensor::ops::{ConvOptions, MaxPoolOptions, PadMode};
use burn::tensor::{Device, Tensor, TensorData, Tolerance};
use ddtas_train::model::layers::{self, Activation, ConvolutionOptions, NormaliseOptions, PoolOptions};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Draws the same numbers in every run: with others, now and then a sum would lie so near to 0 or 6 that the two activations clamp
/// one of them only.
struct Draws {
    device: Device,
    rng: ChaCha8Rng,
}

impl Draws {
    fn new() -> Self {
        Self { device: Device::flex().autodiff(), rng: ChaCha8Rng::seed_from_u64(1) }
    }

    /// Numbers of variance 1.
    fn tensor<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        let most = 3.0f32.sqrt();
        let values: Vec<f32> =
            (0..shape.iter().product()).map(|_| self.rng.random_range(-most..most)).collect();
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }
}

fn assert_close<const D: usize>(what: &str, got: Tensor<D>, want: Tensor<D>) {
    let scale = want.clone().abs().max().into_scalar::<f32>().max(1e-3);
    let difference = (got - want).abs().max().into_scalar::<f32>();
    assert!(difference <= 2e-5 * scale, "{what}: off by {difference}, largest entry {scale}");
}

/// Images, channels in and out, height, width, kernel, stride.
const CONVOLUTIONS: [[usize; 7]; 15] = [
    [2, 3, 16, 12, 12, 3, 1],
    [3, 8, 8, 9, 7, 3, 1],
    [1, 5, 11, 13, 17, 3, 2],
    [20, 4, 6, 6, 6, 3, 2],
    [2, 16, 32, 24, 24, 1, 2],
    [2, 7, 9, 5, 11, 1, 1],
    [1, 1, 1, 1, 1, 3, 1],
    [33, 2, 3, 3, 3, 3, 1],
    [2, 3, 4, 20, 50, 5, 1],
    // Convolutions that become matrix products: 1 x 1 kernels, and many channels of small pictures.
    [40, 6, 10, 3, 3, 1, 1],
    [3, 6, 10, 24, 20, 1, 1],
    [30, 256, 20, 4, 3, 3, 1],
    [7, 260, 9, 7, 8, 3, 2],
    // So many weights that the tasks of the weight gradient share the outputs.
    [20, 264, 523, 3, 3, 3, 1],
    [4, 3, 20, 40, 33, 7, 2],
];

#[test]
fn convolution_and_its_gradients_equal_burns() {
    let mut draws = Draws::new();
    for [images, channels_in, channels_out, height, width, kernel, stride] in CONVOLUTIONS {
        let input = draws.tensor([images, channels_in, height, width]).require_grad();
        let weight = draws.tensor([channels_out, channels_in, kernel, kernel]).require_grad();
        let padding = kernel / 2;
        let options = ConvOptions::new([stride, stride], [padding, padding], [1, 1], 1);
        let want = burn::tensor::module::conv2d(input.clone(), weight.clone(), None, options);
        let got =
            layers::convolution(input.clone(), weight.clone(), ConvolutionOptions::new(stride, padding));
        let probe = draws.tensor(want.dims());
        assert_close("output", got.clone(), want.clone());

        let want = (want * probe.clone()).sum().backward();
        let got = (got * probe).sum().backward();
        let case = format!("{images} x {channels_in} x {height} x {width}, kernel {kernel}, stride {stride}");
        assert_close(&format!("dL/dinput, {case}"), input.grad(&got).unwrap(), input.grad(&want).unwrap());
        assert_close(&format!("dL/dweight, {case}"), weight.grad(&got).unwrap(), weight.grad(&want).unwrap());
    }
}

/// Images, channels, height, width, kernel, stride, and zeros added at the top, bottom, left and right.
const DEPTHWISE: [[usize; 10]; 10] = [
    [2, 5, 12, 12, 3, 1, 1, 1, 1, 1],
    [3, 8, 9, 7, 5, 1, 2, 2, 2, 2],
    [2, 3, 12, 16, 3, 2, 0, 1, 0, 1],
    [2, 3, 13, 16, 3, 2, 1, 1, 0, 1],
    [1, 4, 12, 9, 5, 2, 1, 2, 2, 2],
    [3, 33, 3, 3, 5, 1, 2, 2, 2, 2],
    [1, 1, 1, 1, 3, 1, 1, 1, 1, 1],
    // More padding than the kernel reaches, phases without a place in the image, an even kernel.
    [2, 3, 5, 4, 3, 1, 3, 2, 2, 3],
    [1, 2, 1, 1, 7, 4, 3, 3, 3, 3],
    [2, 3, 7, 6, 4, 2, 1, 2, 2, 1],
];

#[test]
fn depthwise_and_uneven_convolutions_and_their_gradients_equal_burns() {
    let mut draws = Draws::new();
    for ([images, channels, height, width, kernel, stride, top, bottom, left, right], depthwise) in
        DEPTHWISE.into_iter().flat_map(|case| [(case, true), (case, false)])
    {
        let input = draws.tensor([images, channels, height, width]).require_grad();
        let per_group = if depthwise { 1 } else { channels };
        let weight = draws.tensor([channels, per_group, kernel, kernel]).require_grad();
        let padded = input.clone().pad((left, right, top, bottom), PadMode::Constant(0.0));
        let options = ConvOptions::new([stride, stride], [0, 0], [1, 1], channels / per_group);
        let want = burn::tensor::module::conv2d(padded, weight.clone(), None, options);
        let options = ConvolutionOptions { stride, padding: [[top, bottom], [left, right]], depthwise };
        let got = layers::convolution(input.clone(), weight.clone(), options);
        let probe = draws.tensor(want.dims());
        assert_close("output", got.clone(), want.clone());

        let want = (want * probe.clone()).sum().backward();
        let got = (got * probe).sum().backward();
        let case = format!("{channels} x {height} x {width}, kernel {kernel}, stride {stride}, {depthwise}");
        assert_close(&format!("dL/dinput, {case}"), input.grad(&got).unwrap(), input.grad(&want).unwrap());
        assert_close(&format!("dL/dweight, {case}"), weight.grad(&got).unwrap(), weight.grad(&want).unwrap());
    }
}

#[test]
fn normalisation_and_its_gradients_equal_burns() {
    let activations = [Activation::None, Activation::Relu, Activation::Relu6];
    let mut draws = Draws::new();
    for (activation, from_batch) in activations.into_iter().flat_map(|a| [(a, true), (a, false)]) {
        let input = (draws.tensor([5, 7, 6, 9]) * 6.0 + 0.7).require_grad();
        let gamma = (draws.tensor([7]) * 3.0).require_grad();
        let beta = draws.tensor([7]).require_grad();
        let options = NormaliseOptions { epsilon: 1e-5, activation, from_batch };

        let statistics = if from_batch {
            layers::batch_statistics(input.clone())
        } else {
            Tensor::cat(vec![draws.tensor([1, 7]), draws.tensor([1, 7]).abs() + 0.5], 0)
        };
        let got = layers::normalise(input.clone(), statistics.clone(), gamma.clone(), beta.clone(), options);
        let want = if from_batch {
            burn::tensor::module::batch_norm_train(input.clone(), gamma.clone(), beta.clone(), 1e-5).output
        } else {
            let row = |row: usize| statistics.clone().slice([row..row + 1, 0..7]).reshape([7]);
            burn::tensor::module::batch_norm(input.clone(), gamma.clone(), beta.clone(), row(0), row(1), 1e-5)
        };
        let want = match activation {
            Activation::None => want,
            Activation::Relu => relu(want),
            Activation::Relu6 => want.clamp(0.0, 6.0),
        };
        let probe = draws.tensor(want.dims());
        assert_close("output", got.clone(), want.clone());

        let want = (want * probe.clone()).sum().backward();
        let got = (got * probe).sum().backward();
        assert_close("dL/dinput", input.grad(&got).unwrap(), input.grad(&want).unwrap());
        assert_close("dL/dgamma", gamma.grad(&got).unwrap(), gamma.grad(&want).unwrap());
        assert_close("dL/dbeta", beta.grad(&got).unwrap(), beta.grad(&want).unwrap());
    }
}

#[test]
fn residual_sum_and_its_gradient_equal_burns() {
    let mut draws = Draws::new();
    let a = draws.tensor([3, 4, 5, 6]).require_grad();
    let b = draws.tensor([3, 4, 5, 6]).require_grad();
    let probe = draws.tensor([3, 4, 5, 6]);
    let want = relu(a.clone() + b.clone());
    let got = layers::add_relu(a.clone(), b.clone());
    got.to_data().assert_approx_eq::<f32>(&want.to_data(), Tolerance::default());
    let want = (want * probe.clone()).sum().backward();
    let got = (got * probe).sum().backward();
    assert_close("dL/da", a.grad(&got).unwrap(), a.grad(&want).unwrap());
    assert_close("dL/db", b.grad(&got).unwrap(), b.grad(&want).unwrap());
}

/// Images, channels, height, width, stride, padding, and whether the output size is rounded up.
const POOLINGS: [([usize; 6], bool); 7] = [
    ([2, 3, 12, 12, 2, 1], false),
    ([2, 3, 13, 10, 2, 1], false),
    ([3, 2, 12, 13, 2, 0], true),
    ([1, 4, 6, 7, 2, 0], true),
    ([2, 5, 7, 3, 1, 1], true),
    ([1, 1, 3, 3, 2, 0], false),
    ([1, 1, 1, 1, 1, 1], false),
];

#[test]
fn maxima_and_their_gradient_equal_burns() {
    let mut draws = Draws::new();
    for ([images, channels, height, width, stride, padding], ceil) in POOLINGS {
        // Whole numbers below 4: windows have several equal maxima.
        let input =
            (draws.tensor([images, channels, height, width]) * 2.0).round().clamp(-3.0, 3.0).require_grad();
        let options = MaxPoolOptions::new([3, 3])
            .with_stride([stride, stride])
            .with_padding([padding, padding])
            .with_ceil_mode(ceil);
        let want = burn::tensor::module::max_pool2d(input.clone(), options);
        let got = layers::max_pool(input.clone(), PoolOptions { stride, padding, ceil });
        let case = format!("{images} x {channels} x {height} x {width}, stride {stride}, padding {padding}");
        assert_eq!(got.to_data(), want.to_data(), "{case}");
        let probe = draws.tensor(want.dims());
        let want = (want * probe.clone()).sum().backward();
        let got = (got * probe).sum().backward();
        assert_close(&format!("dL/dinput, {case}"), input.grad(&got).unwrap(), input.grad(&want).unwrap());
    }
}

#[test]
fn a_maximum_over_nan_is_nan() {
    let device = Device::flex();
    let input = Tensor::<4>::from_data([[[[1.0, f32::NAN, 3.0, 4.0, 5.0]]]], &device);
    let output = layers::max_pool(input, PoolOptions { stride: 2, padding: 1, ceil: false });
    let output: Vec<f32> = output.into_data().try_to_vec().unwrap();
    assert!(output[0].is_nan() && output[1].is_nan() && output[2] == 5.0, "{output:?}");
}
