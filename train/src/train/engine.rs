//! One training step: forward, loss, backward, update; and embedding a whole split.
//!
//! The backend of the loss computes L and dL/dE; the network's backward pass starts from dL/dE ([`backward`]).

use std::rc::Rc;

use burn::module::Module;
use burn::optim::ModuleOptimizer;
use burn::tensor::{Device, Tensor};
use ndarray::{ArrayView2, Axis};
use serde::{Deserialize, Serialize};

use super::average::Average;
use super::checkpoint::archive::Archive;
use super::checkpoint::moments;
use super::chunks;
use super::generator::{Generator, GeneratorState, WholeNetworkStep};
use super::memory::Memory;
use super::schedule::Schedule;
use super::settings::{BatchNorm, TrainSettings};
use crate::data::{ImageBatch, Split};
use crate::generator::{GeneratorKind, Lambda};
use crate::model::ranks::{check_same_weights, mean_statistics, sum_gradients};
use crate::model::{EmbeddingNetwork, Normalise, backward, synchronised, to_array};
use crate::ranks::{Collective, One, gather, gather_rows};
use crate::train::PairLoss;
use crate::{Error, Result};
use ddtas::backend::Backend;
use ddtas::loss::{LossOutput, LossSettings};
use ddtas_io::Error as Program;

/// Advice for a run that diverged.
pub(super) const REMEDY: &str = "begin anew with a lower --learning-rate or a longer --warm-up";

/// State of the engine in a checkpoint, besides weights, moments and memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct EngineState {
    /// Loss thresholds in force.
    pub lambda: Lambda,
    /// Learned loss thresholds that apply from the next step on.
    pub pending: Option<Lambda>,
    /// The threshold generator.
    pub generator: Option<GeneratorState>,
}

/// How a step computes the gradients of the weights from dL/dE.
#[derive(Clone, Copy)]
enum GradientPath {
    /// Through the network.
    Whole,
    /// Through the network in chunks, with another forward pass of each.
    Chunks,
    /// Through the embedding head only.
    Head,
}

/// A network in training.
pub struct Engine {
    /// The network.
    pub network: EmbeddingNetwork,
    /// Output of the last loss.
    pub output: LossOutput,
    device: Device,
    optimizer: ModuleOptimizer,
    schedule: Schedule,
    /// Number of first steps in which only the head is trained.
    head_steps: usize,
    /// Pictures that go through the network at a time; 0 for all.
    chunk_size: usize,
    mode: Normalise,
    /// Whether batch normalisation uses the batch of all ranks.
    is_synchronised: bool,
    average: Option<Average>,
    backend: Box<dyn Backend>,
    pair_loss: PairLoss,
    loss: LossSettings,
    memory: Memory,
    generator: Option<Generator>,
    /// Lambda learned in the last step, which applies from the next step on.
    pending: Option<Lambda>,
    spread: f64,
    /// The ranks that share each batch.
    ranks: Rc<dyn Collective>,
    /// Bytes that this rank sent to others in the last step.
    sent: u64,
}

impl Engine {
    /// An engine that trains `network` with a loss computed by `backend` and with lambda from `generator`, if any.
    pub fn new(
        network: EmbeddingNetwork,
        settings: &TrainSettings,
        backend: Box<dyn Backend>,
        generator: Option<Generator>,
        device: Device,
    ) -> Self {
        let mut loss = settings.loss_settings();
        if let Some(generator) = &generator {
            loss = generator.lambda().applied_to(&loss);
        }
        let (optimizer, average, schedule, memory) = fresh(&network, settings);
        Self {
            optimizer,
            average,
            network,
            output: LossOutput::default(),
            device,
            schedule,
            head_steps: settings.optimizer.head_steps,
            chunk_size: settings.optimizer.chunk_size,
            mode: match settings.batch_norm {
                BatchNorm::Trainable | BatchNorm::Synchronised => Normalise::Training,
                BatchNorm::FrozenStatistics => Normalise::Affine,
                BatchNorm::Frozen => Normalise::Running,
            },
            is_synchronised: settings.batch_norm == BatchNorm::Synchronised,
            backend,
            pair_loss: settings.loss,
            loss,
            memory,
            generator,
            pending: None,
            spread: f64::NAN,
            ranks: Rc::new(One),
            sent: 0,
        }
    }

    /// The same engine, with each batch divided among `ranks`.
    #[must_use]
    pub fn with_ranks(self, ranks: Rc<dyn Collective>) -> Self {
        Self { ranks, ..self }
    }

    /// Bytes that this rank sent to others in the last step; `None` if there are no others.
    pub fn sent(&self) -> Option<u64> {
        (self.ranks.size() > 1).then_some(self.sent)
    }

    /// Checks that all ranks have the same weights before step `step`.
    pub(super) fn check_weights(&self, step: usize) -> Result<()> {
        check_same_weights(&*self.ranks, &self.network, step)
    }

    /// Checks that a batch of `pictures` has one for each rank; `names` are the settings whose product it is.
    pub(super) fn check_batch(&self, (names, pictures): (&'static str, usize)) -> Result<()> {
        if pictures < self.ranks.size() {
            let ranks = self.ranks.size();
            let reason =
                format!("needs at least one picture for each rank: give more, or fewer than {ranks} --ranks");
            return Err(Error::misuse(names, pictures, reason));
        }
        if self.is_synchronised && self.ranks.size() > 1 && self.chunk_size > 0 {
            // Ranks may have different numbers of chunks, each with its own normalisation.
            let reason = "does not go with --batch-norm synchronised and --ranks";
            return Err(Error::misuse("chunk-size", self.chunk_size, reason));
        }
        Ok(())
    }

    /// Begins a rehearsal of `steps` steps. Its learning rate rises like the run's; a cosine schedule falls
    /// to 0 at its end.
    pub fn rehearse(&mut self, steps: usize) {
        let schedule = self.schedule.clone();
        self.schedule = Schedule { warm_up: schedule.warm_up.min(steps / 2), steps, ..schedule };
    }

    /// Starts again with `network`. Only lambda is kept, and is fixed from now on.
    pub fn restart(&mut self, network: EmbeddingNetwork, settings: &TrainSettings) {
        (self.optimizer, self.average, self.schedule, self.memory) = fresh(&network, settings);
        (self.network, self.output, self.pending) = (network, LossOutput::default(), None);
        if let Some(generator) = &self.generator {
            self.loss = generator.lambda().applied_to(&self.loss);
        }
        self.hold_lambda();
    }

    /// Fixes lambda at its current value.
    pub fn hold_lambda(&mut self) {
        if let Some(generator) = &mut self.generator {
            generator.hold();
        }
    }

    /// Adds everything that the next step depends on to a checkpoint, except the network's weights.
    pub(super) fn put(&self, archive: &mut Archive) -> std::result::Result<EngineState, String> {
        moments::put(archive, &self.optimizer, &self.network)?;
        self.memory.put(archive);
        self.average.as_ref().map_or(Ok(()), |average| average.put(archive))?;
        Ok(EngineState {
            lambda: Lambda { pos: self.loss.lambda_pos, neg: self.loss.lambda_neg },
            pending: self.pending,
            generator: self.generator.as_ref().map(|generator| generator.put(archive)),
        })
    }

    /// Restores the optimizer's moments, if any, from a checkpoint whose weights the network already has. The
    /// error says what does not fit.
    pub(super) fn take_optimizer(&mut self, archive: &mut Archive) -> std::result::Result<(), String> {
        if moments::are_in(archive) {
            self.optimizer = moments::take(archive, self.optimizer.clone(), &self.network)?;
        }
        Ok(())
    }

    /// Restores the state from a checkpoint whose weights the network already has. The error says what does not fit.
    pub(super) fn take(
        &mut self,
        archive: &mut Archive,
        state: &EngineState,
    ) -> std::result::Result<(), String> {
        let fresh = self.optimizer.clone();
        self.optimizer = moments::take(archive, fresh, &self.network)?;
        self.memory.take(archive)?;
        self.average.as_mut().map_or(Ok(()), |average| average.take(archive))?;
        self.loss = state.lambda.applied_to(&self.loss);
        self.pending = state.pending;
        match (&mut self.generator, &state.generator) {
            (Some(generator), Some(state)) => generator.take(archive, state),
            (None, None) => Ok(()),
            _ => Err("its generator is not that of --generator in config.toml".into()),
        }
    }

    /// Loss settings in force.
    pub fn loss_settings(&self) -> &LossSettings {
        &self.loss
    }

    /// The network that is evaluated and saved: the moving average of the weights, if there is one.
    pub fn evaluated(&self) -> EmbeddingNetwork {
        self.average.as_ref().map_or_else(|| self.network.valid(), |average| average.network().clone())
    }

    /// Learning rate of a step; that of the backbone if the head has its own.
    pub fn learning_rate(&self, step: usize) -> f64 {
        self.schedule.learning_rate(step)
    }

    /// Root mean square distance of the last step's embeddings from their mean.
    pub fn spread(&self) -> f64 {
        self.spread
    }

    /// The threshold generator, if there is one.
    pub fn generator(&self) -> Option<&Generator> {
        self.generator.as_ref()
    }

    /// Takes one step on a batch; each rank has its own pictures of it. `meta` is the generator's batch, if
    /// it draws one. Returns whether the weights changed: a batch without mined pairs does not change them.
    ///
    /// # Errors
    /// [`Error::Diverged`] if the embeddings are no longer finite; [`Error::Rank`] if another rank has failed.
    pub fn step(&mut self, step: usize, batch: &ImageBatch, meta: Option<&ImageBatch>) -> Result<bool> {
        if self.is_synchronised {
            let ranks = Rc::clone(&self.ranks);
            return synchronised::over(&ranks, || self.take_step(step, batch, meta));
        }
        self.take_step(step, batch, meta)
    }

    fn take_step(&mut self, step: usize, batch: &ImageBatch, meta: Option<&ImageBatch>) -> Result<bool> {
        let sent = self.ranks.sent();
        if let Some(lambda) = self.pending.take() {
            self.loss = lambda.applied_to(&self.loss);
        }
        let (features, embeddings, path) = self.forward(step, batch);
        let learns = self.generator.as_mut().is_some_and(|generator| generator.begin(step));
        let meta = meta.filter(|_| learns);
        if learns {
            self.learn_by_head(features, &batch.labels, meta).map_err(|error| diverged(error, step))?;
        }
        let values = gather_rows(&*self.ranks, to_array(embeddings.clone())?)?;
        self.spread = spread(values.view());
        let moved = self.evaluate_loss(values.view(), batch).map_err(|error| diverged(error, step))?;
        if moved {
            self.update(step, batch, (embeddings, path, values.view()), meta)?;
        }
        if self.mode == Normalise::Training && !self.is_synchronised && self.ranks.size() > 1 {
            let share = batch.own.len() as f64 / batch.labels.len() as f64;
            self.network = mean_statistics(&*self.ranks, self.network.clone(), share)?;
        }
        self.memory.push(step, values.view(), &batch.labels);
        if let Some(average) = &mut self.average {
            average.update(&self.network, step);
        }
        self.sent = self.ranks.sent() - sent;
        Ok(moved)
    }

    /// Features and embeddings of the rank's own pictures, and the path from dL/dE to the weights.
    fn forward(&self, step: usize, batch: &ImageBatch) -> (Tensor<2>, Tensor<2>, GradientPath) {
        let rows = batch.own.len();
        let constant = || chunks::features(&self.network, batch, self.chunk_size, self.mode, &self.device);
        if step < self.head_steps {
            let features = Tensor::from_inner(constant());
            (features.clone(), self.network.head.forward(features), GradientPath::Head)
        } else if (1..rows).contains(&self.chunk_size) {
            let features = constant();
            (features.clone(), self.network.head.valid().forward(features), GradientPath::Chunks)
        } else {
            let images = image_tensor(batch, &self.device);
            let features = self.network.features(images, self.mode);
            (features.clone(), self.network.head.forward(features), GradientPath::Whole)
        }
    }

    /// Updates the weights by the last gradient, and lambda with `--generator full`.
    fn update(
        &mut self,
        step: usize,
        batch: &ImageBatch,
        (embeddings, path, values): (Tensor<2>, GradientPath, ArrayView2<'_, f32>),
        meta: Option<&ImageBatch>,
    ) -> Result<()> {
        let gradient = &self.output.gradient;
        let gradients = match path {
            GradientPath::Whole => backward(embeddings, gradient, &self.network),
            GradientPath::Head => backward(embeddings, gradient, &self.network.head),
            GradientPath::Chunks => {
                let size = self.chunk_size;
                chunks::gradients(&self.network, batch, gradient, size, self.mode, &self.device)
            }
        };
        let gradients = sum_gradients(&*self.ranks, &self.network, gradients)?;
        if let (Some(generator), Some(meta)) = (&mut self.generator, meta)
            && generator.kind() == GeneratorKind::Full
        {
            let device = self.device.clone().inner();
            let whole = WholeNetworkStep {
                network: &self.network,
                mode: self.mode,
                gradients: &gradients,
                batch,
                images: image_tensor(batch, &device),
                embeddings: values,
                meta,
                meta_images: image_tensor(meta, &self.device),
                memory: &self.memory,
                loss: &self.loss,
                ranks: &*self.ranks,
            };
            let learned = generator.learn_full(whole, &mut *self.backend);
            let learned = learned.map_err(|error| diverged(error, step))?;
            self.pending = Some(learned);
        }
        let rate = self.schedule.learning_rate(step);
        let network = self.network.clone();
        self.network = self.optimizer.step(rate, network, gradients);
        Ok(())
    }

    /// Updates lambda with `--generator head`.
    fn learn_by_head(
        &mut self,
        features: Tensor<2>,
        labels: &[i64],
        meta: Option<&ImageBatch>,
    ) -> Result<()> {
        let Some(generator) = &mut self.generator else { return Ok(()) };
        if generator.kind() != GeneratorKind::Head {
            return Ok(());
        }
        // The virtual step updates only the head's linear map, so it uses that map's input.
        let head = self.network.head.clone();
        let features = gather_rows(&*self.ranks, to_array(head.input(features))?)?.mapv(f64::from);
        let fresh = match meta {
            Some(meta) => {
                let images = image_tensor(meta, &self.device.clone().inner());
                let features = self.network.valid().features(images, self.mode.without_moving());
                let features = gather_rows(&*self.ranks, to_array(head.input(features))?)?;
                Some((features.mapv(f64::from), meta.labels.as_slice()))
            }
            None => None,
        };
        let lambda = generator.learn_head(
            &head,
            (features, labels),
            fresh,
            (&mut *self.backend, &self.memory),
            &self.loss,
        )?;
        self.loss = lambda.applied_to(&self.loss);
        Ok(())
    }

    /// Evaluates the loss of the whole batch, and the gradient of the rank's own rows. Returns whether any gradient is not 0.
    fn evaluate_loss(&mut self, embeddings: ArrayView2<'_, f32>, batch: &ImageBatch) -> Result<bool> {
        let (rows, own) = ((embeddings, batch.labels.as_slice()), (&*self.ranks, batch.own.clone()));
        let (backend, output) = (&mut *self.backend, &mut self.output);
        self.memory.loss_on_ranks(own, backend, self.pair_loss, rows, &self.loss, output)
    }

    /// The network's device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The backend, for retrieval between steps.
    pub fn backend(&mut self) -> &mut dyn Backend {
        self.backend.as_mut()
    }

    /// Embeds batches of pictures in evaluation mode. Each rank has its own batches.
    ///
    /// # Errors
    /// Errors of `batches`; [`Error::Diverged`] if an embedding is not finite.
    pub fn embed(
        &self,
        batches: impl Iterator<Item = Result<ImageBatch>>,
        progress: impl FnMut(usize),
    ) -> Result<Embedded> {
        let network = self.evaluated();
        let embed = |images| network.forward(images, Normalise::Running);
        embed_batches(embed, &self.device.clone().inner(), batches, progress)
    }
}

/// Embeds batches of pictures by `network`; `progress` is called with the number of pictures done.
///
/// # Errors
/// Errors of `batches`; [`Error::Diverged`] if an embedding is not finite.
pub fn embed_batches(
    network: impl Fn(Tensor<4>) -> Tensor<2>,
    device: &Device,
    batches: impl Iterator<Item = Result<ImageBatch>>,
    mut progress: impl FnMut(usize),
) -> Result<Embedded> {
    let mut embedded = Embedded::default();
    let mut dim = 0;
    for batch in batches {
        let batch = batch?;
        if batch.labels.is_empty() {
            continue;
        }
        let values = to_array(network(image_tensor(&batch, device)))?;
        dim = values.ncols();
        embedded.values.extend(values.iter());
        embedded.labels.extend(&batch.labels);
        embedded.indices.extend(&batch.indices);
        progress(embedded.labels.len());
    }
    if let Some(row) = embedded.values.iter().position(|value| !value.is_finite()) {
        let row = row / dim;
        return Err(Error::Diverged(format!(
            "the network maps picture {row} to NaN: training diverged; {REMEDY}"
        )));
    }
    Ok(embedded)
}

/// The first picture of `split` whose embedding is all zeros, so that it has no direction: its file or its place.
#[must_use]
pub fn without_direction(embedded: &Embedded, split: &Split) -> Option<String> {
    let dim = embedded.values.len() / embedded.labels.len().max(1);
    let mut rows = embedded.values.chunks_exact(dim.max(1)).zip(&embedded.indices);
    let (_, &index) = rows.find(|(row, _)| row.iter().all(|&value| value == 0.0))?;
    let file = split.sources()[index].path();
    Some(match file.as_os_str().is_empty() {
        true => format!("picture {} (class {})", index + 1, split.class_name(index)),
        false => file.display().to_string(),
    })
}

/// The embeddings of a split.
#[derive(Debug, Clone, Default)]
pub struct Embedded {
    pub(super) values: Vec<f32>,
    /// Label of each row.
    pub labels: Vec<i64>,
    /// Picture of each row, an index into the split.
    pub indices: Vec<usize>,
}

impl Embedded {
    /// Concatenates the embeddings of all ranks, in their order.
    ///
    /// # Errors
    /// [`Error::Rank`] if another rank has failed.
    pub fn of_all(self, ranks: &dyn Collective) -> Result<Self> {
        if ranks.size() == 1 {
            return Ok(self);
        }
        let (labels, indices) = (gather(ranks, &self.labels)?, gather(ranks, &self.indices)?);
        Ok(Self { values: gather(ranks, &self.values)?, labels, indices })
    }

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

/// Root mean square distance of the rows from their mean; NaN without rows.
fn spread(rows: ArrayView2<'_, f32>) -> f64 {
    let rows = rows.mapv(f64::from);
    let Some(mean) = rows.mean_axis(Axis(0)) else { return f64::NAN };
    let squares = (&rows - &mean).iter().map(|distance| distance * distance).sum::<f64>();
    (squares / rows.nrows() as f64).sqrt()
}

/// Initial optimizer, moving average, schedule and memory for `network`.
fn fresh(
    network: &EmbeddingNetwork,
    settings: &TrainSettings,
) -> (ModuleOptimizer, Option<Average>, Schedule, Memory) {
    let decay = settings.optimizer.ema;
    (
        settings.optimizer.optimizer(network, settings.learning_rate, settings.weight_decay),
        (decay > 0.0).then(|| Average::new(network, decay)),
        settings.schedule(),
        Memory::new(settings.memory_size, settings.memory_start_step(), settings.embedding_dim),
    )
}

/// The rank's own pictures of a batch.
fn image_tensor(batch: &ImageBatch, device: &Device) -> Tensor<4> {
    chunks::images(batch, 0..batch.own.len(), device)
}

/// Converts the loss's errors about embeddings that are not finite or not of unit norm: training diverged.
fn diverged(error: Error, step: usize) -> Error {
    match error {
        Error::Program(Program::Library(ddtas::Error::NotFinite { .. } | ddtas::Error::NotUnit { .. })) => {
            Error::Diverged(format!(
                "training diverged at step {}: an embedding is no longer a finite unit vector; {REMEDY}",
                step + 1
            ))
        }
        other => other,
    }
}
