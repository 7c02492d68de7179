//! `ddtas-bench` with a closed pipe, a full disk or a closed terminal as standard output or standard error.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test stops where something is off")]

use std::fs::{self, File};
use std::process::{Command, Output, Stdio};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ddtas-bench");
const VERIFY: &str = "verify ../tests/golden --backend cpu";
const THROUGHPUT: &str = "throughput --batch 40 --dim 8 --density all --seconds 0 --backend cpu";

/// A pipe whose reader is closed.
fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

fn full_disk() -> Stdio {
    File::options().write(true).open("/dev/full").unwrap().into()
}

fn run(arguments: &str, stdout: Stdio, stderr: Stdio) -> Output {
    Command::new(PROGRAM).args(arguments.split(' ')).stdout(stdout).stderr(stderr).output().unwrap()
}

#[test]
fn a_result_that_nobody_reads_ends_the_program_quietly() {
    let json = [VERIFY, THROUGHPUT].map(|arguments| format!("{arguments} --json"));
    for arguments in [VERIFY, THROUGHPUT, &json[0], &json[1], "throughput --help"] {
        let prints_help = arguments.contains("--help");
        let closed = run(arguments, closed_pipe(), Stdio::piped());
        let said = String::from_utf8(closed.stderr).unwrap();
        assert!(!said.contains("panicked") && !said.contains("ddtas-"), "{arguments}: {said}");
        assert!(prints_help || closed.status.code() == Some(1), "{arguments}: {:?}", closed.status);

        let full = run(arguments, full_disk(), Stdio::piped());
        let said = String::from_utf8(full.stderr).unwrap();
        let last = said.lines().last().unwrap_or_default();
        assert!(!said.contains("panicked"), "{arguments}: {said}");
        let told = last.contains(": cannot write to standard output: No space left");
        assert!(prints_help || (told && full.status.code() == Some(1)), "{arguments}: {said}");

        let printed = run(arguments, Stdio::piped(), full_disk());
        assert!(printed.status.success() && !printed.stdout.is_empty(), "{arguments}: {printed:?}");
    }
}

#[test]
fn an_error_that_nobody_reads_is_an_exit_code() {
    for stderr in [closed_pipe(), full_disk()] {
        assert_eq!(run("verify /nowhere", Stdio::null(), stderr).status.code(), Some(1));
    }
}

#[test]
fn a_terminal_that_goes_away_does_not_end_the_work() {
    let folder = tempfile::tempdir().unwrap();
    let svg = folder.path().join("plot.svg");
    let arguments = "throughput --batch 400,600 --dim 64 --density all --seconds 0.5 --backend cpu --plot";
    let mut command = Command::new("python3");
    command.args(["-c", include_str!("../../train/tests/runs/on_a_terminal.py"), PROGRAM]);
    let Ok(output) = command.args(arguments.split(' ')).arg(&svg).output() else {
        println!("skipped: there is no python3");
        return;
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "the table has no place to go: {said}");
    assert!(fs::read_to_string(&svg).unwrap().contains("</svg>"), "the work went on to its end");
}

#[test]
fn a_terminal_without_a_cursor_shows_lines() {
    let mut command = Command::new("python3");
    command.args(["-c", include_str!("../../train/tests/runs/on_a_dumb_terminal.py"), PROGRAM]);
    let Ok(output) = command.args(THROUGHPUT.split(' ')).stdin(Stdio::null()).output() else {
        println!("skipped: there is no python3");
        return;
    };
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && shown.contains("1 of 1: 40 x 8, all"), "{shown}");
}
