//! The network's heavy operations, as an extension of Burn's backends.
//!
//! [`LayerOps`] has a default body for every backend, made of Burn's own
//! operations, and a hand-written one for the CPU backend in f32, where
//! Burn's are several times slower than PyTorch's. Gradients are written out,
//! since the macro does not derive them.
//!
//! | file | operations |
//! | --- | --- |
//! | `convolution.rs` | convolution and its two gradients |
//! | `normalisation.rs` | batch normalisation + ReLU, residual sum + ReLU |
//! | `buffer.rs` | what both write their results into |
//! | `differentiation.rs` | the same under autodiff |
//! | `flex.rs`, `cube.rs` | Burn's CPU backend with the operations above, its GPU backend with the default bodies |

pub mod buffer;
mod convolution;
#[cfg(feature = "train-cuda")]
mod cube;
mod differentiation;
mod flex;
pub mod normalisation;
mod ops;

use burn::backend::Dispatch;
use burn::tensor::Tensor;

pub use ops::LayerOps;

/// Convolution without bias: `[N, in, H, W]` and `[out, in, k, k]` to `[N, out, H', W']`, padding `k / 2`.
pub fn convolution(input: Tensor<4>, weight: Tensor<4>, stride: usize) -> Tensor<4> {
    Tensor::from_dispatch(<Dispatch as LayerOps>::convolution(
        input.into_dispatch(),
        weight.into_dispatch(),
        stride,
    ))
}

/// Mean and biased variance of every channel of `[N, C, H, W]`, as `[2, C]`; no gradient runs through.
pub fn batch_statistics(input: Tensor<4>) -> Tensor<2> {
    Tensor::from_dispatch(<Dispatch as LayerOps>::batch_statistics(input.detach().into_dispatch()))
}

/// Normalises every channel by `statistics` (`[2, C]`: mean, variance), then scales, shifts and, on request, cuts at zero.
///
/// With `from_batch`, the statistics are taken to be those of `input`, and the
/// gradient accounts for it; otherwise they are constants.
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

/// Options of [`normalise`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormaliseOptions {
    /// Added to the variance.
    pub epsilon: f32,
    /// Whether negative results become zero.
    pub relu: bool,
    /// Whether the statistics are the batch's own.
    pub from_batch: bool,
}
