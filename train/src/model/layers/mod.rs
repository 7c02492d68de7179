//! The network's expensive operations, as an extension of Burn's backends.
//!
//! They replace Burn's own, which on the CPU are several times slower than PyTorch's, and on the GPU are
//! direct convolutions unless autotuning is enabled. All are in f32. Gradients are implemented explicitly,
//! since the extension macro does not derive them.
//!
//! | file | operations |
//! | --- | --- |
//! | `geometry.rs`, `planes.rs`, `taps.rs` | where the inputs of a convolution lie, how they are copied, and the sum over taps |
//! | `convolution.rs`, `matrix.rs` | convolution and its input gradient, direct and as a matrix product |
//! | `weight_gradient.rs` | its weight gradient |
//! | `depthwise.rs` | depthwise convolution and its two gradients |
//! | `normalisation.rs` | batch normalisation + activation, residual sum + ReLU |
//! | `pooling.rs` | maximum pooling |
//! | `buffer.rs` | result buffers of all |
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
mod geometry;
mod matrix;
pub mod normalisation;
mod ops;
mod planes;
mod pooling;
mod taps;
mod weight_gradient;

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

/// The maximum of every window, `[N, C, H, W]` to `[N, C, H', W']`.
pub fn max_pool(input: Tensor<4>, options: PoolOptions) -> Tensor<4> {
    Tensor::from_dispatch(<Dispatch as LayerOps>::max_pool(input.into_dispatch(), options))
}

/// Options of [`max_pool`], whose windows are 3 x 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolOptions {
    /// Input positions from one window to the next.
    pub stride: usize,
    /// Positions added on all sides. They never are the maximum.
    pub padding: usize,
    /// Whether the output size is rounded up, with windows that reach past the end.
    pub ceil: bool,
}

impl PoolOptions {
    /// Side of the windows.
    pub const WINDOW: usize = 3;

    /// Side of the output for an input of side `side`.
    #[must_use]
    pub fn side(&self, side: usize) -> usize {
        let Self { stride, padding, ceil } = *self;
        let reach = (side + 2 * padding).saturating_sub(Self::WINDOW);
        // A window past the end counts if it begins before the end.
        let past = ceil && !reach.is_multiple_of(stride) && (reach / stride + 1) * stride < side + padding;
        reach / stride + 1 + usize::from(past)
    }
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

#[cfg(test)]
mod tests {
    use super::geometry::Geometry;
    use super::normalisation::{self, Normalisation, Planes};
    use super::{Activation, convolution, depthwise, weight_gradient};
    use crate::vectors::tests::with_narrow_vectors;

    fn values(count: usize, seed: u32) -> Vec<f32> {
        (0..count as u32)
            .map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0)
            .collect()
    }

    /// Checks that vectors of any width give the same results but for rounding.
    fn assert_any_width(what: &str, run: impl Fn() -> Vec<f32>) {
        let wanted = run();
        let scale = wanted.iter().fold(0.0, |most: f32, value| most.max(value.abs()));
        for (width, got) in ["one lane", "8 lanes"].into_iter().zip(with_narrow_vectors(&run)) {
            assert_eq!(got.len(), wanted.len());
            let difference = got.iter().zip(&wanted).fold(0.0, |most: f32, (a, b)| most.max((a - b).abs()));
            assert!(
                difference <= 2e-5 * scale,
                "{what} with {width}: off by {difference}, largest value {scale}"
            );
        }
    }

    #[test]
    fn narrow_vectors_give_the_same_results() {
        // Images, channels in and out, height, width, kernel, stride; padding.
        let shapes = [
            ([2, 3, 20, 12, 13, 7, 2], [[3, 3], [3, 3]]),
            ([9, 20, 13, 3, 3, 3, 1], [[1, 1], [1, 1]]),
            ([2, 16, 9, 24, 7, 3, 1], [[1, 1], [1, 1]]),
            ([3, 33, 7, 6, 5, 1, 2], [[0, 0], [0, 0]]),
            ([2, 264, 523, 3, 2, 3, 1], [[1, 1], [1, 1]]),
            ([2, 5, 6, 8, 9, 3, 2], [[0, 1], [1, 0]]),
            ([1, 2, 3, 1, 1, 7, 4], [[3, 3], [3, 3]]),
        ];
        for ([images, channels_in, channels_out, height, width, kernel, stride], padding) in shapes {
            let input = [height, width];
            let g = Geometry { images, channels_in, channels_out, input, kernel, stride, padding };
            let area = g.output().iter().product::<usize>();
            let x = values(images * channels_in * height * width, 1);
            let w = values(channels_out * channels_in * kernel * kernel, 2);
            let dy = values(images * channels_out * area, 3);
            assert_any_width("convolution", || convolution::forward(&g, &x, &w));
            assert_any_width("input gradient", || convolution::input_gradient(&g, &dy, &w));
            assert_any_width("weight gradient", || weight_gradient::weight_gradient(&g, &x, &dy));

            let plane = Geometry { images: 1, channels_in: 1, channels_out: 1, ..g };
            let w = values(channels_in * kernel * kernel, 4);
            let dy = values(images * channels_in * area, 5);
            assert_any_width("depthwise", || depthwise::forward(&plane, channels_in, &x, &w));
            assert_any_width("depthwise input", || depthwise::input_gradient(&plane, channels_in, &dy, &w));
            assert_any_width("depthwise weight", || depthwise::weight_gradient(&plane, channels_in, &x, &dy));

            let planes = Planes { channels: channels_in, area: height * width };
            let dy = values(x.len(), 6);
            let statistics = normalisation::statistics(planes, &x);
            let (mean, variance) = statistics.split_at(channels_in);
            let [gamma, beta] = [7, 8].map(|seed| values(channels_in, seed));
            let n = Normalisation {
                mean,
                variance,
                gamma: &gamma,
                beta: &beta,
                epsilon: 1e-5,
                activation: Activation::Relu,
                from_batch: true,
            };
            let parameters = normalisation::parameter_gradient(planes, &x, &dy, &n);
            assert_any_width("statistics", || normalisation::statistics(planes, &x));
            assert_any_width("normalisation", || normalisation::forward(planes, &x, &n));
            assert_any_width("parameters", || normalisation::parameter_gradient(planes, &x, &dy, &n));
            assert_any_width("normalised", || {
                normalisation::input_gradient(planes, &x, &dy, &parameters, &n)
            });
        }
    }
}
