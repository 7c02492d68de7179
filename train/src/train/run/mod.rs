//! A training run: begun, watched, stopped, gone on with.
//!
//! | file | what |
//! | --- | --- |
//! | `setup.rs` | data, network, generator and loaders from the settings |
//! | `steps.rs` | the steps, evaluations and checkpoints, to the end or until told to stop |
//! | `unread.rs` | pictures that cannot be read |
//! | `evaluation.rs` | Recall@K of the network, and of raw pixels |
//! | `folder.rs` | where a run's files are |

mod evaluation;
mod folder;
mod setup;
mod steps;
mod unread;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::checkpoint::{self, RunState};
use super::device::{self, Place};
use super::records::{EvaluationRecord, RecordWriter, StepRecord};
use super::settings::TrainSettings;
use super::tensorboard::EventWriter;
use crate::data::Dataset;
use crate::generator::Lambda;
use crate::{Error, Result};
use ddtas::backend::{self, Backend};
use ddtas::retrieval::Recall;
pub use evaluation::EVALUATION_CHUNK;
use folder::RunFolder;
use setup::{Setup, make_engine};
use steps::Run;

/// What a run tells while it goes on.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The device is chosen and open.
    Computing {
        /// `cpu`, `cuda:0`: where network and loss are.
        device: &'a str,
        /// Why `auto` came to the CPU, where a GPU was to be expected.
        reason: Option<&'a str>,
    },
    /// The data set is open and the run folder made.
    Started {
        /// Pictures and classes.
        dataset: &'a Dataset,
        /// Where the results go.
        folder: &'a Path,
        /// Steps in an epoch.
        steps_per_epoch: usize,
        /// The part of the run that is next.
        phase: Phase,
        /// Steps of that part.
        steps: usize,
        /// Steps of that part done by an earlier process; `None` if this one began the run.
        resumed: Option<usize>,
    },
    /// Something that takes long has begun, before there is a run.
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
        /// What was learned, and is held.
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

/// Parts of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Lambda is learned, on a network that will be thrown away.
    Rehearsal,
    /// The network is trained.
    Training,
}

impl Phase {
    /// Steps of this part of a run.
    fn steps(self, settings: &TrainSettings) -> usize {
        match self {
            Self::Rehearsal => settings.generator.rehearsal_steps(),
            Self::Training => settings.steps,
        }
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Outcome {
    /// All steps are done.
    Finished(Box<Summary>),
    /// It was told to stop, and can go on from its folder.
    Stopped {
        /// The run folder.
        folder: PathBuf,
        /// The part of the run that was at hand.
        phase: Phase,
        /// Steps of it that are done.
        step: usize,
    },
    /// It was to go on, but had finished before.
    FinishedBefore {
        /// The run folder.
        folder: PathBuf,
        /// Steps done.
        step: usize,
    },
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// The run folder.
    pub folder: PathBuf,
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
    /// Steps in which nothing was mined and the weights stayed.
    pub steps_without_pairs: usize,
    /// Pictures that could not be read: stand-ins used in training.
    pub replaced: usize,
    /// Pictures that could not be read: left out of the evaluation.
    pub skipped: usize,
    /// Seconds of training, without evaluations.
    pub training_seconds: f64,
    /// Seconds of this process.
    pub total_seconds: f64,
}

/// Settings that may change when a run goes on: none on which its result depends, except for the last bits
/// that another device computes otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Overrides {
    /// Where to compute.
    pub device: Option<String>,
    /// Threads that prepare batches.
    pub workers: Option<usize>,
    /// Steps between two checkpoints.
    pub checkpoint_every: Option<usize>,
    /// Unreadable pictures that the run puts up with.
    pub max_bad_images: Option<usize>,
}

impl Overrides {
    fn apply(&self, settings: &mut TrainSettings) {
        settings.device = self.device.clone().unwrap_or_else(|| settings.device.clone());
        settings.workers = self.workers.unwrap_or(settings.workers);
        settings.checkpoint_every = self.checkpoint_every.unwrap_or(settings.checkpoint_every);
        settings.max_bad_images = self.max_bad_images.unwrap_or(settings.max_bad_images);
    }
}

/// Trains a network and writes the run folder: config.toml, metrics.jsonl, event files, checkpoints, report.
///
/// Once `stop` is set the run finishes its step, writes a checkpoint and returns.
///
/// # Errors
/// Settings out of range, data that cannot be used, a file that cannot be written, or a run that diverged.
/// What cuts a run short that could go on is [`Error::Interrupted`].
pub fn train(
    settings: &TrainSettings,
    stop: &AtomicBool,
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome> {
    settings.validate()?;
    settings.check_files()?;
    RunFolder::check(settings)?;
    let begun = Instant::now();
    let (place, backend) = open_device(settings)?;
    let engine = make_engine(settings, (&place, backend), None)?;
    let dataset = settings.data.open(&mut |note| tell(Event::Note(note)))?;
    let setup = Setup::new(settings, &dataset, engine)?;
    let folder = RunFolder::create(settings, &dataset.name)?;
    let metrics = RecordWriter::create(&folder.metrics())?;
    let events = EventWriter::create(folder.path(), settings.generator.rehearsal_steps(), None)?;
    let phase = RunState::default().phase(settings);
    tell(Event::Computing { device: &place.spec.to_string(), reason: place.reason.as_deref() });
    tell(Event::Started {
        dataset: &dataset,
        folder: folder.path(),
        steps_per_epoch: setup.sampler.steps_per_epoch(),
        phase,
        steps: phase.steps(settings),
        resumed: None,
    });
    dataset.warnings.iter().for_each(|warning| tell(Event::Warning(warning)));
    Run::new(settings, &dataset, folder, setup, (metrics, events), stop, tell).train(begun)
}

/// Goes on with the run in `folder` from its last checkpoint, or from the beginning if it has none yet: the
/// weights, metrics and checkpoints become the same, bit for bit, as if it had never been cut short.
///
/// # Errors
/// As [`train`]; [`Error::Format`] if a file of the folder is not what it should be.
pub fn resume(
    folder: &Path,
    overrides: &Overrides,
    stop: &AtomicBool,
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome> {
    let begun = Instant::now();
    let (folder, mut settings) = RunFolder::open(folder)?;
    overrides.apply(&mut settings);
    settings.validate()?;
    let mut metrics = RecordWriter::reopen(&folder.metrics())?;
    let last = folder.last();
    let last = last.exists().then_some(last.as_path());
    let state = last.map(checkpoint::run_state).transpose()?.unwrap_or_default();
    if state.finished {
        return Ok(Outcome::FinishedBefore { folder: folder.path().to_path_buf(), step: state.step });
    }
    let (place, backend) = open_device(&settings)?;
    let mut engine = make_engine(&settings, (&place, backend), last)?;
    if let Some(last) = last {
        checkpoint::resume_engine(&mut engine, last)?;
    }
    let dataset = settings.data.open(&mut |note| tell(Event::Note(note)))?;
    check_extents(&state, &dataset)?;
    let setup = Setup::new(&settings, &dataset, engine)?;
    metrics.cut(state.metrics_bytes)?;
    let events = resumed_events(&folder, &settings, &state)?;
    let phase = state.phase(&settings);
    tell(Event::Computing { device: &place.spec.to_string(), reason: place.reason.as_deref() });
    tell(Event::Started {
        dataset: &dataset,
        folder: folder.path(),
        steps_per_epoch: setup.sampler.steps_per_epoch(),
        phase,
        steps: phase.steps(&settings),
        resumed: Some(state.step),
    });
    let mut run = Run::new(&settings, &dataset, folder, setup, (metrics, events), stop, tell);
    if last.is_some() {
        run.state = state;
    }
    run.train(begun)
}

/// Finds the device and opens the loss's backend there.
fn open_device(settings: &TrainSettings) -> Result<(Place, Box<dyn Backend>)> {
    let place = device::place(settings.device.parse()?)?;
    let backend = backend::open(&place.spec)?;
    Ok((place, backend))
}

fn check_extents(state: &RunState, dataset: &Dataset) -> Result<()> {
    let Some(before) = state.extents else { return Ok(()) };
    let now = steps::extents(dataset);
    for (split, before, now) in [("training", before[0], now[0]), ("test", before[1], now[1])] {
        if before != now {
            return Err(Error::Dataset(format!(
                "the {split} split has changed since the run began: it had {} pictures of {} classes, now {} of {}",
                before.pictures, before.classes, now.pictures, now.classes
            )));
        }
    }
    Ok(())
}

/// Event files say of each step only what the last file does, and an evaluation bears the number of the step to
/// come: the one made at the checkpoint is told again.
fn resumed_events(folder: &RunFolder, settings: &TrainSettings, state: &RunState) -> Result<EventWriter> {
    let resumed = Some((state.phase(settings), state.step));
    let rehearsal = settings.generator.rehearsal_steps();
    let mut events = EventWriter::create(folder.path(), rehearsal, resumed)?;
    let records = super::records::read(&folder.metrics())?;
    let evaluation = records.iter().rev().find(|record| record.evaluation().is_some());
    if let Some(record) = evaluation.filter(|_| state.evaluated == Some(state.step)) {
        events.append(record)?;
    }
    Ok(events)
}

/// What cuts a run short that can go on once it is mended, as [`Error::Interrupted`]; of a run that diverged, which
/// weights are still good.
fn cut_short(error: Error, folder: &RunFolder, state: &RunState) -> Error {
    match error {
        Error::Training(reason) => match &state.best {
            Some(best) => Error::Training(format!(
                "{reason}; {} holds the last good weights, of step {}",
                folder.best().display(),
                best.step
            )),
            None => Error::Training(reason),
        },
        Error::Io { .. } | Error::Dataset(_) | Error::Image { .. } | Error::Device { .. } => {
            Error::Interrupted { cause: Box::new(error), folder: folder.path().to_path_buf() }
        }
        other => other,
    }
}
