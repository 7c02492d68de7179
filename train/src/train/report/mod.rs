//! report.html of a run folder, a single file without external resources.
//!
//! [`write()`] makes it of config.toml, metrics.jsonl and report.json ([`Findings`]) at the end of a run.
//! neighbours.png contains only the queries and their neighbours, for a README.

mod findings;
mod html;
mod plots;
mod strip;

use std::path::{Path, PathBuf};

use ddtas_io::files;

use crate::{Error, Result};
use findings::Report;

pub use findings::{Baseline, Findings};
pub use strip::{Answer, Query, queries};

/// Writes report.html from the files of a finished run's folder, and returns its path.
///
/// # Errors
/// [`Io`](ddtas_io::Error::Io) if a file is missing or cannot be written; [`Format`](ddtas_io::Error::Format)
/// if one is malformed.
pub fn write(folder: &Path) -> Result<PathBuf> {
    let report = Report::read(folder)?;
    let path = folder.join("report.html");
    let page = html::page(&report).map_err(|reason| Error::format(&path, reason))?;
    files::write_atomic(&path, page.as_bytes())?;
    Ok(path)
}
