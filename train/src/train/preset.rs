//! Presets: named sets of settings that override the defaults and are overridden by flags.

use clap::builder::PossibleValue;
use clap::{Command, ValueEnum};

use super::settings::TrainSettings;
use crate::{Error, Result};

/// A named set of settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// The settings of the paper.
    Paper,
    /// Fine-tunes pretrained weights in little time.
    FineTune,
}

impl Preset {
    /// Name and description.
    fn about(self) -> (&'static str, &'static str) {
        match self {
            Self::Paper => ("paper", "The settings of the paper"),
            Self::FineTune => ("fine-tune", "Fine-tunes pretrained weights in little time"),
        }
    }

    /// Names and values of arguments. Beside the paper's, some are our choice: docs/training.md.
    #[must_use]
    pub fn values(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Paper => &[
                ("backbone", "bn-inception"),
                ("image_size", "227"),
                ("embedding_dim", "512"),
                ("batch_norm", "frozen"),
                ("lambda", "0.7"),
                ("gamma", "0.1"),
                ("negative_ratio", "0.1"),
                ("alpha", "40"),
                ("images_per_class", "5"),
                ("optimizer", "adam"),
                ("learning_rate", "1e-5"),
                ("schedule", "constant"),
                ("warm_up", "0"),
                ("weight_decay", "0"),
            ],
            Self::FineTune => &[
                ("backbone", "efficientnet-lite0"),
                ("pooling", "avg+max"),
                ("image_size", "96"),
                ("embedding_dim", "512"),
                ("batch_norm", "frozen"),
                ("mining", "symmetric"),
                ("lambda", "0.7"),
                ("negative_ratio", "0.1"),
                ("alpha", "40"),
                ("optimizer", "adam"),
                ("learning_rate", "1e-4"),
                ("head_learning_rate", "5e-4"),
                ("schedule", "constant"),
                ("warm_up", "0"),
                ("weight_decay", "0"),
            ],
        }
    }

    /// `command` with the preset's values as defaults.
    #[must_use]
    pub fn apply(self, command: Command) -> Command {
        self.values().iter().fold(command, |command, &(id, value)| {
            command.mut_arg(id, |argument| argument.default_value(value))
        })
    }

    /// Checks that initial weights are given.
    ///
    /// # Errors
    /// [`Misused`](ddtas_io::Error::Misused) says where to get them.
    pub fn check(self, settings: &TrainSettings) -> Result<()> {
        if settings.init.is_some() || settings.weights.is_some() {
            return Ok(());
        }
        let (value, range) = (
            self.about().0.to_owned(),
            "needs pretrained weights, --weights FILE: docs/training.md says where to get them",
        );
        Err(Error::misuse("preset", value, range))
    }
}

impl ValueEnum for Preset {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Paper, Self::FineTune]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let (name, about) = self.about();
        let flags: Vec<_> =
            self.values().iter().map(|(id, value)| format!("--{} {value}", id.replace('_', "-"))).collect();
        Some(PossibleValue::new(name).help(format!("{about}: {}", flags.join(" "))))
    }
}
