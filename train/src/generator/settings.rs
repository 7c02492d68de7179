//! Settings of the threshold generator.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Lambda;
use crate::Result;
use crate::arguments::{defaults, name_of};
use crate::error::{check, fits};

/// Which parameters the virtual step of meta-learning updates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GeneratorKind {
    /// Lambda stays as given.
    #[default]
    Off,
    /// The virtual step updates all parameters: costs a forward and a backward pass on the meta batch and two forward
    /// passes on the batch. A step uses the lambda learned in the one before.
    Full,
    /// The virtual step updates the embedding head, in closed form from features that the step computes anyway.
    Head,
}

/// Where the meta batch comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MetaSource {
    /// Pictures drawn and augmented anew: --meta-classes times --meta-images.
    #[default]
    Fresh,
    /// Features of the last --meta-recent training batches (--generator head).
    Recent,
}

/// The optimizer of lambda.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Optimizer {
    /// Gradient descent.
    Sgd,
    /// Adam.
    #[default]
    Adam,
}

/// Length of the virtual step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VirtualStepKind {
    /// --virtual-rate times the gradient.
    Plain,
    /// A step of length --virtual-rate along the gradient.
    #[default]
    Unit,
}

/// A virtual step: its kind and rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VirtualStep {
    /// Whether the rate is a factor of the gradient or the length of the step.
    pub kind: VirtualStepKind,
    /// Rate (plain) or length (unit) of the step.
    pub rate: f64,
}

/// Default number of classes in a meta batch, if there are as many.
const META_CLASSES: usize = 5;

/// Settings of the threshold generator.
#[derive(Debug, Clone, PartialEq, clap::Args, Serialize, Deserialize)]
pub struct GeneratorSettings {
    /// Learn lambda by meta-learning.
    #[arg(long = "generator", value_enum, default_value_t)]
    pub kind: GeneratorKind,
    /// Learn separate lambdas for positives and negatives.
    #[arg(long, hide_short_help = true)]
    pub lambda_pair: bool,
    /// Source of the meta batches.
    #[arg(long, value_enum, default_value_t, hide_short_help = true)]
    pub meta: MetaSource,
    /// Classes in a fresh meta batch [default: 5, or all there are].
    #[arg(long, value_name = "P", hide_short_help = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub meta_classes: Option<usize>,
    /// Pictures of each class in a fresh meta batch.
    #[arg(long, value_name = "K", default_value_t = 2, hide_short_help = true)]
    pub meta_images: usize,
    /// Training batches in a recent meta batch.
    #[arg(long, value_name = "N", default_value_t = 4, hide_short_help = true)]
    pub meta_recent: usize,
    /// Loss threshold of the meta batch.
    #[arg(long, default_value_t = 0.7, allow_negative_numbers = true, hide_short_help = true)]
    pub lambda_reference: f64,
    /// Length of the virtual step.
    #[arg(long, value_enum, default_value_t, hide_short_help = true)]
    pub virtual_step: VirtualStepKind,
    /// Rate of the virtual step, or its length (--virtual-step) [default: 1, or 0.1 for a unit step of the whole
    /// network].
    #[arg(long, hide_short_help = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtual_rate: Option<f64>,
    /// Optimizer of lambda.
    #[arg(long, value_enum, default_value_t, hide_short_help = true)]
    pub lambda_optimizer: Optimizer,
    /// Learning rate of lambda.
    #[arg(long, default_value_t = 0.01, hide_short_help = true)]
    pub lambda_rate: f64,
    /// Learn lambda in a rehearsal of this many steps, then train a new network with that lambda; 0 learns it while
    /// training.
    #[arg(long, value_name = "STEPS", default_value_t = 0, hide_short_help = true)]
    #[serde(default)]
    pub rehearsal: usize,
    /// L1 regularisation of lambda towards its initial value.
    #[arg(long, default_value_t = 0.0, hide_short_help = true)]
    pub lambda_l1: f64,
    /// L2 regularisation of lambda towards its initial value.
    #[arg(long, default_value_t = 0.0, hide_short_help = true)]
    pub lambda_l2: f64,
    /// Lower bound of lambda.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true, hide_short_help = true)]
    pub lambda_min: f64,
    /// Upper bound of lambda.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true, hide_short_help = true)]
    pub lambda_max: f64,
    /// Generators with different initial values and rates, whose mean is used (--generator head).
    #[arg(long, value_name = "N", default_value_t = 1, hide_short_help = true)]
    pub lambda_ensemble: usize,
    /// Start from the threshold generator of this checkpoint.
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub generator_init: Option<PathBuf>,
}

impl Default for GeneratorSettings {
    /// The settings of the programs without arguments.
    fn default() -> Self {
        defaults()
    }
}

impl GeneratorSettings {
    /// Steps of the rehearsal; 0 without a generator.
    #[must_use]
    pub fn rehearsal_steps(&self) -> usize {
        if self.kind == GeneratorKind::Off { 0 } else { self.rehearsal }
    }

    /// Classes in a fresh meta batch if there are `there` training classes: as given, else 5 or all.
    #[must_use]
    pub fn classes_of(&self, there: usize) -> usize {
        self.meta_classes.unwrap_or(META_CLASSES.min(there))
    }

    /// Factor of lambda's learning rate in a step. In a rehearsal it falls to 0, so that lambda converges.
    #[must_use]
    pub fn pace(&self, step: usize) -> f64 {
        match self.rehearsal {
            0 => 1.0,
            steps => steps.saturating_sub(step) as f64 / steps as f64,
        }
    }

    /// The virtual step. The default length of a unit step of all weights is 0.1: a step of length 1 ruins a
    /// pretrained network and makes the meta loss useless (docs/threshold-study.md).
    #[must_use]
    pub fn step(&self) -> VirtualStep {
        let short = self.kind == GeneratorKind::Full && self.virtual_step == VirtualStepKind::Unit;
        let rate = self.virtual_rate.unwrap_or(if short { 0.1 } else { 1.0 });
        VirtualStep { kind: self.virtual_step, rate }
    }

    /// Checks every range and the combination of settings; `start` is the initial lambda.
    ///
    /// # Errors
    /// [`InvalidSetting`](ddtas_io::Error::InvalidSetting) or [`Misused`](ddtas_io::Error::Misused) names the
    /// first wrong setting.
    pub fn validate(&self, start: Lambda) -> Result<()> {
        self.check_ranges()?;
        let head = self.kind == GeneratorKind::Head;
        let needs_head = "needs --generator head";
        if self.kind == GeneratorKind::Off {
            let needs_one = "needs --generator head or full";
            let init = self.generator_init.as_deref().unwrap_or(Path::new("")).display();
            fits(self.generator_init.is_none(), "generator-init", init, needs_one)?;
            return fits(self.rehearsal == 0, "rehearsal", self.rehearsal, needs_one);
        }
        fits(head || self.lambda_ensemble == 1, "lambda-ensemble", self.lambda_ensemble, needs_head)?;
        fits(head || self.meta == MetaSource::Fresh, "meta", "recent", needs_head)?;
        let range = "--lambda-min to --lambda-max; it is what --lambda says where it is not given itself";
        for (name, value) in [("lambda-pos", start.pos), ("lambda-neg", start.neg)] {
            let (low, high) = (self.lambda_min, self.lambda_max);
            check((low..=high).contains(&value), name, value, range)?;
        }
        fits(
            self.lambda_pair || start.pos == start.neg,
            "generator",
            name_of(&self.kind),
            "learns one lambda: give --lambda, or both --lambda-pos and --lambda-neg the same, or --lambda-pair to learn two",
        )
    }

    /// Checks the range of each setting, even without a generator.
    fn check_ranges(&self) -> Result<()> {
        let counts = [
            (
                "meta-classes",
                self.meta_classes.unwrap_or(META_CLASSES),
                2,
                "2 to 65536: with one class nothing can be mined",
            ),
            ("meta-images", self.meta_images, 2, "2 to 65536: with one picture a class nothing can be mined"),
            ("meta-recent", self.meta_recent, 1, "1 to 65536"),
            ("lambda-ensemble", self.lambda_ensemble, 1, "1 to 65536"),
        ];
        for (name, value, least, range) in counts {
            check(value >= least && value <= 1 << 16, name, value, range)?;
        }
        check(self.rehearsal <= 1 << 31, "rehearsal", self.rehearsal, "0 to 2147483648 steps")?;
        let thresholds = [
            ("lambda-reference", self.lambda_reference),
            ("lambda-min", self.lambda_min),
            ("lambda-max", self.lambda_max),
        ];
        for (name, value) in thresholds {
            check((-2.0..=2.0).contains(&value), name, value, "-2 to 2")?;
        }
        let high = self.lambda_max;
        check(self.lambda_min < high, "lambda-max", high, "above --lambda-min")?;
        for (name, value) in [("virtual-rate", self.step().rate), ("lambda-rate", self.lambda_rate)] {
            check(value > 0.0 && value.is_finite(), name, value, "above 0")?;
        }
        for (name, value) in [("lambda-l1", self.lambda_l1), ("lambda-l2", self.lambda_l2)] {
            check(value >= 0.0 && value.is_finite(), name, value, "0 or more")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_virtual_step_of_the_whole_network_is_short_unless_a_rate_is_given() {
        let rate = |kind, virtual_step, virtual_rate| {
            GeneratorSettings { kind, virtual_step, virtual_rate, ..Default::default() }.step().rate
        };
        assert_eq!(rate(GeneratorKind::Full, VirtualStepKind::Unit, None), 0.1);
        assert_eq!(rate(GeneratorKind::Full, VirtualStepKind::Unit, Some(1.0)), 1.0);
        assert_eq!(rate(GeneratorKind::Full, VirtualStepKind::Plain, None), 1.0);
        assert_eq!(rate(GeneratorKind::Head, VirtualStepKind::Unit, None), 1.0);
    }
}
