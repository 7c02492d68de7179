//! Batch normalisation of channels, fused with an activation.

use burn::module::{Initializer, Module, Param, RunningState};
use burn::tensor::{Device, Tensor};

use super::layers::{self, NormaliseOptions};
use super::synchronised;

pub use super::layers::Activation;

/// Options of a normalisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormOptions {
    /// Added to the variance before the square root.
    pub epsilon: f32,
    /// Weight of the batch's statistics when the running ones are updated.
    pub momentum: f64,
    /// The activation after the normalisation.
    pub activation: Activation,
}

impl NormOptions {
    /// PyTorch's defaults, followed by `activation`.
    #[must_use]
    pub const fn new(activation: Activation) -> Self {
        Self { epsilon: 1e-5, momentum: 0.1, activation }
    }
}

/// How batch normalisation behaves in a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normalise {
    /// By the batch's statistics; updates the running ones. For a training step.
    Training,
    /// By the batch's statistics, without updating the running ones. For a virtual step.
    Batch,
    /// By the running statistics; scale and shift are trained.
    Affine,
    /// By the running statistics; scale and shift are fixed. For evaluation, or training with BatchNorm frozen.
    Running,
}

impl Normalise {
    /// The same mode without updating the running statistics, for the generator's passes.
    #[must_use]
    pub fn without_moving(self) -> Self {
        if self == Self::Training { Self::Batch } else { self }
    }
}

/// Normalises every channel of `[N, C, H, W]`, then scales and shifts it.
#[derive(Module, Debug)]
pub struct BatchNorm {
    gamma: Param<Tensor<1>>,
    beta: Param<Tensor<1>>,
    running_mean: RunningState<Tensor<1>>,
    running_variance: RunningState<Tensor<1>>,
    #[module(skip)]
    options: NormOptions,
}

impl BatchNorm {
    /// A normalisation of `channels` with PyTorch's defaults, followed by `activation`.
    #[must_use]
    pub fn new(channels: usize, activation: Activation, device: &Device) -> Self {
        Self::with_options(channels, NormOptions::new(activation), device)
    }

    /// A normalisation of `channels` with these `options`.
    #[must_use]
    pub fn with_options(channels: usize, options: NormOptions, device: &Device) -> Self {
        Self {
            gamma: Initializer::Ones.init([channels], device),
            beta: Initializer::Zeros.init([channels], device),
            running_mean: RunningState::new(Tensor::zeros([channels], device)),
            running_variance: RunningState::new(Tensor::ones([channels], device)),
            options,
        }
    }

    /// PyTorch's name of the tensor `name`.
    #[must_use]
    pub fn file_name(name: &str) -> &str {
        match name {
            "gamma" => "weight",
            "beta" => "bias",
            "running_variance" => "running_var",
            other => other,
        }
    }

    /// Normalises `[N, C, H, W]`.
    #[must_use]
    pub fn forward(&self, input: Tensor<4>, mode: Normalise) -> Tensor<4> {
        self.forward_biased(input, None, mode)
    }

    /// Normalises `input` + `bias`, where `bias` `[C]` is that of the preceding convolution.
    #[must_use]
    pub fn forward_biased(&self, input: Tensor<4>, bias: Option<Tensor<1>>, mode: Normalise) -> Tensor<4> {
        let from_batch = matches!(mode, Normalise::Training | Normalise::Batch);
        let (input, shift) = match bias {
            Some(bias) if from_batch => {
                let [_, channels, _, _] = input.dims();
                (input + bias.reshape([1, channels, 1, 1]), None)
            }
            bias => (input, bias),
        };
        let statistics = if from_batch {
            let [images, channels, height, width] = input.dims();
            let own = layers::batch_statistics(input.clone());
            let (statistics, count) = synchronised::statistics(own, images * height * width);
            if mode == Normalise::Training {
                self.move_running_statistics(channels, count, &statistics);
            }
            statistics
        } else {
            let running = vec![self.running_mean.value_sync(), self.running_variance.value_sync()];
            Tensor::stack(running, 0).detach()
        };
        let (gamma, beta) = match mode {
            Normalise::Running => (self.gamma.val().detach(), self.beta.val().detach()),
            Normalise::Affine | Normalise::Batch | Normalise::Training => (self.gamma.val(), self.beta.val()),
        };
        let NormOptions { epsilon, activation, .. } = self.options;
        // With given statistics the bias is added to the shift: no further pass over the input, and its
        // gradient follows from beta's.
        let beta = match shift {
            Some(bias) => {
                let variance = self.running_variance.value_sync().detach();
                beta + bias * gamma.clone() / variance.add_scalar(epsilon).sqrt()
            }
            None => beta,
        };
        let options = NormaliseOptions { epsilon, activation, from_batch };
        layers::normalise(input, statistics, gamma, beta, options)
    }

    /// Updates the running statistics with those of a batch that has `count` values in each channel.
    fn move_running_statistics(&self, channels: usize, count: usize, statistics: &Tensor<2>) {
        // The running variance is unbiased, as in PyTorch.
        let unbiased = count as f64 / (count.max(2) - 1) as f64;
        let row = |row: usize| statistics.clone().slice([row..row + 1, 0..channels]).reshape([channels]);
        let momentum = self.options.momentum;
        let update = |running: &RunningState<Tensor<1>>, batch: Tensor<1>| {
            let kept = running.value_sync().detach().mul_scalar(1.0 - momentum);
            running.update(kept.add(batch.detach().mul_scalar(momentum)));
        };
        update(&self.running_mean, row(0));
        update(&self.running_variance, row(1).mul_scalar(unbiased));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops where something is off")]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::model::read;

    #[test]
    fn statistics_and_outputs_are_the_formulas_with_the_bias_of_a_convolution() {
        let device = Device::flex();
        // Four values of each of two channels.
        let values: [[f64; 4]; 2] = [[0.5, -1.0, 2.0, 0.0], [3.0, 3.5, 1.0, 2.0]];
        let input = || {
            let planes: Vec<f32> = (0..8).map(|at| values[at / 2 % 2][at / 4 * 2 + at % 2] as f32).collect();
            Tensor::<4>::from_data(TensorData::new(planes, [2, 2, 1, 2]), &device)
        };
        let bias = [0.25, -0.5];
        let norm = BatchNorm::new(2, Activation::None, &device);
        let told = || Tensor::<1>::from_data(TensorData::from([0.25f32, -0.5]), &device);
        let batch: Vec<[f64; 2]> = (0..2)
            .map(|c| {
                let mean = values[c].iter().sum::<f64>() / 4.0;
                let variance = values[c].iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 4.0;
                [mean + bias[c], variance]
            })
            .collect();
        // The running variance is unbiased.
        let running = batch.iter().map(|[mean, variance]| [0.1 * mean, 0.9 + 0.1 * variance * 4.0 / 3.0]);
        let running: Vec<[f64; 2]> = running.collect();
        for (mode, statistics) in
            [(Normalise::Training, &batch), (Normalise::Running, &running), (Normalise::Affine, &running)]
        {
            let output = read(norm.forward_biased(input(), Some(told()), mode)).unwrap();
            for (at, got) in output.into_iter().enumerate() {
                let c = at / 2 % 2;
                let [mean, variance] = statistics[c];
                let value = values[c][at / 4 * 2 + at % 2] + bias[c];
                let want = (value - mean) / (variance + 1e-5).sqrt();
                assert!((f64::from(got) - want).abs() < 1e-6, "{mode:?}, {at}: {got}, not {want}");
            }
            for (row, moving) in [&norm.running_mean, &norm.running_variance].into_iter().enumerate() {
                let found = read(moving.value_sync()).unwrap();
                let off = |c: usize| (f64::from(found[c]) - running[c][row]).abs();
                assert!(off(0) < 1e-6 && off(1) < 1e-6, "{mode:?}, {row}: {found:?}, not {running:?}");
            }
        }
    }
}
