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
