//! The error of the programs, their files and their output: one line each, as the library's.

use std::borrow::Cow;
use std::fmt::Display;
use std::path::{Path, PathBuf};

/// An error of a program, or of the library below it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of the library.
    #[error(transparent)]
    Library(ddtas::Error),
    /// A flag of a program outside its range.
    #[error("{} is out of range: {range}", flag(name, value))]
    InvalidSetting {
        /// The flag, without its dashes.
        name: &'static str,
        /// The value given.
        value: String,
        /// The values that are allowed.
        range: &'static str,
    },
    /// An argument of a function outside its range, which no flag sets.
    #[error("{name} {value} is out of range: {range}")]
    InvalidArgument {
        /// What it is.
        name: &'static str,
        /// The value given.
        value: String,
        /// The values that are allowed.
        range: &'static str,
    },
    /// A flag that is missing, or has a value that is unknown or does not go with the others.
    #[error("{}: {reason}", flag(name, value))]
    Misused {
        /// The flag, without its dashes.
        name: &'static str,
        /// The value given; empty if there is none.
        value: String,
        /// What the flag needs, or the value to give instead.
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

    /// An [`Error::InvalidArgument`].
    pub fn argument(name: &'static str, value: impl Display, range: &'static str) -> Self {
        Self::InvalidArgument { name, value: value.to_string(), range }
    }

    /// An [`Error::Misused`].
    pub fn misuse(name: &'static str, value: impl Display, reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Misused { name, value: value.to_string(), reason: reason.into() }
    }
}

impl From<ddtas::Error> for Error {
    /// A library setting that a flag sets gets the flag's name.
    fn from(error: ddtas::Error) -> Self {
        match error {
            ddtas::Error::InvalidSetting { name: "device", value, .. } => {
                Self::misuse("device", value, UNKNOWN_DEVICE)
            }
            ddtas::Error::InvalidSetting { name, value, range } => match flag_of(name) {
                Some(name) => Self::InvalidSetting { name, value, range },
                None => Self::Library(ddtas::Error::InvalidSetting { name, value, range }),
            },
            other => Self::Library(other),
        }
    }
}

/// The flag that sets a field of the library's settings.
fn flag_of(field: &str) -> Option<&'static str> {
    const FLAGS: [(&str, &str); 10] = [
        ("alpha", "alpha"),
        ("beta", "beta"),
        ("gamma", "gamma"),
        ("ks", "recall-at"),
        ("lambda_neg", "lambda-neg"),
        ("lambda_pos", "lambda-pos"),
        ("mining", "mining"),
        ("negative_ratio", "negative-ratio"),
        ("probe_ratio", "probe-ratio"),
        ("tolerance", "tolerance"),
    ];
    FLAGS.iter().find(|(name, _)| *name == field).map(|(_, flag)| *flag)
}

/// The error of an unknown device. `emulated` is not offered: it is for tests.
pub const UNKNOWN_DEVICE: &str = "unknown; give auto, cpu, cuda or cuda:N";

/// A flag as it is typed.
fn flag(name: &str, value: &str) -> String {
    let space = if value.is_empty() { "" } else { " " };
    format!("--{name}{space}{value}")
}

/// The programs' result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    use ddtas::loss::LossSettings;

    use super::*;

    #[test]
    fn flags_alone_have_dashes() {
        assert_eq!(
            Error::setting("steps", 0, "1 or more").to_string(),
            "--steps 0 is out of range: 1 or more"
        );
        assert_eq!(Error::misuse("init", "", "missing").to_string(), "--init: missing");
        assert_eq!(Error::argument("flip", 2, "0 to 1").to_string(), "flip 2 is out of range: 0 to 1");
        let others = ddtas::Error::InvalidSetting { name: "picked", value: "9".into(), range: "0 to 7" };
        assert_eq!(Error::from(others).to_string(), "picked = 9 is out of range: 0 to 7");
        let spoil: [fn(&mut LossSettings); 8] = [
            |settings| settings.gamma = f64::NAN,
            |settings| settings.negative_ratio = f64::NAN,
            |settings| settings.probe_ratio = f64::NAN,
            |settings| settings.tolerance = f64::NAN,
            |settings| settings.alpha = f64::NAN,
            |settings| settings.beta = f64::NAN,
            |settings| settings.lambda_pos = f64::NAN,
            |settings| settings.lambda_neg = f64::NAN,
        ];
        for spoil in spoil {
            let mut settings = LossSettings::default();
            spoil(&mut settings);
            let said = Error::from(settings.validate().unwrap_err()).to_string();
            assert!(said.starts_with("--") && said.contains(" NaN is out of range"), "{said}");
        }
    }
}
