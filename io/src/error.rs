//! The error of the programs, their files and their output: one line each, as the library's.

use std::borrow::Cow;
use std::fmt::Display;
use std::path::{Path, PathBuf};

/// An error of a program, or of the library below it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The library's.
    #[error(transparent)]
    Library(ddtas::Error),
    /// A setting of a program outside its range.
    #[error("{} is out of range: {range}", flag(name, value))]
    InvalidSetting {
        /// The setting, as the programs spell it.
        name: &'static str,
        /// The value given.
        value: String,
        /// The values that are allowed.
        range: &'static str,
    },
    /// A setting that is missing, or has a value that is unknown or does not go with the others.
    #[error("{}: {reason}", flag(name, value))]
    Misused {
        /// The setting, as the programs spell it.
        name: &'static str,
        /// The value given; empty if there is none.
        value: String,
        /// What it needs, or what is to be given instead.
        reason: Cow<'static, str>,
    },
    /// A file does not hold what was expected.
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

    /// An [`Error::InvalidSetting`].
    pub fn setting(name: &'static str, value: impl Display, range: &'static str) -> Self {
        Self::InvalidSetting { name, value: value.to_string(), range }
    }

    /// An [`Error::Misused`].
    pub fn misuse(name: &'static str, value: impl Display, reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Misused { name, value: value.to_string(), reason: reason.into() }
    }
}

impl From<ddtas::Error> for Error {
    fn from(error: ddtas::Error) -> Self {
        match error {
            ddtas::Error::InvalidSetting { name: "device", value, .. } => {
                Self::misuse("device", value, UNKNOWN_DEVICE)
            }
            ddtas::Error::InvalidSetting { name, value, range } => {
                Self::InvalidSetting { name: flag_of(name), value, range }
            }
            other => Self::Library(other),
        }
    }
}

/// The flag that sets a field of the library.
fn flag_of(field: &'static str) -> &'static str {
    match field {
        "negative_ratio" => "negative-ratio",
        "probe_ratio" => "probe-ratio",
        "lambda_pos" => "lambda-pos",
        "lambda_neg" => "lambda-neg",
        "ks" => "recall-at",
        same => same,
    }
}

/// The error of an unknown device. `emulated` is not offered: it is for tests.
pub const UNKNOWN_DEVICE: &str = "unknown; give auto, cpu, cuda or cuda:N";

/// A setting as it is typed; a name of several words is no flag.
fn flag(name: &str, value: &str) -> String {
    let dashes = if name.starts_with("--") || name.contains(' ') { "" } else { "--" };
    let space = if value.is_empty() { "" } else { " " };
    format!("{dashes}{name}{space}{value}")
}

/// The programs' result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
