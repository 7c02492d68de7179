//! `ddtas-bench`: checks backends against the reference cases, and times them.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod compare;
mod throughput;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use compare::{CompareArguments, compare};
use ddtas::backend::Backend;
use ddtas_bench::DeviceArguments;
use ddtas_cases::{Case, Report, SINGLE_PRECISION, TF32, find, run, run_tf32};
use ddtas_io::console::{self, print, print_json, say};
use peak_alloc::PeakAlloc;
use throughput::{ThroughputArguments, throughput};

/// Counts allocations, for the memory that `throughput` reports.
#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

#[derive(Parser)]
#[command(version, about = "Checks and times the DDTAS loss")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Checks a backend against reference cases; exits with 0 only if all pass.
    ///
    /// Counts of mined pairs must be exact, loss, gradient and thresholds within 1e-5. With --tf32 the reference is
    /// computed from rows rounded to TF32, and the bound is 1e-3.
    Verify(VerifyArguments),
    /// Times loss and gradient on random rows, of whose negative pairs a chosen share is mined.
    Throughput(ThroughputArguments),
    /// Compares two outputs of `throughput --json`: ratios of time and memory.
    Compare(CompareArguments),
}

#[derive(clap::Args)]
struct VerifyArguments {
    /// Case files (.safetensors) or folders of them.
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    #[command(flatten)]
    device: DeviceArguments,
    /// Print one JSON array with an object for each case.
    #[arg(long)]
    json: bool,
}

/// The command line. The version names features and instruction set too; `-1` is a value, not a flag.
fn command() -> clap::Command {
    let features = [("cuda", cfg!(feature = "cuda")), ("emulated", cfg!(feature = "emulated"))];
    let version = console::version(env!("CARGO_PKG_VERSION"), &features);
    let numbers = |argument: clap::Arg| argument.allow_negative_numbers(true);
    Arguments::command().version(version).mut_subcommands(|command| command.mut_args(numbers))
}

fn main() -> ExitCode {
    let arguments =
        Arguments::from_arg_matches(&command().get_matches()).unwrap_or_else(|error| error.exit());
    let outcome = match arguments.command {
        Command::Verify(arguments) => verify(&arguments),
        Command::Throughput(arguments) => throughput(arguments).map(|()| true),
        Command::Compare(arguments) => compare(&arguments).map(|()| true),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => console::failed("ddtas-bench", &error),
    }
}

/// The device to compute on; prints a line if a build for GPUs uses none.
fn resolved(device: DeviceArguments) -> DeviceArguments {
    let (device, reason) = device.resolve();
    if let Some(reason) = reason {
        say(format_args!("computing on {}: {reason}", device.backend));
    }
    device
}

/// One line of `verify`.
#[derive(serde::Serialize)]
struct Row {
    case: String,
    backend: String,
    passed: bool,
    #[serde(flatten)]
    report: Report,
}

fn verify(arguments: &VerifyArguments) -> ddtas_io::Result<bool> {
    let files = find(&arguments.paths)?;
    let device = resolved(arguments.device);
    let mut backend = device.open()?;
    let run = if device.tf32 { run_tf32 } else { run };
    let bound = if device.tf32 { TF32 } else { SINGLE_PRECISION };
    let mut rows = Vec::with_capacity(files.len());
    for file in &files {
        let case = Case::read(file)?;
        let report = run(&case, &mut *backend)?;
        let passed = report.passes(bound);
        rows.push(Row { case: case.name, backend: backend.name(), passed, report });
    }
    if arguments.json {
        print_json(&rows)?;
    } else {
        print(|out| table(out, &*backend, &rows, bound))?;
    }
    Ok(rows.iter().all(|row| row.passed))
}

fn table(out: &mut impl Write, backend: &dyn Backend, rows: &[Row], bound: f64) -> io::Result<()> {
    writeln!(
        out,
        "{:<22} {:>9} {:>9} {:>10} {:>18} {:>7}",
        "case", "loss", "gradient", "thresholds", "threshold gradient", "counts"
    )?;
    for Row { case, passed, report, .. } in rows {
        let counts = if report.wrong_counts.is_empty() { "exact" } else { "WRONG" };
        writeln!(
            out,
            "{case:<22} {:>9.1e} {:>9.1e} {:>10.1e} {:>18.1e} {counts:>7}{}",
            report.loss,
            report.gradient,
            report.thresholds,
            report.threshold_gradient,
            if *passed { "" } else { "  FAILED" }
        )?;
        for wrong in report.wrong_counts.iter().take(5) {
            writeln!(out, "    {wrong}")?;
        }
    }
    let passed = rows.iter().filter(|row| row.passed).count();
    writeln!(out, "{passed} of {} cases passed on {} (bound {bound:.0e})", rows.len(), backend.name())
}
