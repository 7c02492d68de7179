//! Depthwise convolution on the CPU: every channel has its own kernel.
//!
//! A plane is one channel of one image, padded and split into phases as in `convolution.rs`: each tap is a
//! constant offset, so each pass is one loop over contiguous memory. Planes are independent in the forward
//! pass and the input gradient; the weight gradient of a channel is summed image after image. So results do
//! not depend on the number of threads.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::buffer::written;
use super::geometry::Geometry;
use super::planes::{PaddedGradient, PhasePlanes, copy_rows, sized};
use super::taps::STEP;
use crate::vectors::dispatch;

/// Number of vectors of positions that are computed together.
const VECTORS: usize = 3;

/// Buffers that a thread reuses.
#[derive(Default)]
struct Scratch {
    planes: Vec<f32>,
    flat: Vec<f32>,
}

/// `[N, C, H', W']` from `[N, C, H, W]` and `[C, 1, k, k]`. `g` is the geometry of one plane.
pub fn forward(g: &Geometry, channels: usize, input: &[f32], weight: &[f32]) -> Vec<f32> {
    let (taps, phases, [height, width]) = (g.taps(), PhasePlanes::new(g), g.output());
    let columns = g.phase_plane()[1];
    let planes = input.len() / g.input_length();
    written(planes * height * width, height * width, |scratch: &mut Scratch, plane, output| {
        let padded = sized(&mut scratch.planes, g.channel_length(), 0.0);
        phases.split(&input[plane * g.input_length()..][..g.input_length()], padded, g.channel_length());
        let weights = &weight[plane % channels * taps.len()..][..taps.len()];
        let flat = sized(&mut scratch.flat, g.positions() + STEP, 0.0);
        dispatch(Taps { plane: padded, taps: &taps, weights, positions: g.positions(), out: flat });
        copy_rows(flat, columns, output, width, width);
    })
}

/// dL/d(input) from dL/d(output): for each phase of the input, a convolution with the taps that read it, flipped.
pub fn input_gradient(g: &Geometry, channels: usize, output_gradient: &[f32], weight: &[f32]) -> Vec<f32> {
    let padding = PaddedGradient::new(g);
    let (phases, columns) = (padding.phases(g), padding.size[1]);
    let (taps, area) = (g.kernel * g.kernel, g.output().iter().product::<usize>());
    let planes = output_gradient.len() / area;
    written(planes * g.input_length(), g.input_length(), |scratch: &mut Scratch, plane, gradient| {
        let padded = sized(&mut scratch.planes, padding.length(g), 0.0);
        padding.copy(g, &output_gradient[plane * area..][..area], padded);
        let weight = &weight[plane % channels * taps..][..taps];
        for phase in &phases {
            let mut weights = [0.0; MOST_TAPS];
            let touching = weights.iter_mut().zip(&phase.kernel_taps);
            touching.for_each(|(to, &tap)| *to = weight[tap]);
            let positions = phase.part.size[0] * columns;
            let flat = sized(&mut scratch.flat, positions + STEP, 0.0);
            dispatch(Taps {
                plane: padded,
                taps: &phase.offsets,
                weights: &weights[..phase.offsets.len()],
                positions,
                out: flat,
            });
            phase.part.write(flat, columns, gradient, g.input[1]);
        }
    })
}

/// dL/d(weight), `[C, 1, k, k]`.
pub fn weight_gradient(g: &Geometry, channels: usize, input: &[f32], output_gradient: &[f32]) -> Vec<f32> {
    let (taps, phases, [height, width]) = (g.taps(), PhasePlanes::new(g), g.output());
    let columns = g.phase_plane()[1];
    let images = input.len() / g.input_length() / channels;
    let mut gradient = vec![0.0; channels * taps.len()];
    let per_channel = gradient.par_chunks_exact_mut(taps.len()).enumerate();
    per_channel.for_each_init(Scratch::default, |scratch, (channel, gradient)| {
        let mut sums = [0.0f64; MOST_TAPS];
        for image in 0..images {
            let plane = image * channels + channel;
            let padded = sized(&mut scratch.planes, g.channel_length(), 0.0);
            let source = &input[plane * g.input_length()..][..g.input_length()];
            phases.split(source, padded, g.channel_length());
            // Zero at positions that are not outputs.
            let flat = sized(&mut scratch.flat, g.positions() + STEP, 0.0);
            let source = &output_gradient[plane * height * width..][..height * width];
            copy_rows(source, width, flat, columns, width);
            let (positions, sums) = (g.positions(), &mut sums[..taps.len()]);
            dispatch(Correlate { plane: padded, taps: &taps, flat, positions, sums });
        }
        gradient.iter_mut().zip(sums).for_each(|(to, sum)| *to = sum as f32);
    });
    gradient
}

/// Taps of the largest kernel, 7 x 7.
pub const MOST_TAPS: usize = 49;

/// `out[p] = sum over taps of weight_t * plane[tap_t + p]`.
struct Taps<'a> {
    plane: &'a [f32],
    taps: &'a [usize],
    weights: &'a [f32],
    positions: usize,
    out: &'a mut [f32],
}

impl WithSimd for Taps<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = VECTORS * S::F32_LANES;
        for position in (0..self.positions).step_by(width) {
            let mut sums = [simd.splat_f32s(0.0); VECTORS];
            let plane = &self.plane[position..];
            for (&tap, &weight) in self.taps.iter().zip(self.weights) {
                // PERF: nothing in the loop may panic; see `tile` in `taps.rs`.
                let Some(values) = plane.get(tap..tap + width) else { break };
                let Ok(values) = <&[S::f32s; VECTORS]>::try_from(S::as_simd_f32s(values).0) else { break };
                let weight = simd.splat_f32s(weight);
                for v in 0..VECTORS {
                    sums[v] = simd.mul_add_f32s(weight, values[v], sums[v]);
                }
            }
            S::as_mut_simd_f32s(&mut self.out[position..][..width]).0.copy_from_slice(&sums);
        }
    }
}

/// `sums_t += sum over p of flat[p] * plane[tap_t + p]`.
struct Correlate<'a> {
    plane: &'a [f32],
    taps: &'a [usize],
    flat: &'a [f32],
    positions: usize,
    sums: &'a mut [f64],
}

/// Taps that are summed in one pass over the plane.
const TOGETHER: usize = 5;

impl WithSimd for Correlate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let length = self.positions.next_multiple_of(S::F32_LANES);
        let (gradient, _) = S::as_simd_f32s(&self.flat[..length]);
        for (taps, stored) in self.taps.chunks(TOGETHER).zip(self.sums.chunks_mut(TOGETHER)) {
            // An incomplete last pass repeats its last tap, and does not store the repetitions.
            let planes: [&[S::f32s]; TOGETHER] = std::array::from_fn(|t| {
                let tap = taps[t.min(taps.len() - 1)];
                S::as_simd_f32s(&self.plane[tap..][..length]).0
            });
            let mut sums = [simd.splat_f32s(0.0); TOGETHER];
            for (step, &gradient) in gradient.iter().enumerate() {
                for t in 0..TOGETHER {
                    let Some(&value) = planes[t].get(step) else { break };
                    sums[t] = simd.mul_add_f32s(gradient, value, sums[t]);
                }
            }
            stored
                .iter_mut()
                .zip(sums)
                .for_each(|(stored, sum)| *stored += f64::from(simd.reduce_sum_f32s(sum)));
        }
    }
}
