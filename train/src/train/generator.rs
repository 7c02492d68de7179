//! The threshold generator in a training step: its batches, backend and state.

use std::collections::VecDeque;

use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use ndarray::{Array2, ArrayView2, Axis, concatenate, s};
use serde::{Deserialize, Serialize};

use super::checkpoint::archive::Archive;
use super::memory::Memory;
use crate::data::ImageBatch;
use crate::generator::head::{Head, Losses, hypergradient};
use crate::generator::{GeneratorKind, GeneratorSettings, Lambda, MetaSource, Thresholds, UpdateRule, full};
use crate::model::{EmbeddingHead, EmbeddingNetwork, Normalise, to_array};
use crate::ranks::{Collective, gather_rows};
use crate::train::PairLoss;
use crate::{Error, Result};
use ddtas::backend::Backend;
use ddtas::loss::{Batch, LossOutput, LossSettings, ThresholdGradient};

/// The threshold generator's state in a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct GeneratorState {
    /// The members of its ensemble.
    pub thresholds: Thresholds,
    /// The last dL^m/dlambda.
    pub hypergradient: Option<Lambda>,
    /// Number of recent batches, whose features are tensors of the checkpoint.
    pub recent: usize,
}

/// The threshold generator of a run.
pub struct Generator {
    settings: GeneratorSettings,
    thresholds: Thresholds,
    /// How lambda is updated in the current step.
    rule: UpdateRule,
    /// Whether lambda is fixed.
    held: bool,
    meta: MetaLoss,
    /// Features and labels of the last batches (`--meta recent`).
    recent: VecDeque<(Array2<f64>, Vec<i64>)>,
    /// The last dL^m/dlambda.
    hypergradient: Option<ThresholdGradient>,
}

/// A training step whose gradients a virtual step of the whole network follows.
pub(super) struct WholeNetworkStep<'a> {
    pub network: &'a EmbeddingNetwork,
    pub mode: Normalise,
    /// Gradients of the weights.
    pub gradients: &'a GradientsParams,
    pub batch: &'a ImageBatch,
    /// This rank's pictures of the batch.
    pub images: Tensor<4>,
    /// Those of the whole batch.
    pub embeddings: ArrayView2<'a, f32>,
    pub meta: &'a ImageBatch,
    /// This rank's pictures of the meta batch.
    pub meta_images: Tensor<4>,
    pub memory: &'a Memory,
    pub loss: &'a LossSettings,
    pub ranks: &'a dyn Collective,
}

/// The loss of the meta batch. It has its own backend, since the training batch's pairs are needed afterwards.
struct MetaLoss {
    backend: Box<dyn Backend>,
    output: LossOutput,
    /// The reference threshold lambda_ref.
    reference: f64,
}

impl Generator {
    /// A generator with the state `thresholds`, and a separate backend for meta batches.
    #[must_use]
    pub fn new(settings: GeneratorSettings, thresholds: Thresholds, backend: Box<dyn Backend>) -> Self {
        let meta = MetaLoss { backend, output: LossOutput::default(), reference: settings.lambda_reference };
        let rule = UpdateRule::at(0, &settings);
        Self { settings, thresholds, rule, held: false, meta, recent: VecDeque::new(), hypergradient: None }
    }

    /// Fixes lambda at its current value.
    pub fn hold(&mut self) {
        self.held = true;
        self.hypergradient = None;
        self.recent.clear();
    }

    /// Begins a step. Returns whether lambda is learned in it.
    pub fn begin(&mut self, step: usize) -> bool {
        self.rule = UpdateRule::at(step, &self.settings);
        !self.held
    }

    /// Which parameters the virtual step updates.
    #[must_use]
    pub fn kind(&self) -> GeneratorKind {
        self.settings.kind
    }

    /// The thresholds learned so far.
    #[must_use]
    pub fn lambda(&self) -> Lambda {
        self.thresholds.lambda()
    }

    /// State of the members, for checkpoints.
    #[must_use]
    pub fn thresholds(&self) -> &Thresholds {
        &self.thresholds
    }

    /// Adds what the next step depends on to a checkpoint.
    pub(super) fn put(&self, archive: &mut Archive) -> GeneratorState {
        for (age, (features, labels)) in self.recent.iter().enumerate() {
            let values: Vec<f64> = features.iter().copied().collect();
            archive.put_numbers(recent_features(age), &[features.nrows(), features.ncols()], &values);
            archive.put_numbers(recent_labels(age), &[labels.len()], labels);
        }
        GeneratorState {
            thresholds: self.thresholds.clone(),
            hypergradient: self.hypergradient.map(|gradient| Lambda { pos: gradient.pos, neg: gradient.neg }),
            recent: self.recent.len(),
        }
    }

    /// Restores the state from a checkpoint; the error says what does not fit.
    pub(super) fn take(
        &mut self,
        archive: &mut Archive,
        state: &GeneratorState,
    ) -> std::result::Result<(), String> {
        state.thresholds.check(&self.settings)?;
        self.thresholds = state.thresholds.clone();
        self.hypergradient = state.hypergradient.map(|Lambda { pos, neg }| ThresholdGradient { pos, neg });
        self.recent.clear();
        for age in 0..state.recent {
            let features = archive.take_numbers::<f64>(&recent_features(age));
            let labels = archive.take_numbers::<i64>(&recent_labels(age));
            let batch = features.zip(labels).and_then(|((shape, values), (_, labels))| {
                let [rows, columns] = shape.as_slice().try_into().ok()?;
                let features = Array2::from_shape_vec((rows, columns), values).ok()?;
                (labels.len() == rows).then_some((features, labels))
            });
            self.recent
                .push_back(batch.ok_or("the features of the generator's last batches are incomplete")?);
        }
        Ok(())
    }

    /// dL^m/dlambda of the last step, averaged over the members.
    #[must_use]
    pub fn last_hypergradient(&self) -> Option<ThresholdGradient> {
        self.hypergradient
    }

    /// Updates lambda by a virtual step of the head, from the features `[B, F]` of a batch and those of a
    /// fresh meta batch or of recent batches. Returns the thresholds for this step.
    ///
    /// # Errors
    /// Errors of the backends.
    pub fn learn_head(
        &mut self,
        head: &EmbeddingHead,
        train: (Array2<f64>, &[i64]),
        fresh: Option<(Array2<f64>, &[i64])>,
        (backend, memory): (&mut dyn Backend, &Memory),
        loss: &LossSettings,
    ) -> Result<Lambda> {
        let (features, labels) = train;
        let meta = match (self.settings.meta, fresh) {
            (MetaSource::Fresh, Some((features, labels))) => Some((features, labels.to_vec())),
            (MetaSource::Fresh, None) => None,
            (MetaSource::Recent, _) => self.recent_batches()?,
        };
        if let Some((meta_features, meta_labels)) = meta {
            let weights = Head {
                weight: to_array(head.weight.val())?.mapv(f64::from),
                bias: to_array(head.bias.val().unsqueeze())?.remove_axis(Axis(0)).mapv(f64::from),
            };
            let (mut sum, mut count) = (ThresholdGradient::default(), 0.0);
            let mut output = LossOutput::default();
            for member in &mut self.thresholds.members {
                let mut losses = BackendLosses {
                    backend: &mut *backend,
                    memory,
                    output: &mut output,
                    labels,
                    loss: *loss,
                    meta: &mut self.meta,
                    meta_labels: &meta_labels,
                };
                let (train, meta) = (features.view(), meta_features.view());
                let found =
                    hypergradient(&weights, train, meta, self.settings.step(), member.lambda, &mut losses)?;
                if let Some(gradient) = found {
                    member.update(gradient, &self.rule);
                    sum = ThresholdGradient { pos: sum.pos + gradient.pos, neg: sum.neg + gradient.neg };
                    count += 1.0;
                }
            }
            if count > 0.0 {
                self.hypergradient = Some(ThresholdGradient { pos: sum.pos / count, neg: sum.neg / count });
            }
        }
        if self.settings.meta == MetaSource::Recent {
            self.recent.push_back((features, labels.to_vec()));
            if self.recent.len() > self.settings.meta_recent {
                self.recent.pop_front();
            }
        }
        Ok(self.thresholds.lambda())
    }

    /// Updates lambda by a virtual step of the whole network along the gradients of the last loss of
    /// `backend`. Returns the thresholds for the next step.
    ///
    /// # Errors
    /// Errors of the backends and of the ranks.
    pub(super) fn learn_full(
        &mut self,
        of: WholeNetworkStep<'_>,
        backend: &mut dyn Backend,
    ) -> Result<Lambda> {
        let WholeNetworkStep { batch, meta, loss, ranks, .. } = of;
        let meta_loss = &mut self.meta;
        let mut meta_gradient = |own: Array2<f32>| {
            let embeddings = gather_rows(ranks, own)?;
            let gradient = meta_loss.evaluate(embeddings.view(), &meta.labels, loss)?;
            Ok(gradient.slice(s![meta.own.clone(), ..]).to_owned())
        };
        let (network, step) = ((of.network, of.mode), self.settings.step());
        let (images, meta_images) = (of.images, of.meta_images);
        let found =
            full::tangent(network, of.gradients, step, images, meta_images, &mut meta_gradient, ranks)?;
        if let Some(full::Tangent { tangent, factor }) = found {
            let rows = (of.embeddings, batch.labels.as_slice());
            let own = (ranks, batch.own.clone());
            let ThresholdGradient { pos, neg } =
                of.memory.threshold_gradient_on_ranks(own, backend, rows, tangent.view())?;
            let gradient = ThresholdGradient { pos: factor * pos, neg: factor * neg };
            let rule = &self.rule;
            self.thresholds.members.iter_mut().for_each(|member| member.update(gradient, rule));
            self.hypergradient = Some(gradient);
        }
        Ok(self.thresholds.lambda())
    }

    /// Features and labels of the recent batches, concatenated; none before the first.
    fn recent_batches(&self) -> Result<Option<(Array2<f64>, Vec<i64>)>> {
        if self.recent.is_empty() {
            return Ok(None);
        }
        let views: Vec<_> = self.recent.iter().map(|(features, _)| features.view()).collect();
        let features = concatenate(Axis(0), &views)
            .map_err(|error| Error::Training(format!("features of two batches differ in shape: {error}")))?;
        let labels = self.recent.iter().flat_map(|(_, labels)| labels).copied().collect();
        Ok(Some((features, labels)))
    }
}

/// Name in a checkpoint of the features of one of the recent batches; 0 is the oldest.
fn recent_features(age: usize) -> String {
    format!("generator.recent.{age}.features")
}

fn recent_labels(age: usize) -> String {
    format!("generator.recent.{age}.labels")
}

impl MetaLoss {
    /// dL^m/dE.
    fn evaluate(
        &mut self,
        embeddings: ArrayView2<'_, f32>,
        labels: &[i64],
        loss: &LossSettings,
    ) -> Result<&Array2<f32>> {
        let settings = loss.with_lambda(self.reference);
        self.backend.loss(&Batch::square(embeddings, labels), &settings, &mut self.output)?;
        Ok(&self.output.gradient)
    }
}

/// The losses of a virtual step of the head, computed by the backends.
struct BackendLosses<'a> {
    backend: &'a mut dyn Backend,
    memory: &'a Memory,
    output: &'a mut LossOutput,
    labels: &'a [i64],
    loss: LossSettings,
    meta: &'a mut MetaLoss,
    meta_labels: &'a [i64],
}

impl Losses for BackendLosses<'_> {
    fn train(&mut self, embeddings: &Array2<f64>, lambda: Lambda) -> Result<Array2<f64>> {
        let embeddings = single(embeddings);
        let settings = lambda.applied_to(&self.loss);
        let rows = (embeddings.view(), self.labels);
        self.memory.loss(self.backend, PairLoss::SoftContrastive, rows, &settings, self.output)?;
        Ok(self.output.gradient.mapv(f64::from))
    }

    fn meta(&mut self, embeddings: &Array2<f64>) -> Result<Array2<f64>> {
        let gradient = self.meta.evaluate(single(embeddings).view(), self.meta_labels, &self.loss)?;
        Ok(gradient.mapv(f64::from))
    }

    fn threshold_gradient(
        &mut self,
        embeddings: &Array2<f64>,
        tangent: &Array2<f64>,
    ) -> Result<ThresholdGradient> {
        let embeddings = single(embeddings);
        let rows = (embeddings.view(), self.labels);
        self.memory.threshold_gradient(self.backend, rows, single(tangent).view())
    }
}

fn single(values: &Array2<f64>) -> Array2<f32> {
    values.mapv(|value| value as f32)
}
