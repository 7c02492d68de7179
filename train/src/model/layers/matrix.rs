//! Convolution as a matrix product on the CPU, forward and the input gradient: 1 x 1 convolutions, and those with many
//! channels and small maps.
//!
//! A 1 x 1 convolution is a matrix product. For a larger kernel the inputs of each output are first copied
//! into a column (im2col); that pays for maps so small that the padding of `convolution.rs` would be most of
//! the work. Each product runs on one thread: work is divided by groups of images, so results do not depend on the number
//! of threads.

use gemm::{Parallelism, gemm};

use super::buffer::written;
use super::geometry::Geometry;
use super::planes::{copy, sized};

/// Columns that a product should have; several small images share one product.
const COLUMNS: usize = 128;

/// Fewest input channels (WIDE) and most output positions (SMALL) for which kernels larger than 1 x 1 use a product.
const WIDE: usize = 256;
const SMALL: usize = 64;

/// Whether this module computes the convolution.
pub fn fits(g: &Geometry) -> bool {
    is_pointwise(g) || (g.channels_in >= WIDE && g.output().iter().product::<usize>() <= SMALL)
}

fn is_pointwise(g: &Geometry) -> bool {
    g.kernel == 1 && g.stride == 1 && g.padding == [[0; 2]; 2]
}

fn area(g: &Geometry) -> usize {
    g.output().iter().product()
}

/// Inputs of an output: the number of rows of the matrix of patches.
fn rows(g: &Geometry) -> usize {
    g.channels_in * g.kernel * g.kernel
}

fn together(g: &Geometry) -> usize {
    (COLUMNS / area(g)).clamp(1, g.images.max(1))
}

/// Buffers that a thread reuses.
#[derive(Default)]
struct Scratch {
    patches: Vec<f32>,
    product: Vec<f32>,
}

/// `[N, out, H', W']` from `[N, in, H, W]` and `[out, in, k, k]`.
pub fn forward(g: &Geometry, input: &[f32], weight: &[f32]) -> Vec<f32> {
    let (area, rows, group) = (area(g), rows(g), together(g));
    let (input_length, output_length) = (g.input_length(), g.channels_out * area);
    written(g.images * output_length, group * output_length, |scratch: &mut Scratch, chunk, output| {
        let images = output.len() / output_length;
        let input = &input[chunk * group * input_length..][..images * input_length];
        let columns = images * area;
        let weight = Matrix { values: weight, columns: rows, transposed: false };
        if images == 1 && is_pointwise(g) {
            let input = Matrix { values: input, columns, transposed: false };
            return multiply([g.channels_out, rows, columns], weight, input, output);
        }
        let patches = sized(&mut scratch.patches, rows * columns, 0.0);
        patches.chunks_exact_mut(columns).enumerate().for_each(|(row, to)| gather(g, input, row, to));
        let product = sized(&mut scratch.product, g.channels_out * columns, 0.0);
        let patches = Matrix { values: patches, columns, transposed: false };
        multiply([g.channels_out, rows, columns], weight, patches, product);
        for (o, product) in product.chunks_exact(columns).enumerate() {
            for (image, from) in product.chunks_exact(area).enumerate() {
                copy(from, &mut output[image * output_length + o * area..][..area]);
            }
        }
    })
}

/// dL/d(input), `[N, in, H, W]`, from dL/d(output), `[N, out, H', W']`.
pub fn input_gradient(g: &Geometry, output_gradient: &[f32], weight: &[f32]) -> Vec<f32> {
    let (area, rows, group) = (area(g), rows(g), together(g));
    let (input_length, output_length) = (g.input_length(), g.channels_out * area);
    written(g.images * input_length, group * input_length, |scratch: &mut Scratch, chunk, gradient| {
        let images = gradient.len() / input_length;
        let source = &output_gradient[chunk * group * output_length..][..images * output_length];
        let columns = images * area;
        let weight = Matrix { values: weight, columns: rows, transposed: true };
        if images == 1 && is_pointwise(g) {
            let source = Matrix { values: source, columns, transposed: false };
            return multiply([rows, g.channels_out, columns], weight, source, gradient);
        }
        let side_by_side = sized(&mut scratch.patches, g.channels_out * columns, 0.0);
        for (o, to) in side_by_side.chunks_exact_mut(columns).enumerate() {
            beside(source, (output_length, area), o, to);
        }
        let product = sized(&mut scratch.product, rows * columns, 0.0);
        let side_by_side = Matrix { values: side_by_side, columns, transposed: false };
        multiply([rows, g.channels_out, columns], weight, side_by_side, product);
        for (row, product) in product.chunks_exact(columns).enumerate() {
            scatter(g, product, row, gradient);
        }
    })
}

/// Copies the planes of one channel of all images to `to`, one after the other.
fn beside(images: &[f32], (length, area): (usize, usize), channel: usize, to: &mut [f32]) {
    for (image, to) in images.chunks_exact(length).zip(to.chunks_exact_mut(area)) {
        copy(&image[channel * area..][..area], to);
    }
}

/// Calls `run(row of the input, row of the output, first output column, columns, first input column)` for each row of
/// the output in which the tap of `row` lies within the input.
fn within(g: &Geometry, row: usize, mut run: impl FnMut(usize, usize, usize, usize, usize)) {
    let tap = row % (g.kernel * g.kernel);
    let (tap_y, tap_x) = (tap / g.kernel, tap % g.kernel);
    let ([height, width], [out_height, out_width]) = (g.input, g.output());
    let [[above, _], [left, _]] = g.padding;
    let first = left.saturating_sub(tap_x).div_ceil(g.stride);
    // One past the last output column whose tap is inside the input.
    let end = (width + left).saturating_sub(tap_x).div_ceil(g.stride).min(out_width);
    if first >= end {
        return;
    }
    for y in 0..out_height {
        let Some(source) = (y * g.stride + tap_y).checked_sub(above).filter(|&source| source < height) else {
            continue;
        };
        run(source, y, first, end - first, first * g.stride + tap_x - left);
    }
}

/// Writes one row of the matrix of patches: the input of every output for one tap of one channel.
fn gather(g: &Geometry, input: &[f32], row: usize, to: &mut [f32]) {
    let (area, [_, out_width], [height, width]) = (area(g), g.output(), g.input);
    let channel = row / (g.kernel * g.kernel);
    for (image, to) in input.chunks_exact(g.input_length()).zip(to.chunks_exact_mut(area)) {
        let plane = &image[channel * height * width..][..height * width];
        if is_pointwise(g) {
            copy(plane, to);
            continue;
        }
        within(g, row, |source, y, first, count, from| {
            let source = plane[source * width + from..].iter().step_by(g.stride);
            let to = &mut to[y * out_width + first..][..count];
            to.iter_mut().zip(source).for_each(|(to, from)| *to = *from);
        });
    }
}

/// Adds one row of the gradient of the patches to the input gradient.
fn scatter(g: &Geometry, patches: &[f32], row: usize, gradient: &mut [f32]) {
    let (area, [_, out_width], [height, width]) = (area(g), g.output(), g.input);
    let channel = row / (g.kernel * g.kernel);
    for (image, patches) in gradient.chunks_exact_mut(g.input_length()).zip(patches.chunks_exact(area)) {
        let plane = &mut image[channel * height * width..][..height * width];
        within(g, row, |source, y, first, count, from| {
            let to = plane[source * width + from..].iter_mut().step_by(g.stride);
            let patches = &patches[y * out_width + first..][..count];
            to.zip(patches).for_each(|(to, from)| *to += *from);
        });
    }
}

/// A row-major matrix; with `transposed`, its transpose.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    values: &'a [f32],
    columns: usize,
    transposed: bool,
}

impl Matrix<'_> {
    /// Steps to the next column and to the next row.
    fn strides(&self) -> (isize, isize) {
        let columns = self.columns as isize;
        if self.transposed { (columns, 1) } else { (1, columns) }
    }
}

/// `out = a b` with a `[m, k]` and b `[k, n]`, on the calling thread.
fn multiply([m, k, n]: [usize; 3], a: Matrix<'_>, b: Matrix<'_>, out: &mut [f32]) {
    assert!(a.values.len() == m * k && b.values.len() == k * n && out.len() == m * n);
    let ((a_column, a_row), (b_column, b_row)) = (a.strides(), b.strides());
    let (lhs, rhs, to) = (a.values.as_ptr(), b.values.as_ptr(), out.as_mut_ptr());
    // SAFETY: the assertion checks the lengths, and the strides stay within them.
    unsafe {
        gemm(
            m,
            n,
            k,
            to,
            1,
            n as isize,
            false,
            lhs,
            a_column,
            a_row,
            rhs,
            b_column,
            b_row,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
