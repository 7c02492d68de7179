//! `ddtas-train embed`: prints what [`ddtas_train::inference::embed`] wrote.

use std::io::Write;

use ddtas_io::console::print_result;
use ddtas_train::inference::{EmbedSettings, embed as embed_folder};

use super::progress::{during, warn_of_skipped};

#[derive(clap::Args)]
pub struct EmbedArguments {
    #[command(flatten)]
    settings: EmbedSettings,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn embed(arguments: &EmbedArguments, quiet: bool) -> ddtas_train::Result<()> {
    let settings = &arguments.settings;
    let export = during(quiet, |tell| embed_folder(settings, tell))?;
    warn_of_skipped(&export.skipped);
    Ok(print_result(arguments.json, &export, |out, export| {
        writeln!(
            out,
            "{}: {} pictures of {} folders in {} dimensions, {} left out, {:.1} s",
            export.path.display(),
            export.pictures,
            export.folders,
            export.dim,
            export.skipped.len(),
            export.seconds
        )
    })?)
}
