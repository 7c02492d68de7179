//! Maximum pooling on the CPU, with windows of 3 x 3.
//!
//! A plane is padded and split into phases as in `convolution.rs`, so that each place in the window is a constant offset.
//! Planes are independent, so results do not depend on the number of threads.

use super::PoolOptions;
use super::buffer::written;
use super::geometry::Geometry;
use super::planes::{PhasePlanes, copy_rows, filled, sized, zeroed};
use crate::vectors::vectorised;

/// Buffers that a thread reuses.
#[derive(Default)]
struct Scratch {
    padded: Vec<f32>,
    maxima: Vec<f32>,
    gradient: Vec<f32>,
    left: Vec<f32>,
}

/// A pooling of planes of one size.
pub struct MaxPool {
    g: Geometry,
    taps: Vec<usize>,
    phases: PhasePlanes,
}

impl MaxPool {
    /// For planes with `input` rows and columns.
    pub fn new(input: [usize; 2], options: PoolOptions) -> Self {
        let (kernel, stride, before) = (PoolOptions::WINDOW, options.stride, options.padding);
        // The last window may reach past the padding, or end before it.
        let padding = input.map(|side| {
            let end = (options.side(side) - 1) * stride + kernel;
            [before, end.saturating_sub(side + before)]
        });
        let g = Geometry { images: 1, channels_in: 1, channels_out: 1, input, kernel, stride, padding };
        Self { taps: g.taps(), phases: PhasePlanes::new(&g), g }
    }

    /// Rows and columns of an output plane.
    pub fn output(&self) -> [usize; 2] {
        self.g.output()
    }

    /// The maximum of every window. NaN is larger than any number.
    pub fn forward(&self, input: &[f32]) -> Vec<f32> {
        let [height, width] = self.output();
        let planes = input.len() / self.g.input_length();
        written(planes * height * width, height * width, |scratch: &mut Scratch, plane, output| {
            let padded = self.padded(input, plane, &mut scratch.padded);
            let maxima = filled(&mut scratch.maxima, self.g.positions(), f32::NEG_INFINITY);
            for &tap in &self.taps {
                let values = &padded[tap..];
                vectorised(
                    #[inline(always)]
                    || {
                        for (maximum, &value) in maxima.iter_mut().zip(values) {
                            *maximum = if (value > *maximum) | value.is_nan() { value } else { *maximum };
                        }
                    },
                );
            }
            copy_rows(maxima, self.columns(), output, width, width);
        })
    }

    /// dL/d(input) from input, output and dL/d(output). Of several equal maxima of a window the first, row by row, gets the
    /// gradient.
    pub fn gradient(&self, input: &[f32], output: &[f32], output_gradient: &[f32]) -> Vec<f32> {
        let [height, width] = self.output();
        written(input.len(), self.g.input_length(), |scratch: &mut Scratch, plane, gradient| {
            let padded = self.padded(input, plane, &mut scratch.padded);
            let outputs = plane * height * width..(plane + 1) * height * width;
            let maxima = sized(&mut scratch.maxima, self.g.positions(), 0.0);
            copy_rows(&output[outputs.clone()], width, maxima, self.columns(), width);
            // What no place of the window has taken so far; zero at positions that are not outputs.
            let left = sized(&mut scratch.left, self.g.positions(), 0.0);
            copy_rows(&output_gradient[outputs], width, left, self.columns(), width);
            let sums = zeroed(&mut scratch.gradient, self.g.channel_length());
            for &tap in &self.taps {
                let (values, sums) = (&padded[tap..], &mut sums[tap..]);
                vectorised(
                    #[inline(always)]
                    || {
                        let windows = left.iter_mut().zip(&*maxima).zip(values).zip(sums.iter_mut());
                        for (((left, &maximum), &value), sum) in windows {
                            let taken = if value == maximum { *left } else { 0.0 };
                            *left = if value == maximum { 0.0 } else { *left };
                            *sum += taken;
                        }
                    },
                );
            }
            self.phases.join(sums, gradient);
        })
    }

    fn columns(&self) -> usize {
        self.g.phase_plane()[1]
    }

    /// A plane of the input in padded phase planes.
    fn padded<'a>(&self, input: &[f32], plane: usize, buffer: &'a mut Vec<f32>) -> &'a [f32] {
        let length = self.g.input_length();
        let padded = sized(buffer, self.g.channel_length(), f32::NEG_INFINITY);
        self.phases.split(&input[plane * length..][..length], padded, self.g.channel_length());
        padded
    }
}
