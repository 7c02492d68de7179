//! Printing without panics: unlike `println!` and `eprintln!` where the output is a closed pipe or a full disk.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::iter;
use std::process::ExitCode;

use crate::{Error, Result};

/// The instruction set that the CPU's passes choose on this machine.
fn instruction_set() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512bw") && std::arch::is_x86_feature_detected!("avx512vl")
        {
            return "AVX-512";
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            return "AVX2";
        }
    }
    "baseline"
}

/// The text of `--version` behind the program's name.
#[must_use]
pub fn version(number: &str, features: &[(&str, bool)]) -> String {
    let on: Vec<&str> = features.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
    let features = if on.is_empty() { "none".to_owned() } else { on.join(", ") };
    format!("{number} (features: {features}; instruction set: {})", instruction_set())
}

/// `1 step`, `2 steps`, `2 classes`: a number with what is counted.
#[must_use]
pub fn counted(count: usize, noun: &str) -> String {
    counted_as(count, count, noun)
}

/// As [`counted`], with the number `shown` in a form of its own.
#[must_use]
pub fn counted_as(shown: impl Display, count: usize, noun: &str) -> String {
    let ending = match count {
        1 => "",
        _ if noun.ends_with('s') => "es",
        _ => "s",
    };
    format!("{shown} {noun}{ending}")
}

/// A message as one line, with its control characters escaped: names of files may hold some, and terminals obey them.
#[must_use]
pub fn printable(line: &str) -> String {
    let mut shown = String::with_capacity(line.len());
    for character in line.chars() {
        match character {
            '\t' => shown.push(character),
            _ if character.is_control() => shown.extend(character.escape_default()),
            _ => shown.push(character),
        }
    }
    shown
}

/// A text of several lines as one, with single blanks.
#[must_use]
pub fn one_line(text: impl Display) -> String {
    text.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Prints a line to standard error; a failure to write is ignored, as it should not end the work.
pub fn say(line: impl Display) {
    // One write, so that the lines of two threads or programs do not mix.
    let line = format!("{}\n", printable(&line.to_string()));
    let _ = io::stderr().write_all(line.as_bytes());
}

/// Prints a program's result to standard output. `write` fills a buffer, which is printed as a whole.
///
/// # Errors
/// [`Error::Output`] if it cannot be written.
pub fn print(write: impl FnOnce(&mut Vec<u8>) -> io::Result<()>) -> Result<()> {
    let mut text = Vec::new();
    let mut output = io::stdout().lock();
    let printed = write(&mut text).and_then(|()| output.write_all(&text)).and_then(|()| output.flush());
    printed.map_err(Error::Output)
}

/// A program's result as JSON.
///
/// # Errors
/// As [`print()`]; also if `value` has no JSON form.
pub fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::Output(error.into()))?;
    print(|out| writeln!(out, "{text}"))
}

/// Prints a program's result: as JSON on request, otherwise as `write` does.
///
/// # Errors
/// As [`print()`] and [`print_json`].
pub fn print_result<T: serde::Serialize>(
    json: bool,
    result: &T,
    write: impl FnOnce(&mut Vec<u8>, &T) -> io::Result<()>,
) -> Result<()> {
    if json { print_json(result) } else { print(|out| write(out, result)) }
}

/// Whether the error is a closed pipe behind standard output, as with `head`, which is no reason for a message.
#[must_use]
pub fn reader_has_gone(error: &(dyn std::error::Error + 'static)) -> bool {
    iter::successors(Some(error), |error| error.source()).any(|error| {
        let pipe = |source: &io::Error| source.kind() == ErrorKind::BrokenPipe;
        matches!(error.downcast_ref(), Some(Error::Output(source)) if pipe(source))
    })
}

/// Prints the error that ended `program`, and returns its exit code.
#[must_use]
pub fn failed(program: &str, error: &(dyn std::error::Error + 'static)) -> ExitCode {
    if !reader_has_gone(error) {
        say(format_args!("{program}: {error}"));
    }
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    #[test]
    fn control_characters_are_escaped() {
        let shown = super::printable("caf\u{e9}\x1b[2J\r\x07\u{9b}\tb\nc");
        assert_eq!(shown, "caf\u{e9}\\u{1b}[2J\\r\\u{7}\\u{9b}\tb\\nc");
    }
}
