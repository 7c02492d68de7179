//! The operations as a backend extension.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, backend_extension};

use super::{ConvolutionOptions, NormaliseOptions, PoolOptions};

/// Expensive operations of the network. The [parent module](super) has functions with the same names and shapes.
#[backend_extension(Flex, Cube: cfg(feature = "cube"), Autodiff)]
pub trait LayerOps: Backend {
    /// Convolution without bias.
    fn convolution(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        options: ConvolutionOptions,
    ) -> FloatTensor<Self>;

    /// Mean and biased variance of every channel, `[2, C]`.
    fn batch_statistics(input: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Batch normalisation with given statistics, followed by the activation.
    fn normalise(
        input: FloatTensor<Self>,
        statistics: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        options: NormaliseOptions,
    ) -> FloatTensor<Self>;

    /// `relu(a + b)`.
    fn add_relu(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self>;

    /// The maximum of every window.
    fn max_pool(input: FloatTensor<Self>, options: PoolOptions) -> FloatTensor<Self>;
}

/// Input, statistics, gamma and beta of [`normalise`](LayerOps::normalise).
pub type NormaliseInputs<B> = [FloatTensor<B>; 4];

/// Gradients of the [`LayerOps`].
pub trait LayerGradients: LayerOps {
    /// dL/d(input) of [`convolution`](LayerOps::convolution).
    fn convolution_input_gradient(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        output_gradient: FloatTensor<Self>,
        options: ConvolutionOptions,
    ) -> FloatTensor<Self>;

    /// dL/d(weight) of [`convolution`](LayerOps::convolution).
    fn convolution_weight_gradient(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        output_gradient: FloatTensor<Self>,
        options: ConvolutionOptions,
    ) -> FloatTensor<Self>;

    /// dL/d(input) of [`normalise`](LayerOps::normalise), `[N, C, H, W]`.
    ///
    /// `parameter_gradient` is the result of [`normalise_parameter_gradient`](Self::normalise_parameter_gradient); it is read
    /// only if the statistics are the batch's.
    fn normalise_input_gradient(
        inputs: NormaliseInputs<Self>,
        output_gradient: FloatTensor<Self>,
        parameter_gradient: FloatTensor<Self>,
        options: NormaliseOptions,
    ) -> FloatTensor<Self>;

    /// Gradients of [`normalise`](LayerOps::normalise) with respect to gamma and beta, as `[2, C]`.
    fn normalise_parameter_gradient(
        inputs: NormaliseInputs<Self>,
        output_gradient: FloatTensor<Self>,
        options: NormaliseOptions,
    ) -> FloatTensor<Self>;

    /// dL/d(a) = dL/d(b) of [`add_relu`](LayerOps::add_relu), from its output.
    fn add_relu_gradient(output: FloatTensor<Self>, output_gradient: FloatTensor<Self>) -> FloatTensor<Self>;

    /// dL/d(input) of [`max_pool`](LayerOps::max_pool). The first of several equal maxima gets the gradient.
    fn max_pool_gradient(
        input: FloatTensor<Self>,
        output: FloatTensor<Self>,
        output_gradient: FloatTensor<Self>,
        options: PoolOptions,
    ) -> FloatTensor<Self>;
}
