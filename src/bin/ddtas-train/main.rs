//! `ddtas-train`: trains an image-retrieval network and writes a run folder.

mod resume;
mod signals;
mod train;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser};
use ddtas::train::TrainSettings;

/// Trains an image-retrieval network with DDTAS and measures Recall@K on classes it never saw.
///
/// Without arguments it trains on car silhouettes drawn in memory, in a few minutes on two cores.
#[derive(Parser)]
#[command(version, args_override_self = true)]
struct Arguments {
    /// Go on with the run in this folder, by its own settings.
    #[arg(long, value_name = "RUN")]
    resume: Option<PathBuf>,
    #[command(flatten)]
    settings: TrainSettings,
}

fn main() -> ExitCode {
    let matches = Arguments::command().get_matches();
    let Arguments { resume, settings } = Arguments::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    let code = match resume {
        None => train::train(&settings),
        Some(folder) => {
            resume::overrides(&matches, &settings).and_then(|overrides| train::resume(&folder, &overrides))
        }
    };
    code.unwrap_or_else(|error| {
        eprintln!("ddtas-train: {error}");
        ExitCode::FAILURE
    })
}
