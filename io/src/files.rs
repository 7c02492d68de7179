//! Atomic writing of files.

use std::io::Write;
use std::path::Path;

use crate::{Error, Result};

/// Writes `bytes` to a temporary file beside `path` and renames it: a full disk or a killed
/// process leaves the old file, or none, never half of one.
///
/// # Errors
/// [`Error::Io`] if the file cannot be written, flushed or renamed.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let partial = path.with_file_name(name);
    let written = std::fs::File::create(&partial).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    let renamed = written.and_then(|()| std::fs::rename(&partial, path));
    renamed.map_err(|source| {
        // Best effort: what is left of a failed write is of no use.
        let _ = std::fs::remove_file(&partial);
        Error::Io { action: "write", path: path.to_path_buf(), source }
    })
}

/// Checks that a result can be written to `path`, before the work that makes it. `name` is the setting.
///
/// # Errors
/// [`Error::Misused`] unless `path` is a file's name in a folder that is there.
pub fn check_place(name: &'static str, path: &Path) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if path.file_name().is_some() && folder.is_dir() && !path.is_dir() {
        return Ok(());
    }
    Err(Error::misuse(name, path.display(), "must be a file in an existing folder"))
}
