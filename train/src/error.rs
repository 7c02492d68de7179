//! Errors of training, and of using a trained network.

use std::borrow::Cow;
use std::fmt::Display;
use std::path::{Path, PathBuf};

/// An error of `ddtas-train`. Every message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of a setting, a file, the output, or the library.
    #[error("{0}")]
    Program(#[from] ddtas_io::Error),
    /// A data set cannot be used.
    #[error("{0}")]
    Dataset(String),
    /// An image cannot be read.
    #[error("cannot read the image {path}: {reason}", path = path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// The decoder's error.
        reason: String,
    },
    /// A run was interrupted by something that can be fixed, and can then be resumed.
    #[error("{cause}; fix this, then run: {command}")]
    Interrupted {
        /// What went wrong.
        cause: Box<Error>,
        /// The command that resumes the run.
        command: String,
    },
    /// Another rank of the run has failed, and this one ends, too.
    #[error("rank {rank}: {reason}")]
    Rank {
        /// The rank.
        rank: usize,
        /// Its reason.
        reason: String,
    },
    /// Ranks can no longer exchange messages. Unlike with `Rank`, each rank reports this itself.
    #[error("{0}")]
    Lost(String),
    /// A value is not finite, or an embedding all zeros, so the run cannot recover.
    #[error("{0}")]
    Diverged(String),
    /// Training cannot continue because of a device, a thread, or ranks with different settings; or the result of a finished run is
    /// lost.
    #[error("{0}")]
    Training(String),
    /// The program was told to stop before there was a run to resume.
    #[error("stopped while {0}")]
    Stopped(String),
}

impl Error {
    /// A [`ddtas_io::Error::Io`], for use in `map_err`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let made = ddtas_io::Error::io(action, path);
        move |source| made(source).into()
    }

    /// A [`ddtas_io::Error::Format`].
    pub fn format(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        ddtas_io::Error::format(path, reason).into()
    }

    /// A [`ddtas_io::Error::InvalidSetting`].
    pub fn setting(name: &'static str, value: impl Display, range: &'static str) -> Self {
        ddtas_io::Error::setting(name, value, range).into()
    }

    /// A [`ddtas_io::Error::InvalidArgument`].
    pub fn argument(name: &'static str, value: impl Display, range: &'static str) -> Self {
        ddtas_io::Error::argument(name, value, range).into()
    }

    /// A [`ddtas_io::Error::Misused`].
    pub fn misuse(name: &'static str, value: impl Display, reason: impl Into<Cow<'static, str>>) -> Self {
        ddtas_io::Error::misuse(name, value, reason).into()
    }
}

/// An [`Error::setting`] unless `good`.
pub(crate) fn check(good: bool, name: &'static str, value: impl Display, range: &'static str) -> Result<()> {
    if good { Ok(()) } else { Err(Error::setting(name, value, range)) }
}

/// An [`Error::misuse`] unless `good`.
pub(crate) fn fits(good: bool, name: &'static str, value: impl Display, reason: &'static str) -> Result<()> {
    if good { Ok(()) } else { Err(Error::misuse(name, value, reason)) }
}

impl From<ddtas::Error> for Error {
    fn from(error: ddtas::Error) -> Self {
        Self::Program(error.into())
    }
}

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
