//! The operations on Burn's GPU backend, in f32.
//!
//! Burn chooses a convolution by timing several, or else uses its direct one, whose gradients are
//! convolutions with kernels as large as the map. Here the shape determines the kernel, sums have a fixed
//! order, and products are in f32, not TF32: a seed gives the same run each time.
//!
//! Maps have the layout `[N, H, W, C]` in memory (Burn's shape remains `[N, C, H, W]`), so that neighbouring
//! threads read neighbouring channels. Results of these operations and of Burn's maximum pooling, which is used
//! as it is, have that layout and are read in place; anything else (the pictures, a concatenation) is copied once.
//!
//! | file | kernels |
//! | --- | --- |
//! | `product.rs` | a tiled matrix product that reads patches of a map as one matrix (implicit GEMM) |
//! | `convolution.rs` | dense convolutions and their gradients as such products |
//! | `depthwise.rs` | depthwise convolutions and their gradients |
//! | `normalisation.rs` | batch statistics, normalisation + activation, residual sum + ReLU |
//! | `rows.rs` | sums over the rows of a matrix, for the partial results of the others |

mod convolution;
mod depthwise;
mod normalisation;
mod product;
mod rows;

use std::sync::atomic::{AtomicBool, Ordering};

use burn::backend::Cube;
use burn::backend::ops::ModuleOps;
use burn::tensor::{DType, IntDType, Shape};
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::ops::{permute_nchw_to_nhwc, permute_nhwc_to_nchw};
use burn_cubecl::tensor::CubeTensor;

use super::{ConvolutionOptions, LayerGradients, LayerOps, NormaliseInputs, NormaliseOptions, PoolOptions};

/// Units (threads) of a cube (thread block), if the device allows that many.
const UNITS: usize = 256;

/// Number of multiprocessors that grids are sized for, that of an H100 or H200. A constant, since the
/// division of sums depends on it: every GPU adds in the same order.
const MULTIPROCESSORS: usize = 132;

/// Units of a cube on this device, a power of two. One on the CPU, where each unit would be a thread.
fn units(of: &CubeTensor) -> usize {
    let most = of.client.properties().hardware.max_units_per_cube as usize;
    if most < UNITS && !WHOLE_CUBES.load(Ordering::Relaxed) { 1 } else { UNITS }
}

/// A grid with at least `count` units.
fn grid(of: &CubeTensor, count: usize) -> (CubeCount, CubeDim) {
    let units = units(of);
    (CubeCount::new_1d(count.div_ceil(units) as u32), CubeDim::new_1d(units as u32))
}

/// Sides of the windows of a pooling.
const WINDOW: [usize; 2] = [PoolOptions::WINDOW; 2];

static WHOLE_CUBES: AtomicBool = AtomicBool::new(false);

/// From now on, cubes of an emulated device have as many units as on a GPU. Each is a thread, which is slow. For tests.
#[cfg(feature = "train-emulated")]
pub fn emulate_whole_cubes() {
    WHOLE_CUBES.store(true, Ordering::Relaxed);
}

/// A map as `[N, H, W, C]`, dense.
struct Map(CubeTensor);

impl Map {
    /// A map from `[N, C, H, W]`; copies it unless it has the layout `[N, H, W, C]` in memory.
    fn new(tensor: CubeTensor) -> Self {
        let tensor = permute_nchw_to_nhwc(tensor);
        Self(if is_dense(&tensor) { tensor } else { into_contiguous(tensor) })
    }

    /// An uninitialised map on the device of `like`.
    fn empty(like: &Self, shape: [usize; 4]) -> Self {
        Self(empty(&like.0, shape))
    }

    /// As `[N, C, H, W]`.
    fn into_nchw(self) -> CubeTensor {
        permute_nhwc_to_nchw(self.0)
    }

    /// Images, height, width, channels.
    fn shape(&self) -> [usize; 4] {
        self.0.meta.shape().dims()
    }

    fn channels(&self) -> usize {
        self.shape()[3]
    }

    fn elements(&self) -> usize {
        self.shape().iter().product()
    }

    fn argument(&self) -> BufferArg {
        self.0.clone().into_buffer_arg()
    }
}

/// Whether the elements are contiguous in memory, in row-major order.
fn is_dense(tensor: &CubeTensor) -> bool {
    let mut expected = 1;
    let axes = tensor.meta.shape().iter().zip(tensor.meta.strides().iter()).rev();
    axes.into_iter().all(|(&length, &stride)| {
        let fits = length == 1 || stride == expected;
        expected *= length;
        fits
    })
}

/// The tensor in contiguous row-major order, copied if necessary.
fn dense(tensor: CubeTensor) -> CubeTensor {
    if is_dense(&tensor) { tensor } else { into_contiguous(tensor) }
}

fn empty(like: &CubeTensor, shape: impl Into<Shape>) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape.into(), DType::F32)
}

/// Number of floats that are read at once.
fn vector_size(channels: &[usize]) -> usize {
    if channels.iter().all(|count| count.is_multiple_of(4)) { 4 } else { 1 }
}

impl LayerOps for Cube {
    fn convolution(input: CubeTensor, weight: CubeTensor, options: ConvolutionOptions) -> CubeTensor {
        let input = Map::new(input);
        let output = if options.depthwise {
            depthwise::forward(&input, weight, options)
        } else {
            convolution::forward(&input, weight, options)
        };
        output.into_nchw()
    }

    fn batch_statistics(input: CubeTensor) -> CubeTensor {
        normalisation::statistics(&Map::new(input))
    }

    fn normalise(
        input: CubeTensor,
        statistics: CubeTensor,
        gamma: CubeTensor,
        beta: CubeTensor,
        options: NormaliseOptions,
    ) -> CubeTensor {
        let parameters = normalisation::Parameters::new(statistics, gamma, beta, options);
        normalisation::forward(&Map::new(input), &parameters).into_nchw()
    }

    fn add_relu(a: CubeTensor, b: CubeTensor) -> CubeTensor {
        normalisation::add_relu(&Map::new(a), &Map::new(b)).into_nchw()
    }

    fn max_pool(input: CubeTensor, PoolOptions { stride, padding, ceil }: PoolOptions) -> CubeTensor {
        Self::max_pool2d(input, WINDOW, [stride; 2], [padding; 2], [1; 2], ceil)
    }
}

impl LayerGradients for Cube {
    fn convolution_input_gradient(
        input: CubeTensor,
        weight: CubeTensor,
        output_gradient: CubeTensor,
        options: ConvolutionOptions,
    ) -> CubeTensor {
        // Only the size of the input is needed.
        let [images, channels, height, width] = input.meta.shape().dims();
        let (gradient, shape) = (Map::new(output_gradient), [images, height, width, channels]);
        let gradient = if options.depthwise {
            depthwise::input_gradient(&gradient, weight, shape, options)
        } else {
            convolution::input_gradient(&gradient, weight, shape, options)
        };
        gradient.into_nchw()
    }

    fn convolution_weight_gradient(
        input: CubeTensor,
        weight: CubeTensor,
        output_gradient: CubeTensor,
        options: ConvolutionOptions,
    ) -> CubeTensor {
        let (input, gradient) = (Map::new(input), Map::new(output_gradient));
        let [_, _, kernel, _] = weight.meta.shape().dims();
        if options.depthwise {
            depthwise::weight_gradient(&input, &gradient, kernel, options)
        } else {
            convolution::weight_gradient(&input, &gradient, kernel, options)
        }
    }

    fn normalise_input_gradient(
        [input, statistics, gamma, beta]: NormaliseInputs<Self>,
        output_gradient: CubeTensor,
        parameter_gradient: CubeTensor,
        options: NormaliseOptions,
    ) -> CubeTensor {
        let parameters = normalisation::Parameters::new(statistics, gamma, beta, options);
        let (input, gradient) = (Map::new(input), Map::new(output_gradient));
        normalisation::input_gradient(&input, &gradient, dense(parameter_gradient), &parameters).into_nchw()
    }

    fn normalise_parameter_gradient(
        [input, statistics, gamma, beta]: NormaliseInputs<Self>,
        output_gradient: CubeTensor,
        options: NormaliseOptions,
    ) -> CubeTensor {
        let parameters = normalisation::Parameters::new(statistics, gamma, beta, options);
        normalisation::parameter_gradient(&Map::new(input), &Map::new(output_gradient), &parameters)
    }

    fn add_relu_gradient(output: CubeTensor, output_gradient: CubeTensor) -> CubeTensor {
        normalisation::add_relu_gradient(&Map::new(output), &Map::new(output_gradient)).into_nchw()
    }

    fn max_pool_gradient(
        input: CubeTensor,
        _: CubeTensor,
        output_gradient: CubeTensor,
        PoolOptions { stride, padding, ceil }: PoolOptions,
    ) -> CubeTensor {
        let (stride, padding, dilation) = ([stride; 2], [padding; 2], [1; 2]);
        let indices = Self::max_pool2d_with_indices(
            input.clone(),
            WINDOW,
            stride,
            padding,
            dilation,
            ceil,
            IntDType::I32,
        )
        .indices;
        Self::max_pool2d_with_indices_backward(
            input,
            WINDOW,
            stride,
            padding,
            dilation,
            ceil,
            output_gradient,
            indices,
        )
        .x_grad
    }
}
