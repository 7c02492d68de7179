//! The records in metrics.jsonl, each a line of JSON.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Parts of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Lambda is learned, on a network that is discarded.
    Rehearsal,
    /// The network is trained.
    Training,
}

/// One training step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Step, from 0.
    pub step: usize,
    /// Passes over the training pictures so far.
    pub epoch: f64,
    /// The loss.
    pub loss: f64,
    /// Positive tolerance in force; absent without mining.
    pub gamma_pos: Option<f64>,
    /// Negative tolerance in force; absent without mining.
    pub gamma_neg: Option<f64>,
    /// Loss threshold of positives.
    pub lambda_pos: f64,
    /// Loss threshold of negatives.
    pub lambda_neg: f64,
    /// Positive pairs in the loss.
    pub mined_pos: u64,
    /// Negative pairs in the loss.
    pub mined_neg: u64,
    /// Anchors in the loss.
    pub active: u64,
    /// Mean similarity of positive pairs; absent if the batch has none.
    pub mean_pos: Option<f64>,
    /// Mean similarity of negative pairs; absent if the batch has none.
    pub mean_neg: Option<f64>,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// dL^m/dlambda, of lambda_pos and lambda_neg; absent without a generator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypergradient: Option<[f64; 2]>,
    /// Bytes that rank 0 sent to others in the step; absent without other ranks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_bytes: Option<u64>,
}

/// One evaluation on the test classes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// Steps trained so far.
    pub step: usize,
    /// K and Recall@K, ascending in K, in 0 to 1.
    pub recall: Vec<(usize, f64)>,
    /// R-precision; absent in runs of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub r_precision: Option<f64>,
    /// MAP@R; absent in runs of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map_at_r: Option<f64>,
}

/// A line of metrics.jsonl.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Record {
    /// A step of the rehearsal in which lambda is learned before the run.
    Rehearsal(StepRecord),
    /// A training step.
    Step(StepRecord),
    /// An evaluation.
    Evaluation(EvaluationRecord),
}

impl Record {
    /// The evaluation, if it is one.
    #[must_use]
    pub fn evaluation(&self) -> Option<&EvaluationRecord> {
        match self {
            Self::Evaluation(evaluation) => Some(evaluation),
            Self::Rehearsal(_) | Self::Step(_) => None,
        }
    }
}

/// Appends records to a file, each as a line in one write: only the last line of a killed run can be incomplete.
///
/// The file is locked, so that no two processes write to one run.
pub struct RecordWriter {
    file: File,
    path: PathBuf,
    bytes: u64,
}

impl RecordWriter {
    /// Creates the file and locks it. If two runs do so at once, one fails.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io); [`Format`](ddtas_io::Error::Format) if it already exists.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create_new(path).map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => {
                Error::format(path, "belongs to another run, begun meanwhile: give another --output")
            }
            _ => Error::io("create", path)(error),
        })?;
        Self::locked(file, path, 0)
    }

    /// Opens the file of an earlier process, or creates it; [`cut`](Self::cut) then sets where to continue.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io); [`Misused`](ddtas_io::Error::Misused) if another process is writing to it.
    pub fn reopen(path: &Path) -> Result<Self> {
        let file =
            OpenOptions::new().append(true).create(true).open(path).map_err(Error::io("open", path))?;
        let bytes = file.metadata().map_err(Error::io("read", path))?.len();
        Self::locked(file, path, bytes)
    }

    /// Checks the first `bytes` bytes, which [`cut`](Self::cut) keeps: they must be whole records.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io); [`Format`](ddtas_io::Error::Format).
    pub fn check(&self, bytes: u64) -> Result<()> {
        let text = std::fs::read(&self.path).map_err(Error::io("read", &self.path))?;
        let kept = usize::try_from(bytes).ok().and_then(|bytes| text.get(..bytes));
        let Some(kept) = kept else { return Err(self.too_short(bytes)) };
        records_in(&self.path, kept)?;
        if kept.last().is_some_and(|&byte| byte != b'\n') {
            let reason = format!("no line ends at byte {bytes}, where the checkpoint was written");
            return Err(Error::format(&self.path, reason));
        }
        Ok(())
    }

    fn too_short(&self, bytes: u64) -> Error {
        let reason = format!("holds {} bytes, but the checkpoint was written after {bytes}", self.bytes);
        Error::format(&self.path, reason)
    }

    /// Truncates the file to `bytes` bytes.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io); [`Format`](ddtas_io::Error::Format) if the file is shorter.
    pub fn cut(&mut self, bytes: u64) -> Result<()> {
        if self.bytes < bytes {
            return Err(self.too_short(bytes));
        }
        self.file.set_len(bytes).map_err(Error::io("cut", &self.path))?;
        self.bytes = bytes;
        Ok(())
    }

    /// Length of the file without its last record.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io).
    pub fn bytes_before_last(&self) -> Result<u64> {
        let text = std::fs::read(&self.path).map_err(Error::io("read", &self.path))?;
        let last = text.split_inclusive(|&byte| byte == b'\n').next_back().map_or(0, <[u8]>::len);
        Ok((text.len() - last) as u64)
    }

    fn locked(file: File, path: &Path, bytes: u64) -> Result<Self> {
        match file.try_lock() {
            Ok(()) => Ok(Self { file, path: path.to_path_buf(), bytes }),
            Err(TryLockError::WouldBlock) => {
                let folder = path.parent().unwrap_or(path).display();
                Err(Error::misuse(
                    "resume",
                    folder,
                    "another process is writing there: the run has not ended",
                ))
            }
            Err(TryLockError::Error(source)) => Err(Error::io("lock", path.to_path_buf())(source)),
        }
    }

    /// Appends a record.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io), for example if the disk is full.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let mut line =
            serde_json::to_string(record).map_err(|error| Error::format(&self.path, error.to_string()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(Error::io("write", &self.path))?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// Flushes every record to the disk, and returns the length of the file.
    ///
    /// # Errors
    /// [`Io`](ddtas_io::Error::Io).
    pub fn sync(&self) -> Result<u64> {
        self.file.sync_data().map_err(Error::io("write", &self.path))?;
        Ok(self.bytes)
    }
}

/// Reads the records of a run; an incomplete last line, left by a killed process, is ignored.
///
/// # Errors
/// [`Io`](ddtas_io::Error::Io), or [`Format`](ddtas_io::Error::Format) if a whole line is not a record.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    records_in(path, &std::fs::read(path).map_err(Error::io("read", path))?)
}

fn records_in(path: &Path, text: &[u8]) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for (number, line) in text.split_inclusive(|&byte| byte == b'\n').enumerate() {
        match serde_json::from_slice(line) {
            Ok(record) => records.push(record),
            Err(_) if !line.ends_with(b"\n") => {}
            Err(error) => return Err(Error::format(path, format!("line {}: {error}", number + 1))),
        }
    }
    Ok(records)
}
