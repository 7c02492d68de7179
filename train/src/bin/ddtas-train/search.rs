//! `ddtas-train search`: prints what [`ddtas_train::inference::search`] finds.

use std::io::{self, Write};
use std::path::PathBuf;

use ddtas_io::console::{print_result, printable};
use ddtas_train::inference::{Found, SearchSettings, check_page, search as search_pictures, write_sheet};

use super::progress::{during, warn_of_skipped};

#[derive(clap::Args)]
pub struct SearchArguments {
    #[command(flatten)]
    settings: SearchSettings,
    /// Also write the pictures found into this HTML file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn search(arguments: &SearchArguments, quiet: bool) -> ddtas_train::Result<()> {
    let settings = &arguments.settings;
    arguments.html.as_deref().map_or(Ok(()), |path| check_page(path, settings.inputs()))?;
    let found = during(quiet, |tell| search_pictures(settings, tell))?;
    warn_of_skipped(&found.skipped);
    if let Some(path) = &arguments.html {
        write_sheet(&found, path)?;
    }
    Ok(print_result(arguments.json, &found, lists)?)
}

fn lists(out: &mut Vec<u8>, found: &Found) -> io::Result<()> {
    for query in &found.queries {
        let path = query.path.display().to_string();
        writeln!(out, "{} among {} pictures:", printable(&path), found.gallery)?;
        for (rank, answer) in query.answers.iter().enumerate() {
            let itself = if answer.itself { "  (the query itself)" } else { "" };
            let name = printable(&answer.name);
            writeln!(out, "{:>4}  {:>6.3}  {name}{itself}", rank + 1, answer.similarity)?;
        }
    }
    Ok(())
}
