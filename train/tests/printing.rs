//! `ddtas-train` with a closed pipe, a full disk or a closed terminal as standard output or standard error.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

mod runs;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use runs::process::{PROGRAM, Place, STEPS, arguments, assert_finished, assert_same, finish};
use runs::records;

/// A pipe whose reader is closed.
fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

fn full_disk() -> Stdio {
    File::options().write(true).open("/dev/full").unwrap().into()
}

fn assert_whole(run: &Path) {
    for file in ["config.toml", "last.safetensors", "best.safetensors", "report.html", "neighbours.png"] {
        assert!(run.join(file).metadata().unwrap().len() > 0, "{file}");
    }
    assert_eq!(records(run).0.len(), STEPS);
}

#[test]
fn a_closed_pipe_does_not_end_training() {
    let place = Place::new();
    let (unbroken, run) = (place.run("unbroken"), place.run("run"));
    assert_finished(&finish(&arguments(&place.data, &unbroken, &[])));
    // As in `ddtas-train 2>&1 | head -1`.
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = Command::new(PROGRAM);
    command.args(arguments(&place.data, &run, &[])).stdout(writer.try_clone().unwrap()).stderr(writer);
    let mut child = command.spawn().unwrap();
    // `command` holds writers of the pipe, which would keep it open.
    drop(command);
    let mut line = String::new();
    BufReader::new(reader).read_line(&mut line).unwrap();
    assert!(line.starts_with("computing on "), "{line}");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_whole(&run);
    assert_same(&run, &unbroken, "closed pipe");
}

#[test]
fn a_full_disk_behind_what_it_says_does_not_end_training() {
    let place = Place::new();
    let run = |name: &str, stdout: Stdio, stderr: Stdio| {
        let run = place.run(name);
        let mut command = Command::new(PROGRAM);
        let output =
            command.args(arguments(&place.data, &run, &[])).stdout(stdout).stderr(stderr).output().unwrap();
        assert_finished(&output);
        assert_whole(&run);
        output
    };
    run("both", full_disk(), full_disk());
    let table = String::from_utf8(run("progress", Stdio::piped(), full_disk()).stdout).unwrap();
    assert!(table.contains("Recall@K on unseen classes"), "{table}");
    let said = String::from_utf8(run("table", full_disk(), Stdio::piped()).stderr).unwrap();
    let warning = said.lines().last().unwrap();
    assert!(warning.starts_with("warning: cannot write to standard output: No space left"), "{said}");
    assert!(warning.contains("report.html"), "{said}");
}

/// Commands that print a result, from a checkpoint and its data.
fn that_print(place: &Place, checkpoint: &str) -> Vec<Vec<String>> {
    let data = place.data.to_str().unwrap();
    let file = |name: &str| place.run(name).to_str().unwrap().to_owned();
    let picture = format!("{data}/class00/0.png");
    let rows: [&[&str]; 4] = [
        &["eval", "--checkpoint", checkpoint, "--dataset", "folder", "--data-root", data],
        &["embed", "--checkpoint", checkpoint, "--images", data, "--out", &file("out.npy")],
        &["search", "--checkpoint", checkpoint, "--gallery", data, "--query", &picture],
        &["--help"],
    ];
    let mut all = Vec::new();
    for row in rows {
        let row: Vec<String> = row.iter().map(|&argument| argument.to_owned()).collect();
        if !row.contains(&"--help".to_owned()) {
            all.push([row.clone(), vec!["--json".to_owned()]].concat());
        }
        all.push(row);
    }
    all
}

fn run(arguments: &[String], stdout: Stdio, stderr: Stdio) -> Output {
    Command::new(PROGRAM).args(arguments).stdout(stdout).stderr(stderr).output().unwrap()
}

#[test]
fn a_result_that_nobody_reads_ends_a_program_quietly() {
    let place = Place::new();
    let trained = place.run("run");
    assert_finished(&finish(&arguments(&place.data, &trained, &["--steps", "2"])));
    let checkpoint = trained.join("best.safetensors");
    for arguments in that_print(&place, checkpoint.to_str().unwrap()) {
        let prints_help = arguments.contains(&"--help".to_owned());
        let closed = run(&arguments, closed_pipe(), Stdio::piped());
        let said = String::from_utf8(closed.stderr).unwrap();
        assert!(!said.contains("panicked") && !said.contains("ddtas-"), "{arguments:?}: {said}");
        assert!(prints_help || closed.status.code() == Some(1), "{arguments:?}: {:?}", closed.status);

        let full = run(&arguments, full_disk(), Stdio::piped());
        let said = String::from_utf8(full.stderr).unwrap();
        let last = said.lines().last().unwrap_or_default();
        assert!(!said.contains("panicked"), "{arguments:?}: {said}");
        let told = last.contains(": cannot write to standard output: No space left");
        assert!(prints_help || (told && full.status.code() == Some(1)), "{arguments:?}: {said}");

        let printed = run(&arguments, Stdio::piped(), full_disk());
        assert!(printed.status.success() && !printed.stdout.is_empty(), "{arguments:?}: {printed:?}");
    }
}

#[test]
fn an_error_that_nobody_reads_is_an_exit_code() {
    let arguments = ["--lambda", "9"].map(str::to_owned);
    for stderr in [closed_pipe(), full_disk()] {
        assert_eq!(run(&arguments, Stdio::null(), stderr).status.code(), Some(1));
    }
}

/// Runs a program on a new terminal, with hang-ups ignored; closes the terminal once it shows a bar.
const ON_A_TERMINAL: &str = include_str!("runs/on_a_terminal.py");

#[test]
fn a_terminal_that_goes_away_does_not_end_training() {
    let place = Place::new();
    let on_terminal = |arguments: &[String]| {
        let mut command = Command::new("python3");
        command.args(["-c", ON_A_TERMINAL, PROGRAM]).args(arguments).output().ok()
    };
    let (unbroken, trained) = (place.run("unbroken"), place.run("run"));
    let Some(output) = on_terminal(&arguments(&place.data, &trained, &[])) else {
        println!("skipped: there is no python3");
        return;
    };
    assert_finished(&output);
    assert_finished(&finish(&arguments(&place.data, &unbroken, &[])));
    assert_same(&trained, &unbroken, "a terminal that has gone");
}

#[test]
fn a_terminal_without_a_cursor_shows_lines() {
    let place = Place::new();
    let mut command = Command::new("python3");
    command.args(["-c", include_str!("runs/on_a_dumb_terminal.py"), PROGRAM]);
    command.args(arguments(&place.data, &place.run("run"), &["--steps", "2"])).stdin(Stdio::null());
    let Ok(output) = command.output() else {
        println!("skipped: there is no python3");
        return;
    };
    let shown = String::from_utf8_lossy(&output.stdout);
    assert_finished(&output);
    assert!(shown.contains("computing on ") && shown.contains("step 2/2: loss "), "{shown}");
}
