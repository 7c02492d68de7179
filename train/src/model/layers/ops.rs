//! The operations as a backend extension, with default bodies of Burn's own operations.

use burn::backend::ops::ConvOptions;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata, backend_extension};
use burn::tensor::ops::PadMode;
use burn::tensor::{Scalar, Shape};

use super::{Activation, ConvolutionOptions, NormaliseOptions};

/// Heavy operations of the network. Shapes are those of the functions in the [parent module](super).
#[backend_extension(Flex, Cube: cfg(feature = "cube"), Autodiff)]
pub trait LayerOps: Backend {
    /// Convolution without bias.
    fn convolution(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        options: ConvolutionOptions,
    ) -> FloatTensor<Self> {
        let (input, options) = padded::<Self>(input, options);
        Self::conv2d(input, weight, None, options)
    }

    /// dL/d(input) of [`convolution`](LayerOps::convolution).
    fn convolution_input_gradient(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        output_gradient: FloatTensor<Self>,
        options: ConvolutionOptions,
    ) -> FloatTensor<Self> {
        let shape = input.shape();
        let [[top, _], [left, _]] = options.padding;
        let (input, uniform) = padded::<Self>(input, options);
        let gradient = Self::conv2d_x_backward(input, weight, output_gradient, uniform.clone());
        if gradient.shape() == shape {
            return gradient;
        }
        let within = [0..shape[0], 0..shape[1], top..top + shape[2], left..left + shape[3]];
        Self::float_slice(gradient, &within.map(Into::into))
    }

    /// dL/d(weight) of [`convolution`](LayerOps::convolution).
    fn convolution_weight_gradient(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        output_gradient: FloatTensor<Self>,
        options: ConvolutionOptions,
    ) -> FloatTensor<Self> {
        let (input, options) = padded::<Self>(input, options);
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

    /// Batch normalisation with given statistics, and the activation.
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
        activate::<Self>(output, options.activation)
    }

    /// Gradients of [`normalise`](LayerOps::normalise): of the input, `[N, C, H, W]`.
    ///
    /// `parameter_gradient` is what [`normalise_parameter_gradient`](LayerOps::normalise_parameter_gradient) returned; it
    /// is read only where the statistics are the batch's.
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
        let passed = terms.through_activation(beta, output_gradient, &options);
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
        let passed = terms.through_activation(beta, output_gradient, &options);
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

/// The input as Burn's convolution takes it, which pads both ends of a side alike: the odd zero is added here.
fn padded<B: Backend>(
    input: FloatTensor<B>,
    ConvolutionOptions { stride, padding, depthwise }: ConvolutionOptions,
) -> (FloatTensor<B>, ConvOptions<2>) {
    let groups = if depthwise { input.shape()[1] } else { 1 };
    let options = |padding| ConvOptions::new([stride, stride], padding, [1, 1], groups);
    if padding.iter().all(|[before, behind]| before == behind) {
        return (input, options(padding.map(|[before, _]| before)));
    }
    let [height, width] = padding.map(|[before, behind]| (before, behind));
    let zeros = PadMode::Constant(0.0);
    (B::float_pad(input, &[(0, 0), (0, 0), height, width], zeros), options([0, 0]))
}

fn activate<B: Backend>(output: FloatTensor<B>, activation: Activation) -> FloatTensor<B> {
    match activation {
        Activation::None => output,
        Activation::Relu => B::relu(output),
        Activation::Relu6 => B::float_clamp(output, Scalar::Float(0.0), Scalar::Float(6.0)),
    }
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

    fn through_activation(
        &self,
        beta: FloatTensor<B>,
        output_gradient: FloatTensor<B>,
        options: &NormaliseOptions,
    ) -> FloatTensor<B> {
        if options.activation == Activation::None {
            return output_gradient;
        }
        let beta = B::float_reshape(beta, self.per_channel.clone());
        let scaled = B::float_mul(self.normalised.clone(), self.gamma.clone());
        let output = B::float_add(scaled, beta);
        let above = |output, gradient| B::relu_backward(B::relu(output), gradient);
        let passed = above(output.clone(), output_gradient.clone());
        match options.activation {
            Activation::None | Activation::Relu => passed,
            // Less what runs through above the ceiling: the same value, so 0 remains.
            Activation::Relu6 => {
                let cut = B::float_sub_scalar(output, Scalar::Float(6.0));
                B::float_sub(passed, above(cut, output_gradient))
            }
        }
    }
}
