//! Batch normalisation fused with its activation, and the residual sum fused with ReLU, on the CPU.
//!
//! Separate operations would each read and write every activation; these passes read it once forward and
//! twice backward. Sums are in f32 within a plane and in f64 across planes, in a fixed order.

use pulp::Arch;
use rayon::prelude::*;

use super::Activation;
use super::buffer::written;

/// Activations `[N, C, H, W]` as planes of H * W floats.
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

    fn inverse_deviation(&self, channel: usize) -> f32 {
        1.0 / (self.variance[channel] + self.epsilon).sqrt()
    }
}

/// Lanes of a sum, the same for all instruction sets: two registers of AVX2.
const LANES: usize = 16;

/// Sums of `terms(x, y)` over two planes, all in one pass.
#[inline(always)]
fn sums<const SUMS: usize>(x: &[f32], y: &[f32], terms: impl Fn(f32, f32) -> [f32; SUMS]) -> [f64; SUMS] {
    let mut lanes = [[0.0f32; LANES]; SUMS];
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    for (x, y) in x.iter().zip(y) {
        for lane in 0..LANES {
            let terms = terms(x[lane], y[lane]);
            for s in 0..SUMS {
                lanes[s][lane] += terms[s];
            }
        }
    }
    let mut rest = [0.0; SUMS];
    for (&x, &y) in x_rest.iter().zip(y_rest) {
        rest.iter_mut().zip(terms(x, y)).for_each(|(rest, term)| *rest += term);
    }
    std::array::from_fn(|s| lanes[s].iter().map(|&sum| f64::from(sum)).sum::<f64>() + f64::from(rest[s]))
}

/// The sum of `term(x)` over planes, with the instruction set of this processor.
fn sum<'a>(planes: impl Iterator<Item = &'a [f32]>, term: impl Fn(f32) -> f32) -> f64 {
    let arch = Arch::new();
    planes.map(|plane| arch.dispatch(|| sums(plane, plane, |x, _| [term(x)])[0])).sum()
}

/// Mean and biased variance of every channel: `[2, C]`.
pub fn statistics(planes: Planes, input: &[f32]) -> Vec<f32> {
    let count = (input.len() / planes.channels) as f64;
    let (means, variances): (Vec<f32>, Vec<f32>) = (0..planes.channels)
        .into_par_iter()
        .map(|channel| {
            let mean = (sum(planes.channel(input, channel), |x| x) / count) as f32;
            let squares = sum(planes.channel(input, channel), |x| (x - mean) * (x - mean));
            (mean, (squares / count) as f32)
        })
        .unzip();
    [means, variances].concat()
}

/// `y = activation(gamma * (x - mean) / sqrt(variance + epsilon) + beta)`.
pub fn forward(planes: Planes, input: &[f32], n: &Normalisation<'_>) -> Vec<f32> {
    written(input.len(), planes.area, |_: &mut (), plane, output| {
        let Affine { scale, shift } = n.affine(plane % planes.channels);
        let [floor, ceiling] = n.activation.range();
        let input = &input[plane * planes.area..][..planes.area];
        output.iter_mut().zip(input).for_each(|(y, x)| *y = (scale * x + shift).max(floor).min(ceiling));
    })
}

/// Gradients of gamma and beta, `[2, C]`. Which outputs the activation clamped is recomputed from the input.
pub fn parameter_gradient(
    planes: Planes,
    input: &[f32],
    output_gradient: &[f32],
    n: &Normalisation<'_>,
) -> Vec<f32> {
    let arch = Arch::new();
    let (gamma, beta): (Vec<f32>, Vec<f32>) = (0..planes.channels)
        .into_par_iter()
        .map(|channel| {
            let (affine, mean, range) = (n.affine(channel), n.mean[channel], n.activation.range());
            let pairs = planes.channel(input, channel).zip(planes.channel(output_gradient, channel));
            let (mut sum, mut dot) = (0.0, 0.0);
            for (x, dy) in pairs {
                let both = arch.dispatch(|| {
                    sums(x, dy, |x, dy| {
                        let passed = passed(range, affine, x, dy);
                        [passed, passed * (x - mean)]
                    })
                });
                sum += both[0];
                dot += both[1];
            }
            ((dot * f64::from(n.inverse_deviation(channel))) as f32, sum as f32)
        })
        .unzip();
    [gamma, beta].concat()
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
    written(input.len(), planes.area, |_: &mut (), plane, gradient| {
        let channel = plane % planes.channels;
        let (affine, mean, range) = (n.affine(channel), n.mean[channel], n.activation.range());
        // If the statistics are the batch's, the gradient's mean and its projection on the normalised input
        // are subtracted.
        let (mean_gradient, projection) = if n.from_batch {
            (beta[channel] / count, gamma[channel] / count * n.inverse_deviation(channel))
        } else {
            (0.0, 0.0)
        };
        let within = plane * planes.area..(plane + 1) * planes.area;
        let (input, output_gradient) = (&input[within.clone()], &output_gradient[within]);
        for ((to, &x), &dy) in gradient.iter_mut().zip(input).zip(output_gradient) {
            let dz = passed(range, affine, x, dy);
            *to = affine.scale * (dz - mean_gradient - (x - mean) * projection);
        }
    })
}

/// The gradient of the activation's input: `dy` where the output is inside the range, else 0.
#[inline(always)]
fn passed([floor, ceiling]: [f32; 2], affine: Affine, x: f32, dy: f32) -> f32 {
    let output = affine.scale * x + affine.shift;
    if output <= floor || output >= ceiling { 0.0 } else { dy }
}

/// `relu(a + b)`.
pub fn add_relu(a: &[f32], b: &[f32]) -> Vec<f32> {
    written(a.len(), CHUNK, |_: &mut (), chunk, output| {
        let (a, b) = (&a[chunk * CHUNK..], &b[chunk * CHUNK..]);
        output.iter_mut().zip(a).zip(b).for_each(|((y, a), b)| *y = (a + b).max(0.0));
    })
}

/// dL/d(a) = dL/d(b) of [`add_relu`], from its output and dL/d(output).
pub fn add_relu_gradient(output: &[f32], output_gradient: &[f32]) -> Vec<f32> {
    written(output.len(), CHUNK, |_: &mut (), chunk, gradient| {
        let (output, output_gradient) = (&output[chunk * CHUNK..], &output_gradient[chunk * CHUNK..]);
        let values = gradient.iter_mut().zip(output).zip(output_gradient);
        values.for_each(|((to, &y), &dy)| *to = if y > 0.0 { dy } else { 0.0 });
    })
}

/// Floats in a task of the elementwise passes.
const CHUNK: usize = 1 << 14;
