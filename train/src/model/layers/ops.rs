//! The operations as a backend extension, with default bodies of Burn's own operations.

use burn::backend::ops::ConvOptions;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata, backend_extension};
use burn::tensor::{Scalar, Shape};

use super::NormaliseOptions;

/// Heavy operations of the network. Shapes are those of the functions in the [parent module](super).
#[backend_extension(Flex, Cube: cfg(feature = "train-cuda"), Autodiff)]
pub trait LayerOps: Backend {
    /// Convolution without bias, padding `k / 2`.
    fn convolution(input: FloatTensor<Self>, weight: FloatTensor<Self>, stride: usize) -> FloatTensor<Self> {
        let options = options(&weight.shape(), stride);
        Self::conv2d(input, weight, None, options)
    }

    /// dL/d(input) of [`convolution`](LayerOps::convolution).
    fn convolution_input_gradient(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        output_gradient: FloatTensor<Self>,
        stride: usize,
    ) -> FloatTensor<Self> {
        let options = options(&weight.shape(), stride);
        Self::conv2d_x_backward(input, weight, output_gradient, options)
    }

    /// dL/d(weight) of [`convolution`](LayerOps::convolution).
    fn convolution_weight_gradient(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        output_gradient: FloatTensor<Self>,
        stride: usize,
    ) -> FloatTensor<Self> {
        let options = options(&weight.shape(), stride);
        Self::conv2d_weight_backward(input, weight, output_gradient, options)
    }

    /// Mean and biased variance of every channel, `[2, C]`.
    fn batch_statistics(input: FloatTensor<Self>) -> FloatTensor<Self> {
        let channels = input.shape()[1];
        let count = input.shape().num_elements() / channels;
        let rows = Self::float_reshape(Self::float_swap_dims(input, 0, 1), Shape::new([channels, count]));
        let mean = Self::float_mean_dim(rows.clone(), 1);
        let centred = Self::float_sub(rows, mean.clone());
        let variance = Self::float_mean_dim(Self::float_mul(centred.clone(), centred), 1);
        let row = |values| Self::float_reshape(values, Shape::new([1, channels]));
        Self::float_cat(vec![row(mean), row(variance)], 0)
    }

    /// Batch normalisation with given statistics, and ReLU on request.
    fn normalise(
        input: FloatTensor<Self>,
        statistics: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        options: NormaliseOptions,
    ) -> FloatTensor<Self> {
        let terms = Terms::<Self>::new(&input, statistics, gamma, &options);
        let shift = Self::float_reshape(beta, terms.per_channel.clone());
        let output = Self::float_add(Self::float_mul(terms.normalised, terms.gamma), shift);
        if options.relu { Self::relu(output) } else { output }
    }

    /// Gradients of [`normalise`](LayerOps::normalise): of the input, `[N, C, H, W]`.
    ///
    /// `parameter_gradient` is what [`normalise_parameter_gradient`](LayerOps::normalise_parameter_gradient) returned.
    fn normalise_input_gradient(
        input: FloatTensor<Self>,
        statistics: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        output_gradient: FloatTensor<Self>,
        parameter_gradient: FloatTensor<Self>,
        options: NormaliseOptions,
    ) -> FloatTensor<Self> {
        let shape = input.shape();
        let terms = Terms::<Self>::new(&input, statistics, gamma, &options);
        let scale = Self::float_mul(terms.gamma.clone(), terms.inverse_deviation.clone());
        let passed = terms.through_relu(beta, output_gradient, &options);
        let inner = if options.from_batch {
            let count = (shape.num_elements() / shape[1]) as f64;
            let row = |row: usize| {
                let slice = [row..row + 1, 0..shape[1]].map(Into::into);
                let values = Self::float_slice(parameter_gradient.clone(), &slice);
                let mean = Self::float_div_scalar(values, Scalar::Float(count));
                Self::float_reshape(mean, terms.per_channel.clone())
            };
            let projected = Self::float_mul(terms.normalised.clone(), row(0));
            Self::float_sub(Self::float_sub(passed, row(1)), projected)
        } else {
            passed
        };
        Self::float_mul(inner, scale)
    }

    /// Gradients of [`normalise`](LayerOps::normalise): of gamma and beta, as `[2, C]`.
    fn normalise_parameter_gradient(
        input: FloatTensor<Self>,
        statistics: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        output_gradient: FloatTensor<Self>,
        options: NormaliseOptions,
    ) -> FloatTensor<Self> {
        let shape = input.shape();
        let channels = shape[1];
        let terms = Terms::<Self>::new(&input, statistics, gamma, &options);
        let normalised = terms.normalised.clone();
        let passed = terms.through_relu(beta, output_gradient, &options);
        let row = |values| {
            let flat = Shape::new([channels, shape.num_elements() / channels]);
            let rows = Self::float_reshape(Self::float_swap_dims(values, 0, 1), flat);
            Self::float_reshape(Self::float_sum_dim(rows, 1), Shape::new([1, channels]))
        };
        Self::float_cat(vec![row(Self::float_mul(passed.clone(), normalised)), row(passed)], 0)
    }

    /// `relu(a + b)`.
    fn add_relu(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::relu(Self::float_add(a, b))
    }

    /// dL/d(a) = dL/d(b) of [`add_relu`](LayerOps::add_relu), from its output.
    fn add_relu_gradient(output: FloatTensor<Self>, output_gradient: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::relu_backward(output, output_gradient)
    }
}

fn options(weight: &Shape, stride: usize) -> ConvOptions<2> {
    let padding = weight[2] / 2;
    ConvOptions::new([stride, stride], [padding, padding], [1, 1], 1)
}

/// Terms that forward and backward of a normalisation share, shaped to broadcast.
struct Terms<B: Backend> {
    per_channel: Shape,
    normalised: FloatTensor<B>,
    inverse_deviation: FloatTensor<B>,
    gamma: FloatTensor<B>,
}

impl<B: Backend> Terms<B> {
    fn new(
        input: &FloatTensor<B>,
        statistics: FloatTensor<B>,
        gamma: FloatTensor<B>,
        options: &NormaliseOptions,
    ) -> Self {
        let channels = input.shape()[1];
        let per_channel = Shape::new([1, channels, 1, 1]);
        let row = |row: usize| {
            let slice = [row..row + 1, 0..channels].map(Into::into);
            B::float_reshape(B::float_slice(statistics.clone(), &slice), per_channel.clone())
        };
        let variance = B::float_add_scalar(row(1), Scalar::Float(f64::from(options.epsilon)));
        let inverse_deviation = B::float_recip(B::float_sqrt(variance));
        let normalised = B::float_mul(B::float_sub(input.clone(), row(0)), inverse_deviation.clone());
        let gamma = B::float_reshape(gamma, per_channel.clone());
        Self { per_channel, normalised, inverse_deviation, gamma }
    }

    fn through_relu(
        &self,
        beta: FloatTensor<B>,
        output_gradient: FloatTensor<B>,
        options: &NormaliseOptions,
    ) -> FloatTensor<B> {
        if !options.relu {
            return output_gradient;
        }
        let beta = B::float_reshape(beta, self.per_channel.clone());
        let scaled = B::float_mul(self.normalised.clone(), self.gamma.clone());
        B::relu_backward(B::relu(B::float_add(scaled, beta)), output_gradient)
    }
}
