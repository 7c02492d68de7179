//! The weight gradient of a convolution on the CPU.
//!
//! With channels last, the inputs that one row of the kernel reads for an output position are contiguous. So the
//! gradient of a row of the kernel is the product of the output gradient, `[out, positions]`, with these pieces.
//! Work is divided by fixed groups of images and outputs, so results do not depend on the number of threads.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::buffer::written;
use super::geometry::Geometry;
use super::planes::{sized, transpose, zeroed};
use super::taps::{RUN, STEP, WIDEST_BLOCK, tile};
use crate::vectors::dispatch;

/// Number of tasks, roughly, whatever the number of threads.
const TASKS: usize = 16;

/// Most sums that all groups of images have together, unless one group has more.
const MOST_SUMS: usize = 1 << 22;

/// Most lanes of a vector.
const LANES: usize = 16;

/// dL/d(weight), `[out, in, k, k]`, from the input and dL/d(output).
pub fn weight_gradient(g: &Geometry, input: &[f32], output_gradient: &[f32]) -> Vec<f32> {
    let (area, row) = (g.output().iter().product::<usize>(), g.kernel * g.channels_in);
    let tasks = Tasks::new(g);
    // Floats of the sums of a row of the kernel for one output, and of all rows for the outputs of a block.
    let stride = row.next_multiple_of(LANES);
    let block_length = g.kernel * tasks.block * stride;
    // Images that are summed together, so that small maps have long sums too.
    let together = (RUN / area.max(1)).clamp(1, tasks.images);
    let (image_length, places) = (g.padded_length(), g.padded_places());
    let starts = g.starts();
    let positions: Vec<usize> = (0..together)
        .flat_map(|image| starts.iter().map(move |start| image * image_length + start))
        .collect();
    let packed_places: Vec<usize> = (0..area).map(|p| p * WIDEST_BLOCK).collect();

    let run = |scratch: &mut Scratch, task: usize| {
        let (images, outputs) = (tasks.images(g, task), tasks.outputs(g, task));
        let mut sums = vec![0.0; outputs.len().div_ceil(tasks.block) * block_length];
        for first in images.clone().step_by(together) {
            let count = together.min(images.end - first);
            let planes = sized(&mut scratch.planes, count * image_length + STEP, 0.0);
            let input = &input[first * g.input_length()..];
            let padded = planes.chunks_exact_mut(image_length).take(count);
            for (input, padded) in input.chunks_exact(g.input_length()).zip(padded) {
                transpose(input, &places, padded);
            }
            let positions = &positions[..count * area];
            // Every block of outputs of every image, as `[block][image][position][output]`.
            scratch
                .weights
                .resize(outputs.len().div_ceil(tasks.block) * positions.len(), [0.0; WIDEST_BLOCK]);
            let packed = scratch.weights.chunks_exact_mut(positions.len());
            for (output, packed) in outputs.clone().step_by(tasks.block).zip(packed) {
                let size = tasks.block.min(outputs.end - output);
                for (image, packed) in packed.chunks_exact_mut(area).enumerate() {
                    let gradient = &output_gradient[(first + image) * g.output_length() + output * area..];
                    transpose(&gradient[..size * area], &packed_places, packed.as_flattened_mut());
                }
            }
            dispatch(KernelRows {
                planes: &scratch.planes,
                positions,
                weights: &scratch.weights,
                block_length,
                stride,
                rows: g.kernel,
                next_row: g.padded()[1] * g.channels_in,
                row,
                sums: &mut sums,
            });
        }
        sums
    };
    let sums: Vec<Vec<f32>> = (0..tasks.count)
        .into_par_iter()
        .map_init(Scratch::default, |scratch, task| run(scratch, task))
        .collect();

    let taps = g.kernel * g.kernel;
    written(
        g.channels_out * g.channels_in * taps,
        g.channels_in * taps,
        |total: &mut Vec<f32>, output, gradient| {
            let (part, output) = (output / tasks.outputs, output % tasks.outputs);
            let total = zeroed(total, g.kernel * row);
            for sums in sums.iter().skip(part).step_by(tasks.parts) {
                let block = &sums[output / tasks.block * block_length..][..block_length];
                let kernel_rows = block.chunks_exact(tasks.block * stride);
                for (total, kernel_row) in total.chunks_exact_mut(row).zip(kernel_rows) {
                    let sums = &kernel_row[output % tasks.block * stride..][..row];
                    total.iter_mut().zip(sums).for_each(|(total, sum)| *total += *sum);
                }
            }
            for (tap, total) in total.chunks_exact(g.channels_in).enumerate() {
                gradient[tap..].iter_mut().step_by(taps).zip(total).for_each(|(to, total)| *to = *total);
            }
        },
    )
}

/// How the work is divided: by groups of images, whose sums are added in the end, and by parts of the
/// outputs where the sums of all groups would be many. It does not depend on the number of threads.
struct Tasks {
    /// Number of tasks.
    count: usize,
    /// Number of parts of the outputs; task t has part `t % parts`.
    parts: usize,
    /// Images of a group and outputs of a part; the last may have fewer.
    images: usize,
    outputs: usize,
    /// Outputs that are computed together.
    block: usize,
}

impl Tasks {
    fn new(g: &Geometry) -> Self {
        let weights = g.channels_out * g.channels_in * g.kernel * g.kernel;
        let groups = (MOST_SUMS / weights.max(1)).clamp(1, TASKS.min(g.images.max(1)));
        let images = g.images.div_ceil(groups).max(1);
        let block = dispatch(OutputsTogether);
        let outputs = (g.channels_out * groups).div_ceil(TASKS).next_multiple_of(block).max(block);
        let parts = g.channels_out.div_ceil(outputs);
        Self { count: g.images.div_ceil(images) * parts, parts, images, outputs, block }
    }

    fn images(&self, g: &Geometry, task: usize) -> Range<usize> {
        let first = task / self.parts * self.images;
        first..(first + self.images).min(g.images)
    }

    fn outputs(&self, g: &Geometry, task: usize) -> Range<usize> {
        let first = task % self.parts * self.outputs;
        first..(first + self.outputs).min(g.channels_out)
    }
}

/// Buffers that a thread reuses.
#[derive(Default)]
struct Scratch {
    planes: Vec<f32>,
    weights: Vec<[f32; WIDEST_BLOCK]>,
}

/// `sums[block][y][o][x] += sum over k of weights[block][k][o] * planes[positions[k] + y * next_row + x]`.
struct KernelRows<'a> {
    planes: &'a [f32],
    positions: &'a [usize],
    weights: &'a [[f32; WIDEST_BLOCK]],
    /// Floats of the sums of a block, and of a row of the kernel for one output.
    block_length: usize,
    stride: usize,
    /// Rows of the kernel, and floats between two of them in the planes.
    rows: usize,
    next_row: usize,
    /// Number of x.
    row: usize,
    sums: &'a mut [f32],
}

impl WithSimd for KernelRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        if S::F32_LANES == 16 { self.run::<S, 8, 3>(simd) } else { self.run::<S, 6, 2>(simd) }
    }
}

/// Number of outputs that [`KernelRows`] computes together.
struct OutputsTogether;

impl WithSimd for OutputsTogether {
    type Output = usize;

    fn with_simd<S: Simd>(self, _: S) -> usize {
        if S::F32_LANES == 16 { 8 } else { 6 }
    }
}

impl KernelRows<'_> {
    #[inline(always)]
    fn run<S: Simd, const OUTPUTS: usize, const VECTORS: usize>(&mut self, simd: S) {
        assert_eq!(self.block_length, self.rows * OUTPUTS * self.stride);
        for first in (0..self.positions.len()).step_by(RUN) {
            let run = first..(first + RUN).min(self.positions.len());
            for y in 0..self.rows {
                for x in (0..self.row).step_by(VECTORS * S::F32_LANES) {
                    match (self.row - x).div_ceil(S::F32_LANES) {
                        1 => self.blocks::<S, OUTPUTS, 1>(simd, run.clone(), y, x),
                        2 => self.blocks::<S, OUTPUTS, 2>(simd, run.clone(), y, x),
                        _ => self.blocks::<S, OUTPUTS, VECTORS>(simd, run.clone(), y, x),
                    }
                }
            }
        }
    }

    /// Adds the terms of some positions to the sums of some x for every block.
    // All blocks follow each other, so the inputs come from a near cache for all but the first.
    #[inline(always)]
    fn blocks<S: Simd, const OUTPUTS: usize, const VECTORS: usize>(
        &mut self,
        simd: S,
        run: Range<usize>,
        y: usize,
        x: usize,
    ) {
        let planes = &self.planes[y * self.next_row + x..];
        let weights = self.weights.chunks_exact(self.positions.len());
        for (weights, sums) in weights.zip(self.sums.chunks_exact_mut(self.block_length)) {
            let totals = tile::<S, OUTPUTS, VECTORS>(
                simd,
                planes,
                &self.positions[run.clone()],
                &weights[run.clone()],
            );
            for (o, totals) in totals.iter().enumerate() {
                let sums = &mut sums[(y * OUTPUTS + o) * self.stride + x..][..VECTORS * S::F32_LANES];
                let sums = S::as_mut_simd_f32s(sums).0;
                sums.iter_mut().zip(totals).for_each(|(sum, total)| *sum = simd.add_f32s(*sum, *total));
            }
        }
    }
}
