//! `ddtas-bench throughput`: prints what [`ddtas_bench`] measures.

use std::io::{self, Write};
use std::path::PathBuf;

use ddtas_bench::{Row, ThroughputSettings, plot, run};
use ddtas_io::console::{counted, print, print_json};
use ddtas_io::files::{check_output, write_atomic};
use ddtas_io::progress::Progress;

use crate::resolved;

#[derive(clap::Args)]
pub struct ThroughputArguments {
    #[command(flatten)]
    settings: ThroughputSettings,
    /// Print no progress.
    #[arg(long, short)]
    quiet: bool,
    /// Print one JSON array with an object for each row.
    #[arg(long)]
    json: bool,
    /// Plot time and memory over the batch size into this SVG file.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

pub fn throughput(mut arguments: ThroughputArguments) -> ddtas_io::Result<()> {
    if let Some(path) = &arguments.plot {
        let (read, saved) =
            (arguments.settings.embeddings.clone(), arguments.settings.save_embeddings.clone());
        let others = [("embeddings", read), ("save-embeddings", saved)];
        check_output("plot", path, others.into_iter().filter_map(|(name, path)| Some((name, path?))))?;
    }
    arguments.settings.device = resolved(arguments.settings.device);
    let mut progress =
        Progress::new(arguments.json || arguments.quiet, "{bar:24} {pos}/{len} [{elapsed}] {msg}");
    let rows = run(&arguments.settings, &mut |index, count, name| {
        progress.at(index, count);
        progress.message(name.to_owned());
        progress.instead(true, format_args!("{} of {count}: {name}", index + 1));
    });
    progress.clear();
    let rows = rows?;
    if let Some(path) = &arguments.plot {
        let svg = plot(&rows).map_err(|reason| ddtas_io::Error::format(path, reason))?;
        write_atomic(path, svg.as_bytes())?;
    }
    if arguments.json {
        return print_json(&rows);
    }
    print(|out| table(out, &rows))
}

fn table(out: &mut impl Write, rows: &[Row]) -> io::Result<()> {
    writeln!(
        out,
        "{:>7} {:>7} {:>5} {:>8} {:>6} {:>8} {:>10} {:>9} {:>9} {:>8} {:>9}",
        "B",
        "N",
        "D",
        "density",
        "noise",
        "mined, %",
        "time, ms",
        "spread",
        "GFLOP/s",
        "of floor",
        "extra, MB"
    )?;
    let optional = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    for row in rows {
        writeln!(
            out,
            "{:>7} {:>7} {:>5} {:>8} {:>6} {:>8.2} {:>10.3} {:>9.3} {:>9.1} {:>8} {:>9}",
            row.batch,
            row.references.unwrap_or(row.batch),
            row.dim,
            row.density.as_deref().unwrap_or("-"),
            optional(row.noise.map(|noise| format!("{noise:.3}"))),
            100.0 * row.mined_share,
            row.time_ms,
            row.time_spread_ms,
            row.gflops,
            optional(row.floor_share.map(|share| format!("{share:.2}"))),
            optional(row.peak_extra_bytes.map(|bytes| format!("{:.2}", bytes as f64 / 1e6))),
        )?;
    }
    if let Some(row) = rows.first() {
        let products = if row.tf32 { ", multiplied in TF32" } else { "" };
        let (backend, threads) = (&row.backend, counted(row.threads, "CPU thread"));
        let seed = row.seed.map_or(String::new(), |seed| format!(", seed {seed}"));
        writeln!(out, "{backend}, {threads}, {} rows{products}{seed}", row.dtype)?;
    }
    Ok(())
}
