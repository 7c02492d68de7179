//! The state of a run in a checkpoint's metadata, as TOML, which preserves every bit of a float.
//!
//! Every random draw depends only on (seed, purpose, step, position), so the number of steps is the whole
//! state of sampler, augmentation and loader.

use std::collections::BTreeSet;
use std::path::Path;

use burn::module::Module;
use ddtas::retrieval::Recall;
use serde::{Deserialize, Serialize};

use super::Overrides;
use crate::data::{Dataset, Extent};
use crate::train::checkpoint::{self, Checkpoint};
use crate::train::engine::{Engine, EngineState, REMEDY};
use crate::train::records::Phase;
use crate::train::settings::{BatchNorm, TrainSettings, drop_removed};
use crate::train::shown::Shown;
use crate::{Error, Result};
use ddtas_io::console::counted;

/// Key of a run's state in a checkpoint's metadata.
const RUN: &str = "ddtas.run";

/// The state of a run between two steps.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(super) struct RunState {
    /// Steps done, of the rehearsal or of the run itself.
    pub step: usize,
    /// Whether the rehearsal is over.
    #[serde(default)]
    pub rehearsed: bool,
    /// Classes and pictures of training and test split: the run can only be resumed with the same.
    pub extents: Option<[Extent; 2]>,
    /// Fingerprint of the data set.
    #[serde(default)]
    pub data: Option<String>,
    /// The settings that the result depends on, as TOML.
    #[serde(default)]
    pub settings: Option<String>,
    /// Number of ranks; none in runs of earlier versions.
    #[serde(default)]
    pub ranks: Option<usize>,
    /// Number of steps at the last evaluation.
    pub evaluated: Option<usize>,
    /// Whether the last step, its evaluation and the report are done.
    pub finished: bool,
    /// Length of metrics.jsonl at this point.
    pub metrics_bytes: u64,
    /// Steps without mined pairs, which did not change the weights.
    pub steps_without_pairs: usize,
    /// Number of times an unreadable picture was replaced by another of its class.
    pub replaced: usize,
    /// Unreadable pictures of the test split and the gallery.
    pub skipped: usize,
    /// Unreadable pictures named in warnings so far.
    pub unread: Unread,
    /// Recall of raw pixels.
    pub pixels: Option<Recall>,
    /// Recall before training.
    pub before: Option<Recall>,
    /// Recall at the last evaluation.
    pub after: Option<Recall>,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// Optimizer, thresholds and generator, without their tensors.
    pub engine: Option<EngineState>,
}

impl RunState {
    /// The part of the run that the next step belongs to.
    pub fn phase(&self, settings: &TrainSettings) -> Phase {
        if self.rehearsed || settings.generator.rehearsal_steps() == 0 {
            Phase::Training
        } else {
            Phase::Rehearsal
        }
    }

    /// Reads the state from a checkpoint.
    ///
    /// # Errors
    /// [`Format`](ddtas_io::Error::Format) if it contains no state of a run.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let text = checkpoint.fact(RUN, "holds only weights: a run cannot go on from it")?;
        toml::from_str(text).map_err(|error| {
            Error::format(checkpoint.path(), format!("unknown state of a run: {}", error.message()))
        })
    }

    /// Restores the state of `engine`, whose network already has the weights of `checkpoint`.
    ///
    /// # Errors
    /// [`Format`](ddtas_io::Error::Format) if the file's contents do not fit the settings.
    pub fn put_back(&self, engine: &mut Engine, checkpoint: Checkpoint) -> Result<()> {
        let path = checkpoint.path().to_path_buf();
        let bad = |reason: String| Error::format(&path, reason);
        let state = self.engine.as_ref().ok_or_else(|| bad("holds no state of the optimizer".into()))?;
        engine.take(&mut checkpoint.into_archive(), state).map_err(bad)
    }

    /// Writes everything that the next step of `engine` depends on to `path`, atomically. Fills in the
    /// engine's part of the state.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io) if the file cannot be written; [`Error::Diverged`] if a weight is not
    /// finite, as such a checkpoint would be useless.
    pub fn save(
        &self,
        engine: &Engine,
        settings: &TrainSettings,
        facts: &[(&str, String)],
        path: &Path,
    ) -> Result<()> {
        let fill = || {
            // Evaluation mode makes Burn apply pending updates of the running statistics.
            let mut archive = checkpoint::weights(&engine.network.valid(), &settings.network_shape(), facts)?;
            let state = Self { engine: Some(engine.put(&mut archive)?), ..self.clone() };
            let text = toml::to_string(&state).map_err(|error| error.to_string())?;
            archive.facts.insert(RUN.to_owned(), text);
            Ok(archive)
        };
        let archive = fill().map_err(|reason: String| Error::format(path, reason))?;
        if let Some(name) = archive.first_not_finite() {
            return Err(Error::Diverged(format!(
                "training diverged by step {} ({name} is no longer finite): {REMEDY}",
                self.step
            )));
        }
        archive.write(path)
    }

    /// Checks that the data set is the one the run began with.
    ///
    /// # Errors
    /// [`Error::Dataset`].
    pub fn check_data(&self, dataset: &Dataset) -> Result<()> {
        let Some(before) = self.extents else { return Ok(()) };
        let now = dataset.extents();
        for (split, before, now) in [("training", before[0], now[0]), ("test", before[1], now[1])] {
            if before != now {
                return Err(Error::Dataset(format!(
                    "the {split} split has changed since the run began: it had {} pictures of {} classes, now {} of {}",
                    before.pictures, before.classes, now.pictures, now.classes
                )));
            }
        }
        if self.data.as_ref().is_some_and(|data| *data != dataset.fingerprint()) {
            return Err(Error::Dataset(
                "the data set has as many pictures as when the run began, but others: their names differ"
                    .into(),
            ));
        }
        Ok(())
    }

    /// A warning if the run so far had another number of ranks than `now`.
    pub fn warning_of_ranks(&self, settings: &TrainSettings, now: usize) -> Option<String> {
        let before = self.ranks.filter(|before| *before != now)?;
        let by_rank = settings.batch_norm == BatchNorm::Trainable && settings.backbone.has_batch_norm();
        let differs = if by_rank {
            "each normalises its own pictures (--batch-norm trainable), so this becomes another run"
        } else {
            "sums are rounded in another way"
        };
        let ranks = counted(before, "rank");
        Some(format!(
            "the run had {ranks} so far, now {now}: {differs}; docs/scaling.md has how to start {before}"
        ))
    }

    /// A warning if the checkpoint of the best evaluation so far, `path`, is lost.
    pub fn warning_of_best(&self, path: &Path) -> Option<String> {
        let steps = counted(self.best.as_ref()?.step, "step");
        let error = Checkpoint::open(path).and_then(|file| file.shape()).err()?;
        Some(format!("{error}; the best weights so far, after {steps}, are lost"))
    }

    /// Checks that config.toml has the settings that the run began with, and at least as many steps as are done.
    ///
    /// # Errors
    /// [`Format`](ddtas_io::Error::Format) names the first setting that differs; [`Misused`](ddtas_io::Error::Misused) names
    /// `--steps`.
    pub fn check_settings(&self, settings: &TrainSettings, config: &Path) -> Result<()> {
        let (steps, done) = (settings.steps, self.step);
        if self.phase(settings) == Phase::Training && steps < done {
            return Err(Error::misuse(
                "steps",
                steps,
                format!("the run has done {done}: give {done} or more"),
            ));
        }
        let before = self.settings.as_deref().and_then(|text| text.parse::<toml::Table>().ok());
        let Some(mut before) = before else { return Ok(()) };
        drop_removed(&mut before);
        let now = fixed(settings);
        let mut keys: Vec<_> = before.keys().chain(now.keys()).collect();
        keys.sort();
        // Settings that a later version has added are not in the older table. The steps may change.
        let differs = |key: &&&String| {
            **key != "steps" && before.get(**key) != now.get(**key) && before.contains_key(**key)
        };
        let Some(key) = keys.iter().find(differs) else { return Ok(()) };
        let shown = |table: &toml::Table| table.get(*key).map_or("nothing".to_owned(), ToString::to_string);
        let (was, is) = (shown(&before), shown(&now));
        let reason = format!(
            "{key} is {is}, but the run began with {was}: put it back, or begin a new run with --init"
        );
        Err(Error::format(config, reason))
    }
}

/// The settings that a run's result depends on.
pub(super) fn fixed(settings: &TrainSettings) -> toml::Table {
    let absolute = settings.clone().with_absolute_paths().unwrap_or_else(|_| settings.clone());
    let mut table = toml::Table::try_from(absolute).unwrap_or_default();
    let changes_nothing = |key: &str| key != "steps" && Overrides::names().any(|name| name == key);
    table.retain(|key, _| key != "output" && !changes_nothing(key));
    table
}

/// Number of steps in a part of a run.
pub(super) fn steps_of(phase: Phase, settings: &TrainSettings) -> usize {
    match phase {
        Phase::Rehearsal => settings.generator.rehearsal_steps(),
        Phase::Training => settings.steps,
    }
}

/// Unreadable pictures by their index in the split.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Unread {
    /// Training pictures.
    pub train: BTreeSet<usize>,
    /// Test pictures.
    pub test: BTreeSet<usize>,
    /// Pictures of the gallery, if there is one.
    pub gallery: BTreeSet<usize>,
}

/// The best evaluation so far; its weights are in best.safetensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Best {
    /// Steps trained.
    pub step: usize,
    /// Its recall.
    pub recall: Recall,
    /// The neighbours that the report shows.
    pub shown: Vec<Shown>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generator::Lambda;

    #[test]
    fn floats_survive_as_the_same_bits() {
        // Numbers that a parser with double rounding gets wrong in the last place.
        let values = [0.1 + 0.2, 1.0 / 3.0, 5e-324, 2.0f64.powi(-1000) / 3.0, 0.700_000_000_000_000_1];
        for value in values {
            let lambda = Lambda { pos: value, neg: -value };
            let recall = Recall { at: vec![(1, value), (10, 1.0)], queries: 3, without_match: 0 };
            let shown = vec![Shown { picture: 4, answers: vec![(7, 0.1f32), (9, value as f32)] }];
            let state = RunState {
                step: 17,
                unread: Unread { train: [3, 1].into(), ..Unread::default() },
                pixels: Some(recall.clone()),
                best: Some(Best { step: 12, recall, shown }),
                engine: Some(EngineState { lambda, pending: Some(lambda), generator: None }),
                ..RunState::default()
            };
            let text = toml::to_string(&state).unwrap();
            assert_eq!(toml::from_str::<RunState>(&text).unwrap(), state, "{text}");
        }
    }
}
