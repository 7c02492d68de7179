//! Finds tools that may be installed from PyPI, and says how to install them.

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
