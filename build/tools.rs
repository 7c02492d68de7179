//! Finds tools that may be installed from PyPI.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folders Python packages are installed to, nearest first; empty without Python.
///
/// An active virtual environment counts, since its `python3` comes first in PATH.
pub fn site_packages() -> Vec<PathBuf> {
    for name in ["PATH", "VIRTUAL_ENV"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let script = "import sys; print('\\n'.join(p for p in sys.path if p))";
    let Ok(output) = Command::new("python3").args(["-c", script]).output() else { return Vec::new() };
    String::from_utf8_lossy(&output.stdout).lines().map(PathBuf::from).filter(|path| path.is_dir()).collect()
}

/// The value of an environment variable, if it is set to something; cargo is told to watch it.
pub fn variable(name: &str) -> Option<String> {
    println!("cargo::rerun-if-env-changed={name}");
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A path cargo hands to every build script.
pub fn cargo_path(name: &str) -> Result<PathBuf, String> {
    std::env::var_os(name)
        .map(PathBuf::from)
        .ok_or_else(|| format!("{name} is not set: run this through cargo"))
}

/// Files of a folder in one order, so that the same sources give the same binary.
pub fn sources(folder: &Path, suffix: &str) -> Result<Vec<PathBuf>, String> {
    let failed = |error: std::io::Error| format!("cannot read {}: {error}", folder.display());
    let entries = fs::read_dir(folder).map_err(failed)?.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    let mut found: Vec<_> = entries.into_iter().map(|entry| entry.path()).collect();
    found.retain(|path| path.extension().is_some_and(|extension| extension == suffix));
    found.sort();
    Ok(found)
}
