//! A training run: begun, watched, stopped, gone on with.
//!
//! | file | what |
//! | --- | --- |
//! | `setup.rs` | data, network, generator and loaders from the settings |
//! | `steps.rs` | the steps, evaluations and checkpoints, to the end or until told to stop |
//! | `state.rs` | what a checkpoint keeps of a run beside the network |
//! | `event.rs` | what a run tells, and what it came to |
//! | `unread.rs` | pictures that cannot be read |
//! | `evaluation.rs` | Recall@K of the network, and of raw pixels |
//! | `folder.rs` | where a run's files are |

mod evaluation;
mod event;
mod folder;
mod setup;
mod state;
mod steps;
mod unread;

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use ddtas::backend::{self, Backend};

use super::checkpoint::Checkpoint;
use super::device::{self, Place};
use super::records::RecordWriter;
use super::settings::TrainSettings;
use super::tensorboard::EventWriter;
use crate::Result;
pub use evaluation::EVALUATION_CHUNK;
pub use event::{Event, Outcome, Summary};
use folder::RunFolder;
use setup::{Setup, make_engine};
use state::{RunState, steps_of};
use steps::Run;

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
/// What cuts a run short that could go on is [`Error::Interrupted`](crate::Error::Interrupted).
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
    let (settings, note) = &settings.fitted(dataset.train.by_class().len());
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
        steps: steps_of(phase, settings),
        resumed: None,
    });
    note.iter().for_each(|note| tell(Event::Note(note)));
    let memory = settings.warning_of_memory();
    dataset.warnings.iter().chain(&memory).for_each(|warning| tell(Event::Warning(warning)));
    Run::new(settings, &dataset, folder, setup, (metrics, events), stop, tell).train(begun)
}

/// Goes on with the run in `folder` from its last checkpoint, or from the beginning if it has none yet: the
/// weights, metrics and checkpoints become the same, bit for bit, as if it had never been cut short.
///
/// # Errors
/// As [`train`]; [`Format`](ddtas_io::Error::Format)(crate::Error::Format) if a file of the folder is not what it should be.
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
    let last = last.exists().then(|| Checkpoint::open(&last)).transpose()?;
    let state = last.as_ref().map(RunState::of).transpose()?.unwrap_or_default();
    if state.finished {
        return Ok(Outcome::FinishedBefore { folder: folder.path().to_path_buf(), step: state.step });
    }
    let (place, backend) = open_device(&settings)?;
    let mut engine = make_engine(&settings, (&place, backend), last.as_ref())?;
    let resumed = last.is_some();
    if let Some(last) = last {
        state.put_back(&mut engine, last)?;
    }
    let dataset = settings.data.open(&mut |note| tell(Event::Note(note)))?;
    state.check_extents(&dataset)?;
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
        steps: steps_of(phase, &settings),
        resumed: Some(state.step),
    });
    let mut run = Run::new(&settings, &dataset, folder, setup, (metrics, events), stop, tell);
    if resumed {
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
