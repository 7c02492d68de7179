//! Finds tools that may be installed from PyPI, and the kernels' sources.

#[cfg(any(feature = "cuda", feature = "emulated"))]
use std::path::Path;
use std::path::PathBuf;
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

/// The files of a folder and its subfolders with this suffix, in one order: the same sources give the same binary.
#[cfg(any(feature = "cuda", feature = "emulated"))]
pub fn files(folder: &Path, suffix: &str) -> Result<Vec<PathBuf>, String> {
    let failed = |error: std::io::Error| format!("cannot read {}: {error}", folder.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            found.extend(files(&path, suffix)?);
        } else if path.extension().is_some_and(|extension| extension == suffix) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
