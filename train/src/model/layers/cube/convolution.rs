//! Dense convolutions and their gradients as matrix products; chooses the tile of each.

use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::product::{DivisorsLaunch, GeometryLaunch, Plan, Role, Tile, product_kernel};
use super::{MULTIPROCESSORS, Map, empty, rows, units, vector_size};
use crate::model::layers::ConvolutionOptions;

/// Tiles for a GPU, each with the assumed share of a multiprocessor's peak: with fewer rows or columns of a
/// unit, a value read from shared memory is used less often. Estimated, not measured.
const TILES: [(Tile, f64); 8] = [
    (Tile::new(128, 128, 8, 8, 8), 0.75),
    (Tile::new(128, 64, 8, 4, 8), 0.6),
    (Tile::new(64, 128, 4, 8, 8), 0.6),
    (Tile::new(128, 32, 8, 4, 8), 0.55),
    (Tile::new(32, 128, 4, 8, 8), 0.55),
    (Tile::new(64, 64, 4, 4, 16), 0.5),
    (Tile::new(64, 32, 4, 4, 16), 0.45),
    (Tile::new(32, 32, 4, 4, 16), 0.4),
];

/// The tile for a device where a cube has one unit.
const ALONE: [(Tile, f64); 1] = [(Tile::new(8, 8, 8, 8, 4), 1.0)];

/// Most floats that the results of all splits may have: 64 MiB.
const SPLIT_FLOATS: usize = 1 << 24;

/// Smallest depth of a split: with less, adding the splits costs more than they save.
const LEAST_DEPTH: usize = 256;

/// A product's sizes.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    rows: usize,
    columns: usize,
    depth: usize,
    phases: usize,
}

/// Sizes of a convolution.
struct Convolution {
    input: [usize; 4],
    output: [usize; 4],
    kernel: usize,
    options: ConvolutionOptions,
}

impl Convolution {
    fn new(input: [usize; 4], out_channels: usize, kernel: usize, options: ConvolutionOptions) -> Self {
        let [height, width] = options.output([input[1], input[2]], kernel);
        Self { input, output: [input[0], height, width, out_channels], kernel, options }
    }

    fn sizes(&self, role: Role) -> Sizes {
        let [images, height, width, channels] = self.input;
        let [_, out_height, out_width, out_channels] = self.output;
        let (taps, stride) = (self.kernel * self.kernel, self.options.stride);
        let positions = images * out_height * out_width;
        match role {
            Role::Output => {
                Sizes { rows: positions, columns: out_channels, depth: taps * channels, phases: 1 }
            }
            Role::InputGradient => Sizes {
                rows: images * height.div_ceil(stride) * width.div_ceil(stride),
                columns: channels,
                depth: self.kernel.div_ceil(stride).pow(2) * out_channels,
                phases: stride * stride,
            },
            Role::WeightGradient => {
                Sizes { rows: out_channels, columns: taps * channels, depth: positions, phases: 1 }
            }
        }
    }

    /// The product of `left` and `right` as a new tensor of `shape`, with its elements in the product's order.
    fn product(&self, role: Role, left: &CubeTensor, right: &CubeTensor, shape: [usize; 4]) -> CubeTensor {
        let sizes = self.sizes(role);
        let size: usize = shape.iter().product();
        let (tile, splits) = choose(sizes, size, units(left));
        let split_depth = sizes.depth.div_ceil(splits).next_multiple_of(tile.depth);
        let splits = sizes.depth.div_ceil(split_depth);
        let [images, height, width, channels] = self.input;
        let [_, out_height, out_width, out_channels] = self.output;
        let [[above, _], [left_zeros, _]] = self.options.padding;
        let out = empty(left, [splits, shape[0], shape[1], shape[2], shape[3]]);
        let geometry = GeometryLaunch::new(
            images as u32,
            height as u32,
            width as u32,
            channels as u32,
            out_height as u32,
            out_width as u32,
            out_channels as u32,
            above as u32,
            left_zeros as u32,
        );
        let tapped = if role == Role::InputGradient { out_channels } else { channels };
        // SAFETY: the kernel checks positions against the maps, and rows and columns against the result.
        unsafe {
            product_kernel::launch_unchecked(
                &left.client,
                CubeCount::new_3d(
                    sizes.rows.div_ceil(tile.rows) as u32,
                    sizes.columns.div_ceil(tile.columns) as u32,
                    (splits * sizes.phases) as u32,
                ),
                CubeDim::new_1d(tile.units() as u32),
                vector_size(&[channels, out_channels]),
                left.clone().into_buffer_arg(),
                right.clone().into_buffer_arg(),
                out.clone().into_buffer_arg(),
                geometry,
                DivisorsLaunch::new(tapped as u32, out_width as u32, out_height as u32),
                split_depth as u32,
                size as u32,
                Plan {
                    role,
                    tile,
                    kernel: self.kernel as u32,
                    stride: self.options.stride as u32,
                    splits: splits as u32,
                },
            );
        }
        rows::sum(out)
    }
}

/// The tile and the number of splits of the depth with the shortest estimated time.
fn choose(sizes: Sizes, result: usize, units: usize) -> (Tile, usize) {
    let tiles: &[(Tile, f64)] = if units == 1 { &ALONE } else { &TILES };
    let most = (sizes.depth / LEAST_DEPTH).min(SPLIT_FLOATS / result).max(1);
    let candidates = tiles.iter().flat_map(|&(tile, share)| {
        let cubes = sizes.rows.div_ceil(tile.rows) * sizes.columns.div_ceil(tile.columns) * sizes.phases;
        // Enough splits for two cubes on each multiprocessor, or none.
        let splits = (2 * MULTIPROCESSORS / cubes).clamp(1, most);
        [1, splits].map(|splits| {
            let waves = ((cubes * splits) as f64 / MULTIPROCESSORS as f64).max(1.0);
            let depth = sizes.depth.div_ceil(splits);
            // In multiplications of a multiprocessor. Splits cost the time to write, read and add them.
            let time = waves * (tile.rows * tile.columns * depth) as f64 / share;
            let adding = if splits > 1 { ADDING + (splits * result) as f64 * ADDED } else { 0.0 };
            (tile, splits, time + adding)
        })
    });
    let best = candidates.min_by(|a, b| a.2.total_cmp(&b.2));
    best.map_or((tiles[0].0, 1), |(tile, splits, _)| (tile, splits))
}

/// Multiplications of a multiprocessor in the time of a launch, 5 us: 128 in each cycle, at 1.7 GHz.
const ADDING: f64 = 1.1e6;

/// Multiplications of a multiprocessor in the time to write a float and read it again, at 3 TB/s.
const ADDED: f64 = 0.6;

pub(super) fn forward(input: &Map, weight: CubeTensor, options: ConvolutionOptions) -> Map {
    let [out_channels, _, kernel, _] = weight.meta.shape().dims();
    let convolution = Convolution::new(input.shape(), out_channels, kernel, options);
    Map(convolution.product(Role::Output, &input.0, &Map::new(weight).0, convolution.output))
}

pub(super) fn input_gradient(
    gradient: &Map,
    weight: CubeTensor,
    input: [usize; 4],
    options: ConvolutionOptions,
) -> Map {
    let [out_channels, _, kernel, _] = weight.meta.shape().dims();
    let convolution = Convolution::new(input, out_channels, kernel, options);
    Map(convolution.product(Role::InputGradient, &gradient.0, &Map::new(weight).0, input))
}

pub(super) fn weight_gradient(
    input: &Map,
    gradient: &Map,
    kernel: usize,
    options: ConvolutionOptions,
) -> CubeTensor {
    let convolution = Convolution::new(input.shape(), gradient.channels(), kernel, options);
    let shape = [gradient.channels(), kernel, kernel, input.channels()];
    Map(convolution.product(Role::WeightGradient, &gradient.0, &input.0, shape)).into_nchw()
}
