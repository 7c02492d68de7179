//! The files that rank 0 writes: the run folder with metrics.jsonl, event files and checkpoints.

use std::path::Path;

use super::state::RunState;
use crate::Result;
use crate::train::folder::RunFolder;
use crate::train::records::{self, Record, RecordWriter};
use crate::train::settings::TrainSettings;
use crate::train::tensorboard::EventWriter;

/// The open files of a run.
pub(super) struct Files {
    pub folder: RunFolder,
    pub metrics: RecordWriter,
    events: EventWriter,
}

impl Files {
    /// A new run's.
    pub fn create(settings: &TrainSettings, dataset: &str) -> Result<Self> {
        let (folder, metrics) = RunFolder::create(settings, dataset)?;
        let events = EventWriter::create(folder.path(), settings.generator.rehearsal_steps(), None)?;
        Ok(Self { folder, metrics, events })
    }

    /// Those of a run that goes on from `state`.
    ///
    /// Event files say of each step only what the last file does, and an evaluation bears the number of the step to
    /// come: the one made at the checkpoint is told again.
    pub fn reopen(
        folder: RunFolder,
        mut metrics: RecordWriter,
        settings: &TrainSettings,
        state: &RunState,
    ) -> Result<Self> {
        metrics.cut(state.metrics_bytes)?;
        let resumed = Some((state.phase(settings), state.step));
        let rehearsal = settings.generator.rehearsal_steps();
        let mut events = EventWriter::create(folder.path(), rehearsal, resumed)?;
        let records = records::read(&folder.metrics())?;
        let evaluation = records.iter().rev().find(|record| record.evaluation().is_some());
        if let Some(record) = evaluation.filter(|_| state.evaluated == Some(state.step)) {
            events.append(record)?;
        }
        Ok(Self { folder, metrics, events })
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
