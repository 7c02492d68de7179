//! The network's expensive operations, as an extension of Burn's backends.
//!
//! They replace Burn's own, which on the CPU are several times slower than PyTorch's, and on the GPU are
//! direct convolutions unless autotuning is enabled. All are in f32. Gradients are implemented explicitly,
//! since the extension macro does not derive them.
//!
//! | file | operations |
//! | --- | --- |
//! | `convolution.rs`, `matrix.rs`, `depthwise.rs` | convolution and its two gradients |
//! | `normalisation.rs` | batch normalisation + activation, residual sum + ReLU |
//! | `buffer.rs` | result buffers of both |
//! | `differentiation.rs` | the operations under autodiff |
//! | `flex.rs` | Burn's CPU backend with the operations above |
//! | `cube/` | Burn's GPU backend with own kernels |

pub mod buffer;
mod convolution;
#[cfg(feature = "cube")]
mod cube;
mod depthwise;
mod differentiation;
mod flex;
mod matrix;
pub mod normalisation;
mod ops;

use burn::backend::Dispatch;
use burn::tensor::Tensor;

#[cfg(feature = "train-emulated")]
pub use cube::emulate_whole_cubes;
pub use ops::{LayerGradients, LayerOps, NormaliseInputs};

/// Convolution without bias: `[N, in, H, W]` and `[out, in, k, k]` (depthwise: `[in, 1, k, k]`) to `[N, out, H', W']`.
pub fn convolution(input: Tensor<4>, weight: Tensor<4>, options: ConvolutionOptions) -> Tensor<4> {
    Tensor::from_dispatch(<Dispatch as LayerOps>::convolution(
        input.into_dispatch(),
        weight.into_dispatch(),
        options,
    ))
}

/// Mean and biased variance of every channel of `[N, C, H, W]`, as `[2, C]`, detached from the gradient.
pub fn batch_statistics(input: Tensor<4>) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as LayerOps>::batch_statistics(input.detach().into_dispatch()))
}

/// Normalises every channel by `statistics` (`[2, C]`: mean, variance), then scales, shifts and activates.
///
/// With `from_batch` the statistics must be those of `input`, and the gradient depends on them; otherwise
/// they are constants.
pub fn normalise(
    input: Tensor<4>,
    statistics: Tensor<2>,
    gamma: Tensor<1>,
    beta: Tensor<1>,
    options: NormaliseOptions,
) -> Tensor<4> {
    Tensor::from_dispatch(<Dispatch as LayerOps>::normalise(
        input.into_dispatch(),
        statistics.into_dispatch(),
        gamma.into_dispatch(),
        beta.into_dispatch(),
        options,
    ))
}

/// `relu(a + b)`.
pub fn add_relu(a: Tensor<4>, b: Tensor<4>) -> Tensor<4> {
    Tensor::from_dispatch(<Dispatch as LayerOps>::add_relu(a.into_dispatch(), b.into_dispatch()))
}

/// Options of [`convolution`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvolutionOptions {
    /// Input positions from one output position to the next.
    pub stride: usize,
    /// Zeros before and after the height, and before and after the width.
    pub padding: [[usize; 2]; 2],
    /// Whether each channel is convolved with its own kernel only.
    pub depthwise: bool,
}

impl ConvolutionOptions {
    /// An ordinary convolution with `padding` zeros on all sides.
    #[must_use]
    pub fn new(stride: usize, padding: usize) -> Self {
        Self { stride, padding: [[padding; 2]; 2], depthwise: false }
    }

    /// Output height and width.
    #[must_use]
    pub fn output(&self, input: [usize; 2], kernel: usize) -> [usize; 2] {
        std::array::from_fn(|axis| {
            let padded = input[axis] + self.padding[axis].iter().sum::<usize>();
            (padded - kernel) / self.stride + 1
        })
    }
}

/// Activation after a normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    None,
    /// `max(x, 0)`.
    Relu,
    /// `min(max(x, 0), 6)`.
    Relu6,
}

impl Activation {
    /// Range that outputs are clamped to; the gradient is passed on strictly inside it.
    #[must_use]
    pub fn range(self) -> [f32; 2] {
        match self {
            Self::None => [f32::NEG_INFINITY, f32::INFINITY],
            Self::Relu => [0.0, f32::INFINITY],
            Self::Relu6 => [0.0, 6.0],
        }
    }
}

/// Options of [`normalise`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormaliseOptions {
    /// Added to the variance.
    pub epsilon: f32,
    /// The activation after the normalisation.
    pub activation: Activation,
    /// Whether the statistics are the batch's own.
    pub from_batch: bool,
}
