//! `ddtas-bench compare`: prints what [`ddtas_bench::compare`] finds.

use std::io::{self, Write};
use std::path::PathBuf;

use ddtas_bench::{Comparison, compare as compare_rows, read_rows};
use ddtas_io::console::{counted, print, print_json};

#[derive(clap::Args)]
pub struct CompareArguments {
    /// Output of `throughput --json`: the run to compare with.
    first: PathBuf,
    /// Output of a later `throughput --json`.
    second: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn compare(arguments: &CompareArguments) -> ddtas_io::Result<()> {
    let (first, second) = (read_rows(&arguments.first)?, read_rows(&arguments.second)?);
    let comparison = compare_rows((&arguments.first, &first), (&arguments.second, &second))?;
    if arguments.json { print_json(&comparison) } else { print(|out| table(out, &comparison)) }
}

fn table(out: &mut impl Write, comparison: &Comparison) -> io::Result<()> {
    writeln!(
        out,
        "{:>7} {:>7} {:>5} {:>8} {:>10} {:>10} {:>7} {:>8} {:>8} {:>8}",
        "B", "N", "D", "density", "first, ms", "then, ms", "ratio", "spread", "of best", "memory"
    )?;
    for row in &comparison.ratios {
        writeln!(
            out,
            "{:>7} {:>7} {:>5} {:>8} {:>10.3} {:>10.3} {:>7.3} {:>8} {:>8.3} {:>8}",
            row.batch,
            row.references.unwrap_or(row.batch),
            row.dim,
            row.density.as_deref().unwrap_or("-"),
            row.first_ms,
            row.second_ms,
            row.time,
            format!("±{:.3}", row.time_spread),
            row.time_best,
            row.memory.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
        )?;
    }
    let [first, then] = comparison
        .runs
        .each_ref()
        .map(|(backend, threads)| format!("{backend}, {}", counted(*threads, "CPU thread")));
    writeln!(
        out,
        "first: {first}; then: {then}; a ratio below 1: the second run is faster, or takes less memory"
    )
}
