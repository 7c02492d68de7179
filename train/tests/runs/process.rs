//! The same small run of `ddtas-train` as a process that tests may stop or kill.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::folder_of_pictures;

/// Path of the program, for `std::process`.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_ddtas-train");

/// Number of steps of the run. An epoch of its 4 training classes of 6 pictures has 2 steps.
pub const STEPS: usize = 240;

/// Arguments of the run, which evaluates every 12 steps; `more`: further arguments.
pub fn arguments(data: &Path, output: &Path, more: &[&str]) -> Vec<String> {
    let mut all: Vec<String> = [
        "--dataset folder --image-size 16 --width 4 --embedding-dim 16 --learning-rate 0.01",
        "--classes-per-batch 4 --images-per-class 3 --meta-classes 3 --evaluate-every 6 --checkpoint-every 5",
    ]
    .iter()
    .flat_map(|part| part.split(' '))
    .map(Into::into)
    .collect();
    all.extend(["--steps".into(), STEPS.to_string()]);
    all.extend(more.iter().map(|&more| more.to_owned()));
    for (name, path) in [("--data-root", data), ("--output", output)] {
        all.extend([name.into(), path.to_str().unwrap().into()]);
    }
    all
}

pub fn start(arguments: &[String]) -> Child {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

pub fn resume(run: &Path) -> Vec<String> {
    vec!["--resume".into(), run.to_str().unwrap().into()]
}

pub fn finish(arguments: &[String]) -> Output {
    start(arguments).wait_with_output().unwrap()
}

pub fn assert_finished(output: &Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

/// Waits until the run has written `lines` lines of metrics.jsonl, or has ended.
pub fn wait_for_lines(run: &Path, child: &mut Child, lines: usize) {
    let begun = Instant::now();
    while lines_of(run) < lines && child.try_wait().unwrap().is_none() {
        assert!(begun.elapsed() < Duration::from_secs(120), "no {lines} lines in {}", run.display());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Asserts that a run has the same files as the unbroken one, byte for byte, and left no partial file.
pub fn assert_same(run: &Path, unbroken: &Path, how: &str) {
    for file in ["metrics.jsonl", "last.safetensors", "best.safetensors"] {
        let (got, want) = (fs::read(run.join(file)).unwrap(), fs::read(unbroken.join(file)).unwrap());
        assert!(got == want, "{file} differs from the unbroken run's ({how})");
    }
    let partial =
        fs::read_dir(run).unwrap().flatten().find(|e| e.path().extension() == Some("partial".as_ref()));
    assert!(partial.is_none(), "{partial:?} is left ({how})");
}

pub fn lines_of(run: &Path) -> usize {
    fs::read(run.join("metrics.jsonl")).map_or(0, |text| text.iter().filter(|&&byte| byte == b'\n').count())
}

pub fn send(signal: &str, child: &Child) {
    let status = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status();
    assert!(status.unwrap().success());
}

pub struct Place {
    pub folder: tempfile::TempDir,
    pub data: PathBuf,
}

impl Place {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        folder_of_pictures(&data, 8, 6);
        Self { folder, data }
    }

    pub fn run(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}
