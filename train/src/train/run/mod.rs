//! A training run, started from settings or resumed from a run folder.
//!
//! | file | what |
//! | --- | --- |
//! | `setup.rs` | data, network, generator and loaders from the settings |
//! | `steps.rs` | the training loop with evaluations and checkpoints |
//! | `state.rs` | the state of a run in a checkpoint, besides the network |
//! | `files.rs` | the files that rank 0 writes |
//! | `event.rs` | progress and outcome |
//! | `unread.rs` | pictures that cannot be read |
//! | `evaluation.rs` | Recall@K of the network, and of raw pixels |
//! | `overrides.rs` | settings that may change when a run is resumed |
//! | `ram.rs` | checks that this machine's memory suffices |

mod evaluation;
mod event;
mod files;
mod overrides;
mod ram;
mod setup;
mod state;
mod steps;
mod unread;

use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::checkpoint::Checkpoint;
use super::folder::RunFolder;
use super::records::RecordWriter;
use super::report::Findings;
use super::settings::TrainSettings;
use crate::ranks::{Collective, together};
use crate::{Error, Result};
pub use evaluation::EVALUATION_CHUNK;
pub use event::{Event, Outcome, Summary};
use files::Files;
pub use overrides::Overrides;
pub(crate) use ram::check_embedding;
use setup::{Setup, make_engine};
use state::RunState;
use steps::Run;

/// Trains a network and writes the run folder: config.toml, metrics.jsonl, event files, checkpoints, report.
///
/// Once `stop` is set, the run finishes its step, writes a checkpoint and returns; if the run has not started
/// yet, the result is [`Error::Stopped`](crate::Error::Stopped). All `ranks` must call this with the same
/// settings: each takes its share of every batch, and only rank 0 writes files and reports progress.
///
/// # Errors
/// Settings out of range, data that cannot be used, a file that cannot be written, or a run that diverged.
/// A run that can be resumed ends with [`Error::Interrupted`](crate::Error::Interrupted). An error of one rank ends all,
/// the others with [`Error::Rank`](crate::Error::Rank).
pub fn train(
    settings: &TrainSettings,
    ranks: &Rc<dyn Collective>,
    stop: &AtomicBool,
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome> {
    on_every_rank(ranks, tell, |tell| {
        settings.validate()?;
        settings.check_files()?;
        let writes = ranks.rank() == 0;
        if writes {
            RunFolder::check(settings)?;
        }
        let begun = Instant::now();
        let (device, engine) = make_engine(settings, None, ranks)?;
        let dataset = settings.data.open_until(stop, &mut |note| tell(Event::Note(note)))?;
        let (settings, note) = &settings.fitted(&dataset.train);
        let setup = Setup::new(settings, &dataset, engine, (&device, &**ranks))?;
        let memory = settings.warning_of_memory();
        let files = writes.then(|| Files::create(settings, &dataset.name)).transpose()?;
        let run = Run::new(settings, &dataset, files, setup, ranks, stop, tell);
        let said =
            note.iter().map(|note| Event::Note(note)).chain(memory.iter().map(|line| Event::Warning(line)));
        run.train(&device, None, begun, said.collect())
    })
}

/// Runs `work` on this rank. Only rank 0 reports progress, and an error on one rank ends all.
fn on_every_rank<T>(
    ranks: &Rc<dyn Collective>,
    tell: &mut dyn FnMut(Event<'_>),
    work: impl FnOnce(&mut dyn FnMut(Event<'_>)) -> Result<T>,
) -> Result<T> {
    let mut silent = |_: Event<'_>| {};
    let tell = if ranks.rank() == 0 { tell } else { &mut silent };
    together(ranks, || work(tell))
}

/// Resumes the run in `folder` from its last checkpoint, or from the beginning if it has none yet. With as many `ranks` as
/// before, weights, metrics and checkpoints are bit for bit those of a run that was never interrupted.
/// Only rank 0 needs the folder.
///
/// # Errors
/// As [`train`]; [`Format`](ddtas_io::Error::Format) if a file of the folder is malformed.
pub fn resume(
    folder: &Path,
    overrides: &Overrides,
    ranks: &Rc<dyn Collective>,
    stop: &AtomicBool,
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome> {
    on_every_rank(ranks, tell, |tell| {
        let begun = Instant::now();
        let writes = ranks.rank() == 0;
        let read = |path: &Path| std::fs::read(path).map_err(Error::io("read", path));
        let folder = RunFolder::open(folder)?;
        let config = if writes { read(&folder.config())? } else { Vec::new() };
        let mut settings = folder.settings_in(&ranks.broadcast(config)?)?;
        overrides.apply(&mut settings);
        settings.validate()?;
        let metrics = writes.then(|| RecordWriter::reopen(&folder.metrics())).transpose()?;
        if writes {
            folder.remove_partial()?;
        }
        let last = folder.last();
        let there = writes && last.exists();
        let bytes = ranks.broadcast(if there { read(&last)? } else { Vec::new() })?;
        let last = (there || !bytes.is_empty()).then(|| Checkpoint::parse(&last, &bytes)).transpose()?;
        let mut state = last.as_ref().map(RunState::of).transpose()?.unwrap_or_default();
        state.check_settings(&settings, &folder.config())?;
        // A finished run continues if it is given more steps.
        state.finished &= settings.steps == state.step;
        if state.finished {
            if !writes {
                return Ok(Outcome::OnRank0);
            }
            let lost = |error| format!("{error}; without --json the place of the run is printed");
            let summary = Findings::read(folder.path()).map_err(lost).and_then(|findings| {
                let summary =
                    Summary::of(&state, &settings, folder.path(), findings.seen, folder.read_seconds());
                summary.map(Box::new).ok_or_else(|| "the checkpoint has no evaluations".to_owned())
            });
            return Ok(Outcome::FinishedBefore {
                summary,
                folder: folder.path().to_path_buf(),
                command: ranks.to_resume(folder.path()),
                step: state.step,
            });
        }
        let (device, mut engine) = make_engine(&settings, last.as_ref(), ranks)?;
        let resumed = last.is_some();
        if let Some(last) = last {
            state.put_back(&mut engine, last)?;
        }
        let dataset = settings.data.open_until(stop, &mut |note| tell(Event::Note(note)))?;
        state.check_data(&dataset)?;
        let as_given = settings;
        let (settings, _) = as_given.fitted(&dataset.train);
        let setup = Setup::new(&settings, &dataset, engine, (&device, &**ranks))?;
        let files = metrics.map(|metrics| Files::reopen(folder, metrics, &settings, &state)).transpose()?;
        // Only now, so that a run that cannot go on stays as it is.
        if let Some(files) = files.as_ref().filter(|_| overrides.has("data_root") || overrides.has("steps")) {
            files.folder.write_config(&as_given)?;
        }
        let best = files.as_ref().and_then(|files| state.warning_of_best(&files.folder.best()));
        let mut run = Run::new(&settings, &dataset, files, setup, ranks, stop, tell);
        let ranks_changed = state.warning_of_ranks(&settings, ranks.size());
        let warnings = [best, ranks_changed];
        let done = state.step;
        if resumed {
            run.go_on(state)?;
        }
        run.train(
            &device,
            Some(done),
            begun,
            warnings.iter().flatten().map(|line| Event::Warning(line)).collect(),
        )
    })
}
