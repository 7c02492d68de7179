//! Depthwise convolutions and their gradients. A unit computes a vector of channels at several consecutive positions of a row
//! (a run), so that each value it reads of a row of the map is used for several positions and taps.

use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::cubecl::std::FastDivmod;
use burn_cubecl::ops::permute;
use burn_cubecl::tensor::CubeTensor;

use super::rows::{self, Plan, Share, Units};
use super::{Map, dense, empty, grid, units, vector_size};
use crate::model::layers::ConvolutionOptions;

/// Sizes and padding of the convolution, and divisors of the unit's number.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Geometry {
    images: u32,
    height: u32,
    width: u32,
    out_height: u32,
    out_width: u32,
    /// Number of vectors of channels.
    vectors: FastDivmod<u32>,
    columns: u32,
    /// Runs in a row.
    runs: FastDivmod<u32>,
    lines: FastDivmod<u32>,
    above: u32,
    left: u32,
}

/// Compile-time parameters of the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    kernel: u32,
    stride: u32,
    /// Positions in a run.
    run: u32,
}

impl Shape {
    /// Columns of the map that a run reads.
    fn reach(self) -> usize {
        ((self.run - 1) * self.stride + self.kernel) as usize
    }
}

/// Reads `count` columns of a row, from `x` on; zeros outside the map. A negative coordinate has wrapped
/// around to a large one.
#[cube]
fn read_row<N: Size>(
    map: &[Vector<f32, N>],
    row: &mut Array<Vector<f32, N>>,
    line: u32,
    x: u32,
    column: u32,
    width: u32,
    columns: u32,
    valid: bool,
    #[comptime] count: usize,
) {
    #[unroll]
    for step in 0..count {
        let x = x + comptime!(step as u32);
        let mut value = Vector::<f32, N>::new(0.0);
        if valid && x < width {
            value = map[((line * width + x) * columns + column) as usize];
        }
        row[step] = value;
    }
}

/// Each unit computes a run of outputs. With `flipped`, this is the input gradient of a convolution of stride 1.
#[cube(launch_unchecked)]
fn forward_kernel<N: Size>(
    input: &[Vector<f32, N>],
    weight: &[Vector<f32, N>],
    out: &mut [Vector<f32, N>],
    g: Geometry,
    #[comptime] shape: Shape,
    #[comptime] flipped: bool,
) {
    let (kernel, stride) = comptime!((shape.kernel as usize, shape.stride as usize));
    let run = comptime!(shape.run as usize);
    let (position, column) = g.vectors.div_mod(ABSOLUTE_POS as u32);
    let (position, start) = g.runs.div_mod(position);
    let (image, y) = g.lines.div_mod(position);
    if image >= g.images {
        terminate!();
    }
    let first = start * shape.run;
    let mut sums = Array::<Vector<f32, N>>::new(run);
    let mut row = Array::<Vector<f32, N>>::new(shape.reach());
    #[unroll]
    for ky in 0..kernel {
        let in_y = y * shape.stride + comptime!(ky as u32) - g.above;
        let line = image * g.height + in_y;
        let valid = in_y < g.height;
        let x = first * shape.stride - g.left;
        read_row::<N>(input, &mut row, line, x, column, g.width, g.columns, valid, shape.reach());
        #[unroll]
        for kx in 0..kernel {
            let tap =
                comptime!(if flipped { kernel * kernel - 1 - ky * kernel - kx } else { ky * kernel + kx });
            let factor = weight[tap * g.columns as usize + column as usize];
            #[unroll]
            for step in 0..run {
                sums[step] = fma(row[comptime!(step * stride + kx)], factor, sums[step]);
            }
        }
    }
    let line = (image * g.out_height + y) * g.out_width;
    #[unroll]
    for step in 0..run {
        let x = first + comptime!(step as u32);
        if x < g.out_width {
            out[((line + x) * g.columns + column) as usize] = sums[step];
        }
    }
}

/// The input gradient of a strided convolution. Each unit computes one position: the sum over the taps that read it.
#[cube(launch_unchecked)]
fn strided_input_gradient_kernel<N: Size>(
    gradient: &[Vector<f32, N>],
    weight: &[Vector<f32, N>],
    out: &mut [Vector<f32, N>],
    g: Geometry,
    #[comptime] shape: Shape,
) {
    let (position, column) = g.vectors.div_mod(ABSOLUTE_POS as u32);
    let (line, x) = g.runs.div_mod(position);
    let (image, y) = g.lines.div_mod(line);
    if image >= g.images {
        terminate!();
    }
    let kernel = comptime!(shape.kernel as usize);
    let mut sum = Vector::<f32, N>::new(0.0);
    #[unroll]
    for ky in 0..kernel {
        let from_y = y + g.above - comptime!(ky as u32);
        let out_y = from_y / shape.stride;
        if from_y.is_multiple_of(shape.stride) && out_y < g.out_height {
            #[unroll]
            for kx in 0..kernel {
                let from_x = x + g.left - comptime!(kx as u32);
                let out_x = from_x / shape.stride;
                if from_x.is_multiple_of(shape.stride) && out_x < g.out_width {
                    let at = ((image * g.out_height + out_y) * g.out_width + out_x) * g.columns + column;
                    let factor = weight[comptime!(ky * kernel + kx) * g.columns as usize + column as usize];
                    sum = fma(gradient[at as usize], factor, sum);
                }
            }
        }
    }
    out[ABSOLUTE_POS] = sum;
}

/// Sums of the weight gradient over chunks of runs, `[chunks, taps, C]`. Each unit has a vector of channels.
#[cube(launch_unchecked)]
fn weight_gradient_kernel<N: Size>(
    input: &[Vector<f32, N>],
    gradient: &[Vector<f32, N>],
    out: &mut [Vector<f32, N>],
    g: Geometry,
    runs: usize,
    chunk: usize,
    #[comptime] shape: Shape,
    #[comptime] units: Units,
) {
    let (kernel, stride) = comptime!((shape.kernel as usize, shape.stride as usize));
    let run = comptime!(shape.run as usize);
    let share = Share::new(runs, chunk, units);
    let column = share.column as u32;
    let mut sums = Array::<Vector<f32, N>>::new(kernel * kernel);
    let mut gradients = Array::<Vector<f32, N>>::new(run);
    let mut row = Array::<Vector<f32, N>>::new(shape.reach());
    if column < g.columns {
        for index in range_stepped(share.begin, share.end, share.units.groups) {
            let (line, start) = g.runs.div_mod(index as u32);
            let (image, y) = g.lines.div_mod(line);
            let first = start * shape.run;
            read_row::<N>(gradient, &mut gradients, line, first, column, g.out_width, g.columns, true, run);
            #[unroll]
            for ky in 0..kernel {
                let in_y = y * shape.stride + comptime!(ky as u32) - g.above;
                let line = image * g.height + in_y;
                let valid = in_y < g.height;
                let x = first * shape.stride - g.left;
                read_row::<N>(input, &mut row, line, x, column, g.width, g.columns, valid, shape.reach());
                #[unroll]
                for kx in 0..kernel {
                    #[unroll]
                    for step in 0..run {
                        let tap = comptime!(ky * kernel + kx);
                        sums[tap] = fma(row[comptime!(step * stride + kx)], gradients[step], sums[tap]);
                    }
                }
            }
        }
    }
    #[unroll]
    for tap in 0..kernel * kernel {
        let sum = share.add_groups::<N>(sums[tap]);
        if share.writes(g.columns as usize) {
            let at = (CUBE_POS_Y as usize * kernel * kernel + tap) * g.columns as usize;
            out[at + share.column] = sum;
        }
    }
}

/// Positions of a run in rows of `width` positions.
fn run(width: usize) -> usize {
    if width >= 4 { 4 } else { width.min(2) }
}

/// Permutes `[C, 1, k, k]` to `[k, k, C]`.
fn by_tap(weight: CubeTensor) -> CubeTensor {
    dense(permute(weight, &[2, 3, 0, 1]))
}

/// The kernel's arguments, for `lines` rows of `runs` runs in each image.
fn geometry(
    [images, height, width]: [usize; 3],
    [out_height, out_width]: [usize; 2],
    vectors: usize,
    [lines, runs]: [usize; 2],
    [above, left]: [usize; 2],
) -> GeometryLaunch {
    GeometryLaunch::new(
        images as u32,
        height as u32,
        width as u32,
        out_height as u32,
        out_width as u32,
        vectors as u32,
        vectors as u32,
        runs as u32,
        lines as u32,
        above as u32,
        left as u32,
    )
}

pub(super) fn forward(input: &Map, weight: CubeTensor, options: ConvolutionOptions) -> Map {
    let [_, _, kernel, _] = weight.meta.shape().dims();
    let [images, height, width, channels] = input.shape();
    let out = options.output([height, width], kernel);
    let before = options.padding.map(|[before, _]| before);
    correlate(input, weight, [images, out[0], out[1], channels], options.stride, before, false)
}

fn correlate(
    input: &Map,
    weight: CubeTensor,
    shape: [usize; 4],
    stride: usize,
    before: [usize; 2],
    flipped: bool,
) -> Map {
    let [_, _, kernel, _] = weight.meta.shape().dims();
    let [images, height, width, channels] = input.shape();
    let [_, out_height, out_width, _] = shape;
    let size = vector_size(&[channels]);
    let (vectors, run) = (channels / size, run(out_width));
    let runs = out_width.div_ceil(run);
    let out = Map::empty(input, shape);
    let (cubes, units) = grid(&input.0, images * out_height * runs * vectors);
    // SAFETY: the kernel checks the image number and the positions.
    unsafe {
        forward_kernel::launch_unchecked(
            &input.0.client,
            cubes,
            units,
            size,
            input.argument(),
            by_tap(weight).into_buffer_arg(),
            out.argument(),
            geometry([images, height, width], [out_height, out_width], vectors, [out_height, runs], before),
            Shape { kernel: kernel as u32, stride: stride as u32, run: run as u32 },
            flipped,
        );
    }
    out
}

pub(super) fn input_gradient(
    gradient: &Map,
    weight: CubeTensor,
    shape: [usize; 4],
    options: ConvolutionOptions,
) -> Map {
    let [_, _, kernel, _] = weight.meta.shape().dims();
    let before = options.padding.map(|[before, _]| before);
    if options.stride == 1 && before.iter().all(|&zeros| zeros < kernel) {
        return correlate(gradient, weight, shape, 1, before.map(|zeros| kernel - 1 - zeros), true);
    }
    let [images, height, width, channels] = shape;
    let [_, out_height, out_width, _] = gradient.shape();
    let size = vector_size(&[channels]);
    let vectors = channels / size;
    let out = Map::empty(gradient, shape);
    let (cubes, units) = grid(&gradient.0, images * height * width * vectors);
    // SAFETY: as above.
    unsafe {
        strided_input_gradient_kernel::launch_unchecked(
            &gradient.0.client,
            cubes,
            units,
            size,
            gradient.argument(),
            by_tap(weight).into_buffer_arg(),
            out.argument(),
            geometry([images, height, width], [out_height, out_width], vectors, [height, width], before),
            Shape { kernel: kernel as u32, stride: options.stride as u32, run: 1 },
        );
    }
    out
}

pub(super) fn weight_gradient(
    input: &Map,
    gradient: &Map,
    kernel: usize,
    options: ConvolutionOptions,
) -> CubeTensor {
    let [images, height, width, channels] = input.shape();
    let [_, out_height, out_width, _] = gradient.shape();
    let size = vector_size(&[channels]);
    let (vectors, run) = (channels / size, run(out_width));
    let runs = out_width.div_ceil(run);
    let before = options.padding.map(|[before, _]| before);
    let plan = Plan::new(images * out_height * runs, vectors, usize::MAX, units(&input.0));
    let chunks = empty(&input.0, [plan.chunks, kernel, kernel, channels]);
    // SAFETY: the kernel checks runs, columns and positions.
    unsafe {
        weight_gradient_kernel::launch_unchecked(
            &input.0.client,
            plan.cube_count(),
            plan.cube_dim(),
            size,
            input.argument(),
            gradient.argument(),
            chunks.clone().into_buffer_arg(),
            geometry([images, height, width], [out_height, out_width], vectors, [out_height, runs], before),
            images * out_height * runs,
            plan.rows,
            Shape { kernel: kernel as u32, stride: options.stride as u32, run: run as u32 },
            plan.units,
        );
    }
    // [k, k, C] as [C, 1, k, k].
    let sums = rows::sum(chunks);
    let mut gradient = permute(sums, &[2, 0, 1]);
    gradient.meta.insert(1, 1, 1);
    gradient
}
