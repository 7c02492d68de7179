//! The files that rank 0 writes: the run folder with metrics.jsonl, event files and checkpoints.

use std::path::Path;

use super::state::RunState;
use crate::arguments::quoted;
use crate::train::folder::RunFolder;
use crate::train::records::{self, Record, RecordWriter};
use crate::train::settings::TrainSettings;
use crate::train::tensorboard::EventWriter;
use crate::{Error, Result};
use ddtas_io::Error as Program;

/// The open files of a run.
pub(super) struct Files {
    pub folder: RunFolder,
    pub metrics: RecordWriter,
    events: EventWriter,
}

impl Files {
    /// Creates the files of a new run.
    pub fn create(settings: &TrainSettings, dataset: &str) -> Result<Self> {
        let (folder, metrics) = RunFolder::create(settings, dataset)?;
        let events = EventWriter::create(folder.path(), settings.generator.rehearsal_steps(), None)?;
        Ok(Self { folder, metrics, events })
    }

    /// Opens the files of a run that is resumed from `state`.
    pub fn reopen(
        folder: RunFolder,
        mut metrics: RecordWriter,
        settings: &TrainSettings,
        state: &RunState,
    ) -> Result<Self> {
        // The report at the end reads them.
        metrics.check(state.metrics_bytes).map_err(|error| match error {
            Error::Program(Program::Format { path, reason }) => {
                let last = quoted(&folder.last());
                let advice = "put back a copy of the file, or begin a new run with --init";
                Error::format(path, format!("{reason}; {advice} {last}"))
            }
            other => other,
        })?;
        metrics.cut(state.metrics_bytes)?;
        let resumed = Some((state.phase(settings), state.step));
        let rehearsal = settings.generator.rehearsal_steps();
        let events = EventWriter::create(folder.path(), rehearsal, resumed)?;
        Ok(Self { folder, metrics, events })
    }

    /// Repeats the last evaluation, made at the checkpoint, in the new event file. It has the number of the
    /// next step, and for the steps of the new file TensorBoard ignores the older files.
    pub fn tell_last_again(&mut self) -> Result<()> {
        let records = records::read(&self.folder.metrics())?;
        let evaluation = records.iter().rev().find(|record| record.evaluation().is_some());
        evaluation.map_or(Ok(()), |record| self.events.append(record))
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Adds a record to metrics.jsonl and the event file.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        self.metrics.append(record)?;
        self.events.append(record)
    }
}
