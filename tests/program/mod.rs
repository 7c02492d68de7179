//! What tests of `ddtas-train` from the outside share.
#![allow(clippy::unwrap_used, reason = "test code outside #[test] functions")]

use assert_cmd::Command;

/// One line on standard error that names `what`, exit code 1, nothing on standard output.
pub fn assert_refused(command: &mut Command, what: &str) {
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(what), "expected {what:?} in: {said}");
    assert_eq!(said.lines().filter(|line| line.starts_with("ddtas-train: ")).count(), 1, "{said}");
    assert!(!said.contains("panicked"), "{said}");
    assert!(output.stdout.is_empty());
}
