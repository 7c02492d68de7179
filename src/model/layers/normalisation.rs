//! Batch normalisation joined with ReLU, and the residual sum joined with ReLU, on the CPU.
//!
//! A chain of separate operations would read and write every activation once
//! an operation; these passes touch it once forward and twice backward. Sums
//! run over whole planes in f32 and across planes in f64, in a fixed order.

use rayon::prelude::*;

/// Activations `[N, C, H, W]` seen as planes of H * W.
#[derive(Debug, Clone, Copy)]
pub struct Planes {
    /// Channels, C.
    pub channels: usize,
    /// Floats in a plane, H * W.
    pub area: usize,
}

impl Planes {
    fn image(&self) -> usize {
        self.channels * self.area
    }

    /// The planes of one channel, image by image.
    fn channel<'a>(&self, values: &'a [f32], channel: usize) -> impl Iterator<Item = &'a [f32]> + use<'a> {
        let Self { area, .. } = *self;
        values.chunks_exact(self.image()).map(move |image| &image[channel * area..][..area])
    }
}

/// What the affine part of a normalisation does in one channel: `y = scale * x + shift`.
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
    /// Whether negative results become zero.
    pub relu: bool,
    /// Whether the statistics are the batch's own, so that a gradient runs through them.
    pub from_batch: bool,
}

impl Normalisation<'_> {
    fn affine(&self, channel: usize) -> Affine {
        let scale = self.gamma[channel] * self.inverse_deviation(channel);
        Affine { scale, shift: self.beta[channel] - scale * self.mean[channel] }
    }

    fn inverse_deviation(&self, channel: usize) -> f32 {
        1.0 / (self.variance[channel] + self.epsilon).sqrt()
    }
}

/// Sum in sixteen lanes, which the compiler keeps in one register.
fn sum_lanes(length: usize, term: impl Fn(usize) -> f32) -> f64 {
    let mut lanes = [0.0f32; 16];
    let whole = length / 16 * 16;
    for from in (0..whole).step_by(16) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(from + lane);
        }
    }
    let rest: f32 = (whole..length).map(&term).sum();
    lanes.iter().map(|&sum| f64::from(sum)).sum::<f64>() + f64::from(rest)
}

/// Mean and biased variance of every channel: `[2, C]`.
pub fn statistics(planes: Planes, input: &[f32]) -> Vec<f32> {
    let count = (input.len() / planes.channels) as f64;
    let (means, variances): (Vec<f32>, Vec<f32>) = (0..planes.channels)
        .into_par_iter()
        .map(|channel| {
            let sum: f64 =
                planes.channel(input, channel).map(|plane| sum_lanes(plane.len(), |k| plane[k])).sum();
            let mean = (sum / count) as f32;
            let squares: f64 = planes
                .channel(input, channel)
                .map(|plane| sum_lanes(plane.len(), |k| (plane[k] - mean) * (plane[k] - mean)))
                .sum();
            (mean, (squares / count) as f32)
        })
        .unzip();
    [means, variances].concat()
}

/// `y = relu(gamma * (x - mean) / sqrt(variance + epsilon) + beta)`.
pub fn forward(planes: Planes, input: &[f32], n: &Normalisation<'_>) -> Vec<f32> {
    let mut output = vec![0.0; input.len()];
    output.par_chunks_mut(planes.area).zip(input.par_chunks(planes.area)).enumerate().for_each(
        |(plane, (output, input))| {
            let Affine { scale, shift } = n.affine(plane % planes.channels);
            let floor = if n.relu { 0.0 } else { f32::NEG_INFINITY };
            output.iter_mut().zip(input).for_each(|(y, x)| *y = (scale * x + shift).max(floor));
        },
    );
    output
}

/// Gradients of gamma and beta, `[2, C]`. Which outputs were cut by the ReLU is computed again from the input.
pub fn parameter_gradient(
    planes: Planes,
    input: &[f32],
    output_gradient: &[f32],
    n: &Normalisation<'_>,
) -> Vec<f32> {
    let (gamma, beta): (Vec<f32>, Vec<f32>) = (0..planes.channels)
        .into_par_iter()
        .map(|channel| {
            let (affine, mean) = (n.affine(channel), n.mean[channel]);
            let pairs = planes.channel(input, channel).zip(planes.channel(output_gradient, channel));
            let (sum, dot) = pairs.fold((0.0, 0.0), |(sum, dot), (x, dy)| {
                let passed = |k: usize| passed(n, affine, x[k], dy[k]);
                (sum + sum_lanes(x.len(), passed), dot + sum_lanes(x.len(), |k| passed(k) * (x[k] - mean)))
            });
            ((dot * f64::from(n.inverse_deviation(channel))) as f32, sum as f32)
        })
        .unzip();
    [gamma, beta].concat()
}

/// dL/d(input) from dL/d(output) and what [`parameter_gradient`] returned.
pub fn input_gradient(
    planes: Planes,
    input: &[f32],
    output_gradient: &[f32],
    parameter_gradient: &[f32],
    n: &Normalisation<'_>,
) -> Vec<f32> {
    let count = (input.len() / planes.channels) as f32;
    let (gamma, beta) = parameter_gradient.split_at(planes.channels);
    let mut gradient = vec![0.0; input.len()];
    gradient
        .par_chunks_mut(planes.area)
        .zip(input.par_chunks(planes.area).zip(output_gradient.par_chunks(planes.area)))
        .enumerate()
        .for_each(|(plane, (gradient, (input, output_gradient)))| {
            let channel = plane % planes.channels;
            let (affine, mean) = (n.affine(channel), n.mean[channel]);
            // Through the batch's own statistics, the mean of the gradient and
            // its projection on the normalised input drop out.
            let (mean_gradient, projection) = if n.from_batch {
                (beta[channel] / count, gamma[channel] / count * n.inverse_deviation(channel))
            } else {
                (0.0, 0.0)
            };
            for ((to, &x), &dy) in gradient.iter_mut().zip(input).zip(output_gradient) {
                let dz = passed(n, affine, x, dy);
                *to = affine.scale * (dz - mean_gradient - (x - mean) * projection);
            }
        });
    gradient
}

/// The gradient that comes through the ReLU.
#[inline(always)]
fn passed(n: &Normalisation<'_>, affine: Affine, x: f32, dy: f32) -> f32 {
    if n.relu && affine.scale * x + affine.shift <= 0.0 { 0.0 } else { dy }
}

/// `relu(a + b)`.
pub fn add_relu(a: &[f32], b: &[f32]) -> Vec<f32> {
    let mut output = vec![0.0; a.len()];
    output
        .par_chunks_mut(CHUNK)
        .zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)))
        .for_each(|(y, (a, b))| y.iter_mut().zip(a).zip(b).for_each(|((y, a), b)| *y = (a + b).max(0.0)));
    output
}

/// dL/d(a) = dL/d(b) of [`add_relu`], from its output and dL/d(output).
pub fn add_relu_gradient(output: &[f32], output_gradient: &[f32]) -> Vec<f32> {
    let mut gradient = vec![0.0; output.len()];
    gradient
        .par_chunks_mut(CHUNK)
        .zip(output.par_chunks(CHUNK).zip(output_gradient.par_chunks(CHUNK)))
        .for_each(|(to, (y, dy))| {
            to.iter_mut().zip(y).zip(dy).for_each(|((to, &y), &dy)| *to = if y > 0.0 { dy } else { 0.0 });
        });
    gradient
}

/// Floats a task of the elementwise passes takes.
const CHUNK: usize = 1 << 14;
