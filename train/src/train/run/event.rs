//! Progress of a run, and its outcome.

use std::path::{Path, PathBuf};

use crate::train::PairLoss;
use ddtas::retrieval::Recall;

use crate::data::{Dataset, as_text};
use crate::generator::Lambda;
use crate::train::records::{EvaluationRecord, Phase, StepRecord};
use crate::train::settings::before_training;

/// Progress of a run.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The device has been opened.
    Computing {
        /// `cpu`, `cuda:0`: where network and loss are.
        device: &'a str,
        /// Why `auto` came to the CPU, where a GPU was to be expected.
        reason: Option<&'a str>,
        /// Ranks that share each batch.
        ranks: usize,
    },
    /// The data set is open and the run folder made.
    Started {
        /// Pictures and classes.
        dataset: &'a Dataset,
        /// Where the results go.
        folder: &'a Path,
        /// The loss: others than DDTAS's have a margin in place of lambda.
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
    /// Something slow has begun, before there is a run.
    Note(&'a str),
    /// Something the user should know; the run goes on.
    Warning(&'a str),
    /// A step is done.
    Step {
        /// What happened.
        record: &'a StepRecord,
        /// Pictures a second, over the last steps.
        images_per_second: f64,
    },
    /// The rehearsal is over, and the run itself begins.
    Rehearsed {
        /// The lambda that was learned, and stays fixed.
        lambda: Lambda,
        /// Steps of the run.
        steps: usize,
    },
    /// An evaluation has begun.
    Evaluating {
        /// Pictures embedded so far.
        done: usize,
        /// Pictures of the test classes.
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
    /// It was told to stop, and can be resumed from its folder.
    Stopped {
        /// The run folder.
        folder: PathBuf,
        /// The part of the run that was under way.
        phase: Phase,
        /// Steps of it that are done.
        step: usize,
    },
    /// This rank is done; rank 0 has the run folder and the outcome.
    OnRank0,
    /// The run to resume had already finished.
    FinishedBefore {
        /// The run folder.
        folder: PathBuf,
        /// Steps done.
        step: usize,
    },
}

/// The outcome of a run.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Summary {
    /// The run folder.
    #[serde(serialize_with = "as_text")]
    pub folder: PathBuf,
    /// Whether test classes are among those that trained.
    pub seen: bool,
    /// Whether it began from a checkpoint, by `--init`.
    pub continued: bool,
    /// Whether it began from pretrained weights, by `--weights`.
    pub pretrained: bool,
    /// Recall of nearest neighbours by raw pixels.
    pub pixels: Recall,
    /// Recall of the network before training.
    pub before: Recall,
    /// Recall of the best checkpoint.
    pub best: Recall,
    /// Steps the best checkpoint was trained.
    pub best_step: usize,
    /// Recall after the last step.
    pub after: Recall,
    /// Steps of the run.
    pub steps: usize,
    /// Seed of the run.
    pub seed: u64,
    /// Steps without a mined pair, which changed no weight.
    pub steps_without_pairs: usize,
    /// How often an unreadable training picture was replaced by another of its class.
    pub replaced: usize,
    /// Unreadable pictures left out of the evaluation.
    pub skipped: usize,
    /// Seconds of training, without evaluations.
    pub training_seconds: f64,
    /// Seconds in all, earlier processes of a resumed run included.
    pub total_seconds: f64,
}

impl Summary {
    /// What the network was before the first step.
    #[must_use]
    pub fn before_training(&self) -> &'static str {
        before_training(self.continued, self.pretrained)
    }
}
