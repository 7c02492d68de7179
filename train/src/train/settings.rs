//! All settings of a training run: the arguments of `ddtas-train`, and the run's config.toml.

use std::path::{Path, PathBuf};

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use serde::{Deserialize, Serialize};

use crate::arguments::{defaults, name_of};
use crate::data::{AugmentSettings, DatasetSettings, Split, check_image_size};
use crate::error::{check, fits};
use crate::generator::{GeneratorKind, GeneratorSettings, Lambda};
use crate::model::{BackboneKind, HeadKind, NetworkShape, PoolingKind, network_sizes};
use crate::train::PairLoss;
use crate::train::optimizer::OptimizerSettings;
use crate::train::schedule::Schedule;
use crate::{Error, Result};
use ddtas::loss::{LossSettings, Mining};
use ddtas_io::console::counted;

/// Upper bound of numbers of steps; sums and products of two such numbers do not overflow.
const MOST_STEPS: usize = 1 << 31;
const STEPS: &str = "1 to 2147483648";
/// Default number of classes in a batch, if there are as many.
const CLASSES_PER_BATCH: usize = 16;
/// Default number of epochs between evaluations, and the most evaluations of a run by default, the first and last included:
/// where an epoch has few steps, evaluations would take longer than the training.
const EVALUATE_EVERY: usize = 2;
const MOST_EVALUATIONS: usize = 20;
const COUNT: &str = "0 to 2147483648";

/// Removed settings that files of older versions hold: table, key, and the value that every run has now.
const REMOVED: [(&str, &str, &str); 1] = [("generator", "meta_objective", "loss")];

/// Removes from the settings in a file those that no longer exist, if they have the value that every run has now.
pub(super) fn drop_removed(settings: &mut toml::Table) {
    for (table, key, value) in REMOVED {
        if let Some(toml::Value::Table(table)) = settings.get_mut(table)
            && table.get(key).and_then(toml::Value::as_str) == Some(value)
        {
            table.remove(key);
        }
    }
}

/// Batch normalisation while training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BatchNorm {
    /// By the statistics of the batch, on each rank those of its own pictures; scale and shift are trained.
    #[default]
    Trainable,
    /// As trainable, but by the pictures of all ranks.
    Synchronised,
    /// By the statistics of the checkpoint it started from; scale and shift are trained.
    FrozenStatistics,
    /// By the statistics of the checkpoint it started from; nothing is trained.
    Frozen,
}

impl BatchNorm {
    /// Whether the initial statistics are kept.
    fn is_frozen(self) -> bool {
        matches!(self, Self::FrozenStatistics | Self::Frozen)
    }
}

/// Settings of a training run. The defaults are those of `ddtas-train` without arguments.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct TrainSettings {
    /// The data set.
    #[command(flatten, next_help_heading = "Data")]
    #[serde(flatten)]
    pub data: DatasetSettings,

    /// Side of the square pictures the network sees, in pixels.
    #[arg(long, default_value_t = 48, help_heading = "Data")]
    pub image_size: usize,
    /// Dimensions of an embedding.
    #[arg(long, default_value_t = 128, help_heading = "Network")]
    pub embedding_dim: usize,
    /// The network that turns pictures into features.
    #[arg(long, value_enum, default_value_t, help_heading = "Network")]
    #[serde(default)]
    pub backbone: BackboneKind,
    /// Pretrained weights of --backbone: .safetensors, .pth or .pt.
    #[arg(long, value_name = "FILE", help_heading = "Network")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<PathBuf>,
    /// How features are pooled over the picture [default: avg; cls for a transformer].
    #[arg(long, value_enum, help_heading = "Network", hide_short_help = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pooling: Option<PoolingKind>,
    /// Channels of the first stage of --backbone residual; the next two stages have twice and four times as many.
    #[arg(long, default_value_t = 32, help_heading = "Network", hide_short_help = true)]
    pub width: usize,
    /// Residual blocks per stage of --backbone residual.
    #[arg(long, default_value_t = 1, help_heading = "Network", hide_short_help = true)]
    pub depth: usize,
    /// The layers between the backbone's features and the embedding.
    #[arg(long, value_enum, default_value_t, help_heading = "Network", hide_short_help = true)]
    #[serde(default)]
    pub head: HeadKind,
    /// Batch normalisation while training; frozen needs --weights or --init.
    #[arg(long, value_enum, default_value_t, help_heading = "Network", hide_short_help = true)]
    pub batch_norm: BatchNorm,
    /// Start from the weights of a checkpoint of ddtas-train, or of the best checkpoint in a run folder.
    #[arg(long, value_name = "FILE|RUN", help_heading = "Network")]
    pub init: Option<PathBuf>,

    /// The loss.
    #[arg(long, value_enum, default_value_t, help_heading = "Loss")]
    pub loss: PairLoss,
    /// Which pairs enter the loss.
    #[arg(long, default_value_t, value_parser = mining(), help_heading = "Loss")]
    pub mining: Mining,
    /// Mining tolerance gamma, a difference of cosine similarities.
    #[arg(long, default_value_t = 0.1, help_heading = "Loss", hide_short_help = true)]
    pub gamma: f64,
    /// Tolerance for negatives, as a multiple of gamma: 0.1 in the paper, more from random weights.
    #[arg(long, default_value_t = 0.5, help_heading = "Loss", hide_short_help = true)]
    pub negative_ratio: f64,
    /// AT-ASMS adapts the tolerances in batches where the negatives within this multiple of gamma (the probe) outnumber
    /// the positives.
    #[arg(long, default_value_t = 0.1, help_heading = "Loss", hide_short_help = true)]
    pub probe_ratio: f64,
    /// Factor k of AT-ASMS: it scales gamma by 1 + t for positives and by 1 - t for negatives, with t below k.
    #[arg(long, default_value_t = 0.5, help_heading = "Loss", hide_short_help = true)]
    pub tolerance: f64,
    /// Steepness of the loss on negatives: 40 in the paper, less from random weights.
    #[arg(long, default_value_t = 20.0, help_heading = "Loss", hide_short_help = true)]
    pub alpha: f64,
    /// Steepness of the loss on positives.
    #[arg(long, default_value_t = 2.0, help_heading = "Loss", hide_short_help = true)]
    pub beta: f64,
    /// Loss threshold lambda, a cosine similarity: 0.7 in the paper, 0.8 to 0.9 from random weights.
    #[arg(long, default_value_t = 0.8, allow_negative_numbers = true, help_heading = "Loss")]
    pub lambda: f64,
    /// Loss threshold of positives [default: --lambda].
    #[arg(long, allow_negative_numbers = true, help_heading = "Loss", hide_short_help = true)]
    pub lambda_pos: Option<f64>,
    /// Loss threshold of negatives [default: --lambda].
    #[arg(long, allow_negative_numbers = true, help_heading = "Loss", hide_short_help = true)]
    pub lambda_neg: Option<f64>,
    /// Margin of --loss contrastive and multi-similarity, a cosine similarity: contrastive pushes negatives below it,
    /// multi-similarity weights pairs by their distance to it [default: 0.5].
    #[arg(long, allow_negative_numbers = true, help_heading = "Loss", hide_short_help = true)]
    pub margin: Option<f64>,

    /// Classes in a batch (P) [default: 16, or all there are].
    #[arg(long, value_name = "P", help_heading = "Batches")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes_per_batch: Option<usize>,
    /// Pictures of each class in a batch (K).
    #[arg(long, value_name = "K", default_value_t = 5, help_heading = "Batches")]
    pub images_per_class: usize,
    /// How training pictures are varied.
    #[command(flatten, next_help_heading = "Data")]
    #[serde(flatten)]
    pub augment: AugmentSettings,
    /// Training steps; with --resume those of the whole run, which may be more or fewer than before.
    #[arg(long, default_value_t = 200, help_heading = "Runs")]
    pub steps: usize,
    /// Peak learning rate.
    #[arg(
        long,
        visible_alias = "lr",
        value_name = "RATE",
        default_value_t = 2e-3,
        help_heading = "Optimisation"
    )]
    pub learning_rate: f64,
    /// Share of the steps in which the learning rate rises to its peak.
    #[arg(
        long,
        value_name = "SHARE",
        default_value_t = 0.4,
        help_heading = "Optimisation",
        hide_short_help = true
    )]
    pub warm_up: f64,
    /// Weight decay.
    #[arg(long, default_value_t = 1e-2, help_heading = "Optimisation", hide_short_help = true)]
    pub weight_decay: f32,
    /// The optimizer.
    #[command(flatten, next_help_heading = "Optimisation")]
    #[serde(flatten)]
    pub optimizer: OptimizerSettings,
    /// Epochs between evaluations; 0 evaluates only before and after training [default: 2, or more so that a run
    /// has at most 20 evaluations].
    #[arg(long, value_name = "EPOCHS", help_heading = "Evaluation", hide_short_help = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evaluate_every: Option<usize>,
    /// Cross-batch memory: embeddings of earlier batches that the loss compares a batch with as well; 0 for none.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Loss")]
    pub memory_size: usize,
    /// Steps before the memory is filled [default: those of the warm-up].
    #[arg(long, value_name = "STEPS", help_heading = "Loss", hide_short_help = true)]
    pub memory_start: Option<usize>,

    /// Seed of random weights, batches and augmentation.
    #[arg(long, default_value_t = 0, help_heading = "Runs")]
    pub seed: u64,
    /// Where to compute: auto (a GPU if there is one), cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto", help_heading = "Runs")]
    pub device: String,
    /// Threads that load and augment pictures.
    #[arg(long, default_value_t = 1, help_heading = "Runs", hide_short_help = true)]
    pub workers: usize,
    /// Steps between checkpoints to resume from; 0 writes them only at evaluations and when stopped.
    #[arg(long, value_name = "STEPS", default_value_t = 100, help_heading = "Runs", hide_short_help = true)]
    pub checkpoint_every: usize,
    /// Unreadable pictures allowed; one more stops the run.
    #[arg(long, value_name = "N", default_value_t = 100, help_heading = "Runs", hide_short_help = true)]
    pub max_bad_images: usize,
    /// Run folder to create [default: runs/NAME-NUMBER].
    #[arg(long, value_name = "DIR", help_heading = "Runs")]
    pub output: Option<PathBuf>,

    /// The threshold generator.
    #[command(flatten, next_help_heading = "Learned threshold")]
    pub generator: GeneratorSettings,
}

/// A command-line parser of [`Mining`].
fn mining() -> impl TypedValueParser<Value = Mining> {
    let about = |mining| match mining {
        Mining::None => "Every positive and every negative pair",
        Mining::Symmetric => "One tolerance for both kinds: gamma_pos = gamma_neg = gamma",
        Mining::Asms => "Asymmetric sample mining: gamma_pos = gamma, gamma_neg = gamma * negative-ratio",
        Mining::AtAsms => "Adaptive asymmetric sample mining: as asms, with tolerances adapted to each batch",
    };
    let values = Mining::ALL.map(|mining| PossibleValue::new(mining.name()).help(about(mining)));
    PossibleValuesParser::new(values).try_map(|text| text.parse::<Mining>())
}

impl Default for TrainSettings {
    /// The settings of `ddtas-train` without arguments.
    fn default() -> Self {
        defaults()
    }
}

impl TrainSettings {
    /// Settings of the loss.
    #[must_use]
    pub fn loss_settings(&self) -> LossSettings {
        let (lambda_pos, lambda_neg) = match self.loss {
            PairLoss::SoftContrastive => {
                (self.lambda_pos.unwrap_or(self.lambda), self.lambda_neg.unwrap_or(self.lambda))
            }
            PairLoss::Contrastive | PairLoss::MultiSimilarity => (self.margin(), self.margin()),
        };
        LossSettings {
            mining: self.mining,
            gamma: self.gamma,
            negative_ratio: self.negative_ratio,
            probe_ratio: self.probe_ratio,
            tolerance: self.tolerance,
            alpha: self.alpha,
            beta: self.beta,
            lambda_pos,
            lambda_neg,
        }
    }

    fn margin(&self) -> f64 {
        self.margin.unwrap_or(0.5)
    }

    /// Initial loss thresholds.
    #[must_use]
    pub fn first_lambda(&self) -> Lambda {
        let LossSettings { lambda_pos, lambda_neg, .. } = self.loss_settings();
        Lambda { pos: lambda_pos, neg: lambda_neg }
    }

    /// Shape of the network.
    #[must_use]
    pub fn network_shape(&self) -> NetworkShape {
        let small = self.backbone == BackboneKind::Residual;
        let only_small = |value| if small { value } else { 0 };
        NetworkShape {
            backbone: self.backbone,
            pooling: self.pooling.unwrap_or_else(|| self.backbone.pooling()),
            width: only_small(self.width),
            depth: only_small(self.depth),
            embedding_dim: self.embedding_dim,
            head: self.head,
        }
    }

    /// Steps in which the learning rate rises.
    #[must_use]
    pub fn warm_up_steps(&self) -> usize {
        (self.warm_up * self.steps as f64).round() as usize
    }

    /// Learning rate over the steps of the run.
    #[must_use]
    pub(super) fn schedule(&self) -> Schedule {
        Schedule {
            kind: self.optimizer.schedule,
            peak: self.learning_rate,
            warm_up: self.warm_up_steps(),
            steps: self.steps,
            milestones: (self.optimizer.milestones.clone(), self.optimizer.milestone_factor),
        }
    }

    /// Step from which the cross-batch memory is filled.
    #[must_use]
    pub fn memory_start_step(&self) -> usize {
        self.memory_start.unwrap_or_else(|| self.warm_up_steps())
    }

    /// The same settings with absolute paths.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io) if there is no working directory.
    pub fn with_absolute_paths(mut self) -> Result<Self> {
        let paths =
            [&mut self.data.data_root, &mut self.weights, &mut self.init, &mut self.generator.generator_init];
        for path in paths.into_iter().flatten() {
            *path = std::path::absolute(&*path).map_err(Error::io("find", &*path))?;
        }
        Ok(self)
    }

    /// Checks that the files of initial weights exist. Not for a resumed run, which does not need them.
    ///
    /// # Errors
    /// [`Misused`](ddtas_io::Error::Misused) names the setting.
    pub(super) fn check_files(&self) -> Result<()> {
        let files = [
            ("weights", &self.weights),
            ("init", &self.init),
            ("generator-init", &self.generator.generator_init),
        ];
        for (name, path) in files {
            if let Some(path) = path.as_ref().filter(|path| !path.exists()) {
                return Err(Error::misuse(name, path.display(), "there is no such file"));
            }
        }
        Ok(())
    }

    /// The same settings with defaults that depend on the training split: with fewer classes than usual in a batch, batches
    /// have all of them, and short epochs have fewer evaluations. Also a line about the batches.
    #[must_use]
    pub(super) fn fitted(&self, train: &Split) -> (Self, Option<String>) {
        let there = train.by_class().len();
        let classes = self.classes_per_batch.unwrap_or(CLASSES_PER_BATCH.min(there));
        let note = (self.classes_per_batch.is_none() && there < CLASSES_PER_BATCH).then(|| {
            format!("{there} classes train: a batch has pictures of all of them, not of {CLASSES_PER_BATCH}")
        });
        let meta_classes = Some(self.generator.classes_of(there));
        let generator = GeneratorSettings { meta_classes, ..self.generator.clone() };
        let epoch = train.len().div_ceil((classes * self.images_per_class).max(1)).max(1);
        let fewest = self.steps.div_ceil((MOST_EVALUATIONS - 1) * epoch);
        let evaluate_every = Some(self.evaluate_every.unwrap_or(EVALUATE_EVERY.max(fewest)));
        (Self { classes_per_batch: Some(classes), evaluate_every, generator, ..self.clone() }, note)
    }

    /// A warning if the run ends before the memory is filled.
    pub(super) fn warning_of_memory(&self) -> Option<String> {
        let start = self.memory_start_step();
        (self.memory_size > 0 && start >= self.steps).then(|| {
            format!(
                "--memory-start {start}: the run ends after {}, and the memory stays empty",
                counted(self.steps, "step")
            )
        })
    }

    /// Checks that a batch, or a batch and the memory, can contain both positive and negative pairs.
    fn check_batch(&self) -> Result<()> {
        let remembers = self.memory_size > 0;
        fits(
            self.memory_start.is_none() || remembers,
            "memory-start",
            self.memory_start.unwrap_or(0),
            "needs --memory-size N: there is no memory to fill",
        )?;
        let classes = self.classes_per_batch.unwrap_or(CLASSES_PER_BATCH);
        let reason = "a batch of one class has no negative pair: give 2 or more";
        fits(classes > 1 || remembers, "classes-per-batch", classes, reason)?;
        let reason = "a batch with one picture per class has no positive pair: give 2 or more";
        fits(self.images_per_class > 1 || remembers, "images-per-class", self.images_per_class, reason)
    }

    /// Checks everything that can be checked without reading files.
    ///
    /// # Errors
    /// [`InvalidSetting`](ddtas_io::Error::InvalidSetting) or [`Misused`](ddtas_io::Error::Misused) names the
    /// first wrong setting.
    pub fn validate(&self) -> Result<()> {
        self.data.validate()?;
        check((-2.0..=2.0).contains(&self.lambda), "lambda", self.lambda, "-2 to 2")?;
        let margin = self.margin();
        check((-1.0..=1.0).contains(&margin), "margin", margin, "-1 to 1")?;
        fits(
            self.loss != PairLoss::SoftContrastive || self.margin.is_none(),
            "margin",
            margin,
            "needs --loss contrastive or multi-similarity: the threshold of soft-contrastive is --lambda",
        )?;
        self.loss_settings().validate()?;
        self.generator.validate(self.first_lambda())?;
        self.augment.validate()?;
        check_image_size(self.image_size)?;
        let [embedding_dim, width, depth] = network_sizes(self.embedding_dim, self.width, self.depth);
        let sizes = [
            embedding_dim,
            width,
            depth,
            (
                "classes-per-batch",
                self.classes_per_batch.unwrap_or(CLASSES_PER_BATCH),
                1,
                1 << 20,
                "1 to 1048576",
            ),
            ("images-per-class", self.images_per_class, 1, 1 << 20, "1 to 1048576"),
            ("steps", self.steps, 1, MOST_STEPS, STEPS),
            ("evaluate-every", self.evaluate_every.unwrap_or(0), 0, MOST_STEPS, COUNT),
            ("checkpoint-every", self.checkpoint_every, 0, MOST_STEPS, COUNT),
            ("max-bad-images", self.max_bad_images, 0, MOST_STEPS, COUNT),
            ("memory-start", self.memory_start.unwrap_or(0), 0, MOST_STEPS, COUNT),
            ("workers", self.workers, 1, 256, "1 to 256"),
            ("memory-size", self.memory_size, 0, 1 << 24, "0 to 16777216"),
        ];
        for (name, value, low, high, range) in sizes {
            check((low..=high).contains(&value), name, value, range)?;
        }
        for (name, seed) in [("seed", self.seed), ("data-seed", self.data.data_seed)] {
            // TOML integers are signed.
            check(i64::try_from(seed).is_ok(), name, seed, "0 to 9223372036854775807")?;
        }
        fits(self.output.as_deref() != Some(Path::new("")), "output", "''", "must be the name of a folder")?;
        let rate = self.learning_rate;
        check(rate > 0.0 && rate.is_finite(), "learning-rate", rate, "above 0")?;
        check((0.0..=1.0).contains(&self.warm_up), "warm-up", self.warm_up, "0 to 1")?;
        let decay = self.weight_decay;
        check((0.0..1.0).contains(&decay), "weight-decay", decay, "0 to 1, 1 excluded")?;
        self.optimizer.validate(self.generator.kind)?;
        self.check_batch()?;
        fits(
            !self.batch_norm.is_frozen() || self.init.is_some() || self.weights.is_some(),
            "batch-norm",
            name_of(&self.batch_norm),
            "needs --weights FILE or --init FILE: without trained statistics there is nothing to freeze",
        )?;
        fits(
            self.weights.is_none() || self.init.is_none(),
            "weights",
            "",
            "give --weights or --init, not both",
        )?;
        self.backbone.validate(self.pooling, self.weights.is_some(), self.image_size)?;
        fits(
            self.generator.kind == GeneratorKind::Off || self.loss == PairLoss::SoftContrastive,
            "generator",
            "",
            "needs --loss soft-contrastive: the other losses have no lambda to learn",
        )
    }

    /// A warning for a backbone with published weights that starts from random ones.
    pub(super) fn random_start(&self) -> Option<String> {
        let random = self.backbone != BackboneKind::Residual && self.weights.is_none() && self.init.is_none();
        random.then(|| {
            let name = name_of(&self.backbone);
            format!("{name} starts from random weights: give --weights FILE for pretrained ones, or --init FILE for those of a run")
        })
    }
}

/// Describes the network before the first step of a run that started from a checkpoint, from pretrained weights or neither.
pub(super) fn before_training(continued: bool, pretrained: bool) -> &'static str {
    match (continued, pretrained) {
        (true, _) => "before this run",
        (false, true) => "before training (pretrained, random head)",
        (false, false) => "before training (random weights)",
    }
}
