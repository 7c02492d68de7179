//! Small runs of `ddtas-train`, and their output.
#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, reason = "test code outside #[test] functions")]

#[cfg(unix)]
pub mod process;

use std::collections::BTreeMap;
use std::path::Path;

use assert_cmd::Command;
use ddtas_io::tensors::{Dtype, TensorFile, to_bytes};
use ddtas_train::train::{EvaluationRecord, Record, StepRecord, read_records};

/// A run small enough for a test: pictures of 16 pixels, a narrow network, small batches.
pub fn small_run(output: &Path, steps: usize) -> Command {
    let mut command = Command::cargo_bin("ddtas-train").unwrap();
    let steps = steps.to_string();
    command.args(["--image-size", "16", "--width", "8", "--embedding-dim", "32", "--evaluate-every", "0"]);
    command.args(["--classes-per-batch", "8", "--images-per-class", "4", "--steps", &steps, "--output"]);
    command.arg(output);
    command
}

pub fn records(run: &Path) -> (Vec<StepRecord>, Vec<EvaluationRecord>) {
    let (mut steps, mut evaluations) = (Vec::new(), Vec::new());
    for record in read_records(&run.join("metrics.jsonl")).unwrap() {
        match record {
            Record::Rehearsal(_) => {}
            Record::Step(step) => steps.push(step),
            Record::Evaluation(evaluation) => evaluations.push(evaluation),
        }
    }
    (steps, evaluations)
}

/// Asserts exit code 1, one error line that contains `what`, and no standard output.
pub fn assert_refused(command: &mut Command, what: &str) {
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(what), "expected {what:?} in: {said}");
    assert_eq!(said.lines().filter(|line| line.starts_with("ddtas-train: ")).count(), 1, "{said}");
    assert!(!said.contains("panicked"), "{said}");
    assert!(output.stdout.is_empty());
}

/// Writes a folder of `classes` classes with `pictures` plain pictures each.
pub fn folder_of_pictures(root: &Path, classes: usize, pictures: usize) {
    for class in 0..classes {
        let folder = root.join(format!("class{class:02}"));
        std::fs::create_dir_all(&folder).unwrap();
        for picture in 0..pictures {
            let colour = [(class * 20) as u8, 255 - (class * 20) as u8, (picture * 30) as u8];
            let image = image::RgbImage::from_fn(24, 20, |x, y| {
                image::Rgb([colour[0], colour[1].wrapping_add((x + y) as u8), colour[2]])
            });
            image.save(folder.join(format!("{picture}.png"))).unwrap();
        }
    }
}

/// A tensor in a file: name, type, shape and bytes.
pub type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

/// Copies the .safetensors file `from` to `to` with its metadata and tensors changed.
pub fn change(from: &Path, to: &Path, change: impl FnOnce(&mut BTreeMap<String, String>, &mut Vec<Tensor>)) {
    let bytes = std::fs::read(from).unwrap();
    let file = TensorFile::parse(from, &bytes).unwrap();
    let mut tensors: Vec<Tensor> =
        file.tensors().map(|(name, dtype, shape, bytes)| (name, dtype, shape, bytes.to_vec())).collect();
    let mut facts = file.metadata;
    change(&mut facts, &mut tensors);
    let tensors = tensors.iter().map(|(name, dtype, shape, bytes)| (&**name, *dtype, &shape[..], &bytes[..]));
    std::fs::write(to, to_bytes(&facts, tensors.collect()).unwrap()).unwrap();
}
