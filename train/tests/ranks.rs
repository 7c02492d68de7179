//! Runs on several ranks, which are threads of one process. `.ci/many.sh` tests MPI.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

mod runs;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Output;

use assert_cmd::Command;
use ddtas_io::tensors::{TensorFile, floats_of};
use ddtas_train::train::StepRecord;
use runs::process::{
    Place, arguments, assert_finished, assert_same, finish, resume, send, start, wait_for_lines,
};
use runs::{assert_refused, folder_of_pictures, records, small_run};

/// A run on a folder of small pictures with batches of 15: three ranks have 5 each, two have 8 and 7.
fn run_on(data: &Path, output: &Path, steps: usize, more: &[&str]) -> Command {
    let mut command = small_run(output, steps);
    command.args(["--dataset", "folder", "--classes-per-batch", "5", "--images-per-class", "3"]);
    command
        .args(["--generator", "off", "--meta-classes", "3", "--learning-rate", "0.004", "--lambda", "0.7"])
        .args(more)
        .arg("--data-root")
        .arg(data);
    command
}

/// The largest relative difference of `value` between two runs, over their steps.
fn apart(got: &[StepRecord], want: &[StepRecord], value: fn(&StepRecord) -> f64) -> f64 {
    assert_eq!(got.len(), want.len());
    let off = |(got, want): (&StepRecord, &StepRecord)| (value(got) / value(want) - 1.0).abs();
    let all: Vec<f64> = got.iter().zip(want).map(off).collect();
    assert!(all.iter().all(|off| off.is_finite()), "{all:?}");
    all.into_iter().fold(0.0, f64::max)
}

#[test]
fn any_number_of_ranks_goes_the_way_of_one_process() {
    let place = tempfile::tempdir().unwrap();
    let data = place.path().join("data");
    folder_of_pictures(&data, 12, 6);
    let first = place.path().join("first");
    run_on(&data, &first, 4, &[]).assert().success();
    let weights = first.join("best.safetensors");
    let run = |name: &str, ranks: &str, more: &[&str], steps: usize| {
        let folder = place.path().join(name);
        let mut command = run_on(&data, &folder, steps, more);
        command.args(["--smallest-crop", "1", "--learning-rate", "0.004"]);
        command.args(["--batch-norm", "frozen", "--ranks", ranks, "--init"]).arg(&weights).assert().success();
        folder
    };
    let one = records(&run("one", "1", &[], 30)).0;
    assert!(
        one[0].loss > 1.05 * one[29].loss,
        "nothing is learned: from {} to {}",
        one[0].loss,
        one[29].loss
    );
    for ranks in ["2", "3", "4"] {
        let folder = run(ranks, ranks, &[], 30);
        let got = records(&folder).0;
        assert!(apart(&got[..1], &one[..1], |step| step.loss) < 1e-6, "{ranks} ranks begin elsewhere");
        let off = apart(&got, &one, |step| step.loss);
        assert!(off < 0.01, "{ranks} ranks are off by {off}");
        assert!(got.iter().all(|step| step.sent_bytes.unwrap() > 0));
        if ranks == "3" {
            assert_same(&run("again", ranks, &[], 30), &folder, "the same ranks again");
        }
    }
    let ways: [(&str, &[&str]); 7] = [
        // Here the sum of the gradients counts, not their direction alone.
        ("adam", &["--optimizer", "adam", "--weight-decay", "0.1"]),
        ("head", &["--generator", "head"]),
        ("recent", &["--generator", "head", "--meta", "recent"]),
        ("full", &["--generator", "full"]),
        ("memory", &["--memory-size", "70", "--memory-start", "2", "--ema", "0.9"]),
        ("chunks", &["--chunk-size", "5", "--head-steps", "2"]),
        ("others", &["--loss", "multi-similarity", "--mining", "symmetric"]),
    ];
    for (name, more) in ways {
        let want = records(&run(&format!("{name}-1"), "1", more, 6)).0;
        let got = records(&run(&format!("{name}-3"), "3", more, 6)).0;
        let off = apart(&got, &want, |step| step.loss).max(apart(&got, &want, |step| step.lambda_pos));
        assert!(off < 1e-3, "{name}: three ranks are off by {off}");
        assert!(name != "head" || want[5].lambda_pos != want[0].lambda_pos, "lambda does not move");
    }
}

#[test]
fn synchronised_normalisation_goes_the_way_of_one_process() {
    let place = tempfile::tempdir().unwrap();
    let data = place.path().join("data");
    folder_of_pictures(&data, 12, 6);
    let run = |name: &str, ranks: &str, more: &[&str]| {
        let folder = place.path().join(name);
        let mut command = run_on(&data, &folder, 20, more);
        command.args(["--smallest-crop", "1", "--ranks", ranks]).assert().success();
        folder
    };
    let statistics = |folder: &Path| {
        let path = folder.join("last.safetensors");
        let bytes = fs::read(&path).unwrap();
        let file = TensorFile::parse(&path, &bytes).unwrap();
        let tensors: BTreeMap<_, _> =
            file.tensors().map(|(name, dtype, _, bytes)| (name, (dtype, bytes))).collect();
        let values = tensors.into_iter().filter(|(name, _)| name.contains("running_var"));
        values.flat_map(|(_, (dtype, bytes))| floats_of(dtype, bytes).unwrap()).collect::<Vec<f32>>()
    };
    let alone = run("alone", "1", &["--batch-norm", "synchronised"]);
    let one = records(&alone).0;
    assert_eq!(one, records(&run("trainable", "1", &[])).0, "one rank has nobody to ask");
    let off_by = |name: &str, ranks: &str, more: &[&str]| {
        let folder = run(name, ranks, more);
        let got = records(&folder).0;
        let (ours, theirs) = (statistics(&folder), statistics(&alone));
        assert!(!ours.is_empty() && ours.len() == theirs.len());
        // Relative to variance + 0.1, since pictures of one colour leave some variances near 0.
        let off: Vec<f32> = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs() / (b + 0.1)).collect();
        assert!(off.iter().all(|off| off.is_finite()));
        let losses = [1, 20].map(|steps| apart(&got[..steps], &one[..steps], |step| step.loss));
        (losses, off.into_iter().fold(0.0, f32::max))
    };
    for ranks in ["2", "3"] {
        let (losses, statistics) = off_by(ranks, ranks, &["--batch-norm", "synchronised"]);
        assert!(
            losses[0] < 1e-5 && losses[1] < 0.01 && statistics < 0.01,
            "{ranks} ranks are off by {losses:?}, {statistics}"
        );
    }
    let (losses, _) = off_by("own", "3", &["--batch-norm", "trainable"]);
    assert!(losses[0] > 1e-3, "a rank's own pictures normalise as the batch does: {losses:?}");
    let full = ["--batch-norm", "synchronised", "--generator", "full"];
    let want = records(&run("full-1", "1", &full)).0;
    let got = records(&run("full-3", "3", &full)).0;
    let off = apart(&got[..5], &want[..5], |step| step.lambda_pos);
    assert!(off < 1e-3 && want[4].lambda_pos != want[0].lambda_pos, "lambda is off by {off}");
}

#[test]
fn what_cannot_be_shared_is_refused_in_one_line() {
    let place = tempfile::tempdir().unwrap();
    let data = place.path().join("data");
    folder_of_pictures(&data, 10, 4);
    let run = |name: &str, more: &[&str]| run_on(&data, &place.path().join(name), 2, more);
    assert_refused(
        &mut run("few", &["--ranks", "16"]),
        "at least one picture for each rank: give more, or fewer than 16 --ranks",
    );
    let chunks = ["--ranks", "2", "--batch-norm", "synchronised", "--chunk-size", "4"];
    assert_refused(&mut run("chunks", &chunks), "--chunk-size");
    // All pictures of the last test class are on rank 1.
    for picture in 0..4 {
        fs::write(data.join(format!("class09/{picture}.png")), b"not a picture").unwrap();
    }
    assert_refused(&mut run("bad", &["--ranks", "2"]), "class09");
    let mut alone = run("alone", &[]);
    alone.env("OMPI_COMM_WORLD_SIZE", "2");
    assert_refused(&mut alone, "--ranks mpi");
}

#[test]
fn unreadable_pictures_are_counted_whichever_rank_meets_them() {
    let place = tempfile::tempdir().unwrap();
    let data = place.path().join("data");
    folder_of_pictures(&data, 10, 4);
    for bad in ["class00/0.png", "class03/2.png", "class07/2.png"] {
        fs::write(data.join(bad), b"not a picture").unwrap();
    }
    let warnings = |ranks: &str| {
        let mut command = run_on(&data, &place.path().join(ranks), 4, &["--ranks", ranks]);
        let output = command.assert().success().get_output().clone();
        let said = String::from_utf8(output.stderr).unwrap();
        let mut lines: Vec<_> =
            said.lines().filter(|line| line.starts_with("warning")).map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let alone = warnings("1");
    assert!(
        alone.iter().filter(|line| line.contains("replaces it") || line.contains("left out")).count() >= 3,
        "{alone:?}"
    );
    assert_eq!(warnings("3"), alone);
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_stopped_run_goes_on_with_as_many_ranks_or_others() {
    let place = Place::new();
    let more = ["--generator", "head", "--memory-size", "20", "--evaluate-every", "0", "--ranks", "3"];
    let unbroken = place.run("unbroken");
    assert_finished(&finish(&arguments(&place.data, &unbroken, &more)));
    for ranks in ["3", "2"] {
        let run = place.run(&format!("goes on with {ranks}"));
        let mut child = start(&arguments(&place.data, &run, &more));
        wait_for_lines(&run, &mut child, 17);
        send("USR1", &child);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(138), "{}", said(&output));
        let end = format!("; to go on: ddtas-train --ranks 3 --resume '{}'\n", run.display());
        assert!(said(&output).ends_with(&end), "{}", said(&output));
        let resumed = finish(&[resume(&run), vec!["--ranks".into(), ranks.into()]].concat());
        assert_finished(&resumed);
        let told = said(&resumed)
            .contains("warning: the run had 3 ranks so far, now 2: each normalises its own pictures");
        assert_eq!(told, ranks == "2", "{}", said(&resumed));
        if ranks == "3" {
            assert_same(&run, &unbroken, "as many ranks");
        } else {
            let ((got, _), (want, _)) = (records(&run), records(&unbroken));
            assert_eq!(
                got.iter().map(|step| step.step).collect::<Vec<_>>(),
                (0..want.len()).collect::<Vec<_>>()
            );
            assert!(
                got.iter().zip(&want).any(|(a, b)| a.sent_bytes != b.sent_bytes),
                "the ranks did not change"
            );
        }
    }
}

#[test]
fn a_finished_run_goes_on_to_more_steps_on_several_ranks() {
    let place = Place::new();
    let ranks = ["--ranks", "3"];
    let run = |name: &str, steps| {
        let run = place.run(name);
        let way = ["--generator", "head", "--schedule", "constant", "--warm-up", "0", "--steps", steps];
        assert_finished(&finish(&arguments(&place.data, &run, &[&ranks[..], &way].concat())));
        run
    };
    let (unbroken, run) = (run("unbroken", "60"), run("run", "36"));
    let more = ranks.into_iter().chain(["--steps", "60"]).map(str::to_owned);
    assert_finished(&finish(&resume(&run).into_iter().chain(more).collect::<Vec<_>>()));
    assert_same(&run, &unbroken, "36 steps, then 60");
}
