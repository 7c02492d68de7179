//! One training step: forward, loss, backward, update; and embedding a whole split.
//!
//! The kernels return L and dL/dE; the network's backward pass starts from the
//! surrogate `sum(E * dL/dE)`, so that autodiff never sees the loss.

use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Tensor, TensorData};
use ndarray::{Array2, ArrayView2};

use super::schedule::Schedule;
use super::settings::{BatchNorm, TrainSettings};
use crate::backend::Backend;
use crate::data::ImageBatch;
use crate::loss::baseline::{self, PairLoss};
use crate::loss::{Batch, LossOutput, LossSettings};
use crate::model::{EmbeddingNetwork, Normalise};
use crate::{Error, Result};

/// PyTorch's. Burn's own default, 1e-5, is as large as many of these gradients and would brake the steps.
const ADAM_EPSILON: f32 = 1e-8;

/// A network in training.
pub struct Engine {
    /// The network as it stands.
    pub network: EmbeddingNetwork,
    /// What the loss said last.
    pub output: LossOutput,
    device: Device,
    optimizer: ModuleOptimizer,
    schedule: Schedule,
    mode: Normalise,
    backend: Box<dyn Backend>,
    pair_loss: PairLoss,
    loss: LossSettings,
}

impl Engine {
    /// An engine for `network`, whose loss is computed by `backend`.
    pub fn new(
        network: EmbeddingNetwork,
        settings: &TrainSettings,
        backend: Box<dyn Backend>,
        device: Device,
    ) -> Self {
        Self {
            network,
            output: LossOutput::default(),
            device,
            optimizer: AdamWConfig::new()
                .with_epsilon(ADAM_EPSILON)
                .with_weight_decay(settings.weight_decay)
                .init(),
            schedule: Schedule {
                peak: settings.learning_rate,
                warm_up: settings.warm_up_steps(),
                steps: settings.steps,
            },
            mode: match settings.batch_norm {
                BatchNorm::Trainable => Normalise::Training,
                BatchNorm::Frozen => Normalise::Running,
            },
            backend,
            pair_loss: settings.loss,
            loss: settings.loss_settings(),
        }
    }

    /// Loss settings in force.
    pub fn loss_settings(&self) -> &LossSettings {
        &self.loss
    }

    /// Learning rate of a step.
    pub fn learning_rate(&self, step: usize) -> f64 {
        self.schedule.learning_rate(step)
    }

    /// One step on a batch. Returns whether the weights moved: a batch that mines nothing leaves them alone.
    ///
    /// # Errors
    /// [`Error::Training`] if the embeddings are no longer finite.
    pub fn step(&mut self, step: usize, batch: &ImageBatch) -> Result<bool> {
        let images = image_tensor(batch, &self.device);
        let embeddings = self.network.forward(images, self.mode);
        let values = to_array(embeddings.clone())?;
        self.evaluate_loss(values.view(), &batch.labels).map_err(|error| diverged(error, step))?;
        if self.output.gradient.iter().all(|&entry| entry == 0.0) {
            return Ok(false);
        }
        let shape = self.output.gradient.dim();
        let gradient = self.output.gradient.iter().copied().collect::<Vec<f32>>();
        let gradient = Tensor::<2>::from_data(TensorData::new(gradient, [shape.0, shape.1]), &self.device);
        let gradients = (embeddings * gradient).sum().backward();
        let gradients = GradientsParams::from_grads(gradients, &self.network);
        let rate = self.schedule.learning_rate(step);
        let network = self.network.clone();
        self.network = self.optimizer.step(rate, network, gradients);
        Ok(true)
    }

    fn evaluate_loss(&mut self, embeddings: ArrayView2<'_, f32>, labels: &[i64]) -> Result<()> {
        let batch = Batch::square(embeddings, labels);
        match self.pair_loss {
            PairLoss::SoftContrastive => self.backend.loss(&batch, &self.loss, &mut self.output),
            baseline => baseline::evaluate(baseline, &batch, &self.loss, &mut self.output),
        }
    }

    /// The backend, for retrieval between steps.
    pub fn backend(&mut self) -> &mut dyn Backend {
        self.backend.as_mut()
    }

    /// Embeds batches of pictures by the running statistics: `[N, dim]` and the labels.
    ///
    /// # Errors
    /// What `batches` returns; [`Error::Training`] if an embedding is not finite.
    pub fn embed(
        &self,
        batches: impl Iterator<Item = Result<ImageBatch>>,
        mut progress: impl FnMut(usize),
    ) -> Result<Embedded> {
        let network = self.network.valid();
        let device = self.device.clone().inner();
        let mut embedded = Embedded::default();
        let mut dim = 0;
        for batch in batches {
            let batch = batch?;
            embedded.skipped += batch.skipped;
            if batch.labels.is_empty() {
                continue;
            }
            let values = to_array(network.forward(image_tensor(&batch, &device), Normalise::Running))?;
            dim = values.ncols();
            embedded.values.extend(values.iter());
            embedded.labels.extend(&batch.labels);
            embedded.indices.extend(&batch.indices);
            progress(embedded.labels.len());
        }
        if let Some(row) = embedded.values.iter().position(|value| !value.is_finite()) {
            let row = row / dim;
            return Err(Error::Training(format!(
                "the network maps picture {row} to NaN: lower --learning-rate, or start from another checkpoint"
            )));
        }
        Ok(embedded)
    }
}

/// A split, embedded.
#[derive(Debug, Clone, Default)]
pub struct Embedded {
    values: Vec<f32>,
    /// Label of each row.
    pub labels: Vec<i64>,
    /// Picture of each row, an index into the split.
    pub indices: Vec<usize>,
    /// Pictures left out because they cannot be read.
    pub skipped: usize,
}

impl Embedded {
    /// The embeddings, `[N, dim]`.
    ///
    /// # Errors
    /// [`Error::Dataset`] if no picture could be read.
    pub fn view(&self) -> Result<ArrayView2<'_, f32>> {
        let rows = self.labels.len();
        let dim = self.values.len().checked_div(rows).unwrap_or(0);
        ArrayView2::from_shape((rows, dim), &self.values)
            .ok()
            .filter(|view| !view.is_empty())
            .ok_or_else(|| Error::Dataset("no picture of the test classes could be read".into()))
    }
}

fn image_tensor(batch: &ImageBatch, device: &Device) -> Tensor<4> {
    let shape = [batch.labels.len(), 3, batch.image_size, batch.image_size];
    Tensor::from_data(TensorData::new(batch.pixels.clone(), shape), device)
}

fn to_array(tensor: Tensor<2>) -> Result<Array2<f32>> {
    let [rows, dim] = tensor.dims();
    let values = tensor
        .into_data()
        .try_into_vec::<f32>()
        .map_err(|error| Error::Training(format!("the embeddings cannot be read back: {error:?}")))?;
    Array2::from_shape_vec((rows, dim), values)
        .map_err(|error| Error::Training(format!("the embeddings have another shape: {error}")))
}

/// Embeddings that stop being finite or unit mean that the weights ran away.
fn diverged(error: Error, step: usize) -> Error {
    match error {
        Error::NotFinite { .. } | Error::NotUnit { .. } => {
            Error::Training(format!("training diverged at step {step} ({error}): lower --learning-rate"))
        }
        other => other,
    }
}
