//! Progress of a run, and its outcome.

use std::path::{Path, PathBuf};

use crate::train::PairLoss;
use ddtas::retrieval::Recall;
use ddtas_io::files::as_text;

use super::state::RunState;
use crate::data::Dataset;
use crate::generator::Lambda;
use crate::train::records::{EvaluationRecord, Phase, StepRecord};
use crate::train::settings::{TrainSettings, before_training};

/// Progress of a run.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The device has been opened.
    Computing {
        /// Device of network and loss: `cpu`, `cuda:0`.
        device: &'a str,
        /// Why `auto` chose the CPU, if a GPU could be expected.
        reason: Option<&'a str>,
        /// Ranks that share each batch.
        ranks: usize,
    },
    /// The data set has been opened and the run folder created.
    Started {
        /// The data set.
        dataset: &'a Dataset,
        /// The run folder.
        folder: &'a Path,
        /// The loss; those other than DDTAS's have a margin in place of lambda.
        loss: PairLoss,
        /// Steps in an epoch.
        steps_per_epoch: usize,
        /// The part of the run that is next.
        phase: Phase,
        /// Steps of that part.
        steps: usize,
        /// Steps of that part done by an earlier process; `None` if this one began the run.
        resumed: Option<usize>,
    },
    /// Something slow has begun, before the run itself.
    Note(&'a str),
    /// Something the user should know; the run goes on.
    Warning(&'a str),
    /// A step is done.
    Step {
        /// The step's record.
        record: &'a StepRecord,
        /// Pictures per second.
        images_per_second: f64,
    },
    /// The rehearsal is over, and the run itself begins.
    Rehearsed {
        /// The learned lambda, which is fixed from now on.
        lambda: Lambda,
        /// Steps of the run.
        steps: usize,
    },
    /// An evaluation has begun.
    Evaluating {
        /// Pictures embedded so far.
        done: usize,
        /// Pictures to embed.
        total: usize,
    },
    /// An evaluation is done.
    Evaluated(&'a EvaluationRecord),
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Outcome {
    /// All steps are done.
    Finished(Box<Summary>),
    /// The run was told to stop, and can be resumed from its folder.
    Stopped {
        /// The command that resumes the run.
        command: String,
        /// The part of the run that was stopped.
        phase: Phase,
        /// Steps of that part that are done.
        step: usize,
    },
    /// This rank is done; rank 0 has the run folder and the outcome.
    OnRank0,
    /// The run to resume had already finished.
    FinishedBefore {
        /// The run folder.
        folder: PathBuf,
        /// The command that resumes the run, if it is given more steps.
        command: String,
        /// Steps done.
        step: usize,
        /// Its outcome, or why it cannot be read any more.
        summary: Result<Box<Summary>, String>,
    },
}

/// The outcome of a run.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Summary {
    /// The run folder.
    #[serde(serialize_with = "as_text")]
    pub folder: PathBuf,
    /// Whether test classes are also training classes.
    pub seen: bool,
    /// Whether the run started from a checkpoint (`--init`).
    pub continued: bool,
    /// Whether the run started from pretrained weights (`--weights`).
    pub pretrained: bool,
    /// Recall of nearest neighbours by raw pixels.
    pub pixels: Recall,
    /// Recall of the network before training.
    pub before: Recall,
    /// Recall of the best checkpoint.
    pub best: Recall,
    /// Number of training steps of the best checkpoint.
    pub best_step: usize,
    /// Recall after the last step.
    pub after: Recall,
    /// Steps of the run.
    pub steps: usize,
    /// Seed of the run.
    pub seed: u64,
    /// Steps without mined pairs, which did not change the weights.
    pub steps_without_pairs: usize,
    /// Number of times an unreadable training picture was replaced by another of its class.
    pub replaced: usize,
    /// Unreadable pictures left out of the evaluation.
    pub skipped: usize,
    /// Seconds of training, without evaluations.
    pub training_seconds: f64,
    /// Seconds in all, including earlier processes of a resumed run.
    pub total_seconds: f64,
}

impl Summary {
    /// The outcome of a run in this state, with the seconds of training and in all; none before its last evaluation.
    pub(super) fn of(
        state: &RunState,
        settings: &TrainSettings,
        folder: &Path,
        seen: bool,
        [training_seconds, total_seconds]: [f64; 2],
    ) -> Option<Self> {
        let best = state.best.as_ref()?;
        Some(Self {
            folder: folder.to_path_buf(),
            seen,
            continued: settings.init.is_some(),
            pretrained: settings.weights.is_some(),
            pixels: state.pixels.clone()?,
            before: state.before.clone()?,
            best: best.recall.clone(),
            best_step: best.step,
            after: state.after.clone()?,
            steps: settings.steps,
            seed: settings.seed,
            steps_without_pairs: state.steps_without_pairs,
            replaced: state.replaced,
            skipped: state.skipped,
            training_seconds,
            total_seconds,
        })
    }

    /// Describes the network before the first step.
    #[must_use]
    pub fn before_training(&self) -> &'static str {
        before_training(self.continued, self.pretrained)
    }
}
