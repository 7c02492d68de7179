//! The one error type of the library.
//!
//! Variants are cut by what the caller can do about them, and carry the values
//! (row, label, path) that a message needs.

use std::path::{Path, PathBuf};

/// What can go wrong in ddtas. Every message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An embedding holds a NaN or an infinity.
    #[error("row {row} of the {rows} holds a value that is not finite (NaN or infinity)")]
    NotFinite {
        /// Which matrix: `"anchors"`, `"references"`, `"tangent"`.
        rows: &'static str,
        /// Row index, from 0.
        row: usize,
    },
    /// An embedding does not have unit L2 norm.
    #[error("row {row} of the {rows} has L2 norm {norm:.6}, not 1: normalise the embeddings first")]
    NotUnit {
        /// Which matrix: `"anchors"` or `"references"`.
        rows: &'static str,
        /// Row index, from 0.
        row: usize,
        /// The norm that was found.
        norm: f64,
    },
    /// Two inputs that must agree in a length do not.
    #[error("{what}: expected {expected}, got {got}")]
    LengthMismatch {
        /// The input that is off.
        what: &'static str,
        /// The length the other inputs imply.
        expected: usize,
        /// The length that was given.
        got: usize,
    },
    /// The rows of a matrix do not lie one behind the other in memory.
    #[error("the {rows} must be in row-major order without gaps")]
    NotContiguous {
        /// Which matrix.
        rows: &'static str,
    },
    /// A batch without rows or without dimensions.
    #[error("the {rows} are empty: at least one row and one dimension are needed")]
    Empty {
        /// Which matrix.
        rows: &'static str,
    },
    /// A setting outside its range.
    #[error("{name} = {value} is out of range: {range}")]
    InvalidSetting {
        /// The setting, as the programs spell it.
        name: &'static str,
        /// The value given.
        value: String,
        /// The values that are allowed.
        range: &'static str,
    },
    /// A pass that continues an earlier one was called out of order.
    #[error("{0}")]
    OutOfOrder(&'static str),
    /// A result that the host's memory cannot hold.
    #[error("{what}: {bytes} bytes of memory could not be had")]
    OutOfMemory {
        /// What it is.
        what: &'static str,
        /// Its size.
        bytes: usize,
    },
    /// A device or backend that this build or machine does not have.
    #[error("{0}")]
    Unavailable(String),
    /// The GPU driver refused a call.
    #[error("{call} failed: {code}")]
    Device {
        /// The driver call.
        call: &'static str,
        /// The driver's name of the error.
        code: String,
    },
    /// A data set cannot be used as it is.
    #[error("{0}")]
    Dataset(String),
    /// An image cannot be read.
    #[error("cannot read the image {path}: {reason}", path = path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What the decoder said.
        reason: String,
    },
    /// A file holds something else than what was expected of it.
    #[error("{path}: {reason}", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The operating system refused to read or write.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// `"read"`, `"write"`, `"create"`, ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A program's result cannot be printed: the pipe behind standard output is closed, or its disk is full.
    #[error("cannot write to standard output: {0}")]
    Output(std::io::Error),
    /// A run was cut short by something that can be mended, and can then go on.
    #[error("{cause}; mend that, then: ddtas-train --resume {folder}", folder = folder.display())]
    Interrupted {
        /// What went wrong.
        cause: Box<Error>,
        /// The run folder.
        folder: PathBuf,
    },
    /// Training went wrong in a way that more steps will not mend.
    #[error("{0}")]
    Training(String),
}

impl Error {
    /// An [`Error::Io`], for use in `map_err`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { action, path, source }
    }

    /// An [`Error::Format`].
    pub fn format(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::Format { path: path.as_ref().to_path_buf(), reason: reason.into() }
    }
}

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
