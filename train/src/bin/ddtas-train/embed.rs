//! `ddtas-train embed`: prints what [`ddtas_train::inference::embed`] wrote.

use std::io::Write;

use ddtas_io::console::{counted, print_result, printable};
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
            "{}: {} of {} in {}, {} left out, {:.1} s",
            printable(&export.path.display().to_string()),
            counted(export.pictures, "picture"),
            counted(export.folders, "folder"),
            counted(export.dim, "dimension"),
            export.skipped.len(),
            export.seconds
        )
    })?)
}
