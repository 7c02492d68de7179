//! Batch normalisation fused with its activation, and the residual sum fused with ReLU, on the CPU.
//!
//! Separate operations would each read and write every activation; these passes read it once forward (twice
//! with the statistics) and twice backward. Sums are in f32 within a plane and in f64 across planes, in a fixed order.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::Activation;
use super::buffer::written;
use crate::vectors::{dispatch, vectorised};

/// Activations `[N, C, H, W]` as planes of H * W floats.
#[derive(Debug, Clone, Copy)]
pub struct Planes {
    /// Channels, C.
    pub channels: usize,
    /// Floats in a plane, H * W.
    pub area: usize,
}

impl Planes {
    /// Planes in a task.
    fn together(&self) -> usize {
        (CHUNK / self.area.max(1)).max(1)
    }
}

/// The affine map of a normalisation in one channel: `y = scale * x + shift`.
#[derive(Debug, Clone, Copy)]
struct Affine {
    scale: f32,
    shift: f32,
}

/// Statistics, affine parameters and options of one normalisation.
#[derive(Debug, Clone, Copy)]
pub struct Normalisation<'a> {
    /// Mean of every channel.
    pub mean: &'a [f32],
    /// Biased variance of every channel.
    pub variance: &'a [f32],
    /// Learnt scale.
    pub gamma: &'a [f32],
    /// Learnt shift.
    pub beta: &'a [f32],
    /// Added to the variance.
    pub epsilon: f32,
    /// The activation after the normalisation.
    pub activation: Activation,
    /// Whether the statistics are the batch's own, so that the gradient depends on them.
    pub from_batch: bool,
}

impl Normalisation<'_> {
    fn affine(&self, channel: usize) -> Affine {
        let scale = self.gamma[channel] * self.inverse_deviation(channel);
        Affine { scale, shift: self.beta[channel] - scale * self.mean[channel] }
    }

    fn gate(&self, channel: usize) -> Gate {
        Gate { affine: self.affine(channel), range: self.activation.range() }
    }

    fn inverse_deviation(&self, channel: usize) -> f32 {
        1.0 / (self.variance[channel] + self.epsilon).sqrt()
    }
}

/// Terms of sums over pairs of values.
trait Terms<const SUMS: usize> {
    fn of<S: Simd>(&self, simd: S, x: S::f32s, y: S::f32s) -> [S::f32s; SUMS];
}

/// Vectors that are added one after the other. Longer sums are sums of such partial sums, which round less.
const RUN: usize = 64;

/// Sums over a pair of planes, all in one pass.
struct Sums<'a, T, const SUMS: usize> {
    x: &'a [f32],
    y: &'a [f32],
    terms: T,
}

impl<T: Terms<SUMS>, const SUMS: usize> WithSimd for Sums<'_, T, SUMS> {
    type Output = [f32; SUMS];

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> [f32; SUMS] {
        let ((x, x_rest), (y, y_rest)) = (S::as_simd_f32s(self.x), S::as_simd_f32s(self.y));
        let rest = self.terms.of(simd, simd.partial_load_f32s(x_rest), simd.partial_load_f32s(y_rest));
        let inside = simd.mask_between_m32s(0, x_rest.len() as u32).mask();
        let mut sums = [simd.splat_f32s(0.0); SUMS];
        for s in 0..SUMS {
            sums[s] = simd.select_f32s(inside, rest[s], sums[s]);
        }
        for (x, y) in x.chunks(RUN).zip(y.chunks(RUN)) {
            let mut run = [simd.splat_f32s(0.0); SUMS];
            for (&x, &y) in x.iter().zip(y) {
                let terms = self.terms.of(simd, x, y);
                for s in 0..SUMS {
                    run[s] = simd.add_f32s(run[s], terms[s]);
                }
            }
            for s in 0..SUMS {
                sums[s] = simd.add_f32s(sums[s], run[s]);
            }
        }
        std::array::from_fn(|s| simd.reduce_sum_f32s(sums[s]))
    }
}

/// Two values of every plane, from its channel and its place in all planes.
fn of_planes(
    planes: Planes,
    length: usize,
    values: impl Fn(usize, Range<usize>) -> [f32; 2] + Sync,
) -> Vec<[f32; 2]> {
    let plane = |plane| values(plane % planes.channels, plane * planes.area..(plane + 1) * planes.area);
    (0..length / planes.area).into_par_iter().with_min_len(planes.together()).map(plane).collect()
}

/// Two values of every channel, `[2, C]`.
fn of_channels(channels: usize, values: impl Fn(usize) -> [f32; 2]) -> Vec<f32> {
    let (first, second): (Vec<f32>, Vec<f32>) = (0..channels).map(|channel| values(channel).into()).unzip();
    [first, second].concat()
}

/// x itself.
struct Value;

impl Terms<1> for Value {
    #[inline(always)]
    fn of<S: Simd>(&self, _: S, x: S::f32s, _: S::f32s) -> [S::f32s; 1] {
        [x]
    }
}

/// The squared deviation of x from the mean.
struct Square {
    mean: f32,
}

impl Terms<1> for Square {
    #[inline(always)]
    fn of<S: Simd>(&self, simd: S, x: S::f32s, _: S::f32s) -> [S::f32s; 1] {
        let deviation = simd.sub_f32s(x, simd.splat_f32s(self.mean));
        [simd.mul_f32s(deviation, deviation)]
    }
}

/// The gradient of the normalised input: itself, and times the deviation of the input x from the mean.
struct Passed {
    gate: Gate,
    mean: f32,
}

impl Terms<2> for Passed {
    #[inline(always)]
    fn of<S: Simd>(&self, simd: S, x: S::f32s, dy: S::f32s) -> [S::f32s; 2] {
        let passed = self.gate.pass(simd, x, dy);
        [passed, simd.mul_f32s(passed, simd.sub_f32s(x, simd.splat_f32s(self.mean)))]
    }
}

/// Which outputs of an affine map and its activation pass on their gradient.
#[derive(Clone, Copy)]
struct Gate {
    affine: Affine,
    range: [f32; 2],
}

impl Gate {
    /// `dy` where the output of x is strictly inside the range, else 0.
    #[inline(always)]
    fn pass<S: Simd>(self, simd: S, x: S::f32s, dy: S::f32s) -> S::f32s {
        let [scale, shift, floor, ceiling] =
            [self.affine.scale, self.affine.shift, self.range[0], self.range[1]]
                .map(|value| simd.splat_f32s(value));
        let output = simd.add_f32s(simd.mul_f32s(scale, x), shift);
        // A comparison with NaN is false: the gradient of NaN is passed on.
        let outside = simd.or_m32s(
            simd.less_than_or_equal_f32s(output, floor),
            simd.less_than_or_equal_f32s(ceiling, output),
        );
        simd.select_f32s(outside, simd.splat_f32s(0.0), dy)
    }
}

/// Mean and biased variance of every channel: `[2, C]`.
pub fn statistics(planes: Planes, input: &[f32]) -> Vec<f32> {
    let area = planes.area as f64;
    // Mean of every plane, and the sum of squared deviations from it.
    let of_planes = of_planes(planes, input.len(), |_, within| {
        let (x, y) = (&input[within.clone()], &input[within]);
        let [sum] = dispatch(Sums { x, y, terms: Value });
        let mean = sum / planes.area as f32;
        let [squares] = dispatch(Sums { x, y, terms: Square { mean } });
        [mean, squares]
    });
    let count = (of_planes.len() / planes.channels) as f64;
    of_channels(planes.channels, |channel| {
        let images =
            || of_planes[channel..].iter().step_by(planes.channels).map(|values| values.map(f64::from));
        let mean = images().map(|[mean, _]| mean).sum::<f64>() / count;
        let squares: f64 =
            images().map(|[plane, squares]| squares + area * (plane - mean) * (plane - mean)).sum();
        [mean as f32, (squares / (count * area)) as f32]
    })
}

/// Calls `write(output, channel, where the plane is in all)` for every plane of a new buffer.
fn written_planes(
    planes: Planes,
    length: usize,
    write: impl Fn(&mut [f32], usize, Range<usize>) + Sync,
) -> Vec<f32> {
    let together = planes.together();
    written(length, together * planes.area, |_: &mut (), chunk, output| {
        for (plane, output) in output.chunks_exact_mut(planes.area).enumerate() {
            let plane = chunk * together + plane;
            write(output, plane % planes.channels, plane * planes.area..(plane + 1) * planes.area);
        }
    })
}

/// `y = activation(gamma * (x - mean) / sqrt(variance + epsilon) + beta)`.
pub fn forward(planes: Planes, input: &[f32], n: &Normalisation<'_>) -> Vec<f32> {
    let affine: Vec<Affine> = (0..planes.channels).map(|channel| n.affine(channel)).collect();
    let [floor, ceiling] = n.activation.range();
    written_planes(planes, input.len(), |output, channel, within| {
        let (Affine { scale, shift }, input) = (affine[channel], &input[within]);
        vectorised(
            #[inline(always)]
            || {
                output.iter_mut().zip(input).for_each(|(y, x)| {
                    // A comparison with NaN is false: NaN stays.
                    let value = scale * x + shift;
                    let value = if value < floor { floor } else { value };
                    *y = if value > ceiling { ceiling } else { value };
                });
            },
        );
    })
}

/// Gradients of gamma and beta, `[2, C]`. Which outputs the activation clamped is recomputed from the input.
pub fn parameter_gradient(
    planes: Planes,
    input: &[f32],
    output_gradient: &[f32],
    n: &Normalisation<'_>,
) -> Vec<f32> {
    let gates: Vec<Gate> = (0..planes.channels).map(|channel| n.gate(channel)).collect();
    let of_planes = of_planes(planes, input.len(), |channel, within| {
        let terms = Passed { gate: gates[channel], mean: n.mean[channel] };
        dispatch(Sums { x: &input[within.clone()], y: &output_gradient[within], terms })
    });
    of_channels(planes.channels, |channel| {
        let (mut sum, mut dot) = (0.0, 0.0);
        for [plane_sum, plane_dot] in of_planes[channel..].iter().step_by(planes.channels) {
            sum += f64::from(*plane_sum);
            dot += f64::from(*plane_dot);
        }
        [(dot * f64::from(n.inverse_deviation(channel))) as f32, sum as f32]
    })
}

/// dL/d(input) from dL/d(output) and the result of [`parameter_gradient`].
pub fn input_gradient(
    planes: Planes,
    input: &[f32],
    output_gradient: &[f32],
    parameter_gradient: &[f32],
    n: &Normalisation<'_>,
) -> Vec<f32> {
    let count = (input.len() / planes.channels) as f32;
    let (gamma, beta) = parameter_gradient.split_at(planes.channels);
    let channels: Vec<InputGradient> = (0..planes.channels)
        .map(|channel| {
            let (mean_gradient, projection) = if n.from_batch {
                (beta[channel] / count, gamma[channel] / count * n.inverse_deviation(channel))
            } else {
                (0.0, 0.0)
            };
            InputGradient { gate: n.gate(channel), mean: n.mean[channel], mean_gradient, projection }
        })
        .collect();
    written_planes(planes, input.len(), |gradient, channel, within| {
        let (x, dy) = (&input[within.clone()], &output_gradient[within]);
        dispatch(WriteInputGradient { channel: channels[channel], x, dy, gradient });
    })
}

/// What the gradient of a channel's input depends on.
#[derive(Clone, Copy)]
struct InputGradient {
    gate: Gate,
    mean: f32,
    /// If the statistics are the batch's: the gradient's mean and its projection on the normalised input, which are
    /// subtracted. Else 0.
    mean_gradient: f32,
    projection: f32,
}

impl InputGradient {
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, x: S::f32s, dy: S::f32s) -> S::f32s {
        let [scale, mean, mean_gradient, projection] =
            [self.gate.affine.scale, self.mean, self.mean_gradient, self.projection]
                .map(|value| simd.splat_f32s(value));
        let dz = simd.sub_f32s(self.gate.pass(simd, x, dy), mean_gradient);
        simd.mul_f32s(scale, simd.sub_f32s(dz, simd.mul_f32s(simd.sub_f32s(x, mean), projection)))
    }
}

struct WriteInputGradient<'a> {
    channel: InputGradient,
    x: &'a [f32],
    dy: &'a [f32],
    gradient: &'a mut [f32],
}

impl WithSimd for WriteInputGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let ((x, x_rest), (dy, dy_rest)) = (S::as_simd_f32s(self.x), S::as_simd_f32s(self.dy));
        let (to, to_rest) = S::as_mut_simd_f32s(self.gradient);
        for ((to, &x), &dy) in to.iter_mut().zip(x).zip(dy) {
            *to = self.channel.of(simd, x, dy);
        }
        let (x, dy) = (simd.partial_load_f32s(x_rest), simd.partial_load_f32s(dy_rest));
        simd.partial_store_f32s(to_rest, self.channel.of(simd, x, dy));
    }
}

/// `relu(a + b)`.
pub fn add_relu(a: &[f32], b: &[f32]) -> Vec<f32> {
    elementwise(
        a,
        b,
        #[inline(always)]
        |a, b| {
            let sum = a + b;
            if sum < 0.0 { 0.0 } else { sum }
        },
    )
}

/// dL/d(a) = dL/d(b) of [`add_relu`], from its output and dL/d(output).
pub fn add_relu_gradient(output: &[f32], output_gradient: &[f32]) -> Vec<f32> {
    elementwise(
        output,
        output_gradient,
        #[inline(always)]
        |y, dy| if y > 0.0 { dy } else { 0.0 },
    )
}

fn elementwise(a: &[f32], b: &[f32], value: impl Fn(f32, f32) -> f32 + Sync) -> Vec<f32> {
    written(a.len(), CHUNK, |_: &mut (), chunk, output| {
        let (a, b) = (&a[chunk * CHUNK..], &b[chunk * CHUNK..]);
        vectorised(
            #[inline(always)]
            || {
                output.iter_mut().zip(a).zip(b).for_each(|((to, &a), &b)| *to = value(a, b));
            },
        );
    })
}

/// Floats in a task of the elementwise passes.
const CHUNK: usize = 1 << 13;
